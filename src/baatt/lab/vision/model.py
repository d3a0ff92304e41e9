"""A small model of LLaDA-V's shape: a vision tower, a two-layer projector and a masked-diffusion language model.

In: pixels [B, F, 3, rows, columns] of a photo (F = 1) or of the frames of a clip, and the ids of words. Out: logits of
the words; or what the sampler calls. A SigLIP would be larger than the rest: the tower is four convolutions, of which
three halve the picture, and learned embeddings tell a token its row, its column and the two digits of its frame. The
vocabulary is that of `scenes.py`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from baatt.lab.vision.scenes import CELLS, FRAME_CELLS, MASK, WORDS, Window
from baatt.models.config import ModelConfig
from baatt.models.llada import MaskedDiffusionLM
from baatt.models.small_folder import read_model, write_model

#: Pixels in [0, 1] become numbers of about unit size.
MIDDLE, SIZE = 0.5, 0.25
#: Pixels of a side that become a token: three convolutions halve a picture.
PATCH = 8
#: Standard deviation of fresh embeddings of places; that of a fresh projector's outputs is about 0.3.
PLACE = 0.1
#: Likewise of words.
WORD = 0.3


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the model and of what it sees: rows and columns of a photo and of a frame, frames at most; channels of
    the tower's last convolutions."""

    photo: tuple[int, int] = (384, 576)
    frame: tuple[int, int] = (96, 144)
    frames: int = 72
    tower: int = 96
    width: int = 192
    heads: int = 3
    layers: int = 6
    hidden: int = 576
    rope_theta: float = 10_000.0
    words: tuple[str, ...] = WORDS

    def __post_init__(self) -> None:
        for name, grid in (("photo", CELLS), ("frame", FRAME_CELLS)):
            if any(size < 1 or size % (PATCH * cells) for size, cells in zip(getattr(self, name), grid, strict=True)):
                wanted = " and ".join(str(PATCH * cells) for cells in grid)
                raise ValueError(f"{name} must be multiples of {wanted}, got {getattr(self, name)}")
        if self.tower < 4 or self.tower % 4:
            raise ValueError(f"tower must be a multiple of 4, got {self.tower}")

    @property
    def language(self) -> ModelConfig:
        """Of the language model."""
        return ModelConfig(
            d_model=self.width, n_heads=self.heads, n_layers=self.layers, mlp_hidden_size=self.hidden,
            vocab_size=len(self.words), mask_token_id=self.words.index(MASK), rope_theta=self.rope_theta,
            attention_layer_norm=True, max_sequence_length=self.tokens(self.frames) + 128,
        )  # fmt: skip

    def encode(self, words: Sequence[str]) -> list[int]:
        """Ids of words."""
        return [self.words.index(word) for word in words]

    def tokens(self, frames: int) -> int:
        """Visual tokens of so many frames; 0 is a photo."""
        rows, columns = self.frame if frames else self.photo
        return max(1, frames) * (rows // PATCH) * (columns // PATCH)


class VisionModel(nn.Module):
    """`language` is a `MaskedDiffusionLM` like any other; this module brings pictures to it."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.language = MaskedDiffusionLM(config.language)
        channels = (3, config.tower // 4, config.tower // 2, config.tower, config.tower)
        layers: list[Any] = []
        for number, (before, after) in enumerate(itertools.pairwise(channels)):
            layers += [nn.Conv2d(before, after, 3, stride=2 if number < 3 else 1, padding=1), nn.GELU()]
            # As drawn by default each convolution halves what it shows, until a token is the same whatever it sees.
            nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
            nn.init.zeros_(layers[-2].bias)
        self.tower, width = nn.Sequential(*layers), config.width
        self.projector = nn.Sequential(
            nn.LayerNorm(config.tower), nn.Linear(config.tower, width), nn.GELU(), nn.Linear(width, width)
        )
        rows, columns = (max(sizes) // PATCH for sizes in zip(config.photo, config.frame, strict=True))
        self.rows, self.columns = nn.Embedding(rows, width), nn.Embedding(columns, width)
        self.tens, self.ones = nn.Embedding(-(-config.frames // 10), width), nn.Embedding(10, width)
        for table in (self.rows, self.columns, self.tens, self.ones):  # where a patch lies must not drown what it shows
            nn.init.normal_(table.weight, std=PLACE)
        nn.init.normal_(self.language.transformer.wte.weight, std=WORD)

    def look(self, pixels: Tensor) -> Tensor:
        """What the tower finds in every patch of pixels [B, F, 3, rows, columns]: [B, F, h, w, tower]."""
        seen = self.tower(rearrange((pixels - MIDDLE) / SIZE, "B F c y x -> (B F) c y x"))
        return cast(Tensor, rearrange(seen, "(B F) c h w -> B F h w c", B=len(pixels)))

    def tell(self, found: Tensor, windows: Sequence[Window] | None = None) -> Tensor:
        """Visual tokens [B, K, width], frame by frame, row by row, of what `look` found.

        Args:
            windows: of each, the part of a photo or clip that was looked at, all of one size; None = from the beginning
                of each on.
        """
        (frames, rows, columns), device = found.shape[1:4], found.device
        first = torch.zeros(len(found), 3, dtype=torch.long, device="cpu")
        if windows is not None:
            per_cell = rows // windows[0].size[0], columns // windows[0].size[1]
            first = torch.tensor(
                [(one.frame, one.cell[0] * per_cell[0], one.cell[1] * per_cell[1]) for one in windows], device="cpu"
            )
        frame, row, column = (
            begins[:, None] + torch.arange(count, device=device)
            for begins, count in zip(first.to(device).unbind(1), (frames, rows, columns), strict=True)
        )
        moment = rearrange(self.tens(frame // 10) + self.ones(frame % 10), "B F d -> B F 1 1 d")
        down, across = (
            rearrange(self.rows(row), "B h d -> B 1 h 1 d"),
            rearrange(self.columns(column), "B w d -> B 1 1 w d"),
        )
        return cast(Tensor, rearrange(self.projector(found) + moment + down + across, "B F h w d -> B (F h w) d"))

    def see(self, pixels: Tensor) -> Tensor:
        """Visual tokens [B, K, width] of whole photos or clips."""
        return self.tell(self.look(pixels))

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Logits [B, n, V] of words [B, n] behind what is seen."""
        return self.read(self.see(pixels), ids)

    def read(self, visual: Tensor, ids: Tensor) -> Tensor:
        """The same of visual tokens [B, K, width]."""
        seen = Seen(self.language, visual)
        return seen(torch.cat((seen.ids, ids), dim=1), logits_from=seen.ids.shape[1])

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Config and weights in 8 bits; `weights` in place of the model's own, such as their moving average."""
        write_model(folder, self.config, weights or self.state_dict())

    @classmethod
    def load(cls, folder: Path) -> "VisionModel":
        """The model of a folder, in fp32 and in evaluation mode; for errors see `read_model`."""
        return read_model(folder, "a model that sees", lambda values: cls(VisionConfig(**values)))


class Seen:
    """What the sampler calls: the language model with visual tokens [B, K, width] in front.

    Attributes:
        ids: [B, K] int64: -1 - k stands for visual token k, as in `baatt.llada_v.prompt`.
    """

    def __init__(self, language: MaskedDiffusionLM, visual: Tensor) -> None:
        self.language, self.config, self.visual = language, language.config, visual
        self.ids = -1 - torch.arange(visual.shape[1], device=visual.device).expand(len(visual), -1)

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Logits; arguments as `MaskedDiffusionLM.forward`."""
        return cast(Tensor, self.language(tokens, attention_mask, embedding=self.embed, **options))

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [B, N] -> [B, N, width]."""
        words = self.language.transformer.wte(ids.clamp(min=0))
        places = (-1 - ids).clamp(min=0)[..., None].expand(-1, -1, words.shape[-1])
        return torch.where((ids < 0)[..., None], self.visual.gather(1, places), words)
