"""Both small models, from pixels to tables, on a GPU machine without a network, in commands of at most ten minutes.

`pack` and `keep` run here, `unpack`, `start` and `watch` there. `start` begins a queue of steps for each model, one on
each GPU, in sessions of their own that go on when the command returns: training, samples to look at, measurements.
Every step has a limit and a log; what is left of the time ends it sooner, and the next one begins. `watch` leaves in a
folder what is to come back, anew every minute, as parts of a tar archive, and shows the logs that have grown; when a
step has failed it returns at once. What each step runs is in `steps.py`.
"""

import argparse
import gzip
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from steps import DATA, NAMES, QUEUES, Place, Step, training_of

WORK = Path("training/runs/session")
CARRIED = Path(".carry/vision")
DIFFUSERS = "diffusers==0.42.1"
#: Bytes that travel with a call, the tree among them, of which some are spared; those of a part that comes back, and
#: how many parts a command may bring back: 64 MiB in all.
TRAVELS, SPARED, BACK, PARTS = 64 * 2**20, 3 * 2**19, 15_500_000, 4
#: The commit of the tree that travels without its history: in the archive, and where `baatt.lab.records` looks for it.
COMMIT, NOTE = "commit", Path(".commit")
#: Left on the machine: exact states, answers, captures, and files that are being written.
LEFT = ("state.pt", ".partial", ".answers", ".capture")
#: Seconds that a step has at least, that one told to stop has, between two looks at a queue, and two copies of what is
#: to come back.
LEAST, PATIENCE, LOOK, EVERY = 5, 10, 2, 60
RETRIES = 3
#: What a queue says of a step that broke or ran into its limit, and at its own end.
FAILED, END = " FAILED with ", "END\n"
#: Fields of a `Place` that `start` hands on.
FLAGS = ("tiny", "shipped")
#: Of a line that is shown, the characters.
SHOWN = 450
#: Films come back to be looked at, and are too large for the repository.
FILM = ".gif"
#: Bytes above which a picture is put into the repository with 256 colours, in a third of them.
PICTURE = 500_000
#: Bytes above which a result is packed.
RESULT = 100_000
#: Where what came back belongs: in the archive, in the repository.
PLACES = {
    **{f"{model}/{name}": f"src/baatt/assets/{name}" for model, name in NAMES.items()},
    "video/training.json": "benchmarks/results/training/video.json",
    "understanding/training.json": "benchmarks/results/training/understanding.json",
    "results": "benchmarks/results", "pictures": "docs/figures",
}  # fmt: skip


class Queue:
    """The steps of one model, one after the other, until its time is over."""

    def __init__(self, name: str, place: Place, work: Path = WORK) -> None:
        self.name, self.place, self.work, self.began = name, place, work, time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the queue began."""
        return time.monotonic() - self.began

    def say(self, text: str) -> None:
        """A line of the queue's log."""
        print(f"{self.elapsed():5.0f} s  {text}", flush=True)

    def step(self, step: Step) -> bool:
        """Run a step; whether it ended well. One that is told to stop by its limit is interrupted, then killed."""
        limit = min(step.limit, self.place.seconds - self.elapsed())
        if limit < LEAST:
            self.say(f"{step.name} LEFT OUT: no time")
            return False
        self.say(f"{step.name} begins, at most {limit:.0f} s")
        began = self.elapsed()
        with (self.work / "logs" / f"{self.name}-{step.name}.log").open("a") as log:
            process = subprocess.Popen(step.command, stdout=log, stderr=subprocess.STDOUT)
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                try:
                    status = process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    status = process.wait()
        self.say(
            f"{step.name} {'done' if status == 0 else f'{FAILED.strip()} {status}'} in {self.elapsed() - began:.0f} s"
        )
        return status == 0

    def learn(self) -> None:
        """Train until the time for it is over: a run that breaks goes on from its last minute, uncompiled. A shipped
        model without seconds for it is measured as it is."""
        place = self.place
        if place.shipped and not place.training:
            model = NAMES[self.name]
            shutil.copytree(
                Path("src/baatt/assets") / model,
                self.work / self.name / model,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("*.md"),
            )  # a card may have changed when it comes back
            self.say(f"{model} is measured as it is shipped")
            return
        for _ in range(3):
            seconds = place.training - self.elapsed()
            if self.step(training_of(self.name, replace(place, training=seconds), self.work)):
                return
            place = replace(place, compiled=False)
            if place.training - self.elapsed() < 4 * LEAST:
                return

    def run(self) -> None:
        """Everything; that it has ended is said even if it breaks, as `watch` waits for it."""
        try:
            self.learn()
            for step in QUEUES[self.name](self.place, self.work):
                self.step(step)
        finally:
            self.say(END.strip())


