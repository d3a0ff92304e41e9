"""Tables of the card of the diffusion model grown from SmolLM2: how it was trained, and what it can do densely."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from tables import block, device_text

from baatt.lab.records import short_commit
from baatt.lab.tables import MISSING, Record, Table, percent

#: What was asked for before anything was trained, by what is measured and the length.
WANTED = {("needles", 4096): 0.95, ("needles", 8192): 0.9, ("all", 4096): 0.8, ("questions", 0): 0.6}


def scores(record: Record, length: int) -> dict[str, float]:
    """RULER's score of each task at a length, in percent."""
    return {one["task"]: 100 * one["values_found"] for one in record["records"] if one["length"] == length}


def needles(found: Mapping[str, float]) -> dict[str, float]:
    """Those of the needle tasks."""
    return {task: score for task, score in found.items() if task.startswith("niah_")}


def bars(records: Sequence[Record]) -> str:
    """What the model can do: a row for each thing that was measured."""
    measured = next(one for one in records if "questions_right" in one)
    asked = [one for one in records if "questions_right" not in one]
    rows = [row for record in asked for row in ruler_rows(record)]
    for name, one in measured.items():
        if name.startswith("read_"):
            what = f"statements in documents of {name.removeprefix('read_')} tokens, asked in plain words"
            rows.append((what, f"{one['right']} of {len(one['answers'])}", MISSING))
    what, total = "simple questions, all of which the base answers rightly", len(measured["questions"])
    rows.append((what, f"{measured['questions_right']} of {total}", wanted("questions", 0)))
    text = measured["text"]
    for name, share in text.items():
        if name.startswith("accuracy_at_"):
            hidden = percent(float(name.removeprefix("accuracy_at_")))
            rows.append((f"hidden tokens of held-out prose, {hidden} of them hidden", percent(share, 1), MISSING))
    both = f"{text['bound_per_token']:.2f}; {text['base_loss_per_token']:.2f}"
    rows.append(("nats a token of that prose: its bound; the base's own loss, left to right", both, MISSING))
    return block([{**measured, "records": []}, *asked], ("dense attention", "reached", "wanted"), rows)


def ruler_rows(record: Record) -> Iterator[tuple[str, str, str]]:
    """RULER's score of the needle tasks and of all, by length."""
    for length in dict.fromkeys(one["length"] for one in record["records"]):
        found = scores(record, length)
        samples = max(one["n"] for one in record["records"] if one["length"] == length)
        for name, some in (("needles", needles(found)), ("all", found)):
            if not some:
                continue
            lowest = min(some, key=some.__getitem__)
            tasks = f"{len(some)} {'needle tasks' if name == 'needles' else 'tasks'}"
            reached = f"{fmean(some.values()):.1f} %, lowest `{lowest}` {some[lowest]:.1f} %"
            yield f"RULER, {tasks}, {length} tokens, {samples} samples each", reached, wanted(name, length)


def wanted(name: str, length: int) -> str:
    """What was asked for, if anything."""
    return percent(WANTED[name, length]) if (name, length) in WANTED else MISSING


def runs(records: Sequence[Record]) -> str:
    """The training, a row for each run; steps and tokens count on from run to run."""
    rows = []
    for number, one in enumerate(records, start=1):
        told, processes = one["arguments"], one.get("processes", 1)
        rows.append((
            str(number), f"{processes} x {device_text(one['device'])}", f"{told['seconds']:.0f}",
            f"{told['learning_rate']:g}", percent(told["free"]), str(one["stage"]), f"{one['step']:,}",
            f"{one['tokens'] / 1e6:,.0f}", short_commit(one["commit"]),
        ))  # fmt: skip
    columns = ("run", "device", "seconds", "rate", "free text", "stage", "steps", "million tokens", "commit")
    return Table(columns, rows).markdown()


def texts(measured: Record) -> str:
    """What it wrote, and what it answered wrongly, word for word."""
    written = [f"{begin} | {_line(text)}" for begin, text in measured["continuations"].items()]
    wrong = [f"{one['question']} | {_line(one['answer'])}" for one in measured["questions"] if not one["right"]]
    parts = [("What it wrote behind each beginning:", written), ("What it answered wrongly:", wrong)]
    return "\n\n".join(f"{title}\n\n```text\n{_folded(lines)}\n```" for title, lines in parts if lines)


def _line(text: str) -> str:
    return " ".join(text.split())


def _folded(lines: Sequence[str]) -> str:
    return "\n".join(textwrap.fill(line, 116, subsequent_indent="  ") for line in lines)
