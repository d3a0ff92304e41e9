"""The options of the method (`BAAttConfig`) and where a model uses it (`Policy`).

Both are frozen and validated once, so code behind them never checks an option again. Tile sizes, warps and
other properties of a kernel are not options of the method and live in `baatt.kernels`.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from baatt.scores import SCORES
from baatt.stages.selection import BUDGETS
from baatt.stages.sorting import ORDERS
from baatt.types import as_float, kept_blocks

BLOCK_SIZES = (16, 32, 64, 128)
MOST = 2**30  # of tokens or blocks: the sum of two is an integer of 32 bits


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(as_float(value))


@dataclass(frozen=True)
class BAAttConfig:
    """The options of BA-Att.

    Block size, sparsity and beta are the paper's. Blocks are chosen by clusters, unsorted, the first one kept, which
    loses few answers on RULER (docs/ruler.md) and fits models with an attention sink (docs/real-weights.md).
    `preset("paper")` is the paper's own setting, exactly.

    Args:
        block_size: P, tokens per block of queries and of keys: 16, 32, 64 or 128.
        sparsity: share of key blocks skipped per query block, in [0, 1); K = max(1, ceil((1 - sparsity) * J)) (E7).
        sort: which side is sorted by norm (E2): "none", "q", "k" or "qk".
        segment: tokens per sorting segment, a multiple of `block_size`; None sorts the whole sequence.
        score: how a block pair is scored, a name in `baatt.scores.SCORES`.
        beta: weight of the covariance compensation (E5), at least 0; 0 scores by block means alone (E4).
        representatives: clusters of tokens that a block is remembered by (C1, C2), from 1 to 128; a block of fewer
            tokens has as many as tokens.
        refinements: rounds of Lloyd that move the clusters (C2), at least 0.
        peak: score by the cluster of queries that wants a key block most (C5); else by the mean over the queries.
        keep_first: key blocks from the front that are kept whatever their score (C6); they count in the budget.
        budget: who has a budget of blocks: "row" keeps K key blocks of every query block; "head" keeps as many block
            pairs in all, by one threshold over all query blocks of a head, and at least one of every query block.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside its range, or an unknown name.
    """

    # Metadata is for `baatt.lab.options`: what a field takes, and the word for None.
    block_size: int = field(default=128, metadata={"choices": BLOCK_SIZES})
    sparsity: float = 0.5
    sort: str = field(default="none", metadata={"choices": ORDERS})
    segment: int | None = field(default=256, metadata={"none": "whole"})
    score: str = field(default="clusters", metadata={"choices": SCORES})
    beta: float = 0.5
    representatives: int = 16
    refinements: int = 2
    peak: bool = True
    keep_first: int = 1
    budget: str = field(default="row", metadata={"choices": BUDGETS})

    @classmethod
    def preset(cls, name: str) -> "BAAttConfig":
        """The method's part of a named setting; ValueError if the name is not in `PRESETS`."""
        return _preset(name).config

    @property
    def values(self) -> tuple[Any, ...]:
        """All options in their order; can be read while a graph is being traced."""
        return tuple([getattr(self, name) for name in OPTION_TYPES])

    def kept_blocks(self, key_blocks: int) -> int:
        """K = max(1, ceil((1 - sparsity) * J)) (E7), of every query block or on average over those of a head."""
        return kept_blocks(self.sparsity, key_blocks)

    def __post_init__(self) -> None:
        if not _is_integer(self.block_size):
            raise TypeError(f"block_size must be an int, got {self.block_size!r}")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {list(BLOCK_SIZES)}, got {self.block_size}")
        for name in ("sparsity", "beta"):
            if not _is_number(getattr(self, name)):
                raise TypeError(f"{name} must be a finite number, got {getattr(self, name)!r}")
        if not 0 <= self.sparsity < 1:
            hint = f"; a share: {self.sparsity / 100:g} for {self.sparsity:g} %" if 2 <= self.sparsity < 100 else ""
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}{hint}")
        for name, known in (("sort", ORDERS), ("score", SCORES), ("budget", BUDGETS)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")
        if self.segment is not None and not _is_integer(self.segment):
            raise TypeError(f"segment must be an int or None, got {self.segment!r}")
        if self.segment is not None and (self.segment < 1 or self.segment % self.block_size):
            raise ValueError(f"segment must be a positive multiple of block_size={self.block_size}, got {self.segment}")
        if self.beta < 0:
            raise ValueError(f"beta must be at least 0, got {self.beta}")
        for name in ("sparsity", "beta"):
            if type(getattr(self, name)) not in (int, float):  # a number of numpy, which compilers take for a tensor
                object.__setattr__(self, name, float(getattr(self, name)))
        for name, least in (("representatives", 1), ("refinements", 0), ("keep_first", 0)):
            if not _is_integer(getattr(self, name)):
                raise TypeError(f"{name} must be an int, got {getattr(self, name)!r}")
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name, most in (("representatives", max(BLOCK_SIZES)), ("refinements", MOST), ("keep_first", MOST)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}")
        if not isinstance(self.peak, bool):
            raise TypeError(f"peak must be a bool, got {self.peak!r}")


#: Name of an option -> its type.
OPTION_TYPES: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(BAAttConfig)}


