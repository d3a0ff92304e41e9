"""Models of transformers: every route of the attention interface is exact when all blocks are kept, and counted.

Which version has what is asked of the library itself; see `HEEDS_IS_CAUSAL` and `needs`.
"""

import importlib.util
import inspect
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn

import baatt
from baatt import BAAttConfig, Policy, ba_attention
from baatt.integrations import enable as core
from baatt.integrations import masks
from baatt.integrations import transformers as adapter
from baatt.integrations.handle import NoSparseAttentionWarning

transformers = pytest.importorskip("transformers")
from transformers import masking_utils  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

MASK = 63
ALL_BLOCKS = BAAttConfig(block_size=16, sparsity=0.0)
HALF = BAAttConfig(block_size=16, sparsity=0.5)
SMALL = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "num_hidden_layers": 2}
PADDINGS = ("none", "left", "right")
WINDOW = "a sliding window"
#: Decoder-only models become bidirectional by config.is_causal=False.
HEEDS_IS_CAUSAL = '"is_causal"' in inspect.getsource(masking_utils.create_causal_mask)
heeds_is_causal = pytest.mark.skipif(not HEEDS_IS_CAUSAL, reason="this version does not heed config.is_causal")


def needs(*names):
    missing = [name for name in names if not hasattr(transformers, name)]
    return pytest.mark.skipif(bool(missing), reason=f"this version has no {missing}")


def follows(name):
    kind = getattr(transformers, name, None)
    return kind is not None and kind._can_set_attn_implementation()


# Models, all tiny and random.


def build(name, causal=None, **changes):
    config = getattr(transformers, name.replace("ForCausalLM", "").removesuffix("Model") + "Config")(**changes)
    if causal is not None:
        config.is_causal = causal
    torch.manual_seed(0)
    return getattr(transformers, name.replace("TextFor", "For"))(config).eval()


def modernbert(layers=4, **changes):
    size = {**SMALL, "cls_token_id": 1, "sep_token_id": 2}
    return build("ModernBertModel", **size, num_hidden_layers=layers, local_attention=32, **changes)


def eurobert(**changes):
    return build("EuroBertModel", **{**GROUPED, "mask_token_id": MASK, **changes})


def decoder(name, causal=None, **changes):
    return build(name, causal, **GROUPED, **changes)


MODELS = {
    "ModernBERT": modernbert,
    "EuroBERT": eurobert,
    "Qwen2": lambda causal=None: decoder("Qwen2Model", causal),
    "Qwen3": lambda causal=None: decoder("Qwen3Model", causal, head_dim=8),
    "Llama": lambda causal=None: decoder("LlamaModel", causal),
    "Mistral": lambda causal=None: decoder("MistralModel", causal, sliding_window=32),
    "Gemma3": lambda causal=None: decoder(
        "Gemma3TextModel", causal, head_dim=8, sliding_window=32, layer_types=["sliding_attention", "full_attention"]
    ),
}
#: Model, its config.is_causal, and what each layer does with 70 tokens: sparse, window.
ROUTES = [
    ("ModernBERT", None, "swws"),
    ("EuroBERT", None, "ss"),
    *((name, causal, "ss") for name in ("Qwen2", "Qwen3", "Llama") for causal in (None, False)),
    *(("Mistral", causal, "ww") for causal in (None, False)),
    *(("Gemma3", causal, "ws") for causal in (None, False)),
]
IDS = [f"{name}{'' if causal is None else '-bidirectional'}" for name, causal, _ in ROUTES]


def tokens(length=70):
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(1))


