"""The vLLM-Omni plugin without vLLM-Omni, and the ComfyUI node of docs/serving.md without ComfyUI."""

import re
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from baatt import BAAttConfig, Policy, ba_attention
from baatt.integrations.handle import Handle
from baatt.integrations.vllm_omni import SparseAttention, attention

DIALS = {"block_size": 16, "segment": 64}
ALL_BLOCKS = DIALS | {"sparsity": 0.0}
PAGE = Path(__file__).resolve().parents[2] / "docs/serving.md"


@pytest.fixture
def plugin():
    return SparseAttention()


def inputs(batch=2, queries=70, keys=70, heads=4, groups=4, channels=16):
    """query, key, value [B, N, H, D]."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(queries, heads), (keys, groups), (keys, groups)]
    return [torch.randn(batch, length, count, channels, generator=generator) for length, count in sizes]


def exact(query, key, value, mask=None, **options):
    """Dense attention [B, N, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, **options).transpose(1, 2)


def counts(plugin):
    return [(handle.sparse_calls, handle.dense_calls, handle.reasons) for handle in plugin.statistics()]


def padding(batch=2, keys=70):
    mask = torch.ones(batch, keys, dtype=torch.bool)
    mask[1, :13] = False
    mask[0, 60:] = False
    return mask


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.4])
def test_without_sparsity_it_is_dense_attention(plugin, groups, scale):
    query, key, value = inputs(groups=groups)
    actual = plugin(query, key, value, ALL_BLOCKS, is_causal=False, softmax_scale=scale)
    torch.testing.assert_close(actual, exact(query, key, value, scale=scale))
    assert counts(plugin) == [(1, 0, {})]


def test_with_sparsity_it_is_the_operator(plugin):
    query, key, value = inputs()
    params = DIALS | {"sparsity": 0.5, "sort": "q", "beta": 0.25, "score": "covariance", "impl": "reference"}
    actual = plugin(query, key, value, params, is_causal=False, softmax_scale=0.25)
    config = BAAttConfig(16, 0.5, "q", 64, "covariance", 0.25)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    expected = ba_attention(q, k, v, config, scale=0.25, impl="reference").transpose(1, 2)
    assert torch.equal(actual, expected)
    assert not torch.allclose(actual, exact(query, key, value))
    assert plugin.statistics()[0].sparsity == pytest.approx(2 / 5)


@pytest.mark.parametrize("name", ["attn_mask", "attention_mask"])
@pytest.mark.parametrize("kind", ["tokens", "integers", "four axes", "additive"])
def test_a_mask_of_tokens_is_obeyed(plugin, name, kind):
    query, key, value = inputs()
    tokens = padding()
    masks = {
        "tokens": tokens,
        "integers": tokens.long(),
        "four axes": tokens[:, None, None].expand(2, 1, 70, 70),
        "additive": torch.zeros(2, 1, 1, 70).masked_fill(~tokens[:, None, None], -torch.inf),
    }
    actual = plugin(query, key, value, ALL_BLOCKS | {name: masks[kind]})
    torch.testing.assert_close(actual, exact(query, key, value, tokens[:, None, None]))
    assert counts(plugin) == [(1, 0, {})]


def test_other_masks_are_dense(plugin):
    query, key, value = inputs()
    mask = torch.rand(1, 1, 70, 70, generator=torch.Generator().manual_seed(1)) > 0.5
    actual = plugin(query, key, value, DIALS | {"attn_mask": mask})
    assert torch.equal(actual, exact(query, key, value, mask))
    weights = torch.randn(2, 4, 70, 70, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plugin(query, key, value, DIALS | {"attn_mask": weights}), exact(query, key, value, weights))
    reasons = {"a mask that differs between queries": 1, "an additive mask with weights": 1}
    assert counts(plugin) == [(0, 2, reasons)]
    with pytest.raises(ValueError, match=r"attn_mask must have shape \[B, M\] or \[B, H, N, M\], got \(2, 70, 70\)"):
        plugin(query, key, value, DIALS | {"attn_mask": mask[0].expand(2, 70, 70)})