def pack(arguments: argparse.Namespace) -> None:
    """Pixels, diffusers, the commit and what both models go on from, in parts that travel."""
    from baatt.lab.records import commit_here

    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / COMMIT).write_text(f"{commit_here(Path(__file__).resolve())}\n")
    subprocess.run([sys.executable, "training/vision/media.py"], check=True)
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(DATA / "site"), DIFFUSERS]
    subprocess.run([sys.executable, *install], check=True)
    files = [COMMIT, "media.safetensors", "photos.safetensors", "heldout.safetensors", "site"]
    came = None if arguments.folder is None else open_parts(arguments.folder)
    for name in NAMES:
        for kind in ("safetensors", "json"):
            copied = DATA / f"{name}.{kind}"
            copied.unlink(missing_ok=True)
            if came is not None and (average := came / name / f"average.{kind}").exists():
                shutil.copy(average, copied)
                files.append(copied.name)
                print(f"{name} goes on from {average}")
    shutil.rmtree(CARRIED, ignore_errors=True)
    CARRIED.mkdir(parents=True)
    write_parts(DATA, files, CARRIED / "part", room_beside_the_tree(), "xz")
    for part in sorted(CARRIED.iterdir()):
        print(f"{part} {part.stat().st_size / 2**20:.1f} MiB")


