"""The rules of docs/design.md that a machine can check: which way imports point, what importing does, sizes, names.

Every rule is one test that lists all offenders. Imports count wherever they stand: at the top, in a function, or for
type checking only.
"""

import ast
import functools
import graphlib
from pathlib import Path
from typing import NamedTuple

import baatt
from tests.processes import run_code

PACKAGE = Path(baatt.__file__).parent
FILES = {
    ".".join(("baatt", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
#: Rooms from the lowest floor up. A room may import what is below it, nothing above it and nothing beside it.
FLOORS = (
    {"types"},
    {"assets", "kernels", "stages"},
    {"scores"},
    {"config"},
    {"plan"},
    {"backend", "checks"},
    {"attention"},
    {"distributed", "models", "operators"},
    {"integrations", "sampling"},
    {"__init__"},
    {"lab"},
    {"llada_v"},
    {"cli"},
    {"__main__"},
)
#: Arrows between rooms or files that still offend. Nothing may be added.
OFFENDING: set[str] = set()
HEAVY = {"triton", "transformers", "diffusers", "matplotlib"}


class Import(NamedTuple):
    """A name that a file imports: dotted, relative ones resolved, and the line."""

    file: str
    name: str
    line: int


@functools.cache
def imports() -> list[Import]:
    """Of every file of the package."""
    return [found for name, path in FILES.items() for found in imports_of(name, path)]


def imports_of(file: str, path: Path) -> list[Import]:
    package = file.split(".") if path.stem == "__init__" else file.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [Import(file, alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [Import(file, f"{module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def source_of(name: str) -> str:
    """The file of the package in which an imported name is: of a public one where it is written, not `__init__`."""
    head, _, tail = name.rpartition(".")
    if head == "baatt" and tail in baatt.__all__:
        head = getattr(getattr(baatt, tail), "__module__", "baatt")
    return name if name in FILES else head


def room_of(file: str) -> str:
    return file.split(".")[1] if "." in file else "__init__"


def graph() -> dict[str, set[str]]:
    """File -> files of the package that it imports."""
    files = {name: set[str]() for name in FILES}
    for file, name, _ in imports():
        source = source_of(name) if name.startswith("baatt.") else file
        if source != file and f"{file} -> {source}" not in OFFENDING:
            files[file].add(source)
    return files


def test_imports_point_down():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    unknown = {room_of(file) for file in FILES} - {*floor}
    assert not unknown, f"rooms that are not in docs/design.md: give them a floor in FLOORS: {sorted(unknown)}"
    offenders = []
    for file, name, line in imports():
        if not name.startswith("baatt."):
            continue
        home, room = room_of(file), room_of(source_of(name))
        if home != room and floor[room] >= floor[home] and f"{home} -> {room}" not in OFFENDING:
            offenders.append(f"{file}:{line}: {home} must not import {name}")
    assert not offenders, "\n".join(offenders)


def test_there_is_no_circle():
    try:
        graphlib.TopologicalSorter(graph()).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from None


def test_stages_stand_alone():
    """No stage knows another one: `attention.py` puts them together."""
    offenders = [
        f"{file}:{line}: a stage must not import {name}"
        for file, name, line in imports()
        if room_of(file) == "stages" and source_of(name) != file and name.startswith("baatt.stages")
    ]
    assert not offenders, "\n".join(offenders)


def test_foreign_models_are_imported_in_their_adapters_only():
    homes = {"integrations", "lab", "llada_v"}
    offenders = [
        f"{file}:{line}: {name}"
        for file, name, line in imports()
        if name.split(".")[0] in {"transformers", "diffusers"} and room_of(file) not in homes
    ]
    assert not offenders, "\n".join(offenders)


def test_importing_is_light_and_does_nothing():
    code = (
        "import sys, torch, einops; before = set(sys.modules); import baatt; "
        "from baatt.kernels import cpu_native; assert cpu_native._library.cache_info().currsize == 0; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    run = run_code(code)
    assert run.returncode == 0, run.stderr
    assert not HEAVY & set(run.stdout.split())


def test_files_are_small_and_named_by_what_they_do():
    names = {"utils", "util", "common", "misc", "helpers"}
    sizes = {file: len(path.read_text().splitlines()) for file, path in FILES.items()}
    offenders = [f"{file} has {size} lines" for file, size in sizes.items() if size > 400]
    offenders += [f"{file} is named by nothing" for file, path in FILES.items() if path.stem in names]
    assert not offenders, "\n".join(offenders)


def test_the_library_does_not_assert_or_print():
    offenders = []
    for file, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                offenders.append(f"{file}:{node.lineno}: raise an error instead")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                offenders += [f"{file}:{node.lineno}: log instead"] * (room_of(file) != "cli")
    assert not offenders, "\n".join(offenders)


def test_attention_holds_no_tensor_arithmetic():
    """attention.py reads as the algorithm: no arithmetic operator and no method of a tensor that computes."""
    tree = ast.parse((PACKAGE / "attention.py").read_text())
    arithmetic = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp)]
    lines = {line for node in arithmetic if not (line := ast.unparse(node)).endswith(" | None")}
    assert lines <= {"1 / math.sqrt(q.shape[-1])"}
