"""FlashAttention and FlexAttention imported by name, and models of classes that nobody knows."""

import itertools
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import baatt
from baatt import BAAttConfig, Policy
from baatt.integrations.handle import NoSparseAttentionWarning
from baatt.stages.dense import dense_attention
from tests.integrations.stubs import SIZE, WIDTH, Config, DreamModel, merge, positions, split

ALL_BLOCKS = BAAttConfig(block_size=16, sparsity=0.0)
HALF = BAAttConfig(block_size=16, sparsity=0.5)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """As FlashAttention has it; what it calls is out of a function mode's sight."""
    with torch._C.DisableTorchFunction():
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2]) if causal else None
        if window_size[0] >= 0:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(-window_size[0]).tril(window_size[1])
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
):  # fmt: skip
    ends = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    parts = [
        flash_attn_func(q[None, a:c], k[None, b:d], v[None, b:d], causal=causal)[0]
        for (a, b), (c, d) in itertools.pairwise(ends)
    ]
    return torch.cat(parts)


def sageattn(q, k, v):
    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


renamed = flash_attn_func


def flash(q, k, v, **options):
    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)


def by_another_name(q, k, v):
    return renamed(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def varlen(q, k, v, parts=1):
    ends = torch.linspace(0, q.shape[2], parts + 1).int()
    longest = int(ends.diff().max())
    return flash_attn_varlen_func(*(x[0].transpose(0, 1) for x in (q, k, v)), ends, ends, longest, longest).transpose(
        0, 1
    )[None]


def flexible(q, k, v, *, causal=None, **options):
    mask = None
    if causal is not None:
        mask = create_block_mask(
            lambda b, h, i, j: i // causal >= j // causal, None, None, q.shape[2], k.shape[2], "cpu"
        )
    with torch._C.DisableTorchFunction():
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, **options)


class ForkedAttention(nn.Module):
    def __init__(self, config, function, queries):
        super().__init__()
        self.q, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.k, self.v = (nn.Linear(WIDTH, config.kv_heads * SIZE) for _ in range(2))
        self.function, self.queries = function, queries

    def forward(self, x):
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        q = q[:, :, -self.queries :]
        return F.pad(self.o(merge(self.function(q, k, v))), (0, 0, x.shape[1] - q.shape[2], 0))


class ForkBlock(nn.Module):
    def __init__(self, *arguments):
        super().__init__()
        self.attention, self.mlp = ForkedAttention(*arguments), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(F.silu(x))


class ForkStack(nn.Module):
    def __init__(self, function, queries, container):
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.blocks = container(ForkBlock(Config(kv_heads=2), function, queries) for _ in range(3))

    def forward(self, input_ids):
        x = self.embed(input_ids) + positions(input_ids.shape[1])
        for block in self.blocks:
            x = block(x)
        return x


class Fork(nn.Module):
    """Of a class that no adapter knows."""

    def __init__(self, function, queries=0, container=nn.ModuleList):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = ForkStack(function, queries, container), nn.Linear(WIDTH, 64)

    def forward(self, input_ids):
        return self.head(self.inner(input_ids))


def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


TOKENS = torch.arange(70)[None] % 60
RUNS = {
    "sdpa": (plain, 0, {}),
    "flash": (flash, 0, {}),
    "flash, renamed": (by_another_name, 0, {}),
    "flash, causal": (lambda q, k, v: flash(q, k, v, causal=True), 0, {"causal": 1}),
    "flash, causal over a cache": (lambda q, k, v: flash(q, k, v, causal=True), 40, {"causal": 1, "query_start": 30}),
    "flash, deterministic": (lambda q, k, v: flash(q, k, v, deterministic=True, softmax_scale=0.3), 0, {"scale": 0.3}),
    "varlen of one sequence": (varlen, 0, {}),
    "flex": (flexible, 0, {}),
    "flex, causal": (lambda q, k, v: flexible(q, k, v, causal=1), 0, {"causal": 1}),
    "flex, blocks": (lambda q, k, v: flexible(q, k, v, causal=32), 0, {"causal": 32}),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_unknown_class_is_sparse_anywhere(name):
    function, queries, options = RUNS[name]
    model = Fork(function, queries).eval()
    with torch.no_grad():
        expected = model(TOKENS)
        with baatt.enable(model, ALL_BLOCKS, Policy(min_queries=0), anywhere=True) as handle:
            torch.testing.assert_close(model(TOKENS), expected)
        assert {layer: calls.sparse for layer, calls in handle.layers.items()} == {0: 1, 1: 1, 2: 1}
        with baatt.enable(model, HALF, Policy(min_queries=0), anywhere=True) as handle:
            sparse = model(TOKENS)
        assert (handle.sparse_calls, handle.dense_calls) == (3, 0)
        assert torch.equal(model(TOKENS), expected)
        by_hand = Fork(lambda q, k, v: baatt.ba_attention(q, k, v, HALF, **options), queries).eval()
        torch.testing.assert_close(sparse, by_hand(TOKENS))
    assert sys.modules[__name__].flash_attn_func is renamed


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda q, k, v: flash(q, k, v, window_size=(9, 0)), "flash_attn_func called by name, a window"),
        (lambda q, k, v: flash(q, k, v, softcap=5.0), "flash_attn_func called by name, its argument softcap"),
        (
            lambda q, k, v: flash(q, k, v, alibi_slopes=torch.ones(4)),
            "flash_attn_func called by name, its argument alibi_slopes",
        ),
        (lambda q, k, v: flash(q, k, v, dropout_p=0.1), "flash_attn_func called by name, its argument dropout_p"),
        (lambda q, k, v: varlen(q, k, v, 2), "flash_attn_varlen_func called by name, several sequences in one"),
        (
            lambda q, k, v: flexible(q, k, v, score_mod=lambda score, *_: score / 2),
            "flex_attention called by name, its argument score_mod",
        ),
        (lambda q, k, v: sageattn(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), "sageattn called by name, whose"),
    ],
)
def test_what_cannot_be_read_is_the_function_itself_with_the_true_reason(function, reason):
    model = Fork(function).eval()
    with torch.no_grad():
        expected = model(TOKENS)
        with baatt.enable(model, HALF, anywhere=True) as handle, pytest.warns(NoSparseAttentionWarning, match=reason):
            assert torch.equal(model(TOKENS), expected)
    assert handle.sparse_calls == 0
    ((found, count),) = handle.reasons.items()
    assert (found.startswith(reason), count) == (True, 3)
    assert "attn_implementation" not in found


