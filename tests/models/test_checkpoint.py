"""Folders of the real LLaDA layout: written here, read back equal, and every way a folder can be wrong."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from baatt.models import MaskedDiffusionLM, ModelConfig, load_tokenizer
from baatt.models.rope import ntk_base
from tests.models.test_config import REAL
from tests.processes import run_code

CONFIG = {
    **REAL,
    **{"d_model": 32, "embedding_size": 72, "eos_token_id": 65, "mask_token_id": 66, "mlp_hidden_size": 48},
    **{"n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "pad_token_id": 65, "vocab_size": 70},
}
#: UltraLLaDA has LLaDA's keys, two shards, and its longer base in `rope_theta`; the number is an example.
ULTRA = {"rope_theta": 2.8e8, "max_sequence_length": 131072, "torch_dtype": "bfloat16"}
load = MaskedDiffusionLM.from_pretrained
IDS = torch.arange(20).reshape(2, 10)


def llada_tensors(config: dict[str, object] = CONFIG) -> dict[str, Tensor]:
    """Random bf16 tensors under LLaDA's names, written down by hand."""
    torch.manual_seed(0)
    width, hidden, rows = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    shapes = {"wte.weight": (rows, width), "ln_f.weight": (width,), "ff_out.weight": (rows, width)}
    for layer in range(config["n_layers"]):
        for part in ("q_proj", "k_proj", "v_proj", "attn_out"):
            shapes[f"blocks.{layer}.{part}.weight"] = (width, width)
        for part in ("ff_proj", "up_proj"):
            shapes[f"blocks.{layer}.{part}.weight"] = (hidden, width)
        shapes[f"blocks.{layer}.ff_out.weight"] = (width, hidden)
        for part in ("attn_norm", "ff_norm"):
            shapes[f"blocks.{layer}.{part}.weight"] = (width,)
    return {f"model.transformer.{name}": torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def write_folder(
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    *,
    shards: int = 3,
    index: bool = True,
    **changes: object,
) -> Path:
    """A folder as the hub holds it."""
    tensors = llada_tensors() if tensors is None else tensors
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    if shards == 0:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        names = sorted(tensors)[number::shards]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@torch.no_grad()
def logits_of(model: MaskedDiffusionLM) -> Tensor:
    return model(IDS)


@pytest.mark.parametrize(("shards", "index"), [(3, True), (3, False), (1, False), (0, False)])
def test_reads_the_real_layout(tmp_path: Path, shards: int, index: bool) -> None:
    tensors = llada_tensors()
    expected = MaskedDiffusionLM(ModelConfig.from_dict(CONFIG)).bfloat16()
    expected.load_state_dict(tensors)
    model = load(write_folder(tmp_path / "m", tensors, shards=shards, index=index))
    assert not model.training
    assert model.config == ModelConfig.from_dict(CONFIG)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == dict.fromkeys(tensors, torch.bfloat16)
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    for name, tensor in tensors.items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert torch.equal(logits_of(model), logits_of(expected))


def test_dtype(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    model = load(str(folder), dtype=torch.float64, device=torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert torch.equal(logits_of(model), logits_of(load(folder).double()))


def test_mixed_dtypes_need_one(tmp_path: Path) -> None:
    """Norms in float32 beside weights in bfloat16, or the other way round, in one file or several."""
    for number, part in enumerate(("norm", "wte", "q_proj", "ff_out")):
        tensors = {name: x.float() if part in name else x for name, x in llada_tensors().items()}
        folder = write_folder(tmp_path / part, tensors, shards=number)
        with pytest.raises(
            ValueError, match="dtype must be given for tensors that are stored in several dtypes"
        ) as error:
            load(folder)
        assert_one_line(error, tmp_path)
        assert "torch.float32 (model." in str(error.value)
        assert "torch.bfloat16 (model." in str(error.value)
        for dtype in (torch.float32, torch.bfloat16):
            model = load(folder, dtype=dtype)
            assert {parameter.dtype for parameter in model.parameters()} == {dtype}
            assert torch.equal(logits_of(model), logits_of(load(write_folder(tmp_path / "m"), dtype=dtype)))


@pytest.mark.parametrize("kind", [torch.uint8, torch.float8_e4m3fn, torch.int32, torch.bool])
def test_quantised_weights_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    name = "model.transformer.blocks.1.q_proj.weight"
    tensors = llada_tensors() | {name: llada_tensors()[name].to(kind)}
    for dtype in (None, torch.float32):
        with pytest.raises(ValueError, match=rf"{re.escape(name)} must have a dtype of .*, got {kind}$") as error:
            load(write_folder(tmp_path / "m", tensors), dtype=dtype)
        assert_one_line(error, tmp_path)


@pytest.mark.parametrize("changes", [{}, {"weight_tying": True, "n_kv_heads": 2}], ids=str)
def test_eight_bits(tmp_path: Path, changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = MaskedDiffusionLM(ModelConfig.from_dict({**CONFIG, **changes}))
    model.save_pretrained(tmp_path, dtype=torch.int8, max_shard_bytes=6000)
    held = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert sum(tensor.nbytes for tensor in held.values()) < 1.2 * sum(x.numel() for x in model.parameters())
    stored = load(tmp_path)
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.float32}
    for name, expected in model.state_dict().items():
        step = expected.flatten(1).abs().amax(dim=1, keepdim=True) / 127 if expected.dim() > 1 else torch.tensor(0.0)
        assert ((stored.state_dict()[name] - expected).abs() <= 0.501 * step).all()
    half = load(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits_of(half), logits_of(stored.bfloat16()))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_a_dtype_that_would_lose_the_weights_is_refused(tmp_path: Path, kind: torch.dtype) -> None:
    model = MaskedDiffusionLM(ModelConfig.from_dict(CONFIG))
    with pytest.raises(ValueError, match=rf"^dtype must be one of .*, torch.int8 or None, got {kind}$"):
        model.save_pretrained(tmp_path / "m", dtype=kind)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, "must have {}.scale with 32 numbers, got none"),
        (torch.ones(31), "must have {}.scale with 32 numbers, got torch.float32 of shape [31]"),
        (torch.ones(32, dtype=torch.int64), "must have {}.scale with 32 numbers, got torch.int64 of shape [32]"),
    ],
)
def test_eight_bits_without_their_scales_are_refused(tmp_path: Path, scale: Tensor | None, message: str) -> None:
    name = "model.transformer.blocks.1.q_proj.weight"
    tensors = llada_tensors() | {name: llada_tensors()[name].to(torch.int8)}
    if scale is not None:
        tensors |= {f"{name}.scale": scale}
    with pytest.raises(ValueError, match=re.escape(f"{name} in 8 bits {message.format(name)}")) as error:
        load(write_folder(tmp_path / "m", tensors))
    assert_one_line(error, tmp_path)