@pytest.mark.parametrize("mask", [None, "tokens", "additive"])
def test_causal_calls(plugin, mask):
    query, key, value = inputs(groups=2)
    visible = torch.ones(70, 70, dtype=torch.bool).tril()
    tokens = torch.ones(2, 70, dtype=torch.bool)
    tokens[1, 50:] = False
    given = {
        None: {},
        "tokens": {"attn_mask": tokens},
        "additive": {"attn_mask": torch.zeros(2, 1, 1, 70).masked_fill(~tokens[:, None, None], -torch.inf)},
    }[mask]
    expected = exact(query, key, value, visible & tokens[:, None, None] if mask else visible, scale=0.3)
    actual = plugin(query, key, value, ALL_BLOCKS | given, is_causal=True, softmax_scale=0.3)
    rows = tokens if mask else torch.ones_like(tokens)
    torch.testing.assert_close(actual[rows], expected[rows])
    actual = plugin(query, key, value, DIALS | given | {"min_length": 99}, is_causal=True, softmax_scale=0.3)
    torch.testing.assert_close(actual, expected)
    assert counts(plugin) == [(1, 0, {}), (0, 1, {"policy: fewer keys than min_length=99": 1})]
    actual = plugin(query, key, value, ALL_BLOCKS | {"attn_mask": visible[None, None]}, is_causal=True)
    torch.testing.assert_close(actual, exact(query, key, value, visible))
    assert counts(plugin)[0] == (1, 1, {"a causal flag beside a causal mask": 1})


def test_cross_attention_is_dense(plugin):
    query, key, value = inputs(keys=23)
    mask = padding(keys=23)
    mask[0] = True
    actual = plugin(query, key, value, DIALS | {"attn_mask": mask})
    torch.testing.assert_close(actual, exact(query, key, value, mask[:, None, None]))
    assert counts(plugin) == [(0, 1, {"other keys than queries by their number, taken for cross-attention": 1})]


def test_settings_have_counts_of_their_own(plugin):
    query, key, value = inputs()
    for sparsity in (0.0, 0.5, 0.5):
        plugin(query, key, value, DIALS | {"sparsity": sparsity})
    plugin(query, key, value, DIALS | {"min_length": 71})
    assert [handle.config.sparsity for handle in plugin.statistics()] == [0.0, 0.5, 0.5]
    assert counts(plugin) == [(1, 0, {}), (2, 0, {}), (0, 1, {"policy: fewer keys than min_length=71": 1})]


def test_what_the_engine_adds_is_left_alone(plugin):
    query, key, value = inputs()
    state = {
        **{"denoise_step_idx": torch.tensor([3, 3]), "total_denoise_steps": torch.tensor([8, 8])},
        **{"latent_shape": torch.ones(2, 3), "patch_size": torch.ones(2, 3), "total_latent_frames": 7},
        **{"patches_per_frame": 10, "kv_cache_dtype": "fp8", "block_mask": torch.ones(2), "kv_indices": [0, 1]},
    }
    torch.testing.assert_close(plugin(query, key, value, ALL_BLOCKS | state), exact(query, key, value))
    assert counts(plugin) == [(1, 0, {})]


