"""A low-rank change of a `MaskedDiffusionLM`: trained, cut out of a full fine-tuning, stored in 8 bits, merged.

In: a base model and tensors `NAME.down` [rank, in] and `NAME.up` [out, rank] of every linear layer, the norms, and the
mask's embedding. Out: a model of the base's own class with the change added to its weights. The base's other embeddings
and the head stay as they are. The file names the base by its SHA-256 and fits no other one.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from baatt.models.eight_bits import from_eight_bits, to_eight_bits
from baatt.models.llada import EMBEDDING, MaskedDiffusionLM

#: Name of the mask's embedding among the tensors of a change.
MASK_ROW = "model.transformer.wte.row"
FORMAT = "baatt-adapter-1"


class LowRankLinear(nn.Module):
    """x W^T + x down^T up^T with W frozen; begins as W alone."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.down = nn.Parameter(torch.randn(rank, columns, device=weight.device) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.down), self.up)


class EmbeddingWithMask(nn.Module):
    """The base's embedding, frozen, with an embedding of the mask that is learned, in fp32."""

    def __init__(self, weight: Tensor, mask_token: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.row = nn.Parameter(weight[mask_token].float().clone())
        self.mask_token = mask_token

    def forward(self, ids: Tensor) -> Tensor:
        return torch.where((ids == self.mask_token)[..., None], self.row, F.embedding(ids, self.weight))


def make_trainable(model: MaskedDiffusionLM, rank: int, frozen: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Change a model in place so that it learns what an adapter holds; returns its trainable parameters by name.

    Args:
        model: in fp32.
        rank: of the change of every linear layer; 0 trains their weights themselves.
        frozen: dtype of what is not trained.

    Raises:
        ValueError: a model with biases, norms of queries or an untied head, which an adapter does not hold.
    """
    config, transformer = model.config, model.transformer
    if not config.weight_tying or config.include_bias or config.include_qkv_bias or config.attention_layer_norm:
        raise ValueError("model must have tied embeddings, no biases and no norms of queries and keys for an adapter")
    embedding = EmbeddingWithMask(transformer.wte.weight.detach().to(frozen), config.mask_token_id)
    transformer.wte = embedding  # type: ignore[assignment]
    for block in transformer.blocks if rank else []:
        for name, module in list(block.named_children()):
            if isinstance(module, nn.Linear):
                setattr(block, name, LowRankLinear(module.weight.detach().to(frozen), rank))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def changes(base: MaskedDiffusionLM, trained: Mapping[str, Tensor], rank: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an adapter from those of `make_trainable`: whole weights become the best change of that rank."""
    weights = base.state_dict()
    for name, tensor in trained.items():
        if tensor.dim() != 2 or not name.endswith(".weight"):
            yield name, tensor.detach()
            continue
        difference = tensor.detach().float() - weights[name].to(tensor.device).float()
        left, sizes, right = torch.linalg.svd(difference, full_matrices=False)
        root = sizes[:rank].sqrt()
        yield f"{name.removesuffix('.weight')}.down", root[:, None] * right[:rank]
        yield f"{name.removesuffix('.weight')}.up", left[:, :rank] * root


@torch.no_grad()
def merge(base: MaskedDiffusionLM, tensors: Mapping[str, Tensor]) -> MaskedDiffusionLM:
    """Add an adapter to a base model, in place.

    Raises:
        ValueError: a tensor that is missing, unexpected or of the wrong shape.
    """
    weights = base.state_dict()
    linear = [name.removesuffix(".weight") for name, w in weights.items() if w.dim() == 2 and name != EMBEDDING]
    norms = [name for name, w in weights.items() if w.dim() == 1]
    expected = {f"{name}.{part}" for name in linear for part in ("down", "up")} | {*norms, MASK_ROW}
    if wrong := sorted(expected ^ tensors.keys()):
        raise ValueError(f"adapter must hold the tensors of its base, got {len(wrong)} others or too few: {wrong[:3]}")
    for name in linear:
        target, down, up = weights[f"{name}.weight"], tensors[f"{name}.down"], tensors[f"{name}.up"]
        if (up.shape[0], down.shape[1]) != target.shape or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"adapter must fit {name} {tuple(target.shape)}, got {tuple(up.shape)}, {tuple(down.shape)}"
            )
        product = up.to(target.device).float() @ down.to(target.device).float()
        target.copy_(target.float() + product)
    for name, target in [(name, weights[name]) for name in norms] + [
        (MASK_ROW, weights[EMBEDDING][base.config.mask_token_id])
    ]:
        if tensors[name].shape != target.shape:
            raise ValueError(
                f"adapter must have {name} of shape {tuple(target.shape)}, got {tuple(tensors[name].shape)}"
            )
        target.copy_(tensors[name])
    return base


def write_adapter(file: str | Path, tensors: Mapping[str, Tensor], base_sha256: str) -> None:
    """Store an adapter: factors in 8 bits with a scale for each row, all else in fp32."""
    save_file(to_eight_bits(tensors), file, metadata={"format": FORMAT, "base_sha256": base_sha256})


def read_adapter(file: str | Path, base_sha256: str) -> dict[str, Tensor]:
    """The tensors of a stored adapter, in fp32.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an adapter's file, or one of another base.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such adapter")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{file}: format must be {FORMAT!r}, got {metadata.get('format')!r}")
    if metadata.get("base_sha256") != base_sha256:
        raise ValueError(f"{file}: base_sha256 must be that of the base {base_sha256}, got {metadata['base_sha256']}")
    return from_eight_bits(stored, file)
