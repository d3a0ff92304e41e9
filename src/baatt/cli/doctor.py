"""What is installed, which devices there are, and which implementation would run and why."""

import argparse
import importlib.metadata
import os
import platform

import torch
from rich.console import Console
from rich.table import Table

from baatt.analysis.reports import processor_name
from baatt.assets import shipped_model
from baatt.backend import describe

PACKAGES = (
    *("baatt", "torch", "triton", "einops", "numpy", "safetensors", "tokenizers", "rich", "matplotlib"),
    *("transformers", "diffusers", "accelerate", "lm_eval", "lmms_eval", "av"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(arguments: argparse.Namespace) -> None:
    """Print three tables."""
    console = Console(soft_wrap=True)
    versions = Table("package", "version", title="Versions", title_justify="left")
    versions.add_row("python", platform.python_version())
    for name in PACKAGES:
        versions.add_row(name, _version(name))
    console.print(versions)

    devices = Table("device", "properties", title="Devices", title_justify="left")
    devices.add_row("cpu", f"{processor_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.add_row(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.device_count():
        devices.add_row("cuda", "none that PyTorch can use")
    console.print(devices)

    impls = Table("impl", "runs here", "why", title="Implementations", title_justify="left")
    for impl, available, reason in describe():
        impls.add_row(impl, "yes" if available else "no", reason)
    console.print(impls)
    found = "present" if (shipped_model() / "config.json").is_file() else "MISSING"
    console.print(f"Shipped model: {found} at {shipped_model()}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
