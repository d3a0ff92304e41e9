"""What the documents say is so: names exist, examples run, numbers are those of the files, links lead somewhere."""

import argparse
import ast
import functools
import hashlib
import importlib
import itertools
import json
import re
import subprocess
from pathlib import Path

import pytest

from baatt.lab.records import stored_text

ROOT = Path(__file__).resolve().parents[1]
CARD = "src/baatt/assets/needle-18m/README.md"
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "training/README.md", CARD),
    "src/baatt/assets/smollm2-diffusion/README.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
]
NAME = re.compile(r"`(baatt(?:\.\w+)+)`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EQUATION = re.compile(r"\| [EC]\d[ ,]")
LINK = re.compile(r"\]\(([^)#\s]+)\)")
ROOMS = ("src/", "tests/", "training/", "docs/", "benchmarks/", "examples/")
#: Examples of a signature or of what a reader might write, not meant to run.
NOT_RUN = {"docs/design.md"}
#: Made by `training/run.sh`, not tracked.
GENERATED = ("training/data", "training/runs")
#: What the preset `safe` was when it was measured, as training/evaluate.py calls it.
SAFE = "sort=k,segment=256,dense_layers=0+1"
#: The same dense layers and longer segments: better by RULER's measure, worse word for word.
LONGER = "sort=k,segment=1024,dense_layers=0+1"
PAPER = "sort=qk,segment=1024"


def read(document: str) -> str:
    return stored_text(ROOT / document)


def resolve(name: str) -> object:
    """A dotted name: as much of it as is a module is imported, the rest are attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_exist(document):
    for name in set(NAME.findall(read(document))):
        assert resolve(name) is not None, name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tests_exist(document):
    for path, test in set(TEST.findall(read(document))):
        assert (ROOT / path).is_file(), path
        assert test in functions(ROOT / path), f"{path}::{test}"


def test_method_has_a_row_for_every_equation():
    rows = [line for line in read("docs/method.md").splitlines() if EQUATION.match(line)]
    equations = [name for row in rows for name in row[2:].split(" |")[0].split(", ")]
    assert equations == [*(f"E{number}" for number in range(1, 10)), *(f"C{number}" for number in range(1, 7))]
    for row in rows:
        assert "not in this version" in row or (NAME.search(row) and TEST.search(row)), row


def test_every_row_s_test_is_about_its_function():
    """The test file of a row imports the module of the row's function."""
    for row in (line for line in read("docs/method.md").splitlines() if EQUATION.match(line)):
        modules = {name.rpartition(".")[0] for name in NAME.findall(row)}
        imports = [
            rf"from {module} import|from {room} import .*\b{file}\b"
            for module in modules
            for room, _, file in [module.rpartition(".")]
        ]
        for path, _ in TEST.findall(row):
            assert any(re.search(text, read(path)) for text in imports), f"{path}: {modules}"


@pytest.mark.parametrize(
    ("document", "number", "code"),
    [
        pytest.param(document, number, code, id=f"{document}-{number}")
        for document in DOCUMENTS
        if document not in NOT_RUN
        for number, code in enumerate(PYTHON.findall(read(document)))
    ],
)
def test_python_examples_run(document, number, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{document} example {number}", "exec"), {"__name__": "example"})


def test_readme_has_examples():
    assert len(PYTHON.findall(read("README.md"))) >= 1


def paths_of_table(text: str) -> list[str]:
    """Paths in backticks in the first column of the file map."""
    heading = re.search(r"^## Where things are\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert heading is not None, "docs/index.md needs a file map under `## Where things are`"
    rows = [line for line in heading[1].splitlines() if line.startswith("| `")]
    return [path for row in rows for path in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_the_file_map_names_existing_paths():
    paths = paths_of_table(read("docs/index.md"))
    assert len(paths) > 5
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_index_has_every_page():
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} - {"index.md"}
    assert pages <= set(LINK.findall(read("docs/index.md")))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_figure_has_a_caption(document):
    for figure in re.finditer(r"^!\[.*\n\n?(.)", read(document), re.MULTILINE):
        assert figure[1] == "*", figure[0]


def test_the_first_thirty_lines_of_readme_say_what_it_is():
    lines = read("README.md").splitlines()
    first = "\n".join(lines[:30])
    for needed in (
        "pip install",
        "scaled_dot_product_attention(q, k, v)",
        "docs/figures/",
        "<!--=frontier_gain",
        "<!--=loss",
    ):
        assert needed in first, needed
    assert len(lines) <= 150


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_backticks_exist(document):
    for path in set(re.findall(r"`([\w./-]+)`", read(document))):
        if path.startswith(ROOMS) and not path.startswith(GENERATED):
            assert (ROOT / path).exists(), path


RENDERED = re.compile(r"<!-- render:(?!cases)[\w-]+ -->.*?<!-- /render -->", re.DOTALL)
CODE = re.compile(r"^```\w*\n(?P<lines>.*?)^```|`(?P<inline>[^`]+)`", re.MULTILINE | re.DOTALL)
CALL = re.compile(r"(?:^|-m )(?P<program>baatt)\s+(?P<verb>[a-z]\w*)|(?P<script>\b(?:benchmarks|training)/\w+\.py)")


def commands(document: str) -> list[str]:
    """Calls of `baatt` and of scripts in code, but those of rendered tables: they are what ran then."""
    text = RENDERED.sub("", read(document))
    found = []
    for code in CODE.finditer(text):
        lines = (
            [" ".join(code["inline"].split())] if code["inline"] else code["lines"].replace("\\\n", " ").splitlines()
        )
        found += [line for line in lines if CALL.search(line)]
    return found


@functools.cache
def options_of_verb(verb: str) -> set[str]:
    """Every option of a verb of `baatt` and of its own verbs."""
    from baatt.cli.main import build_parser

    def options(parser: argparse.ArgumentParser) -> set[str]:
        found = set(parser._option_string_actions)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {option for each in action.choices.values() for option in options(each)}
        return found

    return options(build_parser(verb))


@pytest.mark.parametrize("document", [*(one for one in DOCUMENTS if one != "CHANGELOG.md"), "benchmarks/README.md"])
def test_commands_exist_with_their_options(document):
    from baatt.cli.main import VERBS

    for command in commands(document):
        call = CALL.search(command)
        assert call is not None
        options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", command[call.end() :]))
        if call["program"]:
            assert call["verb"] in VERBS, command
            assert options <= options_of_verb(call["verb"]), command
        elif not command.endswith(call["script"]):  # else it is a path
            assert (ROOT / call["script"]).is_file(), command
            script = read(call["script"])
            # Literally, or made from the name of a field.
            unknown = {one for one in options if f'"{one}"' not in script and one[2:].replace("-", "_") not in script}
            assert not unknown, command


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    for target in LINK.findall(read(document)):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target


def test_the_goals_of_the_model_card_are_reached():
    """With dense attention: an average of 90 over all tasks at 4096 tokens, and 95 on each needle task everywhere."""
    dense = json.loads(read("benchmarks/results/ruler_needle-18m.json"))["records"]
    assert {(one["length"], one["n"]) for one in dense} == {(length, 200) for length in (4096, 8192, 16384)}
    short = [one["accuracy"] for one in dense if one["length"] == 4096]
    assert len(short) == 11
    assert sum(short) / 11 >= 0.9
    needles = [one for one in dense if one["task"].startswith("niah_")]
    assert len(needles) == 24
    assert min(one["accuracy"] for one in needles) >= 0.95


GRIDS = ("ruler_grid_4096", "ruler_grid_long", "ruler_grid_safe_16384", "ruler_grid_finer_8192")
SHARES = (0.3, 0.5, 0.7, 0.9)
LENGTHS = (4096, 8192, 16384)


@pytest.fixture(scope="module")
def ruler():
    """Every cell of RULER's grids by setting, length, sparsity and task."""
    return {
        (name, one["length"], one["config"].get("sparsity", 0), one["task"]): one
        for file in GRIDS
        for name, setting in json.loads(read(f"benchmarks/results/{file}.json"))["settings"].items()
        for one in setting["records"]
    }


def averages(ruler):
    """Score in percent by setting, length and sparsity, where all tasks are there."""
    cells: dict[tuple[str, int, float], list[float]] = {}
    for (name, length, share, _), one in ruler.items():
        cells.setdefault((name, length, share), []).append(100 * one["accuracy"])
    means = {place: sum(found) / 11 for place, found in cells.items() if len(found) == 11}
    return {place: round(mean, 1) for place, mean in means.items()}


def test_the_grid_of_ruler_is_complete(ruler):
    """Every required way to choose blocks, length and sparsity, 200 samples of eleven tasks; only `safe` lacks some."""
    assert {one["n"] for one in ruler.values()} == {200}
    scores = averages(ruler)
    for name, length in itertools.product(("paper", "mean", "antidiagonal", "oracle"), LENGTHS):
        assert all((name, length, share) in scores for share in (0, *SHARES))
    assert ("safe", 16384, 0.5) not in scores


def test_the_order_of_the_ways_to_choose_blocks_is_that_of_the_files(ruler):
    """What page and README say of which is ahead."""
    scores = averages(ruler)
    for length, share in itertools.product(LENGTHS[:2], (0.5, 0.7)):
        cheap = ("safe", "paper", "mean", "antidiagonal")
        assert max(cheap, key=lambda name: scores[name, length, share]) == "safe"
    for length, share in itertools.product(LENGTHS, SHARES):
        assert scores["paper", length, share] < scores["mean", length, share]
        others = [name for name in ("safe", "antidiagonal", "oracle") if (name, length, share) in scores]
        assert all(scores[name, length, share] > scores["mean", length, share] for name in others)
    for share in SHARES:
        finer = scores["finer", 8192, share]
        assert scores["mean", 8192, share] < finer < scores["antidiagonal", 8192, share]


def records_of(*names):
    return [one for name in names for one in json.loads(read(f"benchmarks/results/{name}_h200.json"))["records"]]


def test_who_is_ahead_of_whom_on_the_gpu_is_that_of_the_files():
    """The counts of docs/performance.md: rows beside other libraries, and whole models above what was estimated."""
    peers = records_of("gpu_peers", "gpu_peers_64")
    gains = {(one["shape"][3], one["shape"][2], one["sparsity"]): one["speedup"] for one in peers}
    assert len(gains) == len(peers) == 16
    ahead = [128, 4096, 0.5], [128, 16384, 0.5], [128, 32768, 0.5], [128, 131072, 0.5], [128, 131072, 0.9]
    assert sorted(row for row, gain in gains.items() if gain["fa4"] < 1) == sorted(map(tuple, ahead))
    assert all(gain["cudnn-bsa"] > 1.018 for gain in gains.values())
    assert min(gain["fa4"] for gain in gains.values()) > 0.972
    parts = ("", "_more", "_rest", "_wan", "_again", "_answer_8K")
    whole = {one["case"]: one for one in records_of(*(f"end_to_end{part}" for part in parts))}.values()
    above = [gain / one["bound"][name] for one in whole if not one["answer"] for name, gain in one["speedup"].items()]
    assert (len(whole), len(above), sum(ratio > 1 for ratio in above)) == (16, 36, 15)
    assert max(above) < 1.07


@pytest.fixture(scope="module")
def sparse():
    """The record of every setting and task, each of 200 samples."""
    records = json.loads(read("benchmarks/results/needles_sparse_h200.json"))["records"]
    assert {one["n"] for one in records} == {200}
    return {(one["setting"], one["task"].removeprefix("niah_")): one for one in records}


def right(one: dict[str, float], key: str = "accuracy") -> int:
    return round(200 * one[key])


def totals(records, key):
    """Answers right of every setting, all tasks together."""
    found: dict[str, int] = {}
    for (setting, _), one in records.items():
        found[setting] = found.get(setting, 0) + right(one, key)
    return found


def test_the_best_setting_by_each_measure_is_that_of_the_file(sparse):
    """Word for word `safe` has most answers right, by RULER's measure longer segments, as docs/archive says."""
    exact, contained = (totals(sparse, key) for key in ("trained_format", "accuracy"))
    settings = exact.keys() - {"dense"}
    assert max(settings, key=lambda name: exact[name]) == SAFE
    assert max(settings, key=lambda name: contained[name]) == LONGER


def test_short_segments_are_ahead_of_no_sorting_wherever_both_were_measured(sparse):
    records = json.loads(read("benchmarks/results/needles_layers_h200.json"))["records"]
    layers = {(one["setting"], one["task"].removeprefix("niah_")): one for one in records}
    for key in ("trained_format", "accuracy"):
        exact = totals(sparse, key) | totals(layers, key)
        for dense in ("", ",dense_layers=0", ",dense_layers=0+1"):
            assert exact[f"sort=k,segment=256{dense}"] > exact[f"sort=none{dense}"]


def test_the_presets_are_measured_settings(sparse):
    from baatt.config import PRESETS, Policy
    from baatt.lab.describe import read_config
    from baatt.lab.ruler.cells import without_unread

    assert PRESETS["paper"] == (read_config(sparse[PAPER, "single_1"]["config"]), Policy())
    clusters = json.loads(read("benchmarks/results/ruler_clusters.json"))["settings"]["clusters"]
    stored = next(one for one in clusters["records"] if one["config"].get("sparsity") == 0.5)
    assert without_unread(PRESETS["default"].config) == read_config(stored["config"])
    assert list(PRESETS["default"].policy.dense_layers) == stored["dense_layers"]


def test_the_accuracies_are_those_of_the_shipped_weights():
    """All are of one checkpoint in bfloat16; what is shipped is that one in 8 bits, which loses at most 0.3 points."""
    shards = sorted((ROOT / CARD).parent.glob("*.safetensors"))
    weights = " ".join(hashlib.sha256(shard.read_bytes()).hexdigest()[:16] for shard in shards)
    shipped, dense, sparse = (
        json.loads(read(f"benchmarks/results/{name}.json"))
        for name in ("ruler_needle-18m_8bit", "ruler_needle-18m", "needles_sparse_cpu")
    )
    assert shipped["weights"] == weights
    grids = [json.loads(read(f"benchmarks/results/{name}.json")) for name in GRIDS]
    settings = [setting for grid in grids for setting in grid["settings"].values()]
    assert len({one["weights"] for one in (dense, sparse, *settings)}) == 1
    for length in (4096, 8192):
        before, after = (
            [one["accuracy"] for one in stored["records"] if one["length"] == length] for stored in (dense, shipped)
        )
        assert len(before) == len(after) == 11
        assert 100 * (sum(before) - sum(after)) / 11 <= 0.3


def test_the_model_card_names_the_sources():
    card = read(CARD)
    for source in json.loads(read("benchmarks/results/training/sources.json")):
        licence = source["licence"].replace("public-domain", "public domain")
        row = f"| {source['package']} | {source['version']} | {licence} | {source['train_bytes']:,} |"
        assert row in card, row


def test_the_model_card_s_runs_are_those_of_the_histories():
    card = read(CARD)
    folder = "benchmarks/results/training"
    rows = [json.loads(line) for line in read(f"{folder}/run1.jsonl").splitlines()]
    tokens = max(row["tokens"] for row in rows if row["seconds"] <= 812)
    assert f"{tokens / 1e9:.2f}e9 | `run1.jsonl`" in card
    for number in range(2, 9):
        run = json.loads(read(f"{folder}/run{number}.json"))
        arguments = run["arguments"]
        start = f"stage {arguments['stage']} "
        cells = f"| {arguments['seed']} | {arguments['seconds']:.0f} | {arguments['learning_rate']:.0e}"
        row = next(line for line in card.splitlines() if f"`run{number}.json`" in line)
        assert start in row
        assert cells.replace("e-0", "e-") in row
        mantissa, exponent = f"{run['tokens']:.2e}".split("e+0")
        assert float(row.split("|")[6]) == pytest.approx(float(f"{mantissa}e{exponent}"), rel=0.01)


def test_training_scripts_take_the_arguments_of_the_run():
    """Every option in run.sh and in training/README.md is one the script knows."""
    text = read("training/run.sh") + read("training/README.md")
    calls = re.findall(r"training/(\w+)\.py((?: +(?:--[\w-]+|[^\s#`]+))+)", text)
    assert {name for name, _ in calls} == {"corpus", "words", "tokenizer", "train", "evaluate"}
    for name, options in calls:
        script = read(f"training/{name}.py")
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in script, f"{name}.py {option}"
    subprocess.run(["bash", "-n", str(ROOT / "training/run.sh")], check=True)


def test_the_citation_has_the_version_of_the_package():
    import baatt

    citation = read("CITATION.cff")
    assert f"\nversion: {baatt.__version__}\n" in citation
    assert "arXiv:2605.19726" in citation
    names = ["Zhang", "Wu", "Wang", "Liu", "Dou", "Yang", "Wu", "Zhao", "Jia"]
    assert re.findall(r"family-names: (\w+)", citation) == names
    assert baatt.__version__ in read("CHANGELOG.md")


def test_the_design_page_is_short():
    assert len(read("docs/design.md").splitlines()) <= 150
