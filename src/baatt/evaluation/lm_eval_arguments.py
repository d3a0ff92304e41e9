"""The `--model_args` of the lm-evaluation-harness model `baatt_llada`: names and texts in, checked settings out.

`read_options(ModelArguments, given)` of `baatt.lab.options` reads them. Everything that an answer depends on is in
`ModelArguments.settings()`, which is stored with the results. Knows nothing of the harness itself.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from baatt.config import BAAttConfig, Policy
from baatt.lab.loading import DTYPES
from baatt.lab.prompts import TRUNCATIONS
from baatt.sampling import CACHES, REMASKING, SamplerConfig


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
    remasking: str = field(default="low_confidence", metadata={"choices": REMASKING})
    cache: str = field(default="none", metadata={"choices": CACHES})
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
    """Checked model arguments; the fields of `sampling`, `sparse` and `policy` are arguments like the others.

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
        for name, choices in (("dtype", ("auto", *DTYPES)), ("truncation", TRUNCATIONS)):
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


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
