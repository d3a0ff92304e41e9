"""Scalings of RoPE in config.json: one is known, the others are refused, none is overlooked."""

import pytest

from baatt.models.rope import ntk_base, resolve_rope_scaling

VALUES = {"d_model": 4096, "n_heads": 32, "rope": True, "rope_theta": 500_000.0, "rope_full_precision": True}


def test_base_by_hand():
    assert ntk_base(500_000.0, 1, 128) == 500_000.0
    assert ntk_base(10_000.0, 2.0, 4) == 10_000.0 * 2.0**2  # D / (D - 2) = 2
    assert ntk_base(500_000.0, 4.0, 128) == pytest.approx(500_000.0 * 4.0 ** (128 / 126))


def test_the_slowest_channel_is_stretched_by_the_factor():
    """Channel D - 2 of the new base at 4 N turns as far as it did at N."""
    theta, head = 500_000.0, 128
    exponent = (head - 2) / head
    assert (ntk_base(theta, 4.0, head) / theta) ** exponent == pytest.approx(4.0)


@pytest.mark.parametrize(
    "scaling",
    [{}, {"rope_scaling": None}, {"rope_scaling": {"rope_type": "default"}}, {"rope_parameters": {"type": "default"}}],
)
def test_no_scaling(scaling):
    assert resolve_rope_scaling(VALUES | scaling) == VALUES


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_ntk(key, kind):
    resolved = resolve_rope_scaling(VALUES | {key: {kind: "ntk", "factor": 4}})
    assert resolved == VALUES | {"rope_theta": ntk_base(500_000.0, 4, 128)}


def test_a_base_inside():
    values = {name: value for name, value in VALUES.items() if name != "rope_theta"}
    inside = {"rope_parameters": {"rope_type": "default", "rope_theta": 7e6}}
    assert resolve_rope_scaling(values | inside)["rope_theta"] == 7e6
    with pytest.raises(
        ValueError, match=r"rope_parameters\.rope_theta must equal rope_theta=500000\.0, got 7000000\.0"
    ):
        resolve_rope_scaling(VALUES | inside)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3", "longrope", None])
def test_other_kinds_are_refused(kind):
    with pytest.raises(ValueError, match=f"rope_scaling.rope_type must be 'default' or 'ntk' .*, got {kind!r}"):
        resolve_rope_scaling(VALUES | {"rope_scaling": {"rope_type": kind, "factor": 4.0}})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rope_scaling_factor": 4}, ValueError, r"no key about RoPE but .*, got \['rope_scaling_factor'\]"),
        ({"ntk_factor": 4}, ValueError, r"got \['ntk_factor'\]"),
        ({"rope_scaling": 4}, TypeError, "rope_scaling must be an object or null, got 4"),
        ({"rope_scaling": {"type": "ntk"}}, TypeError, r"rope_scaling\.factor must be a number .*, got None"),
        ({"rope_scaling": {"type": "ntk", "factor": 0.5}}, ValueError, "at least 1, got 0.5"),
        ({"rope_scaling": {"type": "ntk", "factor": 2, "beta": 1}}, ValueError, r"no key but .*, got \['beta'\]"),
        ({"rope_scaling": {"type": "ntk", "factor": 2}, "n_heads": None}, ValueError, "must have d_model and n_heads"),
        ({"rope_scaling": {"type": "ntk", "factor": 2}, "d_model": 64}, ValueError, "head_size must be at least 4"),
        ({"rope_scaling": {"type": "ntk", "factor": 2}, "rope_theta": None}, TypeError, "rope_theta must be a number"),
        ({"rope_scaling": {}, "rope_parameters": {}}, ValueError, "got both"),
    ],
)
def test_refused(changes, error, message):
    with pytest.raises(error, match=message):
        resolve_rope_scaling(VALUES | changes)
