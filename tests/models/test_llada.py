"""The model against one in plain loops, and what padding, masks, dtypes and compilation may not change."""

import cmath
import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor

from baatt import BAAttConfig, ba_attention
from baatt.models import MaskedDiffusionLM, ModelConfig
from baatt.models.cache import KeyValueCache
from baatt.models.llada import RMSNorm
from baatt.stages.dense import dense_attention
from tests.models.test_config import SMALL


def make_model(config: ModelConfig = SMALL, dtype: torch.dtype = torch.float64, seed: int = 0) -> MaskedDiffusionLM:
    """A model whose weights, norms and biases are all random and large enough to matter."""
    torch.manual_seed(seed)
    model = MaskedDiffusionLM(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 0.5) + (parameter.dim() == 1)
            )
    return model.eval()


def make_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 36, shape, generator=torch.Generator().manual_seed(seed))


def naive_norm(row: list[float], weight: list[float], epsilon: float) -> list[float]:
    size = math.sqrt(sum(x * x for x in row) / len(row) + epsilon)
    return [x / size * w for x, w in zip(row, weight, strict=True)]


def naive_linear(row: list[float], state: dict[str, Tensor], name: str) -> list[float]:
    weight = state[f"{name}.weight"].tolist()
    bias = state[f"{name}.bias"].tolist() if f"{name}.bias" in state else [0.0] * len(weight)
    return [sum(w * x for w, x in zip(ws, row, strict=True)) + b for ws, b in zip(weight, bias, strict=True)]


def naive_rope(head: list[float], position: int, theta: float) -> list[float]:
    half = len(head) // 2
    turned = [
        complex(head[t], head[t + half]) * cmath.exp(1j * position * theta ** (-2 * t / len(head))) for t in range(half)
    ]
    return [z.real for z in turned] + [z.imag for z in turned]


def naive_attention(qs: list[list[float]], ks: list[list[float]], vs: list[list[float]]) -> list[list[float]]:
    out = []
    for q in qs:
        weights = [math.exp(sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(len(q))) for k in ks]
        total = sum(weights)
        out.append([sum(w * v[t] for w, v in zip(weights, vs, strict=True)) / total for t in range(len(q))])
    return out


