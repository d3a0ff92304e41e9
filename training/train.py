"""Trains the small masked-diffusion LM on one GPU with a curriculum over the number of candidates.

In: `training/data` (text and tokenizer, made by `corpus.py` and `tokenizer.py`). Out: a checkpoint folder in LLaDA's
layout and `training.json` with the whole history. Batches come from worker processes (`samples.py`); answers are
masked here, on the GPU. The loss is the cross-entropy of masked tokens: answers, and a little of the running text.
"""

import argparse
import dataclasses
import json
import multiprocessing
import platform
import shutil
import subprocess
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from samples import CURRICULUM, FIRST_ANSWER, JUDGED_BY, MAX_ANSWERS, SOURCES, TAIL, TEXT, Batch, SampleMaker
from torch import Tensor

import baatt
from baatt.models import MaskedDiffusionLM, ModelConfig
from baatt.models.checkpoint import load_tokenizer, save_pretrained
from baatt.models.llada import dense_attention, rotary_tables

WARM_UP_STEPS = 100
CURRENT_STAGE_SHARE = 0.7
LOSS_WEIGHTS = {"answer": 1.0, "text": 0.2, "tail": 0.1}
TEXT_RATE, TAIL_RATE = 1 / 16, 1 / 8


class Corrupted(NamedTuple):
    """inputs [B, T] with masks; answer, text, tail [B, T] bool: tokens in the loss; whole [B]: all answers hidden."""

    inputs: Tensor
    answer: Tensor
    text: Tensor
    tail: Tensor
    whole: Tensor


def make_batches(data: str, seed: int, stage: "Synchronized[int]", queue: "multiprocessing.Queue[Batch]") -> None:
    """Worker: batches of the current stage, with a share of all earlier ones so that they are not forgotten."""
    maker = SampleMaker(Path(data), seed)
    while True:
        current = stage.value
        earlier = current > 0 and maker.random.random() > CURRENT_STAGE_SHARE
        queue.put(maker.batch(maker.random.randrange(CURRICULUM[current].replay, current) if earlier else current))


def corrupt(tokens: Tensor, regions: Tensor, mask_token: int) -> Corrupted:
    """Hide answers: all of them (60 % of the rows), each token at a random rate, or all after a random place."""
    rows, device = (tokens.shape[0], 1), tokens.device
    answer, tail = regions >= FIRST_ANSWER, regions == TAIL
    mode, rate, place = (torch.rand(rows, device=device) for _ in range(3))
    order = answer.cumsum(dim=1)
    whole, scattered = mode < 0.6, mode > 0.8
    noise = torch.rand(tokens.shape, device=device)
    suffix = order > place * order[:, -1:]
    hidden = torch.where(scattered, noise < rate, suffix | whole)
    text = (regions == TEXT) & (noise < TEXT_RATE)
    masked_answer, masked_tail = answer & hidden, tail & (hidden | ~scattered)
    inputs = tokens.masked_fill(masked_answer | masked_tail | text, mask_token)
    counted = masked_tail & (torch.rand(tokens.shape, device=device) < TAIL_RATE)
    return Corrupted(inputs, masked_answer, text, counted, whole[:, 0])


def hidden_states(model: MaskedDiffusionLM, inputs: Tensor) -> Tensor:
    """Normed states [B, T, d_model]; the head is applied to the positions of the loss alone."""
    config, transformer = model.config, model.transformer
    positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
    rotary = rotary_tables(positions, config.head_size, config.rope_theta, torch.float32)
    x = transformer.wte(inputs)
    for block in transformer.blocks:
        x = block(x, rotary, dense_attention, None)
    return transformer.ln_f(x)


