"""Never dense in silence: which forwards warn, what they say, and the report of what was counted."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import baatt
from baatt import BAAttConfig, Policy
from baatt.integrations.calls import SdpaCall
from baatt.integrations.handle import Handle, NoSparseAttentionWarning
from baatt.integrations.masks import WINDOW
from baatt.integrations.reasons import ADVICE, ALL_KEPT, FEW_QUERIES, GRADIENTS, ONE_QUERY, UNEQUAL, fewest_queries
from baatt.integrations.sdpa import sparse_sdpa
from baatt.models import MaskedDiffusionLM
from baatt.models.config import ModelConfig
from tests.integrations.stubs import DreamModel

HALF = BAAttConfig(block_size=16, sparsity=0.5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DreamModel().eval()


def told(run):
    """The texts of the warnings of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(one.message) for one in caught if one.category is NoSparseAttentionWarning]


def forwards(model, length, times=1):
    tokens = torch.zeros(1, length, dtype=torch.long)

    def run():
        with torch.no_grad():
            for _ in range(times):
                model(tokens)

    return run


@pytest.mark.parametrize(
    "policy",
    [
        Policy(dense_layers=(0, 1, 2)),
        Policy(dense_steps=1.0),
        Policy(min_length=71),
        Policy(layer_sparsity=((0, 0.0), (1, 0.0)), dense_layers=(2,)),
    ],
)
def test_what_was_asked_for_is_not_warned_of(model, policy):
    with baatt.enable(model, HALF, policy) as handle:
        handle.at_step(0, 10)
        assert told(forwards(model, 70)) == []
    assert (handle.sparse_calls, handle.dense_calls) == (0, 3)
    with baatt.enable(model, None):
        assert told(forwards(model, 70)) == []


@pytest.mark.parametrize(("config", "length"), [(HALF, 16), (BAAttConfig(), 70), (BAAttConfig(sparsity=0.1), 1000)])
def test_a_budget_of_all_blocks_is_the_models_own_attention(model, config, length):
    tokens = torch.zeros(1, length, dtype=torch.long)
    with torch.no_grad():
        expected = model(tokens).logits
        with baatt.enable(model, config) as handle, pytest.warns(NoSparseAttentionWarning, match=ALL_KEPT):
            assert torch.equal(model(tokens).logits, expected)
    assert handle.reasons == {ALL_KEPT: 3}


def test_a_budget_of_all_blocks_of_few_is_dense_in_every_adapter():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 48, "vocab_size": 64}
    ours = MaskedDiffusionLM(ModelConfig(**sizes, mask_token_id=63)).eval()
    with baatt.enable(ours, BAAttConfig()) as handle:
        assert ALL_KEPT in told(forwards(ours, 100))[0]
    assert handle.reasons == {ALL_KEPT: 2}
    q = torch.randn(4, 2, 64, 8)  # windows of a vision tower
    expected = F.scaled_dot_product_attention(q, q, q)
    with pytest.warns(NoSparseAttentionWarning, match=ALL_KEPT), sparse_sdpa(BAAttConfig(block_size=64)) as handle:
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), expected)
    assert handle.reasons == {ALL_KEPT: 1}


def test_a_dense_layer_does_not_silence_the_others(model):
    with baatt.enable(model, BAAttConfig(), Policy(dense_layers=(0,))):
        (text,) = told(forwards(model, 70, times=3))  # once
    assert ALL_KEPT in text
    assert "smaller block_size" in text
    assert "policy:" not in text


def test_another_reason_is_told_too(model):
    with baatt.enable(model, HALF):
        first, second = told(lambda: (forwards(model, 16, 2)(), model(torch.zeros(1, 70, dtype=torch.long))))
    assert ALL_KEPT in first
    assert "gradients are asked for" in second


@pytest.mark.parametrize("rows", [2, 20, 127, 128, 256])
def test_rows_over_a_cache_are_sparse_from_where_it_pays(rows):
    handle = Handle(HALF)
    q, k = torch.randn(1, 2, rows, 8), torch.randn(1, 2, 600, 8)
    handle.start_forward()
    handle.attention(q, k, k, layer=0)
    pays = rows >= fewest_queries(None, "cpu")
    assert handle.reasons == ({} if pays else {FEW_QUERIES: 1})
    assert handle.unasked() == (None if pays else {FEW_QUERIES})
    assert fewest_queries(None, "cuda") == fewest_queries(None, "mps") == 1024
    asked = Handle(HALF, Policy(min_queries=rows + 1))
    asked.start_forward()
    asked.attention(q, k, k, layer=0)
    assert asked.reasons == {f"policy: fewer queries than min_queries={rows + 1}, of more keys": 1}
    assert asked.unasked() is None


