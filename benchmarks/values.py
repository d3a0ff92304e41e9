"""Numbers of the prose: `<!--=NAME WORDS-->97.1<!--/-->` in a Markdown file holds what `VALUES[NAME]` makes of WORDS.

A function here is given `read`, which returns a stored result by the name of its file, and the words, and returns the
text between the marks. `render.py` fills them in and `render.py --check` compares them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import card_tables
import pixel_values
import study_values
from ruler_tables import beyond
from tables import share_of

Record = Mapping[str, Any]
Read = Callable[[str], Record]

GRIDS = (
    *("ruler_grid_4096", "ruler_grid_long", "ruler_grid_safe_16384", "ruler_grid_finer_8192"),
    *("ruler_clusters", "ruler_clusters_16384", "ruler_first_4096", "ruler_first_8192", "ruler_free"),
    *("ruler_options_8192", "ruler_ablations"),
)
#: Of the model grown from SmolLM2.
SMOLLM2_GRIDS = tuple(f"ruler_smollm2_{part}" for part in ("4096", "8192", "free_4096", "free_8192"))
#: Tasks of RULER that an average needs: all that need no data set, the needles among them, or the three of the
#: ablations, which are asked nothing else; else the words name one task.
TASK_COUNTS = {"all": 11, "needles": 8, "hard": 3}
#: Where the times of an operator are stored, the latest last; "earlier": what the prose compares some of them with.
OPERATORS = {
    "covariance": ("gpu_operator_h200",),
    "clusters": tuple(f"gpu_clusters{part}_h200" for part in ("_first", "", "_counted")),
    "earlier": ("gpu_clusters_first_h200",),
    "causal": ("gpu_causal_h200",),
}
#: Short names of settings of training/evaluate.py.
NEEDLE_SETTINGS = {
    "dense": "dense",
    "safe": "sort=k,segment=256,dense_layers=0+1",
    "longer": "sort=k,segment=1024,dense_layers=0+1",
    "paper": "sort=qk,segment=1024",
}


def ruler_score(
    read: Read, setting: str, sparsity: str, lengths: str, tasks: str = "all", *, grids: Sequence[str] = GRIDS
) -> str:
    """RULER's score in percent, averaged over tasks: `score safe 50% 4096,8192`, `score safe 50% 16384 needles`."""
    return _joined(_average(read, setting, length, share_of(sparsity), tasks, grids) for length in _numbers(lengths))


def ruler_loss(
    read: Read, setting: str, sparsity: str, lengths: str, tasks: str = "all", *, grids: Sequence[str] = GRIDS
) -> str:
    """Points that a setting loses against dense attention on the same samples: `loss safe 50% 4096,8192`."""
    return _joined(
        _average(read, setting, length, 0, tasks, grids)
        - _average(read, setting, length, share_of(sparsity), tasks, grids)
        for length in _numbers(lengths)
    )


def ruler_beyond(
    read: Read,
    setting: str,
    other: str,
    sparsity: str,
    length: str,
    tasks: str = "all",
    *,
    grids: Sequence[str] = GRIDS,
) -> str:
    """Points beyond another setting on the samples that both answered: `beyond keep-first-0 clusters 90% 8192`."""
    both = [_records(read, name, int(length), share_of(sparsity), tasks, grids) for name in (setting, other)]
    count = min(len(each["scores"]) for records in both for each in records)
    return beyond(*([{"scores": each["scores"][:count]} for each in records] for records in both))


def lowest_score(read: Read, tasks: str) -> str:
    """The task with the lowest score of dense attention and its interval: `lowest needles`."""
    records = read("ruler_needle-18m")["records"]
    one = min((one for one in records if tasks == "all" or _is_needle(one)), key=lambda one: float(one["accuracy"]))
    interval = f"{100 * one['ci_low']:.1f}-{100 * one['ci_high']:.1f}"
    return f"`{one['task']}` at {one['length']:,} tokens, {100 * one['accuracy']:.1f} ({interval})"