def exact_matches(right: Tensor, regions: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Per row and answer number [B, MAX_ANSWERS]: all tokens right, and whether that answer exists."""
    number = (regions.long() - FIRST_ANSWER).clamp(min=0)
    shape = (regions.shape[0], MAX_ANSWERS)
    total = torch.zeros(shape, device=regions.device).scatter_add_(1, number, answer.float())
    good = torch.zeros(shape, device=regions.device).scatter_add_(1, number, (right & answer).float())
    return (good == total) & (total > 0), total > 0


class Scores:
    """Exact match by source (and of the current stage), summed on the GPU and read rarely."""

    def __init__(self, device: str) -> None:
        self.counts = torch.zeros(len(SOURCES), 2, device=device)

    def add(self, matched: Tensor, exists: Tensor, source: Tensor, whole: Tensor) -> None:
        pair = torch.stack([(matched & whole[:, None]).sum(1), (exists & whole[:, None]).sum(1)], dim=1).float()
        self.counts.index_add_(0, source, pair)

    def read(self) -> dict[str, float]:
        """Rates since the last reading."""
        good, total = self.counts.T.tolist()
        self.counts.zero_()
        return {name: round(g / t, 4) for name, g, t in zip(SOURCES, good, total, strict=True) if t}


def learning_rate(step: int, elapsed: float, arguments: argparse.Namespace) -> float:
    """Linear warm-up, constant, linear decay over the last `decay_share` of the time."""
    left = max(0.0, 1 - elapsed / arguments.seconds) / arguments.decay_share
    return float(arguments.learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS, left))


def train(arguments: argparse.Namespace) -> None:
    """The whole run."""
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    device, out = arguments.device, Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(arguments.data)
    mask_token, end = tokenizer.token_to_id("<|mask|>"), tokenizer.token_to_id("<|endoftext|>")
    shutil.copy(Path(arguments.data) / "tokenizer.json", out / "tokenizer.json")
    config = ModelConfig(
        d_model=arguments.width, n_heads=arguments.width // 64, n_layers=arguments.layers,
        mlp_hidden_size=2 * arguments.width, vocab_size=tokenizer.get_vocab_size(), mask_token_id=mask_token,
        eos_token_id=end, pad_token_id=end, weight_tying=True, attention_layer_norm=True,
        max_sequence_length=arguments.max_length, rope_theta=arguments.rope_theta or 10_000.0,
    )  # fmt: skip
    if arguments.resume:
        model = MaskedDiffusionLM.from_pretrained(arguments.resume, dtype=torch.float32, device=device)
        longest = max(model.config.max_sequence_length, arguments.max_length)
        theta = arguments.rope_theta or model.config.rope_theta
        model.config = dataclasses.replace(model.config, max_sequence_length=longest, rope_theta=theta)
    else:
        model = MaskedDiffusionLM(config).to(device)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=arguments.learning_rate, betas=(0.9, 0.95), fused=device != "cpu",
    )  # fmt: skip
    states = torch.compile(hidden_states, dynamic=True) if arguments.compile else hidden_states
    context = multiprocessing.get_context("spawn")
    stage, queue = context.Value("i", arguments.stage), context.Queue(maxsize=32)
    workers = [
        context.Process(
            target=make_batches, args=(arguments.data, arguments.seed * 1000 + n, stage, queue), daemon=True
        )
        for n in range(arguments.workers)
    ]
    for worker in workers:
        worker.start()
    first = queue.get()
    start = saved = time.monotonic()
    history, overall, current = [], Scores(device), Scores(device)
    step, tokens_seen, stage_start, losses = 0, 0, start, torch.zeros(3, device=device)
    recent: list[float] = []
    while (elapsed := time.monotonic() - start) < arguments.seconds:
        batch = first if step == 0 else queue.get()
        tokens, regions, source = (torch.from_numpy(array).to(device, non_blocking=True) for array in batch[:3])
        tokens = tokens.long()
        corrupted = corrupt(tokens, regions, mask_token)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, elapsed, arguments)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            x = states(model, corrupted.inputs)
            selected = corrupted.answer | corrupted.text | corrupted.tail
            logits = model.transformer.head(x[selected])
        targets = tokens[selected]
        each = F.cross_entropy(logits.float(), targets, reduction="none")
        parts = torch.stack([
            (each * kind[selected]).sum() / kind.sum().clamp(min=1)
            for kind in (corrupted.answer, corrupted.text, corrupted.tail)
        ])  # fmt: skip
        loss = (parts * parts.new_tensor(list(LOSS_WEIGHTS.values()))).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            right = torch.zeros_like(selected)
            right[selected] = logits.argmax(-1) == targets
            matched, exists = exact_matches(right, regions, corrupted.answer)
            overall.add(matched, exists, source.long(), corrupted.whole)
            if batch.stage == stage.value:
                current.add(matched, exists, source.long(), corrupted.whole)
            losses += parts.detach()
        step += 1
        tokens_seen += tokens.numel()
        if step % 20 == 0 and stage.value < arguments.last_stage:
            rates = current.read()
            here = CURRICULUM[stage.value]
            judged = [rates[name] for name in JUDGED_BY.get(here.kind, ("document",)) if name in rates]
            recent = ([*recent, min(judged)] if judged else recent)[-2:]
            late = time.monotonic() - stage_start > here.patience * arguments.seconds / 900
            if (len(recent) == 2 and min(recent) >= here.target) or late:
                print(
                    f"stage {stage.value} ends at {time.monotonic() - start:.0f} s, step {step}: {recent}", flush=True
                )
                stage.value += 1
                stage_start, recent = time.monotonic(), []
        if step % 100 == 0:
            row = {
                "step": step, "seconds": round(elapsed, 1), "stage": stage.value, "tokens": tokens_seen,
                "loss": [round(value, 4) for value in (losses / 100).tolist()], "exact_match": overall.read(),
                "queued": queue.qsize(),
            }  # fmt: skip
            losses.zero_()
            history.append(row)
            print(json.dumps(row), flush=True)
        if time.monotonic() - saved > 90:
            saved = time.monotonic()
            save_pretrained(model, out)
    save_pretrained(model, out)
    record = {"arguments": vars(arguments), "steps": step, "tokens": tokens_seen, "history": history, **environment()}
    (out / "training.json").write_text(json.dumps(record, indent=1))
    for worker in workers:
        worker.terminate()


def environment() -> dict[str, Any]:
    """Device, versions and commit of the run."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "baatt": baatt.__version__}
    return {"device": name, "commit": commit(), "versions": versions}


def commit() -> str:
    """The commit that runs, with "-dirty" where tracked files differ from it.

    A machine without the history, or without its last commits, reads the commit from the file `.commit`, mark included.
    """
    note = Path(".commit")
    noted = note.read_text().strip() if note.exists() else None
    head = git("rev-parse", "HEAD")
    if head is None:
        return noted or "unknown"
    if noted is not None and git("cat-file", "-e", noted.split("-", 1)[0] + "^{commit}") is None:
        return noted
    # Untracked files do not count: checkpoints, samples and new results lie beside every run.
    changed = git("status", "--porcelain", "--untracked-files=no")
    return head if changed == "" else f"{head}-dirty"


def git(*arguments: str) -> str | None:
    """What git prints, or None where it is not installed or finds no repository."""
    try:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="training/data")
    parser.add_argument("--out", default="training/runs/latest")
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--decay-share", type=float, default=0.25, help="last part of the time, with falling rate")
    parser.add_argument("--resume", help="checkpoint folder to continue from, with a fresh optimizer")
    parser.add_argument("--stage", type=int, default=0, help="stage of the curriculum to begin with")
    parser.add_argument(
        "--last-stage", type=int, default=8, help="where the curriculum ends (default: 8, needles only)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=13)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--max-length", type=int, default=4096, help="the longest sequence, for config.json")
    parser.add_argument("--rope-theta", type=float, help="RoPE base (default: that of --resume, or 10000)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
