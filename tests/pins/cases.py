"""What is pinned: hand-picked cases with odd shapes, each run by name to the numbers it gives.

`run(name, seed, noise)` gives named tensors. Inputs are sums of random integers, so they are the same on every machine;
with noise they are shaken by that share, which shows what does not depend on the last bits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.pins import calls

Observed = dict[str, Tensor]


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    """Bell-shaped numbers in float64 that no machine rounds differently."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, (4, *shape), generator=generator).sum(0).double() / 2**15


def shaken(x: Tensor, noise: float, seed: int) -> Tensor:
    """x, every entry off by about that share, in float32 at least."""
    if noise == 0:
        return x
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (1 + noise * draw(tuple(x.shape), seed + 7)).to(x.dtype)


# --- the operator ----------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """Shapes B, H, G, N, M, D, the dials, and what is masked: "", "keys", "both" (self-attention), "entry"."""

    shape: tuple[int, int, int, int, int, int]
    dials: dict[str, Any]
    masked: str = ""
    dtype: torch.dtype = torch.float32
    scale: float | None = None

    def tensors(self, seed: int, noise: float) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """q, k, v and the masks; masked keys hold NaN."""
        batch, heads, groups, queries, keys, channels = self.shape
        kinds = ((heads, queries), (groups, keys), (groups, keys))
        q, k, v = (
            shaken(draw((batch, h, n, channels), 10 * seed + i).to(self.dtype), noise, 100 * seed + i)
            for i, (h, n) in enumerate(kinds)
        )
        key_mask = query_mask = None
        if self.masked:
            key_mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) < 0.8
            key_mask[0, : keys // 3] = False  # left padding
            if self.masked == "entry":
                key_mask[-1] = False
            if self.masked == "both":
                query_mask = key_mask
            k, v = (x.masked_fill(~key_mask[:, None, :, None], torch.nan) for x in (k, v))
        return q, k, v, {"key_mask": key_mask, "query_mask": query_mask}


def dials(block_size: int, sparsity: float, sort: str, segment: int | None, beta: float = 0.5) -> dict[str, Any]:
    return {"block_size": block_size, "sparsity": sparsity, "sort": sort, "segment": segment, "beta": beta}


#: The score and the first block of `BAAttConfig()`.
CLUSTERS = {"score": "clusters", "representatives": 4, "refinements": 2, "peak": True, "keep_first": 1}
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64

OPERATOR = {
    "one token": Call((1, 1, 1, 1, 1, 8), dials(16, 0.5, "k", 16)),
    "one block": Call((1, 2, 1, 13, 9, 8), dials(16, 0.9, "qk", None)),
    "unsorted": Call((2, 4, 2, 77, 77, 16), dials(16, 0.5, "none", None)),
    "sorted q": Call((2, 2, 2, 77, 93, 8), dials(16, 0.7, "q", 32)),
    "sorted k": Call((1, 6, 2, 131, 131, 16), dials(32, 0.5, "k", 64)),
    "sorted qk": Call((2, 3, 1, 131, 67, 16), dials(16, 0.6, "qk", 48)),
    "whole": Call((1, 4, 4, 101, 101, 24), dials(16, 0.5, "qk", None)),
    "means": Call((1, 4, 2, 90, 90, 16), dials(16, 0.5, "k", 32, beta=0.0)),
    "dense": Call((1, 4, 2, 70, 90, 16), dials(16, 0.0, "qk", 32)),
    "sparsest": Call((1, 2, 2, 150, 150, 16), dials(16, 0.99, "k", 32)),
    "masked keys": Call((2, 4, 2, 60, 110, 16), dials(16, 0.5, "k", 32), "keys"),
    "masked both": Call((3, 4, 2, 110, 110, 16), dials(16, 0.5, "qk", 32), "both"),
    "masked unsorted": Call((3, 4, 2, 110, 110, 16), dials(16, 0.5, "none", None), "both"),
    "masked entry": Call((2, 2, 1, 50, 50, 16), dials(16, 0.5, "qk", None), "entry"),
    "scale": Call((1, 2, 2, 90, 90, 16), dials(16, 0.5, "k", 32, beta=1.5), scale=0.05),
    "block 64": Call((1, 4, 2, 300, 300, 32), dials(64, 0.5, "k", 128)),
    "block 128": Call((1, 2, 1, 500, 500, 64), dials(128, 0.5, "k", 256)),
    "bfloat16": Call((1, 4, 2, 131, 131, 32), dials(16, 0.5, "qk", 32), "both", BF16),
    "float16": Call((2, 2, 2, 90, 120, 16), dials(32, 0.5, "k", 64), "keys", FP16),
    "float64": Call((2, 4, 2, 77, 93, 16), dials(16, 0.5, "qk", 32), "keys", FP64),
    "clusters": Call((2, 4, 2, 131, 131, 16), dials(16, 0.5, "none", None) | CLUSTERS),
    "clusters masked": Call((3, 4, 2, 110, 110, 16), dials(16, 0.5, "none", None) | CLUSTERS, "both"),
}


def run_operator(case: Call, impl: str, seed: int, noise: float) -> Observed:
    """Plan, `ba_attention` and `attend` of a case."""
    q, k, v, masks = case.tensors(seed, noise)
    plan = calls.plan_of(q, k, case.dials, impl, **masks, scale=case.scale)
    return {
        "query order": plan.query_order.index,
        "query length": plan.query_order.length,
        "key order": plan.key_order.index,
        "key length": plan.key_order.length,
        "selection": plan.selection.index,
        "count": plan.selection.count,
        "out": calls.attention_of(q, k, v, case.dials, impl, **masks, scale=case.scale),
        "attend": calls.attend_of(q, k, v, plan, impl),
    }


# --- every score -----------------------------------------------------------------------------------------------------

SELECTION = {
    "unsorted": Call((2, 4, 2, 205, 205, 16), dials(16, 0.5, "none", None)),
    "unsorted masked": Call((2, 4, 2, 205, 205, 16), dials(16, 0.6, "none", None), "both"),
    "sorted k": Call((2, 4, 1, 205, 205, 16), dials(16, 0.5, "k", 32), "both"),
    "sorted qk": Call((1, 2, 2, 171, 250, 24), dials(32, 0.7, "qk", None, beta=0.25)),
    "masked keys": Call((3, 2, 1, 75, 250, 16), dials(16, 0.5, "k", 64, beta=0.0), "keys"),
    "masked entry": Call((2, 2, 1, 101, 101, 16), dials(16, 0.5, "qk", 32), "entry"),
    "block 64": Call((1, 4, 2, 500, 500, 32), dials(64, 0.5, "k", 128)),
    "bfloat16": Call((1, 4, 2, 300, 300, 32), dials(32, 0.5, "k", 64), "both", BF16),
    "float64": Call((1, 4, 2, 150, 150, 16), dials(16, 0.5, "qk", 64), "both", FP64),
}


def run_selection(case: Call, score: str, seed: int, noise: float) -> Observed:
    """The selection of a case by a score."""
    q, k, _, masks = case.tensors(seed, noise)
    selection = calls.selection_of(score, q, k, case.dials, **masks)
    return {"selection": selection.index, "count": selection.count}


# --- the sampler -----------------------------------------------------------------------------------------------------


class Generation(NamedTuple):
    """Dials of sampler, method (None: dense) and policy; prompt lengths, padded on the left where they differ."""

    sampler: dict[str, Any]
    sparse: dict[str, Any] | None = None
    policy: dict[str, Any] = {}  # noqa: RUF012  (never written)
    lengths: tuple[int, ...] = (61, 61)
    impl: str = "reference"


def steps(steps: int, gen_length: int, block_length: int, **others: Any) -> dict[str, Any]:
    return {"steps": steps, "gen_length": gen_length, "block_length": block_length, **others}


# Equal tokens have equal norms in the first layer but for rounding, so the sorted cases keep that layer dense.
HALF = dials(16, 0.5, "none", None)
SORTED = dials(16, 0.6, "qk", 48)
BEHIND = {"dense_layers": (0,)}
PADDED = (40, 61, 53)
FEW = {"min_queries": 0}
THREE = steps(12, 24, 8)

SAMPLER = {
    "dense": Generation(THREE),
    "dense padded": Generation(THREE, lengths=PADDED),
    "dense threshold": Generation(steps(24, 24, 8, threshold=0.3), lengths=PADDED),
    "dense guidance": Generation(steps(12, 24, 12, cfg_scale=1.5), lengths=PADDED),
    "dense prefix": Generation(steps(12, 24, 8, cache="prefix"), lengths=PADDED),
    "dense dual": Generation(steps(12, 24, 8, cache="dual", threshold=0.4), lengths=PADDED),
    "dense left to right": Generation(steps(12, 24, 8, remasking="left_to_right")),
    "dense random": Generation(steps(12, 24, 8, remasking="random", seed=3)),
    "dense temperature": Generation(steps(12, 24, 8, temperature=0.7, seed=5), lengths=PADDED),
    "dense end of text": Generation(steps(12, 24, 8, stop_at_eos=True), lengths=PADDED),
    "sparse": Generation(THREE, HALF),
    "sparse sorted": Generation(THREE, SORTED | {"sort": "k"}, BEHIND),
    "sparse cpu": Generation(THREE, HALF, impl="cpu"),
    "sparse padded": Generation(THREE, SORTED, BEHIND, PADDED),
    "sparse threshold": Generation(steps(24, 24, 8, threshold=0.3), HALF, lengths=PADDED),
    "sparse guidance": Generation(steps(12, 24, 12, cfg_scale=1.5), SORTED, BEHIND, PADDED),
    "sparse guidance prefix": Generation(steps(6, 24, 12, cfg_scale=0.5, cache="prefix"), HALF, FEW, PADDED),
    "sparse guidance dual": Generation(steps(12, 24, 8, cfg_scale=0.5, cache="dual"), HALF, FEW, PADDED),
    "sparse prefix": Generation(steps(12, 24, 8, cache="prefix"), HALF, FEW),
    "sparse prefix policy": Generation(steps(12, 24, 8, cache="prefix"), HALF, lengths=PADDED),
    "sparse prefix some": Generation(steps(12, 24, 8, cache="prefix"), HALF, {"min_queries": 16}),
    "sparse dual": Generation(steps(12, 24, 8, cache="dual"), SORTED, FEW | BEHIND, PADDED),
    "sparse dual policy": Generation(steps(12, 24, 8, cache="dual", threshold=0.4), HALF, lengths=PADDED),
    "sparse left to right": Generation(steps(12, 24, 8, remasking="left_to_right", threshold=0.3), HALF),
    "sparse random": Generation(steps(12, 24, 8, remasking="random", seed=3), HALF, lengths=PADDED),
    "sparse temperature": Generation(steps(12, 24, 8, temperature=0.7, seed=5), HALF, lengths=PADDED),
    "sparse end of text": Generation(steps(12, 24, 8, stop_at_eos=True), HALF, lengths=PADDED),
    "dense layers": Generation(THREE, SORTED, {"dense_layers": (0, -1)}, PADDED),
    "dense layer": Generation(steps(12, 24, 8, cache="prefix"), HALF, {"dense_layers": (1,), "min_queries": 0}),
    "dense steps": Generation(THREE, HALF, {"dense_steps": 0.4, "dense_layers": (2,)}, PADDED),
    "dense steps prefix": Generation(steps(12, 24, 8, cache="prefix"), HALF, {"dense_steps": 0.3, "min_queries": 0}),
    "all steps dense": Generation(THREE, HALF, {"dense_steps": 1.0}),
    "too short": Generation(THREE, HALF, {"min_length": 86}),
    "long enough": Generation(THREE, HALF, {"min_length": 85}),
}
SAMPLER |= {f"score {score}": Generation(THREE, HALF | {"score": score}, lengths=PADDED) for score in calls.SCORES}
#: Which steps are dense: total -> shares.
DENSE_STEPS = {
    3: (0.05, 1 / 3, 0.5, 2 / 3, 0.7),
    7: (0.1, 0.3, 0.5, 0.9),
    10: (0.05, 0.1, 0.3, 1 / 3, 0.6, 0.7),
    12: (0.25, 1 / 3, 2 / 3, 0.95),
    30: (0.1, 0.3, 2 / 3, 0.7, 0.9),
}
SAMPLER |= {
    f"steps {share:.4g} of {total}": Generation(steps(total, total, total), HALF, {"dense_steps": share}, (12,))
    for total, shares in DENSE_STEPS.items()
    for share in shares
}


def make_model(seed: int, noise: float) -> Any:
    """The small model, its weights drawn so that no machine rounds them differently."""
    model = calls.model_of()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 2:
                drawn = draw(tuple(parameter.shape), 1000 * seed + number) * 0.3
                parameter.copy_(shaken(drawn, noise, 1000 * seed + number))
    return model


def make_prompts(lengths: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor | None]:
    """Tokens, padded on the left with one that means something, and the mask where there is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 17, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 3), None if bool(mask.all()) else mask.long()


def run_sampler(case: Generation, seed: int, noise: float) -> Observed:
    """The tokens of a generation, when each was filled, and the counts."""
    prompt, mask = make_prompts(case.lengths, seed)
    model = make_model(seed, noise)
    result = calls.sample(model, prompt, mask, case.sampler, case.sparse, case.policy, case.impl)
    numbers = [result.steps, result.cached_evaluations]
    observed = {"tokens": result.tokens, "unmasked at": result.unmasked_at}
    if case.sparse is not None:
        numbers += [result.sparse_calls, result.dense_calls]
        observed |= {"calls": torch.tensor(result.calls), "sparsity": torch.tensor([result.sparsity]).double()}
    return observed | {"numbers": torch.tensor(numbers)}


# --- counts of a handle ----------------------------------------------------------------------------------------------

HANDLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all sparse": (HALF, {}),
    "sorted": (SORTED, BEHIND),
    "dense layers": (SORTED, {"dense_layers": (0, -1)}),
    "dense steps": (HALF, {"dense_steps": 1 / 3}),
    "some dense steps": (HALF, {"dense_steps": 0.3, "dense_layers": (1,)}),
    "short": (HALF, {"min_length": 60}),
}


def run_handle(case: tuple[dict[str, Any], dict[str, Any]], seed: int, noise: float) -> Observed:
    """The logits of three batches, padded and not, and everything that the handle counted."""
    model = make_model(seed, noise)
    batches = [make_prompts(lengths, seed + i) for i, lengths in enumerate([(50, 50), PADDED, (101,)])]
    logits, handle = calls.enabled(model, batches, *case)
    layers = [(layer, count.sparse, count.dense) for layer, count in handle.layers.items()]
    words = "\n".join([handle.report(), *(f"{reason}: {n}" for reason, n in sorted(handle.reasons.items()))])
    return {
        "calls": torch.tensor([handle.sparse_calls, handle.dense_calls]),
        "layers": torch.tensor(layers),
        "sparsity": torch.tensor([handle.sparsity]).double(),
        "report": torch.tensor(list(words.encode())),
        **{f"logits {i}": x for i, x in enumerate(logits)},
    }


# --- all of them -----------------------------------------------------------------------------------------------------

#: group -> name -> run(seed, noise)
CASES: dict[str, dict[str, Callable[[int, float], Observed]]] = {
    "operator": {
        f"{name}, {impl}": lambda seed, noise, case=case, impl=impl: run_operator(case, impl, seed, noise)
        for name, case in OPERATOR.items()
        for impl in ("reference", "cpu")
    },
    "selection": {
        f"{name}, {score}": lambda seed, noise, case=case, score=score: run_selection(case, score, seed, noise)
        for name, case in SELECTION.items()
        for score in calls.SCORES
    },
    "sampler": {name: lambda seed, noise, case=case: run_sampler(case, seed, noise) for name, case in SAMPLER.items()},
    "handle": {name: lambda seed, noise, case=case: run_handle(case, seed, noise) for name, case in HANDLE.items()},
}
