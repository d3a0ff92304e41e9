"""Programs around an attached model: copies, pickles, threads, hooks of others, saved processors, wrappers."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

import baatt
from baatt import BAAttConfig, Policy
from baatt.integrations.video import VideoTiles
from baatt.models import MaskedDiffusionLM
from baatt.models.config import ModelConfig
from tests.integrations.stubs import DreamModel, LLaDAModelLM

transformers = pytest.importorskip("transformers", minversion="5.17")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
from tests.integrations import diffusers_models  # noqa: E402
from tests.integrations.clients import SIZES  # noqa: E402

ALL_BLOCKS = BAAttConfig(block_size=16, sparsity=0.0)
HALF = BAAttConfig(block_size=16, sparsity=0.5)


def tokens(seed=1, length=70):
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(seed))


def own_model():
    sizes = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 3, "mlp_hidden_size": 48}
    model = MaskedDiffusionLM(ModelConfig(**sizes, vocab_size=64, mask_token_id=63)).eval()
    return model, lambda model, seed=1: model(tokens(seed))


def language(kind):
    return kind().eval(), lambda model, seed=1: model(tokens(seed)).logits


def decoder():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))


def video(name):
    case = diffusers_models.build(name)

    def run(model, seed=1):
        shape, generator = case.inputs["hidden_states"].shape, torch.Generator().manual_seed(seed)
        inputs = case.inputs | {"hidden_states": torch.randn(shape, generator=generator)}
        return model(**inputs, return_dict=False)[0]

    return case.model, run


#: Every adapter: () -> (model, its run of a seed).
MODELS = {
    "own": own_model,
    "LLaDA": lambda: language(LLaDAModelLM),
    "Dream": lambda: language(DreamModel),
    "transformers": lambda: language(decoder),
    **{name: lambda name=name: video(name) for name in ("wan", "hunyuan", "cogvideox", "sd3")},
}


@pytest.fixture(params=MODELS)
def built(request):
    torch.manual_seed(0)
    with torch.no_grad():
        yield MODELS[request.param]()


def changed(model):
    """Other weights, so that a copy which computes with those of the original is found out."""
    for x in model.parameters():
        x.mul_(0.5)
    return model


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
    "inside": lambda model: copy.deepcopy({"model": [model]}),
    "a part": lambda model: copy.deepcopy(next(model.children())),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_an_attached_model_is_refused(built, how):
    model, run = built
    with (
        baatt.enable(model, HALF),
        pytest.raises(TypeError, match=r"must not be copied .* call handle.disable\(\) first"),
    ):
        COPIES[how](model)
    other = changed(copy.deepcopy(model))
    fresh = run(other)
    assert not torch.equal(fresh, run(model))
    assert torch.equal(run(pickle.loads(pickle.dumps(other))), fresh)


def in_threads(count, work):
    """What a function of a thread's number returns in each of several threads, all at once."""
    found, start = {}, threading.Barrier(count)

    def run(number):
        start.wait()
        with torch.no_grad():
            found[number] = work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(count)]


def test_threads_on_one_attached_model(built):
    model, run = built
    policy = Policy(dense_layers=(0,), layer_sparsity=((1, 0.75),))
    with baatt.enable(model, HALF, policy) as handle:
        expected = [run(model, seed) for seed in range(4)]
        once = handle.layers
        handle.reset()
        found = in_threads(4, lambda seed: [run(model, seed) for _ in range(8)])
    for outs, out in zip(found, expected, strict=True):
        assert all(torch.equal(one, out) for one in outs)
    assert handle.layers == {
        layer: (8 * calls.sparse, 8 * calls.dense, {reason: 8 * count for reason, count in calls.reasons.items()})
        for layer, calls in once.items()
    }