def word_for_word(read: Read, setting: str, task: str | None = None) -> str:
    """Answers of the first checkpoint that are the expected text: `word_for_word safe niah_multivalue`."""
    return _answers(read, "trained_format", setting, task)


def every_value(read: Read, setting: str, task: str | None = None) -> str:
    """Answers of the first checkpoint that contain every value, RULER's measure: `every_value safe`."""
    return _answers(read, "accuracy", setting, task)


def operator_gain(read: Read, length: str, sparsity: str, baseline: str, setting: str = "covariance") -> str:
    """Times as fast as dense attention, of gpu_bars.py: `operator_gain 131072 90% cudnn causal`."""
    score = "covariance" if setting == "covariance" else "clusters"
    wanted = "operator", score, int(length), share_of(sparsity)
    for stored in reversed(OPERATORS[setting]):
        for one in read(stored)["records"]:
            # The options of today's default; the paper's setting was stored before there were any.
            usual = one["config"].get("budget", "row") == "row" and one["config"].get("representatives", 16) == 16
            found = one["what"], one["config"]["score"], one["shape"][2], one["sparsity"]
            if found == wanted and usual and one["speedup"]:
                return f"{one['speedup'][baseline]:.1f}"
    raise LookupError(f"{OPERATORS[setting]} have no operator of {setting} at {length} tokens and {sparsity}")


def head_cost(read: Read, lengths: str) -> str:
    """How much longer budgets of a head take than budgets of rows, in percent: `head_cost 4096,16384`."""
    found: dict[int, float] = {}
    for one in (one for stored in OPERATORS["clusters"] for one in read(stored)["records"]):
        if "budget-row" in one["speedup"]:
            found[one["shape"][2]] = 100 * (1 / one["speedup"]["budget-row"] - 1)
    return _joined(found[length] for length in _numbers(lengths))


def frontier_gain(read: Read, setting: str, length: str, sparsity: str) -> str:
    """Times as fast as cuDNN's dense attention, of frontier.py: `frontier_gain clusters 16384 70%`."""
    for one in read("frontier_h200")["records"]:
        if (one["case"].rpartition("-")[0].rpartition("-")[0], one["shape"][2], one["sparsity"]) == (
            setting,
            int(length),
            share_of(sparsity),
        ):
            return f"{one['speedup']['cudnn']:.1f}"
    raise LookupError(f"frontier_h200 has no {setting} at {length} tokens and {sparsity}")


def chooser_gain(read: Read) -> str:
    """Times as fast as the fastest way to choose blocks as XAttention does, over all lengths and sparsities."""
    gains = [
        min(gain for name, gain in one["speedup"].items() if name.startswith("xattention"))
        for one in read("gpu_choosers_h200")["records"]
    ]
    return f"{min(gains):.1f} to {max(gains):.1f}"


def cpu_gain(read: Read, sparsity: str) -> str:
    """Times as fast as PyTorch's dense attention on a processor, with the default: `cpu_gain 50%`."""
    for one in read("cpu_clusters")["records"]:
        if one["sparsity"] == share_of(sparsity):
            return f"{one['speedup']['dense']:.1f}"
    raise LookupError(f"cpu_clusters has no {sparsity}")


def causal_blocks(read: Read, what: str) -> str:
    """By how much causal blocks of 32 are slower than of 1 over all lengths: their `stages` alone, or the whole `call`,
    in turns."""
    records = read("gpu_causal_h200")["records"]
    stages = {(one["shape"][2], one["causal"]): sum(one["stage_ms"].values()) for one in records}
    costs = [
        1 / one["speedup"]["causal-1"] if what == "call" else stages[length, 32] / stages[length, 1]
        for one in records
        if one["causal"] == 32 and (length := one["shape"][2])
    ]
    return f"{100 * (min(costs) - 1):+.1f} to {100 * (max(costs) - 1):+.1f}"


