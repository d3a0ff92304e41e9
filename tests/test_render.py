"""The tables in the Markdown files are those of the stored results."""

import functools
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from baatt.lab.records import stored_text

ROOT = Path(__file__).resolve().parents[1]
NAME = "needles_dense_h200"
BLOCK = f"<!-- render:{NAME} -->\n<!-- /render -->"


def load_script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as `python benchmarks/render.py` has it
    spec = importlib.util.spec_from_file_location("render", ROOT / "benchmarks/render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["render"] = module
    spec.loader.exec_module(module)
    return module


render = load_script()
registry = sys.modules["registry"]


@pytest.fixture
def copy(tmp_path):
    """A repository of one result and a README with one block, not rendered yet."""
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    shutil.copy(ROOT / f"benchmarks/results/{NAME}.json", results)
    (tmp_path / "README.md").write_text(f"before\n{BLOCK}\nafter\n")
    return tmp_path


def test_render_then_check(copy):
    assert render.main(["--check"], copy) == 1
    assert render.main([], copy) == 0
    text = (copy / "README.md").read_text()
    assert text.startswith("before\n<!-- render:")
    assert text.endswith("<!-- /render -->\nafter\n")
    assert render.main(["--check"], copy) == 0
    render.main([], copy)
    assert (copy / "README.md").read_text() == text


def test_rendered_numbers_are_those_of_the_file(copy):
    render.main([], copy)
    text = (copy / "README.md").read_text()
    stored = json.loads((copy / f"benchmarks/results/{NAME}.json").read_text())
    assert len(stored["records"]) == 32
    for one in stored["records"]:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{one['task']}` "))
        column = 2 + [512, 1024, 2048, 4096].index(one["length"])
        low, high = 100 * one["ci_low"], 100 * one["ci_high"]
        assert row.split("|")[column].strip() == f"{100 * one['accuracy']:.1f} [{low:.1f}-{high:.1f}]"
    assert "| task | 512 | 1024 | 2048 | 4096 |" in text
    assert "n = 200 samples" in text
    assert stored["command"] in text
    assert f"Commit {stored['commit'][:10]}, device NVIDIA H200, python 3." in text


def test_stale_text_is_detected_and_left_alone(copy, capsys):
    render.main([], copy)
    path = copy / "README.md"
    stale = path.read_text().replace("98.0 [", "99.0 [")
    assert stale != path.read_text()
    path.write_text(stale)
    assert render.main(["--check"], copy) == 1
    assert "README.md: out of date" in capsys.readouterr().err
    assert path.read_text() == stale


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- render:nothing -->\n<!-- /render -->", "render:nothing is unknown"),
        (f"<!-- render:{NAME} -->\n", "needs its own"),
        (f"{BLOCK}\n<!-- /render -->", "needs its own"),
        (f"<!-- render:{NAME} -->\n{BLOCK}", "needs its own"),
    ],
)
def test_broken_blocks_are_named(copy, capsys, text, message):
    (copy / "README.md").write_text(text)
    assert render.main([], copy) == 1
    error = capsys.readouterr().err
    assert error.startswith("README.md: ")
    assert message in error
    assert (copy / "README.md").read_text() == text


def test_missing_result_is_an_error(copy, capsys):
    (copy / f"benchmarks/results/{NAME}.json").unlink()
    assert render.main(["--check"], copy) == 1
    assert f"README.md: render:{NAME} needs benchmarks/results/{NAME}.json" in capsys.readouterr().err


def test_settings_table(copy):
    """One row per setting and length, a dash where a task was not measured."""
    stored = json.loads((copy / f"benchmarks/results/{NAME}.json").read_text())
    first, second = stored["records"][:2]
    stored["records"] = [first, second, first | {"setting": "sort=none", "accuracy": 0.5, "n": 10}]
    (copy / "benchmarks/results/needles_sparse_cpu.json").write_text(json.dumps(stored))
    (copy / "README.md").write_text("<!-- render:demo_settings -->\n<!-- /render -->\n")
    assert render.main([], copy) == 0
    text = (copy / "README.md").read_text()
    assert "| setting | length | `niah_single_1` | `niah_single_2` |" in text
    assert "| `dense` | 4096 | 100.0 [98.1-100.0] n=200 | 100.0 [98.1-100.0] n=200 |" in text
    assert "| `sort=none` | 4096 | 50.0 [98.1-100.0] n=10 | - |" in text


def test_settings_by_task(copy):
    """One row per task, one column per setting; a cell the run did not reach is a dash, and the caption says why."""
    stored = json.loads((copy / f"benchmarks/results/{NAME}.json").read_text())
    first, second = stored["records"][:2]
    stored["records"] = [first, second, first | {"setting": "sort=qk", "accuracy": 0.5, "trained_format": 0.25}]
    stored["command"] = "python training/evaluate.py --settings dense sort=qk sort=q --count 200"
    path = copy / "benchmarks/results/needles_sparse_h200.json"
    path.write_text(json.dumps(stored))
    (copy / "README.md").write_text("<!-- render:needles_sparse_h200 -->\n<!-- /render -->\n")
    assert render.main([], copy) == 0
    text = (copy / "README.md").read_text()
    assert "| task | `dense` | `sort=qk` |" in text
    assert "| `niah_single_1` | 100.0 [98.1-100.0]; 100.0 | 50.0 [98.1-100.0]; 25.0 |" in text
    assert "| `niah_single_2` | 100.0 [98.1-100.0]; 100.0 | - |" in text
    assert f"n = 200 samples per cell (seed {stored['seed']}), 4096 tokens" in text
    assert (
        "`-`: not measured, the run was cut by its time limit before this cell and never began with `sort=q`." in text
    )
    stored["records"] = [first, first | {"setting": "sort=qk", "accuracy": 0.5}]
    path.write_text(json.dumps(stored))
    assert render.main([], copy) == 0
    assert "time limit" not in (copy / "README.md").read_text()


def test_settings_by_task_are_of_one_length(copy, capsys):
    shutil.copy(copy / f"benchmarks/results/{NAME}.json", copy / "benchmarks/results/needles_sparse_h200.json")
    (copy / "README.md").write_text("<!-- render:needles_sparse_h200 -->\n<!-- /render -->\n")
    assert render.main([], copy) == 1
    assert "is of one length, got [512, 1024, 2048, 4096]" in capsys.readouterr().err


def test_two_measurements_of_one_cell_are_refused(copy, capsys):
    path = copy / f"benchmarks/results/{NAME}.json"
    stored = json.loads(path.read_text())
    stored["records"].append(stored["records"][0])
    path.write_text(json.dumps(stored))
    assert render.main([], copy) == 1
    assert "two measurements" in capsys.readouterr().err


def test_every_block_of_the_repository_is_current(capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().err


def gpu_record(what, tokens, sparsity, heads=32, channels=128, **changes):
    """A made-up record of `baatt bench`."""
    record = {
        "what": what, "impl": "hopper", "shape": [1, heads, tokens, channels], "groups": heads, "dtype": "bfloat16",
        "sparsity": sparsity, "total_ms": 12.345, "kept_tflops": 500.0, "selection_share": 0.123,
        "compensation_cost": 0.01,
        "speedup": {"cudnn": 1.5, "flash": 2.25}, "refused": {"flex": "no compiler"}, "peak_memory_bytes": 3 * 2**30,
        "error": 0.002, "error_limit": 0.005, "config": {"sort": "qk", "segment": 1024, "score": "covariance"},
    }  # fmt: skip
    return record | changes


def test_gpu_tables(copy):
    clusters = {"score": "clusters", "representatives": 8, "block_size": 128, "budget": "head"}
    records = [
        gpu_record("kernel", 32768, 0.5, channels=64),
        gpu_record("operator", 32768, 0.5),
        gpu_record("operator", 2**20, 0.9, heads=8, speedup={}, refused={}, peak_memory_bytes=None),
    ]
    uneven = gpu_record("operator", 32768, 0.9, config=clusters, stage_ms={"attend": 4.0}, input_bytes=10**9)
    uneven["baseline_ms"], uneven["speedup"]["budget-row"] = {"cudnn": 18.5}, 0.95
    stored = {
        "command": "python benchmarks/gpu_bars.py", "commit": "0123456789abcdef-dirty", "device": "NVIDIA H200",
        "versions": {"torch": "2.11.0"}, "matrix_peak_tflops": 1000.0, "matrix_peak_dtype": "bfloat16",
        "memory_bandwidth": 4e12, "records": records,
    }  # fmt: skip
    (copy / "benchmarks/results/gpu_operator_h200.json").write_text(json.dumps(stored))
    slower = uneven | {"total_ms": 99.0}
    *earlier, latest = registry.OPERATORS["clusters"]
    for name, record in [*((name, slower) for name in earlier), (latest, uneven)]:
        (copy / f"benchmarks/results/{name}.json").write_text(json.dumps(stored | {"records": [record]}))
    blocks = [
        f"<!-- render:{name} -->\n<!-- /render -->"
        for name in ("gpu_operator", "gpu_kernel", "gpu_compensation", "gpu_clusters")
    ]
    (copy / "README.md").write_text("\n".join(blocks))
    assert render.main([], copy) == 0
    text = (copy / "README.md").read_text()
    assert "| 32K | 50 % | 12.3 | 12 % | 1.50x | 2.25x | - | 3.00 GiB | 2.0e-03 (5.0e-03) |" in text
    assert "| 1M (B 1, H 8, D 128, bfloat16, `hopper`) | 90 % | 12.3 | 12 % | - | - | - | - |" in text
    assert "Not run: flex: no compiler." in text
    assert "`hopper`, tokens sorted: qk in 1024. Time of the whole call" in text
    assert "| 32K | 50 % | 64 | 500 | 50 % |" in text
    assert "| 32K | 32 | 50 % | +1.0 % |" in text
    # 2 TFLOP of kept pairs and .03 of clusters at 1000 TFLOP/s.
    assert (
        "| 32K | 90 % | 8 clusters, budget of a head | 12.3 | 12 % | 18.5 | 1.50x | 2.25x | 0.95x | 2.03 | 6.07x |"
        in text
    )
    assert "| 99 |" not in text
    assert "Commit 0123456789-dirty, device NVIDIA H200" in text
    assert "The peak is 1000 TFLOP/s" in text


#: Of `baatt analyze keys`.
KEYS = {
    "layer": 5, "heaviest_key": 7, "on_first_block": 0.25, "on_heaviest": 0.2, "on_few": 0.5, "heads_on_heaviest": 1.0,
    "heaviest_norm": 0.125, "key_norm_variation": 0.1, "norm_correlation": -0.5,
}  # fmt: skip


def study_record(**changes):
    """A made-up record of `baatt analyze`."""
    record = {
        "layer": None, "score": "mean", "beta": 0.5, "sort": "qk", "segment": None, "sparsity": 0.7,
        "recall_mean": 0.75, "recall_p5": 0.5, "pairs": 12345, "correlation_largest": 0.625,
    }  # fmt: skip
    return record | changes


def test_study_tables(copy):
    about = {"model": "needle", "text": "a text", "tokens": "77", "dtype": "float32"}
    stored = {"command": "baatt analyze", "commit": None, "device": "cpu", "versions": {"torch": "2"}, "about": about}
    kinds = {
        "recall": [study_record(), study_record(score="oracle", recall_mean=1), study_record(layer=0)],
        "recall_beta": [study_record(), study_record(beta=2.0, recall_mean=0.5)],
        "bound": [study_record(layer=3, sort="none"), study_record(layer=3, segment=1024, correlation_largest=0.9)],
        "keys": [KEYS],
    }
    for name, records in kinds.items():
        (copy / f"benchmarks/results/{name}_needle-18m.json").write_text(json.dumps(stored | {"records": records}))
    (copy / "README.md").write_text("\n".join(f"<!-- render:{name} -->\n<!-- /render -->" for name in kinds))
    assert render.main([], copy) == 0
    text = (copy / "README.md").read_text()
    assert "| qk in one segment | 70 % | 0.750 (0.500) | 1.000 (0.500) |" in text
    assert "| qk in one segment | 70 % | 0.7500 | 0.5000 |" in text
    assert "| layer | unsorted | qk in 1024 |" in text
    assert "| 3 | 0.625 | 0.900 |" in text
    assert "12,345 block pairs" in text
    assert "| 5 | 25.0 % | 50.0 % | 20.0 % | 7 | 100 % | 0.12 | 0.10 | -0.50 |" in text
    assert "On `needle`, 77 tokens of a text, weights in float32" in text
    assert "the file comes from `baatt analyze capture --output needle-18m.safetensors`." in text
    about["command"] = "baatt analyze capture --model m"
    stored |= {"about": about, "records": kinds["bound"]}
    (copy / "benchmarks/results/bound_needle-18m.json").write_text(json.dumps(stored))
    assert render.main([], copy) == 0
    assert "the file comes from `baatt analyze capture --model m`." in (copy / "README.md").read_text()


def test_numbers_of_the_prose_are_those_of_the_files(copy, capsys):
    shutil.copy(ROOT / "benchmarks/results/ruler_grid_4096.json.gz", copy / "benchmarks/results")
    records = json.loads(stored_text(copy / "benchmarks/results/ruler_grid_4096.json"))["settings"]["safe"]["records"]
    share = {key: [one["accuracy"] for one in records if one["config"].get("sparsity", 0) == key] for key in (0, 0.5)}
    dense, safe = (100 * sum(found) / 11 for found in share.values())
    path = copy / "README.md"
    path.write_text(
        "It scores <!--=score safe 50% 4096-->?<!--/-->, a loss of <!--=loss safe 50% 4096-->1<!--/--> points."
    )
    assert render.main(["--check"], copy) == 1
    assert render.main([], copy) == 0
    text = path.read_text()
    assert f"scores <!--=score safe 50% 4096-->{safe:.1f}<!--/-->, a loss" in text
    assert f"loss of <!--=loss safe 50% 4096-->{dense - safe:.1f}<!--/--> points." in text
    assert render.main(["--check"], copy) == 0


def test_differences_are_of_the_samples_that_both_answered():
    read = functools.cache(lambda name: json.loads(stored_text(ROOT / f"benchmarks/results/{name}.json")))
    found = sys.modules["values"].VALUES["beyond"](read, "budget-head", "clusters", "90%", "8192", "vt")
    both = [
        next(
            one["scores"]
            for one in read(grid)["settings"][setting]["records"]
            if (one["task"], one["length"], one["config"].get("sparsity")) == ("vt", 8192, 0.9)
        )
        for setting, grid in (("budget-head", "ruler_options_8192"), ("clusters", "ruler_clusters"))
    ]
    assert [len(scores) for scores in both] == [100, 200]
    expected = sum(one - other for one, other in zip(*both, strict=False))  # of 100 samples: in percent
    assert found.startswith(f"{expected:+.1f} [")


def test_numbers_of_real_weights_are_of_the_run_that_is_named():
    record = json.loads((ROOT / "benchmarks/results/real_weights_smollm2.json").read_text())
    values = sys.modules["values"].VALUES
    beta = next(one for one in record["records"] if one["config"] and one["config"]["beta"] == 0.1)
    assert values["real_kl"](lambda _: record, "covariance", "50%", "kept", "0.1") == f"{beta['kl']:.3f}"
    dense = f"{100 * record['records'][0]['digits']:.1f}"
    assert values["real_digits"](lambda _: record, "dense") == dense


def test_numbers_of_fidelity_are_of_the_run_that_is_named():
    read = functools.cache(lambda name: json.loads(stored_text(ROOT / f"benchmarks/results/{name}.json")))
    values = sys.modules["values"].VALUES
    dense, uniform, profile = read("fidelity_profile")["records"]
    for words, one in ((["dense"], dense), (["clusters", "90%"], uniform), (["profile", "90%"], profile)):
        found = values["fidelity_digits"](read, *words), values["fidelity_numbers"](read, *words)
        assert found == (f"{100 * one['recalled']:.1f}", f"{100 * one['recalled_whole']:.1f}")
        assert values["fidelity_kl"](read, *words) == f"{one['kl']:.3f}"
    with pytest.raises(LookupError, match="fidelity_smollm2 has no clusters at 1024 tokens and 90%"):
        values["fidelity_kl"](read, "clusters", "90%", "1024")


def test_numbers_of_causal_attention():
    def one(causal, total, stages, speedup):
        return {
            "what": "operator", "config": {"score": "clusters"}, "shape": [1, 1, 4096, 1], "sparsity": 0.5,
            "causal": causal, "total_ms": total, "stage_ms": stages, "speedup": speedup,
        }  # fmt: skip

    stored = {
        "records": [
            one(1, 2.0, {"a": 1, "b": 3}, {"cudnn": 1.25}),
            one(32, 2.1, {"a": 1, "b": 2.9}, {"causal-1": 0.96}),
        ]
    }
    values = sys.modules["values"].VALUES
    assert values["operator_gain"](lambda _: stored, "4096", "50%", "cudnn", "causal") == "1.2"
    assert values["causal_blocks"](lambda _: stored, "stages") == "-2.5 to -2.5"
    assert values["causal_blocks"](lambda _: stored, "call") == "+4.2 to +4.2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!--=scores safe-->1<!--/-->", "the value scores is unknown, known are score, loss"),
        ("<!--=score safe-->1<!--/-->", "the value `score safe` cannot be made"),
        ("<!--=score safe 50% 1024-->1<!--/-->", "no grid has all tasks of safe at 1024 tokens"),
        ("<!--=real_kl mean 70% most-->1<!--/-->", "the value `real_kl mean 70% most` cannot be made"),
        ("<!--=score safe 50% 4096-->1", "needs its own `<!--/-->`"),
        ("<!--=score safe 50% 4096-->\n1<!--/-->", "needs its own `<!--/-->`"),
    ],
)
def test_broken_numbers_are_named(copy, capsys, text, message):
    for name in sys.modules["values"].GRIDS:
        text_of_grid = stored_text(ROOT / f"benchmarks/results/{name}.json")
        (copy / f"benchmarks/results/{name}.json").write_text(text_of_grid)
    (copy / "README.md").write_text(text)
    assert render.main(["--check"], copy) == 1
    assert message in capsys.readouterr().err
    assert (copy / "README.md").read_text() == text


def stored_files():
    folder = ROOT / "benchmarks/results"
    return sorted(str(path.relative_to(folder)).removesuffix(".gz") for path in folder.rglob("*.*"))


def test_large_results_are_packed():
    assert not [path for path in (ROOT / "benchmarks/results").rglob("*.json") if path.stat().st_size > 100_000]


def test_every_stored_result_belongs_to_one_case():
    stored = stored_files()
    assert sorted(result for case in registry.CASES.values() for result in case.results) == stored


def test_every_block_is_shown_and_of_one_case():
    names = [name for case in registry.CASES.values() for name in case.blocks]
    assert len(names) == len(set(names))
    text = "".join(path.read_text() for pattern in render.FILES for path in ROOT.glob(pattern))
    assert [name for name in registry.BLOCKS if f"<!-- render:{name} -->" not in text] == []


def test_every_table_is_of_a_result_or_a_picture_is_drawn_from_it():
    """Results of the case that no block shows are text, the training's, drawn, or a policy that another holds."""
    shown = {result for block in registry.BLOCKS.values() for result in block.results}
    for name, case in registry.CASES.items():
        for result in set(case.results) - shown:
            assert result.endswith((".txt", ".policy.json")) or name in ("training", "training_smollm2", "gpu_sweep"), (
                result
            )
    for name in ("gpu_sweep_h200", "fidelity_smollm2"):
        assert (ROOT / f"docs/figures/{name}.png").is_file()


def test_scripts_of_cases_exist():
    for case in registry.CASES.values():
        for word in case.command.split():
            assert not word.endswith((".py", ".sh")) or (ROOT / word).is_file(), word


def test_a_new_benchmark_is_one_entry_and_its_file(copy, monkeypatch):
    case = registry.Case(
        "something new", "python benchmarks/new.py", ("new.json",), {"new": lambda record: record["text"]}
    )
    monkeypatch.setattr(render, "BLOCKS", registry.make_blocks(registry.CASES | {"new": case}))
    (copy / "benchmarks/results/new.json").write_text('{"text": "measured"}')
    (copy / "README.md").write_text("<!-- render:new -->\n<!-- /render -->\n<!-- render:cases -->\n<!-- /render -->\n")
    assert render.main([], copy) == 0
    text = (copy / "README.md").read_text()
    assert "<!-- render:new -->\nmeasured\n<!-- /render -->" in text
    assert "- **new**: something new.  \n  `python benchmarks/new.py`  \n  Results: `new.json`." in text
