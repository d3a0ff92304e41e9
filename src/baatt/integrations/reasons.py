"""Why calls stay dense, what a user can change about each reason, and the warning of a run without a sparse call.

In: the reasons of calls as the counts hold them. Out: one line of text. What the user asked for is not warned of.
"""

import sys
import warnings
from collections.abc import Iterable, Mapping

#: Reasons that come from a policy.
BY_POLICY = "policy: "
#: Of them those that say what the user named; the others are defaults, as that cross-attention stays dense.
ASKED = tuple(
    BY_POLICY + start
    for start in ("dense", "one of the first steps", "fewer keys than min_", "fewer queries than min_", "sparsity 0")
)
CROSS = BY_POLICY + "cross-attention"
UNEQUAL = "other keys than queries by their number, taken for cross-attention"
GRADIENTS = "gradients are asked for: call the model under torch.no_grad()"
ALL_KEPT = "the budget keeps every key block"
FEW_QUERIES = "too few queries over more keys to be worth it"
ONE_QUERY = "a decoding step of one query"
NOTHING_SEEN = "the model never called its attention through baatt"

_ANY_CROSS = "Policy(only_self_attention=False) makes it sparse"
#: What the text of a reason begins with -> what can be changed. Nothing here changes what a model computes densely.
ADVICE: Mapping[str, str] = {
    CROSS: _ANY_CROSS,
    BY_POLICY + "fewer keys than queries": _ANY_CROSS,
    UNEQUAL: _ANY_CROSS,
    ALL_KEPT: "longer sequences, a smaller block_size or a larger sparsity of the config leave some out",
    FEW_QUERIES: "Policy(min_queries=0) makes it sparse all the same, a number in its place says what you want dense",
    ONE_QUERY: "the prompt is what can be sparse; Policy(min_queries=0) makes this sparse too, and slower",
    NOTHING_SEEN: "it sees scaled_dot_product_attention, transformers' attention interface and diffusers' dispatch, "
    "not eager code, nn.MultiheadAttention that returns weights, other kernels, or layers fused in C++ as a whole",
    "dropout": "call model.eval()",
    "no kernel": "another dtype has one, or impl='reference' runs without",
    "the denoising step": "",
    "an order of tokens": "leave order away, and sort='none'",
    "queries, keys and values of different dtypes": "load the model in one dtype",
}

#: Fewest queries over more keys from which choosing their blocks pays: what benchmarks/short_queries.py measured on a
#: CPU, and on a GPU, where dense attention takes the same time up to 512 queries, because reading the keys does.
WORTHWHILE: Mapping[str, int] = {"cpu": 128}
WORTHWHILE_ELSEWHERE = 1024

#: Packages whose frames are not the line that a warning is about.
_NOT_CALLERS = (
    "baatt", "torch", "contextlib", "transformers", "transformers_modules", "diffusers", "accelerate", "peft",
)  # fmt: skip


class NoSparseAttentionWarning(UserWarning):
    """A model ran and none of its attention was sparse, although that was not asked for."""


def is_asked(reason: str) -> bool:
    """Whether a call stayed dense because the user wanted just that."""
    return reason.startswith(ASKED)


def fewest_queries(wanted: int | None, device: str) -> int:
    """Of a call over more keys that is made sparse on a type of device, where a policy does not want another number."""
    return WORTHWHILE.get(device, WORTHWHILE_ELSEWHERE) if wanted is None else wanted


def too_few(wanted: int | None, queries: int, keys: int, device: str) -> str | None:
    """Why a call has too few queries over more keys, or None; arguments as `fewest_queries`."""
    if queries >= keys or queries >= fewest_queries(wanted, device):
        return None
    if wanted is not None:
        return f"{BY_POLICY}fewer queries than min_queries={wanted}, of more keys"
    return ONE_QUERY if queries == 1 else FEW_QUERIES


def explained(reason: str) -> str:
    """A reason with what can be changed about it."""
    advice = next((text for start, text in ADVICE.items() if reason.startswith(start)), "")
    return f"{reason} ({advice})" if advice else reason


def warn_dense(what: str, reasons: Iterable[str]) -> None:
    """Warn, at the line outside of libraries that runs the model, that nothing was sparse."""
    told = "; ".join(map(explained, sorted(reasons))) or explained(NOTHING_SEEN)
    text = f"{what} without a single sparse attention call: {told}"
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_CALLERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, NoSparseAttentionWarning, stacklevel=level)
