"""Two ranks for a test, as torchrun makes them but without it: forked, so that no rank imports torch again.

With a GPU they are started anew, since CUDA does not survive a fork.
"""

import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.multiprocessing

START = "spawn" if torch.cuda.is_available() else "fork"


def run_ranks(function: Callable[..., None], *arguments: Any, size: int = 2) -> None:
    """Call `function(rank, *arguments)` in `size` processes; raises if one of them does."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=size, start_method=START)


def run_script(script: str, *arguments: str, folder: Path) -> tuple[str, str]:
    """What `torchrun --nproc-per-node 2 script arguments`, called in a folder, writes to stdout and stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as written:
        run_ranks(_run_script, port, Path(written), folder, [script, *arguments])
        files = sorted(Path(written).iterdir())
        out, err = ("".join(file.read_text() for file in files if file.suffix == end) for end in (".out", ".err"))
    return out, err


def _run_script(rank: int, port: int, written: Path, folder: Path, command: list[str]) -> None:
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **both}
    os.chdir(folder)
    sys.argv, sys.path = command, [str((folder / command[0]).parent), *sys.path]
    with (written / f"{rank}.out").open("w") as sys.stdout, (written / f"{rank}.err").open("w") as sys.stderr:
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{command[0]} left with {end.code}") from None
        finally:
            sys.stdout.flush()
