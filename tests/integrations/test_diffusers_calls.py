"""Calls of diffusers' processors, however they reach attention: sparse, or dense with the true reason, and counted."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import baatt
from baatt import BAAttConfig, Policy
from baatt.integrations.calls import SdpaCall
from baatt.integrations.diffusers import ITSELF, register
from baatt.integrations.diffusers_route import FEWER, UNKNOWN, Run
from baatt.integrations.handle import NoSparseAttentionWarning

diffusers = pytest.importorskip("diffusers")
from diffusers.models import attention_dispatch  # noqa: E402
from diffusers.models.transformers import transformer_flux2 as flux2  # noqa: E402
from diffusers.models.transformers import transformer_qwenimage21 as qwen  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import classes  # noqa: E402
import classes_diffusers  # noqa: E402

from tests.integrations.diffusers_models import build  # noqa: E402
from tests.integrations.test_diffusers import registry_state  # noqa: E402

ALL_BLOCKS = BAAttConfig(block_size=16, sparsity=0.0)
HALF = BAAttConfig(block_size=16, sparsity=0.5)
ANY_LENGTH = Policy(min_queries=0)
BLOCK_MASK = "a BlockMask for a mask, which only its backend reads"


def tiny(name, **changes):
    model, run = classes_diffusers.build(name, **changes)
    classes.fill_zeros(model)
    return model, run


def inputs_of(name):
    return {key: classes_diffusers.decoded(value) for key, value in classes_diffusers.ENTRIES[name]["inputs"].items()}


def counts(model, run, config=ALL_BLOCKS, policy=ANY_LENGTH):
    """Sparse calls and reasons of one run, which equals the dense one."""
    dense = run()
    with baatt.enable(model, config, policy) as handle:
        torch.testing.assert_close(run(), dense, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(), dense)
    return handle.sparse_calls, handle.reasons


# More keys than queries.


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("PRXTransformer2DModel", 2),
        ("NucleusMoEImageTransformer2DModel", 2),
        ("Cosmos3OmniTransformer", 4),
        ("OmniGenTransformer2DModel", 2),
        ("WanAnimate2Transformer3DModel", 2),
    ],
)
def test_queries_that_see_more_than_themselves(name, calls):
    assert counts(*tiny(name)) == (calls, {})


def test_a_cache_of_reference_images():
    model, _ = tiny("Flux2Transformer2DModel")
    for attention in (module for module in model.modules() if hasattr(module, "processor")):
        is_single = "Parallel" in type(attention).__name__
        attention.set_processor((flux2.Flux2KVParallelSelfAttnProcessor if is_single else flux2.Flux2KVAttnProcessor)())
    inputs = inputs_of("Flux2Transformer2DModel")
    more = {"kv_cache_mode": "extract", "num_ref_tokens": 32, "return_dict": False}
    image, places = torch.randn(1, 64, 4), torch.zeros(1, 64, 4, dtype=torch.int64)
    with torch.no_grad():

        def reference():
            return model(**{**inputs, "hidden_states": image, "img_ids": places}, **more)

        _, cache = reference()
        assert counts(model, lambda: reference()[0]) == (2 * 2, {})
        cached = {"kv_cache": cache, "kv_cache_mode": "cached", "return_dict": False}
        assert counts(model, lambda: model(**inputs, **cached)[0]) == (2, {})


@pytest.mark.parametrize(
    ("others", "is_apart", "sizes", "is_cross"),
    [
        (None, False, (64, 64), False),
        (None, False, (64, 80), False),  # a cache
        (16, False, (64, 80), False),  # joint
        (80, False, (64, 80), True),  # all of the other sequence, and nothing else
        (64, False, (64, 64), False),
        (64, True, (64, 64), True),  # its module says that it attends to another
        (None, True, (64, 64), False),
        (16, False, (64, 16), True),
        (16, False, (64, 4), None),  # an adapter's own tokens, or a shortened sequence
    ],
)
def test_what_is_cross_attention(others, is_apart, sizes, is_cross):
    assert Run(torch.tensor(0), others, is_apart, []).is_cross(*sizes) is is_cross


def test_fewer_keys_than_queries():
    case = with_processors(Shortened())
    assert counts(case.model, case.run) == (0, {FEWER: 2})
    assert counts(case.model, case.run, policy=Policy(min_queries=0, only_self_attention=False)) == (2, {})


# Ways to attention.


class Dispatching:
    """A processor of Wan without heads that are normed; `attend` is the way to attention."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        return attn.to_out[0](self.attend(q, k, v).flatten(2))

    def attend(self, q, k, v):
        return attention_dispatch.dispatch_attention_fn(q, k, v, backend=self._attention_backend)


