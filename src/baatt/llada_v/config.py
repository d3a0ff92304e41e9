"""The config.json of LLaDA-V: its language model, its vision tower, and how pictures become visual tokens.

In: the keys as the published folder has them. Out: the parts, checked. What the published code leaves to a default has
the same default here; what would change the computation and is not implemented is refused by name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import SiglipVisionConfig

from baatt.llada_v.pictures import NEWLINES
from baatt.models.config import ModelConfig, check_implemented, check_positive_integer, check_positive_number

#: `<|mdm_mask|>`, which the published code writes as a number; a config.json may name another.
MASK_TOKEN_ID = 126336

# What is implemented of the keys that change the computation; any other value is refused.
IMPLEMENTED: Mapping[str, tuple[object, ...]] = {
    "model_type": ("llava_llada",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "rope_scaling": (None,),
    "tie_word_embeddings": (False, None),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_vision_select_layer": (-2, None),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
    "add_faster_video": (False, None),
    "model_type of the vision tower": ("siglip_vision_model",),
    "hidden_act of the vision tower": ("gelu_pytorch_tanh",),
    "num_channels of the vision tower": (3,),
}
#: Keys of config.json -> fields of `ModelConfig`; the first ones must be there.
LANGUAGE_KEYS = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "mlp_hidden_size",
    **{name: name for name in ("vocab_size", "rope_theta", "rms_norm_eps")},
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    **{name: name for name in ("eos_token_id", "pad_token_id", "mask_token_id")},
}
REQUIRED = (*tuple(LANGUAGE_KEYS)[:7], "image_aspect_ratio", "mm_projector_type")
#: Sizes of the vision tower that the published code fixes: those of so400m-patch14-384.
VISION_SIZES: Mapping[str, int] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
ANYRES = re.compile(r"anyres(?:_max_(\d+))?")


@dataclass(frozen=True)
class LLaDAVConfig:
    """The parts of a config.json: language model, vision tower, and in its field names how pictures become tokens.

    Args:
        image_aspect_ratio: "anyres", or "anyres_max_9" for about nine tiles at most, cuts a single image into tiles;
            "pad" pads it to one square. Several images of one prompt are always padded.
        image_grid_pinpoints: canvases for the tiles, "(1x1),...,(6x6)" or pairs of pixels; unused with "pad".
        mm_newline_position: newlines of a video, a name in `NEWLINES`; the published code takes a missing key for
            "one_token".
        tokenizer_model_max_length: tokens of a prompt in training; longer ones are not refused.

    Raises:
        TypeError, ValueError: a value of another type, or something that is not implemented.
    """

    language: ModelConfig
    vision: SiglipVisionConfig
    image_aspect_ratio: str
    image_grid_pinpoints: str | Sequence[Sequence[int]] | None = None
    mm_newline_position: str = "one_token"
    tokenizer_model_max_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("image_aspect_ratio", "mm_newline_position"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a text, got {getattr(self, name)!r}")
        if self.tokenizer_model_max_length is not None:
            check_positive_integer("tokenizer_model_max_length", self.tokenizer_model_max_length)
        ratio, tiled = self.image_aspect_ratio, ANYRES.fullmatch(self.image_aspect_ratio)
        if ratio != "pad" and not tiled:
            kinds = "'pad', 'anyres' or like 'anyres_max_9' (nothing else is implemented)"
            raise ValueError(f"image_aspect_ratio must be {kinds}, got {ratio!r}")
        if tiled and self.image_grid_pinpoints is None:
            raise ValueError(f"image_grid_pinpoints must be given with {ratio!r}, got None")
        if self.mm_newline_position not in NEWLINES:
            raise ValueError(f"mm_newline_position must be one of {list(NEWLINES)}, got {self.mm_newline_position!r}")

    @property
    def max_tiles(self) -> int | None:
        """Tiles whose features are kept at most; None = all."""
        found = ANYRES.fullmatch(self.image_aspect_ratio)
        return int(found[1]) if found is not None and found[1] else None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], vision: SiglipVisionConfig | None = None) -> "LLaDAVConfig":
        """Read the contents of LLaDA-V's config.json.

        Args:
            vision: sizes of the tower; None takes `vision_config`, which the published folder does not have: then those
                that the published code fixes, so400m-patch14-384.

        Raises:
            TypeError, ValueError: a key is missing, or asks for something that is not implemented.
        """
        values = {name: value for name, value in values.items() if value is not None}
        missing = [name for name in REQUIRED if name not in values]
        if missing:
            raise ValueError(f"a LLaDA-V config must have the keys {missing}")
        check_implemented(values, {**IMPLEMENTED, "quantization_config": (None,)})
        if "siglip" not in str(values.get("mm_vision_tower")).lower():
            raise ValueError(f"mm_vision_tower must name a SigLIP model, got {values.get('mm_vision_tower')!r}")
        vision = vision or read_vision_config(values.get("vision_config", {}))
        language = {field: values[key] for key, field in LANGUAGE_KEYS.items() if key in values}
        pictures = {field.name: values[field.name] for field in fields(cls)[2:] if field.name in values}
        return cls(ModelConfig(**{"mask_token_id": MASK_TOKEN_ID, **language}), vision, **pictures)


def read_vision_config(values: Mapping[str, Any]) -> SiglipVisionConfig:
    """The vision tower of a config.json, of SigLIP's tower alone or of the model of image and text that it is part of.

    LLaDA-V's features are the output of the last layer but one: the config is of a tower without the last, its final
    norm and its pooling head.

    Raises:
        TypeError, ValueError: another kind of model, something that is not implemented, or sizes that do not fit.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"vision_config must be an object, got {values!r}")
    if values.get("model_type") in ("siglip", "siglip2"):
        values = values.get("vision_config") or {}
    check_implemented({f"{name} of the vision tower": value for name, value in values.items()}, IMPLEMENTED)
    sizes = {name: values.get(name, published) for name, published in VISION_SIZES.items()}
    for name, size in sizes.items():
        check_positive_integer(f"{name} of the vision tower", size)
    epsilon = values.get("layer_norm_eps", 1e-6)
    check_positive_number("layer_norm_eps of the vision tower", epsilon)
    layers, heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
    if layers < 2:
        raise ValueError(f"num_hidden_layers of the vision tower must be at least 2, got {layers}")
    if sizes["hidden_size"] % heads:
        raise ValueError(f"hidden_size must be a multiple of num_attention_heads={heads}, got {sizes['hidden_size']}")
    if sizes["patch_size"] > sizes["image_size"]:
        raise ValueError(f"patch_size must be at most image_size={sizes['image_size']}, got {sizes['patch_size']}")
    kept = {"num_hidden_layers": layers - 1, "layer_norm_eps": epsilon}
    return SiglipVisionConfig(**{**sizes, **kept}, vision_use_head=False)