def test_other_models_and_threads_call_the_function_itself():
    model, other = Fork(flash).eval(), Fork(flash).eval()
    found = {}

    def in_another_thread():
        with torch.no_grad():
            found["other"] = other(TOKENS)

    def meanwhile(*_):
        thread = threading.Thread(target=in_another_thread)
        thread.start()
        thread.join()

    with torch.no_grad():
        expected = model(TOKENS)
        hook = model.inner.blocks[1].register_forward_pre_hook(meanwhile)
        with baatt.enable(model, HALF, anywhere=True) as handle:
            model(TOKENS)
            in_this_thread = other(TOKENS)
        hook.remove()
    assert handle.sparse_calls == 3
    assert torch.equal(found["other"], expected)
    assert torch.equal(in_this_thread, expected)


def test_an_error_leaves_nothing_in_the_code():
    def broken(q, k, v):
        flash(q, k, v)
        raise KeyError("a user's mistake")

    model = Fork(broken).eval()
    with baatt.enable(model, HALF, anywhere=True), pytest.raises(KeyError), torch.no_grad():
        model(TOKENS)
    assert sys.modules[__name__].flash_attn_func is renamed


def test_all_files_of_remote_code_are_looked_into(monkeypatch):
    helper = types.ModuleType("transformers_modules.fork.attention")
    helper.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, helper.__name__, helper)
    monkeypatch.setattr(ForkedAttention, "__module__", "transformers_modules.fork.modeling")
    model = Fork(lambda q, k, v: helper.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2))
    with baatt.enable(model.eval(), HALF, anywhere=True) as handle, torch.no_grad():
        model(TOKENS)
    assert handle.sparse_calls == 3


@pytest.mark.parametrize("container", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks)])
def test_layers_and_stacks_of_an_unknown_class(container):
    model = Fork(plain, container=container).eval()
    with baatt.enable(model, HALF, Policy(dense_layers=(-1,)), anywhere=True) as handle, torch.no_grad():
        model.inner(TOKENS)  # a loop may call it without the model around it
    assert handle.reasons == {"policy: dense layer 2": 1}
    assert [handle.layers[layer].sparse for layer in (0, 1)] == [1, 1]
    with pytest.raises(ValueError, match=r"policy.dense_layers must lie in \[-3, 3\)"):
        baatt.enable(model, HALF, Policy(dense_layers=(3,)), anywhere=True)


def test_a_refusal_names_it_and_a_known_class_stays_with_its_adapter():
    model = Fork(plain).eval()
    with pytest.raises(ValueError, match=r"enable\(model, ..., anywhere=True\) takes any class"):
        baatt.enable(model, HALF)
    dream = DreamModel().eval()
    with baatt.enable(dream, HALF, anywhere=True) as handle, torch.no_grad():
        dream(TOKENS)
    assert handle.sparse_calls == 3
    assert "forward" not in vars(dream)
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        baatt.enable("model", HALF, anywhere=True)


def test_an_unknown_class_without_a_call_warns():
    model = Fork(lambda q, k, v: (q @ q.mT).softmax(-1) @ q).eval()
    with (
        baatt.enable(model, HALF, anywhere=True),
        torch.no_grad(),
        pytest.warns(NoSparseAttentionWarning, match="never called its attention"),
    ):
        model(TOKENS)


@pytest.mark.parametrize("kind", ["encoder", "vision"])
def test_models_of_torch_anywhere(kind):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if kind == "encoder" else nn.Sequential(layer, nn.Linear(32, 8))
    model, x = model.eval(), torch.randn(1, 70, 32)
    with torch.no_grad():
        expected = model(x)
        with baatt.enable(model, ALL_BLOCKS, anywhere=True) as handle:
            torch.testing.assert_close(model(x), expected)
        assert torch.equal(model(x), expected)
    assert handle.sparse_calls == (2 if kind == "encoder" else 1)


def test_in_a_compiled_graph():
    model = Fork(plain).eval()
    with torch.no_grad(), baatt.enable(model, ALL_BLOCKS, anywhere=True) as handle:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
    assert handle.sparse_calls == 6


def test_the_reference_of_these_tests():
    q = torch.randn(1, 4, 20, 8)
    k = torch.randn(1, 2, 30, 8)
    torch.testing.assert_close(flash(q, k, k, causal=True), dense_attention(q, k, k, causal=1))
