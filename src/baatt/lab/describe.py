"""Settings, scores, orders, dense layers and samplers in words: the one place that names them.

In: configs as they are stored, `dataclasses.asdict(config)`, {} for dense attention. Out: text for a table, a picture
or a line on the screen.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from baatt.config import BAAttConfig, Policy
from baatt.lab.tables import percent
from baatt.scores import SCORES

Config = Mapping[str, Any]

#: What older records do not say, because there was nothing else then.
NOT_STORED: Config = {"representatives": 16, "refinements": 2, "peak": True, "keep_first": 0, "budget": "row"}

#: Scores under the names that the papers give them.
TITLES = {
    "covariance": "BA-Att",
    "covariance-16": "BA-Att's score of runs of 16",
    "mean": "block means",
    "antidiagonal-8": "antidiagonal-8 (XAttention's)",
    "exact-peak": "oracle by its peak",
}


def read_config(stored: Config) -> BAAttConfig:
    """A stored config as what it was when it was stored, whatever the defaults are today."""
    return BAAttConfig(**{**NOT_STORED, **stored})


def order_name(order: Config) -> str:
    """`unsorted`, `qk in 1024`, `k in one segment`: which side is sorted by norm, in segments of how many tokens."""
    return "unsorted" if order["sort"] == "none" else f"{order['sort']} in {order['segment'] or 'one segment'}"


def score_name(config: Config) -> str:
    """`beta 0.5` for BA-Att's score, `16 clusters, first block kept`, else the name of the score."""
    name = f"beta {config['beta']:g}" if config["score"] == "covariance" else _clusters(config)
    return name + _kept(config)


def setting_name(config: Config, among: Sequence[Config] = ()) -> str:
    """`dense`; `qk in 1024, beta 0.5, 50 %`; with blocks that are not the usual ones `..., blocks of 16`.

    Args:
        among: all settings of a run: order, score and block size are left out where all sparse ones share them.
    """
    if not config:
        return "dense"
    parts = order_name(config), score_name(config), _blocks(config)
    others = [(order_name(one), score_name(one), _blocks(one)) for one in among if one]
    shared = [len(set(values)) == 1 for values in zip(*others, strict=True)] or [False] * len(parts)
    order, score, blocks = ("" if same else part for part, same in zip(parts, shared, strict=True))
    return ", ".join(part for part in (order, score, percent(config["sparsity"]), blocks) if part)


def differences(one: Config, among: Sequence[Config]) -> list[str]:
    """What `setting_name` does not tell: `beta 0` of other scores, `dense layers 0`, `cache dual`, where it differs.

    Args:
        one: a record or average of `baatt evaluate ruler`. among: all of its run.
    """
    config, sparse = one["config"], [other for other in among if other["config"]]
    parts = []
    betas = {other["config"]["beta"] for other in sparse if config and other["config"]["score"] == config["score"]}
    if len(betas) > 1 and config["score"] != "covariance":
        parts.append(f"beta {config['beta']:g}")
    if config and len({tuple(other["dense_layers"]) for other in sparse}) > 1:
        parts.append(f"dense layers {layers_name(one['dense_layers'])}")
    for name, value in one.get("sampler", {}).items():
        if len({other["sampler"][name] for other in among}) > 1:
            parts.append(f"{name} {value}")
    return parts


def selection_name(config: Config, dense_layers: Sequence[int]) -> str:
    """`BA-Att, k in 256, layers 0 and 1 dense`: how blocks are selected, whatever the sparsity.

    BA-Att's scores without their variance term are named so: `BA-Att's score of runs of 16 with beta 0, unsorted`.
    """
    layers = " and ".join(map(str, dense_layers))
    dense = f", layer{'s' if len(dense_layers) > 1 else ''} {layers} dense" if layers else ""
    without = " with beta 0" if config["score"].startswith("covariance") and config["beta"] == 0 else ""
    name = TITLES.get(config["score"], _clusters(config)) + without + _kept(config)
    return f"{name}, {order_name(config)}{dense}"


def layers_name(layers: Sequence[int]) -> str:
    """`0, 1`, or `none`."""
    return ", ".join(map(str, layers)) or "none"


def options_text(config: BAAttConfig, policy: Policy) -> str:
    """One line with every option of the method that is read, and the dense layers."""
    unread = {name for score in SCORES.values() for name in score.options} - {*SCORES[config.score].options}
    unread |= {"segment"} if config.sort == "none" else set()
    read = ((name, value) for name, value in dataclasses.asdict(config).items() if name not in unread)
    options = ", ".join(f"{name}={value}" for name, value in read)
    return f"{options}; dense layers: {layers_name(policy.dense_layers)}"


def settings_text(header: Config, records: Sequence[Config]) -> str:
    """Of a summary of `baatt evaluate ruler`: how samples are answered, on a second line what sparse settings share."""
    how = f"{sampler_text(header['sampler'])}, batches of {header['batch_size']}"
    text = f"Answers: {how}{', chat template' if header['chat'] else ''}; weights in {header['dtype']}."
    sparse = [one for one in records if one["config"]]
    configs = [one["config"] for one in sparse]
    columns = (
        [order_name(one) for one in configs],
        [score_name(one) for one in configs if one["score"] == "covariance"],
        [f"blocks of {one['block_size']}" for one in configs],
        [f"layers that stay dense: {layers_name(one['dense_layers'])}" for one in sparse],
    )
    shared = [values[0] for values in columns if len(set(values)) == 1]
    return f"{text}\nSparse: {', '.join(shared)}." if shared else text


def sampler_text(sampler: Config) -> str:
    """`64 steps for 32 tokens in blocks of 32, threshold 0.9, cache none`."""
    sure = "no threshold" if sampler["threshold"] is None else f"threshold {sampler['threshold']:g}"
    order = sampler.get("remasking", "low_confidence")
    filled = "" if order == "low_confidence" else f"{order.replace('_', ' ')}, "
    penalty = sampler.get("repetition_penalty", 1)
    filled += "" if penalty == 1 else f"repetition penalty {penalty:g}, "
    blocks = f"{sampler['gen_length']} tokens in blocks of {sampler['block_length']}"
    return f"{sampler['steps']} steps for {blocks}, {filled}{sure}, cache {sampler['cache']}"


def _clusters(config: Config) -> str:
    """`8 clusters, mean over queries`, what differs from the defaults; of another score its name."""
    if config["score"] not in ("clusters", "clusters-variance"):
        return str(config["score"])
    spread = f" with their variance, beta {config['beta']:g}" if config["score"] == "clusters-variance" else ""
    rounds = "" if config["refinements"] == 2 else f", refinements {config['refinements']}"
    number = f"{config['representatives']} cluster{'' if config['representatives'] == 1 else 's'}"
    return f"{number}{spread}{rounds}{'' if config['peak'] else ', mean over queries'}"


def _kept(config: Config) -> str:
    """What else decides which blocks are kept."""
    found = {**NOT_STORED, **config}
    first, shared = found["keep_first"], found["budget"] == "head"
    kept = {0: "", 1: ", first block kept"}.get(first, f", first {first} blocks kept")
    return f"{kept}, one budget a head" if shared else kept


def _blocks(config: Config) -> str:
    return "" if config["block_size"] == BAAttConfig().block_size else f"blocks of {config['block_size']}"
