"""What a run leaves: where it comes from, its records as they come, and JSON files that are never half written.

In: a command line, a device, records. Out: JSON. A file is written again after every record, so that a run that dies
keeps what it has. Knows nothing of what a record holds.
"""

import gzip
import importlib.metadata
import json
import platform
import re
import subprocess
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import baatt


def provenance(command: str, device: torch.device) -> dict[str, Any]:
    """How to repeat what is about to run, and where: command, commit, device, versions."""
    processor = f"{processor_name()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    return {"command": command, "commit": commit_here(), "device": name, "versions": versions_here(device)}


class RecordFile:
    """Records below a header that all of them share, in one JSON file that is written again after each of them.

    Args:
        path: None keeps them in memory only.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path, self.header = path, dict(header)
        self.records: list[dict[str, Any]] = []

    @property
    def content(self) -> dict[str, Any]:
        """What the file holds."""
        return self.header | {"records": self.records}

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record."""
        self.records.append(record)
        if self.path is not None:
            write_json(self.content, self.path)


def stored_text(path: Path) -> str:
    """The text of a file, or of one beside it with `.gz` behind its name, as large results are kept."""
    packed = path if path.suffix == ".gz" else Path(f"{path}.gz")
    if packed == path or (packed.exists() and not path.exists()):
        return gzip.decompress(packed.read_bytes()).decode()
    return path.read_text(encoding="utf-8")


def load_records(path: Path, fields: Collection[str], made_by: str) -> dict[str, Any]:
    """A stored file.

    Args:
        fields: that it must have. made_by: the command, for the message.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    try:
        stored = json.loads(stored_text(path))
    except (ValueError, RecursionError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} must hold the JSON of {made_by}, got {error}") from None
    if not isinstance(stored, dict) or not set(fields) <= stored.keys():
        raise ValueError(f"{path} must hold the fields {', '.join(fields)} of {made_by}")
    return stored


def write_json(value: Any, path: Path, indent: int | None = 1) -> None:
    """Write a file at once."""
    with written_at_once(path) as partial:
        partial.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


@contextmanager
def written_at_once(path: Path) -> Iterator[Path]:
    """A place to write to that becomes `path` in the end: a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)


def commit_here(file: Path = Path(baatt.__file__)) -> str | None:
    """HEAD of the checkout that a tracked file lies in, marked `-dirty` if tracked files differ; None where unknown.

    A copy that was sent to another machine without its last commits, or without any, brings their name in the file
    `.commit`: it counts where the history at hand does not know that commit.
    """
    note = Path(".commit")
    noted = note.read_text(encoding="utf-8").strip() if note.is_file() else None
    # An installed copy may lie inside a foreign checkout, whose HEAD says nothing.
    if _git(file, "ls-files", "--error-unmatch", file.name) is None:
        return noted
    if noted is not None and _git(file, "cat-file", "-e", re.split(r"[+-]", noted)[0] + "^{commit}") is None:
        return noted
    head = _git(file, "rev-parse", "HEAD")
    # Untracked files do not count: checkpoints, samples and new results lie beside every run.
    return head and head + ("-dirty" if _git(file, "status", "--porcelain", "--untracked-files=no") else "")


def short_commit(commit: str | None) -> str:
    """First ten characters, and `-dirty` where the run had changes; `+changes` is how old files spell it."""
    if commit is None:
        return "unknown"
    name, *changed = re.split(r"[+-]", commit, maxsplit=1)
    return name[:10] + ("-dirty" if changed else "")


def processor_name() -> str:
    """What /proc/cpuinfo calls the processor, or what Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions_here(device: torch.device) -> dict[str, str]:
    """Of everything that may change a time."""
    found = {"baatt": baatt.__version__, "python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
        found["triton"] = installed_version("triton")
    return found


def installed_version(package: str) -> str:
    """Its version, or `not installed`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(file: Path, *command: str) -> str | None:
    """What git prints in a file's folder; None where it is not installed or refuses."""
    try:
        run = subprocess.run(["git", *command], capture_output=True, text=True, check=False, cwd=file.parent)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None
