"""benchmarks/end_to_end.py with tiny models on the CPU in place of its own: what it stores, prints and refuses."""

import importlib.util
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")
LLADA = {
    "d_model": 32, "n_heads": 2, "n_layers": 3, "mlp_hidden_size": 48, "vocab_size": 100, "mask_token_id": 99,
}  # fmt: skip
LLAMA = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
WAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "out_channels": 16, "text_dim": 12,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 3,
}  # fmt: skip
HUNYUAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 1, "text_embed_dim": 12,
    "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("end_to_end", FOLDER / "end_to_end.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "end_to_end", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ENOUGH", 0.0)
    monkeypatch.setattr(module, "ENOUGH_OF_ANSWERS", 0.0)
    case, cpu = module.Case, {"against": ("flash", "math")}
    tiny = {
        "llada": case("llada", LLADA, {"n_layers": 2}, (600,), (0.5, 0.9), **cpu),
        "answer": case("llada", LLADA, {"n_layers": 2}, (600,), (0.5,), ("flash",), answer=64),
        "llama": case("decoder", LLAMA, {"num_hidden_layers": 2}, (600,), (0.5,), **cpu),
        "wan": case("wan", WAN, {"num_layers": 2}, (5, 16, 24), (0.5,), **cpu),
        "hunyuan": case("hunyuan", HUNYUAN, {"num_layers": 1}, (5, 16, 24), (0.5,), **cpu),
    }
    monkeypatch.setattr(module, "CASES", module.CASES | tiny)
    return module


@pytest.mark.parametrize(
    ("name", "tokens", "layers"), [("llada", 600, 3), ("llama", 600, 3), ("wan", 480, 3), ("hunyuan", 736, 3)]
)
def test_every_layer_is_dense_and_then_sparse(bench, name, tokens, layers):
    if name in ("wan", "hunyuan"):
        pytest.importorskip("diffusers")
    record = bench.measure(bench.CASES[name], CPU, torch.float32)
    assert record["tokens"] == tokens
    assert record["refused"] == {}
    assert set(record["seconds"]) == {"flash", "math", *record["speedup"]}
    assert record["calls"]["0.5"]["sparse"] == layers
    assert record["calls"]["0.5"]["dense"] == {}
    assert 0.3 < record["skipped"]["0.5"] < 0.6
    share = record["attention_share"][record["fastest"]]  # of a tiny model, timed at another moment than the whole
    assert record["bound"]["0.5"] == 1 / (1 - 0.5 * share) != 1
    assert record["error"] <= record["error_limit"] < 1e-4
    assert json.loads(json.dumps(record))["seconds"] == record["seconds"]


def test_an_answer_counts_whole_passes(bench):
    record = bench.measure(bench.CASES["answer"], CPU, torch.float32)
    calls = record["calls"]["0.5"]
    assert calls["sparse"] == 2 * 3  # two blocks of 32 tokens, three layers
    assert calls["dense"] == {"too few queries over more keys to be worth it": 62 * 3}
    assert record["rounds"] == 3


def test_dense_attention_slows_nothing_else(bench):
    """A mode would see every operation, which in a short step costs more than its attention."""
    with bench.densely("flash") as counted:
        assert not torch.overrides._len_torch_function_stack()
        x = torch.randn(1, 2, 300, 16)
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        torch.nn.functional.scaled_dot_product_attention(x[:, :, :10], x, x)
    assert counted.calls == 1
    torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert counted.calls == 1


def test_the_model_of_a_case_is_gone_before_the_next_peak(bench):
    client = bench.build(bench.CASES["llada"], CPU, torch.float32, few=True)
    model = weakref.ref(client.model)
    client.model.cycle = [client.model.forward]
    del client
    assert model() is not None
    bench.free(CPU)
    assert model() is None


def test_a_result_that_differs_is_not_timed(bench, monkeypatch):
    from baatt.integrations import handle

    real = handle.ba_attention
    monkeypatch.setattr(handle, "ba_attention", lambda *given, **options: 1.01 * real(*given, **options))
    with pytest.raises(RuntimeError, match="sparsity 0 must be within a relative error"):
        bench.measure(bench.CASES["llada"], CPU, torch.float32)


def test_a_backend_that_refuses_is_told(bench, monkeypatch):
    real = bench.sdpa_kernel

    def refuse(backend):
        if backend is bench.BACKENDS["math"]:
            raise RuntimeError("no kernel\nand more")
        return real(backend)

    monkeypatch.setattr(bench, "sdpa_kernel", refuse)
    monkeypatch.setattr(bench, "verified", lambda client: (0.0, 1.0))
    record = bench.measure(bench.CASES["llada"], CPU, torch.float32)
    assert record["refused"] == {"math": "RuntimeError: no kernel"}
    assert record["fastest"] == "flash"