def naive_logits(model: MaskedDiffusionLM, ids: list[int]) -> list[list[float]]:
    """The whole forward of one sequence, number by number."""
    config, state = model.config, model.state_dict()
    size, group = config.d_model // config.n_heads, config.n_heads // (config.n_kv_heads or config.n_heads)
    embedding = state["model.transformer.wte.weight"].tolist()
    rows = [embedding[i] for i in ids]
    for layer in range(config.n_layers):
        name = f"model.transformer.blocks.{layer}"

        def norm(row: list[float], part: str, name: str = name) -> list[float]:
            return naive_norm(row, state[f"{name}.{part}.weight"].tolist(), config.rms_norm_eps)

        def project(row: list[float], part: str, name: str = name) -> list[float]:
            return naive_linear(row, state, f"{name}.{part}")

        normed = [norm(row, "attn_norm") for row in rows]
        q, k, v = ([project(row, f"{x}_proj") for row in normed] for x in "qkv")
        if config.attention_layer_norm:
            q, k = [norm(row, "q_norm") for row in q], [norm(row, "k_norm") for row in k]
        joined: list[list[float]] = [[] for _ in ids]
        for head in range(config.n_heads):
            mine, theirs = (
                slice(head * size, (head + 1) * size),
                slice(head // group * size, (head // group + 1) * size),
            )
            qs = [naive_rope(row[mine], p, config.rope_theta) for p, row in enumerate(q)]
            ks = [naive_rope(row[theirs], p, config.rope_theta) for p, row in enumerate(k)]
            for row, out in zip(joined, naive_attention(qs, ks, [x[theirs] for x in v]), strict=True):
                row.extend(out)
        rows = [
            [a + b for a, b in zip(row, project(out, "attn_out"), strict=True)]
            for row, out in zip(rows, joined, strict=True)
        ]
        for index, row in enumerate(rows):
            normed_row = norm(row, "ff_norm")
            gate = [x / (1 + math.exp(-x)) for x in project(normed_row, "ff_proj")]
            hidden = [a * b for a, b in zip(gate, project(normed_row, "up_proj"), strict=True)]
            rows[index] = [a + b for a, b in zip(row, project(hidden, "ff_out"), strict=True)]
    final = [naive_norm(row, state["model.transformer.ln_f.weight"].tolist(), config.rms_norm_eps) for row in rows]
    if config.weight_tying:
        return [[sum(a * b for a, b in zip(row, e, strict=True)) for e in embedding] for row in final]
    return [naive_linear(row, state, "model.transformer.ff_out") for row in final]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_tying": True, "attention_layer_norm": True},
        {"n_kv_heads": None, "include_qkv_bias": True},
        {"n_kv_heads": 1, "include_bias": True, "attention_layer_norm": True, "rms_norm_eps": 0.1},
    ],
    ids=str,
)
def test_equals_plain_loops(changes: dict[str, object]) -> None:
    model = make_model(dataclasses.replace(SMALL, **changes))
    ids = make_ids(2, 7)
    with torch.no_grad():
        logits = model(ids)
    expected = torch.tensor([naive_logits(model, row.tolist()) for row in ids], dtype=torch.float64)
    assert logits.shape == (2, 7, 40)
    assert expected.std() > 0.1  # not a comparison of zeros
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_state_dict_has_lladas_names() -> None:
    parts = ["attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
    outside = ["model.transformer.wte.weight", "model.transformer.ln_f.weight"]
    blocks = [f"model.transformer.blocks.{i}.{part}.weight" for i in range(2) for part in parts]
    norms = [f"model.transformer.blocks.{i}.{part}.weight" for i in range(2) for part in ("q_norm", "k_norm")]
    assert set(make_model().state_dict()) == {*outside, *blocks, "model.transformer.ff_out.weight"}
    tied = dataclasses.replace(SMALL, weight_tying=True, attention_layer_norm=True)
    state = make_model(tied).state_dict()
    assert set(state) == {*outside, *blocks, *norms}
    assert state["model.transformer.blocks.0.q_norm.weight"].shape == (24,)
    assert state["model.transformer.blocks.0.k_norm.weight"].shape == (8,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_output_dtype_follows_parameters(dtype: torch.dtype) -> None:
    exact = make_model(dtype=dtype).double()
    logits = make_model(dtype=dtype)(make_ids(1, 9))
    assert logits.dtype == dtype
    error = (logits.double() - exact(make_ids(1, 9))).abs().max()
    assert error <= {torch.float64: 0.0, torch.float32: 1e-4, torch.bfloat16: 1.0}[dtype]


def test_rope_keeps_fp32_angles_in_a_bf16_model() -> None:
    """Angles rounded to bf16 are wrong by radians at position 1000; q then k then differ from exact rotation."""
    seen: list[Tensor] = []

    def record(q: Tensor, k: Tensor, v: Tensor, /, *, key_mask: Tensor | None) -> Tensor:
        seen.append(q)
        return dense_attention(q, k, v, key_mask=key_mask)

    model = make_model(dtype=torch.bfloat16)
    ids = torch.full((1, 1200), 5)
    model(ids, attention=record)
    head, last = seen[0][0, 0, 0].double().tolist(), seen[0][0, 0, 1199].double()
    expected = torch.tensor(naive_rope(head, 1199, SMALL.rope_theta), dtype=torch.float64)
    assert (last - expected).abs().max() <= 2**-7 * expected.norm()


# --- padding and masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 5), (3, 4)])
def test_padding_does_not_change_real_tokens(left: int, right: int, mask_dtype: torch.dtype) -> None:
    model, ids = make_model(), make_ids(2, 9)
    padded = torch.cat((make_ids(2, left, seed=7), ids, make_ids(2, right, seed=8)), dim=1)
    mask = torch.zeros(padded.shape, dtype=mask_dtype)
    mask[:, left : left + 9] = 1
    with torch.no_grad():
        alone, inside = model(ids), model(padded, mask)
    torch.testing.assert_close(inside[:, left : left + 9], alone, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        ignored = model(padded)[:, left : left + 9]
    assert (ignored - alone).abs().max() > 1e-3  # the mask is what made them equal


def test_rows_are_masked_independently() -> None:
    model, ids = make_model(), make_ids(3, 8)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, :3] = False
    with torch.no_grad():
        together = model(ids, mask)
        torch.testing.assert_close(together[:1], model(ids[:1]), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(together[1:2, 3:], model(ids[1:2, 3:]), rtol=1e-10, atol=1e-10)


def test_masked_token_cannot_be_seen() -> None:
    model, ids = make_model(), make_ids(1, 8)
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, 4] = False
    other = ids.clone()
    other[0, 4] = (ids[0, 4] + 1) % 36
    keep = mask[0]
    with torch.no_grad():
        assert torch.equal(model(ids, mask)[:, keep], model(other, mask)[:, keep])
        assert not torch.equal(model(ids)[:, keep], model(other)[:, keep])


def test_positions_count_real_tokens_only() -> None:
    """RoPE is relative, so padding at an end hides its shift; a hole inside does not."""
    model, ids = make_model(), make_ids(1, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    keep = mask[0].bool()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, mask)[:, keep], model(ids[:, keep]), rtol=1e-10, atol=1e-10)


def test_norms_are_computed_in_fp32() -> None:
    norm = RMSNorm(4096, 1e-5).bfloat16()
    x = torch.randn(3, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), exact.bfloat16())  # rounded once


