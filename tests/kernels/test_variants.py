"""How often kernels are compiled as lengths change: once a structure, whatever is a multiple of 16 or just 1.

Launches are caught on their way to a device, in a process of its own without the interpreter, and only their keys in
Triton's cache are made, which is what decides whether it compiles.
"""

import importlib.util
import json

import pytest

from tests.processes import run_code

SCRIPT = """
import collections
import functools
import json
import sys
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

backend = make_backend(GPUTarget("cuda", 90, 32))
keys, binders = collections.defaultdict(set), {}


def note_launch(kernel, *args, grid, warmup, **options):
    if kernel not in binders:
        binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
    keys[kernel.__name__].add(str(binders[kernel](*args, **options)[1:]))


JITFunction.run = note_launch
properties = SimpleNamespace(
    multi_processor_count=132, shared_memory_per_block_optin=227 * 1024, L2_cache_size=50 * 2**20
)
torch.cuda.get_device_properties = lambda device: properties
from baatt import BAAttConfig
from baatt.backend import _choose_on_gpu, _sort_on_gpu, _summarise_sides
from baatt.kernels import hopper, hopper_clusters, triton_attention, triton_budget, triton_clusters
from baatt.kernels import triton_structure
from baatt.scores import clusters

head = BAAttConfig(budget="head")
calls = [(BAAttConfig(), None, 4096), (BAAttConfig(), 1, 4096), (head, None, 4096), (head, 1, 0),
         (BAAttConfig.preset("paper"), None, 4096), (BAAttConfig(score="exact"), None, 4096)]
portable = functools.partial(_summarise_sides, triton_clusters.summarise)
ways = [
    ({clusters.summarise: hopper_clusters.summarise_sides, clusters.compare: hopper_clusters.compare},
     hopper.sparse_attention),
    ({clusters.summarise: portable, clusters.compare: triton_clusters.compare}, triton_attention.sparse_attention),
]
for twins, attend in ways:
    keys.clear()
    for tokens in map(int, sys.argv[1:]):
        q, k, v = (torch.empty(1, heads, tokens, 128, dtype=torch.bfloat16) for heads in (4, 2, 2))
        for config, causal, triton_budget.ALONE in calls:
            sight = None if causal is None else triton_structure.look_back(q, k, causal, 0, 128)
            arranged = _sort_on_gpu(twins, q, k, v, config, None)
            chosen = _choose_on_gpu(twins, arranged.query_summary, arranged.key_summary, config, 0.1, sight)
            orders = arranged.query_order, arranged.key_order
            attend(q, k, v, *orders, chosen, block_size=128, scale=0.1, sight=sight)
        print(json.dumps({kernel: len(found) for kernel, found in keys.items()}))
"""


def test_lengths_compile_nothing_anew():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    # All are 9 to 16 blocks: kernels that hold a row of blocks have its power of two as a constant.
    lengths = [1500, 1100, 1152, 1279, 1501, 1536, 1664, 1999, 2000, 2048]
    run = run_code(SCRIPT, *map(str, lengths), TRITON_INTERPRET="0")
    assert run.returncode == 0, run.stderr[-3000:]
    # How many variants of each kernel there are after each length, of the kernels for Hopper and of the portable ones.
    counts = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(counts) == 2 * len(lengths)
    for alone, *more in (counts[: len(lengths)], counts[len(lengths) :]):
        assert more == [alone] * len(more)
        assert len(alone) > 8
