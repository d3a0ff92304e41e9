"""Wan with BA-Att: `python examples/wan.py PATH [PROMPT]`; without a path a tiny random model on the CPU."""

import sys

import diffusers
import torch

import baatt
from baatt import BAAttConfig, Policy
from baatt.integrations.video import VideoTiles


def tiny() -> diffusers.WanPipeline:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=4, ffn_dim=64, text_dim=16, freq_dim=32
    )
    vae = diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    parts = {"transformer": transformer.eval(), "vae": vae, "scheduler": scheduler}
    return diffusers.WanPipeline(tokenizer=None, text_encoder=None, **parts)


def main() -> None:
    config = BAAttConfig(block_size=128, sparsity=0.5)
    if len(sys.argv) > 1:
        pipe = diffusers.WanPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16).to("cuda")
        options = {"prompt": sys.argv[2] if len(sys.argv) > 2 else "A fox runs through fresh snow"}
    else:
        pipe = tiny()
        options = {name: torch.randn(1, 8, 16) for name in ("prompt_embeds", "negative_prompt_embeds")}
        options |= {"num_frames": 13, "height": 128, "width": 128, "num_inference_steps": 5, "output_type": "latent"}
    with baatt.enable(pipe, config, Policy(dense_steps=0.2, dense_layers=(0, 1)), order=VideoTiles()) as handle:
        frames = pipe(**options).frames[0]
    print(handle.report())
    if len(sys.argv) > 1:
        diffusers.utils.export_to_video(frames, "wan.mp4", fps=16)


if __name__ == "__main__":
    main()
