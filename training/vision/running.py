"""A training run in pieces of at most ten minutes, on one GPU: what `video.py` and `understanding.py` have in common.

In: a model with `save`, and what makes a loss. Out, every half minute: in `--out` the exact state for `--resume`, the
model folder (moving average, 8 bits) and `training.json`; in `--copy` the same model folder and the average in bf16,
from which another machine goes on. The learning rate falls with the time of all pieces, so a slower machine takes fewer
steps.
"""

import argparse
import copy
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from baatt.lab.records import provenance, write_json, written_at_once

STATE, AVERAGE = "state.pt", "average.safetensors"
#: What `training.json` has beside the progress of all pieces.
OF_A_PIECE = ("arguments", "finished", "parameters", "command", "commit", "device", "versions", "held_out")
#: Seconds between two states on disk, and those after which a run must tell whether learning has begun.
SAVED_EVERY, BEGUN_BY = 30, 100
#: A loss, and what else is reported of a step, by name; all still on the device.
Losses = tuple[Tensor, dict[str, Tensor]]
#: Of the history: step, seconds, and means by name.
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """The options that both scripts have."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("training/runs") / name)
    add("--copy", type=Path, metavar="FOLDER", help="for the model and the average in bf16 (default: --out)")
    add("--name", default="model", help="of the model's folder, which tables and pictures show (default: model)")
    add("--resume", type=Path, help=f"folder of an earlier run, its {AVERAGE}, or the folder of a model in 8 bits")
    add("--progress", type=Path, help="training.json of such a model: how far it had come (default: nowhere)")
    add("--seconds", type=float, default=540, help="of this piece; 20 s more go by until it has saved")
    add("--total-seconds", type=float, default=1400, help="of all pieces: how the learning rate falls")
    add("--learning-rate", type=float, default=1.5e-3)
    add("--batch-tokens", type=int, default=8 * 9216)
    add("--report-every", type=int, default=100)
    add("--seed", type=int, default=1)
    add("--device", default="cuda")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)


def learning_rate(most: float, seconds: float, total: float, step: int) -> float:
    """A warm-up of 200 steps of the optimizer, then half a cosine over the time of all pieces, down to 2 %."""
    fall = 0.5 + 0.5 * math.cos(math.pi * min(1.0, seconds / total))
    return most * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * fall)


class Run:
    """Model, moving average, optimizer and progress, with their saving and reading back."""

    def __init__(self, arguments: argparse.Namespace, model: Any, device: torch.device) -> None:
        self.arguments, self.device, self.model = arguments, device, model.to(device)
        self.progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "history": []}
        self.parameters = sum(one.numel() for one in self.model.parameters())
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=device.type == "cuda")
        if arguments.resume is not None:
            self.resume(arguments.resume)
        else:
            self.average = copy.deepcopy(self.model.state_dict())
        state = self.model.state_dict()  # tensors that are changed in place, listed once
        self.followed = [self.average[name] for name in state], list(state.values())

    def resume(self, place: Path) -> None:
        """Go on from the folder of a run; or with a fresh optimizer from the copy of its average, or from a model."""
        if (place / STATE).exists():
            state = torch.load(place / STATE, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.progress = state["average"], state["progress"]
            return
        if place.is_dir():
            weights, told = type(self.model).load(place).state_dict(), self.arguments.progress
        else:
            weights, told = load_file(place), place.with_suffix(".json")
        self.average = {name: tensor.float().to(self.device) for name, tensor in weights.items()}
        self.model.load_state_dict(self.average)
        if told is not None:
            self.progress = {name: one for name, one in json.loads(told.read_text()).items() if name not in OF_A_PIECE}
        # An optimizer that has seen no gradients takes its largest steps first: it is warmed up again.
        self.progress["fresh"] = self.progress["step"]

    def step(self, losses: Callable[[], Losses]) -> dict[str, Tensor]:
        """One update; the loss and what else is reported."""
        progress, total = self.progress, self.arguments.total_seconds
        warm = progress["step"] - progress.get("fresh", 0)
        rate = learning_rate(self.arguments.learning_rate, progress["seconds"], total, warm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, told = losses()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        weight = min(0.999, (1 + progress["step"]) / (10 + progress["step"]))
        torch._foreach_lerp_(*self.followed, 1 - weight)
        progress["step"] += 1
        return {"loss": loss.detach(), **told}

    def save(self) -> None:
        """The exact state, the model to sample from, and what travels."""
        out, travels = self.arguments.out, self.arguments.copy or self.arguments.out
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"average": self.average, "progress": self.progress}
        torch.save(state, out / f"{STATE}.partial")
        (out / f"{STATE}.partial").replace(out / STATE)
        for folder in {out, travels}:
            self.model.save(folder / self.arguments.name, self.average)
        halves = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in self.average.items()}
        with written_at_once(travels / AVERAGE) as partial:
            save_file(halves, partial)
        write_json(self.progress, (travels / AVERAGE).with_suffix(".json"))

    @contextmanager
    def averaged(self) -> Iterator[Any]:
        """A copy of the model with the moving average, and random numbers of its own."""
        model = copy.deepcopy(self.model).eval()
        model.load_state_dict(self.average)
        with torch.no_grad(), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            yield model


def go_on(
    run: Run,
    began: float,
    losses: Callable[[], Losses],
    held_out: Callable[[], Any],
    has_begun: Callable[[Row], str | None],
    look: Callable[[Row], None] = lambda _: None,
) -> None:
    """A piece of the run: steps until --seconds since `began` are over, its start and compilation counted in.

    Args:
        held_out: measures the moving average at the end. has_begun: what a row of the history lacks to say that
            learning has begun; None if nothing. look: is given every row, and may add to it.

    Raises:
        ArithmeticError: a loss that is not finite; the state of the last minute is there.
    """
    arguments, progress = run.arguments, run.progress
    before, start, lately = progress["seconds"], time.monotonic(), list[dict[str, Tensor]]()
    first, saved = progress["step"], start
    left = arguments.seconds - (start - began)
    while time.monotonic() - start < left or progress["step"] == first:
        lately.append(run.step(losses))
        progress["seconds"] = before + time.monotonic() - start
        if progress["step"] % arguments.report_every == 0:
            row = report(run, lately, time.monotonic() - start)
            lately.clear()
            look(row)
            print(json.dumps(row), flush=True)
            if not math.isfinite(row["loss"]):
                raise ArithmeticError(f"the loss is {row['loss']} at step {row['step']}: go on from {arguments.out}")
            tell_beginning(progress, row, has_begun(row))
            if time.monotonic() - saved > SAVED_EVERY:  # here, where the weights are known to be numbers
                run.save()
                write_training(run, finished=False)
                saved = time.monotonic()
    progress["held_out"] = held_out()
    print(json.dumps({name: progress[name] for name in ("step", "seconds", "held_out")}), flush=True)
    run.save()
    write_training(run, finished=True)


def write_training(run: Run, *, finished: bool) -> None:
    """What was done, and whether this piece has come to its end."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(run.arguments).items()}
    found = provenance(shlex.join(["python", *sys.argv]), run.device)
    told = {"arguments": values, "finished": finished, "parameters": run.parameters, **run.progress, **found}
    write_json(told, (run.arguments.copy or run.arguments.out) / "training.json")


def tell_beginning(progress: dict[str, Any], row: Row, missing: str | None) -> None:
    """Say once that learning has begun, or again and again, in capitals, that it has not."""
    if "begun" in progress:
        return
    if missing is None:
        progress["begun"] = row["seconds"]
        print(f"LEARNING HAS BEGUN after {row['seconds']:.0f} s", flush=True)
    elif row["seconds"] >= BEGUN_BY:
        print(f"LEARNING HAS NOT BEGUN after {row['seconds']:.0f} s: {missing}", flush=True)


def report(run: Run, lately: list[dict[str, Tensor]], elapsed: float) -> Row:
    """A row of the history: means over the steps that have each number."""
    row: Row = {"step": run.progress["step"], "seconds": round(run.progress["seconds"], 1)}
    row["elapsed"] = round(elapsed, 1)
    for name in sorted({name for told in lately for name in told}, key=lambda name: (name != "loss", name)):
        row[name] = round(float(torch.stack([told[name] for told in lately if name in told]).mean()), 5)
    if run.device.type == "cuda":
        row["gibibytes"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    run.progress["history"].append(row)
    return row
