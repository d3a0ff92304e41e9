"""diffusers' transformers and pipelines: exact with all blocks, sparse where asked, by layer and step, and undone."""

import copy
import datetime
import gc
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

import baatt
from baatt import BAAttConfig, Policy, ba_attention
from baatt.integrations import diffusers as adapter
from baatt.integrations import diffusers_dispatch, diffusers_route
from baatt.integrations.handle import NoSparseAttentionWarning
from baatt.integrations.video import VideoTiles

diffusers = pytest.importorskip("diffusers")
from diffusers.models import attention_dispatch  # noqa: E402

from tests.integrations.diffusers_models import (  # noqa: E402
    CASES,
    GRID,
    TOKENS,
    build,
    generate,
    wan_pipeline,
)
from tests.processes import run_ranks  # noqa: E402

ALL_BLOCKS = BAAttConfig(block_size=16, sparsity=0.0)
HALF = BAAttConfig(block_size=16, sparsity=0.5)
FIRST_STEPS = "policy: one of the first steps"


class ByHand(TorchFunctionMode):
    """`ba_attention` for every call over the whole sequence."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.calls = tokens, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            q, k, v = args[:3] if args else (kwargs[name] for name in ("query", "key", "value"))
            if q.shape[2] == k.shape[2] == self.tokens:
                self.calls += 1
                mask = kwargs.get("attn_mask")
                mask = None if mask is None else mask.expand(q.shape[0], 1, 1, self.tokens)[:, 0, 0]
                return ba_attention(q, k, v, HALF, key_mask=mask, query_mask=mask)
        return func(*args, **kwargs)


def self_attention(model):
    return [module for _, module in adapter._layers(model)]


def all_attention(model):
    return [module for module in model.modules() if hasattr(module, "processor")]


def registry_state():
    registry = attention_dispatch._AttentionBackendRegistry
    return (
        *(dict(getattr(registry, table)) for table in diffusers_dispatch.TABLES),
        set(registry._supports_context_parallel),
        registry._active_backend,
        dict(attention_dispatch.AttentionBackendName.__members__),
        dict(attention_dispatch.AttentionBackendName._value2member_map_),
    )


def state(model):
    """Everything that an instance holds: of modules, with their hooks, and of processors."""
    modules = {name: dict(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: [dict(held["_forward_pre_hooks"]), dict(held["_forward_hooks"])] for name, held in modules.items()}
    return modules, hooks, [(module.processor, dict(vars(module.processor))) for module in all_attention(model)]


# Results.


@pytest.mark.parametrize("name", CASES)
def test_without_sparsity_it_is_the_model(name):
    case = build(name)
    expected = case.run()
    with baatt.enable(case.model, ALL_BLOCKS) as handle:
        actual = case.run()
    torch.testing.assert_close(actual, expected)
    assert {layer: (calls.sparse, calls.dense) for layer, calls in handle.layers.items()} == dict.fromkeys(
        range(case.layers), (1, 0)
    )
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("name", CASES)
def test_half_of_the_blocks_as_by_hand(name):
    case = build(name)
    dense = case.run()
    with ByHand(case.tokens) as by_hand:
        expected = case.run()
    with baatt.enable(case.model, HALF) as handle:
        actual = case.run()
    assert by_hand.calls == handle.sparse_calls == case.layers
    assert torch.equal(actual, expected)
    assert not torch.allclose(actual, dense, atol=1e-3)


@pytest.mark.parametrize("name", ["hunyuan", "qwenimage"])
def test_padded_text_does_not_matter(name):
    case = build(name)
    text = case.inputs["encoder_hidden_states"].clone()
    text[1, 3:] = 100.0
    with baatt.enable(case.model, ALL_BLOCKS) as handle:
        expected, actual = case.run(), case.run(encoder_hidden_states=text)
    assert handle.sparse_calls == 2 * case.layers
    torch.testing.assert_close(actual, expected)


def test_a_mask_between_queries_stays_with_the_model():
    case = build("wan")
    attention = case.model.blocks[0].attn1
    x, mask = torch.randn(1, TOKENS, 32), torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu()[None, None]
    with torch.no_grad():
        expected = attention(x, None, mask)
        with baatt.enable(case.model, HALF) as handle:
            assert torch.equal(attention(x, None, mask), expected)
    assert handle.reasons == {"a mask that differs between queries": 1}


def test_gradients_stay_dense_and_are_warned_of():
    case = build("wan")
    with baatt.enable(case.model, HALF) as handle, pytest.warns(NoSparseAttentionWarning, match="gradients"):
        case.model(**case.inputs).sample.sum().backward()
    assert handle.dense_calls == 2
    assert case.model.blocks[0].attn1.to_q.weight.grad.any()


# Which layers.


def test_dense_layers_count_double_blocks_then_single_blocks():
    case = build("hunyuan", double=2, single=2)
    with baatt.enable(case.model, HALF, Policy(dense_layers=(0, -1))) as handle:
        case.run()
    assert {layer: calls.sparse for layer, calls in handle.layers.items()} == {0: 0, 1: 1, 2: 1, 3: 0}
    assert handle.reasons == {"policy: dense layer 0": 1, "policy: dense layer 3": 1}


def test_cross_attention_and_text_attention_are_not_touched():
    for name, mine in (("wan", "attn1"), ("ltx", "attn1"), ("hunyuan", "transformer_blocks")):
        case = build(name)
        before = state(case.model)[2]
        with baatt.enable(case.model, HALF):
            touched = [
                (one[0] is not two[0], one[1] != two[1]) for one, two in zip(before, state(case.model)[2], strict=True)
            ]
        names = [path for path, module in case.model.named_modules() if hasattr(module, "processor")]
        assert touched == [(mine in path, mine in path) for path in names]
        assert not all(first for first, _ in touched)


def test_which_modules_are_self_attention():
    class Attention(nn.Module):
        def __init__(self, **told):
            super().__init__()
            self.__dict__.update(processor=print, **told)

    blocks = nn.ModuleList(
        nn.ModuleDict(
            {
                **{"attn1": Attention(), "attn2": Attention(), "audio_attn1": Attention()},
                **{"audio_to_video_attn": Attention(), "cross_attention": Attention()},
                **{"dual_attn2": Attention(is_cross_attention=False), "other": Attention(is_cross_attention=True)},
            }
        )
        for _ in range(2)
    )
    model = nn.ModuleDict(
        {"context_refiner": copy.deepcopy(blocks), "text_blocks": copy.deepcopy(blocks), "layers": blocks}
    )
    found = [
        (number, name)
        for name, module in model.named_modules()
        for number, one in adapter._layers(model)
        if one is module
    ]
    assert found == [
        (layer, f"layers.{layer}.{name}") for layer in range(2) for name in ("attn1", "audio_attn1", "dual_attn2")
    ]


# What is left behind, and others' changes.


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox"])
@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_left_behind(name, fail):
    case = build(name)
    expected, before, registered = case.run(), state(case.model), registry_state()
    weights = {key: x.clone() for key, x in case.model.state_dict().items()}

    def order(length, device):
        if fail:
            raise KeyError("a mistake in the middle of an attention layer")

    try:
        with baatt.enable(case.model, HALF, order=order):
            assert list(case.model.state_dict()) == list(weights)
            case.run()
            assert not fail
    except KeyError:
        assert fail
    assert state(case.model) == before
    assert registry_state() == registered
    assert all(torch.equal(x, weights[key]) for key, x in case.model.state_dict().items())
    assert torch.equal(case.run(), expected)


def test_a_refusal_leaves_nothing_behind():
    case, tiles = build("cogvideox"), VideoTiles()
    before, registered = state(case.model), registry_state()
    with pytest.raises(ValueError, match=r"policy.dense_layers must lie in \[-2, 2\)"):
        baatt.enable(case.model, HALF, Policy(dense_layers=(2,)))
    with pytest.raises(ValueError, match=r"order must be VideoTiles\(text='before'\) for CogVideoX.*got text='after'"):
        baatt.enable(case.model, HALF, order=tiles)
    assert (state(case.model), registry_state()) == (before, registered)


def test_a_model_that_nobody_holds_is_gone_at_once():
    """Garbage of Python's keeps a GPU full until a collection, which may be long in coming."""
    case = build("wan")
    with baatt.enable(case.model, HALF) as handle:
        case.run()
    model = weakref.ref(case.model)
    gc.collect()  # what diffusers left behind
    gc.disable()
    try:
        del case
        assert model() is None
    finally:
        gc.enable()
    assert handle.sparse_calls


