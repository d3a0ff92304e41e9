"""Every error a caller of the operator can provoke: its type and its text, for each of the three functions."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from baatt import BAAttConfig, Policy, attend, ba_attention, make_plan
from baatt.config import PRESETS
from baatt.types import BlockSelection

CONFIG = BAAttConfig(block_size=16, segment=32)


def inputs():
    return {"q": torch.randn(2, 4, 40, 8), "k": torch.randn(2, 2, 50, 8), "v": torch.randn(2, 2, 50, 8)}


def calls(changes, **options):
    """The public functions that take what is changed, ready to be called."""
    tensors = inputs()
    plan = make_plan(tensors["q"], tensors["k"], CONFIG)
    tensors |= changes
    q, k, v = tensors.values()
    functions = [lambda: ba_attention(q, k, v, CONFIG, **options)]
    if "v" not in changes:
        functions.append(lambda: make_plan(q, k, CONFIG, **options))
    if not set(options) - {"impl"}:
        functions.append(lambda: attend(q, k, v, plan, **options))
    return functions


MISFITS = [
    ({"q": None}, TypeError, "query must be a torch.Tensor, got NoneType"),
    ({"k": [1.0]}, TypeError, "key must be a torch.Tensor, got list"),
    ({"v": 1}, TypeError, "value must be a torch.Tensor, got int"),
    ({"q": torch.ones(4, 40, 8)}, ValueError, "query must have shape [B, H, N, D], got (4, 40, 8)"),
    ({"k": torch.ones(50, 8)}, ValueError, "key must have shape [B, G, M, D] with D=8, got (50, 8)"),
    (
        {"q": torch.ones(2, 4, 0, 8)},
        ValueError,
        "query must have shape [B, H, N, D] without an empty axis, got (2, 4, 0, 8)",
    ),
    (
        {"k": torch.ones(2, 2, 0, 8)},
        ValueError,
        "key must have shape [B, G, M, D] without an empty axis, got (2, 2, 0, 8)",
    ),
    ({"k": torch.ones(2, 2, 50, 4)}, ValueError, "key must have shape [B, G, M, D] with D=8, got (2, 2, 50, 4)"),
    ({"k": torch.ones(3, 2, 50, 8)}, ValueError, "key must have shape [B, G, M, D] with B=2, got (3, 2, 50, 8)"),
    (
        {"k": torch.ones(2, 3, 50, 8)},
        ValueError,
        "key must have shape [B, G, M, D] with G dividing H=4, got (2, 3, 50, 8)",
    ),
    ({"v": torch.ones(2, 2, 51, 8)}, ValueError, "value must have the shape of key (2, 2, 50, 8), got (2, 2, 51, 8)"),
    (
        {"q": torch.ones(2, 4, 40, 8, dtype=torch.int64)},
        TypeError,
        "query must have a dtype of ['torch.float64', 'torch.float32', 'torch.bfloat16', 'torch.float16'], "
        "got torch.int64",
    ),
    (
        {"k": torch.ones(2, 2, 50, 8).double()},
        TypeError,
        "key must have the dtype of query torch.float32, got torch.float64",
    ),
    (
        {"v": torch.ones(2, 2, 50, 8).half()},
        TypeError,
        "value must have the dtype of query torch.float32, got torch.float16",
    ),
    (
        {"k": torch.ones(2, 2, 50, 8, device="meta")},
        ValueError,
        "key must be on the device of query cpu, got meta",
    ),
    (
        {"v": torch.ones(2, 2, 50, 8, device="meta")},
        ValueError,
        "value must be on the device of query cpu, got meta",
    ),
] + [
    (
        {name: torch.ones(shape, requires_grad=True)},
        ValueError,
        f"{text} must not require gradients, got requires_grad=True: baatt is inference only; "
        "call it under torch.no_grad() or torch.inference_mode()",
    )
    for name, text, shape in (("q", "query", (2, 4, 40, 8)), ("k", "key", (2, 2, 50, 8)), ("v", "value", (2, 2, 50, 8)))
]


@pytest.mark.parametrize(("changes", "kind", "text"), MISFITS, ids=[text[:60] for _, _, text in MISFITS])
def test_tensors_that_do_not_fit(changes, kind, text):
    for call in calls(changes):
        with pytest.raises(kind) as caught:
            call()
        assert str(caught.value) == text


OPTIONS = [
    ({"key_mask": [True]}, TypeError, "key_mask must be a torch.Tensor or None, got list"),
    (
        {"key_mask": torch.ones(2, 50)},
        TypeError,
        "key_mask must have dtype torch.bool (True = attend), got torch.float32",
    ),
    (
        {"key_mask": torch.ones(50, dtype=torch.bool)},
        ValueError,
        "key_mask must have shape [B, M] = (2, 50), got (50,)",
    ),
    (
        {"key_mask": torch.ones(2, 50, dtype=torch.bool, device="meta")},
        ValueError,
        "key_mask must be on the device of query cpu, got meta",
    ),
    ({"query_mask": [True]}, TypeError, "query_mask must be a torch.Tensor or None, got list"),
    (
        {"query_mask": torch.ones(2, 40)},
        TypeError,
        "query_mask must have dtype torch.bool (True = wanted), got torch.float32",
    ),
    (
        {"query_mask": torch.ones(2, 50, dtype=torch.bool)},
        ValueError,
        "query_mask must have shape [B, N] = (2, 40), got (2, 50)",
    ),
    ({"scale": "1"}, TypeError, "scale must be a number or None, got str"),
    ({"scale": np.bool_(True)}, TypeError, "scale must be a number or None, got bool"),
    ({"scale": torch.ones(1)}, TypeError, "scale must be a number or None, got Tensor"),
    ({"scale": np.float32(0)}, ValueError, "scale must be finite and positive, got 0.0"),
    ({"scale": True}, TypeError, "scale must be a number or None, got bool"),
    ({"scale": 0.0}, ValueError, "scale must be finite and positive, got 0.0"),
    ({"scale": -1}, ValueError, "scale must be finite and positive, got -1"),
    ({"scale": math.nan}, ValueError, "scale must be finite and positive, got nan"),
    ({"scale": math.inf}, ValueError, "scale must be finite and positive, got inf"),
    ({"scale": 10**400}, ValueError, f"scale must be finite and positive, got {10**400}"),
    ({"scale": torch.ones((), device="meta")}, TypeError, "scale must be a number or None, got Tensor"),
    ({"causal": 2**63}, ValueError, f"causal must be at most {2**30}, got {2**63}"),
    ({"causal": 1, "query_start": 2**62}, ValueError, f"query_start must be at most {2**30}, got {2**62}"),
    (
        {"key_mask": torch.ones(2, 50, dtype=torch.bool).to_sparse()},
        TypeError,
        "key_mask must have the layout torch.strided, got torch.sparse_coo",
    ),
    (
        {"impl": "fast"},
        ValueError,
        "impl must be one of ['auto', 'reference', 'cpu', 'triton', 'hopper'], got 'fast'",
    ),
]


@pytest.mark.parametrize(("options", "kind", "text"), OPTIONS, ids=[text[:60] for _, _, text in OPTIONS])
def test_options_that_do_not_fit(options, kind, text):
    for call in calls({}, **options):
        with pytest.raises(kind) as caught:
            call()
        assert str(caught.value) == text


@pytest.mark.parametrize("function", [ba_attention, make_plan])
def test_a_config_of_the_wrong_type(function):
    tensors = list(inputs().values())[: 3 if function is ba_attention else 2]
    with pytest.raises(TypeError, match=r"^config must be a BAAttConfig, got dict$"):
        function(*tensors, {"sparsity": 0.5})


def test_a_plan_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"^plan must be a Plan from make_plan, got BAAttConfig$"):
        attend(*inputs().values(), CONFIG)


def test_a_plan_for_other_shapes():
    q, k, v = inputs().values()
    plan = make_plan(q, k, CONFIG)
    longer_q = torch.randn(2, 4, 41, 8)
    with pytest.raises(ValueError, match="plan") as caught:
        attend(longer_q, k, v, plan)
    assert str(caught.value) == "plan.query_order.index must have shape (2, 4, 41) to fit query and key, got (2, 4, 40)"
    with pytest.raises(ValueError, match="plan") as caught:
        attend(q, k[:, :, :49], v[:, :, :49], plan)
    assert str(caught.value) == "plan.key_order.index must have shape (2, 2, 49) to fit query and key, got (2, 2, 50)"
    with pytest.raises(ValueError, match="plan") as caught:
        attend(q[:, :2], k, v, plan._replace(query_order=make_plan(q[:, :2], k, CONFIG).query_order))
    assert (
        str(caught.value) == "plan.selection.index must have shape (2, 2, 3, 2) to fit query and key, got (2, 4, 3, 2)"
    )


@pytest.mark.parametrize("part", ["query_order", "key_order"])
@pytest.mark.parametrize("field", ["index", "length"])
def test_a_plan_on_another_device(part, field):
    q, k, v = inputs().values()
    plan = make_plan(q, k, CONFIG)
    order = getattr(plan, part)
    moved = plan._replace(**{part: order._replace(**{field: getattr(order, field).to("meta")})})
    with pytest.raises(ValueError, match=rf"^plan\.{part}\.{field} must be on the device of query cpu, got meta$"):
        attend(q, k, v, moved)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_plan_whose_numbers_are_of_another_kind(impl):
    q, k, v = inputs().values()
    plan = make_plan(q, k, CONFIG)
    expected = attend(q, k, v, plan, impl=impl)
    for part, field, kind in (("query_order", "index", torch.int64), ("selection", "index", torch.int32)):
        numbers = getattr(plan, part)
        changed = plan._replace(**{part: numbers._replace(**{field: getattr(numbers, field).half()})})
        with pytest.raises(TypeError, match=rf"^plan\.{part}\.{field} must have dtype {kind}, got torch\.float16$"):
            attend(q, k, v, changed, impl=impl)
    narrow = plan._replace(query_order=plan.query_order._replace(index=plan.query_order.index.int()))
    with pytest.raises(TypeError, match=r"^plan\.query_order\.index must have dtype torch\.int64, got torch\.int32$"):
        attend(q, k, v, narrow, impl=impl)
    index, count, uneven = plan.selection
    edited = plan._replace(selection=BlockSelection(index.long(), count.long(), uneven))
    assert torch.equal(attend(q, k, v, edited, impl=impl), expected)


def test_an_edited_plan_that_cannot_be_carried_out():
    q, k, v = inputs().values()
    plan = make_plan(q, k, CONFIG)
    for scale in (None, math.nan, -1.0, 0):
        with pytest.raises(ValueError, match=rf"^plan\.scale must be a finite, positive number, got {scale}$"):
            attend(q, k, v, plan._replace(scale=scale))
    with pytest.raises(TypeError, match=r"^plan\.config must be a BAAttConfig, got NoneType$"):
        attend(q, k, v, plan._replace(config=None))
    for index in (plan.selection.index[..., :0], torch.zeros((), dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"^plan\.selection\.index must have shape \(2, 4, 3, 1\) to fit"):
            attend(q, k, v, plan._replace(selection=plan.selection._replace(index=index)))


@pytest.mark.parametrize("impl", ["triton", "hopper"])
def test_kernels_of_another_device_say_so(impl):
    for call in calls({}, impl=impl):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert str(caught.value) == f"impl='{impl}' cannot run: it needs tensors on a GPU, got device 'cpu'"


def test_presets():
    assert BAAttConfig() == BAAttConfig(128, 0.5, "none", 256, "clusters", 0.5, 16, 2, True, 1, "row")
    assert BAAttConfig.preset("default") == BAAttConfig.preset("safe") == BAAttConfig()
    assert BAAttConfig.preset("paper") == BAAttConfig(128, 0.5, "qk", 1024, "covariance", 0.5, keep_first=0)
    assert BAAttConfig.preset("fast") == BAAttConfig(representatives=8)
    assert [Policy.preset(name).dense_layers for name in PRESETS] == [(), (), (0, 1), ()]
    with pytest.raises(ValueError, match=r"preset must be one of \['default', 'paper', 'safe', 'fast'\], got 'best'"):
        BAAttConfig.preset("best")


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ({"attn_mask": None}, "key_mask=[B, M] bool"),
        ({"attn_mask": torch.ones(40, 50, dtype=torch.bool)}, "causal=1"),
        ({"is_causal": True}, "causal=1 is causal attention"),
        ({"is_causal": False, "dropout_p": 0.0}, "causal=1"),
        ({"dropout_p": 0.1}, "there is no dropout"),
        ({"enable_gqa": True}, "grouped heads are taken as they are"),
    ],
)
def test_arguments_of_sdpa_are_told_their_names_here(given, instead):
    with pytest.raises(TypeError) as error:
        ba_attention(*inputs().values(), CONFIG, **given)
    assert f"{next(iter(given))} is no argument of ba_attention: " in str(error.value)
    assert instead in str(error.value)
    assert "baatt.integrations.sdpa.sparse_sdpa(config)" in str(error.value)


def test_other_arguments_are_unknown_as_always():
    with pytest.raises(TypeError, match=r"ba_attention\(\) got an unexpected keyword argument 'mask'"):
        ba_attention(*inputs().values(), CONFIG, mask=None)
    with pytest.raises(
        TypeError, match="config must be a BAAttConfig, got Tensor in the place of attn_mask: key_mask="
    ):
        ba_attention(*inputs().values(), torch.ones(40, 50))


def test_is_causal_is_what_the_error_says():
    q, k, v = (torch.randn(1, 2, tokens, 8) for tokens in (40, 50, 50))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = ba_attention(q, k, v, BAAttConfig(block_size=16, sparsity=0), causal=1, query_start=0)
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"sparsity": 0.5},
            "sparsity is no argument of ba_attention: it is a field of config, BAAttConfig(sparsity=...)",
        ),
        ({"causal": True}, "causal must be an int or None, got True: causal=1 is causal attention, None is none"),
    ],
)
def test_an_argument_in_the_wrong_place_is_told_the_right_one(options, text):
    with pytest.raises(TypeError) as caught:
        ba_attention(*inputs().values(), CONFIG, **options)
    assert str(caught.value) == text


def test_tensors_without_values_in_memory():
    with pytest.raises(ValueError, match=r"^query must be on a device that holds values, got meta$"):
        ba_attention(*(x.to("meta") for x in inputs().values()), CONFIG)
    with pytest.raises(TypeError, match=r"^query must have the layout torch.strided, got torch.sparse_coo$"):
        ba_attention(*(x.to_sparse() for x in inputs().values()), CONFIG)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_tensors_of_which_a_kernel_would_read_foreign_memory(name):
    given = dict(zip(("query", "key", "value"), inputs().values(), strict=True))
    fake = {name: FakeTensorMode().from_tensor(given[name])}
    with pytest.raises(TypeError, match=rf"^{name} must hold its values itself, got a FakeTensor$"):
        ba_attention(*{**given, **fake}.values(), CONFIG)
    negated = {name: torch._neg_view(given[name])}
    with pytest.raises(TypeError, match=rf"^{name} must hold .*, got a view that negates them: call resolve_neg\(\)$"):
        ba_attention(*{**given, **negated}.values(), CONFIG)
    with pytest.raises(TypeError, match=rf"^{name} must hold its values itself, got one under vmap$"):
        torch.func.vmap(lambda x: ba_attention(*{**given, name: x}.values(), CONFIG))(given[name][None])


@pytest.mark.parametrize("name", ["key_mask", "query_mask"])
def test_masks_of_which_a_kernel_would_read_foreign_memory(name):
    q, k, v = inputs().values()
    mask = torch.ones(2, 50 if name == "key_mask" else 40, dtype=torch.bool)
    with pytest.raises(TypeError, match=rf"^{name} must hold its values itself, got a FakeTensor$"):
        ba_attention(q, k, v, CONFIG, **{name: FakeTensorMode().from_tensor(mask)})
    with pytest.raises(TypeError, match=rf"^{name} must hold its values itself, got one under vmap$"):
        torch.func.vmap(lambda x: ba_attention(q, k, v, CONFIG, **{name: x}))(mask[None])


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.ones(4, 40, 8)] * 2)
    with pytest.raises(TypeError, match=r"^query must have the layout torch.strided, got a nested tensor$"):
        ba_attention(nested, *list(inputs().values())[1:], CONFIG)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_derivative_forward_is_refused_as_one_backward(name):
    given = dict(zip(("query", "key", "value"), inputs().values(), strict=True))
    with forward_ad.dual_level():
        ba_attention(*given.values(), CONFIG)
        given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(ValueError, match=rf"^{name} must not require gradients, got a tangent of torch\.autograd"):
            ba_attention(*given.values(), CONFIG)


@pytest.mark.parametrize("value", [10**400, -(10**400), math.nan, math.inf])
@pytest.mark.parametrize(("kind", "name"), [(BAAttConfig, "sparsity"), (BAAttConfig, "beta"), (Policy, "dense_steps")])
def test_options_are_numbers_that_a_float_holds(kind, name, value):
    with pytest.raises(TypeError, match=f"{name} must be a finite number, got"):
        kind(**{name: value})


@pytest.mark.parametrize("name", ["sort", "score", "budget"])
def test_names_are_words(name):
    with pytest.raises(ValueError, match=rf"^{name} must be one of .*, got \[\]$"):
        BAAttConfig(**{name: []})
    with pytest.raises(ValueError, match=r"^preset must be one of .*, got \[\]$"):
        BAAttConfig.preset([])


def test_counts_fit_in_what_kernels_take():
    for name in ("refinements", "keep_first"):
        with pytest.raises(ValueError, match=rf"^{name} must be at most {2**30}, got {2**63}$"):
            BAAttConfig(**{name: 2**63})
    q, k, v = inputs().values()
    some = BAAttConfig(16, 0.5, keep_first=2**30)
    assert torch.equal(ba_attention(q, k, v, some), ba_attention(q, k, v, BAAttConfig(16, 0.5, keep_first=2)))


def test_numbers_of_numpy_become_python_s():
    config = BAAttConfig(16, np.float64(0.5), beta=np.float64(0.25))
    assert (type(config.sparsity), type(config.beta)) == (float, float)
    assert config == BAAttConfig(16, 0.5, beta=0.25)
