"""RULER's offline tasks on a model: dense attention, both presets, other orders and scores, one option at a time.

`python benchmarks/ruler_grid.py FOLDER --gpus 8` answers with dense attention on all GPUs together, then hands every
GPU one setting at one length after the other, and joins what is complete in FOLDER/grid.json. All answers stay in
FOLDER/answers: a run that was cut, by hand or by --seconds, goes on where it stopped.
"""

import argparse
import itertools
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from baatt.assets import shipped_model
from baatt.lab.records import write_json
from baatt.lab.ruler.model import checksums, weights_of
from baatt.lab.ruler.summary import make_averages

SETTINGS = {
    "dense": (),
    # What the preset of that name was when it was measured: keys sorted in segments of 256.
    "safe": ("--preset", "paper", "--sort", "k", "--segment", "256", "--dense-layers", "0,1"),
    "paper": ("--preset", "paper"),
    "keys": ("--preset", "paper", "--sort", "k", "--segment", "256"),
    "unsorted": ("--preset", "paper", "--sort", "none"),
    "mean": ("--preset", "paper", "--sort", "none", "--score", "mean"),
    "antidiagonal": ("--preset", "paper", "--sort", "none", "--score", "antidiagonal-8"),
    "finer": ("--preset", "paper", "--sort", "none", "--score", "covariance-16"),
    "oracle": ("--preset", "paper", "--sort", "none", "--score", "oracle"),
    "clusters": ("--preset", "paper", "--sort", "none", "--score", "clusters", "--keep-first", "1"),
    "unsorted-first": ("--preset", "paper", "--sort", "none", "--keep-first", "1"),
    "antidiagonal-first": ("--preset", "paper", "--sort", "none", "--score", "antidiagonal-8", "--keep-first", "1"),
    "oracle-peak": ("--preset", "paper", "--sort", "none", "--score", "exact-peak"),
}
#: The setting "clusters" with one thing changed.
ABLATIONS = {
    name: (*SETTINGS["clusters"], *options)
    for name, options in {
        **{f"representatives-{number}": ("--representatives", number) for number in ("1", "4", "8", "32")},
        **{f"refinements-{number}": ("--refinements", number) for number in ("0", "1")},
        "mean-over-queries": ("--no-peak",),
        **{f"keep-first-{number}": ("--keep-first", number) for number in ("0", "2")},
        "budget-head": ("--budget", "head"),
        "sort-keys": ("--sort", "k", "--segment", "256"),
        "variance": ("--score", "clusters-variance", "--beta", "0.5"),
    }.items()
}
#: BA-Att with another order of the tokens, or another weight of its compensation (the paper's Table 8).
ORDERS = {
    "keys-1024": (*SETTINGS["paper"], "--sort", "k"),
    "both-256": (*SETTINGS["paper"], "--segment", "256"),
}
BETAS = {
    f"{name}-beta-{beta}": (*SETTINGS[name], "--beta", beta)
    for name in ("paper", "unsorted-first")
    for beta in ("0", "0.1", "1", "2")
}
KNOWN = SETTINGS | ABLATIONS | ORDERS | BETAS
#: Names that stand for several settings.
GROUPS = {
    "all": list(SETTINGS),
    "ablations": ["clusters", *ABLATIONS],
    "orders": ["unsorted", "keys", *ORDERS, "paper"],
    "betas": ["paper", "unsorted-first", *BETAS],
}
#: How answers are written. "cached": blocks of eight tokens from left to right, as needle-18m answers best; steps
#: within a block are dense. "uncached": blocks of 32, at most eight steps each, every one of them sparse.
SAMPLERS = {
    "cached": ("--block-length", "8", "--remasking", "left_to_right", "--cache", "dual"),
    "uncached": ("--steps", "32"),
}
#: A length from which on the sparsities of a setting are jobs of their own: they take longest, and GPUs end together.
LONG = 8192
PATIENCE = 10  # seconds for a run that was told to stop
#: What a summary says about its own run alone.
OF_A_RUN = ("command", "commit", "device", "versions", "processes", "averages", "records")


