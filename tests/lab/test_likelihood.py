"""The Monte Carlo likelihood: exact where it must be, LLaDA's estimate elsewhere, the same wherever it is computed."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import baatt
from baatt import BAAttConfig, Policy
from baatt.lab.likelihood import draw_masks, log_likelihood, request_seed, rolling_windows
from baatt.models import MaskedDiffusionLM, ModelConfig

CPU = torch.device("cpu")
MASK = 1
SIZES = {"d_model": 16, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 24, "vocab_size": 40, "mask_token_id": MASK}
CONTEXT, ANSWER = [7, 8, 9, 10], [11, 12, 13]


def tiny_model() -> MaskedDiffusionLM:
    torch.manual_seed(0)
    return MaskedDiffusionLM(ModelConfig(**SIZES, init_std=0.4)).double().eval()


class Recorder:
    """A model whose answer at every place is a fixed distribution; keeps what it was shown."""

    def __init__(self, probabilities: torch.Tensor) -> None:
        self.config = SimpleNamespace(mask_token_id=MASK)
        self.logits = probabilities.log()  # [N, V]
        self.shown: list[torch.Tensor] = []

    def __call__(self, tokens, *, logits_from):
        self.shown.append(tokens)
        return self.logits[logits_from:].expand(len(tokens), -1, -1)


def test_draws_mask_evenly_many_tokens():
    masks, counts = draw_masks(5, 200, torch.Generator().manual_seed(0))
    sizes = masks.sum(dim=1)
    assert counts.sum() == 200
    assert [int(counts[sizes == size].sum()) for size in range(1, 6)] == [40] * 5  # l is spread evenly over 1..L
    assert len(masks) == len({tuple(mask) for mask in masks.tolist()})
    assert int((masks * counts[:, None]).sum(dim=0).min()) > 90  # every place is masked in about 3/5 of the draws


@pytest.mark.parametrize(("length", "draws"), [(1, 128), (2, 1), (3, 7), (300, 16)])
def test_draws_are_never_empty(length, draws):
    masks, counts = draw_masks(length, draws, torch.Generator().manual_seed(3))
    assert int(masks.sum(dim=1).min()) >= 1
    assert counts.sum() == draws
    assert len(masks) <= min(draws, 2**length - 1)


def test_a_model_that_knows_nothing():
    """Uniform over V tokens: every draw gives L log V exactly."""
    model = Recorder(torch.full((7, 40), 1 / 40))
    assert log_likelihood(model, CONTEXT, ANSWER, device=CPU, draws=9) == pytest.approx(-3 * math.log(40), rel=1e-6)


def test_a_model_whose_places_are_independent():
    """The expectation over masks is the sum of the tokens' own log-probabilities; 1000 draws are within 1 % of it."""
    probabilities = torch.rand(7, 40, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    exact = float(sum(probabilities[4 + place, token].log() for place, token in enumerate(ANSWER)))
    model = Recorder(probabilities)
    assert log_likelihood(model, CONTEXT, ANSWER, device=CPU, draws=1000) == pytest.approx(exact, rel=0.01)


def test_what_the_model_is_shown():
    model = Recorder(torch.full((7, 40), 1 / 40))
    log_likelihood(model, CONTEXT, ANSWER, device=CPU, draws=50, batch_size=3)
    shown = torch.cat(model.shown)
    assert max(map(len, model.shown)) == 3
    assert shown[:, :4].tolist() == [CONTEXT] * len(shown)
    assert {tuple(row) for row in shown[:, 4:].tolist()} <= set(itertools.product(*((token, MASK) for token in ANSWER)))
    assert len(shown) <= 7  # of 50 draws, one evaluation per different mask


@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_it_is_llada_s_estimate(cfg_scale):
    """Written down as LLaDA's evaluation computes it: one row per draw, cross-entropy over the share that is masked."""
    model, draws = tiny_model(), 40
    masks, counts = draw_masks(3, draws, torch.Generator().manual_seed(request_seed(5, CONTEXT, ANSWER)))
    row = torch.tensor(CONTEXT + ANSWER)
    losses = []
    for mask in masks.repeat_interleave(counts, dim=0):
        masked = torch.cat((torch.zeros(4, dtype=torch.bool), mask))
        noisy = torch.where(masked, MASK, row)
        with torch.no_grad():
            logits = model(noisy[None])
            if cfg_scale > 0:
                blind = torch.where(torch.arange(7) < 4, MASK, noisy)
                unconditional = model(blind[None])
                logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
        share = mask.sum() / 3
        losses.append((F.cross_entropy(logits[0][masked], row[masked], reduction="none") / share).sum().item())
    expected = -sum(losses) / draws
    got = log_likelihood(
        model, CONTEXT, ANSWER, device=CPU, draws=draws, batch_size=4, seed=5, cfg_scale=cfg_scale
    )  # fmt: skip
    assert got == pytest.approx(expected, rel=1e-5)


def test_it_depends_on_seed_and_ids_alone():
    model = tiny_model()

    def estimate(**changes):
        return log_likelihood(model, CONTEXT, ANSWER, device=CPU, **({"draws": 6} | changes))

    torch.manual_seed(99)
    first = estimate(batch_size=1)
    assert estimate(batch_size=6) == pytest.approx(first, rel=1e-6)
    assert estimate(batch_size=4, seed=1) != pytest.approx(first, rel=1e-6)


def test_one_token_and_no_context():
    """Nothing is left to chance: the estimate is the model's log-probability of the token."""
    model = tiny_model()
    with torch.no_grad():
        exact = float(model(torch.tensor([[MASK]]))[0, 0].log_softmax(dim=0)[12])
    assert log_likelihood(model, [], [12], device=CPU) == pytest.approx(exact, rel=1e-6)


def test_an_enabled_model_is_sparse():
    model, calls = tiny_model(), []
    with baatt.enable(model, BAAttConfig(block_size=16, sparsity=0.0), Policy(dense_layers=(1,))) as handle:
        handle.watch(lambda layer, q, *_: calls.append((layer, q.shape)))
        log_likelihood(model, CONTEXT, ANSWER[:1], device=CPU)
    assert calls == [(0, (1, 2, 5, 8)), (1, (1, 2, 5, 8))]
    assert (handle.sparse_calls, handle.dense_calls) == (1, 1)


@pytest.mark.parametrize(
    ("count", "window", "expected"),
    [
        (3, 4, [([], [0, 1, 2])]),
        (4, 4, [([], [0, 1, 2, 3])]),
        (5, 4, [([], [0, 1, 2, 3]), ([1, 2, 3], [4])]),
        (9, 4, [([], [0, 1, 2, 3]), ([3], [4, 5, 6]), ([5, 6], [7, 8])]),
        (10, 4, [([], [0, 1, 2, 3]), ([3], [4, 5, 6]), ([6], [7, 8, 9])]),
    ],
)
def test_rolling_windows(count, window, expected):
    assert rolling_windows(range(count), window) == expected


@pytest.mark.parametrize("count", range(1, 30))
def test_rolling_windows_score_every_token_once(count):
    windows = rolling_windows(range(count), 5)
    assert [token for _, answer in windows for token in answer] == list(range(count))
    assert all(len(context) + len(answer) <= 5 for context, answer in windows)


def test_refused():
    with pytest.raises(ValueError, match="answer must hold at least one token"):
        log_likelihood(tiny_model(), CONTEXT, [], device=CPU)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        log_likelihood(tiny_model(), CONTEXT, ANSWER, device=CPU, batch_size=0)
    with pytest.raises(ValueError, match="length and draws must be at least 1, got 3 and 0"):
        log_likelihood(tiny_model(), CONTEXT, ANSWER, device=CPU, draws=0)
    with pytest.raises(ValueError, match="window at least 2, got 3 ids and 1"):
        rolling_windows([1, 2, 3], 1)
