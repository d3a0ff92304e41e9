"""Cases and records: what is counted, what is refused."""

import json

import pytest
import torch

from baatt import BAAttConfig, ba_attention, make_plan
from baatt.lab.bench import benchmarks, timing
from baatt.lab.bench.baselines import prepare_baseline, static_refusals
from baatt.lab.bench.benchmarks import kept_pairs, measure, random_plan
from baatt.lab.bench.case import Case, Shape, estimated_bytes, make_inputs
from baatt.lab.bench.roofline import draw_report
from baatt.lab.bench.verification import VerificationError

SMALL = Shape(1, 4, 2, 301, 16)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "ENOUGH_MS", 0.0)


def case(what="operator", shape=SMALL, impl="cpu", dtype=torch.float32, sparsity=0.5, **options):
    config = BAAttConfig(sparsity=sparsity, block_size=16)
    return Case(what, shape, config, dtype, torch.device("cpu"), impl, **options)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_record(impl, dtype):
    record = measure(case(impl=impl, dtype=dtype, against=("dense", "cudnn")))
    assert record["impl"] == {"auto": "cpu", "reference": "reference"}[impl]
    assert (record["shape"], record["groups"]) == ([1, 4, 301, 16], 2)
    assert record["achieved_sparsity"] == 1 - 10 / 19
    assert list(record["stage_ms"])[-1] == "attend"
    assert record["speedup"] == {"dense": record["baseline_ms"]["dense"] / record["total_ms"]}
    assert record["refused"] == {"cudnn": "it needs a GPU, got device 'cpu'"}
    assert record["selection_share"] == 1 - record["stage_ms"]["attend"] / sum(record["stage_ms"].values())
    assert record["error"] <= record["error_limit"]
    assert record["verified_blocks"] == [76, 76]
    assert record["input_bytes"] == 8 * 301 * 16 * dtype.itemsize
    assert not record["graph"]
    assert json.loads(json.dumps(record))["config"]["block_size"] == 16


@pytest.mark.parametrize("causal", [1, 12])
def test_causal_record(causal):
    record = measure(case(against=("dense", "flash", "flex"), causal=causal))
    assert record["causal"] == causal
    assert record["error"] <= record["error_limit"]
    assert list(record["speedup"]) == ["dense"]
    assert record["refused"]["flex"] == "its mask is made of whole blocks here"
    # Of the 19 blocks row i sees i + 1, or one more where a causal block of 12 goes beyond.
    seen = [-(-min(301, -(-16 * (row + 1) // causal) * causal) // 16) for row in range(19)]
    assert record["achieved_sparsity"] == 1 - sum(-(-some // 2) for some in seen) / sum(seen)


def test_dense_attention_is_told_the_structure():
    inputs = make_inputs(case())
    for causal in (1, 12):
        plan = make_plan(*inputs[:2], BAAttConfig(16, 0.0), causal=causal)
        ours = ba_attention(*inputs, BAAttConfig(16, 0.0), causal=causal)
        torch.testing.assert_close(prepare_baseline("dense", inputs, plan)(), ours)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [SMALL, Shape(2, 3, 3, 128, 40)])
def test_kernel_record(impl, shape):
    record = measure(case("kernel", shape, impl))
    assert list(record["stage_ms"]) == ["attend"]
    assert record["total_ms"] == record["stage_ms"]["attend"]
    assert record["compensation_cost"] is None
    assert record["selection_share"] is None
    assert record["config"]["sort"] == "none"
    assert record["error"] <= record["error_limit"]


@pytest.mark.parametrize(("what", "name"), [("operator", "ba_attention"), ("kernel", "attention_kernel")])
def test_a_wrong_output_is_not_timed(monkeypatch, what, name):
    right = getattr(benchmarks, name)

    def wrong(*arguments, **options):
        found = right(*arguments, **options)
        return 1.01 * found if what == "operator" else lambda: found()._replace(out=1.01 * found().out)

    monkeypatch.setattr(benchmarks, name, wrong)
    monkeypatch.setattr(benchmarks, "median_times", lambda *_: pytest.fail("timed"))
    with pytest.raises(VerificationError, match=rf"{what} cpu at 1x4:2x301x16, sparsity 0.5 must be within"):
        measure(case(what))


def test_kept_pairs_counts_ragged_blocks():
    q, k = torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70, 16)
    assert kept_pairs(make_plan(q, k, BAAttConfig(sparsity=0.0, block_size=16), causal=1)) == 70 * 71
    assert kept_pairs(make_plan(q, k, BAAttConfig(sparsity=0.0, block_size=16))) == 2 * 70 * 70
    plan = make_plan(q, k, BAAttConfig(sparsity=0.5, block_size=16))
    expected = 0
    for head in range(2):
        for block, row in enumerate(plan.selection.index[0, head].tolist()):
            expected += min(16, 70 - 16 * block) * sum(min(16, 70 - 16 * kept) for kept in row)
    assert kept_pairs(plan) == expected


def test_random_lists_are_ascending_and_differ():
    plan = random_plan(case("kernel", Shape(2, 3, 1, 301, 16), sparsity=0.7))
    index = plan.selection.index
    assert index.shape == (2, 3, 19, 6)
    assert (index.diff(dim=-1) > 0).all()
    assert not torch.equal(index[0, 0], index[0, 1])
    assert not torch.equal(index[0], index[1])


def test_static_refusals_and_estimates_need_no_gpu():
    big = case(shape=Shape(1, 32, 32, 2**18, 128), dtype=torch.bfloat16, against=("cudnn", "flash", "flex", "dense"))
    assert set(static_refusals(big)) == {"cudnn", "flash"}
    on_gpu = big._replace(device=torch.device("cuda"), config=BAAttConfig(sparsity=0.9))
    assert static_refusals(on_gpu) == {}
    assert 8 * 2**30 < estimated_bytes(on_gpu._replace(against=())) < estimated_bytes(on_gpu) < 60 * 2**30


def test_a_report_without_measurements_is_not_drawn(tmp_path):
    with pytest.raises(ValueError, match="at least one measurement"):
        draw_report({"records": []}, tmp_path / "picture.png")


def test_scale_and_blocks_of_a_case():
    assert (case().scale, case().blocks) == (0.25, 19)
