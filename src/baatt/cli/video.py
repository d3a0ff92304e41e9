"""`baatt evaluate video` and `baatt demo --video`: a small video model, sparse beside dense, from the same noise.

The evaluation compares every setting with the dense sample (PSNR, SSIM, MS-SSIM) on many clips and keeps what it
measured in a folder; the demo draws one clip by full attention, the paper's setting and the default.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from baatt.assets import VIDEO, shipped_vision_model
from baatt.backend import IMPLS
from baatt.cli.errors import UsageError, resumable
from baatt.cli.options import at_least, check_files, check_store, names_of, read_place, read_preset, seed
from baatt.config import Policy, Preset
from baatt.lab import loading
from baatt.lab.answers import AnswerStore
from baatt.lab.describe import options_text
from baatt.lab.maps import paper_like
from baatt.lab.records import installed_version, provenance, write_json
from baatt.lab.ruler.model import checksums, weights_of
from baatt.lab.tables import Table, interval, percent
from baatt.lab.video.model import VideoModel, draw_noise
from baatt.lab.video.pictures import draw_film, draw_sheet
from baatt.lab.video.study import METHODS, TILES, Setup, Study, generate, make_cells, measure

SUMMARY = "A small video model: PSNR, SSIM and MS-SSIM to the dense sample from the same noise."

#: Model evaluations of the demo's samples: half of those of the evaluation.
DEMO_STEPS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the evaluation."""
    add = parser.add_argument
    add("--methods", type=names_of(METHODS, {"all": list(METHODS)}), default=list(METHODS), help="by commas, of "
        f"{', '.join(METHODS)} (default: all)")  # fmt: skip
    add("--tiles", type=names_of(TILES, {"all": list(TILES)}), default=["none", "4x8x4"], help="orders of the tokens, "
        f"by commas, of {', '.join(TILES)} (default: none,4x8x4)")  # fmt: skip
    add("--sparsity", type=shares, default=[0.3, 0.5, 0.7, 0.9], help="by commas (default: 0.3,0.5,0.7,0.9)")
    add("--dense-steps", type=shares, default=[0.0], help="shares of the steps that stay dense, by commas (default: 0)")
    add("--count", type=at_least(1), help="clips to sample (default: all)")
    add("--json", type=Path, default=Path("video.json"), help="the records (default: video.json)")
    add("--store", type=Path, metavar="FOLDER", help="where measurements are kept, of any number of runs (default: "
        "video.answers beside video.json)")  # fmt: skip
    add("--impl", choices=IMPLS, default="auto", help="implementation (default: auto)")
    add("--steps", type=at_least(1), default=24, help="model evaluations of a sample (default: 24)")
    add("--seed", type=seed, default=0, help="which noise (default: 0)")
    add("--model", type=Path, help="folder that training/vision/video.py wrote (default: the one shipped with baatt)")
    add("--device", default="cpu", help='where to run, e.g. "cpu" or "cuda" (default: cpu)')
    add("--dtype", choices=list(loading.DTYPES), default="float32", help="of the weights (default: float32)")