def test_two_models_do_not_disturb_each_other():
    first, second, third = build("wan"), build("wan"), build("wan")
    expected = third.run()
    with baatt.enable(first.model, HALF) as one:
        sparse = first.run()
        with baatt.enable(second.model, ALL_BLOCKS, Policy(dense_layers=(0,))) as two:
            assert torch.equal(first.run(), sparse)
            torch.testing.assert_close(second.run(), expected)
            assert torch.equal(third.run(), expected)
        assert torch.equal(first.run(), sparse)
        assert torch.equal(second.run(), expected)
    assert (one.sparse_calls, one.dense_calls, two.sparse_calls, two.dense_calls) == (6, 0, 1, 1)


def test_a_chosen_backend_runs_dense_calls_and_comes_back(monkeypatch):
    names, registry = attention_dispatch.AttentionBackendName, attention_dispatch._AttentionBackendRegistry
    calls, math = [], registry._backends[names._NATIVE_MATH]

    def counted(query, key, **options):
        calls.append(query.shape[1] == key.shape[1])
        return math(query, key, **options)

    monkeypatch.setitem(registry._backends, names._NATIVE_MATH, counted)
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    case = build("wan")
    case.model.set_attention_backend("_native_math")
    before = state(case.model)
    with baatt.enable(case.model, HALF, Policy(dense_layers=(1,))) as handle:
        case.run()
        assert handle.sparse_calls == 1
        assert sorted(calls) == [False, False, True]  # cross-attention of both layers, self-attention of the dense one
        case.model.set_attention_backend("native")  # is for the dense calls, and stays
        handle.reset()
        case.run()
        assert (handle.sparse_calls, handle.dense_calls, len(calls)) == (1, 1, 3)
    backends = [module.processor._attention_backend for module in all_attention(case.model)]
    assert backends == [names.NATIVE] * 4
    case.model.set_attention_backend("_native_math")
    assert state(case.model) == before


