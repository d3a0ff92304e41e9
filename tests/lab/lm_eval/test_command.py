"""`python -m baatt.lab.lm_eval` from end to end: local tasks, a tiny random folder, no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.lm_eval.harness import INSTALLED, tiny_folder
from tests.processes import run_module

needs_harness = pytest.mark.skipif(not INSTALLED, reason="needs lm-evaluation-harness (the extra lm-eval)")

TASKS = {
    "tiny_generation": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
gen_prefix: "The answer is"
generation_kwargs: {until: [], max_gen_toks: 12, do_sample: false, temperature: 1}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def write_tasks(folder: Path, documents: int) -> Path:
    folder.mkdir()
    data = folder / "documents.jsonl"
    with data.open("w") as lines:
        for number in range(documents):
            choices = {"choices": ["yes", "no, never"], "label": number % 2}
            document = {"question": f"What is {number} and {number}?", "answer": str(2 * number), **choices}
            lines.write(json.dumps(document) + "\n")
    where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{where}{body}")
    return folder


def run(tmp_path: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, *launcher, "-m", "baatt.lab.lm_eval", *arguments]
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)


@needs_harness
@pytest.mark.parametrize("launcher", [(), tuple(LAUNCHER)], ids=["alone", "two processes"])
def test_from_end_to_end(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    tiny_folder(tmp_path / "tiny")
    write_tasks(tmp_path / "tasks", documents=5)
    model = "pretrained=tiny,sparsity=0.5,block_size=16,segment=16,dense_layers=0,block_length=8,mc_num=4,batch_size=2"
    done = run(
        tmp_path, "--model", "baatt_llada", "--model_args", f"{model},save_dir=answers", "--tasks",
        ",".join(TASKS), "--include_path", "tasks", "--device", "cpu", "--output_path", "out", "--log_samples",
        "--apply_chat_template", launcher=launcher,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|tiny_generation|" in done.stdout.replace(" ", "")
    [file] = (tmp_path / "out").rglob("results_*.json")
    stored = json.loads(file.read_text())
    assert set(stored["results"]) == set(TASKS)
    assert 0 <= stored["results"]["tiny_choice"]["acc,none"] <= 1
    assert stored["config"]["baatt_settings"]["sparse"]["sparsity"] == 0.5
    assert stored["config"]["baatt_settings"]["batch_size"] == 2
    assert stored["config"]["sparse_attention_calls"] > 0
    assert 0 < stored["config"]["achieved_sparsity"] < 0.5
    assert "'sparsity': 0.5" in done.stderr  # and printed
    [file] = (tmp_path / "out").rglob("samples_tiny_generation_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(sample["doc_id"] for sample in samples) == [0, 1, 2, 3, 4]
    prompts = {sample["doc_id"]: sample["arguments"]["gen_args_0"]["arg_0"] for sample in samples}
    assert prompts[3] == "<|user|>What is 3 and 3?<|endoftext|><|assistant|>The answer is"
    assert sum(len(path.read_text().splitlines()) for path in (tmp_path / "answers").iterdir()) == 15


@needs_harness
def test_an_unknown_argument_is_named(tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks", documents=1)
    done = run(
        tmp_path, "--model", "baatt_llada", "--model_args", "pretrained=tiny,parallelize=True",
        "--tasks", "tiny_choice", "--include_path", "tasks",
    )  # fmt: skip
    assert done.returncode != 0
    assert "model_args must be among pretrained, " in done.stderr
    assert "got parallelize" in done.stderr


@pytest.mark.skipif(INSTALLED, reason="lm-evaluation-harness is installed")
def test_the_missing_extra_is_named(tmp_path: Path) -> None:
    done = run_module("baatt.lab.lm_eval", "--help", folder=tmp_path)
    assert done.returncode != 0
    assert "pip install 'baatt[lm-eval]'" in done.stderr
