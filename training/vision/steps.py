"""What a session runs for each model: commands with limits, in the order of what must not be missing.

In: a `Place`: device, time, size. Out: steps, whose limits are a multiple of what they took. How they run is in
`session.py`.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

DATA = Path("training/data")
#: What each model is called once it is shipped, and from the start: its folder's name stands in tables and pictures.
NAMES = {"video": "video-6m", "understanding": "vision-3m"}
#: What the video model learns: the more scenes there are, the less clear each becomes.
SCENES = (
    "trailer_bbb-2", "trailer_bbb-5", "trailer_bbb-8", "trailer_bbb-9", "trailer_bbb-10", "cityCC0-1", "park", "sky",
    "sunrise", "sunset",
)  # fmt: skip
#: Seconds after training that a run has to measure and to write.
AFTER = 90
#: Which clips are looked at, a shot of the film and a panorama: their noise and number.
SEEDS = (1, 8)
#: Questions of each task, four of which make 500, and samples of each of RULER's eleven tasks, which make 506.
QUESTIONS, SAMPLES = 125, 46
#: The weights of the compensation in the paper's Table 8, at the sparsity at which most was measured.
BETAS = ("--preset", "paper", "--sparsity", "0.5", "--dial", "beta=0,0.1,0.5,1,2")
TABLE = {
    "clusters": ("--sparsity", "0.5,0.7,0.9"),
    "paper": BETAS,
    "unsorted": (*BETAS, "--sort", "none", "--keep-first", "1"),
}
#: Of the longest clips.
LONG = {"clusters": TABLE["clusters"], "paper": ("--preset", "paper", "--sparsity", "0.5,0.7,0.9")}
#: Sizes at which everything runs on a processor, to try it.
TINY = {
    "video": {"frames": 8, "rows": 104, "columns": 104, "heads": 1, "head_size": 32, "layers": 2, "hidden": 64},
    "understanding": {"tower": 16, "width": 32, "heads": 1, "layers": 2, "hidden": 64, "frames": 8,
                      "photo": [96, 144], "frame": [32, 48]},
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where and how long: seconds in all, of them for training; total: of the training of all sessions; tiny: for a
    processor; shipped: whether the models of the repository are trained further."""

    device: str
    dtype: str
    seconds: float
    training: float
    total: float
    tiny: bool = False
    shipped: bool = False
    compiled: bool = True

    @property
    def options(self) -> list[str]:
        """Of a command of `baatt` with a model."""
        return ["--device", self.device, "--dtype", self.dtype]


class Step(NamedTuple):
    """A name, a command, and the seconds that it may take."""

    name: str
    limit: float
    command: list[str]


def baatt(name: str, limit: float, *words: str) -> Step:
    """A step that is a command of `baatt`."""
    return Step(name, limit, [sys.executable, "-m", "baatt", *words])


def training_of(name: str, place: Place, work: Path) -> Step:
    """The training of a model: from where an earlier piece of it was, from the shipped model, or from the beginning."""
    out, copied = work / name, DATA / f"{name}.safetensors"
    earlier = out if (out / "state.pt").exists() else copied if copied.exists() else None
    command = [
        sys.executable, f"training/vision/{name}.py", "--out", str(out), "--name", NAMES[name], "--device",
        place.device, "--seconds", f"{place.training:.0f}", "--total-seconds", f"{place.total:.0f}",
    ]  # fmt: skip
    if earlier is not None:
        command += ["--resume", str(earlier)]
    elif place.shipped:
        command += [
            "--resume",
            f"src/baatt/assets/{NAMES[name]}",
            "--progress",
            f"benchmarks/results/training/{name}.json",
        ]
    if name == "video":
        command += ["--scenes", ",".join(SCENES)]
    if place.tiny:
        command += ["--config", json.dumps(TINY[name]), "--batch-tokens", "1400", "--report-every", "10"]
    if place.tiny or not place.compiled:
        command.append("--no-compile")
    return Step("train", place.training + AFTER, command)


def video_steps(place: Place, work: Path) -> list[Step]:
    """Two clips to look at, then the table: without dense steps first, as the second command keeps what the first one
    has measured."""
    model, steps = ["--model", str(work / "video" / NAMES["video"])], ["--steps", "2" if place.tiny else "24"]
    looks = [
        baatt("look", 60, "demo", "--video", *model, "--seed", str(seed), *steps, *place.options, "--output",
              str(work / f"pictures/video_{seed}.png"))
        for seed in SEEDS
    ]  # fmt: skip
    table = ["evaluate", "video", *model, *steps, *place.options, "--count", "1" if place.tiny else "4",
             "--json", str(work / "results/video.json"), "--store", str(work / "video.answers")]  # fmt: skip
    if place.tiny:
        table += ["--sparsity", "0.5"]
    return [*looks, baatt("table", 300, *table), baatt("table", 500, *table, "--dense-steps", "0,0.1,0.2")]


def understanding_steps(place: Place, work: Path) -> list[Step]:
    """Fig. 5 on pixels; then Table 8 in three columns: questions about clips, about photos, and RULER; between them
    the longest clips."""
    model, results = ["--model", str(work / "understanding" / NAMES["understanding"])], work / "results"
    capture = work / "vision.capture"
    small = ["--block-size", "16"] if place.tiny else []
    figures = [
        baatt("patches", 90, "analyze", "patches", *model, *place.options, *small, "--capture", str(capture), "--plot",
              str(work / "pictures/vision_patches.png")),
        baatt("maps", 90, "analyze", "maps", str(capture), *small, "--preset", "paper", "--sort", "none,qk",
              "--device", place.device, "--plot", str(work / "pictures/vision_maps.png")),
    ]  # fmt: skip
    asked = ["evaluate", "vision", *model, *place.options, *small, "--store", str(work / "vision.answers")]
    asked += ["--count", "2", "--frames", "8"] if place.tiny else ["--count", str(QUESTIONS), "--batch-size", "8"]
    longest = ["--tasks", "clips", "--frames", "8" if place.tiny else "72"]
    ruler = ["evaluate", "ruler", *place.options, *small, "--store", str(work / "ruler.answers"), "--block-length", "8",
             "--remasking", "left_to_right", "--cache", "dual"]  # fmt: skip
    ruler += ["--tasks", "niah_single_1", "--lengths", "512", "--count", "1"] if place.tiny else [
        "--tasks", "all", "--lengths", "4096", "--count", str(SAMPLES), "--batch-size", str(SAMPLES), "--workers", "10",
    ]  # fmt: skip
    pixels = [
        baatt(f"ask-{name}", 300, *asked, *setting, "--json", str(results / f"vision_{name}.json"))
        for name, setting in TABLE.items()
    ]
    long = [
        baatt(f"ask-72-{name}", 300, *asked, *longest, *setting, "--json", str(results / f"vision_72_{name}.json"))
        for name, setting in LONG.items()
    ]
    words = [
        baatt(f"ruler-{name}", 200, *ruler, *setting, "--json", str(results / f"vision_ruler_{name}.json"))
        for name, setting in TABLE.items()
    ]
    return [*figures, *pixels, *long, *words]


#: By model: what comes after its training.
QUEUES: dict[str, Callable[[Place, Path], list[Step]]] = {"video": video_steps, "understanding": understanding_steps}