@dataclass(frozen=True)
class Policy:
    """Which calls of a model's attention stay dense, and how sparse single layers are.

    A file of `save` is a profile; `baatt evaluate fidelity --by-layer` measures one.

    Args:
        dense_layers: layer indices that stay dense; negative ones count from the last layer.
        layer_sparsity: (layer, sparsity) of the layers that have a sparsity of their own in place of the config's;
            layers as in `dense_layers`, none of them twice or dense.
        dense_steps: fraction of the denoising steps, counted from the first, that stay dense, in [0, 1].
        min_length: calls over fewer keys than this stay dense.
        min_queries: calls with fewer queries than this stay dense where they have more keys than queries, as when a
            cached block is denoised: summarising all keys for a few rows costs more than it saves. None = as few as
            pay by measurement, 128 on a CPU and 1024 elsewhere.
        only_self_attention: cross-attention stays dense. Where a model does not say which it is, a call with as many
            queries as keys counts as self-attention.
        recover_padding: models that drop their padding mask before attention (LLaDA's own code) get it back; False
            leaves them as they are.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside its range.
    """

    dense_layers: tuple[int, ...] = ()
    layer_sparsity: tuple[tuple[int, float], ...] = ()
    dense_steps: float = 0.0
    min_length: int = 0
    min_queries: int | None = None
    only_self_attention: bool = True
    recover_padding: bool = True

    @classmethod
    def preset(cls, name: str) -> "Policy":
        """The policy's part of a named setting; ValueError if the name is not in `PRESETS`."""
        return _preset(name).policy

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """The policy of a file that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError, TypeError: it holds something else.
        """
        try:
            stored = json.loads(Path(path).read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} must hold the JSON of Policy.save, got {error}") from None
        known = {one.name for one in dataclasses.fields(cls)}
        if not isinstance(stored, dict) or not stored.keys() <= known:
            raise ValueError(f"{path} must hold fields of Policy among {', '.join(sorted(known))}, got {stored!r:.200}")
        return cls(**{name: _as_tuple(value) for name, value in stored.items()})

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load` reads."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @property
    def named_layers(self) -> tuple[int, ...]:
        """Layers that differ from the others."""
        return *self.dense_layers, *(layer for layer, _ in self.layer_sparsity)

    def check_layers(self, layers: int) -> "Policy":
        """The same with layers counted from 0, for a model of `layers` layers; ValueError if it lacks one."""
        for layer in self.named_layers:
            if not -layers <= layer < layers:
                name = "dense_layers" if layer in self.dense_layers else "layer_sparsity"
                required = f"must lie in [{-layers}, {layers}) for {layers} layers"
                raise ValueError(f"policy.{name} {required}, got {layer}")
        dense = tuple(sorted({layer % layers for layer in self.dense_layers}))
        sparse = tuple((layer % layers, sparsity) for layer, sparsity in self.layer_sparsity)
        return dataclasses.replace(self, dense_layers=dense, layer_sparsity=sparse)

    def __post_init__(self) -> None:
        if not isinstance(self.dense_layers, tuple) or not all(_is_integer(layer) for layer in self.dense_layers):
            raise TypeError(f"dense_layers must be a tuple of ints, got {self.dense_layers!r}")
        pairs = self.layer_sparsity
        if not isinstance(pairs, tuple) or not all(
            isinstance(one, tuple) and len(one) == 2 and _is_integer(one[0]) and _is_number(one[1]) for one in pairs
        ):
            raise TypeError(f"layer_sparsity must be a tuple of (layer, sparsity), got {pairs!r}")
        for layer, sparsity in pairs:
            if not 0 <= sparsity < 1:
                raise ValueError(f"layer_sparsity must be in [0, 1), got {sparsity} for layer {layer}")
        if pairs and len(set(self.named_layers)) < len(self.named_layers):
            raise ValueError(f"layer_sparsity must name every layer once and none of dense_layers, got {pairs}")
        if not _is_number(self.dense_steps):
            raise TypeError(f"dense_steps must be a finite number, got {self.dense_steps!r}")
        if not 0 <= self.dense_steps <= 1:
            raise ValueError(f"dense_steps must be in [0, 1], got {self.dense_steps}")
        for name, words in (("min_length", "an int"), ("min_queries", "an int or None")):
            value = getattr(self, name)
            if not _is_integer(value) and not (value is None and words.endswith("None")):
                raise TypeError(f"{name} must be {words}, got {value!r}")
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        for name in ("only_self_attention", "recover_padding"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")


def _as_tuple(value: Any) -> Any:
    """What JSON makes lists of."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


class Preset(NamedTuple):
    """A named setting: what is sparse and how."""

    config: BAAttConfig
    policy: Policy


# Spelled out: a change of the defaults must not change a name.
_CLUSTERS = BAAttConfig(
    block_size=128, sparsity=0.5, sort="none", segment=256, score="clusters", beta=0.5, representatives=16,
    refinements=2, peak=True, keep_first=1, budget="row",
)  # fmt: skip
_PAPER = dataclasses.replace(_CLUSTERS, sort="qk", segment=1024, score="covariance", beta=0.5, keep_first=0)

#: Every named setting. "default" is `BAAttConfig()` and `Policy()`; "paper" is the paper's, with a segment of 1024
#: where it states none; "safe" keeps the first two layers dense; "fast" remembers a block by fewer clusters.
PRESETS = {
    "default": Preset(_CLUSTERS, Policy()),
    "paper": Preset(_PAPER, Policy()),
    "safe": Preset(_CLUSTERS, Policy(dense_layers=(0, 1))),
    "fast": Preset(dataclasses.replace(_CLUSTERS, representatives=8), Policy()),
}


def _preset(name: str) -> Preset:
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset must be one of {list(PRESETS)}, got {name!r}")
    return PRESETS[name]
