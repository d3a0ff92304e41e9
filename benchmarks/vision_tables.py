"""Tables of the two small models on real pixels: how they were trained, Table 8 in three columns, and generated clips.

In: `training.json` of a run, summaries of `baatt evaluate vision` and of RULER with the same settings, records of
`baatt evaluate video`. Out: Markdown. Scores are printed as in the tables of RULER.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import paper
from case import Block, Case
from ruler_tables import score_and_difference
from tables import block, device_text, source

from baatt.cli.ruler_report import score
from baatt.lab.describe import selection_name
from baatt.lab.records import short_commit
from baatt.lab.tables import MISSING, Record, Table, percent

#: Of the compensation, in the paper.
USUAL_BETA = 0.5
#: Columns of Table 8, and the averages that fill them.
KINDS = {"clips": "questions about clips", "photos": "questions about photos", "words": "RULER, 4096 tokens"}
#: Pictures of docs/pixels.md.
PICTURES = {
    "vision_maps.png": "Attention of layer 1 while the model reads a photo: in its order, and with queries and keys "
    "sorted by norm in segments of 1024; what BA-Att skips at 50 % is dimmed",
    "vision_patches.png": "What the first word of the answer looks at, and the patches that its block reads at 50 %: "
    "by BA-Att in the paper's setting, by clusters, and by an oracle that knows the attention",
}
FILMS = {
    f"video_{seed}.png": f"Frames of a clip from noise {seed}: dense attention, the paper's setting, the default, both "
    "at 50 %"
    for seed in (1, 8)
}
#: Of a table of clips the orders by name.
ORDERS = {"none": "order of the model"}


def table_8(records: Sequence[Record]) -> str:
    """The paper's Table 8 on small models: a row for each setting, a column for each kind of question."""
    found: dict[str, dict[str, Record]] = {}
    configs: dict[str, Record] = {}
    for kind, config, average in averages_of(records):
        key = json.dumps(config)
        found.setdefault(key, {})[kind] = average
        configs[key] = config
    rows = []
    for key, config in configs.items():
        cells = [found[key].get(kind) for kind in KINDS]
        texts = [MISSING if one is None else (score_and_difference(one) if config else score(one)) for one in cells]
        rows.append([name_of(config), *texts, papers_row(config)])
    pixels, words = (next(one for one in records if one["study"] == study) for study in ("vision", "ruler"))
    counts = ", ".join(
        f"{kind} n = {sum(one['n'] for one in asked)}"
        for kind, asked in {
            **{kind: of_task(pixels, pixels["averages"][kind][0]["tasks"]) for kind in ("clips", "photos")},
            "RULER": of_task(words, words["averages"][0]["tasks"]),
        }.items()
    )
    caption = (
        "Right answers in percent [95 % interval], averages over the tasks of a kind; after the semicolon the "
        f"difference to dense attention on the same questions [95 % interval]. {counts}; clips of "
        f"{pixels['frames'][0]} frames, `{pixels['model']}`; RULER: `{words['model']}`. Every layer sparse. The "
        "paper's: VideoMME; RealWorldQA; RULER at 4K, in percent, of models that are a thousand times as large."
    )
    return block(list(records), ("setting", *KINDS.values(), "the paper's"), rows, caption)


def averages_of(records: Sequence[Record]) -> Iterator[tuple[str, Record, Record]]:
    """Kind, config and average of every setting, dense attention once."""
    for one in records:
        kinds = one["averages"] if one["study"] == "vision" else {"words": one["averages"]}
        for kind, settings in kinds.items():
            for setting in settings:
                yield kind, setting["config"], setting["by_length"][0]


def of_task(record: Record, tasks: Sequence[str]) -> list[Record]:
    """The records of dense attention to tasks."""
    return [one for one in record["records"] if one["task"] in tasks and not one["config"]]


def name_of(config: Record) -> str:
    """`BA-Att, qk in 1024, beta 0.1, 50 %`."""
    if not config:
        return "dense"
    beta = f", beta {config['beta']:g}" if config["score"] == "covariance" else ""
    return f"{selection_name({**config, 'beta': USUAL_BETA}, ())}{beta}, {percent(config['sparsity'])}"


def papers_row(config: Record) -> str:
    """What the paper has for the setting that it published."""
    if not config or config["score"] != "covariance" or config["sort"] == "none":
        return MISSING
    return "; ".join(f"{value:.2f}" for value in (*paper.PIXELS[config["beta"]], paper.BETA[config["beta"]]))


def tasks(records: Sequence[Record]) -> str:
    """A row for each task, a column for each setting; of the weights of the compensation the paper's default."""
    configs = {json.dumps(one["config"]): one["config"] for record in records for one in record["records"]}
    shown = {key: one for key, one in configs.items() if one.get("score") != "covariance" or one["beta"] == USUAL_BETA}
    found = {(one["task"], json.dumps(one["config"])): one for record in records for one in record["records"]}
    rows = [
        [f"`{task}`", *(score(found[task, key]) for key in shown)]
        for task in dict.fromkeys(one["task"] for one in records[0]["records"])
    ]
    caption = (
        f"Right answers in percent [95 % interval], n = {records[0]['count']} each; clips of {records[0]['frames'][0]} "
        "frames. Both words must be right."
    )
    return block(list(records), ("task", *map(name_of, shown.values())), rows, caption)