def test_a_processor_set_meanwhile_stays():
    case = build("wan")
    with baatt.enable(case.model, HALF) as handle:
        new = type(case.model.blocks[0].attn2.processor)()
        case.model.blocks[0].attn1.set_processor(new)
        case.run()
    assert handle.sparse_calls == 1
    assert case.model.blocks[0].attn1.processor is new


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_one_processor_for_all_layers(name):
    case = build(name)
    case.model.set_attn_processor(self_attention(case.model)[0].processor)
    expected, before = case.run(), state(case.model)
    with baatt.enable(case.model, HALF, Policy(dense_layers=(0,))) as handle:
        case.run()
    assert {layer: (calls.sparse, calls.dense) for layer, calls in handle.layers.items()} == {0: (0, 1), 1: (1, 0)}
    assert state(case.model) == before
    assert torch.equal(case.run(), expected)


def test_a_processor_that_is_a_module():
    case = build("flux")
    kind = type(case.model.transformer_blocks[0].attn.processor)

    class Processor(nn.Module):
        _attention_backend = None
        _parallel_config = None

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
            return kind.__call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    for attention in self_attention(case.model):
        del attention.processor
        attention.processor = Processor()
    expected, before = case.run(), state(case.model)
    with baatt.enable(case.model, ALL_BLOCKS) as handle:
        assert "transformer_blocks.0.attn.processor.weight" in case.model.state_dict()
        torch.testing.assert_close(case.run(), expected)
    assert handle.sparse_calls == 3
    assert state(case.model) == before


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_where_the_dispatch_is_another_sdpa_is_watched(name, monkeypatch):
    case, registered = build(name), registry_state()
    monkeypatch.setattr(attention_dispatch._AttentionBackendRegistry, "_supports_context_parallel", {"native": True})
    with ByHand(case.tokens):
        expected = case.run()
    with baatt.enable(case.model, HALF) as handle:
        assert registry_state()[0] == registered[0]
        assert torch.equal(case.run(), expected)
    assert handle.sparse_calls == case.layers


