"""What racecheck of compute-sanitizer found, less what it finds in every warp-specialised kernel: `hazards.py LOG`.

racecheck does not follow barriers across warps that do different things. Such a kernel begins and ends with a hand-over
that Triton writes: the first warps put numbers into shared memory, all warps meet, the others read, and all meet again
before anything is written there. And what a producer stores, a barrier in memory makes known to those that wait for it.
`hazards.py control` runs a kernel that does nothing else. Hazards between two ends of one of these are counted apart;
any other one ends with 1.
"""

import argparse
import ast
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import baatt.kernels

FIRST = re.compile(r"Race reported between (\w+) access at (\w+)\+0x\w+ in (\S+):(\d+)")
OTHER = re.compile(r"and (\w+) access at (\w+)\+0x\w+ in (\S+):(\d+) \[(\d+) hazards?\]")


#: Functions of a file whose stores and loads a barrier in memory orders.
RINGS = {"hopper_kernel.py": {"claim_tile", "claimed_tile"}, "warp_parts.py": {"put", "take"}}


def kind_of(file: str, number: int, folders: Sequence[Path]) -> str:
    """Which of the two a line belongs to; nothing, where it is neither's or the file is not there."""
    path = next((path for folder in folders if (path := folder / file).is_file()), None)
    if path is None:
        return ""
    text = path.read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    inside = [node for node in functions if node.lineno <= number <= (node.end_lineno or 0)]
    if any(node.name in RINGS.get(file, ()) for node in inside):
        return "ring"
    line = text.splitlines()[number - 1]
    return "hand-over" if "gl.warp_specialize(" in line or any(node.lineno == number for node in inside) else ""


def read(text: str, folders: Sequence[Path]) -> tuple[Counter[str], list[str]]:
    """Numbers of hazards by kernel and kind, and the lines of all others."""
    apart, others, first = Counter[str](), list[str](), None
    for line in text.splitlines():
        if found := FIRST.search(line):
            first = (found[2], found[3], int(found[4]))
        elif (found := OTHER.search(line)) and first is not None:
            ends = first, (found[2], found[3], int(found[4]))
            kinds = {kind_of(file, number, folders) for _, file, number in ends}
            if len(kinds) == 1 and "" not in kinds:
                apart[f"{first[0]}, {kinds.pop()}"] += int(found[5])
            else:
                others.append(f"{first[0]} {first[1]}:{first[2]} and {found[3]}:{found[4]}, {found[5]} hazards")
        elif "hazard" in line and "SUMMARY" not in line:
            others.append(line.strip())  # in words that are not known here
    return apart, others


def control() -> None:
    """Sums by `warp_parts.parts_kernel`, on a GPU of sm_90."""
    import torch
    import warp_parts

    out = torch.zeros(264, 2, dtype=torch.int32, device="cuda")
    warp_parts.parts_kernel[(len(out),)](out, 50, num_warps=4)
    if not bool((out == 49 * 50 // 2).all()):
        raise RuntimeError(f"all sums must be 1225, got {out.unique().tolist()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 where something else was found, or nothing was checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", help="file that racecheck wrote, or `control`: run the kernel that does nothing")
    arguments = parser.parse_args(argv)
    if arguments.log == "control":
        control()
        return 0
    text = Path(arguments.log).read_text(encoding="utf-8", errors="replace")
    apart, others = read(text, [Path(baatt.kernels.__file__).parent, Path(__file__).parent])
    for kernel, count in sorted(apart.items()):
        sys.stdout.write(f"{kernel}: {count} hazards\n")
    for line in others:
        sys.stdout.write(f"HAZARD {line}\n")
    checked = "SUMMARY" in text
    sys.stdout.write(f"{len(others)} other hazards{'' if checked else '; racecheck did not end'}\n")
    return 0 if checked and not others else 1


if __name__ == "__main__":
    sys.exit(main())
