"""The options of the sampler, frozen and validated once; the loop never checks one again."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from baatt.models.config import check_positive_integer
from baatt.sampling.filling import REMASKING
from baatt.types import as_float


class Span(NamedTuple):
    """Tokens [start, stop) of a sequence, prompt included."""

    start: int
    stop: int


#: A block's span and the sequence's length -> the span that its steps after the first one evaluate: Fast-dLLM's prefix
#: and dual cache (arXiv 2505.22618). The first step evaluates the whole sequence and keeps keys and values. A later one
#: evaluates its span against all that is kept, with its own keys and values in their place: those of other tokens are
#: of the first step, before the block began to fill.
CACHES: dict[str, Callable[[Span, int], Span]] = {
    "none": lambda block, length: Span(0, length),
    "prefix": lambda block, length: Span(block.start, length),
    "dual": lambda block, length: block,
}


@dataclass(frozen=True)
class SamplerConfig:
    """The sampler's options; the defaults are those of LLaDA's `generate`.

    Args:
        steps: denoising steps of the whole generation, shared evenly by the blocks.
        gen_length: tokens to generate.
        block_length: tokens denoised together, left to right; divides `gen_length`.
        temperature: of Gumbel noise added to the logits; 0 takes the most probable token.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that the text so far holds,
            prompt included, end-of-text tokens excepted (CTRL, arXiv 1909.05858, and transformers); 1 leaves it out.
        cfg_scale: weight of classifier-free guidance, un + (cfg_scale + 1) * (cond - un); 0 leaves it out.
        remasking: confidence that orders the positions of a block, a name in `REMASKING`.
        threshold: None fills equally many positions per step. A probability fills every position surer than it, and
            never fewer than it takes to finish the block in its share of `steps`.
        seed: of the noise and of remasking "random".
        stop_at_eos: a row that has an end-of-text token in a finished block is done; the rest of it is filled with the
            model's first such token without evaluating the model. The text before the token is the same either way at
            temperature 0.
        cache: which keys and values the steps of a block after its first take over from it, a name in `CACHES`: "none",
            "prefix" those before the block, "dual" all but the block's own. They are stale, so the result may differ.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside its range, or sizes that do not divide each other.
    """

    steps: int = 128
    gen_length: int = 128
    block_length: int = 128
    temperature: float = 0.0
    repetition_penalty: float = 1.0
    cfg_scale: float = 0.0
    remasking: str = field(default="low_confidence", metadata={"choices": REMASKING})
    threshold: float | None = None
    seed: int = 0
    stop_at_eos: bool = False
    cache: str = field(default="none", metadata={"choices": CACHES})

    def __post_init__(self) -> None:
        for name in ("steps", "gen_length", "block_length"):
            check_positive_integer(name, getattr(self, name))
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"seed must be an int, got {self.seed!r}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be a number of 64 bits, got {self.seed}")
        if not isinstance(self.stop_at_eos, bool):
            raise TypeError(f"stop_at_eos must be a bool, got {self.stop_at_eos!r}")
        for name in ("temperature", "repetition_penalty", "cfg_scale", "threshold"):
            value = getattr(self, name)
            if value is None and name == "threshold":
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
            may_be_zero = name != "repetition_penalty"
            if not math.isfinite(as_float(value)) or value < 0 or (value == 0 and not may_be_zero):
                raise ValueError(f"{name} must be finite and {'at least' if may_be_zero else 'above'} 0, got {value}")
        if self.gen_length % self.block_length:
            raise ValueError(f"block_length must divide gen_length={self.gen_length}, got {self.block_length}")
        if self.steps % self.blocks:
            raise ValueError(f"steps must be a multiple of gen_length / block_length = {self.blocks}, got {self.steps}")
        for name, choices in (("remasking", list(REMASKING)), ("cache", list(CACHES))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.threshold is not None and self.threshold > 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold}")
        if self.threshold is not None and self.remasking == "random":
            raise ValueError(f"threshold must be None where remasking is 'random', got {self.threshold}")

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.gen_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        """Steps a block may take."""
        return self.steps // self.blocks
