"""How LLaDA-V answers lmms-eval's tasks: its published settings, and the arguments that change them.

In: the name of a task, lmms-eval's `--model_args` and `--gen_kwargs`. Out: a `TaskSetting`, options of BA-Att and a
policy. Knows nothing of models, pictures and of lmms-eval itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from baatt.config import BAAttConfig, Policy
from baatt.lab.loading import DTYPES
from baatt.llada_v.pictures import POOLING
from baatt.llada_v.prompt import THINK_MODES
from baatt.models.config import check_positive_integer


@dataclass(frozen=True)
class TaskSetting:
    """How a task is answered: tokens, tokens per block, denoising steps, thinking, and what ends an answer besides the
    end of the turn."""

    gen_length: int
    block_length: int
    gen_steps: int
    think_mode: str = "no_think"
    stops: tuple[str, ...] = ()


CHOICE = TaskSetting(2, 2, 2)
MATHVISTA = ("mathvista_testmini", "mathvista_testmini_cot", "mathvista_testmini_solution", "mathvista_testmini_format")
MATHVERSE = [f"mathverse_testmini_vision{part}" for part in ("", "_dominant", "_intensive", "_only")]
#: eval/scripts/evaluate.sh of LLaDA-V; a task that is a group there has the setting in all its parts.
PUBLISHED: Mapping[str, TaskSetting] = {
    **dict.fromkeys(("mmmu_val", "mmmu_pro_standard", "mmmu_pro_vision", "mmstar", "ai2d", "seedbench"), CHOICE),
    **dict.fromkeys(("mmbench_en_dev", "muirbench", "videomme", "mlvu_dev", "mme", "realworldqa"), CHOICE),
    "chartqa": TaskSetting(16, 16, 16, stops=("\n",)),
    **dict.fromkeys(("docvqa_val", "infovqa_val"), TaskSetting(32, 32, 16)),
    **dict.fromkeys(MATHVISTA, TaskSetting(96, 96, 48, "think")),
    **dict.fromkeys(MATHVERSE, TaskSetting(64, 64, 32, "think")),
}
#: Fields of a setting that --model_args and --gen_kwargs change; the first three make a setting.
CHANGED = ("gen_length", "block_length", "gen_steps", "think_mode")
#: Keys of gen_kwargs that are obeyed, and those of lmms-eval's tasks that LLaDA-V's evaluation has no use for.
OBEYED = (*CHANGED, "stopping_criteria", "temperature", "do_sample", "cfg", "remasking")
NOT_OBEYED = ("until", "max_new_tokens", "top_p", "num_beams", "image_aspect_ratio")


@dataclass(frozen=True)
class LLaDAVArguments:
    """What --model_args may hold, besides the fields of `BAAttConfig` and `Policy`.

    Args:
        pretrained: local folder of LLaDA-V.
        vision_tower: folder of SigLIP, for a checkpoint without it.
        dtype: of the weights.
        device: of the weights; with several processes each has its own.
        batch_size: requests answered together, 1.
        impl: as `ba_attention`.
        max_frames_num: frames of a video.
        mm_spatial_pool_stride: patches of a side of a frame that become one token.
        mm_spatial_pool_mode: how they do.
        gen_length, block_length, gen_steps, think_mode: instead of a task's own; think_mode "none" does not tell the
            model whether to think.
        sparse: options of BA-Att; None is dense attention.
        policy: what stays dense nevertheless.

    Raises:
        TypeError, ValueError: a value out of range.
    """

    pretrained: str
    vision_tower: str | None = None
    dtype: str = field(default="bfloat16", metadata={"choices": DTYPES})
    device: str | None = None
    batch_size: int = field(default=1, metadata={"choices": (1,)})
    impl: str = "auto"
    max_frames_num: int = 32
    mm_spatial_pool_stride: int = 2
    mm_spatial_pool_mode: str = field(default="bilinear", metadata={"choices": POOLING})
    gen_length: int | None = None
    block_length: int | None = None
    gen_steps: int | None = None
    think_mode: str | None = field(default=None, metadata={"choices": THINK_MODES, "none": ""})
    sparse: BAAttConfig | None = field(default=None, metadata={"needs": "sparsity"})
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        check_positive_integer("max_frames_num", self.max_frames_num)


def read_setting(task: str, gen_kwargs: Mapping[str, Any], arguments: LLaDAVArguments) -> TaskSetting:
    """The published setting of a task, changed by --gen_kwargs, changed by --model_args.

    Raises:
        ValueError: a task without a published setting of which not all is given, or a key that is not known.
    """
    unknown = [name for name in gen_kwargs if name not in OBEYED + NOT_OBEYED]
    if unknown:
        raise ValueError(f"gen_kwargs of {task} must be among {[*OBEYED, *NOT_OBEYED]}, got {unknown}")
    given = {**gen_kwargs, **{name: value for name, value in vars(arguments).items() if value is not None}}
    changed = {name: given[name] for name in CHANGED if name in given}
    if "stopping_criteria" in gen_kwargs:
        stops = gen_kwargs["stopping_criteria"]
        changed["stops"] = (stops,) if isinstance(stops, str) else tuple(stops)
    missing = [name for name in CHANGED[:3] if name not in changed]
    if task not in PUBLISHED and missing:
        needed = f"give {', '.join(missing)} in --model_args; there are settings for {', '.join(PUBLISHED)}"
        raise ValueError(f"{task} has no published setting for LLaDA-V: {needed}")
    setting = replace(PUBLISHED.get(task, CHOICE), **changed)
    if setting.think_mode not in THINK_MODES:
        raise ValueError(f"think_mode must be one of {list(THINK_MODES)}, got {setting.think_mode!r}")
    return setting