# Compiled.


def compiled(model):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    "name", ["wan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hunyuan", "cogvideox"))]
)
def test_compiled_as_a_whole(name):
    text = "before" if name == "cogvideox" else "after"
    case, tiles = build(name, 1, 1) if name == "hunyuan" else build(name), VideoTiles((2, 4, 2), text=text)
    with baatt.enable(case.model, HALF, Policy(dense_layers=(1,)), order=tiles) as handle:
        expected = case.run()
        handle.reset()
        tiles.grid = None
        whole = case._replace(model=compiled(case.model))
        torch.testing.assert_close(whole.run(), expected)
        torch.testing.assert_close(whole.run(), expected)
    assert tiles.grid is None
    assert (handle.sparse_calls, handle.reasons) == (2 * (case.layers - 1), {"policy: dense layer 1": 2})
    # The hook that notes the grid may be a graph of its own.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_blocks_share_a_graph_and_know_their_layer():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case = build("wan", layers=10)  # more than the number of graphs that one block may have
    dense = case.run()
    case.model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(case.run(), dense)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with baatt.enable(case.model, HALF, Policy(dense_layers=(3,)), order=VideoTiles((2, 4, 2))) as handle:
        actual = case.run()
        with baatt.enable(build("ltx").model, HALF):  # which also registers a backend
            assert torch.equal(case.run(), actual)
    assert {layer: (calls.sparse, calls.dense) for layer, calls in handle.layers.items()} == {
        layer: (0, 2) if layer == 3 else (2, 0) for layer in range(10)
    }
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs + 2
    torch.testing.assert_close(case.run(), dense)


@pytest.mark.slow
def test_compiled_before_it_is_attached():
    case = build("wan", layers=1)
    whole = case._replace(model=compiled(case.model))
    expected = whole.run()
    with baatt.enable(whole.model, ALL_BLOCKS) as handle:
        torch.testing.assert_close(whole.run(), expected)
    assert (handle.sparse_calls, handle.dense_calls) == (1, 0)
    assert torch.equal(whole.run(), expected)


# Steps.


def test_steps_of_a_pipeline_with_guidance():
    pipeline = wan_pipeline()
    vae = state(pipeline.vae)
    expected = generate(pipeline)
    with baatt.enable(pipeline, ALL_BLOCKS, Policy(dense_steps=0.4)) as handle:
        assert state(pipeline.vae) == vae
        for _ in range(2):
            torch.testing.assert_close(generate(pipeline), expected)
    # Two of five steps are dense; a step has two evaluations of two layers.
    assert (handle.sparse_calls, handle.reasons) == (2 * 12, {FIRST_STEPS: 2 * 8})
    with baatt.enable(pipeline, HALF, Policy(dense_steps=0.4)) as handle:
        assert not torch.allclose(generate(pipeline), expected, atol=1e-3)
    assert torch.equal(generate(pipeline), expected)
    assert handle.layers[0].sparse == 6


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_steps_of_a_pipeline_that_is_compiled_as_a_whole(when):
    pipeline = wan_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0))
    tiles = VideoTiles((2, 4, 2))
    with baatt.enable(pipeline, HALF, Policy(dense_steps=0.4), order=tiles):
        expected = generate(pipeline)
    torch._dynamo.reset()
    if when == "before":
        pipeline.transformer = compiled(pipeline.transformer)
    with baatt.enable(pipeline, HALF, Policy(dense_steps=0.4), order=tiles) as handle:
        if when == "after":
            pipeline.transformer.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(generate(pipeline), expected)
        assert tiles.grid == GRID
    assert (handle.sparse_calls, handle.reasons) == (12, {FIRST_STEPS: 8})


