"""Samples with sparse attention beside the dense sample from the same noise, measured once and kept.

In: a `VideoModel`, cells, a store. Out: a record for each cell like RULER's, with `task: video_generation`: PSNR, SSIM
and MS-SSIM of every clip to its dense sample, with intervals over clips, and the share of block pairs skipped.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from baatt.config import PRESETS, BAAttConfig, Policy
from baatt.integrations.enable import enable
from baatt.integrations.reasons import is_asked
from baatt.integrations.video import VideoTiles
from baatt.lab.answers import AnswerStore, request_key
from baatt.lab.statistics import bootstrap_interval
from baatt.lab.video.model import VideoModel, draw_noise, sample

_UNSORTED = dataclasses.replace(PRESETS["paper"].config, sort="none")
#: Ways to choose blocks, at whatever sparsity. Exact mass is the oracle: what a perfect estimate of a block keeps.
METHODS: dict[str, BAAttConfig] = {
    "clusters": PRESETS["default"].config,
    "paper": PRESETS["paper"].config,
    "antidiagonal-8": dataclasses.replace(_UNSORTED, score="antidiagonal-8"),
    "exact": dataclasses.replace(_UNSORTED, score="exact"),
}
#: Frames, rows and columns of a tile of 128 tokens, which is a block; None is the order of the model.
TILES: dict[str, tuple[int, int, int] | None] = {"none": None, "4x8x4": (4, 8, 4), "8x4x4": (8, 4, 4)}
#: Of the five scales of MS-SSIM those that a frame of 128 rows has room for, weighted as in the paper.
SCALES = (0.0448, 0.2856, 0.3001, 0.2363)
MEASURES = ("psnr", "ssim", "ms_ssim")
#: PSNR where nothing differs.
MOST = 100.0


class Cell(NamedTuple):
    """One setting: method, its tiles by name, sparsity, and the share of steps that stay dense."""

    method: str
    tiles: str
    sparsity: float
    dense_steps: float = 0.0

    @property
    def config(self) -> BAAttConfig:
        """The method's options."""
        return dataclasses.replace(METHODS[self.method], sparsity=self.sparsity)


@dataclass(frozen=True)
class Setup:
    """What measurements depend on beside their cells; files by checksums."""

    files: dict[str, str]
    dtype: str
    impl: str
    steps: int
    seed: int


class Sample(NamedTuple):
    """A video [3, frames, rows, columns] in [0, 1]; the share of block pairs skipped, and why calls stayed dense."""

    video: Tensor
    skipped: float
    reasons: list[str]


def generate(
    model: VideoModel, noise: Tensor, clip: int, steps: int, *, config: BAAttConfig | None = None,
    policy: Policy | None = None, tiles: tuple[int, int, int] | None = None, impl: str = "auto",
) -> Sample:  # fmt: skip
    """A sample, dense where `config` is None; in the order of the model where `tiles` is."""
    order = VideoTiles(tiles) if tiles else None
    with enable(model.transformer, config, policy, impl=impl, order=order) as handle:
        video = sample(model, noise, clip, steps, handle.at_step)
    reasons = sorted(reason for reason in handle.reasons if not is_asked(reason))
    return Sample(video, handle.sparsity, reasons)


def measure(video: Tensor, dense: Tensor) -> dict[str, float]:
    """PSNR, SSIM and MS-SSIM of videos [3, frames, rows, columns] in [0, 1]; of their frames, on average.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise ImportError("measuring needs torchmetrics: pip install 'baatt[video]'") from error
    frames, others = video.transpose(0, 1).float(), dense.transpose(0, 1).float()
    psnr = float(image.peak_signal_noise_ratio(frames, others, data_range=1.0))
    betas = tuple(weight / sum(SCALES) for weight in SCALES)
    multiscale = image.multiscale_structural_similarity_index_measure(frames, others, data_range=1.0, betas=betas)
    ssim: Any = image.structural_similarity_index_measure(frames, others, data_range=1.0)
    return {"psnr": psnr if math.isfinite(psnr) else MOST, "ssim": float(ssim), "ms_ssim": float(multiscale)}


class Study:
    """Measures cells on some clips.

    Args:
        clips: their numbers. commit: kept with what is measured. advance: told after every sample.
    """

    def __init__(
        self,
        model: VideoModel,
        clips: Sequence[int],
        setup: Setup,
        store: AnswerStore,
        commit: str | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.clips, self.setup, self.store = model, clips, setup, store
        self.commit, self.advance = commit, advance
        self.device = model.clips.weight.device

    def open_samples(self, cells: Sequence[Cell]) -> int:
        """How many samples are still to be drawn, dense ones too."""
        missing = [sum(self._key(cell, clip) not in self.store for cell in cells) for clip in self.clips]
        return sum(count + 1 for count in missing if count)

    def run(self, cells: Sequence[Cell]) -> None:
        """Everything that is missing, clip by clip: each has one dense sample."""
        for clip in self.clips:
            missing = [cell for cell in cells if self._key(cell, clip) not in self.store]
            if not missing:
                continue
            noise = draw_noise(self.model.config, self.setup.seed + clip, self.device)
            make = functools.partial(generate, self.model, noise, clip, self.setup.steps, impl=self.setup.impl)
            dense = make()
            self.advance()
            for cell in missing:
                policy = Policy(dense_steps=cell.dense_steps)
                found = make(config=cell.config, policy=policy, tiles=TILES[cell.tiles])
                measured: dict[str, Any] = {**measure(found.video, dense.video)}
                measured |= {"sparsity": found.skipped, "reasons": found.reasons, "commit": self.commit}
                self.store.put(self._key(cell, clip), measured)
                self.advance()

    def records(self, cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
        """A record of every cell."""
        for cell in cells:
            found = [self.store[self._key(cell, clip)] for clip in self.clips]
            record: dict[str, Any] = {
                "task": "video_generation", "method": cell.method, "tiles": cell.tiles, "sparsity": cell.sparsity,
                "dense_steps": cell.dense_steps, "config": dataclasses.asdict(cell.config), "clips": list(self.clips),
            }  # fmt: skip
            for name in MEASURES:
                values = [one[name] for one in found]
                low, high = bootstrap_interval(values)
                record |= {
                    name: sum(values) / len(values), f"{name}_low": low, f"{name}_high": high,
                    f"{name}_of_clips": values,
                }  # fmt: skip
            record["sparsity_achieved"] = sum(one["sparsity"] for one in found) / len(found)
            record["reasons"] = sorted({reason for one in found for reason in one["reasons"]})
            yield record

    def _key(self, cell: Cell, clip: int) -> str:
        about = dataclasses.asdict(self.setup)
        return request_key(
            "video", about, clip, dataclasses.asdict(cell.config), TILES[cell.tiles], cell.dense_steps, MEASURES
        )


def make_cells(
    methods: Sequence[str], tiles: Sequence[str], sparsities: Sequence[float], dense_steps: Sequence[float]
) -> list[Cell]:
    """Every combination."""
    return [Cell(m, t, s, d) for s in sparsities for d in dense_steps for m in methods for t in tiles]