def padding(kind, length=70):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, {"none": slice(0, 0), "left": slice(0, length // 5), "right": slice(-(length // 7), None)}[kind]] = 0
    return mask


def run(model, ids, mask=None, **options):
    options |= {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        return model(ids, attention_mask=mask, **options)[0]


@pytest.fixture(autouse=True)
def expected_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoSparseAttentionWarning)
        yield


@pytest.fixture
def registered():
    handles = []

    def register(*args, **options):
        handles.append(adapter.register(*args, **options))
        return handles[-1]

    before = registries()
    yield register
    for handle in handles:
        handle.disable()
    assert registries() == before


def registries():
    return [dict(mapping) for mapping in adapter._registries()]


def routes(handle):
    """What each layer did, in the letters of `ROUTES`, where every layer was called once."""
    letters = {None: "s", WINDOW: "w"}
    assert all(calls.sparse + calls.dense == 1 for calls in handle.layers.values())
    return "".join(letters[next(iter(calls.reasons), None)] for calls in handle.layers.values())


@pytest.mark.parametrize("pad", PADDINGS)
@pytest.mark.parametrize(("name", "causal", "expected"), ROUTES, ids=IDS)
def test_routes_of_enable(name, causal, expected, pad):
    if name == "EuroBERT" and not hasattr(transformers, "EuroBertModel"):
        pytest.skip("this version has no EuroBERT")
    if name == "ModernBERT" and not follows("ModernBertModel"):
        pytest.skip("ModernBERT does not follow the interface in this version")
    model = MODELS[name]() if causal is None else MODELS[name](causal)
    ids, mask = tokens(), None if pad == "none" else padding(pad)
    dense = run(model, ids, mask)
    with baatt.enable(model, ALL_BLOCKS) as handle:
        actual = run(model, ids, mask)
    real = padding(pad).bool()
    torch.testing.assert_close(actual[real], dense[real])
    assert routes(handle) == expected
    assert torch.equal(run(model, ids, mask), dense)


@pytest.mark.parametrize("pad", PADDINGS)
@pytest.mark.parametrize(("name", "causal", "expected"), ROUTES, ids=IDS)
def test_routes_of_register(name, causal, expected, pad, registered):
    if name == "EuroBERT" and not hasattr(transformers, "EuroBertModel"):
        pytest.skip("this version has no EuroBERT")
    if name == "ModernBERT" and not follows("ModernBertModel"):
        pytest.skip("ModernBERT does not follow the interface in this version")
    model = MODELS[name]() if causal is None else MODELS[name](causal)
    ids, mask = tokens(), padding(pad)
    dense = run(model, ids, mask)
    handle = registered("ba_att", ALL_BLOCKS)
    model.set_attn_implementation("ba_att")
    torch.testing.assert_close(run(model, ids, mask)[mask.bool()], dense[mask.bool()])
    assert routes(handle) == expected


@pytest.mark.skipif(not follows("ModernBertModel"), reason="does not follow the interface in this version")
@pytest.mark.parametrize(
    ("length", "pad", "expected"), [(11, "none", "ssss"), (11, "left", "ssss"), (45, "none", "swws")]
)
def test_windows_that_hold_all_keys(length, pad, expected):
    model, ids, mask = modernbert(), tokens(length), padding(pad, length)
    dense = run(model, ids, mask)
    with baatt.enable(model, ALL_BLOCKS) as handle:
        torch.testing.assert_close(run(model, ids, mask)[mask.bool()], dense[mask.bool()])
    assert routes(handle) == expected


def test_a_model_outside_of_the_interface_is_refused():
    """Of which `set_attn_implementation` only logs a warning."""
    model = transformers.DebertaV2Model(
        transformers.DebertaV2Config(**SMALL, num_hidden_layers=1, relative_attention=False)
    ).eval()
    with pytest.raises(ValueError, match="model must be of a known kind"):
        baatt.enable(model, ALL_BLOCKS)


@pytest.mark.skipif(follows("ModernBertModel"), reason="ModernBERT follows the interface in this version")
def test_an_old_modernbert_is_refused():
    with pytest.raises(ValueError, match="model must be of a known kind"):
        baatt.enable(modernbert(), ALL_BLOCKS)


# Sparse for real.


@heeds_is_causal
@pytest.mark.parametrize("pad", PADDINGS)
@pytest.mark.parametrize(("causal", "kept"), [(1, (1 + 1 + 2 + 2 + 3) / 15), (None, 3 / 5)])
def test_half_the_blocks_are_what_ba_attention_gives(causal, kept, pad):
    real = padding(pad).bool()

    def by_hand(module, query, key, value, attention_mask, scaling=None, **options):
        masks = {} if pad == "none" else {"key_mask": real, "query_mask": real}
        out = ba_attention(query, key, value, HALF, causal=causal, **masks, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    model, ids, mask = MODELS["Qwen2"](causal=causal is not None), tokens(), padding(pad)
    dense = run(model, ids, mask)
    with baatt.enable(model, HALF) as handle:
        actual = run(model, ids, mask)
    for mapping, function in zip(adapter._registries(), (by_hand, masking_utils.sdpa_mask), strict=True):
        mapping["by_hand"] = function
    model.set_attn_implementation("by_hand")
    torch.testing.assert_close(actual, run(model, ids, mask))
    for mapping in adapter._registries():
        del mapping["by_hand"]
    assert (actual - dense).abs().max() > 1e-3
    assert (handle.sparse_calls, handle.dense_calls) == (2, 0)
    assert handle.sparsity == pytest.approx(1 - kept)


# The model's own masks, and models that work on the masks they are given.


@needs("EuroBertModel")
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_user_s_mask_of_pairs_stays_dense(dtype):
    model, ids = eurobert(), tokens()
    mask = torch.rand(2, 1, 70, 70, generator=torch.Generator().manual_seed(2)) > 0.5
    mask |= torch.eye(70, dtype=torch.bool)
    mask = mask if dtype == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    dense = run(model, ids, mask)
    with baatt.enable(model, ALL_BLOCKS) as handle:
        assert torch.equal(run(model, ids, mask), dense)
    assert handle.reasons == {"a mask that differs between queries": 2}


@needs("EuroBertModel")
@pytest.mark.parametrize("additive", [False, True])
def test_a_user_s_mask_of_keys_goes_sparse(additive):
    model, ids, mask = eurobert(), tokens(), padding("left").bool()[:, None, None]
    mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    dense = run(model, ids, mask)
    with baatt.enable(model, ALL_BLOCKS) as handle:
        torch.testing.assert_close(run(model, ids, mask), dense)
    assert (handle.sparse_calls, handle.dense_calls) == (2, 0)


@needs("Siglip2VisionModel")
@heeds_is_causal
def test_a_model_that_repeats_its_mask_over_heads():
    """Siglip2's pooling head does, whose images of different sizes are padded."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = build("Siglip2VisionModel", **size, num_patches=64, patch_size=2)
    pixels = torch.randn(2, 48, 12, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 48, dtype=torch.long)
    mask[1, 35:] = 0
    inputs = {"pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[6, 8], [5, 7]])}
    with torch.no_grad():
        dense = model(pixels, **inputs).pooler_output
        with baatt.enable(model, ALL_BLOCKS) as handle:
            actual = model(pixels, **inputs).pooler_output
    torch.testing.assert_close(actual, dense)
    # The pooling head is a module of torch, which does not come here; layers are numbered by their path.
    assert {layer: (calls.sparse, calls.dense) for layer, calls in handle.layers.items()} == {0: (1, 0), 1: (1, 0)}


@heeds_is_causal
@pytest.mark.parametrize("options", [{"use_vmap": True}, {"allow_is_bidirectional_skip": False}])
def test_a_mask_that_is_needed_in_full_is_sdpa_s(options, registered):
    registered("ba_att")
    make = masking_utils.AttentionMaskInterface()["ba_att"]
    arguments = {
        **{"batch_size": 2, "q_length": 9, "kv_length": 9, "allow_is_causal_skip": False},
        **{"mask_function": masking_utils.bidirectional_mask_function, "attention_mask": padding("left", 9).bool()},
    }
    assert torch.equal(make(**arguments, **options), masking_utils.sdpa_mask(**arguments, **options))
    assert make(**arguments).shape == (2, 1, 1, 9)


@heeds_is_causal
def test_keys_of_a_window_and_behind_the_padding_mask(registered):
    registered("ba_att")
    make = masking_utils.AttentionMaskInterface()["ba_att"]
    arguments = {"batch_size": 2, "q_length": 4, "mask_function": masking_utils.bidirectional_mask_function}
    mask = padding("left", 10).bool()
    made = make(**arguments, kv_length=7, kv_offset=5, attention_mask=mask)
    assert torch.equal(made[:, 0, 0, :5], mask[:, 5:])
    assert not made[..., 5:].any()
    assert make(**arguments, kv_length=3, kv_offset=5, attention_mask=mask) is None  # all of these keys count
    assert make(**arguments, kv_length=3) is None


# What else stays dense.


@needs("EuroBertModel")
@pytest.mark.parametrize("pad", PADDINGS)
def test_dropout_in_training(pad, registered):
    model, ids, mask = eurobert(attention_dropout=0.25).train(), tokens(), padding(pad)
    torch.manual_seed(4)
    expected = model(ids, attention_mask=mask)[0]
    expected.sum().backward()
    gradients = [x.grad.clone() for x in model.parameters()]
    model.zero_grad()
    handle = registered("ba_att", ALL_BLOCKS)
    model.set_attn_implementation("ba_att")
    torch.manual_seed(4)
    actual = model(ids, attention_mask=mask)[0]
    actual.sum().backward()
    assert handle.reasons == {"dropout in training": 2}
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close([x.grad for x in model.parameters()], gradients)


@needs("EuroBertModel")
def test_gradients_are_exact(registered):
    model, ids, mask = eurobert(), tokens(), padding("left")
    model(ids, attention_mask=mask)[0].square().sum().backward()
    gradients = [x.grad.clone() for x in model.parameters()]
    model.zero_grad()
    with baatt.enable(model, HALF) as handle:
        model(ids, attention_mask=mask)[0].square().sum().backward()
    assert handle.reasons == {"gradients are asked for: call the model under torch.no_grad()": 2}
    torch.testing.assert_close([x.grad for x in model.parameters()], gradients)


@needs("Gemma2ForCausalLM")
@pytest.mark.parametrize("pad", PADDINGS)
@pytest.mark.parametrize("causal", [None, False])
def test_softcap_is_exact(pad, causal, registered):
    options = {**GROUPED, "head_dim": 8, "attn_logit_softcapping": 0.05, "query_pre_attn_scalar": 8}
    model = build("Gemma2Model", causal, **options, sliding_window=32)
    model.set_attn_implementation("eager")  # sdpa refuses a softcap or, in older versions, leaves it out
    ids, mask = tokens(), padding(pad)
    expected = run(model, ids, mask)
    handle = registered("ba_att", ALL_BLOCKS)
    model.set_attn_implementation("ba_att")
    torch.testing.assert_close(run(model, ids, mask)[mask.bool()], expected[mask.bool()])
    assert handle.dense_calls == 2
    if model._supports_sdpa:
        return
    with pytest.raises(ValueError, match=r"model must support attn_implementation='sdpa'.*got Gemma2Model"):
        baatt.enable(model, ALL_BLOCKS)
    assert model.config._attn_implementation == "ba_att"


def call(**options):
    """One call of the registered function, on a module of its own."""
    module = nn.Module().eval()
    module.is_causal, module.num_key_value_groups = False, 2
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, heads, 45, 8, generator=generator) for heads in (4, 2, 2))
    mask = options.pop("mask", None)
    return ALL_ATTENTION_FUNCTIONS["ba_att"](module, q, k, v, mask, **options)[0], (module, q, k, v, mask)


def test_softcap_takes_masks_of_both_kinds(registered):
    handle = registered("ba_att", ALL_BLOCKS)
    mask = padding("left", 45).bool()[:, None, None]
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    by_bool, (_, q, k, v, _) = call(mask=mask, softcap=2.0)
    by_float, _ = call(mask=additive, softcap=2.0)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = 2 * torch.tanh(q @ k.transpose(2, 3) * 8**-0.5 / 2)
    expected = (scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v).transpose(1, 2)
    torch.testing.assert_close(by_bool, expected)
    torch.testing.assert_close(by_float, expected)
    assert handle.reasons == {"softcap": 2}


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [("position_bias", torch.randn(1, 4, 45, 45), "position bias"), ("cache", object(), "a paged cache")],
)
def test_position_bias_and_paged_caches_are_sdpa_s(option, value, reason, registered):
    handle = registered("ba_att", ALL_BLOCKS)
    actual, arguments = call(**{option: value})
    assert torch.equal(actual, ALL_ATTENTION_FUNCTIONS["sdpa"](*arguments, **{option: value})[0])
    assert handle.reasons == {reason: 1}


@pytest.mark.parametrize("name", ["s_aux", "sinks"])
def test_attention_sinks_are_refused(name, registered):
    registered("ba_att")
    with pytest.raises(ValueError, match="module must have no attention sinks"):
        call(**{name: torch.zeros(4)})


@needs("GptOssForCausalLM")
def test_a_model_with_attention_sinks_is_refused():
    size = {**GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    with pytest.raises(ValueError, match="model must support attn_implementation='sdpa'"):
        baatt.enable(build("GptOssForCausalLM", **size), ALL_BLOCKS)


@pytest.mark.skipif(not follows("T5Model"), reason="T5 does not follow the interface in this version")
def test_position_bias_of_t5():
    size = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
    model = build("T5Model", **size, pad_token_id=0, decoder_start_token_id=0)
    ids, mask = tokens(), padding("left")
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": tokens(30), "use_cache": False}
    with torch.no_grad():
        dense = model(**inputs)[0]
        with baatt.enable(model, ALL_BLOCKS) as handle:
            torch.testing.assert_close(model(**inputs)[0], dense)
    # That of cross-attention is all zeros.
    assert handle.sparse_calls == 0
    assert handle.reasons == {"position bias": 6}


def test_cross_attention_is_known_by_class_path_and_role():
    model = transformers.BartModel(
        transformers.BartConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=80,
        )
    ).eval()  # fmt: skip
    ids, mask = tokens(), padding("left")
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids, "use_cache": False}
    with torch.no_grad():
        dense = model(**inputs)[0]
        for policy, sparse in ((Policy(), 2), (Policy(only_self_attention=False), 3)):
            with baatt.enable(model, ALL_BLOCKS, policy) as handle:
                torch.testing.assert_close(model(**inputs)[0], dense)
            assert handle.sparse_calls == sparse
            assert handle.reasons.get("policy: cross-attention", 0) == 3 - sparse


# Decoders: the prompt is sparse, every further token dense.


ROWS = "a decoding step of one query"
DECODERS = {
    "Qwen2": lambda: decoder("Qwen2ForCausalLM"),
    "Qwen3": lambda: decoder("Qwen3ForCausalLM", head_dim=8),
    "Llama": lambda: decoder("LlamaForCausalLM"),
    "Gemma3": lambda: decoder(
        "Gemma3TextForCausalLM", head_dim=8, sliding_window=32, layer_types=["sliding_attention", "full_attention"]
    ),
}


@pytest.mark.parametrize("pad", PADDINGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_of_decoders(name, cache, pad):
    model, ids = DECODERS[name](), tokens(50)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "disable_compile": True}
    options |= {"attention_mask": padding(pad, 50), "cache_implementation": cache}
    expected = model.generate(ids, **options)
    with baatt.enable(model, ALL_BLOCKS) as handle:
        assert torch.equal(model.generate(ids, **options), expected)
    layers = {layer: (calls.sparse, calls.dense) for layer, calls in handle.layers.items()}
    assert layers == {0: (0, 6) if name == "Gemma3" else (1, 5), 1: (1, 5)}
    assert handle.reasons == {ROWS: 10} | ({WINDOW: 1} if name == "Gemma3" else {})
    with baatt.enable(model, HALF) as handle:
        model.generate(ids, **options)
    assert handle.sparsity > 0


@pytest.mark.parametrize("pad", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_in_chunks(cache, pad):
    """M > N: the queries of a chunk stand behind what the cache holds, and a static one has room behind them."""
    model, ids, mask = DECODERS["Qwen3"](), tokens(90), padding(pad, 90)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    expected = run(model, ids, mask, position_ids=places)
    past = transformers.DynamicCache()
    if cache == "static":
        past = transformers.StaticCache(config=model.config, max_cache_len=128)
    has_position = "cache_position" in inspect.signature(model.forward).parameters
    with baatt.enable(model, ALL_BLOCKS, Policy(min_queries=16)) as handle, torch.no_grad():
        for first, last in ((0, 40), (40, 80), (80, 90)):
            options = {"attention_mask": mask[:, :last], "position_ids": places[:, first:last], "past_key_values": past}
            options |= {"cache_position": torch.arange(first, last)} if has_position else {}
            out, rows = model(ids[:, first:last], **options).logits, mask[:, first:last].bool()
            torch.testing.assert_close(out[rows], expected[:, first:last][rows])
    assert {layer: (calls.sparse, calls.dense) for layer, calls in handle.layers.items()} == {0: (2, 1), 1: (2, 1)}
    assert handle.reasons == {"policy: fewer queries than min_queries=16, of more keys": 2}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_share_one_reading_of_a_mask(mode, monkeypatch):
    """In inference mode too, whose tensors do not say whether they were written to."""
    read, readings = masks.read_mask, []
    monkeypatch.setattr(masks, "read_mask", lambda mask: (readings.append(mask.shape), read(mask))[1])
    model, ids, mask = DECODERS["Llama"](), tokens(), padding("left")
    with mode(), baatt.enable(model, ALL_BLOCKS) as handle:
        for forwards in (1, 2):
            model(ids, attention_mask=mask)
            assert len(readings) == forwards
    assert handle.sparse_calls == 2 * 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_changed_between_calls_of_a_part(mode):
    """A part of the model called by itself begins no forward of the model."""
    model, ids = decoder("Qwen2ForCausalLM"), tokens()
    mask = torch.ones(1, 1, 70, 70, dtype=torch.bool).tril()
    with mode():
        expected = run(model.model, ids, torch.ones_like(mask))
        with baatt.enable(model, ALL_BLOCKS):
            run(model, ids)
            changing = mask.clone()
            run(model.model, ids, changing)
            changing.fill_(True)
            torch.testing.assert_close(run(model.model, ids, changing), expected)


def test_a_config_that_sorts_is_refused_for_a_causal_model():
    paper = BAAttConfig.preset("paper")
    model, ids = MODELS["Qwen2"](), tokens()
    with pytest.raises(
        ValueError, match=r"config\.sort must be 'none' for Qwen2Model, whose layers are causal, got 'qk'"
    ):
        baatt.enable(model, paper)
    assert model.config._attn_implementation == "sdpa"
    if HEEDS_IS_CAUSAL:
        with baatt.enable(MODELS["Qwen2"](causal=False), paper):
            pass
    model, mask = stub(), block_causal(70, 32)
    dense = run(model, ids, mask)
    reason = "sort must be 'none' with causal=32 unless segment divides it, got 'qk' with segment=1024"
    with baatt.enable(model, paper) as handle, warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.warns(NoSparseAttentionWarning, match="sort must be 'none' with causal=32"):
            assert torch.equal(run(model, ids, mask), dense)
    assert handle.reasons == {reason: 2}


# DiffusionGemma: a causal encoder fills a cache, a bidirectional decoder reads it behind its canvas.


def diffusion_gemma():
    text = {
        **{**GROUPED, "eos_token_id": None, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1},
        **{"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24},
        **{"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8},
    }
    vision = {
        **{"model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
    }
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=20, image_token_id=61, boi_token_id=62, eoi_token_id=MASK
    )
    torch.manual_seed(0)
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    for x in model.parameters():
        if x.std() == 0:
            nn.init.normal_(x, std=0.3)
    return model


@needs("DiffusionGemmaForBlockDiffusion")
@pytest.mark.parametrize("pad", PADDINGS)
def test_diffusion_gemma_forward(pad):
    model, mask = diffusion_gemma(), padding(pad, 50)
    inputs = {
        **{"input_ids": tokens(50), "attention_mask": mask, "decoder_input_ids": tokens(20)},
        "decoder_attention_mask": nn.functional.pad(mask, (0, 20), value=1),
    }
    with torch.no_grad():
        dense = model(**inputs).logits
        with baatt.enable(model, ALL_BLOCKS, Policy(min_queries=0)) as handle:
            torch.testing.assert_close(model(**inputs).logits, dense)
        with baatt.enable(model, ALL_BLOCKS, Policy(min_queries=256)) as cautious:
            torch.testing.assert_close(model(**inputs).logits, dense)
    # The canvas of sliding layers too: their cache is cut to the window, behind which it sees all.
    assert {layer: (calls.sparse, calls.dense) for layer, calls in handle.layers.items()} == {0: (1, 1), 1: (2, 0)}
    assert handle.reasons == {WINDOW: 1}
    assert cautious.reasons == {WINDOW: 1, "policy: fewer queries than min_queries=256, of more keys": 2}


def generate(model, mask, **options):
    torch.manual_seed(3)
    made = model.generate(tokens(50), attention_mask=mask, max_new_tokens=40, max_denoising_steps=2, **options)
    return getattr(made, "sequences", made)


@needs("DiffusionGemmaForBlockDiffusion")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_diffusion_gemma_generates_the_same_tokens(cache):
    model, mask = diffusion_gemma(), padding("left", 50)
    options = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    dense = generate(model, mask, **options)
    with baatt.enable(model, ALL_BLOCKS, Policy(min_queries=0)) as handle:
        assert torch.equal(generate(model, mask, **options), dense)
    # Two canvases of two steps, each behind a pass of the encoder.
    assert {layer: (calls.sparse, calls.dense) for layer, calls in handle.layers.items()} == {0: (4, 2), 1: (6, 0)}
    assert handle.reasons == {WINDOW: 2}
    assert dense.shape == (2, 90)


@pytest.mark.slow
@needs("DiffusionGemmaForBlockDiffusion")
def test_diffusion_gemma_generates_from_full_graphs():
    """A static cache compiles: a side effect in the graph would compile again at every call, until it fails."""
    torch._dynamo.reset()
    model, mask = diffusion_gemma(), padding("left", 50)
    options = {"cache_implementation": "static"}
    dense = generate(model, mask, **options, disable_compile=True)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with baatt.enable(model, ALL_BLOCKS, Policy(min_queries=0)) as handle:
        model._compile_functions = lambda sampler, stopping: (model.model.encoder, compiled, sampler, stopping)
        assert torch.equal(generate(model, mask, **options), dense)
    assert {layer: calls.sparse for layer, calls in handle.layers.items()} == {0: 4, 1: 6}


# Compiled graphs.


@pytest.mark.skipif(not follows("ModernBertModel"), reason="does not follow the interface in this version")
def test_full_graphs_of_enable():
    torch._dynamo.reset()
    model, ids, mask = modernbert(layers=2), tokens(), padding("left")
    dense, padded = run(model, ids), run(model, ids, mask)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with baatt.enable(model, ALL_BLOCKS, Policy(dense_steps=0.5)) as handle:
        for step in range(4):
            handle.at_step(step, 4)
            torch.testing.assert_close(run(compiled, ids), dense)
        torch.testing.assert_close(run(compiled, ids, mask), padded)
    # The window of layer 1 is known while tracing, when nothing is counted.
    assert {layer: (calls.sparse, calls.dense) for layer, calls in handle.layers.items()} == {0: (3, 2)}
    assert handle.reasons == {"policy: one of the first steps": 2}
    torch.testing.assert_close(run(compiled, ids), dense)
    assert handle.sparse_calls == 3


@pytest.mark.slow
@needs("EuroBertModel")
def test_full_graphs_of_register_and_of_shared_configs(registered):
    torch._dynamo.reset()
    model, ids, mask = eurobert(), tokens(), padding("right")
    other = type(model)(model.config).eval()
    dense, others = run(model, ids, mask), run(other, ids, mask)
    handle = registered("ba_att", ALL_BLOCKS)
    model.set_attn_implementation("ba_att")
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager"), ids, mask), dense)
    assert (handle.sparse_calls, handle.dense_calls) == (2, 0)
    with baatt.enable(model, ALL_BLOCKS) as attached:
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(compiled, ids, mask), others)
        assert (attached.sparse_calls, attached.dense_calls) == (0, 0)
    assert handle.sparse_calls == 2


# Nothing is left behind, and models do not disturb each other.


def snapshot(model):
    """Configs as bytes; of every module its attributes by identity and what those hold that are dicts, as hooks are."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    held = {name: [list(x) for x in vars(module).values() if isinstance(x, dict)] for name, module in modules(model)}
    attributes = {name: {key: id(x) for key, x in vars(module).items()} for name, module in modules(model)}
    return [pickle.dumps(vars(config)) for config in configs.values()], attributes, held, registries()


def modules(model):
    return list(model.named_modules())


@heeds_is_causal
@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("former", ["sdpa", "eager"])
def test_state_is_as_before(fail, former):
    model, ids = MODELS["Gemma3"](causal=False), tokens()
    model.set_attn_implementation(former)
    expected = run(model, ids)
    before = snapshot(model)
    try:
        with baatt.enable(model, ALL_BLOCKS) as handle:
            assert model.config._attn_implementation == "ba_att_enabled"
            torch.testing.assert_close(run(model, ids), expected)
            if fail:
                raise KeyError("a user's mistake")
    except KeyError:
        assert fail
    assert handle.sparse_calls == 1
    assert snapshot(model) == before
    assert torch.equal(run(model, ids), expected)


@needs("DiffusionGemmaForBlockDiffusion")
def test_state_of_all_sub_configs_is_as_before():
    model = diffusion_gemma()
    model.config.vision_config._attn_implementation_internal = "eager"
    before = snapshot(model)
    with baatt.enable(model, ALL_BLOCKS):
        configs = model.config, model.config.text_config, model.config.vision_config
        assert {config._attn_implementation for config in configs} == {"ba_att_enabled"}
    assert snapshot(model) == before


def test_a_refusal_changes_nothing():
    model = MODELS["Qwen2"]()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"policy.dense_layers must lie in \[-2, 2\) for 2 layers, got 2"):
        baatt.enable(model, ALL_BLOCKS, Policy(dense_layers=(2,)))
    assert snapshot(model) == before


@heeds_is_causal
def test_models_may_share_a_config():
    first, ids = MODELS["Qwen2"](causal=False), tokens()
    second, third = (type(first)(first.config).eval() for _ in range(2))
    assert first.config is second.config
    expected = [run(model, ids) for model in (first, second, third)]
    handle = baatt.enable(first, ALL_BLOCKS)
    other = baatt.enable(second, ALL_BLOCKS, Policy(dense_layers=(-1,)))
    for model, dense in zip((first, second, third), expected, strict=True):
        torch.testing.assert_close(run(model, ids), dense)
    assert (handle.sparse_calls, handle.dense_calls) == (2, 0)
    assert (other.sparse_calls, other.dense_calls) == (1, 1)
    handle.disable()  # the first that came goes first
    torch.testing.assert_close(run(first, ids), expected[0])
    torch.testing.assert_close(run(second, ids), expected[1])
    assert (handle.sparse_calls, other.sparse_calls) == (2, 2)
    other.disable()
    assert first.config._attn_implementation == "sdpa"
    assert all(
        torch.equal(run(model, ids), dense) for model, dense in zip((first, second, third), expected, strict=True)
    )


@heeds_is_causal
def test_another_implementation_may_be_chosen_meanwhile():
    model = MODELS["Qwen2"](causal=False)
    with baatt.enable(model, ALL_BLOCKS) as handle:
        model.set_attn_implementation("eager")
        run(model, tokens())
    assert (handle.sparse_calls, handle.dense_calls) == (0, 0)
    assert model.config._attn_implementation == "eager"  # and stays, as other changes of others do


# Remote code.


class StubConfig(transformers.PretrainedConfig):
    model_type = "llada2_stub"
    num_attention_heads, hidden_size, num_hidden_layers, vocab_size = 4, 32, 2, 64


class StubAttention(nn.Module):
    """Takes its function by subscript, which transformers' own test does not know."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, False
        self.num_key_value_groups = 2
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, mask):
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = (half.unflatten(-1, (2, 8)).transpose(1, 2) for half in self.kv(x).chunk(2, dim=-1))
        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return function(self, q, k, v, mask, dropout=0.0, scaling=8**-0.5, sliding_window=None)[0].flatten(2)


class StubModel(transformers.PreTrainedModel):
    config_class = StubConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(StubAttention(config, layer) for layer in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x, attention_mask)
        return (x,)


class LLaDA2StubModelLM(StubModel):
    """The name by which LLaDA2's remote code is known."""


def stub(kind=LLaDA2StubModelLM, **changes):
    torch.manual_seed(0)
    return kind(StubConfig(**changes)).eval()


def test_llada2_is_reached_although_transformers_refuses():
    model, ids = stub(), tokens()
    assert not model._can_set_attn_implementation()
    assert core.find_adapter(model) == (adapter, [model])
    dense = run(model, ids)
    with baatt.enable(model, ALL_BLOCKS) as handle:
        torch.testing.assert_close(run(model, ids), dense)
    assert (handle.sparse_calls, handle.dense_calls) == (2, 0)
    with pytest.raises(ValueError, match="model must be of a known kind"):
        baatt.enable(stub(StubModel), ALL_BLOCKS)


def block_causal(length, size):
    """As LLaDA2's `generate` makes it: the logarithm of zeros and ones in bfloat16."""
    blocks = torch.arange(length) // size
    return (blocks[:, None] >= blocks).float().log().to(torch.float32)[None, None]


@pytest.mark.parametrize("size", [4, 32])
def test_generation_of_llada2_is_a_block_causal_pass_a_step(size):
    """Each step is a pass over all blocks so far, with a slice of one mask."""
    model, canvas = stub(), torch.full((1, 96), MASK)
    canvas[:, :20] = tokens(20)[:1]
    mask = block_causal(96, size)
    windows = [window for window in range(size, 97, size) if window > 20]
    dense = [run(model, canvas[:, :window], mask[:, :, :window, :window]) for window in windows for _ in range(2)]
    with baatt.enable(model, ALL_BLOCKS) as handle:
        for window, expected in zip((one for one in windows for _ in range(2)), dense, strict=True):
            torch.testing.assert_close(run(model, canvas[:, :window], mask[:, :, :window, :window]), expected)
    assert (handle.sparse_calls, handle.dense_calls) == (4 * len(windows), 0)
    with baatt.enable(model, HALF) as handle:
        assert (run(model, canvas, mask) - dense[-1]).abs().max() > 1e-4
    q = torch.zeros(1, 1, 96, 8)
    kept = baatt.make_plan(q, q, HALF, causal=size).selection.count.sum()
    seen = baatt.make_plan(q, q, ALL_BLOCKS, causal=size).selection.count.sum()
    assert handle.sparsity == pytest.approx(1 - float(kept / seen))


def test_steps_are_read_from_masked_tokens_without_a_cache():
    model, ids = stub(mask_token_id=MASK), tokens()
    with baatt.enable(model, HALF, Policy(dense_steps=0.5)) as handle:
        for masked in (40, 30, 20, 10):
            now = ids.clone()
            now[:, 70 - masked :] = MASK
            run(model, now)
        assert (handle.sparse_calls, handle.dense_calls) == (4, 4)
        assert handle.reasons == {"policy: one of the first steps": 4}
        share = handle.progress.share
        cache = transformers.DynamicCache()
        run(model, now[:, -5:], past_key_values=[torch.zeros(1)])  # a part of the sequence, with a filled cache
        assert handle.progress.share == share
        run(model, ids.fill_(MASK), past_key_values=cache)  # an empty one: a new loop
        assert handle.progress.share == 0
    model = stub()
    with baatt.enable(model, HALF, Policy(dense_steps=0.5)) as unknown:
        run(model, ids)
    assert unknown.reasons == {"the denoising step is not known: call handle.at_step(step, total) in the loop": 2}


@heeds_is_causal
def test_a_tower_outside_of_the_interface_keeps_its_own():
    model, ids = MODELS["Qwen2"](causal=False), tokens()
    model.tower = stub(StubModel)
    former = model.tower.config._attn_implementation
    with baatt.enable(model, ALL_BLOCKS) as handle:
        assert model.tower.config._attn_implementation == former
        run(model.tower, ids)
        run(model, ids)
    assert (handle.sparse_calls, handle.dense_calls) == (2, 0)


def test_a_model_that_never_calls_the_interface_is_reported(tmp_path, monkeypatch):
    """Without a class of attention in its file transformers takes it for one that follows the interface."""
    source = tmp_path / "modeling_silent.py"
    source.write_text(
        "import torch\nimport transformers\n\n\n"
        "class SilentModel(transformers.PreTrainedModel):\n"
        "    config_class = transformers.PretrainedConfig\n    _supports_sdpa = True\n\n"
        "    def __init__(self, config):\n        super().__init__(config)\n        self.x = torch.nn.Linear(8, 8)\n"
        "        self.post_init()\n\n"
        "    def forward(self, x):\n        return self.x(x)\n"
    )
    spec = importlib.util.spec_from_file_location("modeling_silent", source)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "modeling_silent", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(core, "ADAPTERS", {"transformers": "transformers models"})
    model = module.SilentModel(transformers.PretrainedConfig()).eval()
    message = "SilentModel ran .*: the model never called its attention"
    with baatt.enable(model, ALL_BLOCKS) as handle, pytest.warns(NoSparseAttentionWarning, match=message):
        model(torch.zeros(2, 8))
    assert (handle.sparse_calls, handle.dense_calls) == (0, 0)


# register.


@pytest.mark.parametrize(
    "name", ["", "my_flash", "ba_sdpa", "flex_attention_ba", "eager_ba", "paged|ba_att", "org/ba_att", "ba_att_enabled"]
)
def test_names_with_a_meaning_are_refused(name):
    with pytest.raises(ValueError, match="name must not be empty"):
        adapter.register(name)


def test_register_refuses(registered):
    ALL_ATTENTION_FUNCTIONS._global_mapping["somebody_s"] = len
    try:
        with pytest.raises(ValueError, match="name must not be registered by somebody else, got 'somebody_s'"):
            adapter.register("somebody_s")
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["somebody_s"]
    with pytest.raises(TypeError, match="config must be a BAAttConfig or None, got float"):
        adapter.register("ba_att", 0.5)
    with pytest.raises(TypeError, match="policy must be a Policy or None, got dict"):
        adapter.register("ba_att", ALL_BLOCKS, {})
    with pytest.raises(TypeError, match="name must be a str, got int"):
        adapter.register(3)
    with pytest.raises(ValueError, match=r"impl must be one of .* got 'fast'"):
        adapter.register(impl="fast")
    with pytest.raises(ValueError, match=r"policy must not count layers from the last one here, got \(0, -1\)"):
        adapter.register(policy=Policy(dense_layers=(0, -1)))
    assert not any("ba_att" in mapping for mapping in registries())


@heeds_is_causal
def test_registering_again_replaces(registered):
    model, ids = MODELS["Qwen2"](causal=False), tokens()
    first = registered("ba_att", ALL_BLOCKS)
    model.set_attn_implementation("ba_att")
    run(model, ids)
    second = registered("ba_att", ALL_BLOCKS, Policy(dense_layers=(1,)))
    run(model, ids)
    first.disable()  # whose functions are gone already
    run(model, ids)
    assert (first.sparse_calls, first.dense_calls) == (2, 0)
    assert (second.sparse_calls, second.dense_calls) == (2, 2)
    second.disable()
    assert not any("ba_att" in mapping for mapping in registries())
    with pytest.raises(KeyError, match="ba_att"):
        run(model, ids)


@heeds_is_causal
def test_loading_by_name(tmp_path, registered):
    model, ids = MODELS["Qwen2"](causal=False), tokens()
    model.save_pretrained(tmp_path)
    handle = registered("ba_att", ALL_BLOCKS)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="ba_att").eval()
    torch.testing.assert_close(run(loaded, ids), run(model, ids))
    assert handle.layers.keys() == {0, 1}
    assert handle.dense_calls + handle.sparse_calls == 2


@heeds_is_causal
def test_a_registered_name_and_an_attached_model_side_by_side(registered):
    model, ids = MODELS["Qwen2"](causal=False), tokens()
    handle = registered("ba_att", ALL_BLOCKS)
    model.set_attn_implementation("ba_att")
    with baatt.enable(model, HALF) as attached:
        run(model, ids)
    assert model.config._attn_implementation == "ba_att"
    run(model, ids)
    assert (handle.sparse_calls, attached.sparse_calls) == (2, 2)


def test_without_the_library_register_names_the_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="transformers")

    monkeypatch.setattr(adapter.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"transformers is not installed: pip install 'baatt\[transformers\]'"):
        adapter.register()


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.filterwarnings("ignore::baatt.integrations.handle.NoSparseAttentionWarning")
def test_decoding_steps_are_counted_and_computed_as_if_they_were_looked_at_closely(cache, is_padded, monkeypatch):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 200))
    mask = torch.ones_like(ids)
    mask[0, :37] = not is_padded
    found = []
    for is_looked_at in (False, True):
        if is_looked_at:
            monkeypatch.setattr(core.Handle, "short_step", lambda *_: None)
        with baatt.enable(model, BAAttConfig(block_size=16, sparsity=0.5)) as handle:
            given = {"cache_implementation": cache} if cache else {}
            out = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, **given)
        found.append((handle.reasons, handle.layers, handle.tally().calls, out.tolist()))
    assert found[0] == found[1]
    assert found[0][0] == {"a decoding step of one query": 4 * 2}
    assert handle.sparse_calls == 2
