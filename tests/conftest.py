"""One torch thread, here and in what tests start: the tensors are small, and `make test` runs a process per core.

Without a GPU, Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

#: Files that take longest: `make test` gives files to processes in this order, and none of these should come last.
LONGEST = (
    *("test_transformers", "test_decoding_benchmark", "test_diffusers", "test_triton_compilation", "test_evaluate"),
    *("test_triton_arrangement", "test_triton_mass", "test_docs", "test_cpu", "test_pins"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
