"""Every model class that diffusers and transformers export, tiny and random: dense, with all blocks, at 75 %, disabled.

`python benchmarks/classes.py --json FILE` goes through `ROOMS`, one file a library: `names()` lists its classes,
`build(name)` gives a `Built`, or an exception that says why it cannot. Each class has a process of its own and 60
seconds, so that one that crashes or hangs ends nothing but itself. Ends with 1 if one is not its dense self where it
must be.
"""

import argparse
import importlib
import multiprocessing
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tables import block
from torch import Tensor, nn

import baatt
from baatt import BAAttConfig, Policy
from baatt.integrations.enable import ADAPTERS, Adapter
from baatt.lab.records import RecordFile, provenance
from baatt.lab.tables import Record

ROOT = Path(__file__).resolve().parents[1]
#: Library -> the file here that knows its classes.
ROOMS = {"diffusers": "classes_diffusers", "transformers": "classes_transformers"}
SECONDS = 60
ALL_BLOCKS, QUARTER = (BAAttConfig(block_size=16, sparsity=sparsity) for sparsity in (0.0, 0.75))
#: The models are shorter than what is worth it, and than what the default policy has go sparse.
POLICY = Policy(min_queries=0)
NOT_BUILT = "not built: "
#: Greatest difference to the dense run that rounding explains, relative to its greatest value.
TOLERANCE = 1e-4


class Built(NamedTuple):
    """model: to enable, in evaluation mode; run: evaluates it, () -> its output, without gradients."""

    model: Any
    run: Callable[[], Tensor]


def measure(library: str, name: str, build: Callable[[str], Built]) -> dict[str, Any]:
    """Calls and differences of one class."""
    record: dict[str, Any] = {"library": library, "class": name, "sparse": 0, "dense": {}}
    record |= {"equal_at_0": None, "restored": None, "note": ""}
    torch.manual_seed(0)
    try:
        model, run = build(name)
        fill_zeros(model)
        dense = run()
    except Exception as error:
        return record | {"note": f"{NOT_BUILT}{in_short(error)}"}
    options: dict[str, Any] = {}
    try:
        if not any(adapter.roots(model) for adapter in adapters()):
            options, record["note"] = {"anywhere": True}, "anywhere=True"
        with baatt.enable(model, ALL_BLOCKS, POLICY, **options):
            kept = run()
        with baatt.enable(model, QUARTER, POLICY, **options) as handle:
            run()
    except Exception as error:  # whatever a model answers is the result
        record |= {"note": in_short(error)}
    else:
        record |= {"sparse": handle.sparse_calls, "dense": handle.reasons}
        record |= {"equal_at_0": float((kept - dense).abs().max() / dense.abs().max())}
    return record | {"restored": torch.equal(run(), dense)}


def adapters() -> list[Adapter]:
    """What `enable` tries of itself."""
    return [importlib.import_module(f"baatt.integrations.{name}") for name in ADAPTERS]  # type: ignore[misc]


def in_short(error: BaseException) -> str:
    """Its kind and first line, or the line alone where it is a sentence of ours."""
    line = next(iter(str(error).strip().splitlines()), "")[:200]
    return line if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {line}"


def fill_zeros(model: nn.Module) -> None:
    """Some weights start as zeros, so that nothing of the attention would reach the output."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def measure_apart(library: str, name: str, build: Callable[[str], Built], seconds: float = SECONDS) -> dict[str, Any]:
    """`measure` in a process of its own, which is ended when its time is over."""
    context = multiprocessing.get_context("fork")  # what the library has imported comes along
    reader, writer = context.Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        writer.send(measure(library, name, build))

    process = context.Process(target=work, daemon=True)
    process.start()
    writer.close()
    try:
        answer = reader.recv() if reader.poll(seconds) else f"not done after {seconds:g} seconds"
    except EOFError:
        answer = "its process died"
    process.kill()
    process.join()
    if isinstance(answer, dict):
        return answer
    failed = {"sparse": 0, "dense": {}, "equal_at_0": None, "restored": None, "note": answer}
    return {"library": library, "class": name, **failed}


def is_right(one: Record) -> bool:
    """Whether it equals dense attention with all blocks and after it was disabled; one not built is not wrong."""
    if one["equal_at_0"] is None:
        return one["restored"] is not False
    return bool(one["restored"] and one["equal_at_0"] <= TOLERANCE)


def table(record: Record, library: str) -> str:
    """A row per class of a library of which there is a model; below, the others."""
    ones = [one for one in record["records"] if one["library"] == library]
    built = [one for one in ones if not one["note"].startswith(NOT_BUILT)]
    rows = [
        [
            f"`{one['class']}`",
            "-" if one["equal_at_0"] is None else str(one["sparse"]),
            "; ".join(f"{count}: {reason}" for reason, count in one["dense"].items()) or "-",
            "-" if one["equal_at_0"] is None else f"{one['equal_at_0']:.0e}",
            {True: "yes", False: "**no**", None: "-"}[one["restored"]],
            one["note"] or "-",
        ]
        for one in built
    ]
    others = ", ".join(f"`{one['class']}`" for one in ones if one not in built)
    sparse = sum(one["sparse"] > 0 for one in built)
    caption = (
        f"{len(ones)} classes, {len(built)} built, {sparse} with sparse calls. Calls of "
        "one evaluation at 75 % sparsity in blocks of 16, with `Policy(min_queries=0)`; difference at sparsity 0, "
        "relative to the greatest value; restored: bit for bit after `disable`."
        + (f" Not built, so nothing is known of them; the stored file has the reasons: {others}." if others else "")
    )
    header = ("class", "sparse calls", "dense calls, and why", "difference at sparsity 0", "restored", "note")
    return block(record, header, rows, caption)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the records are stored")
    parser.add_argument("--library", choices=list(ROOMS), required=True)
    parser.add_argument("--only", nargs="+", help="these classes alone")
    arguments = parser.parse_args(argv)
    command = shlex.join(["python", "benchmarks/classes.py", *(sys.argv[1:] if argv is None else argv)])
    torch.set_num_threads(1)
    report = RecordFile(arguments.json, {"study": "classes", **provenance(command, torch.device("cpu"))})
    sys.path.insert(0, str(ROOT))
    room = importlib.import_module(ROOMS[arguments.library])
    for name in arguments.only or room.names():
        report.add(one := measure_apart(arguments.library, name, room.build))
        counts = f"{one['sparse']} sparse, {one['dense']} dense, {one['equal_at_0']} {one['note']}"
        sys.stdout.write(f"{name}: {'right' if is_right(one) else 'WRONG'}: {counts}\n")
        sys.stdout.flush()
    return 0 if all(map(is_right, report.records)) else 1


if __name__ == "__main__":
    sys.exit(main())
