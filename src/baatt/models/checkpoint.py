"""Folders of weights on disk: config.json, safetensors (one file or shards with their index) and tokenizer.json.

In: a local folder and the tensors that it must hold. Out: those tensors, mapped from the files where their dtype stays,
the contents of config.json, or a `tokenizers.Tokenizer`; and the way back. Knows no model and nothing of any hub: what
is not in the folder is an error.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from baatt.models.eight_bits import SCALE, from_eight_bits, to_eight_bits

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
#: What weights may be stored in.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Ends of files of weights that reading would execute.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: Names in an index: no separator of any system, no drive, no hidden file.
PLAIN_NAME = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
SHARD_PATTERN = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")


def read_config(path: str | Path) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: the file is not a JSON object.
    """
    return read_json(_folder(path) / "config.json")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds; errors as `read_config`."""
    try:
        values = json.loads(_present(file).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: must hold JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold a JSON object, got {type(values).__name__}")
    return values


def check_described(path: str | Path, *, layers: int, parameters: int = 0) -> None:
    """Refuse a config of more layers than there are tensors, or more parameters than bytes, before a model is made.

    Raises:
        FileNotFoundError, ValueError: as `read_tensors`, or such a config.
    """
    files = _weight_files(_folder(path))
    size, tensors = sum(file.stat().st_size for file in files), 0
    for file in files:
        with _opened(file) as stored:
            tensors += len(stored.keys())
    if layers > tensors or parameters > size:
        held = f"its {tensors} tensors in {size:,} bytes"
        described = f"{layers:.4g} layers with {parameters:.4g} parameters"
        raise ValueError(f"{path}: config.json must describe {held}, got {described}")


def read_tensors(
    path: str | Path,
    expected: Mapping[str, Tensor],
    *,
    optional: Mapping[str, Tensor] | None = None,
    ignored: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """The tensors of a folder by their names there.

    Args:
        path: folder with model.safetensors, or shards with or without an index.
        expected: names that must be there, with tensors of the shapes they must have (on any device, "meta" too).
        optional: names that may be there, likewise.
        ignored: regular expression of further names that may be there and are not read; None = none.
        dtype: of the result; None keeps the stored one, of which there must be only one; float32 of 8 bits.
        device: of the result.

    Raises:
        FileNotFoundError: the folder, the weights or a shard is missing.
        ValueError: a file or tensor is broken, missing, unexpected, of the wrong shape or of a dtype that is not one of
            `DTYPES`, or tensors differ in dtype where it is None.
    """
    folder = _folder(path)
    known = {name: list(tensor.shape) for name, tensor in {**expected, **(optional or {})}.items()}
    found: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    unexpected = []
    for file in _weight_files(folder):
        with _opened(file, str(device)) as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                if name not in known and name.removesuffix(SCALE) in known:
                    scales[name] = stored.get_tensor(name)
                    continue
                if name not in known:
                    if ignored is None or not re.fullmatch(ignored, name):
                        unexpected.append(name)
                    continue
                shape = list(stored.get_slice(name).get_shape())
                if shape != known[name]:
                    raise ValueError(f"{file}: {name} must have shape {known[name]}, got {shape}")
                tensor = stored.get_tensor(name)
                if tensor.dtype not in (*DTYPES, torch.int8):  # quantised in a way that nothing here knows
                    raise ValueError(f"{file}: {name} must have a dtype of {list(DTYPES)} or int8, got {tensor.dtype}")
                found[name] = tensor if tensor.dtype == torch.int8 else tensor.to(dtype=dtype)
    in_eight_bits = [name for name, tensor in found.items() if tensor.dtype == torch.int8]
    unexpected += [name for name in scales if name.removesuffix(SCALE) not in in_eight_bits]
    for name in in_eight_bits:
        pair = {name: found[name]} | {one: scale for one, scale in scales.items() if one == name + SCALE}
        found[name] = from_eight_bits(pair, folder)[name].to(dtype=dtype)
    missing = [name for name in expected if name not in found]
    if missing or unexpected:
        groups = {"missing": missing, "unexpected": unexpected}
        listed = "; ".join(f"{title} {list_names(names)}" for title, names in groups.items() if names)
        raise ValueError(f"{folder}: tensors do not fit config.json: {listed}")
    names_by_dtype = {tensor.dtype: name for name, tensor in found.items()}
    if len(names_by_dtype) > 1:
        kinds = ", ".join(f"{kind} ({name})" for kind, name in names_by_dtype.items())
        raise ValueError(f"{folder}: dtype must be given for tensors that are stored in several dtypes, got {kinds}")
    return found


def write_checkpoint(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> None:
    """Write config.json, shards `model-00001-of-0000N.safetensors` and their index; weights already there are replaced.

    Args:
        path: folder, made if missing.
        config: contents of config.json, to which `torch_dtype` is added.
        dtype: dtype to store; None keeps the tensors' own; int8: matrices in 8 bits with a scale for each row.
        max_shard_bytes: size of a shard's tensors in bytes; a larger tensor gets a shard of its own.

    Raises:
        ValueError: `max_shard_bytes` is not positive, or a dtype that would lose the weights.
    """
    if dtype not in (None, *DTYPES, torch.int8):
        raise ValueError(f"dtype must be one of {list(DTYPES)}, torch.int8 or None, got {dtype}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if dtype == torch.int8:
        tensors, dtype = to_eight_bits(tensors), None
    sizes = {name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in tensors.items()}
    shards: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in names}
        # Through another name: a model may still read its parameters from the file that is replaced.
        temporary = folder / f"{file.name}.partial"
        save_file(shard, temporary, metadata={"format": "pt"})
        temporary.replace(file)
        weight_map |= dict.fromkeys(names, file.name)
    for stale in _stored_weights(folder):
        if stale.name not in weight_map.values():
            stale.unlink()
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    stored = str(dtype or next(iter(tensors.values())).dtype).removeprefix("torch.")
    for name, values in {INDEX_NAME: index, "config.json": {**config, "torch_dtype": stored}}.items():
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read tokenizer.json of a local folder; it encodes texts as they are, as `without_limits`.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: the file is not a tokenizer.
    """
    file = _present(_folder(path) / "tokenizer.json")
    try:
        return without_limits(Tokenizer.from_file(str(file)))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: not a tokenizer.json: {error}") from error


