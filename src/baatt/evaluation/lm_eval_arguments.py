"""The `--model_args` of the lm-evaluation-harness model `baatt_llada`: names and texts in, checked settings out.

Everything that an answer depends on is in `ModelArguments.settings()`, which is stored with the results. An unknown
name is refused. Knows nothing of the harness itself.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from baatt.config import BAAttConfig, Policy
from baatt.lab.prompts import TRUNCATIONS
from baatt.sampling import SamplerConfig

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DIALS = ("sparsity", "block_size", "sort", "segment", "score", "beta")
POLICY = ("dense_layers", "dense_steps", "min_length", "min_queries")


@dataclass(frozen=True)
class Sampling:
    """How answers are generated.

    Args:
        gen_length: tokens generated where a task does not say how many.
        block_length: tokens denoised together; the length of an answer is rounded up to a multiple, and cut afterwards.
        steps: denoising steps per `gen_length` tokens; answers of another length take their share. None is one step per
            token.
        threshold, cfg_scale, remasking, cache, seed: as `SamplerConfig`.
    """

    gen_length: int = 256
    block_length: int = 32
    steps: int | None = None
    threshold: float | None = None
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    cache: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("gen_length", "block_length") if self.steps is None else ("gen_length", "block_length", "steps"):
            _check_positive(name, getattr(self, name))
        self.config(self.gen_length)

    def rounded(self, tokens: int) -> int:
        """Tokens that are generated for an answer of at most `tokens`."""
        return math.ceil(tokens / self.block_length) * self.block_length

    def config(
        self, tokens: int, *, temperature: float = 0.0, stop_at_eos: bool = False, repeat: int = 0
    ) -> SamplerConfig:
        """The sampler for an answer of at most `tokens`; `repeat` numbers repetitions of a sampled request."""
        length = self.rounded(tokens)
        blocks = length // self.block_length
        steps = length if self.steps is None else min(length, self.steps * length / self.gen_length)
        return SamplerConfig(
            steps=max(1, math.ceil(steps / blocks)) * blocks, gen_length=length, block_length=self.block_length,
            temperature=temperature, cfg_scale=self.cfg_scale, remasking=self.remasking, threshold=self.threshold,
            seed=self.seed + repeat, stop_at_eos=stop_at_eos, cache=self.cache,
        )  # fmt: skip


@dataclass(frozen=True)
class ModelArguments:
    """Checked model arguments.

    Args:
        pretrained: folder in LLaDA's layout, with a tokenizer.json.
        dtype: of the weights, a name in `DTYPES`; "auto" keeps the stored one.
        device: such as "cpu" or "cuda:0"; None takes a GPU if there is one.
        batch_size: prompts generated together, or masks of a likelihood evaluated together.
        max_length: tokens of prompt and answer together; None is the length the model was trained for.
        truncation: where a longer prompt is cut, a name in `TRUNCATIONS`.
        mc_num: masks drawn per likelihood.
        is_check_greedy: say of a scored continuation whether it is what the model would generate, one token a step.
        save_dir: folder where answers are kept to resume from; None keeps none.
        sampling: of generated answers.
        sparse: dials of BA-Att; None is dense attention.
        policy: what stays dense nevertheless.
        impl: as `ba_attention`.
    """

    pretrained: str
    dtype: str = "auto"
    device: str | None = None
    batch_size: int = 1
    max_length: int | None = None
    truncation: str = "left"
    mc_num: int = 128
    is_check_greedy: bool = False
    save_dir: str | None = None
    impl: str = "auto"
    sampling: Sampling = field(default_factory=Sampling)
    sparse: BAAttConfig | None = None
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        for name, choices in (("dtype", DTYPES), ("truncation", TRUNCATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {getattr(self, name)!r}")
        for name in ("batch_size", "mc_num"):
            _check_positive(name, getattr(self, name))
        if self.max_length is not None:
            _check_positive("max_length", self.max_length)
        if not isinstance(self.is_check_greedy, bool):
            raise TypeError(f"is_check_greedy must be a bool, got {self.is_check_greedy!r}")

    def settings(self) -> dict[str, Any]:
        """Everything that an answer depends on, as JSON values."""
        values = dataclasses.asdict(self)
        del values["save_dir"], values["device"]
        values["policy"]["dense_layers"] = list(self.policy.dense_layers)
        return values


def read_model_arguments(values: Mapping[str, Any]) -> ModelArguments:
    """Check model arguments as the harness hands them over.

    `dense_layers` is written `0+1+-1`, since a comma ends an argument; `segment=whole` sorts the whole sequence.

    Raises:
        TypeError, ValueError: an unknown name, a missing `pretrained`, a dial of BA-Att without `sparsity`, or a value
            that its setting refuses.
    """
    plain = [x.name for x in dataclasses.fields(ModelArguments) if x.name not in ("sampling", "sparse", "policy")]
    sampling = [x.name for x in dataclasses.fields(Sampling)]
    known = [*plain, *sampling, *DIALS, *POLICY]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"model_args must be among {', '.join(known)}; got {', '.join(unknown)}")
    if not values.get("pretrained"):
        raise ValueError("model_args must have pretrained=FOLDER, got none")
    given = {name: value for name, value in values.items() if value is not None}
    given |= {name: str(given[name]) for name in ("pretrained", "save_dir") if name in given}
    dials = {name: given[name] for name in DIALS if name in given}
    policy = {name: given[name] for name in POLICY if name in given}
    if (dials or policy) and "sparsity" not in dials:
        raise ValueError(f"model_args must have sparsity beside {', '.join([*dials, *policy])}, got none")
    if dials.get("segment") == "whole":
        dials["segment"] = None
    if "dense_layers" in policy:
        policy["dense_layers"] = _read_layers(policy["dense_layers"])
    return ModelArguments(
        **{name: given[name] for name in plain if name in given},
        sampling=Sampling(**{name: given[name] for name in sampling if name in given}),
        sparse=BAAttConfig(**dials) if dials else None,
        policy=Policy(**policy),
    )


def _read_layers(value: object) -> tuple[int, ...]:
    """Layers as `0+1+-1`, a number, or a list of numbers; "none" for none."""
    parts = value.split("+") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if parts == ["none"]:
        return ()
    try:
        return tuple(int(str(layer)) for layer in parts)
    except ValueError:
        raise ValueError(f"dense_layers must be numbers joined by +, such as 0+1+-1, got {value!r}") from None


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
