"""Trains the small video model of `baatt.lab.video.model` on the clips of `media.py`, in pieces of at most ten minutes.

In: the media file. Out: as `running.py` writes it. Every batch has about as many tokens as any other: half of the
batches are short pieces, which cost less attention. One GPU.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from running import Run, add_arguments, go_on
from torch import Tensor

from baatt.lab.video.model import LEAST_NOISE, VideoConfig, VideoModel, shifted, to_latents
from baatt.lab.vision.media import Clip, read

#: Starts from here on, of [0, 1), are held out: of films the last ones, of panoramas a sector in which no pan begins.
HELD_OUT = 0.9
#: Columns that a camera turns by in a frame of a panorama, at most and at least, to either side.
SLOWEST, FASTEST = 0.5, 2.0
#: Learning has begun when the loss has fallen to this share of the first row's.
BEGUN = 0.5


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


def has_begun(run: Run, row: dict[str, Any]) -> str | None:
    """None if the loss has fallen far from that of the first row, else what it is."""
    first = run.progress["history"][0]["loss"]
    return None if row["loss"] < BEGUN * first else f"loss {row['loss']}, in the beginning {first}"


def chosen(clips: list[Clip], names: str | None) -> list[Clip]:
    """The clips of these names, by commas, in their order; None = all.

    Raises:
        ValueError: a name that no clip has.
    """
    if names is None:
        return clips
    by_name = {clip.name: clip for clip in clips}
    if unknown := [name for name in names.split(",") if name not in by_name]:
        raise ValueError(f"--scenes must be of {','.join(by_name)}, got {unknown[0]}")
    return [by_name[name] for name in names.split(",")]


def train(arguments: argparse.Namespace) -> None:
    """A piece of the run."""
    began, device = time.monotonic(), torch.device(arguments.device)
    torch.set_float32_matmul_precision("high")
    arguments.out.mkdir(parents=True, exist_ok=True)
    clips = chosen(read(arguments.media), arguments.scenes)
    names = tuple(clip.name for clip in clips)
    config = VideoConfig(names, **json.loads(arguments.config))
    torch.manual_seed(arguments.seed)
    run = Run(arguments, VideoModel(config), device)
    seed = arguments.seed + run.progress["step"]
    torch.manual_seed(seed)
    pieces = Pieces(clips, config, arguments.batch_tokens, seed, device)
    if arguments.compile:
        run.model.transformer.compile_repeated_blocks(dynamic=False)

    def held_out() -> float:
        """On the same starts and noise every time."""
        same = copy.copy(pieces)
        same.random = torch.Generator().manual_seed(0)
        with run.averaged() as model:
            return sum(float(loss_of(model, *same.batch(held_out=True))) for _ in range(4)) / 4

    go_on(run, began, lambda: (loss_of(run.model, *pieces.batch()), {}), held_out, lambda row: has_begun(run, row))


def build_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--media", type=Path, default=Path("training/data/media.safetensors"))
    parser.add_argument("--scenes", metavar="NAME,NAME", help="what is learnt, of the file's clips (default: all)")
    parser.add_argument("--config", default="{}", help="fields of VideoConfig as JSON, for another size")
    add_arguments(parser, "video")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    train(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
