"""The shape of a `MaskedDiffusionLM`, read from and written as a LLaDA config.json, with every check of it.

In: the keys of a config.json. Out: a frozen `ModelConfig`. What would change the computation and is not implemented is
refused by name; keys without influence on inference are ignored. Knows nothing of files and tensors.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baatt.models.rope import resolve_rope_scaling
from baatt.types import as_float

#: No size reaches this, and a product of two still fits what PyTorch counts with.
LARGEST = 2**30
# What the model implements of the keys that change LLaDA's computation; any other value is refused.
IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "model_type": ("llada",),
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "attention_layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "rope": (True,),
    "alibi": (False, None),
    "multi_query_attention": (False, None),
    "scale_logits": (False, None),
    "input_emb_norm": (False, None),
    "clip_qkv": (None,),
    "predicts": ("same", "next"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model, in the field names of LLaDA's config.json.

    Args:
        n_kv_heads: G, heads of keys and values; None means `n_heads`.
        embedding_size: rows of the embedding and width V of the logits, at least `vocab_size`; None means `vocab_size`.
        attention_layer_norm: RMSNorm of the whole projected queries and keys, before the split into heads.
        predicts: which token the head's output at a token tells: "same", that token, or "next", the one after it, as in
            weights that come from a causal model. `MaskedDiffusionLM` gives the logits of the token itself either way.
        max_sequence_length: the length the weights were trained for; longer inputs are not refused.
        eos_token_id: the end-of-text token; a list, which becomes a tuple, where there are several.
        init_std: standard deviation of freshly drawn weights.

    Raises:
        TypeError, ValueError: a value of another type or outside its range, or sizes that do not fit each other.
    """

    d_model: int
    n_heads: int
    n_layers: int
    mlp_hidden_size: int
    vocab_size: int
    mask_token_id: int
    n_kv_heads: int | None = None
    embedding_size: int | None = None
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    attention_layer_norm: bool = False
    include_bias: bool = False
    include_qkv_bias: bool = False
    max_sequence_length: int = 4096
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    init_std: float = 0.02
    block_type: str = "llama"
    layer_norm_type: str = "rms"
    activation_type: str = "silu"
    predicts: str = "same"

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "n_layers", "mlp_hidden_size", "vocab_size", "max_sequence_length"):
            check_positive_integer(name, getattr(self, name))
        check_positive_integer("n_kv_heads", self.kv_heads)
        check_positive_integer("embedding_size", self.logit_size)
        check_implemented(vars(self), IMPLEMENTED)
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model must be a multiple of 2 * n_heads={2 * self.n_heads}, got {self.d_model}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads={self.n_heads}, got {self.kv_heads}")
        if self.logit_size < self.vocab_size:
            raise ValueError(f"embedding_size must be at least vocab_size={self.vocab_size}, got {self.logit_size}")
        if isinstance(self.eos_token_id, list | tuple):
            ends = tuple(self.eos_token_id)
            object.__setattr__(self, "eos_token_id", ends if len(ends) > 1 else next(iter(ends), None))
        check_token("mask_token_id", self.mask_token_id, self.logit_size)
        if self.pad_token_id is not None:
            check_token("pad_token_id", self.pad_token_id, self.logit_size)
        for token in self.end_tokens:
            check_token("eos_token_id", token, self.logit_size)
        for name in ("weight_tying", "attention_layer_norm", "include_bias", "include_qkv_bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        for name in ("rope_theta", "rms_norm_eps", "init_std"):
            check_positive_number(name, getattr(self, name))

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The end-of-text tokens; none, one or several."""
        ends = self.eos_token_id
        return ends if isinstance(ends, tuple) else () if ends is None else (ends,)

    @property
    def head_size(self) -> int:
        """D, channels per head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """G, heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def logit_size(self) -> int:
        """V, rows of the embedding and width of the logits."""
        return self.vocab_size if self.embedding_size is None else self.embedding_size

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold at least: without norms and biases."""
        kv_width = self.kv_heads * self.head_size
        layer = self.d_model * (2 * self.d_model + 2 * kv_width + 3 * self.mlp_hidden_size)
        return self.n_layers * layer + self.logit_size * self.d_model * (1 if self.weight_tying else 2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read the contents of a LLaDA config.json; keys without influence on inference are ignored.

        Raises:
            TypeError, ValueError: a key is missing, or asks for something that is not implemented.
        """
        values = resolve_rope_scaling(values)
        check_implemented(values, {**IMPLEMENTED, "quantization_config": (None,)})
        if values.get("include_bias") and values.get("bias_for_layer_norm") is None:
            raise ValueError("bias_for_layer_norm must be false when include_bias is true, got None")
        names = [field.name for field in dataclasses.fields(cls)]
        known = {name: values[name] for name in names if values.get(name) is not None}
        if "mlp_hidden_size" not in known and "mlp_ratio" in values and "d_model" in known:
            check_positive_number("mlp_ratio", values["mlp_ratio"])
            check_positive_integer("d_model", known["d_model"])
            width = values["mlp_ratio"] * known["d_model"]
            known["mlp_hidden_size"] = int(width) if math.isfinite(as_float(width)) and width == int(width) else width
        required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
        missing = [name for name in required if name not in known]
        if missing:
            raise ValueError(f"a LLaDA config must have the keys {required}, missing {missing}")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json that LLaDA's own code and `from_dict` both read."""
        fixed = {name: accepted[0] for name, accepted in IMPLEMENTED.items()}
        sizes = {"n_kv_heads": self.kv_heads, "embedding_size": self.logit_size, "rope_full_precision": True}
        return {"architectures": ["LLaDAModelLM"], **fixed, **dataclasses.asdict(self), **sizes}


def check_positive_integer(name: str, value: object) -> None:
    """Refuse what is not a positive int, with a TypeError or ValueError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    if value >= LARGEST:
        raise ValueError(f"{name} must be below 2**30, got {as_float(value):.6g}")


def check_positive_number(name: str, value: object) -> None:
    """Refuse what is not a positive finite number, with a TypeError or ValueError."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(as_float(value)) and value > 0):
        raise ValueError(f"{name} must be positive, got {as_float(value)}")


def check_token(name: str, value: object, rows: int) -> None:
    """Refuse what is not the id of a token, of that many, with a TypeError or ValueError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not 0 <= value < rows:
        raise ValueError(f"{name} must be in [0, {rows}), got {value}")


def check_implemented(values: Mapping[str, Any], implemented: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse, with a ValueError, a key whose value is not one of those implemented; what is not there passes."""
    for name in implemented.keys() & values.keys():
        if values[name] not in implemented[name]:
            accepted = " or ".join(repr(choice) for choice in implemented[name])
            raise ValueError(f"{name} must be {accepted} (nothing else is implemented), got {values[name]!r}")
