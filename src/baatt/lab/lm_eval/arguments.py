"""The `--model_args` of the lm-evaluation-harness model `baatt_llada` and what a request asks for, as checked settings.

`read_options(ModelArguments, given)` of `baatt.lab.options` reads the first, `read_generation` a request's keyword
arguments. Everything that an answer depends on is in `ModelArguments.settings()`, which is stored with the results.
Knows nothing of models and of the harness itself.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from baatt.config import BAAttConfig, Policy
from baatt.lab.loading import DTYPES
from baatt.lab.prompts import TRUNCATIONS
from baatt.models.config import check_positive_integer
from baatt.sampling import CACHES, REMASKING, SamplerConfig

#: Names of the answer's length, as in the harness; the first that is given counts.
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
#: Arguments that mean nothing without sampling, and are refused with it.
SAMPLING_ONLY = ("top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


@dataclass(frozen=True)
class Sampling:
    """How answers are generated.

    Args:
        gen_length: tokens generated where a task does not say how many.
        block_length: tokens denoised together; the length of an answer is rounded up to a multiple, and cut afterwards.
        steps: denoising steps per `gen_length` tokens; answers of another length take their share. None is one step per
            token.
        threshold, repetition_penalty, cfg_scale, remasking, cache, seed: as `SamplerConfig`.
    """

    gen_length: int = 256
    block_length: int = 32
    steps: int | None = None
    threshold: float | None = None
    repetition_penalty: float = 1.0
    cfg_scale: float = 0.0
    remasking: str = field(default="low_confidence", metadata={"choices": REMASKING})
    cache: str = field(default="none", metadata={"choices": CACHES})
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("gen_length", "block_length") if self.steps is None else ("gen_length", "block_length", "steps"):
            check_positive_integer(name, getattr(self, name))
        self.config(self.gen_length)

    def config(
        self, tokens: int, *, temperature: float = 0.0, stop_at_eos: bool = False, repeat: int = 0
    ) -> SamplerConfig:
        """The sampler for an answer of at most `tokens`; `repeat` numbers repetitions of a sampled request."""
        blocks = math.ceil(tokens / self.block_length)
        length = blocks * self.block_length
        steps = length if self.steps is None else min(length, self.steps * length / self.gen_length)
        return SamplerConfig(
            steps=max(1, math.ceil(steps / blocks)) * blocks, gen_length=length, block_length=self.block_length,
            temperature=temperature, repetition_penalty=self.repetition_penalty, cfg_scale=self.cfg_scale,
            remasking=self.remasking, threshold=self.threshold, seed=self.seed + repeat, stop_at_eos=stop_at_eos,
            cache=self.cache,
        )  # fmt: skip


@dataclass(frozen=True)
class ModelArguments:
    """Checked model arguments; the fields of `sampling`, `sparse` and `policy` are arguments like the others.

    Args:
        pretrained: folder in LLaDA's layout, with a tokenizer.json, or a name of `loading.MODELS`.
        dtype: of the weights, a name in `DTYPES`; "auto" keeps the stored one.
        device: such as "cpu" or "cuda:0"; None takes a GPU if there is one.
        batch_size: prompts generated together, or masks of a likelihood evaluated together.
        max_length: tokens of prompt and answer together; None is the length the model was trained for.
        truncation: where a longer prompt is cut, a name in `TRUNCATIONS`.
        mc_num: masks drawn per likelihood.
        is_check_greedy: say of a scored continuation whether it is what the model would generate, one token a step.
        save_dir: folder where answers are kept to resume from; None keeps none.
        sampling: of generated answers.
        sparse: BA-Att; None, where no sparsity is given, is dense attention.
        policy: what stays dense nevertheless.
        impl: as `ba_attention`.
    """

    pretrained: str
    dtype: str = field(default="auto", metadata={"choices": ("auto", *DTYPES)})
    device: str | None = None
    batch_size: int = 1
    max_length: int | None = None
    truncation: str = field(default="left", metadata={"choices": TRUNCATIONS})
    mc_num: int = 128
    is_check_greedy: bool = False
    save_dir: str | None = None
    impl: str = "auto"
    sampling: Sampling = field(default_factory=Sampling)
    sparse: BAAttConfig | None = field(default=None, metadata={"needs": "sparsity"})
    policy: Policy = field(default_factory=Policy, metadata={"needs": "sparsity"})

    def __post_init__(self) -> None:
        for name in ("batch_size", "mc_num") if self.max_length is None else ("batch_size", "mc_num", "max_length"):
            check_positive_integer(name, getattr(self, name))
        if not isinstance(self.is_check_greedy, bool):
            raise TypeError(f"is_check_greedy must be a bool, got {self.is_check_greedy!r}")

    def settings(self) -> dict[str, Any]:
        """Everything that an answer depends on, as JSON values."""
        values = dataclasses.asdict(self)
        del values["save_dir"], values["device"]
        values["policy"]["dense_layers"] = list(self.policy.dense_layers)
        return values


class Generation(NamedTuple):
    """One request."""

    tokens: int  # of the longest answer
    stops: tuple[str, ...]  # texts that end it
    temperature: float  # 0 = greedy
    repeat: int = 0  # number of the repetition of a sampled request

    def settings(self) -> list[Any]:
        """As JSON values, without the number of the repetition."""
        return [self.tokens, list(self.stops), self.temperature]


def read_generation(options: Mapping[str, Any], sampling: Sampling) -> Generation:
    """Read a request's keyword arguments.

    `do_sample: false` is greedy whatever the temperature, as LongBench's tasks have it. ValueError: an answer length
    below 1, a temperature that is none, or arguments of sampling that the sampler does not have.
    """
    stops = options.get("until") or ()
    stops = (stops,) if isinstance(stops, str) else stops
    lengths = [options[name] for name in LENGTH_NAMES if options.get(name) is not None]
    tokens = int(lengths[0]) if lengths else sampling.gen_length
    if tokens < 1:
        raise ValueError(f"max_gen_toks must be positive, got {tokens}")
    temperature = float(options.get("temperature") or 0.0)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if options.get("do_sample") is False:
        temperature = 0.0
    refused = [name for name in SAMPLING_ONLY if options.get(name) not in (None, 0, 1)]
    if temperature > 0 and refused:
        raise ValueError(f"gen_kwargs must not have {', '.join(refused)}, which the sampler does not know")
    return Generation(tokens, tuple(stop for stop in stops if stop), temperature)
