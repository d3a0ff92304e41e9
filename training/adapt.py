"""Grows a masked-diffusion LM from a causal one: attention becomes bidirectional, a reserved token the mask.

In: `--base`, a Llama-shaped GGUF file or a folder in LLaDA's layout, and a data folder (`corpus.py`, `base_text.py`).
Out: in `--out` the exact state for `--resume` and `training.json`; in `--copy` what is small enough to travel and to
ship, the change alone in 8 bits, from which `--resume` goes on with a fresh optimizer. Free text and RULER's curriculum
alternate; loss and samples are those of `train.py`, `samples.py` and `mixture.py`. One GPU.
"""

import argparse
import json
import multiprocessing
import shlex
import sys
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch
from mixture import CHAT, PROSE, MixtureMaker, corrupt_free, prepare
from samples import CURRICULUM, JUDGED_BY, TOKENS_PER_BATCH, Batch
from tokenizers import Tokenizer
from torch import Tensor
from train import Scores, compile_blocks, corrupt, draw_batch, first_rows, forward_backward, learning_rate

from baatt.lab.ranks import Ranks
from baatt.lab.records import provenance, write_json
from baatt.lab.ruler.model import checksums, weights_of
from baatt.lab.smollm2 import sha256_of
from baatt.models import MaskedDiffusionLM
from baatt.models.adapter import changes, make_trainable, read_adapter, write_adapter
from baatt.models.checkpoint import load_tokenizer, read_json
from baatt.models.gguf import load_gguf_tokenizer, load_llama

KEEP_RANK = 48  # of the travelling copy of a full fine-tuning
CHECK_EVERY, REPORT_EVERY, SAVE_EVERY = 10, 50, 60.0  # steps, steps, seconds
STATE = "state.pt"


def open_base(path: Path) -> tuple[MaskedDiffusionLM, Tokenizer]:
    """Base model in fp32 and its tokenizer, of a GGUF file or a folder."""
    if path.is_dir():
        return MaskedDiffusionLM.from_pretrained(path, dtype=torch.float32), load_tokenizer(path)
    return load_llama(path), load_gguf_tokenizer(path)


def checksum(base: Path) -> str:
    """What an adapter names its base by."""
    return weights_of(checksums(base)) if base.is_dir() else sha256_of(base)


def make_batches(
    data: str, seed: int, tokens: int, free: float, stage: "Synchronized[int]", queue: "multiprocessing.Queue[Batch]"
) -> None:
    """Worker: free text in a share of the batches, else those of the curriculum."""
    maker = MixtureMaker(Path(data), seed)
    while True:
        is_free = maker.random.random() < free
        queue.put(maker.free_batch(tokens, stage.value) if is_free else draw_batch(maker, stage.value, tokens))


class Run:
    """Model, optimizer and progress of a run, with their saving and reading back."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments, self.device, self.base = arguments, device, checksum(arguments.base)
        self.model, tokenizer = open_base(arguments.base)
        prepare(arguments.data, tokenizer)
        self.model.to(device)
        frozen = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.trained = make_trainable(self.model, arguments.rank, frozen)
        matrices = [p for p in self.trained.values() if p.dim() == 2]
        vectors = [p for p in self.trained.values() if p.dim() != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
            lr=arguments.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda",
        )  # fmt: skip
        self.progress: dict[str, Any] = {"step": 0, "tokens": 0, "stage": arguments.stage or 0}
        if arguments.resume is not None:
            self._resume(arguments.resume)

    @torch.no_grad()
    def _resume(self, folder: Path) -> None:
        """Go on from the exact state of a folder, or from the file that travelled."""
        if (folder / STATE).is_file():
            state = torch.load(folder / STATE, map_location=self.device, weights_only=True)
            tensors, self.progress = state["tensors"], state["progress"]
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            tensors = read_adapter(folder, self.base)
            self.progress = read_json(folder.with_suffix(".json"))
            if tensors.keys() != self.trained.keys():
                raise ValueError(f"--resume {folder} must hold what --rank {self.arguments.rank} trains, and does not")
        if self.arguments.stage is not None:
            self.progress["stage"] = self.arguments.stage
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[name])

    def save(self) -> None:
        """The exact state, and the copy that travels."""
        out = self.arguments.out
        state = {"tensors": self.trained, "optimizer": self.optimizer.state_dict(), "progress": self.progress}
        torch.save(state, out / f"{STATE}.partial")
        (out / f"{STATE}.partial").replace(out / STATE)
        tensors: dict[str, Tensor] = dict(self.trained)
        if self.arguments.rank == 0:
            base, _ = open_base(self.arguments.base)
            tensors = dict(changes(base, self.trained, KEEP_RANK))
        copy = self.arguments.copy or out / "adapter.safetensors"
        write_adapter(copy.with_suffix(".partial"), tensors, self.base)
        copy.with_suffix(".partial").replace(copy)
        write_json(self.progress, copy.with_suffix(".json"))

    def step(self, batch: Batch) -> tuple[Any, Tensor]:
        """Gradients of a batch; what was measured, and the source of each row."""
        arrays = (torch.from_numpy(array).to(self.device, non_blocking=True) for array in batch[:3])
        tokens, regions, source = (array.long() for array in arrays)
        hide = corrupt_free if batch.source[0] in (PROSE, CHAT) else corrupt
        corrupted = hide(tokens, regions, self.model.config.mask_token_id)
        return forward_backward(self.model, tokens, regions, corrupted), source

    def update(self, rate: float) -> None:
        """One step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Curriculum:
    """Which stage is practised: the next one begins once exact match is high enough twice, or patience has ended."""

    def __init__(self, stage: "Synchronized[int]", last: int) -> None:
        self.stage, self.last, self.recent, self.since = stage, last, list[float](), 0.0

    def look(self, rates: dict[str, float], seconds: float) -> None:
        """rates: exact match of the current stage since the last look, by source."""
        here = CURRICULUM[self.stage.value]
        judged = [rates[name] for name in JUDGED_BY.get(here.kind, ("document",)) if name in rates]
        self.recent = ([*self.recent, min(judged)] if judged else self.recent)[-2:]
        good = len(self.recent) == 2 and min(self.recent) >= here.target
        if self.stage.value < self.last and (good or seconds - self.since > here.patience):
            print(f"stage {self.stage.value} ends at {seconds:.0f} s: {self.recent}", flush=True)
            self.stage.value += 1
            self.since, self.recent = seconds, []


