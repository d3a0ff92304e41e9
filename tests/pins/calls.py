"""The only file of the pins that knows the library: whoever changes how a thing is asked for changes it here alone.

In: plain tensors, dials and names. Out: tensors, numbers and the fields of `Sampled`. No expectation lives here.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

import baatt
from baatt import BAAttConfig, attend, ba_attention, make_plan
from baatt.config import Policy
from baatt.kernels import cpu_native
from baatt.models import MaskedDiffusionLM, ModelConfig
from baatt.plan import Plan
from baatt.sampling import SamplerConfig, StepInfo, generate
from baatt.types import BlockSelection

#: The scores that were pinned; "antidiagonal" and "exact" are second names of two of them.
SCORES = (
    *("covariance", "mean", "covariance-16", "covariance-8", "antidiagonal-8", "antidiagonal-16"),
    *("window", "random", "oracle"),
)


#: What dials that are not asked for were when the pins were made.
THEN = {"score": "covariance", "beta": 0.5, "keep_first": 0, "budget": "row"}


class Sampled(NamedTuple):
    """A generation: what came out, and the attention calls that went sparse or stayed dense."""

    tokens: Tensor
    unmasked_at: Tensor
    steps: int
    cached_evaluations: int
    sparse_calls: int
    dense_calls: int
    sparsity: float
    calls: list[tuple[int, int, int]]  # after every evaluation: its step, sparse and dense calls so far


def plan_of(q: Tensor, k: Tensor, dials: dict[str, Any], impl: str, **masks: Tensor | None) -> Plan:
    """The plan of `make_plan`."""
    return make_plan(q, k, BAAttConfig(**THEN | dials), impl=impl, **masks)


def attention_of(q: Tensor, k: Tensor, v: Tensor, dials: dict[str, Any], impl: str, **masks: Tensor | None) -> Tensor:
    """The output of `ba_attention`."""
    return ba_attention(q, k, v, BAAttConfig(**THEN | dials), impl=impl, **masks)


def attend_of(q: Tensor, k: Tensor, v: Tensor, plan: Plan, impl: str) -> Tensor:
    """The output of `attend`."""
    return attend(q, k, v, plan, impl=impl)


def selection_of(score: str, q: Tensor, k: Tensor, dials: dict[str, Any], **masks: Tensor | None) -> BlockSelection:
    """The selection by a score."""
    return make_plan(q, k, BAAttConfig(**THEN | dials | {"score": score}), impl="reference", **masks).selection


def model_of(**changes: Any) -> MaskedDiffusionLM:
    """A small model in float64 with random weights."""
    config = ModelConfig(
        d_model=32, n_heads=4, n_kv_heads=2, n_layers=3, mlp_hidden_size=48, vocab_size=19, embedding_size=24,
        mask_token_id=17, eos_token_id=7,
    )  # fmt: skip
    return MaskedDiffusionLM(dataclasses.replace(config, **changes)).double().eval()


def sample(
    model: MaskedDiffusionLM,
    prompt: Tensor,
    mask: Tensor | None,
    sampler: dict[str, Any],
    sparse: dict[str, Any] | None,
    policy: dict[str, Any],
    impl: str,
) -> Sampled:
    """A generation, dense where `sparse` is None; its score is a name in `SCORES`."""
    config = None if sparse is None else BAAttConfig(**THEN | sparse)
    calls: list[tuple[int, int, int]] = []

    def progress(info: StepInfo) -> None:
        calls.append((info.step, handle.sparse_calls, handle.dense_calls))

    with baatt.enable(model, config, Policy(**policy), impl=impl) as handle:
        result = generate(model, prompt, mask, SamplerConfig(**sampler), on_step=handle.at_step, progress=progress)
    counts = handle.sparse_calls, handle.dense_calls, handle.sparsity
    return Sampled(result.tokens, result.unmasked_at, result.steps, result.cached_evaluations, *counts, calls)


def enabled(
    model: MaskedDiffusionLM, batches: list[tuple[Tensor, Tensor | None]], dials: dict[str, Any], policy: dict[str, Any]
) -> tuple[list[Tensor], Any]:
    """The logits of batches, one after the other as denoising steps, in a model that `enable` made sparse; the handle.

    The handle has `sparse_calls`, `dense_calls`, `reasons`, `layers`, `sparsity` and `report()`.
    """
    with (
        torch.inference_mode(),
        baatt.enable(model, BAAttConfig(**THEN | dials), Policy(**policy), impl="reference") as handle,
    ):
        logits = []
        for step, (tokens, mask) in enumerate(batches):
            handle.at_step(step, len(batches))
            logits.append(model(tokens, mask))
    return logits, handle


def c_compiler() -> str | None:
    """What builds the CPU kernel here."""
    return cpu_native.find_compiler()
