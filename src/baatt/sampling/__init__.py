"""LLaDA's semi-autoregressive sampler, with Fast-dLLM's caches and confidence threshold.

In: a masked-diffusion model, prompt ids [B, N] and a `SamplerConfig`. Out: `SampleResult` with tokens [B, gen_length].
`config.py` holds the dials, `loop.py` the loop over blocks and steps, `run.py` one step, `filling.py` which positions
it fills, `caching.py` which tokens it evaluates, `routing.py` which layers are dense or sparse at it.
"""

from baatt.sampling.caching import CACHES
from baatt.sampling.config import SamplerConfig
from baatt.sampling.loop import SampleResult, StepInfo, WrapAttention, generate
from baatt.sampling.remasking import REMASKING
from baatt.sampling.routing import layer_attention
from baatt.sampling.run import DenoisingModel

__all__ = [
    "CACHES",
    "REMASKING",
    "DenoisingModel",
    "SampleResult",
    "SamplerConfig",
    "StepInfo",
    "WrapAttention",
    "generate",
    "layer_attention",
]