def shares(text: str) -> list[float]:
    """Numbers from 0 on and below 1, by commas."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers by commas, got {text!r}") from None
    if not all(0 <= one < 1 for one in found):
        raise argparse.ArgumentTypeError(f"must be shares from 0 to below 1, got {text!r}")
    return list(dict.fromkeys(found))


def run(arguments: argparse.Namespace) -> None:
    """All measurements, then records and table."""
    check_files(arguments, "json")
    folder: Path = arguments.store or arguments.json.with_suffix(".answers")
    check_store(folder)
    if 0 in arguments.sparsity:
        raise UsageError("--sparsity must be above 0: dense attention is what is compared with")
    model, setup, source = open_model(arguments)
    measure_is_there()
    made = provenance(arguments.command, model.clips.weight.device)
    made["versions"] |= {name: installed_version(name) for name in ("diffusers", "torchmetrics")}
    names, store, console = model.config.clips, AnswerStore(folder), Console(stderr=True)
    clips = range(min(arguments.count or len(names), len(names)))
    cells = make_cells(arguments.methods, arguments.tiles, arguments.sparsity, arguments.dense_steps)
    began, done = time.monotonic(), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done % 20 == 0:
            left = (time.monotonic() - began) / done * (total - done)
            console.print(f"{done}/{total} samples, {left:.0f} s left", highlight=False)

    study = Study(model, clips, setup, store, made["commit"], advance)
    total = study.open_samples(cells)
    with resumable(lambda: f"{len(store)} measurements in {folder}", arguments.command):
        study.run(cells)
    records = list(study.records(cells))
    header = {
        "study": "video", **made, "model": source.name, "weights": weights_of(setup.files), "clips": list(names),
        "size": model.config.size, "tokens": model.config.grid, **{
            name: value for name, value in dataclasses.asdict(setup).items() if name != "files"
        },
    }  # fmt: skip
    write_json(header | {"records": records}, arguments.json)
    out = Console(width=None if Console().is_terminal else 160)
    out.print(table(records, len(clips), setup.steps).rich(), highlight=False)
    out.print(f"Records: {arguments.json}, measurements: {folder}", soft_wrap=True, highlight=False)
    for reason in sorted({reason for one in records for reason in one["reasons"]}):
        console.print(f"[yellow]Some calls stayed dense: {reason}[/yellow]", soft_wrap=True)


def demo(arguments: argparse.Namespace) -> None:
    """One clip by full attention, the paper's setting and the chosen one: a table, a sheet and a film."""
    check_files(arguments, "output")
    if arguments.output.suffix.lower() != ".png":
        raise UsageError(f"--output must end in .png, got {arguments.output.name!r}")
    setting, console = read_preset(arguments), Console()
    arguments.steps = steps = arguments.steps or DEMO_STEPS
    model, _, _ = open_model(arguments)
    measure_is_there()
    config = model.config
    clip = arguments.seed % len(config.clips)
    noise = draw_noise(config, arguments.seed, model.clips.weight.device)
    tokens = config.grid[0] * config.grid[1] * config.grid[2]
    size = f"{config.frames} frames of {config.rows} x {config.columns}, {tokens} tokens, {steps} steps"
    console.print(f"[bold]Clip[/bold] {config.clips[clip]}: {size}", highlight=False)
    settings: dict[str, Preset | None] = {"full attention": None, "paper": Preset(paper_like(setting.config), Policy())}
    settings[arguments.preset if arguments.preset != "paper" else "paper, changed"] = setting
    videos, rows, dense = {}, [], None
    for name, one in settings.items():
        if one is not None:
            console.print(f"[bold]Setting[/bold] {name}: {options_text(*one)}", highlight=False)
        began = time.monotonic()
        made = generate(model, noise, clip, steps, config=one and one.config, policy=one and one.policy,
                        impl=arguments.impl)  # fmt: skip
        seconds, dense, videos[name] = time.monotonic() - began, made.video if dense is None else dense, made.video
        found = measure(made.video, dense)
        likeness = ("-", "-") if one is None else (f"{found['psnr']:.1f}", f"{found['ms_ssim']:.3f}")
        rows.append((name, percent(made.skipped, 1), *likeness, f"{seconds:.1f}"))
    console.print(Table(("", "block pairs skipped", "PSNR, dB", "MS-SSIM", "seconds"), rows).rich(), highlight=False)
    film = arguments.output.with_suffix(".gif")
    draw_sheet(videos, arguments.output)
    draw_film(videos, film)
    console.print(f"Frames: {arguments.output}, side by side: {film}", soft_wrap=True, highlight=False)


def open_model(arguments: argparse.Namespace) -> tuple[VideoModel, Setup, Path]:
    """The model on its device, what measurements depend on, and its folder."""
    folder = arguments.model or shipped_vision_model(VIDEO)
    device = read_place(arguments)
    try:
        model = VideoModel.load(folder)
    except ImportError as error:
        raise UsageError(str(error)) from None
    own = {name: getattr(arguments, name) for name in ("dtype", "impl", "steps", "seed")}
    return model.to(device, loading.DTYPES[arguments.dtype]), Setup(checksums(folder), **own), folder


def measure_is_there() -> None:
    """Refuse before a minute is spent where there is nothing to measure with."""
    if installed_version("torchmetrics") == "not installed":
        raise UsageError("measuring needs torchmetrics: pip install 'baatt[video]'")


def table(records: list[dict[str, Any]], clips: int, steps: int) -> Table:
    """A row for each setting."""
    rows: list[tuple[str, ...]] = [
        (
            one["method"], one["tiles"], percent(one["sparsity"]), percent(one["dense_steps"]),
            percent(one["sparsity_achieved"], 1), f"{one['psnr']:.2f} [{one['psnr_low']:.2f}-{one['psnr_high']:.2f}]",
            interval(one["ssim"], one["ssim_low"], one["ssim_high"]),
            interval(one["ms_ssim"], one["ms_ssim_low"], one["ms_ssim_high"]),
        )
        for one in records
    ]  # fmt: skip
    if clips == 1:  # an interval of one clip has no width
        rows = [tuple(cell.partition(" [")[0] for cell in row) for row in rows]
    columns = ("method", "tiles", "sparsity", "dense steps", "block pairs skipped", "PSNR, dB", "SSIM, %", "MS-SSIM, %")
    caption = "To the dense sample from the same noise"
    caption += "." if clips == 1 else "; in brackets 95 % bootstrap intervals over clips."
    return Table(columns, rows, caption, f"clips: {clips}, steps: {steps}")
