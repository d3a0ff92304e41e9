"""Folders of the LLaDA layout on disk: config.json, safetensors (one file or shards) and tokenizer.json.

In: a local folder. Out: a `MaskedDiffusionLM` whose parameters are the tensors read, without a second copy in memory,
or a `tokenizers.Tokenizer`; and the way back. Knows nothing of any hub: what is not in the folder is an error.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from baatt.models.config import ModelConfig
from baatt.models.llada import MaskedDiffusionLM

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SHARD_PATTERN = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
EMBEDDING, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
NAMES_IN_ERROR = 5


def from_pretrained(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> MaskedDiffusionLM:
    """Load a model from a local folder, in evaluation mode.

    Args:
        path: folder with config.json and model.safetensors, or shards with or without an index.
        dtype: dtype of the parameters; None keeps the stored one.
        device: where the parameters live.

    Raises:
        FileNotFoundError: the folder, its config.json, the weights or a shard is missing.
        ValueError, TypeError: config.json asks for something not implemented, or a file or tensor is broken, missing,
            unexpected or of the wrong shape.
    """
    folder = _folder(path)
    config = ModelConfig.from_dict(_read_json(folder / "config.json"))
    with torch.device("meta"):
        model = MaskedDiffusionLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = {HEAD: expected[EMBEDDING]} if config.weight_tying else {}
    tensors: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for file in _weight_files(folder):
        unexpected += _read_weights(file, expected | optional, tensors, dtype, torch.device(device))
    missing = [name for name in expected if name not in tensors]
    if missing or unexpected:
        raise ValueError(f"{folder}: tensors do not fit config.json: {_list(missing=missing, unexpected=unexpected)}")
    if config.weight_tying and HEAD in tensors and not torch.equal(tensors.pop(HEAD), tensors[EMBEDDING]):
        raise ValueError(f"{folder}: {HEAD} must equal {EMBEDDING} when weight_tying is true, got another tensor")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def save_pretrained(
    model: MaskedDiffusionLM,
    path: str | Path,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    max_shard_bytes: int = 16 * 2**20,
) -> None:
    """Write config.json, shards `model-00001-of-0000N.safetensors` and their index; weights already there are replaced.

    Args:
        path: folder, made if missing.
        dtype: dtype to store; None keeps the parameters' own.
        max_shard_bytes: size of a shard's tensors in bytes; a larger tensor gets a shard of its own.

    Raises:
        ValueError: `max_shard_bytes` is not positive.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict()
    sizes = {name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in tensors.items()}
    shards = _pack(sizes, max_shard_bytes)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        shard = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in names}
        # Through another name: the model may still read its parameters from the file that is replaced.
        temporary = folder / f"{file}.partial"
        save_file(shard, temporary, metadata={"format": "pt"})
        temporary.replace(folder / file)
    for stale in _stored_weights(folder):
        if stale.name not in files:
            stale.unlink()
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    _write_json(folder / INDEX_NAME, index)
    stored = str(dtype or next(iter(tensors.values())).dtype).removeprefix("torch.")
    _write_json(folder / "config.json", {**model.config.to_dict(), "torch_dtype": stored})


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read tokenizer.json of a local folder.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: the file is not a tokenizer.
    """
    file = _folder(path) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no tokenizer.json in the folder")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: not a tokenizer.json: {error}") from error


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        hint = "a model named on a hub must be downloaded to a local folder first"
        raise FileNotFoundError(f"{path}: no such folder ({hint})")
    return folder


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no {file.name} in the folder")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: must hold JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold a JSON object, got {type(values).__name__}")
    return values


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _stored_weights(folder: Path) -> list[Path]:
    return sorted(x for x in folder.iterdir() if x.name == SINGLE_NAME or SHARD_PATTERN.fullmatch(x.name))


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: those of the index, else the single file, else a complete set of shards."""
    if (folder / INDEX_NAME).is_file():
        weight_map = _read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX_NAME}: must have a weight_map from tensor to file, got {weight_map!r}")
        names = sorted(set(weight_map.values()))
    elif (folder / SINGLE_NAME).is_file():
        names = [SINGLE_NAME]
    else:
        stored = _stored_weights(folder)
        if not stored:
            raise FileNotFoundError(f"{folder}: no weights: needs {SINGLE_NAME} or shards with {INDEX_NAME}")
        total = stored[0].stem.rpartition("-")[2]
        names = [f"model-{number:0{len(total)}d}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {_list(missing=missing)}")
    return [folder / name for name in names]


def _read_weights(
    file: Path,
    shapes: dict[str, tuple[int, ...]],
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    device: torch.device,
) -> list[str]:
    """Add the tensors of one file to `tensors` and return the names that have no place in the model."""
    unexpected = []
    try:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                if name not in shapes:
                    unexpected.append(name)
                    continue
                shape = tuple(stored.get_slice(name).get_shape())
                if shape != shapes[name]:
                    raise ValueError(f"{file}: {name} must have shape {list(shapes[name])}, got {list(shape)}")
                tensors[name] = stored.get_tensor(name).to(dtype=dtype)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error
    return unexpected


def _pack(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Split names, in order, into runs whose sizes sum to at most `limit`, or that hold one name."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _list(**groups: list[str]) -> str:
    """Name the groups that are not empty with at most five of their members each."""
    parts = []
    for title, names in groups.items():
        more = f" and {len(names) - NAMES_IN_ERROR} more" if len(names) > NAMES_IN_ERROR else ""
        parts += [f"{title} {', '.join(sorted(names)[:NAMES_IN_ERROR])}{more}"] if names else []
    return "; ".join(parts)