def decoding_rate(read: Read, cache: str, attention: str) -> str:
    """Tokens per second without a threshold: `decoding_rate dual sparse`."""
    return f"{_rate(read, cache, attention):.0f}"


def decoding_gain(read: Read, cache: str, attention: str) -> str:
    """How many times the tokens per second of dense attention without a cache: `decoding_gain dual dense`."""
    return f"{_rate(read, cache, attention) / _rate(read, 'none', 'dense'):.2f}"


def real_digits(read: Read, *words: str) -> str:
    """Digits that SmolLM2 predicts right, in percent: `real_digits clusters-16 70% kept`, `real_digits dense`."""
    return f"{100 * _real(read, *words)['digits']:.1f}"


def real_divergence(read: Read, *words: str) -> str:
    """KL of SmolLM2 to itself with dense attention: `real_kl mean 70% free`, without the first block; beta last."""
    return f"{_real(read, *words)['kl']:.3f}"


def fidelity_digits(read: Read, *words: str) -> str:
    """Digits that causal SmolLM2 recalls, in percent: `fidelity_digits clusters 70%`, also `dense`, `profile 90%`."""
    return f"{100 * _fidelity(read, *words)['recalled']:.1f}"


def fidelity_numbers(read: Read, *words: str) -> str:
    """Numbers that it recalls whole, in percent."""
    return f"{100 * _fidelity(read, *words)['recalled_whole']:.1f}"


def fidelity_divergence(read: Read, *words: str) -> str:
    """KL of it to itself with dense attention: `fidelity_kl exact 90% 4096`."""
    return f"{_fidelity(read, *words)['kl']:.3f}"


def smollm2_questions(read: Read) -> str:
    """Of the simple questions, how many the model grown from SmolLM2 answers rightly: `40 of 50`."""
    measured = read("training/smollm2_bars")
    return f"{measured['questions_right']} of {len(measured['questions'])}"


def smollm2_read(read: Read, tokens: str) -> str:
    """Of statements in documents of so many tokens, how many it finds: `smollm2_read 3000` is `40 of 40`."""
    found = read("training/smollm2_bars")[f"read_{tokens}"]
    return f"{found['right']} of {len(found['answers'])}"


def smollm2_masked(read: Read, hidden: str) -> str:
    """Hidden tokens of held-out prose that it tells rightly, in percent: `smollm2_masked 15%`."""
    return f"{100 * read('training/smollm2_bars')['text'][f'accuracy_at_{share_of(hidden):g}']:.0f}"


def smollm2_bound(read: Read, whose: str) -> str:
    """Nats a token of that prose: `smollm2_bound own`, its bound, or `smollm2_bound base`, the base's loss."""
    names = {"own": "bound_per_token", "base": "base_loss_per_token"}
    return f"{read('training/smollm2_bars')['text'][names[whose]]:.2f}"


def smollm2_ruler(read: Read, length: str, tasks: str) -> str:
    """Its dense RULER score in percent: `smollm2_ruler 4096 needles`, also `all` and `others`."""
    found = card_tables.scores(read("training/smollm2_ruler"), int(length))
    some = card_tables.needles(found)
    chosen = {"needles": some, "all": found, "others": {task: x for task, x in found.items() if task not in some}}
    return _joined([sum(chosen[tasks].values()) / len(chosen[tasks])])


def _numbers(lengths: str) -> list[int]:
    return [int(length) for length in lengths.split(",")]


def _joined(numbers: Iterable[float]) -> str:
    """`62.1, 65.3 and 61.2`."""
    *most, last = (f"{abs(number) if round(number, 1) == 0 else number:.1f}" for number in numbers)
    return f"{', '.join(most)} and {last}" if most else last


def _is_needle(one: Record) -> bool:
    return bool(one["task"].startswith("niah_"))


def _average(read: Read, setting: str, length: int, sparsity: float, tasks: str, grids: Sequence[str] = GRIDS) -> float:
    """In percent."""
    found = _records(read, setting, length, sparsity, tasks, grids)
    return float(100 * sum(one["accuracy"] for one in found) / len(found))