def test_the_least_advanced_sample_decides_about_the_first_steps(plugin):
    query, key, value = inputs()
    params = ALL_BLOCKS | {"dense_steps": 0.5}
    for step in range(4):
        plugin(query, key, value, params | {"denoise_step_idx": step, "total_denoise_steps": torch.tensor([4])})
    for steps in ([3, 1], [3, 2]):
        both = {"denoise_step_idx": torch.tensor(steps), "total_denoise_steps": torch.tensor([4, 4])}
        plugin(query, key, value, params | both)
    plugin(query, key, value, params)  # the step of an earlier call does not count
    unknown = "the denoising step is not known: call handle.at_step(step, total) in the loop"
    assert counts(plugin) == [(3, 4, {"policy: one of the first steps": 3, unknown: 1})]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"sparsty": 0.5}, r"params must hold settings among block_size, sparsity, .*, impl, got sparsty=0\.5"),
        ({"dense_layers": "0"}, "params must hold settings among .* got dense_layers='0'"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1\.0"),
        ({"impl": "fast"}, "impl must be one of .* got 'fast'"),
        ({"full_attn_spans": [[(0, 4)]]}, "full_attn_spans must not be given"),
    ],
)
def test_wrong_settings_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        SparseAttention().handle(params)


def test_tensors_of_other_axes_are_refused(plugin):
    query, key, value = inputs()
    with pytest.raises(ValueError, match=r"key must have shape \[B, N, H, D\], got \(70, 4, 16\)"):
        plugin(query, key[0], value, DIALS)


def test_the_dispatcher_finds_what_it_asks_for():
    """It reads `capabilities` once, and calls with the last two arguments by keyword."""
    assert attention.capabilities == {"supports_attention_mask": True}
    assert isinstance(attention.capabilities, dict)
    query, key, value = inputs()
    before = len(attention.statistics())
    actual = attention(query, key, value, ALL_BLOCKS | {"beta": 0.125}, is_causal=False, softmax_scale=0.25)
    torch.testing.assert_close(actual, exact(query, key, value))
    assert len(attention.statistics()) == before + 1
    assert not {"vllm", "vllm_omni"} & sys.modules.keys()


class Dispatcher:
    """Stands for the engine: metadata as of vLLM-Omni 0.30, the merge and the call as pull request 4493 has them."""

    def __init__(self, plugin, **static):
        self.plugin, self.static = plugin, static
        self.takes_masks = getattr(plugin, "capabilities", {}).get("supports_attention_mask", False)

    def forward(self, query, key, value, *, attn_mask=None, per_forward=None, extra=None):
        if attn_mask is not None and not self.takes_masks:
            raise ValueError("the plugin announces no masks")
        masks = {} if attn_mask is None else {"attn_mask": attn_mask}
        params = self.static | (per_forward or {}) | (extra or {}) | masks
        return self.plugin(query, key, value, params, is_causal=False, softmax_scale=query.shape[-1] ** -0.5)