def test_a_short_step_on_another_device_does_not_ask_for_a_kernel(monkeypatch):
    """Which takes tens of microseconds a call, of which a step has one a layer."""
    monkeypatch.setattr("baatt.integrations.handle.choose_backend", None)
    handle = Handle(BAAttConfig())
    q, k = torch.empty(1, 2, 32, 16, device="meta"), torch.empty(1, 2, 4096, 16, device="meta")
    handle.attention(q, k, k, layer=0, dense=lambda: q)
    assert handle.reasons == {FEW_QUERIES: 1}


def test_tensors_that_hold_no_values_stay_dense():
    """As when memory is estimated, or a model evaluated under vmap: a kernel would read foreign memory."""
    handle = Handle(HALF)
    q, mask = torch.randn(2, 2, 70, 8), torch.ones(2, 1, 70, 70, dtype=torch.bool).tril()
    dense = F.scaled_dot_product_attention(q, q, q)
    vmapped = torch.func.vmap(lambda x: handle.attention(x[None], x[None], x[None], layer=0)[0])(q)
    torch.testing.assert_close(vmapped, dense)
    torch.testing.assert_close(handle.attention(torch._neg_view(-q), q, q, layer=0), dense)
    with FakeTensorMode() as mode:
        fake, hidden = mode.from_tensor(q), mode.from_tensor(mask)
        assert handle.attention(fake, fake, fake, layer=0).shape == q.shape
        call = SdpaCall(fake, fake, fake, hidden)
        assert handle.sdpa(call, lambda: F.scaled_dot_product_attention(*call[:4])).shape == q.shape
    without = "tensors that hold no values themselves: of FakeTensorMode, under vmap, or views that negate"
    assert handle.reasons == {without: 3, "a mask that holds no values itself": 1}


def test_a_derivative_forward_stays_dense():
    handle, q = Handle(HALF), torch.randn(1, 2, 70, 8)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        handle.attention(dual, q, q, layer=0, dense=lambda: dual)
        handle.attention(q, q, q, layer=0)
    assert (handle.sparse_calls, handle.reasons) == (1, {GRADIENTS: 1})


def test_decoding_after_a_sparse_prompt_is_no_surprise_and_without_one_is():
    q = torch.randn(1, 2, 70, 8)
    for prompt in (70, 16):
        handle = Handle(HALF)
        handle.attention(q[:, :, :prompt], q[:, :, :prompt], q[:, :, :prompt], layer=0, causal=1, query_start=0)
        handle.start_forward()
        handle.attention(q[:, :, :1], q, q, layer=0)
        assert handle.unasked() == (None if prompt == 70 else {ONE_QUERY})


def test_a_context_tells_at_its_end_what_was_not_sparse():
    q, k = torch.randn(1, 2, 70, 8), torch.randn(1, 2, 64, 8)

    def inside(function):
        def run():
            with sparse_sdpa(HALF):
                function()

        return told(run)

    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 70, 8)
    with torch.no_grad():
        for nothing in (lambda: None, lambda: (q @ q.mT).softmax(-1) @ q, lambda: layer(x, x, x, need_weights=True)):
            assert [text[:40] for text in inside(nothing)] == ["sparse_sdpa ended without a single spars"]
        assert "never called its attention through baatt (it sees scaled_dot_product" in inside(lambda: None)[0]
        assert f"{UNEQUAL} ({ADVICE[UNEQUAL]})" in inside(lambda: F.scaled_dot_product_attention(q, k, k))[0]
        assert inside(lambda: F.scaled_dot_product_attention(q, q, q)) == []
        encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
        assert inside(lambda: encoder(x)) == []
    with pytest.raises(KeyError), sparse_sdpa(HALF):  # an error says more
        raise KeyError


def test_the_warning_points_at_the_line_that_ran_the_model(model):
    model = nn.Sequential(model.model).eval()  # around the stack, which is what is attached to
    with baatt.enable(model[0], HALF), pytest.warns(NoSparseAttentionWarning) as caught:
        forwards(model, 16)()
    assert caught[0].filename == __file__


