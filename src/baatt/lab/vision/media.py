"""Real pixels: clips, panoramas and photos in one small file, and views of them at the size that a model sees.

A file is safetensors with every frame as JPEG, and what each clip is in its metadata. Out of a clip: a piece of a photo
or of any frame, enlarged or made small, or frames that are evenly spread, in which a camera turns where it is a
panorama. Knows nothing of what is planted. Pillow is imported only to read and write.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

QUALITY = 92
#: The pixels that a model is asked about, beside its weights.
PIXELS = "heldout.safetensors"
#: Of the largest piece that fits, the smallest share of a side that a view shows.
CLOSEST = 0.6
#: Columns of a panorama that a camera turns by from frame to frame, at most.
FASTEST = 6


class Clip(NamedTuple):
    """frames: uint8 [frames, rows, columns, 3]; a panorama is one frame whose last column meets its first."""

    name: str
    frames: Tensor
    is_panorama: bool = False


def write(clips: Sequence[Clip], file: Path, quality: int = QUALITY) -> None:
    """Every frame as JPEG, one after the other."""
    from PIL import Image

    coded = []
    for clip in clips:
        for frame in clip.frames.numpy():
            stream = io.BytesIO()
            Image.fromarray(frame).save(stream, "JPEG", quality=quality, subsampling=0)
            coded.append(stream.getvalue())
    ends = torch.tensor([len(one) for one in coded], device="cpu").cumsum(0)
    about = [{"name": one.name, "frames": len(one.frames), "panorama": one.is_panorama} for one in clips]
    tensors = {"bytes": torch.frombuffer(bytearray(b"".join(coded)), dtype=torch.uint8), "ends": ends}
    save_file(tensors, file, metadata={"clips": json.dumps(about)})


def read(file: Path) -> list[Clip]:
    """The clips of a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that `write` has not written.
        ImportError: Pillow is not installed.
    """
    try:
        import numpy as np
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading pictures needs Pillow: pip install 'baatt[video]'") from error
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of clips and photos")
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads(opened.metadata()["clips"])
            content, ends = opened.get_tensor("bytes").numpy().tobytes(), opened.get_tensor("ends").tolist()
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{file} must hold clips as training/vision/media.py writes them, got {error}") from None
    begins, place, found = [0, *ends], 0, []
    for one in about:
        numbers = range(place, place + one["frames"])
        frames = [np.array(Image.open(io.BytesIO(content[begins[n] : begins[n + 1]])).convert("RGB")) for n in numbers]
        found.append(Clip(one["name"], torch.from_numpy(np.stack(frames)), one["panorama"]))
        place += one["frames"]
    return found


def view(clip: Clip, frames: int, size: tuple[int, int], random: Random) -> Tensor:
    """Pixels [frames, 3, rows, columns] in [0, 1] of a clip, of any piece of it that has the form of `size`.

    Frames are evenly spread over a part of the clip, each several times where it has fewer; in a panorama a camera
    turns. One frame is a photo.
    """
    count, high, wide = clip.frames.shape[:3]
    most = min(high, wide * size[0] / size[1]) * random.uniform(CLOSEST, 1)
    rows, columns = max(1, round(most)), max(1, round(most * size[1] / size[0]))
    top, left = random.randint(0, high - rows), random.randint(0, wide - columns)
    device = clip.frames.device
    if clip.is_panorama:
        speed = random.uniform(-FASTEST, FASTEST)
        place = (
            left
            + (speed * torch.arange(frames, device="cpu")).round().long()[:, None]
            + torch.arange(columns, device="cpu")
        )
        seen = rearrange(clip.frames[0, top : top + rows][:, (place % wide).to(device)], "h f w c -> f c h w")
    else:
        first, last = sorted((random.uniform(0, count - 1), random.uniform(0, count - 1)))
        numbers = (
            torch.linspace(first, max(last, min(first + frames - 1, count - 1)), frames, device="cpu").round().long()
        )
        seen = clip.frames[numbers.to(device), top : top + rows, left : left + columns]
        seen = rearrange(seen, "f h w c -> f c h w")
    found = F.interpolate(seen.float(), size, mode="bilinear", antialias=True, align_corners=False) / 255
    return (found.flip(-1) if random.random() < 0.5 else found).contiguous()