def train(arguments: argparse.Namespace) -> None:
    """The whole run."""
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    device, ranks = torch.device(arguments.device), Ranks("gloo")
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    run = Run(arguments, device)
    if arguments.compile:
        compile_blocks(run.model)
    context = multiprocessing.get_context("spawn")
    stage, queue = context.Value("i", run.progress["stage"]), context.Queue(maxsize=32)
    given = (str(arguments.data), arguments.batch_tokens, arguments.free)
    workers = [
        context.Process(target=make_batches, args=(given[0], seed, *given[1:], stage, queue), daemon=True)
        for seed in range(arguments.seed * 1000, arguments.seed * 1000 + arguments.workers)
    ]
    for worker in workers:
        worker.start()
    try:
        if arguments.compile:  # before the clock of the learning rate starts
            for batch in (queue.get(), queue.get()):
                run.step(first_rows(batch, 2))
            run.optimizer.zero_grad(set_to_none=True)
        history = loop(run, ranks, stage, queue, began)
    finally:
        for worker in workers:
            worker.terminate()
    run.save()
    found = provenance(shlex.join(["python", *sys.argv]), device)
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    write_json({"arguments": values, **run.progress, "history": history, **found}, arguments.out / "training.json")


def loop(
    run: Run, ranks: Ranks, stage: "Synchronized[int]", queue: "multiprocessing.Queue[Batch]", began: float
) -> list[dict[str, Any]]:
    """Steps until the time is up, start and compilation counted in; returns what was reported."""
    arguments, device, history = run.arguments, run.device, list[dict[str, Any]]()
    arguments.seconds -= time.monotonic() - began  # what is left
    curriculum = Curriculum(stage, arguments.last_stage)
    overall, following, current = (Scores(device) for _ in range(3))
    losses, counts = torch.zeros(2, 3, device=device), [0, 0]
    start = saved = time.monotonic()
    first, seen, elapsed = run.progress["step"], run.progress["tokens"], 0.0
    while elapsed < arguments.seconds or run.progress["step"] == first:
        batch = queue.get()
        measured, source = run.step(batch)
        run.update(learning_rate(run.progress["step"] - first, elapsed, arguments))
        overall.add(measured.matched, measured.answers, source)
        following.add(measured.right, measured.following, source)
        is_free = int(batch.source[0] in (PROSE, CHAT))
        if batch.stage == stage.value and not is_free:
            current.add(measured.matched, measured.answers, source)
        losses[is_free] += measured.parts
        counts[is_free] += 1
        run.progress["step"] += 1
        run.progress["tokens"] += batch.tokens.size
        elapsed = time.monotonic() - start  # the loss of a step waits for the device
        if run.progress["step"] % CHECK_EVERY:
            continue
        curriculum.look(current.read(ranks), elapsed)
        run.progress["stage"] = stage.value
        if run.progress["step"] % REPORT_EVERY == 0:
            row = {
                "step": run.progress["step"], "seconds": round(elapsed, 1), "stage": stage.value,
                "tokens_per_second": round((run.progress["tokens"] - seen) / elapsed),
                "loss_tasks": (losses[0] / max(1, counts[0])).tolist(),
                "loss_free": float(losses[1, 0]) / max(1, counts[1]),
                "exact_match": overall.read(ranks), "next_token": following.read(ranks), "queued": queue.qsize(),
            }  # fmt: skip
            losses, counts = losses.zero_(), [0, 0]
            history.append(row)
            print(json.dumps(row), flush=True)
        if time.monotonic() - saved > SAVE_EVERY:
            run.save()
            saved = time.monotonic()
    return history


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", type=Path, required=True, help="GGUF file, or folder in LLaDA's layout, to grow from")
    add("--data", type=Path, default=Path("training/data"))
    add("--out", type=Path, default=Path("training/runs/adapt"))
    add("--copy", type=Path, metavar="FILE", help="of the change in 8 bits (default: adapter.safetensors in --out)")
    add("--resume", type=Path, help="folder of an earlier run, or its --copy")
    add("--rank", type=int, default=48, help="of the change of every linear layer; 0 trains the whole weights")
    add("--seconds", type=float, default=540, help="of the whole run; 30 s more go by until it has saved")
    add("--learning-rate", type=float, default=1e-3)
    add("--decay-share", type=float, default=0.02, help="last part of the time, with falling rate")
    add("--free", type=float, default=0.5, help="share of batches of prose and chats")
    add("--stage", type=int, help="stage of the curriculum to begin with (default: 0, or where --resume was)")
    add("--last-stage", type=int, default=8, help="where the curriculum ends")
    add("--batch-tokens", type=int, default=TOKENS_PER_BATCH)
    add("--workers", type=int, default=13)
    add("--seed", type=int, default=1)
    add("--device", default="cuda")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