def _records(
    read: Read, setting: str, length: int, sparsity: float, tasks: str, grids: Sequence[str] = GRIDS
) -> list[Record]:
    """Of the first grid in which the setting has all tasks."""
    for grid in map(read, grids):
        chosen = [each for name, each in grid["settings"].items() if setting in (name, "dense")]
        for each in chosen:
            found = [
                one
                for one in each["records"]
                if one["length"] == length
                and one["config"].get("sparsity", 0) == sparsity
                and (tasks in ("all", "hard", one["task"]) or (tasks == "needles" and _is_needle(one)))
            ]
            if len(found) == TASK_COUNTS.get(tasks, 1):
                return found
    raise LookupError(f"no grid has {tasks} tasks of {setting} at {length} tokens and sparsity {sparsity:g}")


def _answers(read: Read, measure: str, setting: str, task: str | None) -> str:
    found = [
        round(one[measure] * one["n"])
        for one in read("needles_sparse_h200")["records"]
        if one["setting"] == NEEDLE_SETTINGS[setting] and task in (None, one["task"])
    ]
    if not found:
        raise LookupError(f"needles_sparse_h200 has no {setting} {task}")
    return str(sum(found))


def _real(read: Read, setting: str, sparsity: str = "0%", first: str = "kept", beta: str = "0.5") -> Record:
    wanted = {"sparsity": share_of(sparsity), "keep_first": {"kept": 1, "free": 0}[first], "beta": float(beta)}
    for one in read("real_weights_smollm2")["records"]:
        if one["setting"] == setting and wanted.items() <= (one["config"] or wanted).items():
            return one
    raise LookupError(f"real_weights_smollm2 has no {setting} at {sparsity}, first block {first}, beta {beta}")


def _fidelity(read: Read, setting: str, sparsity: str = "0%", length: str = "8192") -> Record:
    stored = "fidelity_profile" if setting == "profile" else "fidelity_smollm2"
    for one in read(stored)["records"]:
        name = "profile" if one["name"] else one["config"].get("score", "dense")
        if (name, round(one["config"].get("sparsity", 0), 2), one["length"]) == (
            setting,
            share_of(sparsity),
            int(length),
        ):
            return one
    raise LookupError(f"{stored} has no {setting} at {length} tokens and {sparsity}")


def _rate(read: Read, cache: str, attention: str) -> float:
    for one in read("decoding_h200")["records"]:
        if (one["cache"], one["attention"], one["threshold"]) == (cache, attention, None):
            return float(one["tokens_per_second"])
    raise LookupError(f"decoding_h200 has no {cache} {attention} without a threshold")


#: By the first word between the marks.
VALUES: dict[str, Callable[..., str]] = {
    "score": ruler_score,
    "loss": ruler_loss,
    "beyond": ruler_beyond,
    "smollm2_loss": partial(ruler_loss, grids=SMOLLM2_GRIDS),
    "smollm2_beyond": partial(ruler_beyond, grids=SMOLLM2_GRIDS),
    "lowest": lowest_score,
    "word_for_word": word_for_word,
    "every_value": every_value,
    "head_cost": head_cost,
    "operator_gain": operator_gain,
    "frontier_gain": frontier_gain,
    "chooser_gain": chooser_gain,
    "cpu_gain": cpu_gain,
    "causal_blocks": causal_blocks,
    "fidelity_digits": fidelity_digits,
    "fidelity_numbers": fidelity_numbers,
    "fidelity_kl": fidelity_divergence,
    "real_digits": real_digits,
    "real_kl": real_divergence,
    "smollm2_questions": smollm2_questions,
    "smollm2_read": smollm2_read,
    "smollm2_masked": smollm2_masked,
    "smollm2_bound": smollm2_bound,
    "smollm2_ruler": smollm2_ruler,
    "decoding_rate": decoding_rate,
    "decoding_gain": decoding_gain,
    **pixel_values.VALUES,
    **study_values.VALUES,
}
