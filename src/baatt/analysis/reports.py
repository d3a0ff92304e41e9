"""The file a benchmark leaves: what ran where, on which commit and versions, the machine's ceilings, the records.

In: a command line and records. Out: JSON, written again after every record, so that a run that dies keeps what it has.
"""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import baatt
from baatt.analysis.timing import matrix_peak_tflops, memory_bandwidth

PACKAGE = Path(baatt.__file__).parent


class Report(NamedTuple):
    """One run.

    command, commit: how to repeat it; device, versions: where it ran; matrix_peak_tflops: of a large product in
    `matrix_peak_dtype`, measured in the same run; memory_bandwidth: bytes per second of a large copy; records: see
    `baatt.analysis.benchmark.Record`.
    """

    command: str
    commit: str | None
    device: str
    versions: dict[str, str]
    matrix_peak_tflops: float
    matrix_peak_dtype: str
    memory_bandwidth: float
    records: list[dict[str, Any]]


def start_report(command: str, device: torch.device, dtype: torch.dtype) -> Report:
    """A report without records; measures the machine's ceilings, which takes seconds."""
    return Report(
        command,
        commit_here(),
        device_name(device),
        versions_here(device),
        matrix_peak_tflops(device, dtype),
        str(dtype).removeprefix("torch."),
        memory_bandwidth(device),
        [],
    )


def store_report(report: Report, path: Path) -> None:
    """Write the report; a reader never sees half a file."""
    store_json(report._asdict(), path)


def store_json(value: Mapping[str, Any], path: Path) -> None:
    """Write a file at once."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def load_report(path: Path) -> Mapping[str, Any]:
    """A stored report.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold the JSON of `baatt bench`, got {error}") from None
    if not isinstance(stored, dict) or not set(Report._fields) <= stored.keys():
        raise ValueError(f"{path} must hold the fields {', '.join(Report._fields)} of `baatt bench`")
    return stored


def commit_here() -> str | None:
    """HEAD of the checkout that baatt runs from, marked `-dirty` if tracked files differ.

    A copy that was sent to another machine without its last commits, or without any, brings their name in the file
    `.commit`: it counts where the history at hand does not know that commit.
    """
    note = Path(".commit")
    noted = note.read_text(encoding="utf-8").strip() if note.is_file() else None
    try:
        # An installed copy may lie inside a foreign checkout, whose HEAD says nothing.
        _git("ls-files", "--error-unmatch", "__init__.py")
        if noted is not None and not _known(noted):
            return noted
        return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return noted


def _known(commit: str) -> bool:
    """Whether the history holds a commit; a mark behind it does not matter."""
    try:
        _git("cat-file", "-e", commit.split("-", 1)[0] + "^{commit}")
    except subprocess.CalledProcessError:
        return False
    return True


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor with the threads in use."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{processor_name()}, {torch.get_num_threads()} threads"


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
        try:
            found["triton"] = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            found["triton"] = "not installed"
    return found


def _git(*command: str) -> str:
    run = subprocess.run(["git", *command], capture_output=True, text=True, check=True, cwd=PACKAGE)
    return run.stdout.strip()
