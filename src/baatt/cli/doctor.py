"""What is installed, which devices there are, and which implementation would run and why."""

import argparse
import os
import platform

import torch
from rich.console import Console

from baatt.backend import describe
from baatt.lab.loading import MODELS, find_model
from baatt.lab.records import installed_version, processor_name
from baatt.lab.tables import Table

PACKAGES = (
    *("baatt", "torch", "triton", "einops", "numpy", "safetensors", "tokenizers", "rich", "matplotlib"),
    *("transformers", "diffusers", "accelerate", "lm_eval", "lmms_eval", "av"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(arguments: argparse.Namespace) -> None:
    """Print three tables."""
    console = Console(soft_wrap=True)
    # PyTorch's own word for its version says what it was built for, which the package's does not.
    own = {"torch": torch.__version__}
    versions = [("python", platform.python_version())]
    versions += [(name, own.get(name) or installed_version(name)) for name in PACKAGES]
    console.print(Table(("package", "version"), versions, title="Versions", text=True).rich())
    processor = f"{processor_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    devices = [("cpu", processor)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.device_count():
        devices.append(("cuda", "none that PyTorch can use"))
    console.print(Table(("device", "properties"), devices, title="Devices", text=True).rich())
    impls = [(impl, "yes" if available else "no", reason) for impl, available, reason in describe()]
    console.print(Table(("impl", "runs here", "why"), impls, title="Implementations", text=True).rich())
    for name in MODELS:
        try:
            found = f"present at {find_model(name)}"
        except FileNotFoundError as error:
            found = f"MISSING: {error}"
        console.print(f"--model {name}: {found}", markup=False)
