"""Which library versions the integrations run with: installs each beside the environment and runs their tests there.

`python benchmarks/compatibility.py --json FILE` goes through `ENVIRONMENTS`; each is a folder of packages that stands
before the installed ones on the path, so nothing of the environment changes. Ends with 1 if any test failed.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cuda_stand_ins
import torch
from tables import block

from baatt.lab.records import RecordFile, provenance
from baatt.lab.tables import MISSING, Record

ROOT = Path(__file__).resolve().parents[1]
TESTS = Path("tests/integrations")
LIBRARIES = ("torch", "transformers", "diffusers", "accelerate")


class Environment(NamedTuple):
    """packages: put before what is installed; tests: files that run there."""

    packages: tuple[str, ...]
    tests: tuple[str, ...]


HOOKS = (
    "test_enable.py",
    "test_llada.py",
    "test_remote_sdpa.py",
    "test_sdpa.py",
    "test_masks.py",
    "test_counts.py",
    "test_transformers.py",
)
#: Those of HOOKS that meet transformers; the others are the same beside every version of it.
TRANSFORMERS = ("test_enable.py", "test_transformers.py")
VIDEO = ("test_clients.py", "test_diffusers.py", "test_llada2_pipeline.py", "test_video.py", "test_vllm_omni.py")
ENVIRONMENTS = {
    "installed": Environment((), HOOKS + VIDEO),
    # With the newest versions of what they depend on that their metadata allows.
    "transformers 5.17": Environment(
        ("transformers==5.17.0", "huggingface-hub==1.33.0", "httpx==0.28.1", "httpcore==1.0.9"), TRANSFORMERS
    ),
    "transformers 4.57": Environment(
        ("transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2"), TRANSFORMERS
    ),
    # Gluon is experimental: each release renames some of it. Compiled for sm_90a, nothing runs.
    "triton 3.8": Environment(("triton==3.8.0",), ("../kernels/test_hopper.py", "../kernels/test_hopper_clusters.py")),
    # What pyproject.toml declares as the oldest; without transformers' own models, which had no interface then.
    "oldest": Environment(
        ("torch==2.6.0", "transformers==4.46.3", "huggingface-hub==0.26.5", "tokenizers==0.20.3", "accelerate==1.1.1"),
        ("../test_attention.py", "../test_operators.py", *HOOKS[1:4], "test_programs.py"),
    ),
}  # fmt: skip


def install(packages: Sequence[str], folder: Path) -> None:
    """Put packages, without what they depend on, into a folder."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
    ]
    subprocess.run([*command, "--target", str(folder), *packages], check=True)
    if (folder / "torch").is_dir():
        cuda_stand_ins.build(folder / "torch/lib")
        (folder / "triton").mkdir()  # hides the installed one, which is that of another torch
        (folder / "triton/__init__.py").write_text("raise ModuleNotFoundError('No module named triton', name='triton')")


def run(environment: Environment, folder: Path) -> dict[str, Any]:
    """Run the tests of an environment; counts by file, and the versions that were imported."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = os.environ | {"PYTHONPATH": path}
    show = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    listed = subprocess.run(
        [sys.executable, "-c", show, *LIBRARIES], env=variables, capture_output=True, text=True, check=True
    )
    results = folder / "results.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *("-n", "2", "--dist", "loadfile"),
        f"--junitxml={results}",
        *(str(TESTS / one) for one in environment.tests),
    ]
    finished = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    sys.stdout.write(finished.stdout[-3000:] if finished.returncode else "")
    return {"libraries": json.loads(listed.stdout), "files": counts(results), "ok": finished.returncode == 0}


def counts(results: Path) -> dict[str, dict[str, int]]:
    """Tests that passed, were skipped and failed, by file."""
    found: dict[str, dict[str, int]] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        # A file that is skipped as a whole has no class, but its own name.
        name = (case.attrib["classname"] or case.attrib["name"]).split(".")[-1]
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        row = found.setdefault(name, {"passed": 0, "skipped": 0, "failed": 0})
        row["failed" if outcome in ("failure", "error") else outcome] += 1
    return found


def table(record: Record) -> str:
    """A row per library and per test file, a column per environment."""
    columns = record["records"]

    def outcome(one: Record, name: str) -> str:
        if name not in one["files"]:
            return MISSING
        row = one["files"][name]
        skipped = f", {row['skipped']} skipped" if row["skipped"] else ""
        return f"{row['passed']} passed{skipped}" + (f", **{row['failed']} failed**" if row["failed"] else "")

    rows = [[name, *(one["libraries"][name] for one in columns)] for name in columns[0]["libraries"]]
    for name in dict.fromkeys(name for one in columns for name in one["files"]):
        rows.append([f"`{name}.py`", *(outcome(one, name) for one in columns)])
    caption = "Tests are skipped where a version lacks the model or the feature they are about. `-`: not run there."
    return block(record, ["", *(one["environment"] for one in columns)], rows, caption)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(ENVIRONMENTS), nargs="+", default=list(ENVIRONMENTS))
    parser.add_argument("--json", type=Path, help="where the counts are stored")
    arguments = parser.parse_args(argv)
    command = shlex.join(["python", "benchmarks/compatibility.py", *(sys.argv[1:] if argv is None else argv)])
    header = {"study": "compatibility of the integrations", **provenance(command, torch.device("cpu"))}
    report = RecordFile(arguments.json, header)
    for name in arguments.only:
        environment = ENVIRONMENTS[name]
        with tempfile.TemporaryDirectory() as folder:
            if environment.packages:
                install(environment.packages, Path(folder))
            report.add(one := {"environment": name, **run(environment, Path(folder))})
        passed, failed = (sum(row[outcome] for row in one["files"].values()) for outcome in ("passed", "failed"))
        sys.stdout.write(f"{name}: {passed} passed, {failed} failed, {one['libraries']}\n")
        sys.stdout.flush()
    return 0 if all(one["ok"] for one in report.records) else 1


if __name__ == "__main__":
    sys.exit(main())
