"""A small video model: diffusers' own `WanTransformer3DModel` over pixels, told by a number which clip to make.

In: noise [B, 3, frames, rows, columns] and clip numbers. Out: a video of the same shape, in [0, 1]. The flow is Wan's
(straight lines from data to noise, shifted steps), the latents are the pixels themselves, unshuffled into patches by
the transformer's own patch embedding. A patch has more numbers than the model is wide, so the network predicts the
clean video, not the velocity, which follows from it. In place of text there is a learned embedding of each clip.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from baatt.models.small_folder import read_model, write_model

#: Pixels in [0, 1] become latents of about unit size.
MIDDLE, SIZE = 0.5, 0.25
#: Below this share of noise a velocity is not divided by less, nor a loss weighted more.
LEAST_NOISE = 0.05


@dataclass(frozen=True)
class VideoConfig:
    """What a model is: its transformer, the size of its videos, and the names of its clips.

    patch: frames, rows and columns of a token; shift: of the steps, as in Wan: larger means more steps in the noise.
    """

    clips: tuple[str, ...]
    frames: int = 48
    rows: int = 128
    columns: int = 192
    patch: tuple[int, int, int] = (2, 8, 8)
    heads: int = 4
    head_size: int = 64
    layers: int = 6
    hidden: int = 640
    shift: float = 5.0

    def __post_init__(self) -> None:
        if not self.clips:
            raise ValueError("clips must name at least one clip, got none")
        for name, size, patch in zip(("frames", "rows", "columns"), self.size, self.patch, strict=True):
            if size < patch or size % patch:
                raise ValueError(f"{name} must be a multiple of the patch's {patch}, got {size}")

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        return self.frames, self.rows, self.columns

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along each axis."""
        return self.frames // self.patch[0], self.rows // self.patch[1], self.columns // self.patch[2]


class VideoModel(nn.Module):
    """The transformer and the embeddings of its clips.

    Raises:
        ImportError: diffusers is not installed.
    """

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        try:
            from diffusers import WanTransformer3DModel as Transformer
        except ImportError as error:
            raise ImportError("the video model needs diffusers: pip install 'baatt[video]'") from error
        self.config, width = config, config.heads * config.head_size
        make: Any = Transformer
        self.transformer = make(
            patch_size=config.patch, num_attention_heads=config.heads, attention_head_dim=config.head_size,
            in_channels=3, out_channels=3, text_dim=width, freq_dim=256, ffn_dim=config.hidden,
            num_layers=config.layers, rope_max_seq_len=256,
        )  # fmt: skip
        self.clips = nn.Embedding(len(config.clips), width)

    def forward(self, latents: Tensor, noise: Tensor, clips: Tensor) -> Tensor:
        """The clean latents [B, 3, frames, rows, columns] that noisy ones come from.

        Args:
            noise: share of noise of each, [B], in [0, 1]. clips: their numbers, [B].
        """
        told = self.clips(clips)[:, None].to(latents.dtype)
        found: Tensor = self.transformer(latents, 1000 * noise, told, return_dict=False)[0]
        return found

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Config and weights in 8 bits; `weights` in place of the model's own, such as their moving average."""
        write_model(folder, self.config, weights or self.state_dict())

    @classmethod
    def load(cls, folder: Path) -> "VideoModel":
        """The model of a folder, in fp32 and in evaluation mode; for errors see `read_model`."""
        return read_model(folder, "a video model", lambda values: cls(VideoConfig(**values)))


def to_latents(video: Tensor) -> Tensor:
    """Latents of a video in [0, 1]."""
    return (video - MIDDLE) / SIZE


def to_video(latents: Tensor) -> Tensor:
    """A video in [0, 1] of latents."""
    return (latents * SIZE + MIDDLE).clamp(0, 1)


def shifted(share: Tensor, shift: float) -> Tensor:
    """Shares of noise in [0, 1], moved towards noise as Wan's are."""
    return shift * share / (1 + (shift - 1) * share)


def draw_noise(config: VideoConfig, seed: int, device: torch.device) -> Tensor:
    """Noise [1, 3, frames, rows, columns] of a seed, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, 3, *config.size, generator=generator, device="cpu").to(device)


@torch.inference_mode()
def sample(
    model: VideoModel, noise: Tensor, clip: int, steps: int, at_step: Callable[[int, int], None] = lambda *_: None
) -> Tensor:
    """A video [3, frames, rows, columns] in [0, 1] from noise [1, ...], by Euler steps along the flow.

    Args:
        clip: its number. at_step: told the step and how many there are before each evaluation.
    """
    latents, weight = noise.float(), model.clips.weight
    clips = torch.tensor([clip], device=noise.device)
    shares = shifted(torch.linspace(1, 0, steps + 1, device=noise.device), model.config.shift)
    for number in range(steps):
        at_step(number, steps)
        here = shares[number]
        clean = model(latents.to(weight.dtype), here[None], clips).float()
        latents = latents + (shares[number + 1] - here) * (latents - clean) / here
    return to_video(latents)[0]
