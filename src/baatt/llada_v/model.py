"""LLaDA-V: a vision tower, a two-layer projector and a masked-diffusion language model, from a local folder.

In: a folder, then images or the frames of a video. Out: their visual tokens, and a language model like any other that
reads them among its ids (`prompt.py`). Tensor names and the order of tokens are those of the published code;
see docs/multimodal.md. Knows nothing of text, sampling and sparsity.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from baatt.llada_v.config import LLaDAVConfig
from baatt.llada_v.pictures import as_pixels, cut_into_tiles, pad_to_square, read_canvases
from baatt.llada_v.prompt import VisualEmbedding
from baatt.llada_v.siglip import SiglipConfig, SiglipEncoder
from baatt.llada_v.visual_tokens import POOLING, image_tokens, video_tokens
from baatt.models.checkpoint import _folder, _list, _read_json, _read_weights, _weight_files
from baatt.models.llada import MaskedDiffusionLM

if TYPE_CHECKING:
    from PIL.Image import Image

#: Part of a layer here -> its name in the checkpoint.
LAYER_NAMES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}
WHOLE_NAMES = {
    "language.model.transformer.wte.weight": "model.embed_tokens.weight",
    "language.model.transformer.ln_f.weight": "model.norm.weight",
    "language.model.transformer.ff_out.weight": "lm_head.weight",
    "newline": "model.image_newline",
}
LAYER = re.compile(r"language\.model\.transformer\.blocks\.(\d+)\.(\w+)\.(\w+)")
TOWER = "model.vision_tower.vision_tower.vision_model."
#: In checkpoints, but behind the layer whose output is used.
UNUSED = re.compile(r"(model\.vision_tower\.vision_tower\.)?vision_model\.post_layernorm\.\w+")


class VisualDiffusionLM(nn.Module):
    """LLaDA-V. `language` is a `MaskedDiffusionLM` like any other; this module brings pictures to it.

    Attributes:
        config: of the language model. pictures: how pictures become visual tokens.
        language, vision, projector, newline: the parts.
    """

    def __init__(self, config: LLaDAVConfig) -> None:
        super().__init__()
        self.config, self.pictures = config.language, config.pictures
        width = config.language.d_model
        self.language = MaskedDiffusionLM(config.language)
        self.language.transformer.wte = VisualEmbedding(config.language.logit_size, width)
        self.vision = SiglipEncoder(config.vision)
        self.projector = nn.Sequential(nn.Linear(config.vision.hidden_size, width), nn.GELU(), nn.Linear(width, width))
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
            dtype: dtype of the parameters; None keeps the stored one.
            device: where the parameters live.

        Raises:
            FileNotFoundError: a folder, its config.json or its weights are missing.
            TypeError, ValueError: config.json asks for something not implemented, or tensors are broken, missing,
                unexpected or of the wrong shape.
        """
        folder = _folder(path)
        tower = None if vision_tower is None else _folder(vision_tower)
        vision = None if tower is None else SiglipConfig.from_dict(_read_json(tower / "config.json"))
        config = LLaDAVConfig.from_dict(_read_json(folder / "config.json"), vision)
        with torch.device("meta"):
            model = cls(config)
        names = {name: stored_name(name) for name in model.state_dict()}
        tensors: dict[str, Tensor] = {}
        if tower is not None:
            of_tower = {name: f"vision_model.{name.removeprefix('vision.')}" for name in names if _of_vision(name)}
            tensors |= _load(tower, model, of_tower, dtype, torch.device(device), whole_folder=False)
            names = {name: stored for name, stored in names.items() if not _of_vision(name)}
        tensors |= _load(folder, model, names, dtype, torch.device(device), whole_folder=True)
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    @torch.inference_mode()
    def embed_images(self, images: Sequence["Image"]) -> list[Tensor]:
        """Visual tokens [N, D] of every image of one prompt: a single one is cut into tiles, several are padded."""
        size = self.vision.config.image_size
        if len(images) > 1 or self.pictures.image_aspect_ratio == "pad":
            return list(self._features([pad_to_square(image) for image in images]))
        canvases = read_canvases(cast(Any, self.pictures.image_grid_pinpoints), size)
        return [
            image_tokens(self._features(parts), grid, self.newline, self.pictures.max_tiles)
            for parts, grid in (cut_into_tiles(image, canvases, size) for image in images)
        ]

    @torch.inference_mode()
    def embed_video(self, frames: Sequence["Image"], *, stride: int = 2, mode: str = "bilinear") -> Tensor:
        """Visual tokens [N, D] of a video.

        Args:
            frames: in their order.
            stride: patches of a side that become one token. mode: how, "bilinear", "average" or "max".

        Raises:
            ValueError: no frame, or a stride or mode that there is not.
        """
        side = self.vision.config.side
        if not frames:
            raise ValueError("frames must not be empty")
        if not 1 <= stride <= side:
            raise ValueError(f"stride must be in [1, {side}], got {stride}")
        if mode not in POOLING:
            raise ValueError(f"mode must be one of {list(POOLING)}, got {mode!r}")
        newlines = self.pictures.mm_newline_position
        return video_tokens(self._features(frames), self.newline, stride=stride, mode=mode, newlines=newlines)

    def _features(self, parts: Sequence["Image"]) -> Tensor:
        """[F, n * n, D] in the language model's width."""
        pixels = as_pixels(parts, self.vision.config.image_size)
        projected: Tensor = self.projector(self.vision(pixels.to(self.newline.device, self.newline.dtype)))
        return projected


def stored_name(name: str) -> str:
    """The name in a checkpoint of a parameter of `VisualDiffusionLM`."""
    layer = LAYER.fullmatch(name)
    if layer is not None:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"
    if _of_vision(name):
        return TOWER + name.removeprefix("vision.")
    return WHOLE_NAMES.get(name, f"model.mm_{name}")


def _of_vision(name: str) -> bool:
    return name.startswith("vision.")


def _load(
    folder: Path,
    model: nn.Module,
    names: Mapping[str, str],
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    whole_folder: bool,
) -> dict[str, Tensor]:
    """Tensors by their name here, of `names` from here to the folder's files; all that the folder has must be wanted,
    unless it is of a larger model."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = {stored: shapes[name] for name, stored in names.items()}
    found: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for file in _weight_files(folder):
        unexpected += _read_weights(file, expected, found, dtype, device)
    missing = [stored for stored in expected if stored not in found]
    unexpected = [stored for stored in unexpected if whole_folder and not UNUSED.fullmatch(stored)]
    if missing or unexpected:
        hint = ""
        if whole_folder and missing and all(stored.startswith(TOWER) for stored in missing):
            hint = "; give the folder of the vision tower, whose weights are not in this one, as vision_tower"
        listed = _list(missing=missing, unexpected=unexpected)
        raise ValueError(f"{folder}: tensors do not fit config.json: {listed}{hint}")
    return {name: found[stored] for name, stored in names.items()}