def sequences(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


@pytest.mark.parametrize("given", ["nothing", "tokens", "additive"])
@pytest.mark.parametrize("length", [70, 60, 31])
def test_keys_behind_the_valid_length_are_padding(plugin, given, length):
    query, key, value = inputs()
    tokens = torch.ones(2, 70, dtype=torch.bool)
    tokens[1, :13] = given == "nothing"
    masks = {
        "nothing": None,
        "tokens": tokens,
        "additive": torch.zeros(2, 1, 1, 70).masked_fill(~tokens[:, None, None], -torch.inf),
    }
    seen = tokens & (torch.arange(70) < length)
    key[:, length:], value[:, length:] = 9.0, 9.0
    actual = Dispatcher(plugin, **ALL_BLOCKS).forward(
        query, key, value, attn_mask=masks[given], extra={"valid_kv_length": length, "max_seqlen_k": length}
    )
    torch.testing.assert_close(actual, exact(query, key, value, seen[:, None, None]))
    assert counts(plugin) == [(1, 0, {})]


@pytest.mark.parametrize("lengths", [(70,), (50, 20), (1, 30, 39)])
@pytest.mark.parametrize("given", ["nothing", "tokens"])
def test_packed_sequences_do_not_see_each_other(plugin, lengths, given):
    query, key, value = inputs(batch=1)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens = torch.ones(1, 70, dtype=torch.bool)
    tokens[0, 3:7] = given == "nothing"
    both = (document[:, None] == document) & tokens[0]
    ends = sequences(*lengths)
    extra = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    dispatcher = Dispatcher(plugin, **ALL_BLOCKS)
    actual = dispatcher.forward(query, key, value, attn_mask=None if given == "nothing" else tokens, extra=extra)
    torch.testing.assert_close(actual, exact(query, key, value, both))
    is_dense = len(lengths) > 1
    assert counts(plugin)[0][:2] == (1 - is_dense, int(is_dense))
    with pytest.raises(ValueError, match="cu_seqlens_q and cu_seqlens_k must be given together"):
        dispatcher.forward(query, key, value, extra={"cu_seqlens_q": ends})


def test_the_dispatcher_s_state_is_left_alone(plugin):
    """Numbers among it, too, which an unknown setting would be refused for; later parts of the merge win."""
    query, key, value = inputs()
    extra = {"npu_attn_varlen": True, "laser_input_scale": 4.0, "max_seqlen_q": 70, "kv_cache_dtype": None}
    dispatcher = Dispatcher(plugin, **ALL_BLOCKS, dense_steps=0.5)
    for step in range(4):
        state = {"denoise_step_idx": torch.full((2,), step), "total_denoise_steps": torch.full((2,), 4)}
        actual = dispatcher.forward(query, key, value, per_forward=state, extra=extra)
        torch.testing.assert_close(actual, exact(query, key, value))
    assert counts(plugin) == [(2, 2, {"policy: one of the first steps": 2})]
    dispatcher.forward(query, key, value, per_forward={"sparsity": 0.5}, extra={"sparsity": 0.75, "dense_steps": 0.0})
    assert plugin.statistics()[-1].config.sparsity == 0.75


def test_the_entry_point_leads_here():
    project = tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (target,) = project["entry-points"]["vllm_omni.sparse_attn"].values()
    assert EntryPoint("ba_att", target, "vllm_omni.sparse_attn").load() is attention


def test_a_compiled_model_breaks_its_graph_around_the_call(plugin):
    torch._dynamo.reset()
    query, key, value = inputs()

    @torch.compile(backend="eager")
    def layer(query, key, value, params):
        return plugin(query + 0, key, value, params, is_causal=False, softmax_scale=0.25) * 1

    for step in range(3):
        state = {"denoise_step_idx": torch.tensor([step]), "total_denoise_steps": torch.tensor([3])}
        actual = layer(query, key, value, ALL_BLOCKS | {"dense_steps": 0.5} | state)
        torch.testing.assert_close(actual, exact(query, key, value))
    assert counts(plugin) == [(1, 2, {"policy: one of the first steps": 2})]


# The ComfyUI node of docs/serving.md.


@pytest.fixture(scope="module")
def node():
    """What ComfyUI loads: the page's code as a module."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {"__name__": "baatt_node"}
    exec(compile(code, str(PAGE), "exec"), names)
    return SimpleNamespace(**names)


class Model:
    """As much of a ComfyUI model as a node touches."""

    def __init__(self, options):
        self.model_options = options

    def clone(self):
        return Model(dict(self.model_options))


def dense_comfy(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **rest):
    """Stands for ComfyUI's own attention: its layouts, its masks, called from inside its wrapper."""
    assert rest["_inside_attn_wrapper"]
    if not skip_reshape:
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rest.get("scale"))
    return out if skip_output_reshape else rearrange(out, "b h n d -> b n (h d)")


def call(options, *args, **kwargs):
    """Stands for ComfyUI's wrapper of its attention: an override has the word, if there is one."""
    kwargs |= {"transformer_options": options, "_inside_attn_wrapper": True}
    override = options.get("optimized_attention_override")
    return dense_comfy(*args, **kwargs) if override is None else override(dense_comfy, *args, **kwargs)


