"""benchmarks/scaling_model.py by hand and against what benchmarks/ulysses.py sends; the latter on the CPU over gloo."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.processes import run_script

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks/results/ulysses_scaling.json"


@pytest.fixture(scope="module")
def model():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as `python benchmarks/scaling_model.py` has it
    spec = importlib.util.spec_from_file_location("scaling_model", ROOT / "benchmarks/scaling_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_model"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The file of a dry run: 2 processes, 4 query heads, 1 key head that has to be sent twice."""
    path = tmp_path_factory.mktemp("ulysses") / "ulysses.json"
    options = "--device cpu --tokens 256,130 --sparsity 0.5,0.9 --heads 4 --groups 1 --channels 16 --block-size 16"
    arguments = [*options.split(), "--dtype", "float32", "--rounds", "1", "--json", str(path)]
    out, _ = run_script("benchmarks/ulysses.py", *arguments, folder=ROOT)
    assert out.count("equal bit for bit") == 4
    return json.loads(path.read_text())


def test_volume_by_hand(model):
    # 4 GPUs of one node, 100 tokens of 8 heads each: q, k, v and the output are 4 * 8 heads of 100 * 16 * 2 bytes.
    packed = 32 * 100 * 16 * 2
    assert model.volume([1, 8, 400, 16], 8, 2, 4, 8) == (packed * 3 // 4, 0, 4 * packed)
    # Nodes of 2: one neighbour, two beyond.
    assert model.volume([1, 8, 400, 16], 8, 2, 4, 2) == (packed // 4, packed // 2, 4 * packed)
    # 2 key heads become 4, one for each GPU: 8 + 4 + 4 + 8 heads.
    assert model.volume([3, 8, 400, 16], 2, 4, 4, 8) == (3 * 24 * 6400 * 3 // 4, 0, 4 * 3 * 24 * 6400)
    assert model.volume([1, 8, 400, 16], 8, 2, 1, 8) == (0, 0, 0)


def test_the_model_counts_the_bytes_that_are_sent(model, measured):
    for one in measured["records"]:
        sent = model.volume(one["shape"], one["groups"], model.ITEM_BYTES[one["dtype"]], one["gpus"], 8)
        assert one["sent_bytes"] == sent.node_bytes


def test_times_by_hand(model):
    one = {
        **{"shape": [1, 8, 400, 16], "groups": 8, "dtype": "bfloat16", "sparsity": 0.5, "impl": "hopper"},
        **{"config": {}, "total_ms": 8.0},
    }
    links = model.Links(2, 1e9, 1e8, 1e-3, 2e-3, 3)
    packed = 32 * 100 * 16 * 2
    row = model.estimate(one, 4, links, 1e9)
    exchange = 1e3 * (packed / 2 / 1e8 + 3 * 2e-3 + 4 * packed / 1e9)
    assert row["exchange_ms"] == pytest.approx(exchange)
    assert row["attention_ms"] == 2.0
    assert row["efficiency"] == pytest.approx(2 / (2 + exchange))
    assert row["speedup"] == pytest.approx(8 / (2 + exchange))
    assert model.estimate(one, 1, links, 1e9)["efficiency"] == 1.0
    assert model.estimate(one, 3, links, 1e9)["refused"] == "3 processes do not divide 8 heads"


def test_the_stored_model_is_that_of_the_stored_measurement(model):
    stored = json.loads(STORED.read_text())
    source = json.loads((ROOT / stored["measurement"]["file"]).read_text())
    assert (stored["device"], stored["measurement"]["device"]) == ("model, no device", source["device"])
    assert stored["measurement"]["commit"] == source["commit"]
    gpus = list(dict.fromkeys(one["gpus"] for one in stored["records"]))
    assert gpus == [1, 2, 4, 8, 16, 32, 64]
    again = model.build(source, model.Links(**stored["assumptions"]), gpus)
    assert json.loads(json.dumps(again)) == stored["records"]


def test_the_table_says_what_is_model_and_what_is_measured(model):
    stored = json.loads(STORED.read_text())
    text = model.table(stored)
    assert "**Model, not a measurement**" in text
    assert "Measured is one GPU only: `benchmarks/results/gpu_operator_h200.json`" in text
    assert "device model, no device" in text
    assert text.count("\n| 64 | - | - | - | - | - | ") == 2
    row = next(one for one in stored["records"] if one["gpus"] == 8 and model.case_name(one) == "128K, 90 %")
    assert f" | {row['speedup']:.1f}x ({100 * row['efficiency']:.0f} %) | " in text
    assert f" | 448 MiB, {row['exchange_ms']:.2f} ms | " in text


def test_the_command_stores_what_it_prints(model, tmp_path, capsys):
    assert model.main(["--json", str(tmp_path / "model.json"), "--gpus", "1,8", "--node-bandwidth", "1e11"]) == 0
    stored = json.loads((tmp_path / "model.json").read_text())
    assert capsys.readouterr().out == f"{model.table(stored)}\n"
    assert stored["assumptions"]["node_bandwidth"] == 1e11
    assert {"study", "command", "commit", "versions"} <= stored.keys()


def test_a_dry_run_stores_a_complete_record(measured):
    assert {"study", "backend", "command", "commit", "device", "versions", "records"} <= measured.keys()
    assert measured["backend"] == "gloo"
    assert measured["device"].startswith("2 x ")
    assert measured["command"].startswith("torchrun --nproc-per-node 2 benchmarks/ulysses.py --device cpu")
    assert [(one["shape"], one["sparsity"]) for one in measured["records"]] == [
        ([1, 4, tokens, 16], sparsity) for tokens in (256, 130) for sparsity in (0.5, 0.9)
    ]
    for one in measured["records"]:
        assert one["bit_equal"]
        assert one["error"] <= one["error_limit"]
        assert one["speedup"] == one["single_ms"] / one["ulysses_ms"]
        assert one["efficiency"] == one["speedup"] / 2
        assert one["exchange_share"] == one["exchange_ms"] / one["ulysses_ms"]


def test_measurements_make_a_table(model, measured):
    import ulysses

    text = ulysses.table(measured)
    assert text.count("\n| 130 | 50 % | 2 | ") == 1
    assert "Measured. B 1, H 4, G 1, D 16, float32, `cpu`." in text


def test_ulysses_needs_processes(model, monkeypatch, tmp_path, capsys):
    import ulysses

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        ulysses.main(["--json", str(tmp_path / "x.json")])
    assert "start it with torchrun --nproc-per-node N, N at least 2" in capsys.readouterr().err
