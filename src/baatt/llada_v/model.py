"""LLaDA-V: a vision tower, a two-layer projector and a masked-diffusion language model, from a local folder.

In: a folder, then images or the frames of a video. Out: their visual tokens, and a language model like any other that
reads them among its ids (`prompt.py`). Tensor names and the order of tokens are those of the published code;
see docs/multimodal.md. Knows nothing of text, sampling and sparsity.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import SiglipVisionModel

from baatt.llada_v import pictures
from baatt.llada_v.config import LLaDAVConfig, read_vision_config
from baatt.models.checkpoint import check_described, list_names, read_config, read_tensors
from baatt.models.llada import MaskedDiffusionLM

#: Parts of the language model and of its layers -> their names in the checkpoint.
LANGUAGE_NAMES = {
    "language.model.transformer.blocks.": "model.layers.",
    "language.model.transformer.wte.": "model.embed_tokens.",
    "language.model.transformer.ln_f.": "model.norm.",
    "language.model.transformer.ff_out.": "lm_head.",
    ".q_proj.": ".self_attn.q_proj.",
    ".k_proj.": ".self_attn.k_proj.",
    ".v_proj.": ".self_attn.v_proj.",
    ".attn_out.": ".self_attn.o_proj.",
    ".ff_proj.": ".mlp.gate_proj.",
    ".up_proj.": ".mlp.up_proj.",
    ".ff_out.": ".mlp.down_proj.",
    ".attn_norm.": ".input_layernorm.",
    ".ff_norm.": ".post_attention_layernorm.",
}
TOWER = "model.vision_tower.vision_tower."
#: In checkpoints, but behind the layer whose output is used.
UNUSED = rf"{re.escape(TOWER)}vision_model\.post_layernorm\.\w+"


class VisualDiffusionLM(nn.Module):
    """LLaDA-V. `language` is a `MaskedDiffusionLM` like any other; this module brings pictures to it.

    Attributes:
        config: of the language model. pictures: how they become visual tokens.
        image_size: pixels of a side of what the tower sees. side: n, patches along it.
        language, vision, projector, newline: the parts.
    """

    def __init__(self, config: LLaDAVConfig) -> None:
        super().__init__()
        self.config, self.pictures = config.language, config
        width = config.language.d_model
        self.language = MaskedDiffusionLM(config.language)
        vision: Any = config.vision
        self.image_size, self.side = vision.image_size, vision.image_size // vision.patch_size
        tower: Any = SiglipVisionModel(vision)
        tower.post_layernorm = nn.Identity()  # features are taken in front of it
        self.vision = tower
        self.projector = nn.Sequential(nn.Linear(vision.hidden_size, width), nn.GELU(), nn.Linear(width, width))
        self.newline = nn.Parameter(torch.zeros(width))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        vision_tower: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> "VisualDiffusionLM":
        """Load a local LLaDA-V folder, in evaluation mode.

        Args:
            path: folder with config.json and safetensors.
            vision_tower: folder of a SigLIP model, for a checkpoint that does not hold the tower's weights.
            dtype: dtype of the parameters; None keeps the stored one, for a tower of its own too that of `path`.
            device: where the parameters live.

        Raises:
            FileNotFoundError: a folder, its config.json or its weights are missing.
            TypeError, ValueError: config.json asks for something not implemented, or tensors are broken, missing,
                unexpected or of the wrong shape.
        """
        vision = None if vision_tower is None else read_vision_config(read_config(vision_tower))
        config = LLaDAVConfig.from_dict(read_config(path), vision)
        check_described(path, layers=config.language.n_layers, parameters=config.language.parameters)
        check_described(vision_tower or path, layers=config.vision.num_hidden_layers)
        with torch.device("meta"):
            model = cls(config)
        names = {name: stored_name(name) for name in model.state_dict()}
        expected = {names[name]: tensor for name, tensor in model.state_dict().items()}
        tower = {stored: expected.pop(stored) for stored in names.values() if stored.startswith(TOWER)}
        optional = tower if vision_tower is None else None
        tensors = read_tensors(path, expected, optional=optional, ignored=UNUSED, dtype=dtype, device=device)
        if vision_tower is not None:
            alone = {stored.removeprefix(TOWER): tensor for stored, tensor in tower.items()}
            same = dtype or next(iter(tensors.values())).dtype
            found = read_tensors(vision_tower, alone, ignored=".*", dtype=same, device=device)
            tensors |= {TOWER + name: tensor for name, tensor in found.items()}
        missing = [stored for stored in tower if stored not in tensors]
        if missing:
            hint = "give the folder of the vision tower, whose weights are not in this one, as vision_tower"
            raise ValueError(f"{path}: tensors do not fit config.json: missing {list_names(missing)}; {hint}")
        model.load_state_dict({name: tensors[stored] for name, stored in names.items()}, assign=True)
        # No file has these, so they are still without values.
        model.vision.embeddings.position_ids = torch.arange(model.side**2, device=device)[None]
        return model.eval()

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image]) -> list[Tensor]:
        """Visual tokens [N, D] of every image of one prompt: a single one is cut into tiles, several are padded."""
        size = self.image_size
        if len(images) > 1 or self.pictures.image_aspect_ratio == "pad":
            return list(self._features([pictures.pad_to_square(image) for image in images]))
        canvases = pictures.read_canvases(cast(Any, self.pictures.image_grid_pinpoints), size)
        return [
            pictures.image_tokens(self._features(parts), grid, self.newline, self.pictures.max_tiles)
            for parts, grid in (pictures.cut_into_tiles(image, canvases, size) for image in images)
        ]

    @torch.inference_mode()
    def embed_video(self, frames: Sequence[Image], *, stride: int = 2, mode: str = "bilinear") -> Tensor:
        """Visual tokens [N, D] of a video.

        Args:
            frames: in their order.
            stride: patches of a side that become one token. mode: how, "bilinear", "average" or "max".

        Raises:
            ValueError: no frame, or a stride or mode that there is not.
        """
        if not frames:
            raise ValueError("frames must not be empty")
        if not 1 <= stride <= self.side:
            raise ValueError(f"stride must be in [1, {self.side}], got {stride}")
        if mode not in pictures.POOLING:
            raise ValueError(f"mode must be one of {list(pictures.POOLING)}, got {mode!r}")
        newlines = self.pictures.mm_newline_position
        return pictures.video_tokens(self._features(frames), self.newline, stride=stride, mode=mode, newlines=newlines)

    def _features(self, parts: Sequence[Image]) -> Tensor:
        """[F, n * n, D] in the language model's width."""
        pixels = pictures.as_pixels(parts, self.image_size)
        seen = self.vision(pixels.to(self.newline.device, self.newline.dtype)).last_hidden_state
        return cast(Tensor, self.projector(seen))


def stored_name(name: str) -> str:
    """The name in a checkpoint of a parameter of `VisualDiffusionLM`."""
    if name.startswith("vision."):
        return f"{TOWER}vision_model.{name.removeprefix('vision.')}"
    if name == "newline":
        return "model.image_newline"
    if not name.startswith("language."):
        return f"model.mm_{name}"
    for ours, stored in LANGUAGE_NAMES.items():
        name = name.replace(ours, stored)
    return name