class Shortened(Dispatching):
    def attend(self, q, k, v):
        return super().attend(q, k[:, :40], v[:, :40])


class WithoutBackend(Dispatching):
    def attend(self, q, k, v):
        return attention_dispatch.dispatch_attention_fn(q, k, v, backend=None)


class WithItsOwn(Dispatching):
    def attend(self, q, k, v):
        return attention_dispatch.dispatch_attention_fn(q, k, v, backend="_native_math")


class NativeFunction(Dispatching):
    def attend(self, q, k, v):
        return attention_dispatch._native_attention(q, k, v)


class OwnSDPA(Dispatching):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class Needing(Dispatching):
    _attention_backend = "_native_math"

    def attend(self, q, k, v):
        if self._attention_backend != "_native_math":
            raise ValueError("this processor needs the backend '_native_math'")
        return super().attend(q, k, v)


class ByHand(Dispatching):
    def attend(self, q, k, v):
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhnm,bmhd->bnhd", weights.softmax(dim=-1), v)


class Linear(Dispatching):
    def attend(self, q, k, v):
        return q.relu() @ (k.relu().transpose(-1, -2) @ v)


def with_processors(processor, layers=2):
    case = build("wan", layers=layers)
    for block in case.model.blocks:
        block.attn1.processor = processor
    return case


@pytest.mark.parametrize("kind", [Dispatching, WithoutBackend, WithItsOwn, NativeFunction, OwnSDPA, Needing])
def test_every_way_to_attention_is_found(kind):
    case = with_processors(kind())
    assert counts(case.model, case.run) == (2, {})
    with baatt.enable(case.model, HALF) as handle:
        case.run()
    assert {layer: one.sparse for layer, one in handle.layers.items()} == {0: 1, 1: 1}


@pytest.mark.parametrize("kind", [ByHand, Linear])
def test_a_processor_that_computes_attention_itself_is_said_so(kind):
    case, reason = with_processors(kind()), f"{kind.__name__} {ITSELF}"
    with pytest.warns(NoSparseAttentionWarning, match=reason):
        assert counts(case.model, case.run) == (0, {reason: 2})


@pytest.mark.parametrize("kind", [WithoutBackend, NativeFunction, OwnSDPA])
def test_every_way_in_a_compiled_graph(kind):
    torch._dynamo.reset()
    case = with_processors(kind(), layers=1)
    expected = case.run()
    with baatt.enable(case.model, ALL_BLOCKS) as handle:
        whole = case._replace(model=torch.compile(case.model, backend="eager", fullgraph=True))
        torch.testing.assert_close(whole.run(), expected)
    assert handle.sparse_calls == 1


def test_the_active_backend_of_a_context_is_found():
    case = with_processors(WithoutBackend())
    with attention_dispatch.attention_backend("_native_math"):
        assert counts(case.model, case.run) == (2, {})


def test_linear_attention_of_a_model_is_said_so():
    with pytest.warns(NoSparseAttentionWarning, match="SanaLinearAttnProcessor2_0"):
        assert counts(*tiny("SanaTransformer2DModel")) == (0, {f"SanaLinearAttnProcessor2_0 {ITSELF}": 1})


def test_a_prefix_in_segments_and_its_cache():
    model, run = tiny("QwenImage21Transformer2DModel")
    assert counts(model, run) == (2 * 2, {})
    inputs = inputs_of("QwenImage21Transformer2DModel")
    cache = {"kv_cache": qwen.QwenImage21KVCache(2), "return_dict": False}
    with torch.no_grad():
        model(**inputs, **cache, kv_cache_mode="extract")
        assert counts(model, lambda: model(**inputs, **cache, kv_cache_mode="cached")[0]) == (2, {})


# Processors that need their backend.


def test_a_block_mask_of_flex_attention_is_said_so():
    with pytest.warns(NoSparseAttentionWarning, match=BLOCK_MASK):
        assert counts(*tiny("AnyFlowFARTransformer3DModel")) == (0, {BLOCK_MASK: 2})