def training(record: Record) -> str:
    """How a model was trained, and what it does with pixels that it has not seen."""
    told = record["arguments"]
    rows = [
        ("parameters", f"{record['parameters']:,}"),
        ("steps", f"{record['step']:,}"),
        ("seconds", f"{record['seconds']:,.0f} on {device_text(record['device'])}"),
        ("tokens of a batch, at most", f"{told['batch_tokens']:,}"),
        ("learning rate", f"{told['learning_rate']:g}, half a cosine"),
        ("learning had begun after", f"{record['begun']:.0f} s" if "begun" in record else "never"),
    ]
    for one in record.get("stages", ()):
        worst = "" if one["worst"] is None else f", worst task {percent(one['worst'], 1)}"
        rows.append((f"stage {one['stage']} ended after", f"{one['ended']:.0f} s{worst}"))
    held = record["held_out"]
    if isinstance(held, dict):
        rows += [(f"held out, `{name}`", percent(share, 1)) for name, share in held.items()]
    else:
        rows.append(("loss on held-out starts", f"{held:.4f}"))
    command = f"Command: `{record['command']}`, commit {short_commit(record['commit'])}."
    return "\n\n".join([Table(("", ""), rows).markdown(), command])


def figures(_: Sequence[Record], *, names: dict[str, str]) -> str:
    """Pictures of docs/figures that a session drew, with what they show: once its results are there."""
    return "\n\n".join(f"![{text}](figures/{file})\n\n*{text}.*" for file, text in names.items())


def clips(record: Record) -> str:
    """Generated clips beside the dense ones: a table for each share of dense steps, a row for each way to choose
    blocks, a column for each sparsity."""
    parts = []
    for dense_steps in sorted({one["dense_steps"] for one in record["records"]}):
        here = [one for one in record["records"] if one["dense_steps"] == dense_steps]
        sparsities = sorted({one["sparsity"] for one in here})
        rows: dict[tuple[str, str], dict[float, Record]] = {}
        for one in here:
            rows.setdefault((one["method"], one["tiles"]), {})[one["sparsity"]] = one
        header = ("blocks chosen by", "tiles", *map(percent, sparsities))
        lines = [
            [method, ORDERS.get(tiles, tiles), *(likeness(some.get(sparsity)) for sparsity in sparsities)]
            for (method, tiles), some in rows.items()
        ]
        title = f"The first {percent(dense_steps)} of the steps dense:" if dense_steps else "Every step sparse:"
        parts += [title, Table(header, lines).markdown()]
    first: Any = record["records"][0]
    caption = (
        f"PSNR in dB [95 % bootstrap interval over clips]; SSIM; MS-SSIM, of {len(first['clips'])} clips to the dense "
        f"sample from the same noise; {record['steps']} steps, {' x '.join(map(str, record['tokens']))} tokens, "
        f"weights in {record['dtype']}. Tiles: frames, rows and columns of tokens of a block."
    )
    return "\n\n".join([*parts, caption, source(record)])


def likeness(one: Record | None) -> str:
    """`24.1 [23.0-25.2]; 0.81; 0.93`."""
    if one is None:
        return MISSING
    return f"{one['psnr']:.1f} [{one['psnr_low']:.1f}-{one['psnr_high']:.1f}]; {one['ssim']:.2f}; {one['ms_ssim']:.3f}"


#: What was asked of the small model that sees, and of RULER beside it.
TABLE_8 = ("paper", "unsorted", "clusters")
PIXELS, WORDS = (tuple(f"vision_{part}{name}.json" for name in TABLE_8) for part in ("", "ruler_"))
#: Of clips of 72 frames, the longest.
LONG = ("vision_72_clusters.json", "vision_72_paper.json")
SESSION = "python training/vision/session.py start --seconds 700 --training 0 --shipped"
CASES = {
    "vision": Case(
        "Table 8 in three columns: questions about clips and photos to the small model that sees, and RULER",
        SESSION,
        (*PIXELS, *LONG, *WORDS, "training/understanding.json"),
        {
            "vision_table_8": Block(table_8, PIXELS + WORDS, together=True),
            "vision_tasks": Block(tasks, PIXELS, together=True),
            "vision_long": Block(tasks, LONG, together=True),
            "vision_figures": Block(partial(figures, names=PICTURES), ("training/understanding.json",)),
            "vision_training": Block(training, ("training/understanding.json",)),
        },
    ),
    "video": Case(
        "clips of the small video model, sparse beside dense from the same noise: PSNR, SSIM, MS-SSIM",
        SESSION,
        ("video.json", "training/video.json"),
        {
            "video_clips": Block(clips, ("video.json",)),
            "video_figures": Block(partial(figures, names=FILMS), ("training/video.json",)),
            "video_training": Block(training, ("training/video.json",)),
        },
    ),
}
