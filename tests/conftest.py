"""One torch thread, here and in what tests start: the tensors are small, and `make test` runs a process per core.

Without a GPU, Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported.

The imported libraries make millions of objects: to go through them in search of garbage took 8 % of the time.
"""

import gc
import multiprocessing
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

#: Files that take longest: `make test` gives files to processes in this order, and none of these should come last.
LONGEST = (
    *("test_triton_compilation", "test_cached_decoding", "test_transformers", "test_attention", "test_diffusers"),
    *("test_run", "test_evaluate", "test_pins", "test_analyze", "test_diffusers_calls", "test_programs"),
    *("test_triton_causal", "test_hopper_clusters", "test_hopper", "test_cpu", "test_cli", "test_samples"),
    *("test_sdpa", "test_model", "test_decoding_benchmark", "test_causal", "test_maps_page", "test_llada"),
    *("test_fidelity", "test_cpu_scores", "test_remote_sdpa", "test_triton_mass", "test_tasks"),
    *("test_triton_attention", "test_masks", "test_reliability", "test_triton_budget", "test_bench"),
    *("test_triton_arrangement", "test_imports"),
)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prepare torch in each process that runs tests; the one that deals them out needs none."""
    if session.config.pluginmanager.hasplugin("dsession"):
        return
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what was imported out of every search for garbage."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 100)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that would be spawned are forked, so that none of them imports torch again."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
