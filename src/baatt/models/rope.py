"""Rotary position embedding (RoPE): the tables of angles, the rotation, and what config.json may say of their base.

In: positions [B, N] and q or k [B, H, N, D]; or the contents of a LLaDA config.json. Out: the same rotated; or the same
contents with the base that the tables are made from. One change of the base is known, every other scaling is refused.
LLaDA-8B, LLaDA-1.5 and UltraLLaDA have no scaling key: their `rope_theta` is the base.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Keys of a scaling, as transformers writes them: before version 5, and since.
SCALING_KEYS = ("rope_scaling", "rope_parameters")


class Rotary(NamedTuple):
    """cos and sin of the RoPE angles, each [B or 1, 1, N, D/2], fp32 (fp64 for an fp64 model)."""

    cos: Tensor
    sin: Tensor


def rotary_tables(positions: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Angles position * theta^(-2t/D) of positions [B or 1, N] and channels t < D/2."""
    channels = torch.arange(0, head_size, 2, device=positions.device, dtype=dtype)
    frequencies = theta ** -(channels / head_size)
    angles = positions[:, None, :, None].to(dtype) * frequencies
    return Rotary(angles.cos(), angles.sin())


def rotate(x: Tensor, rotary: Rotary, dtype: torch.dtype | None = None) -> Tensor:
    """Turn channels (t, t + D/2) of x [B, H, N, D] by the angle of t; computed in the tables' dtype.

    dtype: of the result; None: the tables'.
    """
    # Whole heads at once and sums in place: half the memory traffic of one product a half, and bit for bit the same.
    # Without einops, which would be 4 % of the time of a short step.
    halves = x.view(*x.shape[:-1], 2, x.shape[-1] // 2).to(rotary.cos.dtype)
    turned = halves * rotary.cos[..., None, :]
    crossed = halves * rotary.sin[..., None, :]
    turned[..., 0, :].sub_(crossed[..., 1, :])
    turned[..., 1, :].add_(crossed[..., 0, :])
    return turned.flatten(-2).to(dtype or rotary.cos.dtype)


def ntk_base(theta: float, factor: float, head_size: int) -> float:
    """NTK-aware base theta * factor^(D / (D - 2)): stretches the slowest channel by `factor`, the fastest not at all.

    Args:
        theta: base the weights were trained with.
        factor: wanted length / trained length, at least 1.
        head_size: D, channels per head, at least 4.

    Raises:
        ValueError: a factor below 1, or D below 4.
    """
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(f"factor of an NTK scaling must be a finite number of at least 1, got {factor}")
    if head_size < 4:
        raise ValueError(f"head_size must be at least 4 for an NTK scaling, got {head_size}")
    try:
        return float(theta * factor ** (head_size / (head_size - 2)))
    except OverflowError:
        raise ValueError(f"factor of an NTK scaling must leave the base finite, got {factor}") from None


def resolve_rope_scaling(values: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of config.json with its scaling, if any, put into `rope_theta`.

    A scaling is `{"rope_type": kind, "factor": s}` under `rope_scaling` (or `rope_parameters`), `type` being an older
    name of `rope_type`. Kinds: "default" changes nothing, "ntk" is `ntk_base`.

    Raises:
        ValueError, TypeError: another kind or another key about RoPE, both keys at once, a scaling without what it
            needs, or a `rope_theta` inside it that contradicts the one outside.
    """
    # The first two the model reads itself, the third changes nothing: its tables are in float32 anyway.
    known = {"rope", "rope_theta", "rope_full_precision", *SCALING_KEYS}
    present = {key for key, value in values.items() if (key.startswith("rope") or "ntk" in key) and value is not None}
    if present - known:
        raise ValueError(f"config.json must have no key about RoPE but {sorted(known)}, got {sorted(present - known)}")
    given = [key for key in SCALING_KEYS if key in present]
    if len(given) > 1:
        raise ValueError(f"config.json must have one of {list(SCALING_KEYS)}, got both")
    rest = {key: value for key, value in values.items() if key not in SCALING_KEYS}
    return rest | ({"rope_theta": _scaled_base(given[0], values[given[0]], rest)} if given else {})


def _scaled_base(key: str, scaling: object, values: Mapping[str, Any]) -> float:
    if not isinstance(scaling, Mapping):
        raise TypeError(f"{key} must be an object or null, got {scaling!r}")
    inner, outer = scaling.get("rope_theta"), values.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        raise ValueError(f"{key}.rope_theta must equal rope_theta={outer}, got {inner}")
    theta = _number("rope_theta", outer if inner is None else inner)
    extra = sorted(set(scaling) - {"rope_type", "type", "factor", "rope_theta"})
    if extra:
        raise ValueError(f"{key} must have no key but rope_type, factor and rope_theta, got {extra}")
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return theta
    if kind != "ntk":
        raise ValueError(f"{key}.rope_type must be 'default' or 'ntk' (nothing else is implemented), got {kind!r}")
    width, heads = values.get("d_model"), values.get("n_heads")
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"config.json must have d_model and n_heads where {key} is given, got {width!r} and {heads!r}")
    return ntk_base(theta, _number(f"{key}.factor", scaling.get("factor")), width // heads)


def _number(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number for a RoPE scaling, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite for a RoPE scaling, got an int beyond all floats") from None
