"""Samples to look at: a contact sheet (PNG) and a film with all of them side by side (GIF).

In: names and videos [3, frames, rows, columns] in [0, 1]. Pillow is imported only to draw.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

#: Rows of pixels above each video for its name, and the frames of a contact sheet.
CAPTION, SHOWN = 14, 6


def draw_sheet(videos: Mapping[str, Tensor], path: Path) -> None:
    """A row for each video: its name above, frames from the first to the last."""
    count = min(SHOWN, next(iter(videos.values())).shape[1])
    rows = []
    for name, video in videos.items():
        numbers = torch.linspace(0, video.shape[1] - 1, count, device="cpu").long()
        rows.append(_captioned(name, rearrange(_bytes(video[:, numbers]), "c f h w -> h (f w) c")))
    _join(rows, down=True).save(path)


def draw_film(videos: Mapping[str, Tensor], path: Path, milliseconds: int = 40) -> None:
    """All videos beside each other, over and over."""
    coded = {name: rearrange(_bytes(video), "c f h w -> f h w c") for name, video in videos.items()}
    frames = [
        _join([_captioned(name, video[number]) for name, video in coded.items()], down=False)
        for number in range(len(next(iter(coded.values()))))
    ]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def _bytes(video: Tensor) -> Tensor:
    return (255 * video.float()).round().to(torch.uint8).cpu()


def _captioned(name: str, pixels: Tensor) -> Any:
    """A picture of pixels [rows, columns, 3] with its name above."""
    Image, ImageDraw = _pillow()
    image = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + CAPTION), "white")
    ImageDraw.Draw(image).text((2, 1), name, fill="black")
    image.paste(Image.fromarray(pixels.contiguous().numpy()), (0, CAPTION))
    return image


def _join(images: list[Any], *, down: bool) -> Any:
    Image, _ = _pillow()
    wide, high = images[0].size
    size = (wide, high * len(images)) if down else (wide * len(images), high)
    joined = Image.new("RGB", size)
    for number, image in enumerate(images):
        joined.paste(image, (0, high * number) if down else (wide * number, 0))
    return joined


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ImportError("drawing videos needs Pillow: pip install 'baatt[video]'") from error
    return Image, ImageDraw