@pytest.mark.parametrize("kind", [LLaDAModelLM, DreamModel, decoder])
def test_threads_are_at_steps_of_their_own(kind):
    model = kind().eval()
    if kind is decoder:
        model.config.mask_token_id = 63
    late, early = tokens(), tokens()
    early[:, 10:] = 63
    late[:, 60:] = 63

    def loop(number):
        for step in range(20):
            model(late if number and step >= 10 else early)

    with baatt.enable(model, HALF, Policy(dense_steps=0.5)) as handle:
        in_threads(2, loop)
    assert (handle.sparse_calls, handle.dense_calls) == (10 * handle.layer_count, 30 * handle.layer_count)


def test_a_told_step_is_that_of_its_thread_or_of_all():
    model, run = own_model()
    with baatt.enable(model, HALF, Policy(dense_steps=0.5)) as handle:
        handle.at_step(9, 10)
        in_threads(2, lambda number: run(model))
        assert (handle.sparse_calls, handle.dense_calls) == (6, 0)

        def loop(number):
            handle.at_step(9 * number, 10)
            for _ in range(10):
                run(model)

        in_threads(2, loop)
    assert (handle.sparse_calls, handle.dense_calls) == (36, 30)


def test_threads_have_videos_of_sizes_of_their_own():
    case = diffusers_models.build("wan")
    videos = [torch.randn(2, 4, 3, 10, 14), torch.randn(2, 4, 2, 8, 12)]
    with baatt.enable(case.model, HALF, order=VideoTiles((1, 4, 4))):
        expected = [case.run(hidden_states=video) for video in videos]
        found = in_threads(2, lambda number: [case.run(hidden_states=videos[number]) for _ in range(10)])
    assert all(torch.equal(one, out) for outs, out in zip(found, expected, strict=True) for one in outs)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copy_of_an_attached_config_makes_a_dense_model(how):
    model = decoder().eval()
    with torch.no_grad():
        expected = model(tokens()).logits
        with baatt.enable(model, HALF) as handle:
            config = how(model.config)
            copied = transformers.Qwen3ForCausalLM(config).eval()
            copied.load_state_dict(model.state_dict())
            assert torch.equal(copied(tokens()).logits, expected)
            assert handle.sparse_calls == 0
        assert torch.equal(copied(tokens()).logits, expected)
        assert transformers.Qwen3ForCausalLM(config).eval()(tokens()).logits.isfinite().all()


class Passing(accelerate.hooks.ModelHook):
    """A hook that does nothing: accelerate puts its own forward in the place of the module's."""


def hooked(model):
    """The modules whose forward an adapter may have taken, innermost first."""
    return [module for module in model.modules() if type(module).forward is not nn.Module.forward][::-1]


@pytest.mark.parametrize("put", ["before", "attached"])
@pytest.mark.parametrize("taken", ["attached", "after"])
def test_hooks_of_others_come_and_go(built, put, taken):
    model, run = built
    expected, before = run(model), {name: set(vars(module)) for name, module in model.named_modules()}
    for module in hooked(model) if put == "before" else []:
        accelerate.hooks.add_hook_to_module(module, Passing())
    handle = baatt.enable(model, HALF)
    for module in hooked(model) if put == "attached" else []:
        accelerate.hooks.add_hook_to_module(module, Passing())
    run(model)
    assert handle.sparse_calls > 0
    if taken == "attached":
        for module in hooked(model):
            accelerate.hooks.remove_hook_from_module(module)
    handle.disable()
    handle.reset()
    assert torch.equal(run(model), expected)
    if taken == "after":
        assert all(hasattr(module, "_hf_hook") for module in hooked(model))
        other = changed(copy.deepcopy(model))
        assert not torch.equal(run(other), expected)
        for module in hooked(model):
            accelerate.hooks.remove_hook_from_module(module)
    assert torch.equal(run(model), expected)
    assert (handle.sparse_calls, handle.dense_calls) == (0, 0)
    added = {one for name, module in model.named_modules() for one in set(vars(module)) - before[name]}
    assert added <= {"forward"}  # which accelerate leaves, as the module's own
    with baatt.enable(model, HALF) as handle:
        run(model)
    assert handle.sparse_calls > 0


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox", "sd3"])
def test_processors_saved_while_attached_are_plain_afterwards(name):
    with torch.no_grad():
        model, run = MODELS[name]()
        expected = run(model)
        with baatt.enable(model, HALF) as handle:
            saved = {module: module.processor for module in model.modules() if hasattr(module, "processor")}
            run(model)
        handle.reset()
        for module, processor in saved.items():
            module.processor = processor
        assert torch.equal(run(model), expected)
        other = changed(copy.deepcopy(model))
        assert torch.equal(run(pickle.loads(pickle.dumps(other))), run(other))
        assert (handle.sparse_calls, handle.dense_calls) == (0, 0)
        with baatt.enable(model, ALL_BLOCKS) as again:
            torch.testing.assert_close(run(model), expected)
        assert again.sparse_calls > 0
        assert torch.equal(run(model), expected)


