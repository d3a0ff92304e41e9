"""The vision tower of LLaDA-V: SigLIP's image encoder without its last layer, its final norm and its pooling head.

In: pixels [F, 3, S, S] in [-1, 1]. Out: features [F, n * n, C] of n x n patches, row by row. Parameters carry the names
that checkpoints give them behind `vision_model.`. Attention is dense: 729 tokens are too few for blocks. Knows nothing
of files, pictures or language.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

ACTIVATION = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the tower, in the field names of its config.json; the defaults are those of so400m-patch14-384.

    Args:
        num_hidden_layers: layers of the published model; the last one is left out here.
        image_size: S, pixels of a side. patch_size: pixels of a patch's side; what does not fill one is cut off.

    Raises:
        TypeError, ValueError: a size that is not a positive int, or sizes that do not fit each other.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} of the vision tower must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} of the vision tower must be positive, got {value}")
        if self.num_hidden_layers < 2:
            raise ValueError(f"num_hidden_layers of the vision tower must be at least 2, got {self.num_hidden_layers}")
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise ValueError(f"hidden_size must be a multiple of num_attention_heads={heads}, got {self.hidden_size}")
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size must be at most image_size={self.image_size}, got {self.patch_size}")

    @property
    def side(self) -> int:
        """n, patches along a side."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SiglipConfig":
        """Read the contents of a config.json, of the tower alone or of the model of image and text that it is part of.

        Raises:
            ValueError: another kind of model, or something that is not implemented.
        """
        if values.get("model_type") in ("siglip", "siglip2"):
            values = values.get("vision_config") or {}
        accepted = {"model_type": ("siglip_vision_model",), "hidden_act": (ACTIVATION,), "num_channels": (3,)}
        for name, choices in accepted.items():
            if values.get(name, choices[0]) not in choices:
                raise ValueError(f"{name} of the vision tower must be {choices[0]!r}, got {values[name]!r}")
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


class SiglipLayer(nn.Module):
    """One pre-norm layer: x + attention, then x + MLP."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        width, hidden, epsilon = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(width, epsilon)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.layer_norm2 = nn.LayerNorm(width, epsilon)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        normed = self.layer_norm1(x)
        q, k, v = (
            rearrange(self.self_attn[name](normed), "F N (H D) -> F H N D", H=self.heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "F H N D -> F N (H D)")
        x = x + cast(Tensor, self.self_attn["out_proj"](out))
        hidden = F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh")
        return x + cast(Tensor, self.mlp["fc2"](hidden))


class SiglipEncoder(nn.Module):
    """Pixels [F, 3, S, S] -> features [F, n * n, C], the output of the last layer but one."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Conv2d(3, config.hidden_size, kernel_size=patch, stride=patch),
                "position_embedding": nn.Embedding(config.side**2, config.hidden_size),
            }
        )
        layers = nn.ModuleList(SiglipLayer(config) for _ in range(config.num_hidden_layers - 1))
        self.encoder = nn.ModuleDict({"layers": layers})

    def forward(self, pixels: Tensor) -> Tensor:
        size = self.config.image_size
        if pixels.dim() != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels must be [F, 3, {size}, {size}], got {tuple(pixels.shape)}")
        patches = rearrange(self.embeddings["patch_embedding"](pixels), "F C h w -> F (h w) C")
        positions = torch.arange(patches.shape[1], device=pixels.device)
        x: Tensor = patches + self.embeddings["position_embedding"](positions)
        for layer in cast(nn.ModuleList, self.encoder["layers"]):
            x = layer(x)
        return x