def test_both_transformers_of_wan_2_2():
    pipeline = wan_pipeline(second=True)
    expected = generate(pipeline)
    with baatt.enable(pipeline, ALL_BLOCKS, Policy(dense_steps=0.2, dense_layers=(1,))) as handle:
        torch.testing.assert_close(generate(pipeline), expected)
    # Timesteps 999 and 923 are the first one's, 818, 667 and 429 the second one's.
    assert {layer: (calls.sparse, calls.dense) for layer, calls in handle.layers.items()} == {0: (8, 2), 1: (0, 10)}
    pipeline.transformer_2 = build("wan", layers=3).model
    with pytest.raises(ValueError, match=r"transformer and transformer_2 must have equally many layers, got \[2, 3\]"):
        baatt.enable(pipeline, HALF)


def steps(case, timesteps, handle):
    """Which forwards were sparse."""
    found = []
    for timestep in timesteps:
        before = handle.sparse_calls
        case.run(timestep=timestep.expand(2) if timestep.ndim == 0 else timestep)
        found.append(handle.sparse_calls > before)
    return found


def test_steps_without_a_pipeline():
    case, flux = build("wan"), build("flux")
    with baatt.enable(case.model, HALF, Policy(dense_steps=0.3)) as handle:
        assert steps(case, torch.tensor([999, 701, 699, 1]), handle) == [False, False, True, True]
        handle.at_step(0, 10)
        assert steps(case, torch.tensor([1]), handle) == [False]
    with baatt.enable(flux.model, HALF, Policy(dense_steps=0.3)) as handle:  # is given thousandths
        assert steps(flux, torch.tensor([1.0, 0.701, 0.699, 0.001]), handle) == [False, False, True, True]


def test_steps_of_a_scheduler_that_does_not_count_them():
    case, scheduler = build("cogvideox"), diffusers.CogVideoXDDIMScheduler()
    scheduler.set_timesteps(5)
    pipeline = diffusers.CogVideoXPipeline(None, None, diffusers.AutoencoderKLCogVideoX(), case.model, scheduler)
    with baatt.enable(pipeline, HALF, Policy(dense_steps=0.4)) as handle:
        assert steps(case, scheduler.timesteps, handle) == [False, False, True, True, True]


def test_timesteps_of_tokens_and_in_other_units():
    schedule = [1000.0, 954.5, 876.5, 705.5, 46.5]
    read = diffusers_route.training_timestep
    # An image that is given has no time left in its tokens.
    assert read(torch.tensor([[0.0, 0.0, 876.5, 876.5]]), schedule) == 876.5
    assert read(torch.tensor([0.8765]), schedule) == pytest.approx(876.5)
    assert read(torch.tensor([1.0]), schedule) == 1000.0
    assert read(torch.tensor([1 - 0.7055]), schedule) == pytest.approx(705.5)
    assert read(torch.tensor([0.0]), schedule) == 1000.0
    assert read(torch.tensor([1]), [981, 1]) == 1
    assert read(0.5, []) == 500.0
    assert read(1, []) == 1.0


# Grids of latents for an order of tokens.


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox", "ltx"])
def test_video_tiles_get_the_grid_of_the_latents(name):
    case, tiles = build(name), VideoTiles((2, 4, 2), text="before" if name == "cogvideox" else "after")
    expected = case.run()
    with baatt.enable(case.model, ALL_BLOCKS, order=tiles) as handle:
        torch.testing.assert_close(case.run(), expected)
        assert tiles.grid == GRID
    assert handle.sparse_calls == case.layers
    assert tiles.grid is None
    with baatt.enable(case.model, HALF):
        raster = case.run()
    with baatt.enable(case.model, HALF, order=tiles):
        assert not torch.allclose(case.run(), raster, atol=1e-4)


