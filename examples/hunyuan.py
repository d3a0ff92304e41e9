"""HunyuanVideo with BA-Att: `python examples/hunyuan.py PATH [PROMPT]`; without a path a tiny random transformer."""

import sys

import diffusers
import torch

import baatt
from baatt import BAAttConfig, Policy
from baatt.integrations.video import VideoTiles


def denoise(model: torch.nn.Module, steps: int = 5) -> torch.Tensor:
    """What the pipeline does, without its text encoders: 6 of 10 text tokens are padding, which the mask bars."""
    latents, text = torch.randn(1, 4, 4, 24, 24), {"encoder_hidden_states": torch.randn(1, 10, 16)}
    text |= {"encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 6]), "pooled_projections": torch.randn(1, 8)}
    for step in range(steps):
        timestep, guidance = torch.tensor([1000 - 1000 * step // steps]), torch.tensor([6000.0])
        latents = latents - model(latents, timestep, guidance=guidance, **text).sample / steps
    return latents


@torch.no_grad()
def main() -> None:
    if len(sys.argv) > 1:
        pipe = diffusers.HunyuanVideoPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16).to("cuda")
        prompt = sys.argv[2] if len(sys.argv) > 2 else "A fox runs through fresh snow"
    else:
        size = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32}
        text = {"text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (8, 12, 12)}
        pipe = diffusers.HunyuanVideoTransformer3DModel(in_channels=4, out_channels=4, **size, **text).eval()
    with baatt.enable(pipe, BAAttConfig(), Policy(dense_steps=0.2, dense_layers=(0, 1)), order=VideoTiles()) as handle:
        frames = pipe(prompt).frames[0] if len(sys.argv) > 1 else denoise(pipe)
    print(handle.report())
    if len(sys.argv) > 1:
        diffusers.utils.export_to_video(frames, "hunyuan.mp4", fps=15)


if __name__ == "__main__":
    main()
