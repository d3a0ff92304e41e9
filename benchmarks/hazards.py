"""What racecheck of compute-sanitizer found, less what it finds in every warp-specialised kernel: `hazards.py LOG`.

Such a kernel begins with a hand-over that Triton writes: the first warps put the number of a part and its arguments
into shared memory, all warps meet at a barrier, the others read, and all meet again before anything is written there.
racecheck does not follow that barrier, as a kernel shows whose parts do nothing else (`hazards.py control`). Hazards
with both ends on the lines of the hand-over, the kernel's head and its `warp_specialize`, are counted apart; any other
one ends with 1.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import baatt.kernels

FIRST = re.compile(r"Race reported between (\w+) access at (\w+)\+0x\w+ in (\S+):(\d+)")
OTHER = re.compile(r"and (\w+) access at (\w+)\+0x\w+ in (\S+):(\d+) \[(\d+) hazards?\]")


def hand_over(path: Path) -> set[int]:
    """Numbers of the lines of a file at which a kernel's head or a `warp_specialize` begins or its calls stand."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {
        number
        for number, line in enumerate(lines, 1)
        if re.search(r"def \w*kernel\(|gl\.warp_specialize\(", line) or re.search(r"@\w+\.jit", line)
    }


def read(text: str, folders: Sequence[Path]) -> tuple[Counter[str], list[str]]:
    """Hazards of the hand-over by kernel, and the lines of all others."""
    apart, others, first = Counter[str](), list[str](), None
    for line in text.splitlines():
        if found := FIRST.search(line):
            first = (found[2], found[3], int(found[4]))
        elif (found := OTHER.search(line)) and first is not None:
            ends = first, (found[2], found[3], int(found[4]))
            if all(_is_hand_over(file, number, folders) for _, file, number in ends):
                apart[first[0]] += int(found[5])
            else:
                others.append(f"{first[0]} {first[1]}:{first[2]} and {found[3]}:{found[4]}, {found[5]} hazards")
        elif "hazard" in line and "SUMMARY" not in line:
            others.append(line.strip())  # in words that are not known here
    return apart, others


def _is_hand_over(file: str, number: int, folders: Sequence[Path]) -> bool:
    return any(number in hand_over(path) for folder in folders if (path := folder / file).is_file())


def control() -> None:
    """A kernel of three parts that only say that they ran, on a GPU of sm_90."""
    import torch
    import warp_parts

    out = torch.zeros(264, 3, dtype=torch.int32, device="cuda")
    warp_parts.parts_kernel[(len(out),)](out, num_warps=4)
    if not bool((out == torch.tensor([1, 2, 3], dtype=torch.int32, device="cuda")).all()):
        raise RuntimeError("the parts of the control did not run")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 where something else than the hand-over was found, or nothing was checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", help="file that racecheck wrote, or `control`: run the kernel that does nothing")
    arguments = parser.parse_args(argv)
    if arguments.log == "control":
        control()
        return 0
    text = Path(arguments.log).read_text(encoding="utf-8", errors="replace")
    apart, others = read(text, [Path(baatt.kernels.__file__).parent, Path(__file__).parent])
    for kernel, count in sorted(apart.items()):
        sys.stdout.write(f"{kernel}: {count} hazards of Triton's hand-over between warps\n")
    for line in others:
        sys.stdout.write(f"HAZARD {line}\n")
    checked = "SUMMARY" in text
    sys.stdout.write(f"{len(others)} other hazards{'' if checked else '; racecheck did not end'}\n")
    return 0 if checked and not others else 1


if __name__ == "__main__":
    sys.exit(main())
