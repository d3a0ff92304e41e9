"""Empty CUDA libraries, so that a torch built for CUDA imports on a machine that has none.

Old versions of torch come from the package registry only as CUDA builds, which bring gigabytes of NVIDIA's libraries
and do not import without them. On a CPU no function of theirs is called but to ask for devices: each one here returns
error 100, "no device". In: the folder torch/lib. Out: the missing libraries, built there by gcc.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

LIBRARIES = re.compile(r"lib(cu|nv|nccl)\w*\.so\.\d+")
FUNCTIONS = re.compile(r"(cu|nv|nccl)\w*")
#: Where functions without a version go: it is loaded first.
FIRST = "libcudart.so.12"


def output(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def missing(folder: Path) -> dict[str, list[tuple[str, bool]]]:
    """Of every library that is needed and not there, the functions asked of it and whether by a version."""
    files = [str(file) for file in folder.glob("*.so*")]
    defined = {line.split()[-1].split("@")[0] for line in output("nm", "-DA", "--defined-only", *files).splitlines()}
    needed = {name for file in files for name in re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", file))}
    found: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for name in needed:
        if LIBRARIES.fullmatch(name) and not (folder / name).exists():
            found[name] = []
    for symbol in sorted({line.split()[-1] for line in output("nm", "-DA", "--undefined-only", *files).splitlines()}):
        name, _, version = symbol.partition("@")
        library = version.strip("@") or (FIRST if FUNCTIONS.fullmatch(name) else "")
        if library in found and name not in defined:
            found[library].append((name, bool(version)))
    return found


def build(folder: Path) -> None:
    """Put a stand-in for every missing library into torch/lib."""
    for library, functions in missing(folder).items():
        with tempfile.TemporaryDirectory() as place:
            source, versions = Path(place) / "source.c", Path(place) / "versions.map"
            source.write_text("".join(f"long {name}(void) {{ return 100; }}\n" for name, _ in functions))
            versioned = [f"{name};" for name, is_versioned in functions if is_versioned]
            versions.write_text(f"{library} {{ global: {' '.join(versioned)} }};")
            options = [f"-Wl,-soname,{library}", *([f"-Wl,--version-script={versions}"] if versioned else [])]
            output("gcc", "-w", "-shared", "-fPIC", "-fno-builtin", *options, "-o", str(folder / library), str(source))
