"""The CPU twin of the attention stage against it, on both ways: the C kernel and gathering with PyTorch."""

import inspect
import logging
import math
import sys

import pytest
import torch

from baatt import ba_attention, make_plan
from baatt.kernels import cpu, cpu_gather, cpu_native
from baatt.stages import sparse
from baatt.stages.sorting import by_norm, by_position
from baatt.types import BlockSelection
from tests.budget import assert_within_budget, eager_dtype
from tests.pairs import mostly_pairs
from tests.processes import run_code
from tests.settings import sorted_config

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 2, 2, 5, 3, 5),
    (1, 4, 2, 129, 257, 33),
    (2, 6, 2, 100, 300, 64),
    (1, 3, 1, 257, 128, 128),
    (1, 1, 1, 64, 640, 200),
]


@pytest.fixture(params=["native", "gather"])
def way(request, monkeypatch):
    if request.param == "gather":
        monkeypatch.setattr(cpu_native, "library", lambda: None)
    elif cpu_native.library() is None:
        pytest.skip("no C compiler on this machine")
    return request.param


def random_case(shape, block_size, dtype, seed=0, spread=1.0):
    """Inputs, orders with masked keys, and a random selection with counts from 0 up."""
    batch, heads, groups, queries, keys, channels = shape
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(batch, heads, queries, channels, generator=generator) * spread).to(dtype)
    k, v = (torch.randn(batch, groups, keys, channels, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(batch, keys, generator=generator) > 0.2
    query_blocks, key_blocks = -(-queries // block_size), -(-keys // block_size)
    slots = (key_blocks + 1) // 2
    ranked = torch.rand(batch, heads, query_blocks, key_blocks, generator=generator).argsort(-1)[..., :slots]
    count = torch.randint(0, slots + 1, (batch, heads, query_blocks), generator=generator)
    beyond = torch.arange(slots) >= count[..., None]
    index = ranked.masked_fill(beyond, key_blocks).sort(-1).values.masked_fill(beyond, 0)
    selection = BlockSelection(index.int(), count.int())
    return q, k, v, by_norm(q, 2 * block_size, None), by_norm(k, 2 * block_size, mask), selection


def assert_twins(case, block_size, scale):
    q, k, v, *rest = case
    exact, eager = ([x.to(dtype) for x in (q, k, v)] for dtype in (torch.float64, eager_dtype(q.dtype)))
    results = [
        function(*tensors, *rest, block_size=block_size, scale=scale)
        for function, tensors in (
            (cpu.sparse_attention, (q, k, v)),
            (sparse.sparse_attention, eager),
            (sparse.sparse_attention, exact),
        )
    ]
    assert_within_budget(*(partial.out for partial in results))
    actual, eager, exact = (partial.lse for partial in results)
    reachable = exact > -math.inf
    assert torch.equal(actual == -math.inf, ~reachable)
    if reachable.any():
        assert_within_budget(actual[reachable], eager[reachable], exact[reachable])


def test_the_twin_has_the_signature_of_the_stage():
    assert inspect.signature(cpu.sparse_attention) == inspect.signature(sparse.sparse_attention)


@mostly_pairs("shape, block_size, dtype", SHAPES, [16, 32, 64, 128], DTYPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_sparse_attention_is_its_twin(way, shape, block_size, dtype):
    assert_twins(random_case(shape, block_size, dtype), block_size, scale=shape[-1] ** -0.5)


@pytest.mark.usefixtures("narrower_vectors", "poisoned_memory")
def test_narrower_vectors_are_its_twin_too():
    for block_size in (16, 128):
        for shape in SHAPES:
            assert_twins(random_case(shape, block_size, torch.float32), block_size, scale=shape[-1] ** -0.5)


@pytest.mark.parametrize("spread", [1e-20, 30.0, 300.0])
def test_sparse_attention_is_its_twin_for_flat_and_peaked_scores(way, spread):
    assert_twins(random_case((1, 2, 1, 100, 200, 64), 32, torch.float32, spread=spread), 32, scale=0.125)


@pytest.mark.parametrize("bits", [0x7FC00000, -1])
@pytest.mark.usefixtures("poisoned_memory")
def test_values_that_are_not_numbers_stay_in_their_rows(way, bits):
    """A NaN key reaches the rows that attend to its block and no others."""
    q, k, v, query_order, key_order, selection = random_case((1, 1, 1, 64, 64, 16), 16, torch.float32)
    selection = BlockSelection(torch.tensor([[[[0], [1], [1], [2]]]]).int(), torch.ones(1, 1, 4).int())
    k[0, 0, key_order.index[0, 0, 20]] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out = cpu.sparse_attention(q, k, v, query_order, key_order, selection, block_size=16, scale=1.0).out
    touched = torch.zeros(64, dtype=torch.bool)
    touched[query_order.index[0, 0, 16:48]] = True
    assert out[0, 0][touched].isnan().all()
    assert torch.isfinite(out[0, 0][~touched]).all()


def test_scores_of_minus_infinity_give_zero_not_nan(way):
    q, k, v, query_order, key_order, selection = random_case((1, 1, 1, 20, 40, 3), 16, torch.float32)
    q[..., 0], k[..., 0] = 1, -math.inf
    for function in (sparse.sparse_attention, cpu.sparse_attention):
        partial = function(q, k, v, query_order, key_order, selection, block_size=16, scale=1.0)
        assert (partial.out == 0).all()
        assert not partial.lse.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_threads_does_not_matter(way, dtype):
    q, k, v, *rest = random_case((1, 2, 1, 200, 300, 40), 16, dtype)
    results = []
    for threads in (1, 2, 7):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append(cpu.sparse_attention(q, k, v, *rest, block_size=16, scale=0.2))
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


def test_chunks_of_gathered_blocks_do_not_matter(monkeypatch):
    q, k, v, *rest = random_case((1, 2, 1, 200, 300, 40), 16, torch.float64)
    whole = cpu.sparse_attention(q, k, v, *rest, block_size=16, scale=0.2)
    monkeypatch.setattr(cpu_gather, "CHUNK_ELEMENTS", 1)
    single = cpu.sparse_attention(q, k, v, *rest, block_size=16, scale=0.2)
    torch.testing.assert_close(single.out, whole.out)


def test_blocks_that_hold_no_key_are_skipped(way):
    q, k, v, query_order, key_order, _ = random_case((1, 1, 1, 40, 50, 8), 16, torch.float32)
    wild = BlockSelection(torch.tensor([-3, 0, 1, 99]).int().expand(1, 1, 3, 4), torch.full((1, 1, 3), 4).int())
    tame = BlockSelection(torch.tensor([0, 1]).int().expand(1, 1, 3, 2), torch.full((1, 1, 3), 2).int())
    results = [cpu.sparse_attention(q, k, v, query_order, key_order, s, block_size=16, scale=1.0) for s in (wild, tame)]
    torch.testing.assert_close(results[0].out, results[1].out)


@pytest.mark.parametrize("name", ["query_order", "key_order"])
@pytest.mark.parametrize("position", [-1, 50])
def test_orders_that_point_outside_are_refused(way, name, position):
    q, k, v, *orders, selection = random_case((1, 1, 1, 50, 50, 8), 16, torch.float32)
    orders[name == "key_order"].index[0, 0, 3] = position
    with pytest.raises(IndexError, match=rf"^plan\.{name}\.index must hold positions in \[0, 50\), got"):
        cpu.sparse_attention(q, k, v, *orders, selection, block_size=16, scale=1.0)


@pytest.mark.usefixtures("fresh_library")
def test_without_a_compiler_it_gathers(monkeypatch, caplog):
    q, k, v, *_ = random_case((1, 2, 1, 100, 200, 16), 16, torch.float32)
    expected = ba_attention(q, k, v, impl="reference")
    monkeypatch.setattr(cpu_native, "COMPILERS", ("no-such-compiler",))
    with caplog.at_level(logging.INFO, logger="baatt"):
        torch.testing.assert_close(ba_attention(q, k, v, impl="cpu"), expected)
    assert "impl='cpu' gathers blocks with PyTorch: no C compiler (no-such-compiler) found" in caplog.messages


@pytest.mark.usefixtures("fresh_library")
def test_a_failed_build_warns_once_and_gathers(monkeypatch, caplog):
    if cpu_native.find_compiler() is None:
        pytest.skip("no C compiler on this machine")
    q, k, v, *_ = random_case((1, 2, 1, 100, 200, 16), 16, torch.float32)
    expected = ba_attention(q, k, v, impl="reference")
    monkeypatch.setattr(cpu_native, "FLAGS", ("--no-such-flag",))
    for _ in range(2):
        torch.testing.assert_close(ba_attention(q, k, v, impl="cpu"), expected)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "no-such-flag" in warnings[0]


MEMORY = """
import dataclasses
import torch
from pathlib import Path
from baatt import BAAttConfig, ba_attention

def high_water():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024, int(lines["VmRSS"].split()[0]) * 1024

q, k, v = (torch.randn(1, 8, 8192, 64, dtype=getattr(torch, "{dtype}")) for _ in range(3))
config = dataclasses.replace(BAAttConfig.preset("{preset}"), sparsity=0.875)
ba_attention(q[:, :, :256], k[:, :, :256], v[:, :, :256], config, impl="cpu")
Path("/proc/self/clear_refs").write_text("5")
before = high_water()[1]
out = ba_attention(q, k, v, config, impl="cpu")
print((high_water()[0] - before) / (q.nbytes + k.nbytes + v.nbytes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("preset", ["default", pytest.param("paper", marks=pytest.mark.slow)])
def test_extra_memory_is_at_most_one_and_a_half_times_the_inputs(preset, dtype):
    """Output included; the resident set of a fresh process: nothing escapes it, and what malloc keeps counts too."""
    run = run_code(MEMORY.format(preset=preset, dtype=dtype))
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1.5


def test_plans_agree_with_the_reference():
    q, k, *_ = random_case((2, 4, 2, 300, 500, 32), 16, torch.float32)
    config = sorted_config(16, segment=64)
    plans = [make_plan(q, k, config, impl=impl) for impl in ("reference", "cpu")]
    assert torch.equal(plans[0].selection.index, plans[1].selection.index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_of_billions_are_subtracted_before_they_are_rounded(way, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 256, 64, generator=generator).clamp(-1, 1).mul(6e4).to(dtype) for _ in range(2))
    v = torch.randn(1, 2, 256, 64, generator=generator).to(dtype)
    order = by_position(q, None, None)
    selection = BlockSelection(torch.arange(4).expand(1, 2, 4, 4).int(), torch.full((1, 2, 4), 4).int())
    partial = cpu.sparse_attention(q, k, v, order, order, selection, block_size=64, scale=0.125)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.125)
    torch.testing.assert_close(partial.out.double(), exact, rtol=1e-2, atol=1e-2)
    assert partial.lse.isfinite().all()