def test_a_scale_without_eight_bits_is_unexpected(tmp_path: Path) -> None:
    name = "model.transformer.blocks.1.q_proj.weight.scale"
    with pytest.raises(ValueError, match=f"unexpected {re.escape(name)}"):
        load(write_folder(tmp_path / "m", llada_tensors() | {name: torch.ones(32)}))


@pytest.mark.parametrize(
    "changes", [{}, {"weight_tying": True, "attention_layer_norm": True, "n_kv_heads": 2}], ids=str
)
def test_saved_folder_reads_back_equal(tmp_path: Path, changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = MaskedDiffusionLM(ModelConfig.from_dict({**CONFIG, **changes}))
    model.save_pretrained(tmp_path / "deep" / "m", max_shard_bytes=6000)
    stored = load(tmp_path / "deep" / "m")
    assert torch.equal(logits_of(stored), logits_of(model.bfloat16()))
    assert ("model.transformer.ff_out.weight" in stored.state_dict()) is not bool(changes)
    model.float().save_pretrained(tmp_path / "exact", dtype=None)
    exact = load(tmp_path / "exact")
    assert {parameter.dtype for parameter in exact.parameters()} == {torch.float32}
    assert torch.equal(logits_of(exact), logits_of(model))


def test_saved_layout(tmp_path: Path) -> None:
    model = MaskedDiffusionLM(ModelConfig.from_dict(CONFIG))
    model.save_pretrained(tmp_path, max_shard_bytes=6000)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == ("llada", ["LLaDAModelLM"])
    assert (values["rope"], values["alibi"], values["torch_dtype"]) == (True, False, "bfloat16")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 2 * sum(parameter.numel() for parameter in model.parameters())
    for file in files:
        tensors = load_file(tmp_path / file)
        assert sum(t.numel() * 2 for t in tensors.values()) <= 6000 or len(tensors) == 1
        assert all(index["weight_map"][name] == file for name in tensors)


def test_saving_over_a_loaded_folder(tmp_path: Path) -> None:
    """The loaded parameters may be mapped from the very files that are replaced, and fewer shards must not mix."""
    model = load(write_folder(tmp_path / "m"))
    (tmp_path / "m" / "notes.txt").write_text("kept")
    before = logits_of(model).clone()
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(load(tmp_path / "m")), before)
    names = {"config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "notes.txt"}
    assert {path.name for path in (tmp_path / "m").iterdir()} == names


def test_tied_checkpoint_may_store_its_head(tmp_path: Path) -> None:
    tensors = llada_tensors()
    tensors["model.transformer.ff_out.weight"] = tensors["model.transformer.wte.weight"].clone()
    model = load(write_folder(tmp_path / "m", tensors, weight_tying=True))
    assert "model.transformer.ff_out.weight" not in model.state_dict()
    untied = load(write_folder(tmp_path / "u", tensors))
    assert torch.equal(logits_of(model), logits_of(untied))
    with pytest.raises(ValueError, match=r"ff_out.weight must equal .*wte.weight when weight_tying is true"):
        load(write_folder(tmp_path / "x", llada_tensors(), weight_tying=True))


def test_the_real_sizes() -> None:
    """Names and sizes of LLaDA-8B: 291 tensors as in its index, 16.03 GB in bfloat16 as on the hub."""
    with torch.device("meta"):
        model = MaskedDiffusionLM(ModelConfig.from_dict(REAL))
    state = model.state_dict()
    assert len(state) == 291
    assert sum(tensor.numel() for tensor in state.values()) == 8_015_581_184
    assert len([name for name in state if ".blocks.31." in name]) == 9
    assert set(llada_tensors()) <= set(state)
    assert state["model.transformer.blocks.31.up_proj.weight"].shape == (12288, 4096)
    assert (model.config.mask_token_id, model.config.eos_token_id, model.config.rope_theta) == (126336, 126081, 5e5)


def test_ultrallada_s_layout(tmp_path: Path) -> None:
    """Its base is in `rope_theta`, without a scaling key."""
    tensors = llada_tensors()
    model = load(write_folder(tmp_path / "u", tensors, shards=2, **ULTRA))
    assert (model.config.rope_theta, model.config.max_sequence_length) == (2.8e8, 131072)
    expected = MaskedDiffusionLM(ModelConfig.from_dict({**CONFIG, **ULTRA})).bfloat16()
    expected.load_state_dict(tensors)
    assert torch.equal(logits_of(model), logits_of(expected))
    assert not torch.equal(logits_of(model), logits_of(load(write_folder(tmp_path / "m", tensors))))


def test_scaled_rope(tmp_path: Path) -> None:
    """A scaling in config.json becomes the base, and is saved as one."""
    model = load(write_folder(tmp_path / "m", rope_scaling={"rope_type": "ntk", "factor": 4.0}))
    assert model.config.rope_theta == ntk_base(500000.0, 4.0, 8)
    model.save_pretrained(tmp_path / "s")
    assert "rope_scaling" not in json.loads((tmp_path / "s" / "config.json").read_text())
    assert torch.equal(logits_of(load(tmp_path / "s")), logits_of(model))
    with pytest.raises(ValueError, match=r"rope_scaling.rope_type must be 'default' or 'ntk'"):
        load(write_folder(tmp_path / "y", rope_scaling={"rope_type": "yarn", "factor": 4.0}))


MEASURE = """
import re, sys
from pathlib import Path
import torch
from baatt.models import MaskedDiffusionLM

def megabytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

warm, folder, dtype = sys.argv[1:]
MaskedDiffusionLM.from_pretrained(warm, dtype=torch.float32)
before = megabytes("VmRSS")
model = MaskedDiffusionLM.from_pretrained(folder, dtype=getattr(torch, dtype))
for parameter in model.parameters():
    parameter.detach().view(-1)[::512].sum()  # touches every page
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_memory_is_about_that_of_the_weights(tmp_path: Path, dtype: str) -> None:
    """240 MB in shards of 64 MB. The stored dtype is mapped, never copied; another is converted shard by shard."""
    sizes = {"d_model": 1024, "n_heads": 8, "n_layers": 8, "mlp_hidden_size": 3072, "vocab_size": 8000}
    with torch.device("meta"):
        model = MaskedDiffusionLM(ModelConfig(**sizes, mask_token_id=1))
    torch.manual_seed(0)
    random = {name: torch.randint(0, 2**14, x.shape, dtype=torch.int16) for name, x in model.state_dict().items()}
    model.load_state_dict({name: x.view(torch.bfloat16) for name, x in random.items()}, assign=True)
    model.save_pretrained(tmp_path / "big", max_shard_bytes=64 * 2**20)
    stored = sum(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors")) / 2**20
    warm = write_folder(tmp_path / "warm")
    run = run_code(MEASURE, str(warm), str(tmp_path / "big"), dtype)
    assert run.returncode == 0, run.stderr
    peak = float(run.stdout)
    assert 230 < stored < 250
    weights = stored * (2 if dtype == "float32" else 1)
    mapped = 64 if dtype == "float32" else 0  # the shard being converted
    assert 0.9 * weights < peak < 1.1 * weights + mapped


# --- errors ----------------------------------------------------------------------------------------------------------


def assert_one_line(error: pytest.ExceptionInfo[Exception], folder: Path) -> None:
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_names_the_hub(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"GSAI-ML/LLaDA-8B-Base: no such folder .*downloaded to a local folder"
    ):
        load("GSAI-ML/LLaDA-8B-Base")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="path must be a folder's name, got NoneType"):
        load_tokenizer(None)


def test_missing_config(tmp_path: Path) -> None:
    write_folder(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json") as error:
        load(tmp_path / "m")
    assert_one_line(error, tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_broken_config(tmp_path: Path, text: str) -> None:
    (write_folder(tmp_path / "m") / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: must hold .*JSON") as error:
        load(tmp_path / "m")
    assert_one_line(error, tmp_path)


def test_refused_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="alibi must be False"):
        load(write_folder(tmp_path / "m", alibi=True))


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FileNotFoundError, match=r"no weights: needs model\.safetensors or shards") as error:
        load(tmp_path)
    assert_one_line(error, tmp_path)


@pytest.mark.parametrize("index", [True, False])
def test_missing_shard(tmp_path: Path, index: bool) -> None:
    folder = write_folder(tmp_path / "m", index=index)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing model-00002-of-00003\.safetensors") as error:
        load(folder)
    assert_one_line(error, tmp_path)


def test_broken_index(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="must have a weight_map"):
        load(folder)


def test_broken_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", shards=0)
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file") as error:
        load(folder)
    assert_one_line(error, tmp_path)


def test_missing_and_unexpected_tensors(tmp_path: Path) -> None:
    tensors = llada_tensors()
    del tensors["model.transformer.ln_f.weight"]
    tensors["model.transformer.wpe.weight"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"missing model\.transformer\.ln_f\.weight; unexpected .*wpe\.weight$"
    ) as error:
        load(write_folder(tmp_path / "m", tensors))
    assert_one_line(error, tmp_path)


def test_at_most_five_names(tmp_path: Path) -> None:
    tensors = {name.replace("model.transformer.", "transformer."): x for name, x in llada_tensors().items()}
    with pytest.raises(ValueError, match="missing") as error:
        load(write_folder(tmp_path / "m", tensors))
    assert str(error.value).count("weight") == 10
    assert str(error.value).count("and 16 more") == 2


@pytest.mark.parametrize("tied", [False, True])
def test_wrong_shape(tmp_path: Path, tied: bool) -> None:
    tensors = llada_tensors() | {"model.transformer.ff_out.weight": torch.zeros(70, 32)}
    with pytest.raises(ValueError, match=r"ff_out\.weight must have shape \[72, 32\], got \[70, 32\]") as error:
        load(write_folder(tmp_path / "m", tensors, weight_tying=tied))
    assert_one_line(error, tmp_path)


def test_shard_size_must_be_positive(tmp_path: Path) -> None:
    model = MaskedDiffusionLM(dataclasses.replace(ModelConfig.from_dict(CONFIG), n_layers=1))
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, got 0"):
        model.save_pretrained(tmp_path, max_shard_bytes=0)


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"mask": 0, "me": 1}, unk_token="me")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_to_id("me") == 1


def test_a_tokenizer_reads_texts_whole(tmp_path: Path) -> None:
    """Whatever truncation and padding its file stores."""
    stored = Tokenizer(models.WordLevel({"me": 0}, unk_token="me"))
    stored.enable_truncation(1)
    stored.enable_padding(length=9, pad_token="me")
    stored.pre_tokenizer = pre_tokenizers.Whitespace()
    stored.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("me me me").ids == [0, 0, 0]


def test_tokenizer_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json") as missing:
        load_tokenizer(tmp_path)
    assert_one_line(missing, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json") as broken:
        load_tokenizer(tmp_path)
    assert_one_line(broken, tmp_path)
