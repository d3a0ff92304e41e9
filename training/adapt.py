"""Grows a masked-diffusion LM from a causal one: attention becomes bidirectional, a reserved token the mask.

In: `--base`, a Llama-shaped GGUF file or a folder in LLaDA's layout, and a data folder (`corpus.py`, `base_text.py`).
Out: in `--out` the exact state for `--resume` and `training.json`; in `--copy` what is small enough to travel and to
ship, the change alone in 8 bits, from which `--resume` goes on with a fresh optimizer. Free text and RULER's curriculum
alternate; loss and samples are those of `train.py`, `samples.py` and `mixture.py`. One GPU, or several under torchrun,
each with batches of its own: gradients are averaged, the first rank writes.
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
from averaging import add_up, agree, average_gradients
from mixture import FREE, MixtureMaker, corrupt_free, prepare
from samples import CURRICULUM, JUDGED_BY, TOKENS_PER_BATCH, Batch
from tokenizers import Tokenizer
from torch import Tensor
from train import Scores, compile_blocks, corrupt, draw_batch, first_rows, forward_backward, learning_rate

from baatt.lab.ranks import Ranks, leave_process_group
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

    def __init__(self, arguments: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
        self.arguments, self.device, self.base, self.ranks = arguments, device, checksum(arguments.base), ranks
        self.model, tokenizer = open_base(arguments.base)
        if ranks.rank == 0:
            prepare(arguments.data, tokenizer)
        ranks.barrier()
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
            if folder.with_suffix(".json").is_file():  # else it is the shipped one, and its steps are counted anew
                self.progress = read_json(folder.with_suffix(".json"))
            if tensors.keys() != self.trained.keys():
                raise ValueError(f"--resume {folder} must hold what --rank {self.arguments.rank} trains, and does not")
        if self.arguments.stage is not None:
            self.progress["stage"] = self.arguments.stage
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[name])

    def save(self) -> None:
        """The exact state, and the copy that travels; of several ranks the first one's."""
        out = self.arguments.out
        if self.ranks.rank:
            return
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
        hide = corrupt_free if batch.source[0] in FREE else corrupt
        corrupted = hide(tokens, regions, self.model.config.mask_token_id)
        return forward_backward(self.model, tokens, regions, corrupted), source

    def update(self, rate: float) -> None:
        """One step of the optimizer, by the mean of all ranks' gradients."""
        average_gradients(self.ranks, list(self.trained.values()))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Curriculum:
    """Which stage is practised: the next one begins once exact match is high enough twice, or patience has ended.

    Args:
        stage: number of the present one, shared with the workers.
        numbers: all that may be practised, ascending.
        patience: factor of the seconds that a stage may take at most.
    """

    def __init__(self, stage: "Synchronized[int]", numbers: list[int], patience: float) -> None:
        self.stage, self.numbers, self.patience = stage, numbers, patience
        self.recent, self.since = list[float](), 0.0

    def look(self, rates: dict[str, float], seconds: float) -> bool:
        """Whether a stage has ended; rates: exact match of the current one since the last look, by source."""
        here = CURRICULUM[self.stage.value]
        judged = [rates[name] for name in JUDGED_BY.get(here.kind, ("document",)) if name in rates]
        self.recent = ([*self.recent, min(judged)] if judged else self.recent)[-2:]
        good = len(self.recent) == 2 and min(self.recent) >= here.target
        later = [number for number in self.numbers if number > self.stage.value]
        if not later or not (good or seconds - self.since > here.patience * self.patience):
            return False
        self.stage.value, self.since, self.recent = later[0], seconds, []
        return True


