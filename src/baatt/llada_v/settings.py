"""How LLaDA-V answers lmms-eval's tasks: its published settings, and the arguments that change them.

In: the name of a task, lmms-eval's `--model_args` and `--gen_kwargs`. Out: a `Setting`, dials of BA-Att and a policy.
Knows nothing of models, pictures and of lmms-eval itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from baatt.config import BAAttConfig, Policy
from baatt.llada_v.conversation import THINK_MODES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a task is answered: tokens, tokens per block, denoising steps, thinking, and what ends an answer besides the
    end of the turn."""

    gen_length: int
    block_length: int
    gen_steps: int
    think_mode: str | None = "no_think"
    stops: tuple[str, ...] = ()


CHOICE = Setting(2, 2, 2)
#: eval/scripts/evaluate.sh of LLaDA-V; a task that is a group there has the setting in all its parts.
PUBLISHED: Mapping[str, Setting] = {
    **dict.fromkeys(
        (
            *("mmmu_val", "mmmu_pro_standard", "mmmu_pro_vision", "mmstar", "ai2d", "seedbench", "mmbench_en_dev"),
            *("muirbench", "videomme", "mlvu_dev", "mme", "realworldqa"),
        ),
        CHOICE,
    ),
    "chartqa": Setting(16, 16, 16, stops=("\n",)),
    **dict.fromkeys(("docvqa_val", "infovqa_val"), Setting(32, 32, 16)),
    **dict.fromkeys(
        (f"mathvista_testmini{part}" for part in ("", "_cot", "_solution", "_format")), Setting(96, 96, 48, "think")
    ),
    **dict.fromkeys(
        (f"mathverse_testmini_vision{part}" for part in ("", "_dominant", "_intensive", "_only")),
        Setting(64, 64, 32, "think"),
    ),
}
#: Keys of gen_kwargs that are obeyed, and those of lmms-eval's tasks that LLaDA-V's evaluation has no use for.
OBEYED = (
    *("gen_length", "block_length", "gen_steps", "think_mode", "stopping_criteria"),
    *("temperature", "do_sample", "cfg", "remasking"),
)
NOT_OBEYED = ("until", "max_new_tokens", "top_p", "num_beams", "image_aspect_ratio")


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    """What --model_args may hold; the meanings are those of `LLaDAV` beside this file.

    Raises:
        ValueError: a value out of range.
    """

    pretrained: str
    vision_tower: str | None = None
    dtype: str = "bfloat16"
    device: str | None = None
    batch_size: int = 1
    sparsity: float | str | None = None
    sort: str | None = None
    segment: int | str | None = None
    beta: float | None = None
    dense_layers: int | float | str = "none"
    dense_steps: float = 0.0
    min_length: int = 0
    impl: str = "auto"
    max_frames_num: int = 32
    mm_spatial_pool_stride: int = 2
    mm_spatial_pool_mode: str = "bilinear"
    gen_length: int | None = None
    block_length: int | None = None
    gen_steps: int | None = None
    think_mode: str | None = None

    def __post_init__(self) -> None:
        if str(self.batch_size) != "1":
            raise ValueError(f"batch_size must be 1, got {self.batch_size}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)}, got {self.dtype!r}")
        if not isinstance(self.max_frames_num, int) or self.max_frames_num < 1:
            raise ValueError(f"max_frames_num must be a positive int, got {self.max_frames_num!r}")

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "ModelArguments":
        """Arguments by name.

        Raises:
            TypeError: one that there is not.
            ValueError: a value out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in given if name not in names]
        if unknown:
            raise TypeError(f"model_args must be among {', '.join(names)}, got {', '.join(unknown)}")
        return cls(**given)


def read_sparse(arguments: ModelArguments) -> tuple[BAAttConfig | None, Policy]:
    """Dials of BA-Att, None for dense attention, and what stays dense.

    Raises:
        TypeError, ValueError: a dial out of range, or dials without a sparsity.
    """
    dials: dict[str, Any] = {name: getattr(arguments, name) for name in ("sort", "segment", "beta")}
    dials = {name: value for name, value in dials.items() if value is not None}
    if dials.get("segment") == "none":
        dials["segment"] = None
    layers = _read_layers(str(arguments.dense_layers))
    policy = Policy(dense_layers=layers, dense_steps=arguments.dense_steps, min_length=arguments.min_length)
    sparsity: Any = arguments.sparsity
    if sparsity not in (None, "none"):
        return BAAttConfig(sparsity=sparsity, **dials), policy
    if dials:
        raise ValueError(f"{', '.join(dials)} must come with a sparsity, without which attention is dense")
    return None, policy


def read_setting(task: str, gen_kwargs: Mapping[str, Any], arguments: ModelArguments) -> Setting:
    """The published setting of a task, changed by --gen_kwargs, changed by --model_args.

    Raises:
        ValueError: a task without a published setting of which not all is given, or a key that is not known.
    """
    unknown = [name for name in gen_kwargs if name not in OBEYED + NOT_OBEYED]
    if unknown:
        raise ValueError(f"gen_kwargs of {task} must be among {[*OBEYED, *NOT_OBEYED]}, got {unknown}")
    names = ("gen_length", "block_length", "gen_steps", "think_mode")
    changed = {name: gen_kwargs[name] for name in names if name in gen_kwargs}
    changed |= {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if "stopping_criteria" in gen_kwargs:
        stops = gen_kwargs["stopping_criteria"]
        changed["stops"] = (stops,) if isinstance(stops, str) else tuple(stops)
    if changed.get("think_mode") == "none":
        changed["think_mode"] = None
    missing = [name for name in names[:3] if name not in changed]
    if task not in PUBLISHED and missing:
        raise ValueError(
            f"{task} has no published setting for LLaDA-V: give {', '.join(missing)} in --model_args; there are "
            f"settings for {', '.join(PUBLISHED)}"
        )
    setting = dataclasses.replace(PUBLISHED.get(task, CHOICE), **changed)
    if setting.think_mode is not None and setting.think_mode not in THINK_MODES:
        raise ValueError(f"think_mode must be one of {[*THINK_MODES, 'none']}, got {setting.think_mode!r}")
    return setting


def _read_layers(text: str) -> tuple[int, ...]:
    """`none`, or numbers of layers joined by `+`; lmms-eval makes -1 a float."""
    try:
        return () if text == "none" else tuple(int(layer.removesuffix(".0")) for layer in text.split("+"))
    except ValueError:
        raise ValueError(f"dense_layers must be layer numbers like '0+1' or 'none', got {text!r}") from None