def test_fully_masked_row_is_finite_with_finite_gradients() -> None:
    model, ids = make_model(dtype=torch.float32), make_ids(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1] = False
    logits = model(ids, mask)
    assert torch.isfinite(logits).all()
    logits.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# --- the attention seam ----------------------------------------------------------------------------------------------


def test_attention_receives_unrepeated_heads_and_the_mask() -> None:
    calls: list[tuple[object, ...]] = []

    def record(name: str, q: Tensor, k: Tensor, v: Tensor, /, *, key_mask: Tensor | None) -> Tensor:
        calls.append((name, tuple(q.shape), tuple(k.shape), tuple(v.shape), key_mask))
        return dense_attention(q, k, v, key_mask=key_mask)

    model, ids = make_model(), make_ids(2, 5)
    functions = [functools.partial(record, "first"), functools.partial(record, "second")]
    assert torch.equal(model(ids, attention=functions), model(ids))
    assert calls == [(name, (2, 6, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4), None) for name in ("first", "second")]
    model(ids, torch.ones(2, 5, dtype=torch.int32), attention=functions)
    assert calls[-1][-1].dtype == torch.bool
    assert calls[-1][-1].shape == (2, 5)


def test_one_function_serves_every_layer_and_is_used() -> None:
    def nothing(q: Tensor, k: Tensor, v: Tensor, /, *, key_mask: Tensor | None) -> Tensor:
        return torch.zeros_like(q)

    model, ids = make_model(), make_ids(1, 6)
    blind = model(ids, attention=nothing)
    single = torch.cat([model(ids[:, i : i + 1], attention=nothing) for i in range(6)], dim=1)
    torch.testing.assert_close(blind, single, rtol=1e-10, atol=1e-10)


