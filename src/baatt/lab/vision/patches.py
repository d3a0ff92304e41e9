"""Which patches of a photo or clip an answer's word reads, drawn over the pixels: the paper's Fig. 5 where it is seen.

In: q and k of a layer of a `VisionModel` on a sample, and plans. Out: the tokens that are read, and a picture: dense
attention over the pixels, then the pixels with all that a plan skips dimmed. Draws one head and one token.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange, repeat
from torch import Tensor

from baatt.integrations.enable import enable
from baatt.lab.capture import Capture, Heads, Recorder
from baatt.lab.describe import selection_name
from baatt.lab.maps import SHADE, kept_table
from baatt.lab.plots import picture
from baatt.lab.vision.model import PATCH, Seen, VisionModel
from baatt.lab.vision.scenes import ANSWER_WORDS
from baatt.plan import Plan

#: A head is chosen by how much of its attention its largest patches hold: so many.
SHARPEST = 16
#: Attention over uniform attention at which a patch is drawn brightest.
BRIGHTEST = 30.0


def capture_answer(model: VisionModel, pixels: Tensor, words: Sequence[str], layers: Sequence[int]) -> Capture:
    """q, k and v of some layers while a model is asked: pixels, question, and an answer that is all masked.

    Args:
        pixels: [F, 3, rows, columns] in [0, 1], on the model's device and in its dtype.
    """
    recorder = Recorder(layers)
    asked = [*model.config.encode(words), *[model.config.language.mask_token_id] * ANSWER_WORDS]
    with torch.inference_mode(), enable(model.language, None) as handle:
        handle.watch(recorder.keep)
        seen = Seen(model.language, model.see(pixels[None]))
        seen(torch.cat((seen.ids, torch.tensor([asked], device=pixels.device)), dim=1))
    scale = recorder.scale
    if scale is None:
        raise ValueError(f"layers must be from 0 to {model.config.layers - 1}, got {list(layers)}")
    tokens = next(iter(recorder.found.values())).q.shape[2]
    return Capture(recorder.found, scale, {"text": " ".join(words), "tokens": str(tokens)})


def attention_of(heads: Heads, scale: float, token: int) -> Tensor:
    """Dense attention of one token, [H, M] fp32."""
    q, k = heads.q[0, :, token].float(), heads.k[0].float()
    q = rearrange(q, "(G h) D -> G h D", G=len(k))
    return rearrange(torch.softmax(scale * q @ k.transpose(1, 2), dim=-1), "G h M -> (G h) M")


def sharpest_head(attention: Tensor, patches: int) -> int:
    """Of attention [H, M] the head that looks at few of the patches, which come first, most."""
    return int(attention[:, :patches].topk(min(SHARPEST, patches)).values.sum(dim=-1).argmax())


def tokens_read(plan: Plan, head: int, token: int) -> Tensor:
    """Which keys the block of a query reads, [M] bool in the original order, on the CPU, for batch entry 0."""
    order = plan.query_order.index[0, head].cpu()
    block = int((order == token).nonzero()[0]) // plan.config.block_size
    blocks = kept_table(plan, head)[block]
    keys = plan.key_order.index[0, head * plan.key_order.index.shape[1] // plan.query_order.index.shape[1]].cpu()
    kept = repeat(blocks, "J -> (J P)", P=plan.config.block_size)[: len(keys)]
    read = torch.zeros(len(keys), dtype=torch.bool, device="cpu")
    read[keys[: len(kept)]] = kept
    return read


def draw_patches(
    pixels: Tensor, heads: Heads, scale: float, plans: Sequence[Plan], head: int, token: int, caption: str, path: Path
) -> None:
    """Write the picture.

    Args:
        pixels: [F, 3, rows, columns] in [0, 1], whose tokens come first.

    Raises:
        ImportError: matplotlib is missing (`pip install baatt[plots]`).
    """
    frames, _, rows, columns = pixels.shape
    grid = frames, rows // PATCH, columns // PATCH
    patches = grid[0] * grid[1] * grid[2]
    attention = attention_of(heads, scale, token)[head].cpu()
    wide = next(count for count in range(max(1, round(frames**0.5)), frames + 1) if frames % count == 0)

    def laid_out(values: Tensor) -> Tensor:
        """Frames beside and below each other: [F, y, x, ...] -> [rows, columns, ...]."""
        return rearrange(values, "(a b) y x ... -> (a y) (b x) ...", b=wide)

    shown = laid_out(rearrange(pixels.float().cpu(), "F c y x -> F y x c"))
    enlarge = {"a": PATCH, "b": PATCH}
    heat = repeat(attention[:patches].view(grid) * len(attention), "F y x -> F (y a) (x b)", **enlarge)
    panels = 1 + len(plans)
    size = (5.2 * panels, 5.2 * shown.shape[0] / shown.shape[1] + 1.2)
    with picture(path, caption, 1, panels, size) as axes:
        from matplotlib.colors import LogNorm

        for axis in axes[0]:
            axis.set(xticks=[], yticks=[])
        first = axes[0][0]
        first.imshow(shown.mean(dim=-1).numpy(), cmap="gray", vmin=-0.5, vmax=1.5)
        norm = LogNorm(vmin=1, vmax=BRIGHTEST, clip=True)
        bright = laid_out(heat).clamp(min=1)
        image = first.imshow(bright.numpy(), norm=norm, cmap="magma", alpha=(0.85 * (bright > 1)).float().numpy())
        on_patches = float(attention[:patches].sum())
        first.set_title(f"dense attention, {100 * on_patches:.0f} % of it on the pixels")
        first.figure.colorbar(image, ax=first, shrink=0.75, label="attention / uniform attention")
        for axis, plan in zip(axes[0][1:], plans, strict=True):
            read = tokens_read(plan, head, token)
            there = laid_out(repeat(read[:patches].view(grid), "F y x -> F (y a) (x b)", **enlarge))
            dimmed = torch.where(there[..., None], shown, SHADE + (1 - SHADE) * shown)
            axis.imshow(dimmed.clamp(0, 1).numpy())
            held = float(attention[read].sum() / attention.sum())
            axis.set_title(
                f"{selection_name(vars(plan.config), ())}\nreads {int(read[:patches].sum())} of {patches} patches, "
                f"{100 * held:.1f} % of the attention"
            )
