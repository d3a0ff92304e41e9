"""Trains the small masked-diffusion LM with a curriculum over the number of candidates, on one GPU or several.

In: `training/data` (text and tokenizer, made by `corpus.py` and `tokenizer.py`). Out: a checkpoint folder in LLaDA's
layout and `training.json` with the whole history. Batches come from worker processes (`samples.py`); answers are
masked here, on the GPU. The loss is the cross-entropy of masked tokens: answers, and a little of the running text.
Under `torchrun` every process trains on batches of its own and gradients are averaged.
"""

import argparse
import dataclasses
import json
import multiprocessing
import shlex
import shutil
import sys
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from averaging import add_up, agree, average_gradients
from samples import (
    CURRICULUM,
    FIRST_ANSWER,
    JUDGED_BY,
    MAX_ANSWERS,
    SOURCES,
    TAIL,
    TEXT,
    TOKENS_PER_BATCH,
    Batch,
    SampleMaker,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from baatt.lab.ranks import Ranks, leave_process_group
from baatt.lab.records import provenance, write_json
from baatt.models import MaskedDiffusionLM, ModelConfig
from baatt.models.checkpoint import load_tokenizer
from baatt.models.rope import rotary_tables
from baatt.stages.dense import dense_attention

WARM_UP_STEPS = 100
CHECK_EVERY = 20  # steps after which processes agree on clock and stage
CURRENT_STAGE_SHARE = 0.7
LOSS_WEIGHTS = {"answer": 1.0, "text": 0.2, "tail": 0.1}
TEXT_RATE, TAIL_RATE = 1 / 16, 1 / 8
WHOLE_SHARE, SCATTERED_SHARE = 0.45, 0.15  # rows with all of their answers hidden, and with single tokens
RECOMPUTE_ABOVE = 3_000_000  # tokens x layers of a batch whose activations are not kept for the way back
NEAR = 8  # hidden tokens of an answer that count most


class Corrupted(NamedTuple):
    """inputs [B, T] with masks; answer, text, tail [B, T] bool: tokens in the loss; whole [B]: all answers hidden;
    weight [B, T]: of answer tokens; next [B, T] bool: the first hidden token of answers that begin to be known."""

    inputs: Tensor
    answer: Tensor
    text: Tensor
    tail: Tensor
    whole: Tensor
    weight: Tensor
    next: Tensor


def make_batches(
    data: str, seed: int, tokens: int, stage: "Synchronized[int]", queue: "multiprocessing.Queue[Batch]"
) -> None:
    """Worker: batches of the current stage, with a share of all earlier ones so that they are not forgotten."""
    maker = SampleMaker(Path(data), seed)
    while True:
        queue.put(draw_batch(maker, stage.value, tokens))


def draw_batch(maker: SampleMaker, current: int, tokens: int) -> Batch:
    """One batch of the current stage or, in a share, of an earlier one."""
    earlier = current > CURRICULUM[current].replay and maker.random.random() > CURRENT_STAGE_SHARE
    number = maker.random.randrange(CURRICULUM[current].replay, current) if earlier else current
    return maker.batch(number, tokens, max(CURRICULUM[current].lengths))


def corrupt(tokens: Tensor, regions: Tensor, mask_token: int) -> Corrupted:
    """Hide answers: all of a row, single tokens at a random rate, or each answer from a random place on."""
    rows, device = (tokens.shape[0], 1), tokens.device
    answer, tail = regions >= FIRST_ANSWER, regions == TAIL
    mode, rate = (torch.rand(rows, device=device) for _ in range(2))
    whole, scattered = mode < WHOLE_SHARE, mode > 1 - SCATTERED_SHARE
    noise = torch.rand(tokens.shape, device=device)
    number = (regions.long() - FIRST_ANSWER).clamp(min=0)
    per_answer = torch.zeros(tokens.shape[0], MAX_ANSWERS, device=device)
    length = per_answer.scatter_add(1, number, answer.float())
    place = answer.cumsum(dim=1) - 1 - (length.cumsum(dim=1) - length).gather(1, number)  # within the answer
    beginning = torch.floor(torch.rand_like(per_answer) * length).gather(1, number)
    hidden = torch.where(scattered, noise < rate, (place >= beginning) | whole)
    text = (regions == TEXT) & (noise < TEXT_RATE)
    masked_answer, masked_tail = answer & hidden, tail & (hidden | ~scattered)
    inputs = tokens.masked_fill(masked_answer | masked_tail | text, mask_token)
    counted = masked_tail & (torch.rand(tokens.shape, device=device) < TAIL_RATE)
    # What stands far behind the first hidden token often cannot be known yet, as the tokens of the seventh word of a
    # list; and rows with many answers would outweigh those with one.
    gap = torch.where(whole | scattered, place, place - beginning)
    weight = 1 / (1 + gap.clamp(min=0) / NEAR) / masked_answer.sum(dim=1, keepdim=True).clamp(min=1).sqrt()
    following = masked_answer & (place == beginning) & ~(whole | scattered)
    return Corrupted(inputs, masked_answer, text, counted, whole[:, 0], weight, following)


def hidden_states(model: MaskedDiffusionLM, inputs: Tensor) -> Tensor:
    """Normed states [B, T, d_model] that tell the tokens; the head is applied to the positions of the loss alone."""
    config, transformer = model.config, model.transformer
    positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
    rotary = rotary_tables(positions, config.head_size, config.rope_theta, torch.float32)
    x = transformer.wte(inputs)
    recompute = torch.is_grad_enabled() and inputs.numel() * config.n_layers > RECOMPUTE_ABOVE
    for block in transformer.blocks:
        given = (x, rotary, dense_attention, None)
        x = checkpoint(block, *given, use_reentrant=False) if recompute else block(*given)
    return transformer.ln_f(model.telling(x))


def compile_blocks(model: MaskedDiffusionLM) -> None:
    """Compile the code of a block once, for all blocks and lengths, and not six times in one."""
    for block in model.transformer.blocks:
        block.compile(dynamic=True)


def first_rows(batch: Batch, count: int) -> Batch:
    """Up to two rows of a batch; of one with a single row, that row twice."""
    tokens, regions, source = (np.concatenate([array, array])[:count] for array in batch[:3])
    return Batch(tokens, regions, source, batch.stage)


def exact_matches(right: Tensor, regions: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Per row and answer number [B, MAX_ANSWERS]: all tokens right, and whether that answer exists."""
    number = (regions.long() - FIRST_ANSWER).clamp(min=0)
    shape = (regions.shape[0], MAX_ANSWERS)
    total = torch.zeros(shape, device=regions.device).scatter_add_(1, number, answer.float())
    good = torch.zeros(shape, device=regions.device).scatter_add_(1, number, (right & answer).float())
    return (good == total) & (total > 0), total > 0


class Scores:
    """Rates by source, summed on the GPU and read rarely."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(len(SOURCES), 2, device=device)

    def add(self, good: Tensor, total: Tensor, source: Tensor) -> None:
        """good, total [B, any] bool or numbers; source [B]."""
        self.counts.index_add_(0, source, torch.stack([good.float().sum(1), total.float().sum(1)], dim=1))

    def read(self, ranks: Ranks) -> dict[str, float]:
        """Rates since the last reading, of all ranks."""
        good, total = add_up(ranks, self.counts).T.tolist()
        self.counts.zero_()
        return {name: round(g / t, 4) for name, g, t in zip(SOURCES, good, total, strict=True) if t}


def learning_rate(step: int, elapsed: float, arguments: argparse.Namespace) -> float:
    """Linear warm-up, constant, linear decay over the last `decay_share` of the time."""
    left = max(0.0, 1 - elapsed / arguments.seconds) / arguments.decay_share
    return float(arguments.learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS, left))


def open_model(arguments: argparse.Namespace, device: torch.device) -> MaskedDiffusionLM:
    """A fresh model for the tokenizer of the data, or the one to continue from."""
    if arguments.resume:
        model = MaskedDiffusionLM.from_pretrained(arguments.resume, dtype=torch.float32, device=device)
        longest = max(model.config.max_sequence_length, arguments.max_length)
        theta = arguments.rope_theta or model.config.rope_theta
        model.config = dataclasses.replace(model.config, max_sequence_length=longest, rope_theta=theta)
        return model
    tokenizer = load_tokenizer(arguments.data)
    end = tokenizer.token_to_id("<|endoftext|>")
    config = ModelConfig(
        d_model=arguments.width, n_heads=arguments.width // 64, n_layers=arguments.layers,
        mlp_hidden_size=2 * arguments.width, vocab_size=tokenizer.get_vocab_size(),
        mask_token_id=tokenizer.token_to_id("<|mask|>"), eos_token_id=end, pad_token_id=end, weight_tying=True,
        attention_layer_norm=True, max_sequence_length=arguments.max_length,
        rope_theta=arguments.rope_theta or 10_000.0,
    )  # fmt: skip
    return MaskedDiffusionLM(config).to(device)


def open_optimizer(model: MaskedDiffusionLM, arguments: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW, with weight decay for matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=arguments.learning_rate, betas=(0.9, 0.95), fused=arguments.device != "cpu",
    )  # fmt: skip


class Measured(NamedTuple):
    """Of one batch: parts of the loss [3], answers found at once and all there are [B, MAX_ANSWERS], next tokens that
    are right and all there are [B, T]."""

    parts: Tensor
    matched: Tensor
    answers: Tensor
    right: Tensor
    following: Tensor


def forward_backward(model: MaskedDiffusionLM, tokens: Tensor, regions: Tensor, corrupted: Corrupted) -> Measured:
    """Gradients of one batch."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        x = hidden_states(model, corrupted.inputs)
        selected = corrupted.answer | corrupted.text | corrupted.tail
        logits = model.transformer.head(x[selected])
    targets = tokens[selected]
    each = F.cross_entropy(logits.float(), targets, reduction="none")
    kinds = (corrupted.answer * corrupted.weight, corrupted.text.float(), corrupted.tail.float())
    parts = torch.stack([(each * kind[selected]).sum() / kind.sum().clamp(min=1e-3) for kind in kinds])
    (parts * parts.new_tensor(list(LOSS_WEIGHTS.values()))).sum().backward()
    with torch.no_grad():
        right = torch.zeros_like(selected)
        right[selected] = logits.argmax(-1) == targets
    matched, exists = exact_matches(right, regions, corrupted.answer)
    whole = corrupted.whole[:, None]
    return Measured(parts.detach(), matched & whole, exists & whole, right & corrupted.next, corrupted.next)


def train(arguments: argparse.Namespace) -> None:
    """The whole run."""
    ranks = Ranks("nccl" if arguments.device.startswith("cuda") else "gloo")
    torch.manual_seed(arguments.seed * 100 + ranks.rank)
    torch.set_float32_matmul_precision("high")
    device, out = ranks.device(arguments.device), Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    model = open_model(arguments, device)
    parameters = list(model.parameters())
    for parameter in parameters:  # a fresh model is drawn by every process
        parameter.data = add_up(ranks, parameter.data) / ranks.size
    optimizer = open_optimizer(model, arguments)
    if arguments.compile:
        compile_blocks(model)
    context = multiprocessing.get_context("spawn")
    stage, queue = context.Value("i", arguments.stage), context.Queue(maxsize=32)
    seeds = range(
        (arguments.seed * 64 + ranks.rank) * 1000, (arguments.seed * 64 + ranks.rank) * 1000 + arguments.workers
    )
    workers = [
        context.Process(
            target=make_batches, args=(arguments.data, seed, arguments.batch_tokens, stage, queue), daemon=True
        )
        for seed in seeds
    ]
    for worker in workers:
        worker.start()

    def measure(batch: Batch) -> tuple[Measured, Tensor]:
        arrays = (torch.from_numpy(array).to(device, non_blocking=True) for array in batch[:3])
        tokens, regions, source = (array.long() for array in arrays)
        corrupted = corrupt(tokens, regions, model.config.mask_token_id)
        return forward_backward(model, tokens, regions, corrupted), source

    if arguments.compile:  # before the clock starts; the second length may compile anew, and a row alone does
        for batch in (queue.get(), queue.get()):
            for rows in (2, 1):
                measure(first_rows(batch, rows))
        optimizer.zero_grad(set_to_none=True)
    start = saved = time.monotonic()
    history, overall, following, current = [], Scores(device), Scores(device), Scores(device)
    step, tokens_seen, stage_start, elapsed, losses = 0, 0, 0.0, 0.0, torch.zeros(3, device=device)
    recent: list[float] = []
    while elapsed < arguments.seconds:
        batch = queue.get()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, elapsed, arguments)
        measured, source = measure(batch)
        average_gradients(ranks, parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        overall.add(measured.matched, measured.answers, source)
        following.add(measured.right, measured.following, source)
        if batch.stage == stage.value:
            current.add(measured.matched, measured.answers, source)
        losses += measured.parts
        step += 1
        tokens_seen += batch.tokens.size * ranks.size
        if step % CHECK_EVERY:
            continue
        (elapsed,) = agree(ranks, [time.monotonic() - start], device)
        if stage.value < arguments.last_stage:
            rates = current.read(ranks)
            here = CURRICULUM[stage.value]
            judged = [rates[name] for name in JUDGED_BY.get(here.kind, ("document",)) if name in rates]
            recent = ([*recent, min(judged)] if judged else recent)[-2:]
            late = elapsed - stage_start > here.patience * arguments.seconds / 900
            if (len(recent) == 2 and min(recent) >= here.target) or late:
                if ranks.rank == 0:
                    print(f"stage {stage.value} ends at {elapsed:.0f} s, step {step}: {recent}", flush=True)
                stage.value += 1
                stage_start, recent = elapsed, []
        if step % 100 == 0:
            row = {
                "step": step, "seconds": round(elapsed, 1), "stage": stage.value, "tokens": tokens_seen,
                "loss": [round(value, 4) for value in (add_up(ranks, losses) / 100 / ranks.size).tolist()],
                "exact_match": overall.read(ranks), "next_token": following.read(ranks), "queued": queue.qsize(),
            }  # fmt: skip
            losses.zero_()
            history.append(row)
            if ranks.rank == 0:
                print(json.dumps(row), flush=True)
        if ranks.rank == 0 and time.monotonic() - saved > 90:
            saved = time.monotonic()
            save(model, arguments)
    if ranks.rank == 0:
        save(model, arguments)
        totals = {"processes": ranks.size, "steps": step, "tokens": tokens_seen, "history": history}
        found = provenance(shlex.join(["python", *sys.argv]), device)
        write_json({"arguments": vars(arguments), **totals, **found}, out / "training.json")
    for worker in workers:
        worker.terminate()
    leave_process_group()


def save(model: MaskedDiffusionLM, arguments: argparse.Namespace) -> None:
    """The checkpoint with its tokenizer, in LLaDA's layout."""
    model.save_pretrained(Path(arguments.out))
    shutil.copy(Path(arguments.data) / "tokenizer.json", Path(arguments.out) / "tokenizer.json")


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
    parser.add_argument("--workers", type=int, default=13, help="processes that draw batches, for each GPU")
    parser.add_argument(
        "--batch-tokens", type=int, default=TOKENS_PER_BATCH,
        help="tokens of a batch of the longest rows, on each GPU; batches of shorter ones have more",
    )  # fmt: skip
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--max-length", type=int, default=4096, help="the longest sequence, for config.json")
    parser.add_argument("--rope-theta", type=float, help="RoPE base (default: that of --resume, or 10000)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