def room_beside_the_tree() -> int:
    """Bytes that a part may have: what the tree, files included that git neither tracks nor ignores, leaves of a call.

    Raises:
        OSError: less than one part in sixteen is left.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    tree = sum(Path(name).stat().st_size for name in set(names) - {""} if Path(name).is_file())
    room = TRAVELS - SPARED - tree
    if room < TRAVELS // 16:
        raise OSError(
            f"the tree must leave {TRAVELS // 16 + SPARED:,} of {TRAVELS:,} bytes to a part, got {tree:,}: move models "
            "that this session does not need out of it for so long"
        )
    return room


def unpack(_: argparse.Namespace) -> None:
    """Join the parts that have arrived."""
    DATA.mkdir(parents=True, exist_ok=True)
    read_parts(CARRIED, DATA)
    shutil.copy(DATA / COMMIT, NOTE)


def start(arguments: argparse.Namespace) -> None:
    """Begin the queues; returns at once."""
    for folder in ("logs", "results", "pictures"):
        (WORK / folder).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(QUEUES):
        if name not in (arguments.only or QUEUES):
            continue
        own = {"OMP_NUM_THREADS": "1"}
        if arguments.device == "cuda":  # each its own, whether the other one begins now or runs already
            own = {"OMP_NUM_THREADS": "8", "CUDA_VISIBLE_DEVICES": str(number % arguments.gpus)}
        path = os.pathsep.join(filter(None, ("src", str(DATA / "site"), os.environ.get("PYTHONPATH"))))
        environment = os.environ | own | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        total = arguments.total or arguments.training
        given = ["--seconds", str(arguments.seconds), "--training", str(arguments.training), "--total", str(total),
                 "--device", arguments.device,
                 *(f"--{name}" for name in FLAGS if getattr(arguments, name))]  # fmt: skip
        with (WORK / "logs" / f"{name}.log").open("a") as log:
            subprocess.Popen([sys.executable, __file__, "queue", name, *given], stdin=subprocess.DEVNULL, stdout=log,
                             stderr=subprocess.STDOUT, env=environment, start_new_session=True)  # fmt: skip
        print(f"{name} begins, {arguments.seconds:.0f} s, {arguments.training:.0f} of them training")


def queue(arguments: argparse.Namespace) -> None:
    """What `start` begins."""
    device = arguments.device
    dtype = "bfloat16" if device == "cuda" else "float32"
    place = Place(device, dtype, arguments.seconds, arguments.training, arguments.total,
                  *(getattr(arguments, name) for name in FLAGS))  # fmt: skip
    Queue(arguments.name, place).run()


def watch(arguments: argparse.Namespace, work: Path = WORK) -> None:
    """Until the queues have ended, a step has failed or the time is over; leave what is to come back, show logs."""
    until, left = time.monotonic() + arguments.seconds, -float("inf")
    since = time.time() - EVERY  # what ended between two calls is shown too
    logs = [log for log in (work / "logs" / f"{name}.log" for name in QUEUES) if log.exists()]
    before = sum(log.read_text().count(FAILED) for log in logs)
    waits = True
    while waits:
        said = [log.read_text() for log in logs]
        has_ended = all(text.endswith(END) for text in said) or sum(text.count(FAILED) for text in said) > before
        waits = not has_ended and time.monotonic() < until
        if not waits or time.monotonic() - left >= EVERY:
            left, parts = time.monotonic(), leave(work, arguments.out)
        if waits:
            time.sleep(LOOK)
    for log in sorted((work / "logs").glob("*.log")):
        if log in logs or log.stat().st_mtime >= since:
            lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
            print(f"--- {log.name}, {len(lines)} lines", *(one[:SHOWN] for one in lines[-arguments.lines :]), sep="\n")
    print(f"in {arguments.out}: {len(parts)} parts, {sum(part.stat().st_size for part in parts) / 2**20:.1f} MiB")
    if len(parts) > PARTS:
        raise OSError(f"what comes back must be at most {PARTS} parts, got {len(parts)}")


def leave(work: Path, out: Path) -> list[Path]:
    """Parts of what is to come back, in a folder, in place of those that were left there before."""
    out.mkdir(parents=True, exist_ok=True)
    for attempt in range(RETRIES):  # a file may be written at this moment
        try:
            names = [path.name for path in sorted(work.iterdir()) if not path.name.endswith(LEFT)]
            parts = write_parts(work, names, out / "session", BACK, "gz")
            break
        except OSError:
            if attempt + 1 == RETRIES:
                raise
            time.sleep(LOOK)
    for stale in {*out.glob("session.[0-9][0-9]")} - {*parts}:
        stale.unlink()
    return parts


def keep(arguments: argparse.Namespace) -> None:
    """Put what came back to its places in the repository, and render the docs."""
    came = open_parts(arguments.folder)
    for source, target in PLACES.items():
        found = came / source
        files = sorted(found.iterdir()) if found.is_dir() else [found] if found.exists() else []
        for file in (one for one in files if one.suffix != FILM):
            place = Path(target) / file.name if found.is_dir() else Path(target)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
            if place.suffix == ".png" and place.stat().st_size > PICTURE:
                make_small(place)
            if place.is_relative_to("benchmarks/results") and place.stat().st_size > RESULT:
                place = packed(place)
            print(f"{place} {place.stat().st_size / 2**20:.2f} MiB")
    subprocess.run([sys.executable, "benchmarks/render.py"], check=True)


def packed(result: Path) -> Path:
    """A large result with `.gz` behind its name in place of itself, as CONTRIBUTING has it."""
    found = Path(f"{result}.gz")
    found.write_bytes(gzip.compress(result.read_bytes(), mtime=0))
    result.unlink()
    return found


def make_small(picture: Path) -> None:
    """Store a picture with 256 colours: the tree must leave room for parts, see `room_beside_the_tree`."""
    from PIL import Image

    with Image.open(picture) as opened:
        small = opened.convert("RGB").quantize(256)
    small.save(picture, optimize=True)


def open_parts(folder: Path) -> Path:
    """The folder with what came back, unpacked."""
    came = Path("training/runs/came")
    shutil.rmtree(came, ignore_errors=True)
    came.mkdir(parents=True)
    read_parts(folder, came)
    return came


def write_parts(folder: Path, names: Sequence[str], stem: Path, size: int, kind: str) -> list[Path]:
    """An archive of files of a folder, cut into parts `stem.00`, `stem.01` and so on of at most `size` bytes."""
    parts = []
    with tempfile.TemporaryFile() as stream:  # whole before the first part is written: earlier ones stay until then
        with tarfile.open(fileobj=stream, mode=f"w:{kind}") as tar:
            for name in names:
                tar.add(
                    folder / name, name, filter=lambda one: None if one.name.endswith((*LEFT, "__pycache__")) else one
                )
        stream.seek(0)
        while content := stream.read(size):
            parts.append(stem.with_suffix(f".{len(parts):02}"))
            parts[-1].write_bytes(content)
    return parts


def read_parts(folder: Path, target: Path) -> None:
    """Unpack an archive that `write_parts` has cut."""
    whole = target / "joined.tar"
    with whole.open("wb") as stream:
        for part in sorted(folder.glob("*.[0-9][0-9]")):
            stream.write(part.read_bytes())
    with tarfile.open(whole) as tar:
        tar.extractall(target, filter="data")
    whole.unlink()


def build_parser() -> argparse.ArgumentParser:
    """A verb a function."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)

    def verb(function: object) -> argparse.ArgumentParser:
        text = str(function.__doc__)
        added = verbs.add_parser(function.__name__, help=text, description=text)
        added.set_defaults(act=function)
        return added

    verb(pack).add_argument("folder", type=Path, nargs="?", help="the parts that came back, to go on from them")
    verb(unpack)
    for function in (start, queue):
        added = verb(function)
        added.add_argument("--seconds", type=float, required=True, help="until everything ends")
        added.add_argument("--training", type=float, required=True, help="seconds of them for training")
        added.add_argument("--total", type=float, help="of training in all sessions (default: in this one)")
        added.add_argument("--device", default="cuda")
        added.add_argument("--tiny", action="store_true", help="everything at a size for a processor, to try it")
        added.add_argument("--shipped", action="store_true", help="go on from the models of the repository")
        if function is start:
            added.add_argument("--gpus", type=int, default=2)
            added.add_argument("--only", nargs="+", choices=list(QUEUES), help="one of the models")
        else:
            added.add_argument("name", choices=list(QUEUES))
    watching = verb(watch)
    watching.add_argument("seconds", type=float)
    watching.add_argument("out", type=Path, help="folder for what is to come back")
    watching.add_argument("--lines", type=int, default=3, help="of each log (default: 3)")
    verb(keep).add_argument("folder", type=Path, help="the parts that came back")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = build_parser().parse_args(argv)
    arguments.act(arguments)


if __name__ == "__main__":
    main()