def without_limits(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer without truncation and padding: those stored in a file must not change a prompt unseen."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def list_names(names: Sequence[str]) -> str:
    """At most five of them, and how many more there are."""
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _folder(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a folder's name, got {type(path).__name__}")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        hint = "a model named on a hub must be downloaded to a local folder first"
        raise FileNotFoundError(f"{path}: no such folder ({hint})")
    return folder


def _present(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no {file.name} in the folder")
    return file


@contextmanager
def _opened(file: Path, device: str = "cpu") -> Iterator[Any]:
    """A safetensors file; a ValueError where it, or what is read inside, is none."""
    try:
        with safe_open(file, framework="pt", device=device) as stored:
            yield stored
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error


def check_index(file: Path) -> list[str]:
    """The files that an index names; all must be of its own folder and safetensors: others are not even looked for.

    Raises:
        FileNotFoundError, ValueError: as `read_json`, or an index without such files.
    """
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise ValueError(f"{file}: must have a weight_map from tensor to file, got {f'{weight_map!r:.200}'}")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not PLAIN_NAME.fullmatch(name):
            raise ValueError(f"{file}: must name .safetensors files of its own folder, got {name!r:.200}")
    return names


def _stored_weights(folder: Path) -> list[Path]:
    return sorted(x for x in folder.iterdir() if x.name == SINGLE_NAME or SHARD_PATTERN.fullmatch(x.name))


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: those of the index, else the single file, else a complete set of shards."""
    if (folder / INDEX_NAME).is_file():
        names = check_index(folder / INDEX_NAME)
    elif (folder / SINGLE_NAME).is_file():
        names = [SINGLE_NAME]
    else:
        stored = _stored_weights(folder)
        if not stored:
            pickled = list_names([x.name for x in folder.iterdir() if x.suffix in PICKLES])
            hint = f"; pickled ones may run any code and are not read: {pickled}" if pickled else ""
            raise FileNotFoundError(f"{folder}: no weights: needs {SINGLE_NAME} or shards with {INDEX_NAME}{hint}")
        total = stored[0].stem.rpartition("-")[2]
        names = [f"model-{number:0{len(total)}d}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: missing {list_names(missing)}")
    return [folder / name for name in names]