def test_ba_attention_fits_and_is_exact_without_sparsity() -> None:
    model, ids = make_model(), make_ids(2, 50)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, :13] = False
    exact = functools.partial(ba_attention, config=BAAttConfig(block_size=16, sparsity=0.0), impl="reference")
    with torch.no_grad():
        torch.testing.assert_close(model(ids, attention=exact), model(ids), rtol=1e-9, atol=1e-9)
        dense, sparse = model(ids, mask), model(ids, mask, attention=exact)
    torch.testing.assert_close(sparse[mask], dense[mask], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("start", [0, 3, 8, 9])
def test_logits_from_leaves_out_earlier_tokens(start: int) -> None:
    model, ids = make_model(), make_ids(2, 9)
    logits = model(ids, logits_from=start)
    assert logits.shape == (2, 9 - start, 40)
    torch.testing.assert_close(logits, model(ids)[:, start:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (3, 7), (8, 9), (4, 4)])
def test_logits_to_leaves_out_later_tokens(start: int, stop: int) -> None:
    model, ids = make_model(), make_ids(2, 9)
    logits = model(ids, logits_from=start, logits_to=stop)
    assert logits.shape == (2, stop - start, 40)
    torch.testing.assert_close(logits, model(ids)[:, start:stop], rtol=1e-12, atol=1e-12)


# --- the cache -------------------------------------------------------------------------------------------------------


def masked_ids(padding: bool) -> tuple[Tensor, Tensor | None]:
    """Two rows of 12 tokens, the second padded on the left by 5."""
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    return make_ids(2, 12), mask if padding else None


@pytest.mark.parametrize("padding", [False, True])
def test_a_full_pass_fills_the_cache_and_changes_nothing(padding: bool) -> None:
    model, cache = make_model(), KeyValueCache()
    ids, mask = masked_ids(padding)
    assert (cache.length, cache.batch, cache.layers) == (None, None, [])
    with torch.no_grad():
        assert torch.equal(model(ids, mask, cache=cache), model(ids, mask))
    assert (cache.length, cache.batch) == (12, 2)
    held = {(x.shape, x.dtype) for layer in cache.layers for x in layer}
    assert (len(cache.layers), held) == (2, {((2, 2, 12, 4), torch.float64)})


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(0, 12), (7, 10), (7, 12), (11, 12), (5, 6)])
def test_a_part_of_unchanged_tokens_gives_the_logits_of_the_whole(start: int, stop: int, padding: bool) -> None:
    """Queries in the middle of the keys, at their own positions, padding counted out."""
    model, cache = make_model(), KeyValueCache()
    ids, mask = masked_ids(padding)
    with torch.no_grad():
        whole = model(ids, mask, cache=cache)
        part = model(ids[:, start:stop], mask, cache=cache, start=start, logits_from=1, logits_to=stop - start)
    torch.testing.assert_close(part, whole[:, start + 1 : stop], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padding", [False, True])
def test_a_part_replaces_its_keys_and_values_and_no_others(padding: bool) -> None:
    """Of one layer the keys and values depend on their own tokens alone, so that a part of new tokens is exact."""
    model, cache = make_model(dataclasses.replace(SMALL, n_layers=1)), KeyValueCache()
    ids, mask = masked_ids(padding)
    other = ids.clone()
    other[:, 6:9] = (ids[:, 6:9] + 5) % 36
    with torch.no_grad():
        model(ids, mask, cache=cache)
        part = model(other[:, 6:9], mask, cache=cache, start=6)
        torch.testing.assert_close(part, model(other, mask)[:, 6:9], rtol=1e-10, atol=1e-10)
        assert (part - model(ids, mask)[:, 6:9]).abs().max() > 1e-3
        # The new ones stay: another part attends to them.
        after = model(ids[:, 10:], mask, cache=cache, start=10)
        torch.testing.assert_close(after, model(other, mask)[:, 10:], rtol=1e-10, atol=1e-10)


def test_what_is_not_replaced_is_stale() -> None:
    model, cache = make_model(), KeyValueCache()
    ids, _ = masked_ids(False)
    other = ids.clone()
    other[:, 6:9] = (ids[:, 6:9] + 5) % 36
    with torch.no_grad():
        model(ids, cache=cache)
        part = model(other[:, 6:9], cache=cache, start=6)
        assert (part - model(other)[:, 6:9]).abs().max() > 1e-3


def test_attention_of_a_part_gets_all_keys_and_the_whole_mask() -> None:
    calls: list[tuple[object, ...]] = []

    def record(name: str, q: Tensor, k: Tensor, v: Tensor, /, *, key_mask: Tensor | None) -> Tensor:
        assert key_mask is not None
        calls.append((name, tuple(q.shape), tuple(k.shape), tuple(v.shape), tuple(key_mask.shape)))
        return dense_attention(q, k, v, key_mask=key_mask)

    model, cache = make_model(), KeyValueCache()
    ids, mask = masked_ids(True)
    functions = [functools.partial(record, "first"), functools.partial(record, "second")]
    with torch.no_grad():
        model(ids, mask, cache=cache)
        model(ids[:, 4:7], mask, cache=cache, start=4, attention=functions)
    assert calls == [(name, (2, 6, 3, 4), (2, 2, 12, 4), (2, 2, 12, 4), (2, 12)) for name in ("first", "second")]


def test_a_cache_forgets_rows() -> None:
    model, cache = make_model(), KeyValueCache()
    ids, mask = masked_ids(True)
    assert mask is not None
    with torch.no_grad():
        whole = model(ids, mask, cache=cache)
        cache.keep_rows(torch.tensor([1]))
        part = model(ids[1:, 6:9], mask[1:], cache=cache, start=6)
    assert (cache.batch, cache.length) == (1, 12)
    torch.testing.assert_close(part, whole[1:, 6:9], rtol=1e-10, atol=1e-10)


def test_a_cached_bf16_model_keeps_its_dtype() -> None:
    model, cache = make_model(dtype=torch.bfloat16), KeyValueCache()
    ids, mask = masked_ids(True)
    with torch.no_grad():
        whole = model(ids, mask, cache=cache)
        part = model(ids[:, 6:9], mask, cache=cache, start=6)
    assert {x.dtype for layer in cache.layers for x in layer} == {torch.bfloat16}
    assert part.dtype == torch.bfloat16
    assert (part - whole[:, 6:9]).abs().max() <= 2**-4 * whole.abs().max()


@pytest.mark.parametrize(
    ("rows", "tokens", "start", "mask", "message"),
    [
        (2, 3, 10, None, r"start must be in \[0, 9\] for 3 of N=12 tokens, got 10"),
        (2, 3, -1, None, r"start must be in \[0, 9\] for 3 of N=12 tokens, got -1"),
        (2, 13, 0, None, "input_ids must have at most N=12 tokens as the cache, got 13"),
        (1, 3, 0, None, "input_ids must have B=2 rows as the cache, got 1"),
        (2, 3, 0, (2, 3), r"attention_mask must have the shape of the cached sequence \(2, 12\), got \(2, 3\)"),
    ],
)
def test_a_part_must_fit_the_cache(
    rows: int, tokens: int, start: int, mask: tuple[int, int] | None, message: str
) -> None:
    model, cache = make_model(), KeyValueCache()
    with torch.no_grad():
        model(make_ids(2, 12), cache=cache)
        with pytest.raises(ValueError, match=message):
            model(make_ids(rows, tokens), None if mask is None else torch.ones(mask).bool(), cache=cache, start=start)


def test_a_cache_is_refused_where_it_cannot_work() -> None:
    model, ids = make_model(), make_ids(2, 12)
    with pytest.raises(ValueError, match=r"cache must be None while gradients are recorded: .*no_grad\(\)"):
        model(ids, cache=KeyValueCache())
    with torch.no_grad():
        with pytest.raises(ValueError, match="start must be 0 without a cache, got 3"):
            model(ids, start=3)
        with pytest.raises(ValueError, match="start must be 0 for an empty cache, which a whole sequence fills, got 3"):
            model(ids, cache=KeyValueCache(), start=3)


def test_a_cache_of_a_pass_that_failed_is_refused() -> None:
    def fail(q: Tensor, k: Tensor, v: Tensor, /, *, key_mask: Tensor | None) -> Tensor:
        raise ArithmeticError

    model, ids, cache = make_model(), make_ids(2, 12), KeyValueCache()
    with torch.no_grad():
        with pytest.raises(ArithmeticError):
            model(ids, cache=cache, attention=fail)
        with pytest.raises(ValueError, match="cache must hold 2 layers, got 1: the pass that filled it failed"):
            model(ids[:, :3], cache=cache)


# --- training --------------------------------------------------------------------------------------------------------


def test_trains_under_bf16_autocast() -> None:
    torch.manual_seed(0)
    model = MaskedDiffusionLM(dataclasses.replace(SMALL, weight_tying=True, attention_layer_norm=True)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = make_ids(8, 12)
    masked = torch.where(torch.arange(12) % 3 == 0, SMALL.mask_token_id, ids)
    losses = []
    for _ in range(60):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(masked)
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[0] == pytest.approx(math.log(40), rel=0.1)
    assert losses[-1] < 0.5 * losses[0]


def test_compiles_in_one_graph_for_every_length() -> None:
    model = make_model(dtype=torch.float32).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :4] = False
    compiled(make_ids(2, 20), mask)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((3, 33), (2, 47)):
            ids = make_ids(batch, length)
            mask = torch.arange(length) >= torch.arange(batch)[:, None]
            logits = compiled(ids, mask)
            torch.testing.assert_close(logits, model(ids, mask), rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_fresh_weights_follow_init_std() -> None:
    torch.manual_seed(0)
    model = MaskedDiffusionLM(
        dataclasses.replace(SMALL, d_model=96, mlp_hidden_size=192, include_bias=True, n_layers=8)
    )
    state = model.state_dict()
    first = "model.transformer.blocks.0"
    assert state[f"{first}.q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state[f"{first}.ff_out.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert state["model.transformer.ff_out.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert (state[f"{first}.attn_norm.weight"] == 1).all()
    assert (state[f"{first}.q_proj.bias"] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((torch.zeros(4, dtype=torch.int64),), {}, ValueError, r"input_ids must be \[B, N\] int64, got \(4,\)"),
        ((torch.zeros(1, 4),), {}, ValueError, "got .* torch.float32"),
        ((make_ids(1, 4), torch.ones(1, 5)), {}, ValueError, r"attention_mask must have the shape .*, got \(1, 5\)"),
        (
            (make_ids(1, 4), torch.ones(1, 4)),
            {},
            TypeError,
            "attention_mask must be bool or integer, got torch.float32",
        ),
        ((make_ids(1, 4),), {"logits_from": 5}, ValueError, r"logits_from must be in \[0, N=4\], got 5"),
        ((make_ids(1, 4),), {"logits_from": -1}, ValueError, "logits_from must be in"),
        ((make_ids(1, 4),), {"logits_to": 5}, ValueError, r"logits_to must be in \[logits_from=0, N=4\] .*, got 5"),
        ((make_ids(1, 4),), {"logits_from": 3, "logits_to": 2}, ValueError, r"\[logits_from=3, N=4\] or None, got 2"),
        ((make_ids(1, 4),), {"attention": [dense_attention]}, ValueError, "attention must hold 2 functions.*, got 1"),
    ],
)
def test_forward_errors(
    arguments: tuple[Tensor, ...], keywords: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_model()(*arguments, **keywords)
