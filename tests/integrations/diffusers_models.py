"""Tiny random transformers and pipelines of diffusers with inputs of odd sizes, for the tests of their adapter."""

from typing import Any, NamedTuple

import diffusers
import torch

#: Frames, rows and columns of latent tokens.
GRID = (3, 5, 7)
TOKENS = 105
TEXT = 6


class Case(NamedTuple):
    """model, the arguments of its forward, layers that attend to the sequence itself, and the tokens of that."""

    model: Any
    inputs: dict[str, Any]
    layers: int
    tokens: int

    def run(self, **changes: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.model(**{**self.inputs, **changes}, return_dict=False)[0]


def wan(layers: int = 2, heads: int = 2, channels: int = 4, **changes: Any) -> Case:
    model = diffusers.WanTransformer3DModel(
        **{"num_attention_heads": heads, "attention_head_dim": 16, "in_channels": channels, "out_channels": channels},
        **{"text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": layers, "rope_max_seq_len": 32, **changes},
    )
    inputs = {
        "hidden_states": torch.randn(2, channels, 3, 10, 14),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
    }
    return Case(model, inputs, layers, TOKENS)


def hunyuan(double: int = 1, single: int = 2) -> Case:
    model = diffusers.HunyuanVideoTransformer3DModel(
        **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16},
        **{"num_layers": double, "num_single_layers": single, "num_refiner_layers": 1, "text_embed_dim": 16},
        **{"pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6), "guidance_embeds": True},
    )
    mask = torch.ones(2, TEXT, dtype=torch.int64)
    mask[1, 3:] = 0
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 10, 14),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(2, 8),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }
    return Case(model, inputs, double + single, TOKENS + TEXT)


def cogvideox(layers: int = 2) -> Case:
    model = diffusers.CogVideoXTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": layers,
        },
        **{"text_embed_dim": 16, "time_embed_dim": 8, "sample_width": 14, "sample_height": 10, "sample_frames": 9},
        **{"max_text_seq_length": TEXT, "use_rotary_positional_embeddings": True},
    )
    angles = torch.randn(TOKENS, 16)
    inputs = {
        "hidden_states": torch.randn(2, 3, 4, 10, 14),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "timestep": torch.tensor([500, 500]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    return Case(model, inputs, layers, TOKENS + TEXT)


def ltx(layers: int = 2) -> Case:
    model = diffusers.LTXVideoTransformer3DModel(
        **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16},
        **{"cross_attention_dim": 32, "num_layers": layers, "caption_channels": 16},
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 4),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": torch.ones(2, TEXT),
        **dict(zip(("num_frames", "height", "width"), GRID, strict=True)),
    }
    return Case(model, inputs, layers, TOKENS)


def flux(double: int = 1, single: int = 2) -> Case:
    model = diffusers.FluxTransformer2DModel(
        **{"in_channels": 4, "num_layers": double, "num_single_layers": single, "attention_head_dim": 16},
        **{
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (4, 4, 8),
        },
    )
    places = torch.arange(TOKENS)
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 4),
        "encoder_hidden_states": torch.randn(2, TEXT, 32),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.stack([torch.zeros(TOKENS), places // 7, places % 7], dim=1),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return Case(model, inputs, double + single, TOKENS + TEXT)


def sd3(layers: int = 2) -> Case:
    model = diffusers.SD3Transformer2DModel(
        **{"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": layers, "attention_head_dim": 16},
        **{"num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 32},
        **{"pooled_projection_dim": 8, "pos_embed_max_size": 16},
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 14, 16),
        "encoder_hidden_states": torch.randn(2, 49, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([500, 500]),
    }
    return Case(model, inputs, layers, 56 + 49)


def qwenimage(layers: int = 2) -> Case:
    model = diffusers.QwenImageTransformer2DModel(
        **{"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": layers, "attention_head_dim": 16},
        **{"num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6)},
    )
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, 3:] = False
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 4),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.5, 0.5]),
        "img_shapes": [(1, 15, 7)] * 2,
    }
    return Case(model, inputs, layers, TOKENS + TEXT)


CASES = {case.__name__: case for case in (wan, hunyuan, cogvideox, ltx, flux, sd3, qwenimage)}


def build(name: str, *args: Any, **kwargs: Any) -> Case:
    torch.manual_seed(0)
    case = CASES[name](*args, **kwargs)
    # Some start as zeros, so that nothing of the attention reaches the output.
    for parameter in case.model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return case._replace(model=case.model.eval())


def wan_pipeline(scheduler: Any = None, second: bool = False) -> Any:
    vae = diffusers.AutoencoderKLWan(
        **{"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        **{"temperal_downsample": [False, True, True], "attn_scales": []},
    )
    pipeline = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        if scheduler is None
        else scheduler,
        transformer=build("wan", channels=16).model,
        transformer_2=build("wan", channels=16).model if second else None,
        boundary_ratio=0.875 if second else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, steps: int = 5, **changes: Any) -> torch.Tensor:
    """Latents of a run with guidance, which evaluates every step twice."""
    generator = torch.Generator().manual_seed(0)
    options = {
        "prompt_embeds": torch.randn(1, TEXT, 16, generator=generator),
        "negative_prompt_embeds": torch.randn(1, TEXT, 16, generator=generator),
        **{"height": 80, "width": 112, "num_frames": 9, "guidance_scale": 3.0, "output_type": "latent"},
    }
    return pipeline(**{**options, **changes}, num_inference_steps=steps, generator=generator).frames