def test_projections_fused_while_attached():
    with torch.no_grad():
        model, run = MODELS["cogvideox"]()
        expected = run(model)
        with baatt.enable(model, HALF) as handle:
            model.fuse_qkv_projections()
        model.unfuse_qkv_projections()
        assert torch.equal(run(model), expected)
    assert (handle.sparse_calls, handle.dense_calls) == (0, 0)


class Tuner(nn.Module):
    """As PEFT's: the model's forward, past its hooks, and every attribute of it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)


class Peft(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.base_model = Tuner(model)

    def get_base_model(self):
        return self.base_model.model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


class Holder(nn.Module):
    """As DistributedDataParallel: one child, called with what it is given."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Peft, Holder, lambda model: Holder(Peft(model)), lambda model: Peft(Holder(model))])
def test_wrapped_models(built, wrap):
    model, run = built
    wrapped = wrap(model).eval()
    expected, before = run(wrapped), {name: set(vars(module)) for name, module in wrapped.named_modules()}
    with baatt.enable(wrapped, ALL_BLOCKS) as handle:
        torch.testing.assert_close(run(wrapped), expected)
        calls = handle.sparse_calls
        run(model)
        assert handle.sparse_calls == 2 * calls > 0
        with pytest.raises(TypeError, match="must not be copied"):
            copy.deepcopy(wrapped)
        with pytest.raises(TypeError, match="must not be copied"):
            pickle.dumps(wrapped)
    assert torch.equal(run(wrapped), expected)
    assert {name: set(vars(module)) for name, module in wrapped.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in wrapped.modules())


@pytest.mark.parametrize("wrap", [Peft, Holder])
@pytest.mark.parametrize("kind", [LLaDAModelLM, DreamModel])
def test_the_step_of_a_wrapped_model(kind, wrap):
    model = wrap(kind()).eval()
    x = tokens()
    x[:, 50:] = 63
    with torch.no_grad(), baatt.enable(model, HALF, Policy(dense_steps=0.5)) as handle:
        model(x)
        x[:, 55:65] = 5
        model(x)
        assert handle.progress.share == pytest.approx(0.5)
    assert (handle.sparse_calls, handle.dense_calls) == (3, 3)


def test_a_refusal_names_the_part_that_is_known():
    with pytest.raises(ValueError, match=r"Tuner, whose part model\.model is of one: pass that"):
        baatt.enable(Tuner(decoder()).eval(), HALF)


def test_the_last_step_of_a_bare_transformer_is_not_the_first():
    case, flux = diffusers_models.build("wan"), diffusers_models.build("flux")
    policy, unknown = Policy(dense_steps=0.3), "the denoising step is not known"

    def shares(case, timesteps, handle):
        found = []
        for timestep in timesteps:
            case.run(timestep=torch.tensor([timestep, timestep]))
            found.append(handle.progress.share)
        return found

    with baatt.enable(case.model, HALF, policy) as handle:
        assert shares(case, [1000.0, 500.0, 1.0, 0.5, 1000.0], handle) == pytest.approx([0, 0.5, 0.999, 0.9995, 0])
    with baatt.enable(flux.model, HALF, policy) as handle:
        with pytest.warns(UserWarning, match=unknown):
            assert shares(flux, [1.0], handle) == [None]
        assert shares(flux, [0.5, 0.001, 1.0], handle) == pytest.approx([0.5, 0.999, 0])
