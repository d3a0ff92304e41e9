"""`baatt analyze patches`: which patches of a photo or clip a word of the answer reads, drawn over the pixels.

The small model that sees is asked one question; the picture shows dense attention of the first word of its answer, and
the patches that each setting reads. What the layer computed can be kept for the other studies.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console

from baatt.assets import VISION, shipped_vision_model
from baatt.attention import make_plan
from baatt.cli.errors import UsageError
from baatt.cli.options import (
    add_model_options,
    add_sparse_options,
    at_least,
    check_files,
    read_configs,
    read_place,
    seed,
)
from baatt.lab import loading
from baatt.lab.capture import save_capture
from baatt.lab.maps import compared
from baatt.lab.tables import percent
from baatt.lab.vision.media import PIXELS, read
from baatt.lab.vision.model import VisionModel
from baatt.lab.vision.patches import attention_of, capture_answer, draw_patches, sharpest_head
from baatt.lab.vision.scenes import ANSWER_WORDS, TASKS
from baatt.lab.vision.study import VisionReader, VisionSetup, lengths_of

SUMMARY = "Which patches of a photo or clip a word of the answer reads, over the pixels (Fig. 5)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which question, layer and head, and where to draw."""
    add = parser.add_argument
    add("--task", choices=list(TASKS), default="photo_number", help="(default: photo_number)")
    add("--frames", type=at_least(4), default=8, help="of a clip (default: 8)")
    add("--seed", type=seed, default=42, help="which question (default: 42)")
    add("--layer", type=at_least(0), default=1, help="(default: 1, an early one)")
    add("--head", type=at_least(0), help="query head (default: the one that looks at few patches most)")
    add("--plot", type=Path, default=Path("patches.png"), help="picture (default: patches.png)")
    add("--capture", type=Path, metavar="FILE", help="keep q, k and v of the layer for the other studies")
    add_sparse_options(parser, dense_layers=False, impl=False)
    add_model_options(parser, folder="that training/vision/understanding.py wrote")


def run(arguments: argparse.Namespace) -> None:
    """One question, one picture."""
    check_files(arguments, "capture", pictures=("plot",))
    arguments.impl = "auto"
    device = read_place(arguments)
    configs = compared(read_configs(arguments)[0])
    source = arguments.model or shipped_vision_model(VISION)
    model = VisionModel.load(source).to(device, loading.DTYPES[arguments.dtype])
    heads_there, layers_there = model.config.heads, model.config.layers
    for name, most in (("layer", layers_there), ("head", heads_there)):
        value = getattr(arguments, name)
        if value is not None and value >= most:
            raise UsageError(f"--{name} must be from 0 to {most - 1}, got {value}")
    try:
        reader = VisionReader(model, read(source / PIXELS), VisionSetup({}, seed=arguments.seed))
    except ImportError as error:
        raise UsageError(str(error)) from None
    (length,) = lengths_of(model, arguments.task, [arguments.frames])
    sample = reader.draw(arguments.task, length, 1)[0]
    pixels = sample.pixels.to(device, loading.DTYPES[arguments.dtype]) / 255
    captured = capture_answer(model, pixels, sample.question.words, [arguments.layer])
    about = {"model": source.name, "task": arguments.task, "dtype": arguments.dtype, **captured.about}
    if arguments.capture is not None:
        save_capture(captured._replace(about=about), arguments.capture)
    heads = captured.layers[arguments.layer].to(device).widened()
    plans = [make_plan(heads.q, heads.k, config, scale=captured.scale, impl="reference") for config in configs]
    token = heads.q.shape[2] - ANSWER_WORDS
    head = arguments.head
    if head is None:
        head = sharpest_head(attention_of(heads, captured.scale, token), length)
    question = " ".join(sample.question.words)
    caption = (
        f"{source.name}, layer {arguments.layer}, head {head}: “{question}”, the first word of the answer; what each "
        f"setting skips at {percent(configs[0].sparsity)} sparsity is dimmed"
    )
    with torch.inference_mode():
        draw_patches(pixels, heads, captured.scale, plans, head, token, caption, arguments.plot)
    console = Console(soft_wrap=True)
    console.print(f"Question: {question} {' '.join(sample.question.answer)}", highlight=False)
    console.print(f"Picture: {arguments.plot}, layer {arguments.layer}, head {head}", highlight=False)
    if arguments.capture is not None:
        console.print(f"Capture: {arguments.capture}", highlight=False)