def test_a_grid_that_is_given_stays():
    case, tiles = build("wan"), VideoTiles((2, 4, 2), grid=(1, 15, 7))
    with baatt.enable(case.model, HALF, order=tiles):
        case.run()
    assert tiles.grid == (1, 15, 7)


def test_latents_that_do_not_show_their_grid_are_refused_without_one():
    case, tiles = build("flux"), VideoTiles((1, 4, 4), text="before")
    with baatt.enable(case.model, ALL_BLOCKS, order=tiles) as handle:
        with pytest.raises(ValueError, match=r"order must have a grid for FluxTransformer2DModel.*set VideoTiles.grid"):
            case.run()
        tiles.grid = (1, 15, 7)
        case.run()
    assert handle.sparse_calls == 3


# What is recognised.


def test_what_is_recognised():
    pipeline = wan_pipeline()
    assert adapter.roots(pipeline)
    assert adapter.roots(pipeline.transformer)
    assert not adapter.roots(pipeline.vae)
    assert not adapter.roots(nn.Linear(2, 2))
    assert not adapter.roots("model")
    with pytest.raises(ValueError, match=r"model must be of a known kind.*got .*AutoencoderKLWan"):
        baatt.enable(pipeline.vae.eval(), HALF)
    pipeline.transformer = None
    with pytest.raises(ValueError, match=r"denoises with a transformer of diffusers.*got WanPipeline with none"):
        baatt.enable(pipeline, HALF)


def test_a_subclass_outside_diffusers_is_recognised():
    case = build("wan")

    class Mine(type(case.model)):
        pass

    case.model.__class__ = Mine
    with baatt.enable(case.model, HALF) as handle:
        case.run()
    assert handle.sparse_calls == 2


# Several processes.


def context_parallel(rank, path, results):
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it
    warnings.simplefilter("ignore")
    store = f"file://{path}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    found = {}
    # gloo cannot gather parts of different lengths.
    even = {"hidden_states": torch.randn(2, 4, 3, 10, 8, generator=torch.Generator().manual_seed(1))}
    for name, heads, options in (("even", 4, {}), ("anything", 3, {"ulysses_anything": True})):
        case = build("wan", heads=heads)
        case = case._replace(inputs=case.inputs | even)
        with baatt.enable(case.model, HALF, Policy(dense_layers=(1,)), order=VideoTiles((2, 4, 2))) as handle:
            single = case.run()
            case.model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2, **options))
            handle.reset()
            found[name] = (float((case.run() - single).abs().max()), handle.sparse_calls, handle.reasons)
        parallel = [module.processor._parallel_config is not None for module in self_attention(case.model)]
        found[name] += (parallel, float((case.run() - single).abs().max()))
    case = build("wan", heads=4)
    case = case._replace(inputs=case.inputs | even)
    with baatt.enable(case.model, HALF):
        case.model.enable_parallelism(config=diffusers.ContextParallelConfig(ring_degree=2))
        try:
            case.run()
        except ValueError as error:
            found["ring"] = str(error)
    try:
        baatt.enable(case.model, HALF)
    except ValueError as error:
        found["ring first"] = str(error)
    results[rank] = found
    dist.destroy_process_group()


def test_ulysses_of_two_processes_equals_one(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        run_ranks(context_parallel, tmp_path / "store", results)
        for rank in range(2):
            for name in ("even", "anything"):
                difference, sparse, reasons, parallel, afterwards = results[rank][name]
                assert difference < 1e-6
                assert (sparse, reasons) == (1, {"policy: dense layer 1": 1})
                assert parallel == [True, True]  # what was set meanwhile stays
                assert afterwards > 1e-3  # and it is dense again
            for name in ("ring", "ring first"):
                assert results[rank][name].startswith("ring_degree must be 1: blocks are selected from all keys")
                assert results[rank][name].endswith("use ulysses_degree, got ring_degree=2")
