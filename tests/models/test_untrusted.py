"""Files of strangers: nothing outside their folder is read, nothing of them runs, nothing absurd is allocated."""

import json
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from baatt.lab.capture import FORMAT, load_capture
from baatt.lab.loading import load_transformers
from baatt.models import MaskedDiffusionLM, load_tokenizer
from tests.models.test_checkpoint import CONFIG, assert_one_line, llada_tensors, write_folder

load = MaskedDiffusionLM.from_pretrained
INDEX = "model.safetensors.index.json"
MARK = "model-00001-of-00003.safetensors"


class Trap:
    """A pickle that makes a file when it is read."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.sign,)


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "../../etc/passwd", "{root}/outside.safetensors", "sub/../../outside.safetensors"),
        *("sub/inside.safetensors", "..\\outside.safetensors", "C:\\outside.safetensors", "~/outside.safetensors"),
        *("file:///outside.safetensors", "..", ".", "", "/", ".hidden.safetensors", "\0.safetensors"),
        *("pytorch_model.bin", "model.safetensors.bin", "model.safetensors\n", "config.json"),
    ],
)
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, name: str) -> None:
    """Others are refused as such, whether they are there or not."""
    folder = write_folder(tmp_path / "m")
    for file in (tmp_path / "outside.safetensors", folder / "sub" / "inside.safetensors"):
        file.parent.mkdir(exist_ok=True)
        save_file(llada_tensors(), file)
    named = name.replace("{root}", str(tmp_path))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {key: named if file == MARK else file for key, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must name \.safetensors files of its own folder, got ") as error:
        load(folder)
    assert_one_line(error, tmp_path)
    assert repr(named) in str(error.value)
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"must name \.safetensors files of its own folder"):
        load_transformers(folder, dtype=torch.float32, device=torch.device("cpu"))


def test_links_as_a_hub_s_cache_has_them_are_followed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        file.rename(blob := tmp_path / "blobs" / str(number))
        file.symlink_to(blob)
    assert len(load(folder).state_dict()) == len(llada_tensors())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "weights.pkl"])
def test_pickles_are_named_and_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "sign")))
    with pytest.raises(FileNotFoundError, match=rf"no weights: .* are not read: {re.escape(name)}$") as error:
        load(tmp_path)
    assert_one_line(error, tmp_path)
    (tmp_path / name).rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(tmp_path)
    assert not (tmp_path / "sign").exists()


def test_transformers_reads_no_pickles(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1
    )
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sign")))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_transformers(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    assert not (tmp_path / "sign").exists()


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"])
def test_code_in_a_folder_does_not_run(tmp_path: Path, kind: str) -> None:
    folder = write_folder(tmp_path / "m", auto_map={kind: "trap.Trap"})
    (folder / "trap.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'sign')!r}).touch()\nclass Trap: 1\n"
    )
    load(folder)
    pytest.importorskip("transformers")
    with pytest.raises((ValueError, OSError, KeyError)):
        load_transformers(folder, dtype=torch.float32, device=torch.device("cpu"), head="LM" in kind)
    assert not (tmp_path / "sign").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layers": 10**9},
        {"n_layers": 10**12},
        {"n_layers": 10**400},
        {"n_layers": -1},
        {"n_layers": 10**5},
        {"d_model": 2**29, "n_heads": 1},
        {"d_model": -32},
        {"mlp_hidden_size": 2**29},
        {"mlp_hidden_size": None, "mlp_ratio": 1e308},
        {"mlp_hidden_size": None, "mlp_ratio": 10**400},
        {"vocab_size": 10**9, "embedding_size": 10**9},
        {"vocab_size": 10**18, "embedding_size": 10**18},
        {"embedding_size": 2**63},
        {"n_heads": 2**40},
        {"n_kv_heads": 0},
        {"max_sequence_length": 10**100},
        {"rope_theta": 10**400},
        {"rope_theta": None, "rope_scaling": {"rope_type": "ntk", "factor": 1e308, "rope_theta": 1e300}},
        {"rope_scaling": {"rope_type": "ntk", "factor": 10**400}},
        {"eos_token_id": -(10**30)},
    ],
    ids=str,
)
def test_absurd_sizes_are_refused_before_anything_is_made(
    tmp_path: Path, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "m", **changes)
    monkeypatch.setattr(MaskedDiffusionLM, "__init__", lambda *_: pytest.fail("a model was made"))
    with pytest.raises((TypeError, ValueError)) as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "text",
    ["", "null", "7", '"a"', "{", '{"n_layers": NaN', "[" * 100_000, '{"a": ' * 100_000, "\x00", "{}}", "1" * 5000],
    ids=lambda text: text[:9],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none(tmp_path: Path, name: str, text: str) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / name).write_bytes(text.encode())
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: must hold ") as error:
        load(folder)
    assert_one_line(error, tmp_path)


def broken(data: bytes, kind: str) -> bytes:
    """The bytes of a safetensors file, damaged."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if kind == "beyond":
        first = next(name for name in header if name != "__metadata__")
        header[first]["data_offsets"][1] += 2**40
    elif kind == "overlap":
        names = [name for name in header if name != "__metadata__"]
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    elif kind == "negative":
        first = next(name for name in header if name != "__metadata__")
        header[first]["shape"] = [-1, 32]
    text = json.dumps(header).encode()
    rebuilt = struct.pack("<Q", len(text)) + text + data[8 + length :]
    cuts = {
        "empty": b"",
        "one byte": data[:1],
        "in the length": data[:7],
        "in the header": data[:40],
        "without data": data[: 8 + length],
        "in the data": data[:-3],
        "longer": data + b"\0" * 8,
        "huge header": struct.pack("<Q", 2**62) + data[8:],
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    return cuts.get(kind, rebuilt)


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize(
    "kind",
    [
        *("empty", "one byte", "in the length", "in the header", "without data", "in the data", "longer"),
        *("huge header", "text", "beyond", "overlap", "negative"),
    ],
)
def test_broken_weights_in_one_line(tmp_path: Path, kind: str, shards: int) -> None:
    folder = write_folder(tmp_path / "m", shards=shards)
    file = folder / (MARK if shards else "model.safetensors")
    file.write_bytes(broken(file.read_bytes(), kind))
    with pytest.raises(ValueError, match=rf"{re.escape(file.name)}: not a safetensors file: ") as error:
        load(folder)
    assert_one_line(error, tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[" * 100_000, '{"version": "1.0", "model": {"type": "None"}}', "\x00"])
def test_broken_tokenizers_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(text.encode())
    with pytest.raises(ValueError, match=r"not a tokenizer\.json") as error:
        load_tokenizer(tmp_path)
    assert_one_line(error, tmp_path)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({}, {}),
        *(({name: torch.ones(1)}, {}) for name in ("a", "layers", "layers.x.q", "layers.-1.q", "layers.0.w")),
        *((None, {"scale": scale}) for scale in ("x", "nan", "-1", "inf", "0")),
        *((None, {"about": about}) for about in ("{", "[1]", "7", "[" * 100_000)),
    ],
)
def test_captures_of_strangers(
    tmp_path: Path, tensors: dict[str, torch.Tensor] | None, metadata: dict[str, str]
) -> None:
    path = tmp_path / "capture.safetensors"
    full = {f"layers.0.{name}": torch.ones(1, 2, 3, 16) for name in "qkv"}
    save_file(full if tensors is None else tensors, path, {"format": FORMAT} | metadata)
    with pytest.raises(ValueError, match=r"must (have|hold)") as error:
        load_capture(path)
    assert_one_line(error, tmp_path)
