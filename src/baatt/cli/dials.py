"""Options for the dials of the method, names of dtypes, and what memory is free: for verbs with and without a model."""

import argparse
import os
from typing import Any

import torch

from baatt.config import BLOCK_SIZES
from baatt.stages.sorting import ORDERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_dial_options(group: argparse._ArgumentGroup) -> None:
    """One option per dial but sparsity."""
    group.add_argument("--sort", choices=list(ORDERS), help="which side is sorted by norm")
    group.add_argument("--segment", type=_segment, help='tokens per sorting segment, or "whole"')
    group.add_argument("--beta", type=float, help="weight of the covariance compensation")
    group.add_argument("--block-size", type=int, choices=BLOCK_SIZES, help="tokens per block")


def changed_dials(arguments: argparse.Namespace) -> dict[str, Any]:
    """The dials but sparsity that were given, by their names in `BAAttConfig`."""
    names = ("sort", "segment", "beta", "block_size")
    changed = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if changed.get("segment") == "whole":
        changed["segment"] = None
    return changed


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses, of a GPU or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _segment(text: str) -> int | str:
    if text == "whole":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be a number of tokens or "whole", got {text!r}') from None
