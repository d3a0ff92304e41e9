"""Trains the small video model of `baatt.lab.video.model` on the clips of `media.py`, in pieces of at most ten minutes.

In: the media file. Out: in `--out` the exact state for `--resume`, the model folder (moving average, 8 bits) and
`training.json`; in `--copy` the same model folder and the average in bf16, from which another machine goes on. Every
batch has about as many tokens as any other: half of the batches are short pieces, which cost less attention. One GPU.
"""

import argparse
import copy
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from media import Clip, read
from safetensors.torch import load_file, save_file
from torch import Tensor

from baatt.lab.records import provenance, write_json
from baatt.lab.video.model import LEAST_NOISE, VideoConfig, VideoModel, shifted, to_latents

#: Starts from here on, of [0, 1), are held out: of films the last ones, of panoramas a sector in which no pan begins.
HELD_OUT = 0.9
#: Columns that a camera turns by in a frame of a panorama, at most and at least, to either side.
SLOWEST, FASTEST = 0.5, 2.0
STATE, AVERAGE = "state.pt", "average.safetensors"


def cut(clip: Clip, size: tuple[int, int, int], start: float, random: torch.Generator) -> Tensor:
    """A piece [3, frames, rows, columns] in [0, 1] of a clip, from a start in [0, 1) and at a random place."""
    frames, rows, columns = size

    def draw() -> float:
        return float(torch.rand((), generator=random))

    if not clip.is_panorama:
        first = int(start * (clip.frames.shape[0] - frames + 1))
        top = int(draw() * (clip.frames.shape[1] - rows + 1))
        left = int(draw() * (clip.frames.shape[2] - columns + 1))
        piece = clip.frames[first : first + frames, top : top + rows, left : left + columns].float()
        return rearrange(piece, "f h w c -> c f h w") / 255
    high, wide = clip.frames.shape[1:3]
    middle = (high - rows) // 2
    top = middle + int((draw() - 0.5) * middle / 4)
    speed = (SLOWEST + draw() * (FASTEST - SLOWEST)) * (1 if draw() < 0.5 else -1)
    view = clip.frames[0, top : top + rows].float()
    device = view.device
    place = start * wide + speed * torch.arange(frames, device=device)[:, None] + torch.arange(columns, device=device)
    whole = place.floor().long()
    share = (place - whole)[..., None]
    turned = view[:, whole % wide] * (1 - share) + view[:, (whole + 1) % wide] * share  # between two columns
    return rearrange(turned, "h f w c -> c f h w") / 255


class Pieces:
    """Draws batches; whole clips on the device."""

    def __init__(self, clips: list[Clip], config: VideoConfig, tokens: int, seed: int, device: torch.device) -> None:
        self.clips = [clip._replace(frames=clip.frames.to(device)) for clip in clips]
        self.config, self.tokens, self.device = config, tokens, device
        self.random = torch.Generator().manual_seed(seed)
        depth = config.patch[0]
        self.lengths = [config.frames, max(depth, config.frames // 3 // depth * depth)]

    def batch(self, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Latents [B, 3, frames, rows, columns] and clip numbers [B]."""
        frames = self.lengths[0 if held_out else int(torch.randint(2, (), generator=self.random))]
        size = (frames, self.config.rows, self.config.columns)
        each = frames // self.config.patch[0] * self.config.grid[1] * self.config.grid[2]
        numbers = torch.randint(len(self.clips), (max(1, self.tokens // each),), generator=self.random)
        starts = torch.rand(len(numbers), generator=self.random)
        starts = HELD_OUT + (1 - HELD_OUT) * starts if held_out else HELD_OUT * starts
        pieces = [
            cut(self.clips[number], size, start, self.random)
            for number, start in zip(numbers.tolist(), starts.tolist(), strict=True)
        ]
        return to_latents(torch.stack(pieces)), numbers.to(self.device)


def loss_of(model: VideoModel, latents: Tensor, clips: Tensor) -> Tensor:
    """Mean squared error of the velocity, from the clean video that is predicted: noise is drawn as Wan's steps lie."""
    share = shifted(torch.sigmoid(torch.randn(len(latents), device=latents.device)), model.config.shift)
    beside = share.view(-1, 1, 1, 1, 1)
    noisy = torch.lerp(latents, torch.randn_like(latents), beside)
    bfloat16 = latents.is_cuda
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=bfloat16):
        clean = model(noisy, share, clips)
    error = F.mse_loss(clean.float(), latents, reduction="none").mean((1, 2, 3, 4))
    return (error / share.clamp(min=LEAST_NOISE) ** 2).mean()


def learning_rate(most: float, seconds: float, total: float, step: int) -> float:
    """A warm-up of 200 steps, then half a cosine over the time of all pieces, down to 2 %."""
    fall = 0.5 + 0.5 * math.cos(math.pi * min(1.0, seconds / total))
    return most * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * fall)


class Run:
    """Model, moving average, optimizer and progress, with their saving and reading back."""

    def __init__(self, arguments: argparse.Namespace, config: VideoConfig, device: torch.device) -> None:
        self.arguments, self.device = arguments, device
        self.model = VideoModel(config).to(device)
        self.progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "history": []}
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=device.type == "cuda")
        if arguments.resume is not None:
            self.resume(arguments.resume)
        else:
            self.average = copy.deepcopy(self.model.state_dict())

    def resume(self, place: Path) -> None:
        """Go on from the folder of a run, or from the copy of its average with a fresh optimizer."""
        if place.is_dir():
            state = torch.load(place / STATE, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.progress = state["average"], state["progress"]
            return
        weights = {name: tensor.float().to(self.device) for name, tensor in load_file(place).items()}
        self.model.load_state_dict(weights)
        self.average = weights
        self.progress = json.loads(place.with_suffix(".json").read_text())

    def step(self, latents: Tensor, clips: Tensor) -> Tensor:
        """One update; the loss, still on the device."""
        progress, total = self.progress, self.arguments.total_seconds
        rate = learning_rate(self.arguments.learning_rate, progress["seconds"], total, progress["step"])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(self.model, latents, clips)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        weight = min(0.999, (1 + progress["step"]) / (10 + progress["step"]))
        state = self.model.state_dict()
        torch._foreach_lerp_([self.average[name] for name in state], list(state.values()), 1 - weight)
        progress["step"] += 1
        return loss.detach()

    def save(self) -> None:
        """The exact state, the model to sample from, and what travels."""
        out, travels = self.arguments.out, self.arguments.copy or self.arguments.out
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"average": self.average, "progress": self.progress}
        torch.save(state, out / f"{STATE}.partial")
        (out / f"{STATE}.partial").replace(out / STATE)
        for folder in {out / "model", travels / "model"}:
            self.model.save(folder, self.average)
        halves = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in self.average.items()}
        save_file(halves, travels / AVERAGE)
        write_json(self.progress, (travels / AVERAGE).with_suffix(".json"))


