"""Scores that are not the paper's: shapes, masks and budget of all, sums of some entry by entry, the oracle above."""

import dataclasses
import itertools

import pytest
import torch

from baatt import attend, ba_attention, make_plan
from baatt.backend import choose_backend
from baatt.lab.recall import block_mass, kept_mass
from baatt.scores import SCORES, antidiagonal, runs
from baatt.types import take_blocks
from tests.lab.test_oracle import case
from tests.settings import sorted_config


def scores_of(score, q, k, plan):
    """`compare` of all blocks of a plan's orders; score: a pair of functions."""
    summaries = (score[0](x, order, plan.config) for x, order in ((q, plan.query_order), (k, plan.key_order)))
    return score[1](*summaries, plan.config, plan.scale)


def selected(name, q, k, plan):
    """The selection of another score with the orders and masks of a plan."""
    config = dataclasses.replace(plan.config, score=name)
    score, backend = SCORES[name], choose_backend("reference", q.device)
    summaries = (score.summarise(x, order, config) for x, order in ((q, plan.query_order), (k, plan.key_order)))
    return backend.choose_blocks(*summaries, config, plan.scale)


@pytest.mark.parametrize("name", list(SCORES))
@pytest.mark.parametrize("masked", [False, True])
def test_every_score_keeps_as_many_blocks(name, masked):
    q, k, plan = case(masked=masked)
    selection = selected(name, q, k, plan)
    assert torch.equal(selection.count, plan.selection.count)
    assert selection.index.shape == plan.selection.index.shape
    mass = block_mass(q, k, plan)
    assert (kept_mass(mass, selection) <= kept_mass(mass, selected("oracle", q, k, plan)) + 1e-12).all()
    assert torch.equal(selection.index, selected(name, q, k, plan).index)


@pytest.mark.parametrize("name", list(SCORES))
def test_a_slab_of_query_blocks_has_the_scores_of_the_whole(name):
    q, k, plan = case(batch=1, masked=False)
    score = SCORES[name]
    whole = scores_of(score, q, k, plan)
    queries, keys = (score.summarise(x, o, plan.config) for x, o in ((q, plan.query_order), (k, plan.key_order)))
    for slab in (slice(0, 2), slice(2, 5)):
        part = score.compare(take_blocks(queries, slab), keys, plan.config, plan.scale)
        torch.testing.assert_close(part, whole[:, :, slab])