def test_the_bound_is_amdahls(bench):
    counts = type("Counts", (), {"calls": 4, "sparse_calls": 4, "reasons": {}, "sparsity": 0.75})
    found = {
        "cudnn": [bench.Evaluation(seconds, 10, counts) for seconds in (2.0, 2.0, 9.0)],
        "flash": [bench.Evaluation(3.0, 10, counts)], "0.75": [bench.Evaluation(1.0, 9, counts)],
    }  # fmt: skip
    record = bench.record_of(bench.CASES["llada"], bench.Examined({"cudnn": 0.4, "flash": 0.6}, {}, 0.0, 1.0), found)
    assert record["attention_share"] == pytest.approx({"cudnn": 0.8, "flash": 0.8})
    assert record["fastest"] == "cudnn"
    assert record["speedup"] == {"0.75": 2.0}
    assert record["bound"]["0.75"] == pytest.approx(1 / (1 - 0.6))


def test_the_command_keeps_what_it_measured(bench, tmp_path, capsys, monkeypatch):
    path = tmp_path / "record.json"
    monkeypatch.setitem(bench.CASES, "broken", bench.CASES["llada"]._replace(against=("cudnn",)))
    monkeypatch.setattr(bench, "BARS", {"llada": (0.9, 1000)})
    assert bench.main(["--json", str(path), "--device", "cpu", "--cases", "broken,llada"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("broken: FAILED, RuntimeError: no dense attention ran")
    assert printed[1].startswith("llada (600 tokens): flash")
    assert printed[2].startswith("llada at 90 %: at least 1000x, ")
    assert printed[2].endswith(": missed")
    stored = json.loads(path.read_text())
    assert [one["case"] for one in stored["records"]] == ["llada"]
    assert "| `llada` | 600 |" in bench.table([stored])
    assert bench.main(["--json", str(path), "--device", "cpu", "--cases", "llada", "--seconds", "-1"]) == 1
    assert "llada: left out" in capsys.readouterr().out


def test_a_case_measured_again_replaces_its_row(bench):
    rest = json.loads((FOLDER / "results/end_to_end_rest_h200.json").read_text())
    (again,) = [one | {"rounds": 77} for one in rest["records"] if one["case"] == "llada-8b-4K"]
    rows = [row for row in bench.table([rest, rest | {"records": [again]}]).splitlines() if row.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [
        "llada-8b-4K", "llada-8b-answer-32K", "wan-1.3b-720p", "wan-14b-480p", "llama-8b-128K",
    ]  # fmt: skip
    assert [row.endswith("| 77 |") for row in rows] == [True, False, False, False, False]


def test_published_sizes(bench):
    assert {name: bench.tokens_of(bench.CASES[name]) for name in ("wan-1.3b-480p", "wan-14b-720p", "hunyuan-720p")} == {
        "wan-1.3b-480p": 32760, "wan-14b-720p": 75600, "hunyuan-720p": 119056,
    }  # fmt: skip
    expected = {
        "llada-8b-32K": 8.0,
        "llama-8b-32K": 8.0,
        "wan-1.3b-480p": 1.4,
        "wan-14b-480p": 14.3,
        "hunyuan-720p": 12.8,
    }
    meta = torch.device("meta")
    for name, billions in expected.items():
        if name.startswith(("wan", "hunyuan")):
            pytest.importorskip("diffusers")
        found = bench.parameters(bench.build(bench.CASES[name], meta, torch.bfloat16, few=False))
        assert found / 1e9 == pytest.approx(billions, abs=0.1)


def test_wrong_calls(bench, tmp_path, capsys):
    wrong = [["--cases", "x"], ["--json", str(tmp_path / "no/where.json")]]
    messages = ["--cases must be of", "must lie in an existing folder"]
    if not torch.cuda.is_available():
        wrong, messages = [*wrong, []], [*messages, "a GPU is needed"]
    for options, message in zip(wrong, messages, strict=True):
        with pytest.raises(SystemExit):
            bench.main(["--json", str(tmp_path / "record.json"), *options])
        assert message in capsys.readouterr().err


def test_it_stays_on_so_many_cores(bench, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda _: {7, 3, 5})
    monkeypatch.setattr(bench.os, "sched_setaffinity", lambda _, cores: chosen.append(cores))
    options = ["--device", "cpu", "--json", str(tmp_path / "found.json"), "--cases", "llada", "--seconds", "-1"]
    assert bench.main([*options, "--cores", "2"]) == 1  # the case is left out
    assert chosen == [[3, 5]]
    with pytest.raises(SystemExit):
        bench.main([*options, "--cores", "0"])