@torch.no_grad()
def held_out_loss(run: Run, pieces: Pieces) -> float:
    """Of the moving average, on the same starts and noise every time."""
    model = copy.deepcopy(run.model)
    model.load_state_dict(run.average)
    pieces = copy.copy(pieces)
    pieces.random = torch.Generator().manual_seed(0)
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        losses = [float(loss_of(model, *pieces.batch(held_out=True))) for _ in range(4)]
    return sum(losses) / len(losses)


def train(arguments: argparse.Namespace) -> None:
    """A piece of the run: steps until --seconds are over, its start and compilation counted in."""
    began, device = time.monotonic(), torch.device(arguments.device)
    torch.set_float32_matmul_precision("high")
    arguments.out.mkdir(parents=True, exist_ok=True)
    clips = read(arguments.media)
    names = tuple(clip.name for clip in clips)
    config = VideoConfig(names, **json.loads(arguments.config)) if arguments.config else VideoConfig(names)
    torch.manual_seed(arguments.seed)
    run = Run(arguments, config, device)
    torch.manual_seed(arguments.seed + run.progress["step"])
    pieces = Pieces(clips, config, arguments.batch_tokens, arguments.seed + run.progress["step"], device)
    if arguments.compile:
        run.model.transformer.compile_repeated_blocks(dynamic=False)
    before, start, lately = run.progress["seconds"], time.monotonic(), list[Tensor]()
    first, saved = run.progress["step"], start
    left = arguments.seconds - (start - began)
    while time.monotonic() - start < left or run.progress["step"] == first:
        lately.append(run.step(*pieces.batch()))
        run.progress["seconds"] = before + time.monotonic() - start
        if run.progress["step"] % arguments.report_every == 0:
            report(run, lately, time.monotonic() - start)
            lately.clear()
        if time.monotonic() - saved > 120:
            run.save()
            saved = time.monotonic()
    run.progress["held_out"] = held_out_loss(run, pieces)
    print(json.dumps({name: run.progress[name] for name in ("step", "seconds", "held_out")}), flush=True)
    run.save()
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    found = provenance(shlex.join(["python", *sys.argv]), device)
    write_json({"arguments": values, **run.progress, **found}, (arguments.copy or arguments.out) / "training.json")


def report(run: Run, losses: list[Tensor], elapsed: float) -> None:
    """A line of the history."""
    row = {
        "step": run.progress["step"], "seconds": round(run.progress["seconds"], 1), "elapsed": round(elapsed, 1),
        "loss": round(float(torch.stack(losses).mean()), 5),
    }  # fmt: skip
    if run.device.type == "cuda":
        row["gibibytes"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    run.progress["history"].append(row)
    print(json.dumps(row), flush=True)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--media", type=Path, default=Path("training/data/media.safetensors"))
    add("--out", type=Path, default=Path("training/runs/video"))
    add("--copy", type=Path, metavar="FOLDER", help="for the model and the average in bf16 (default: --out)")
    add("--resume", type=Path, help=f"folder of an earlier run, or its {AVERAGE}")
    add("--seconds", type=float, default=540, help="of this piece; 20 s more go by until it has saved")
    add("--total-seconds", type=float, default=1400, help="of all pieces: how the learning rate falls")
    add("--learning-rate", type=float, default=1.5e-3)
    add("--batch-tokens", type=int, default=8 * 9216)
    add("--config", help="fields of VideoConfig as JSON, for another size")
    add("--report-every", type=int, default=100)
    add("--seed", type=int, default=1)
    add("--device", default="cuda")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