class Job(NamedTuple):
    """One setting at one length and some sparsities."""

    setting: str
    length: int
    sparsity: str

    @property
    def name(self) -> str:
        return f"{self.setting}-{self.length}-{self.sparsity.replace(',', '+')}"


def make_jobs(settings: Sequence[str], lengths: Sequence[int], sparsity: str) -> list[Job]:
    """All but dense attention, from short to long; a setting is complete before the next one begins."""
    return [
        Job(name, length, part)
        for length in sorted(lengths)
        for name in settings
        if name != "dense"
        for part in (sparsity.split(",") if length >= LONG else [sparsity])
    ]


class Grid:
    """Where the answers lie, how the command is called, and when to stop."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.answers: Path = arguments.folder / "answers"
        self.deadline = time.monotonic() + arguments.seconds
        self.weights = weights_of(checksums(arguments.model or shipped_model()))

    def command(self, setting: str, lengths: str, sparsity: str, store: Path, summary: Path) -> list[str]:
        """The arguments of `baatt`."""
        given = self.arguments
        model = ("--model", str(given.model)) if given.model else ()
        return [
            "evaluate", "ruler", *model, "--device", given.device, "--dtype", given.dtype, "--tasks", given.tasks,
            "--count", str(given.count), "--batch-size", str(given.batch_size), "--workers", "10",
            *SAMPLERS[given.sampler],
            "--lengths", lengths, *KNOWN[setting], "--sparsity", sparsity, "--store", str(store),
            "--json", str(summary),
        ]  # fmt: skip

    def call(self, name: str, arguments: Sequence[str], gpu: int | None = None) -> bool:
        """Run `baatt` on one GPU, or on all; False, which is said, if it failed or the time was up."""
        started, log, gpus = time.monotonic(), self.answers / f"{name}.log", self.arguments.gpus
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if gpu is not None and self.arguments.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = visible_devices(os.environ)[gpu]
        done = False
        if started < self.deadline:
            program = [sys.executable, *(several if gpu is None and gpus > 1 else []), "-m", "baatt", *arguments]
            with log.open("a") as output:
                process = subprocess.Popen(program, env=environment, stdout=output, stderr=subprocess.STDOUT)
                done = self.wait(process)
        say(f"{name}: {'done' if done else f'not finished, see {log}'}, {time.monotonic() - started:.0f} s")
        return done

    def wait(self, process: "subprocess.Popen[bytes]") -> bool:
        """Whether it ends well before the time is up."""
        try:
            return process.wait(max(0.0, self.deadline - time.monotonic())) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it ends its own workers then
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        return False

    def dense(self) -> bool:
        """The answers that all settings are compared with."""
        store = self.answers / "dense"
        store.mkdir(parents=True, exist_ok=True)
        lengths, summary = ",".join(map(str, self.arguments.lengths)), self.arguments.folder / "ruler_dense.json"
        return self.call("dense", self.command("dense", lengths, "0", store, summary))

    def run(self, job: Job, gpu: int) -> bool:
        """One job; what it had answered before stays, and what the setting was asked at other sparsities is not asked
        again."""
        store = self.answers / job.name
        store.mkdir(exist_ok=True)
        others = self.answers.glob(f"{job.setting}-{job.length}-*/rank0.jsonl")
        files = [*(self.answers / "dense").glob("rank*.jsonl"), *(one for one in others if one.parent != store)]
        with (store / "rank1.jsonl").open("wb") as known:  # read by the job, which writes into rank0.jsonl
            for file in sorted(files):
                answers = file.read_bytes()
                known.write(answers[: answers.rfind(b"\n") + 1])  # whole lines of one that is being written
        return self.call(job.name, self.command_of(job), gpu)

    def command_of(self, job: Job) -> list[str]:
        store = self.answers / job.name
        return self.command(job.setting, str(job.length), job.sparsity, store, store / "summary.json")

    def summary(self, job: Job) -> dict[str, Any] | None:
        """What a finished job has stored; None if it is not finished, or is of other weights or options."""
        path = self.answers / job.name / "summary.json"
        if not path.exists():
            return None
        stored: dict[str, Any] = json.loads(path.read_text())
        same = without_paths(shlex.split(stored["command"])[1:]) == without_paths(self.command_of(job))
        return stored if same and stored["weights"] == self.weights else None


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that a process may use, in order; all of them have numbers where nothing is said."""
    return environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(64)))).split(",")


