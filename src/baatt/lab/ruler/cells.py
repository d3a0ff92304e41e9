"""What is asked: cells of a grid, each a task at a length with one way to attend and one way to sample.

In: tasks, lengths, configs, policies and samplers to try. Out: cells, dense attention before the sparse ones that are
compared with it. Knows no model.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from baatt.config import BAAttConfig, Policy
from baatt.lab.ruler.sources import Sources
from baatt.lab.ruler.tasks import TASKS
from baatt.sampling import SamplerConfig
from baatt.scores import SCORES

#: A token is filled as soon as the model is this sure of it; blocks of 32 as in Fast-dLLM.
RULER_SAMPLER = SamplerConfig(steps=32, gen_length=128, block_length=32, threshold=0.9, stop_at_eos=True)


class Cell(NamedTuple):
    """config None is dense attention; policy says what stays dense otherwise. Of the sampler's `gen_length` a task uses
    what it lets a model write."""

    task: str
    length: int
    config: BAAttConfig | None = None
    policy: Policy = Policy()
    sampler: SamplerConfig = RULER_SAMPLER

    @property
    def options(self) -> dict[str, Any]:
        """The config as it is stored, {} for dense attention."""
        return {} if self.config is None else dataclasses.asdict(self.config)

    @property
    def dense_layers(self) -> list[int]:
        """Of a sparse cell."""
        return [] if self.config is None else list(self.policy.dense_layers)

    def sampled(self, **changes: Any) -> "Cell":
        """The cell with other options of its sampler."""
        return self._replace(sampler=dataclasses.replace(self.sampler, **changes))


def make_cells(
    tasks: Sequence[str],
    lengths: Sequence[int],
    configs: Sequence[BAAttConfig],
    policies: Sequence[Policy] = (Policy(),),
    samplers: Sequence[SamplerConfig] = (RULER_SAMPLER,),
) -> list[Cell]:
    """Every combination, each once; for each length, task and sampler dense attention comes first.

    Of configs that would run the same only the first is kept: see `without_unread`.
    """
    cells: dict[Cell, None] = {}
    for length, task, sampler in itertools.product(lengths, tasks, samplers):
        cells[Cell(task, length, sampler=sampler)] = None
        for policy, config in itertools.product(policies, configs):
            cells[Cell(task, length, without_unread(config), policy, sampler)] = None
    return list(cells)


def without_unread(config: BAAttConfig) -> BAAttConfig:
    """A config whose unread options are neutral: beta 0 for a score without it, no segment where nothing is sorted."""
    if config.sort == "none":
        config = dataclasses.replace(config, segment=None)
    if "beta" not in SCORES[config.score].options:
        config = dataclasses.replace(config, beta=0.0)
    return config


def choose_tasks(names: str, sources: Sources) -> list[str]:
    """The tasks of a comma-separated list; `needles`: the eight needle tasks; `all`: all that the sources can make.

    Raises:
        ValueError: an unknown task, or one whose file is not given.
    """
    made = [name for name, task in TASKS.items() if not task.needs or getattr(sources, task.needs) is not None]
    groups = {"all": made, "needles": [name for name in made if name.startswith("niah_")]}
    chosen = list(dict.fromkeys(name for part in names.split(",") for name in groups.get(part, [part])))
    if unknown := [name for name in chosen if name not in TASKS]:
        raise ValueError(f"tasks must be all, needles or of {','.join(TASKS)}; got {','.join(unknown)}")
    if missing := [name for name in chosen if name not in made]:
        needed = ", ".join(f"{name} needs --{TASKS[name].needs} FILE" for name in missing)
        raise ValueError(f"tasks must have their data sets: {needed}, got none")
    return chosen