def test_advice_never_changes_what_a_causal_model_computes():
    assert not any("is_causal" in text for text in ADVICE.values())


def test_the_report_counts_every_call_once():
    handle = Handle(BAAttConfig(block_size=16, sparsity=0.75), Policy(dense_layers=(1,)))
    handle.layer_count = 5
    handle.outside.append("2 layers of cross-attention")
    q = torch.randn(2, 3, 70, 8)
    window = torch.ones(70, 70, dtype=torch.bool).tril().triu(-20)

    def dense():
        return torch.zeros_like(q)

    handle.attention(q, q, q, layer=0)  # 5 x 5 block pairs a head, of which 2 of 5 are kept
    handle.attention(q, q, q, layer=1)
    handle.sdpa(SdpaCall(q, q, q, window), dense, layer=2)
    handle.sdpa(SdpaCall(q, q, q, is_causal=True), dense, layer=3)  # 15, of which 1, 1, 1, 1 and 2 are kept
    handle.count_dense(0, "an implementation by name")
    sparse_pairs, kept = 6 * (25 + 15), 6 * (5 * 2 + 1 + 1 + 1 + 1 + 2)
    assert handle.tally(lambda reason: reason is None)[:3] == (2, sparse_pairs, kept)
    every = sparse_pairs + 6 * 50
    assert handle.tally()[:2] == (5, every)
    assert handle.sparse_sparsity == pytest.approx(1 - kept / sparse_pairs)
    assert handle.sparsity == pytest.approx((sparse_pairs - kept) / every)
    assert handle.report().splitlines() == [
        "2 sparse and 3 dense attention calls",
        f"  1 dense: {WINDOW}",
        "  1 dense: an implementation by name",
        "  1 dense: policy: dense layer 1",
        f"block pairs of the sparse calls: {kept} of {sparse_pairs} kept, "
        f"{1 - kept / sparse_pairs:.1%} skipped (75.0% asked)",
        f"block pairs of all calls counted: {handle.sparsity:.1%} of {every} skipped",
        "not counted: 2 layers of cross-attention",
        "not counted: the size of 1 calls",
        "not counted: layers 4, of which no call came",
    ]


@pytest.mark.parametrize("directly", [False, True])
def test_loops_that_call_forward_past_the_hooks_are_watched(model, directly):
    tokens = torch.zeros(1, 16, dtype=torch.long)
    with baatt.enable(model, HALF), pytest.warns(NoSparseAttentionWarning, match=ALL_KEPT), torch.no_grad():
        getattr(model.model, "forward" if directly else "__call__")(tokens)
    assert "forward" not in vars(model.model)


POLICIES = {
    "none": None,
    "dense layer": Policy(dense_layers=(1,)),
    "first steps": Policy(dense_steps=0.5),
    "length": Policy(min_length=601),
    "queries": Policy(min_queries=64),
    "sparsity of a layer": Policy(layer_sparsity=((1, 0.0),)),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("rows", [1, 32, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_short_step_is_counted_as_if_it_were_looked_at_closely(name, rows, dtype, monkeypatch):
    q, k, v = torch.randn(1, 2, rows, 8), torch.randn(1, 2, 600, 8), torch.randn(1, 2, 600, 8).to(dtype)
    found = []
    for is_short in (True, False):
        handle = Handle(HALF, POLICIES[name])
        handle.set_layers(2)
        if not is_short:
            monkeypatch.setattr(Handle, "short_step", lambda *_: None)
        outs = []
        for step in (0, 3):
            handle.at_step(step, 4)
            outs += [handle.attention(q, k, v, layer=layer, dense=lambda: q) for layer in (0, 1)]
        found.append((handle.reasons, handle.layers, handle.tally(), outs))
    assert found[0][:3] == found[1][:3]
    assert all(map(torch.equal, found[0][3], found[1][3]))


def test_a_short_step_that_wants_gradients_says_so():
    handle = Handle(HALF)
    q, k = torch.randn(1, 2, 32, 8, requires_grad=True), torch.randn(1, 2, 600, 8)
    assert handle.attention(q, k, k, layer=0).requires_grad
    assert list(handle.reasons) == ["gradients are asked for: call the model under torch.no_grad()"]
