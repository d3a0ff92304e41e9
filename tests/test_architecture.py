"""The rules of docs/design.md that a machine can check: which way imports point, what importing does, sizes, names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import baatt

PACKAGE = Path(baatt.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
#: Folder or file -> the parts of baatt it may import, besides itself. What is not listed may import nothing of baatt.
ALLOWED = {
    "__main__": {"cli"},
    "types": set(),
    "config": {"stages"},
    "plan": {"config", "types"},
    "stages": {"types"},
    "kernels": {"types"},
    "checks": {"config", "plan", "types"},
    "backend": {"config", "stages", "kernels", "types"},
    "attention": {"backend", "checks", "config", "plan", "stages", "types"},
    "operators": {"attention", "config"},
    "distributed": {"attention", "config", "types"},
    "analysis": {"lab", "attention", "backend", "config", "kernels", "plan", "stages", "types"},
    "models": {"attention", "config", "stages", "types"},
    "integrations": {"attention", "backend", "config", "stages", "types", "models"},
    "sampling": {"attention", "config", "stages", "types", "models", "integrations"},
    "evaluation": {"attention", "config", "stages", "types", "models", "integrations", "sampling", "assets", "lab"},
    "lab": {
        *("analysis", "assets", "attention", "backend", "config", "distributed", "evaluation", "integrations"),
        *("models", "plan", "sampling", "stages", "types"),
    },
    "assets": set(),
    "llada_v": {"attention", "config", "lab", "models", "sampling", "types"},
    "cli": {
        *("analysis", "assets", "attention", "backend", "config", "distributed"),
        *("evaluation", "integrations", "lab", "models", "plan", "sampling", "stages", "types"),
    },
}
HEAVY = {"triton", "transformers", "diffusers", "matplotlib"}


def part_of(name: str) -> str:
    """First part of a dotted name inside baatt: baatt.stages.sorting -> stages."""
    return name.removeprefix("baatt").strip(".").split(".")[0]


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Every dotted name a file imports, relative ones resolved, with its line."""
    package = ["baatt", *path.relative_to(PACKAGE).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from baatt import stages` imports a part, `from baatt.stages import x` one of its names.
            found += [(f"{module}.{alias.name}" if module == "baatt" else module, node.lineno) for alias in node.names]
    return found


def home_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def public_names() -> set[str]:
    return {f"baatt.{name}" for name in baatt.__all__}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    home = home_of(path)
    if home == "__init__":
        return
    for name, line in imports_of(path):
        if not name.startswith("baatt"):
            continue
        part = "attention" if name in public_names() or name == "baatt" else part_of(name)
        assert home in ALLOWED, f"{home} is not a room of docs/design.md: give it a line in ALLOWED"
        assert part == home or part in ALLOWED[home], f"{path}:{line}: {home} must not import {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "stages").glob("*.py")), ids=lambda path: path.name)
def test_stages_do_not_import_one_another(path):
    assert not [name for name, _ in imports_of(path) if name.startswith("baatt.stages")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_foreign_models_are_imported_in_their_adapters_only(path):
    foreign = [name for name, _ in imports_of(path) if name.split(".")[0] in {"transformers", "diffusers"}]
    adapters = ("integrations", "evaluation", "llada_v")
    assert not foreign or home_of(path) in adapters, f"{path} imports {foreign}"


def test_importing_is_light_and_does_nothing():
    code = (
        "import sys, torch, einops; before = set(sys.modules); import baatt; "
        "from baatt.kernels import cpu_native; assert cpu_native._library.cache_info().currsize == 0; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert not HEAVY & set(run.stdout.split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_small_and_named_by_what_they_do(path):
    assert path.stem not in {"utils", "util", "common", "misc", "helpers"}
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_library_does_not_assert_or_print(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}: raise an error instead"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and home_of(path) != "cli":
            assert node.func.id != "print", f"{path}:{node.lineno}: log instead"


def test_attention_holds_no_tensor_arithmetic():
    """attention.py reads as the algorithm: no arithmetic operator and no method of a tensor that computes."""
    tree = ast.parse((PACKAGE / "attention.py").read_text())
    arithmetic = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp)]
    lines = {ast.unparse(node) for node in arithmetic}
    assert lines <= {"Tensor | None", "float | None", "1 / math.sqrt(q.shape[-1])"}