def comfy_options(node, **changes):
    """(transformer_options with an override, its handle)."""
    handle = Handle(BAAttConfig(**ALL_BLOCKS), Policy(**changes))
    return {"optimized_attention_override": node.make_override(handle)}, handle


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("min_length", [0, 71])
def test_comfyui_layouts(node, skip_reshape, skip_output_reshape, min_length):
    q, k, v = (x.flatten(2) for x in inputs())
    if skip_reshape:
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=4) for x in (q, k, v))
    flags = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    options, handle = comfy_options(node, min_length=min_length)
    actual = call(options | {"block_index": 5}, q, k, v, 4, **flags)
    torch.testing.assert_close(actual, call({}, q, k, v, 4, **flags))
    (layer,) = handle.layers.items()
    assert layer[0] == 5
    assert layer[1][:2] == ((1, 0) if min_length == 0 else (0, 1))


@pytest.mark.parametrize(
    ("shape", "sparse"),
    [((2, 1, 1, 70), True), ((2, 1, 70), True), ((70, 70), False), ((2, 70, 70), False), ((1, 4, 70, 70), False)],
)
def test_comfyui_masks(node, shape, sparse):
    q, k, v = (x.flatten(2) for x in inputs())
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.3
    options, handle = comfy_options(node)
    torch.testing.assert_close(call(options, q, k, v, 4, mask=mask), call({}, q, k, v, 4, mask=mask))
    assert (handle.sparse_calls, handle.dense_calls) == ((1, 0) if sparse else (0, 1))


def test_comfyui_calls_that_stay_dense(node):
    q, k, v = (x.flatten(2) for x in inputs())
    options, handle = comfy_options(node)
    assert torch.equal(
        call(options, q, k, v, 4, low_precision_attention=False, scale=0.5), call({}, q, k, v, 4, scale=0.5)
    )
    assert torch.equal(call(options, q, k[:, :9], v[:, :9], 4), call({}, q, k[:, :9], v[:, :9], 4))
    assert handle.sparse_calls == 0
    assert handle.reasons == {
        "a model that asks for exact attention": 1,
        "other keys than queries by their number, taken for cross-attention": 1,
    }
    torch.testing.assert_close(call(options, q, k, v, 4, scale=0.5), call({}, q, k, v, 4, scale=0.5))
    assert handle.sparse_calls == 1


def test_comfyui_steps_and_layers(node):
    q, k, v = (x.flatten(2) for x in inputs())
    options, handle = comfy_options(node, dense_steps=0.5, dense_layers=(1,))
    sigmas = torch.tensor([14.6, 5.0, 2.0, 0.7, 0.0])
    for sigma in sigmas[:-1]:
        for _ in range(2):  # guidance evaluates a step twice
            state = {"sample_sigmas": sigmas, "sigmas": sigma[None].expand(2), "block_index": 0}
            call(options | state, q, k, v, 4)
    call(options | state | {"block_index": 1}, q, k, v, 4)
    assert handle.reasons == {"policy: one of the first steps": 4, "policy: dense layer 1": 1}
    assert handle.sparse_calls == 4


def test_the_comfyui_node_patches_a_copy(node):
    model = Model({"transformer_options": {"patches": {}}})
    required = node.NODE_CLASS_MAPPINGS["BAAtt"].INPUT_TYPES()["required"]
    settings = {name: field[1]["default"] for name, field in required.items() if name != "model"}
    (patched,) = node.BAAtt().patch(model, **settings | {"min_length": 0, "dense_steps": 0.0})
    assert model.model_options == {"transformer_options": {"patches": {}}}
    options = patched.model_options["transformer_options"]
    q, k, v = (x.flatten(2) for x in inputs(queries=400, keys=400))
    assert not torch.allclose(call(options, q, k, v, 4), call({}, q, k, v, 4))
    handle = options["optimized_attention_override"].handle
    assert (handle.sparse_calls, handle.dense_calls) == (1, 0)
    assert handle.sparsity == 0.5
    with pytest.raises(ValueError, match="must not have another attention override"):
        node.BAAtt().patch(patched, **settings)
