"""LLaDA's semi-autoregressive sampler, with Fast-dLLM's caches and confidence threshold.

In: a masked-diffusion model, prompt ids [B, N] and a `SamplerConfig`. Out: `SampleResult` with tokens [B, gen_length].
`config.py` holds the options, `loop.py` the loop over blocks and steps, `filling.py` which positions a step fills.
Knows no sparsity: that is `baatt.enable`, whose handle is told the step.
"""

from baatt.sampling.config import CACHES, SamplerConfig
from baatt.sampling.filling import REMASKING
from baatt.sampling.loop import DenoisingModel, SampleResult, StepInfo, generate

__all__ = ["CACHES", "REMASKING", "DenoisingModel", "SampleResult", "SamplerConfig", "StepInfo", "generate"]