def without_paths(arguments: Sequence[str]) -> list[str]:
    """Arguments without the options that name a place."""
    pairs = itertools.pairwise(["", *arguments])
    places = ("--store", "--json", "--model")
    return [argument for before, argument in pairs if argument not in places and before not in places]


def join(jobs: Iterable[Job], summaries: dict[Job, dict[str, Any]]) -> dict[str, Any]:
    """Setting by setting the records of all lengths that are complete, dense attention first at each length."""
    places: dict[tuple[str, int], list[Job]] = {}
    for job in jobs:
        places.setdefault((job.setting, job.length), []).append(job)
    settings: dict[str, Any] = {}
    for (setting, _), parts in places.items():
        if not all(job in summaries for job in parts):
            continue
        found = [summaries[job] for job in parts]
        records = [one for one in found[0]["records"] if not one["config"]]
        records += [one for summary in found for one in summary["records"] if one["config"]]
        header = {name: value for name, value in found[0].items() if name not in OF_A_RUN}
        settings.setdefault(setting, header | {"records": []})["records"] += records
    for one in settings.values():
        one["averages"] = make_averages(one["records"])
    return settings


def on_all_gpus(gpus: int, work: Callable[[Job, int], bool], jobs: Sequence[Job]) -> list[Job]:
    """Every job on a GPU as one becomes free; returns those that did not finish."""
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for gpu in range(gpus):
        free.put(gpu)

    def one(job: Job) -> bool:
        gpu = free.get()
        try:
            return work(job, gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(gpus) as pool:
        return [job for job, done in zip(jobs, pool.map(one, jobs), strict=True) if not done]


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """A type for argparse."""
    chosen = [name for part in text.split(",") for name in GROUPS.get(part, [part])]
    if unknown := [name for name in chosen if name not in KNOWN]:
        raise argparse.ArgumentTypeError(f"must be of {','.join([*KNOWN, *GROUPS])}, got {','.join(unknown)}")
    return list(dict.fromkeys(chosen))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for answers, logs and summaries")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the shipped model)")
    parser.add_argument("--lengths", type=numbers, default=[4096, 8192, 16384])
    groups = f"by commas, or of the groups {', '.join(GROUPS)} (default: all)"
    parser.add_argument("--settings", type=names, default=list(SETTINGS), help=groups)
    parser.add_argument("--sparsity", default="0.3,0.5,0.7,0.9")
    parser.add_argument("--tasks", default="all")
    parser.add_argument("--count", type=int, default=200, help="samples of every task (default: 200)")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--sampler", choices=list(SAMPLERS), default="cached")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=1e6, help="stop asking after so long (default: never)")
    arguments = parser.parse_args(argv)
    grid = Grid(arguments)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    jobs = make_jobs(arguments.settings, arguments.lengths, arguments.sparsity)
    open_jobs = [job for job in jobs if grid.summary(job) is None]
    if (open_jobs or "dense" in arguments.settings) and not grid.dense():
        sys.exit(f"dense: not finished, see {grid.answers}/dense.log")
    unfinished = on_all_gpus(arguments.gpus, grid.run, open_jobs)
    summaries = {job: summary for job in jobs if (summary := grid.summary(job)) is not None}
    if settings := join(jobs, summaries):
        first = next(iter(summaries.values()))
        command = shlex.join(["python", "benchmarks/ruler_grid.py", *(sys.argv[1:] if argv is None else argv)])
        run = {name: first[name] for name in ("commit", "device", "versions")}
        joined = {"study": "ruler grid", "command": command, **run, "settings": settings}
        write_json(joined, arguments.folder / "grid.json", indent=None)
    if unfinished:
        sys.exit(f"not finished: {', '.join(sorted(job.name for job in unfinished))}; the same command goes on")


if __name__ == "__main__":
    main()
