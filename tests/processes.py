"""Processes of a test that do not import torch again, which takes seconds: ranks as torchrun makes them, and new ones.

Ranks are forked from the test itself, with a GPU started anew, since CUDA does not survive a fork. New processes are
forked from one that has imported torch and nothing else.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
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


def run_code(
    code: str, *arguments: str, folder: Path | None = None, timeout: float = 240, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python -c code arguments` in a folder with these environment variables, torch being there already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with TemporaryDirectory() as written:
        asked = Path(written), code, arguments, folder or Path.cwd(), variables
        process = context.Process(target=_run_code, args=asked, daemon=False)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(code, timeout)
        said = [(Path(written) / name).read_text() for name in ("out", "err")]
    return subprocess.CompletedProcess(code, process.exitcode, *said)


def run_module(name: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m name arguments`, with the options of `run_code`."""
    code = f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    return run_code(code, *arguments, **options)


def _run_code(written: Path, code: str, arguments: tuple[str, ...], folder: Path, variables: dict[str, str]) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(written / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ |= variables
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


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