def train(arguments: argparse.Namespace) -> None:
    """The whole run."""
    ranks = Ranks("nccl" if arguments.device.startswith("cuda") else "gloo")
    torch.manual_seed(arguments.seed)  # all ranks begin with the same change
    torch.set_float32_matmul_precision("high")
    device = ranks.device(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    run = Run(arguments, device, ranks)
    torch.manual_seed(arguments.seed * 100 + ranks.rank)  # and hide other tokens
    if arguments.compile:
        compile_blocks(run.model)
    context = multiprocessing.get_context("spawn")
    stage, queue = context.Value("i", run.progress["stage"]), context.Queue(maxsize=32)
    given = (str(arguments.data), arguments.batch_tokens, arguments.free)
    first_seed = (arguments.seed * 64 + ranks.rank) * 1000
    workers = [
        context.Process(target=make_batches, args=(given[0], seed, *given[1:], stage, queue), daemon=True)
        for seed in range(first_seed, first_seed + arguments.workers)
    ]
    for worker in workers:
        worker.start()
    try:
        if arguments.compile:  # before the clock of the learning rate starts
            for batch in (queue.get(), queue.get()):
                run.step(first_rows(batch, 2))
            run.optimizer.zero_grad(set_to_none=True)
        history = loop(run, stage, queue, began)
    finally:
        for worker in workers:
            worker.terminate()
    run.save()
    if ranks.rank == 0:
        found = provenance(shlex.join(["python", *sys.argv]), device)
        values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        report = {"arguments": values, "processes": ranks.size, **run.progress, "history": history, **found}
        write_json(report, arguments.out / "training.json")
    leave_process_group()


def loop(
    run: Run, stage: "Synchronized[int]", queue: "multiprocessing.Queue[Batch]", began: float
) -> list[dict[str, Any]]:
    """Steps until the time is up, start and compilation counted in; returns what was reported. Ranks agree on the
    time every CHECK_EVERY steps, so that all stop after the same one."""
    arguments, device, ranks, history = run.arguments, run.device, run.ranks, list[dict[str, Any]]()
    (begun,) = agree(ranks, [time.monotonic() - began], device)
    arguments.seconds -= begun  # what is left
    stages = [number for number in range(arguments.last_stage + 1) if number not in arguments.skip]
    curriculum = Curriculum(stage, stages, arguments.patience)
    overall, following, current = (Scores(device) for _ in range(3))
    losses = torch.zeros(2, 4, device=device)  # tasks and free text: parts of the loss, batches
    start = saved = time.monotonic()
    first, seen, elapsed = run.progress["step"], run.progress["tokens"], 0.0
    while elapsed < arguments.seconds or run.progress["step"] == first:
        batch = queue.get()
        measured, source = run.step(batch)
        run.update(learning_rate(run.progress["step"] - first, elapsed, arguments))
        overall.add(measured.matched, measured.answers, source)
        following.add(measured.right, measured.following, source)
        is_free = int(batch.source[0] in FREE)
        if batch.stage == stage.value and not is_free:
            current.add(measured.matched, measured.answers, source)
        losses[is_free] += torch.cat([measured.parts, measured.parts.new_ones(1)])
        run.progress["step"] += 1
        run.progress["tokens"] += batch.tokens.size * ranks.size
        if run.progress["step"] % CHECK_EVERY:
            continue
        (elapsed,) = agree(ranks, [time.monotonic() - start], device)
        rates = current.read(ranks)
        if curriculum.look(rates, elapsed) and ranks.rank == 0:
            print(f"stage {run.progress['stage']} ends at {elapsed:.0f} s: {rates}", flush=True)
        run.progress["stage"] = stage.value
        if run.progress["step"] % REPORT_EVERY == 0:
            tasks, free = (add_up(ranks, losses)[:, :3] / losses[:, 3:].clamp(min=1)).tolist()
            row = {
                "step": run.progress["step"], "seconds": round(elapsed, 1), "stage": stage.value,
                "tokens_per_second": round((run.progress["tokens"] - seen) / elapsed),
                "loss_tasks": tasks, "loss_free": free[0],
                "exact_match": overall.read(ranks), "next_token": following.read(ranks), "queued": queue.qsize(),
            }  # fmt: skip
            losses.zero_()
            history.append(row)
            if ranks.rank == 0:
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
    add("--skip", type=int, nargs="*", default=[], help="stages that are left out")
    add("--patience", type=float, default=1.0, help="factor of the seconds that a stage takes at most")
    add("--batch-tokens", type=int, default=TOKENS_PER_BATCH, help="on each GPU")
    add("--workers", type=int, default=13, help="processes that draw batches, for each GPU")
    add("--seed", type=int, default=1)
    add("--device", default="cuda")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