def test_options_that_only_a_backend_reads(monkeypatch):
    def native(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, windows=None):
        return attention_dispatch._native_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)

    class WithOptions(Dispatching):
        def attend(self, q, k, v):
            return attention_dispatch.dispatch_attention_fn(
                q, k, v, backend="_native_math", attention_kwargs={"windows": (8, 8)}
            )

    names, registry = attention_dispatch.AttentionBackendName, attention_dispatch._AttentionBackendRegistry
    monkeypatch.setitem(registry._backends, names._NATIVE_MATH, native)
    monkeypatch.setitem(registry._supported_arg_names, names._NATIVE_MATH, {*SdpaCall._fields[:-1], "windows"})
    case, reason = with_processors(WithOptions()), "options of its backend, windows"
    with pytest.warns(NoSparseAttentionWarning, match=reason):
        assert counts(case.model, case.run) == (0, {reason: 2})


def test_every_processor_keeps_its_backend():
    case = build("wan")
    before = [module.processor._attention_backend for module in case.model.modules() if hasattr(module, "processor")]
    with baatt.enable(case.model, HALF):
        attached = [module.processor for module in case.model.modules() if hasattr(module, "processor")]
        assert [processor._attention_backend for processor in attached] == before


# A backend by its name.


@pytest.fixture
def backend():
    state = registry_state()
    with register("ba_att", HALF) as handle:
        yield handle
    names = attention_dispatch.AttentionBackendName
    assert "ba_att" not in names.__members__
    assert registry_state()[4:] == state[4:]
    assert attention_dispatch._AttentionBackendRegistry._active_backend is names.NATIVE


def test_a_model_asks_for_the_name(backend):
    case, other = build("wan"), build("wan")
    dense = case.run()
    with baatt.enable(other.model, HALF):
        expected = other.run()
    case.model.set_attention_backend("ba_att")
    assert torch.equal(case.run(), expected)
    assert (backend.sparse_calls, backend.reasons) == (2, {UNKNOWN: 2})
    case.model.set_attention_backend("native")
    assert torch.equal(case.run(), dense)
    case.model.set_attention_backend("ba_att")
    backend.disable()
    assert torch.equal(case.run(), dense)
    with register("ba_att", HALF) as again:
        assert torch.equal(case.run(), expected)
    assert again.sparse_calls == 2


def test_a_context_asks_for_the_name(backend):
    case = build("qwenimage")
    dense = case.run()
    with attention_dispatch.attention_backend("ba_att"):
        assert not torch.equal(case.run(), dense)
    assert torch.equal(case.run(), dense)
    assert backend.sparse_calls == 2


def test_dense_calls_of_an_enabled_model_are_dense_under_the_name(backend):
    case = build("wan")
    dense = case.run()
    case.model.set_attention_backend("ba_att")
    with baatt.enable(case.model, HALF, Policy(dense_layers=(0, 1))) as handle:
        assert torch.equal(case.run(), dense)
        assert handle.reasons == {"policy: dense layer 0": 1, "policy: dense layer 1": 1}
    assert backend.sparse_calls == 0


def test_a_compiled_model_asks_for_the_name(backend):
    torch._dynamo.reset()
    case = build("wan", layers=1)
    case.model.set_attention_backend("ba_att")
    expected = case.run()
    whole = case._replace(model=torch.compile(case.model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(whole.run(), expected)
    assert backend.sparse_calls == 2


def test_names_that_are_refused():
    for name in ("native", "flex", "BA", ""):
        with pytest.raises(ValueError, match="name must be a lower-case word that no backend of diffusers has"):
            register(name, HALF)
    with pytest.raises(ValueError, match="policy must name no layers"):
        register("ba_att", HALF, Policy(dense_layers=(0,)))
    with pytest.raises(TypeError, match="name must be a str"):
        register(3)
    assert "ba_att" not in attention_dispatch.AttentionBackendName.__members__


@pytest.mark.parametrize(
    ("name", "crossing"),
    [("WanTransformer3DModel", 2), ("FluxTransformer2DModel", 0), ("LTXVideoTransformer3DModel", 1)],
)
def test_cross_attention_is_named_beside_the_counts(name, crossing):
    model, run = tiny(name)
    with baatt.enable(model, HALF, ANY_LENGTH) as handle:
        run()
    assert (f"not counted: {crossing} modules of cross-attention" in handle.report()) == (crossing > 0)
    assert ("not counted" in handle.report()) == (crossing > 0)
