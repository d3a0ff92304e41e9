"""Answers of an evaluation as they come, kept on disk so that an interrupted run goes on where it stopped.

In: a key that names a request with everything its answer depends on, and the answer. Out: one JSON line each, in a file
per process; the files of all processes are read back, so the number of them may change. Without a folder answers are
kept in memory only. Knows nothing of what a request is.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class AnswerStore(dict[str, Any]):
    """Answers by key; `put` adds one.

    Args:
        folder: where the files lie, made if missing; None keeps nothing.
        rank: number of this process, the only one that writes `rank<number>.jsonl`.

    Raises:
        ValueError: a line, other than an interrupted last one, that is not an answer.
    """

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        super().__init__()
        self._file = None if folder is None else folder / f"rank{rank}.jsonl"
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob("rank*.jsonl")):
            self._read(file)
        if self:
            logger.info("%s: %d answers of an earlier run", folder, len(self))

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer that JSON can hold."""
        self[key] = answer
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"key": key, "answer": answer}) + "\n")

    def _read(self, file: Path) -> None:
        """Take over a file. What follows its last end of line was interrupted: its owner cuts it off."""
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self[record["key"]] = record["answer"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}: line {number} must be an answer written by an earlier run") from error
        if file == self._file and len(whole) < len(data):
            logger.warning("%s: the last answer was interrupted and is asked again", file)
            with file.open("r+b") as lines:
                lines.truncate(len(whole))


def request_key(*parts: Any) -> str:
    """A name for what an answer depends on; the parts are JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def folder_state(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a model's files: another model in the same folder has other answers."""
    files = sorted(file for file in folder.iterdir() if file.suffix in {".json", ".safetensors", ".jinja"})
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
