"""A score is one file with `summarise` and `compare` and one entry in `SCORES`, as CONTRIBUTING says: then all take it.

This file is the one file; the entry stands for the length of a test.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import baatt
from baatt import BAAttConfig, Policy, ba_attention, make_plan
from baatt.cli.errors import UsageError
from baatt.cli.main import build_parser
from baatt.models import MaskedDiffusionLM, ModelConfig
from baatt.scores import SCORES
from baatt.stages.pooling import pool_blocks
from baatt.types import Score, ScoreOptions, Sight, TokenOrder

CONFIG = {"block_size": 16, "sparsity": 0.5, "sort": "k", "segment": 32, "keep_first": 0}


class Directions(NamedTuple):
    """mean: [B, H, L, D], of length 1; size: [B, L]."""

    mean: Tensor
    size: Tensor


def summarise(x: Tensor, order: TokenOrder, options: ScoreOptions) -> Directions:
    """The direction of each block's mean."""
    pooled = pool_blocks(x, order, options.block_size)
    return Directions(torch.nn.functional.normalize(pooled.mean, dim=-1), pooled.size)


def compare(
    queries: Directions, keys: Directions, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """The cosine between two blocks."""
    repeats = queries.mean.shape[1] // keys.mean.shape[1]
    return queries.mean @ keys.mean.repeat_interleave(repeats, dim=1).mT


@pytest.fixture(autouse=True)
def _entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORES, "cosine", Score(summarise, compare))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_the_operator_takes_it(impl: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 101, 16, generator=generator) for heads in (4, 2, 2))
    mask = torch.arange(101) < torch.tensor([[101], [60]])
    config = BAAttConfig(**CONFIG, score="cosine")
    plan = make_plan(q, k, config, key_mask=mask, impl=impl)
    scores = compare(
        *(summarise(x, order, config) for x, order in ((q, plan.query_order), (k, plan.key_order))), config, 1
    )
    best = scores[0].topk(4).indices.sort().values
    assert torch.equal(plan.selection.index[0].long(), best)
    assert plan.selection.count[1].unique().tolist() == [2]
    expected = baatt.attend(q, k, v, plan, impl=impl)
    assert torch.equal(ba_attention(q, k, v, config, key_mask=mask, impl=impl), expected)
    assert not torch.equal(plan.selection.index, make_plan(q, k, BAAttConfig(**CONFIG), key_mask=mask).selection.index)


def test_enable_takes_it() -> None:
    torch.manual_seed(0)
    shape = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 48}
    model = MaskedDiffusionLM(ModelConfig(**shape, vocab_size=19, mask_token_id=17)).eval()
    tokens = torch.randint(0, 17, (2, 90))
    with torch.inference_mode(), baatt.enable(model, BAAttConfig(**CONFIG, score="cosine"), Policy()) as handle:
        assert model(tokens).isfinite().all()
    assert (handle.sparse_calls, handle.dense_calls) == (2, 0)


@pytest.mark.parametrize(
    "command",
    ["generate --prompt x --score cosine", "evaluate ruler --score cosine,oracle", "analyze recall x --scores cosine"],
)
def test_commands_take_it(command: str) -> None:
    words = command.split()
    parsed = build_parser(words[0]).parse_args(words)
    assert any("cosine" in str(value) for value in vars(parsed).values())
    with pytest.raises(UsageError, match="cosine"):  # among those there are
        build_parser(words[0]).parse_args([word.replace("cosine", "cosines") for word in words])


def test_the_list_of_an_error_names_it() -> None:
    with pytest.raises(ValueError, match=r"score must be one of .*'cosine'.*, got 'cosine-2'"):
        BAAttConfig(score="cosine-2")