@pytest.mark.parametrize("name", [name for name in SCORES if name not in ("random", "window")])  # these see places
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_padding_on_either_side_changes_nothing(name, impl):
    """Rows of a padded batch read the same blocks as alone, whatever stands in the padding; every score, every impl."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 2, 70, 16, generator=generator) for _ in range(3))
    config = sorted_config(16, 0.5, "k", 32, score=name)
    alone = ba_attention(q, k, v, config, impl=impl)
    padded = [torch.nn.functional.pad(x, (0, 0, 16, 0), value=float("nan")) for x in (q, k, v)]
    mask = torch.arange(86)[None] >= 16
    found = ba_attention(*padded, config, key_mask=mask, query_mask=mask, impl=impl)[:, :, 16:]
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


def test_every_score_is_a_choice_of_the_operator():
    q, k, plan = case(masked=False)
    for name in SCORES:
        config = dataclasses.replace(plan.config, score=name)
        found = make_plan(q, k, config, impl="reference")
        assert torch.equal(found.selection.index, selected(name, q, k, plan).index)
        assert torch.equal(ba_attention(q, k, k, config, impl="reference"), attend(q, k, k, found, impl="reference"))


def test_antidiagonal_entry_by_entry():
    q, k, plan = case(masked=False, batch=1)
    stride, size = 4, 16
    summaries = (
        antidiagonal.summarise(x, o, plan.config, stride=stride)
        for x, o in ((q, plan.query_order), (k, plan.key_order))
    )
    found = antidiagonal.compare(*summaries, plan.config, plan.scale, stride=stride)
    head = 3
    rows = torch.nn.functional.pad(q[0, head, plan.query_order.index[0, head]], (0, 0, 0, 5))
    columns = torch.nn.functional.pad(k[0, 1, plan.key_order.index[0, 1]], (0, 0, 0, 11))
    logits = torch.full((20, 28), -torch.inf, dtype=torch.float64)
    for i in range(20):
        for j in range(26):  # the last run that holds a key
            pairs = [rows[i * stride + s] @ columns[j * stride + stride - 1 - s] for s in range(stride)]
            logits[i, j] = plan.scale * sum(pairs) / stride
    weights = logits.softmax(-1)
    per_block = size // stride
    for i in range(5):
        for j in range(7):
            part = weights[i * per_block : (i + 1) * per_block, j * per_block : (j + 1) * per_block]
            assert found[0, head, i, j] == pytest.approx(float(part.sum()))


def run_mass(q, k, plan, run):
    summaries = (runs.summarise(x, o, plan.config, run=run) for x, o in ((q, plan.query_order), (k, plan.key_order)))
    return runs.compare(*summaries, plan.config, plan.scale)


def test_exact_peak_is_the_most_that_one_query_attends():
    q, k, plan = case("q")
    peaks = scores_of(SCORES["exact-peak"], q, k, plan)
    expected = torch.zeros_like(peaks)
    for entry, head, row in itertools.product(range(q.shape[0]), range(q.shape[1]), range(q.shape[2])):
        length = int(plan.key_order.length[entry])
        keys = k[entry, head // 2, plan.key_order.index[entry, head // 2, :length]]
        weights = (plan.scale * q[entry, head, plan.query_order.index[entry, head, row]] @ keys.T).softmax(-1)
        for block, part in enumerate(weights.split(16)):
            place = entry, head, row // 16, block
            expected[place] = max(expected[place], part.sum())
    torch.testing.assert_close(peaks, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_masses_of_runs_of_one_token_are_the_oracle_s(masked):
    q, k, plan = case(masked=masked)
    queries = plan.query_summary.size[:, None, :, None]
    expected = block_mass(q, k, plan) * queries
    torch.testing.assert_close(run_mass(q, k, plan, 1), expected)


def test_masses_of_whole_blocks_rank_as_the_plan():
    q, k, plan = case(masked=False)
    whole = q[:, :, :64], k[:, :, :96]
    plan = make_plan(*whole, plan.config, impl="reference")
    shares = run_mass(*whole, plan, plan.config.block_size)
    expected = scores_of(SCORES["covariance"], *whole, plan).softmax(-1)
    torch.testing.assert_close(shares, expected * plan.config.block_size)


def test_finer_runs_come_nearer_to_the_oracle():
    """Of means alone the smaller runs know more; on average over many pairs, not pair by pair."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 4, 512, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    plan = make_plan(q, k, sorted_config(block_size=64, sort="none"), impl="reference")
    mass = block_mass(q, k, plan)
    errors = [float((run_mass(q, k, plan, run) / 64 - mass).abs().mean()) for run in (64, 16, 4, 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0, abs=1e-12)


def test_window_keeps_the_sink_and_the_diagonal():
    q, k, plan = case("none", sparsity=0.6, masked=False)
    kept = selected("window", q, k, plan).index[0, 0].tolist()
    assert kept == [[0, 1, 2], [0, 1, 2], [0, 3, 4], [0, 4, 5], [0, 5, 6]] or all(0 in row for row in kept)


def test_strides_and_runs_that_do_not_fit_are_refused():
    q, _, plan = case()
    with pytest.raises(ValueError, match="stride must divide block_size=16, got 3"):
        antidiagonal.summarise(q, plan.query_order, plan.config, stride=3)
    with pytest.raises(ValueError, match="run must divide block_size=16, got 5"):
        runs.summarise(q, plan.query_order, plan.config, run=5)
