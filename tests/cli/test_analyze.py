"""`baatt analyze` from a text to tables, files and pictures, and its refusals."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from baatt.cli.main import main
from baatt.lab.capture import load_capture


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capture")
    text, path = folder / "text.txt", folder / "capture.safetensors"
    text.write_text("The harbour was empty. " * 40, encoding="utf-8")
    assert main(["analyze", "capture", "--prompt-file", str(text), "--layers", "1,-1", "--output", str(path)]) == 0
    return path


def test_capture_of_a_text(captured):
    found = load_capture(captured)
    assert list(found.layers) == [1, 5]
    assert found.about["model"] == "needle-18m"
    assert found.about["command"].startswith("baatt analyze capture --prompt-file")
    assert found.layers[1].q.shape[2] == int(found.about["tokens"])


def test_recall_and_bound(captured, tmp_path, capsys):
    sizes = ["--block-size", "16", "--segment", "64", "--layers", "1"]
    files = ["--json", str(tmp_path / "recall.json"), "--plot", str(tmp_path / "recall.png")]
    chosen = ["--sparsity", "0.5,0.8", "--scores", "covariance,oracle"]
    assert main(["analyze", "recall", str(captured), *sizes, *chosen, *files]) == 0
    stored = json.loads((tmp_path / "recall.json").read_text())
    assert stored["study"] == "recall"
    assert stored["command"].startswith("baatt analyze recall")
    assert {"commit", "device", "versions", "about"} <= stored.keys()
    assert len(stored["records"]) == 2 * 2 * 2 * 2
    assert "qk in 64" in capsys.readouterr().out
    files = ["--json", str(tmp_path / "bound.json"), "--plot", str(tmp_path / "bound.png")]
    assert main(["analyze", "bound", str(captured), *sizes, *files]) == 0
    assert [one["sort"] for one in json.loads((tmp_path / "bound.json").read_text())["records"]] == ["none", "qk"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bound.json", "bound.png", "recall.json", "recall.png"]


def test_layers(captured, tmp_path, capsys):
    path = tmp_path / "layers.json"
    assert main(["analyze", "layers", str(captured), "--block-size", "16", "--segment", "64", "--json", str(path)]) == 0
    records = json.loads(path.read_text())["records"]
    assert [(one["layer"], one["sort"]) for one in records] == [(1, "none"), (1, "qk"), (5, "none"), (5, "qk")]
    assert "qk in 64" in capsys.readouterr().out


def test_keys(captured, tmp_path, capsys):
    files = ["--json", str(tmp_path / "keys.json"), "--plot", str(tmp_path / "keys.png")]
    assert main(["analyze", "keys", str(captured), *files]) == 0
    stored = json.loads((tmp_path / "keys.json").read_text())
    assert [(one["layer"], one["block_size"]) for one in stored["records"]] == [(1, 128), (5, 128)]
    assert stored["study"] == "keys"
    assert (tmp_path / "keys.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    first = stored["records"][0]
    assert f"{100 * first['on_few']:.1f} %" in printed
    assert f"{first['norm_correlation']:.2f}" in printed


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ([], ["BA-Att, qk in 1024", "16 clusters, first block kept, unsorted", "oracle, unsorted"]),
        (["--preset", "paper"], ["BA-Att, qk in 1024", "oracle, unsorted"]),
        (["--preset", "paper", "--sort", "none,k", "--segment", "64"], ["BA-Att, unsorted", "BA-Att, k in 64"]),
        (["--score", "mean"], ["block means, first block kept, unsorted", "block means, first block kept, qk in 1024"]),
    ],
)
def test_maps(captured, tmp_path, options, drawn):
    path, page = tmp_path / "maps.png", tmp_path / "maps.html"
    sizes = ["--block-size", "16", "--layers", "5", "--plot", str(path), "--html", str(page)]
    assert main(["analyze", "maps", str(captured), *options, *sizes]) == 0
    assert path.stat().st_size > 10_000
    data = page.read_text().split('<script id="data" type="application/json">')[1].split("</script>")[0]
    assert json.loads(data)["orders"] == drawn


def test_document_of_a_task(tmp_path):
    path = tmp_path / "capture.safetensors"
    assert main(["analyze", "capture", "--length", "512", "--layers", "0", "--output", str(path)]) == 0
    assert load_capture(path).about["text"] == "niah_multikey_1, seed 0"


@pytest.mark.parametrize("action", ["recall", "bound", "layers", "keys", "maps"])
@pytest.mark.parametrize("prefix", ["", "layers.7."])
def test_own_tensors_are_titled_by_their_file(tmp_path, capsys, action, prefix):
    path, page = tmp_path / "mine.safetensors", tmp_path / "maps.html"
    generator = torch.Generator().manual_seed(0)
    tensors = {prefix + name: torch.randn(1, 2, 96, 16, generator=generator) for name in "qkv"}
    save_file(tensors, path)
    options = [] if action == "keys" else ["--block-size", "16", "--segment", "32"]
    options += ["--html", str(page)] if action == "maps" else []
    assert main(["analyze", action, str(path), *options]) == 0
    shown = page.read_text() if action == "maps" else capsys.readouterr().out
    assert f"mine.safetensors, layer {prefix[7:-1] or 0}, 96 queries, 96 keys" in shown


@pytest.mark.parametrize("options", [[], ["--no-outputs"]])
def test_recall_prints_the_error_that_it_measures(captured, capsys, options):
    call = ["analyze", "recall", str(captured), "--layers", "1", "--sparsity", "0.3,0.5,0.7,0.9"]
    assert main([*call, "--block-size", "16", *options]) == 0
    printed = capsys.readouterr().out
    assert ("relative L2 error" in printed) == (not options)
    assert re.search(r"│ clusters-variance │ +\d+\.\d \(\d+\.\d\) │", printed)  # whole, on 80 columns
    assert bool(re.search(r"│ +│ +\d\.\d{3} │", printed)) == (not options)
    assert " antidiagonal " in printed
    assert "antidiagonal-8" not in printed  # the same under another name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "arguments are required: ACTION"),
        (["recall", "nothing.safetensors"], "no such file: nothing.safetensors"),
        (["recall", "FILE", "--scores", "best"], "--scores must be of covariance,"),
        (["recall", "FILE", "--layers", "9"], "asked for [9]"),
        (["recall", "FILE", "--layers", "a"], "--layers must be numbers of layers by commas, got 'a'"),
        (["recall", "FILE", "--sparsity", "1.5"], "sparsity must be in [0, 1), got 1.5"),
        (["bound", "FILE", "--sort", "norm"], "--sort must be one of"),
        (["bound", "FILE", "--segment", "100"], "segment must be a positive multiple of block_size=128"),
        (["bound", "FILE", "--json", "/nowhere/x"], "--json must lie in an existing folder"),
        (["bound", "FILE", "--device", "gpu"], "--device must be a device"),
        (["maps", "FILE", "--html", "/nowhere/x"], "--html must lie in an existing folder"),
        (["layers", "FILE", "--plot", "x.png"], "--plot has nothing to draw here"),
        (["keys", "FILE", "--sort", "qk"], "unrecognized arguments: --sort qk"),
        (["maps", "FILE"], "--plot FILE.png or --html FILE.html is required"),
        (["maps", "FILE", "--plot", "x.png"], "--layers must name one of the layers 1, 5"),
        (["maps", "FILE", "--plot", "x.png", "--layers", "1", "--head", "99"], "--head must be from 0 to 7, got 99"),
        (["capture", "--layers", "7"], "--layers must be numbers from -6 to 5, got (7,)"),
        (["capture", "--output", "/nowhere/x"], "--output must lie in an existing folder"),
        (["capture", "--prompt-file", "/nowhere/x"], "/nowhere/x"),
        (["capture", "--length", "1000M"], "must fit into memory"),
        (["capture", "--length", "5"], "length must hold the smallest niah_multikey_1 sample"),
        (["capture", "--length", "-5"], "--length must be positive numbers of tokens"),
        (["recall", "/"], "baatt: / is a folder"),
        (["recall", "FILE", "--device", "meta"], "--device must be one that computes here"),
    ],
)
def test_refusals(captured, argv, message, capsys):
    assert main(["analyze", *(str(captured) if word == "FILE" else word for word in argv)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_capture_of_a_transformers_model(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "harbour": 1, "the": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.enable_truncation(9)  # stored in the file, and must not cut the text
    words.enable_padding(length=99)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    config = transformers.ModernBertConfig(
        vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        global_attn_every_n_layers=2, local_attention=16, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        cls_token_id=0, sep_token_id=0,
    )  # fmt: skip
    transformers.ModernBertModel(config).save_pretrained(tmp_path)
    text, path = tmp_path / "text.txt", tmp_path / "capture.safetensors"
    text.write_text("the harbour " * 40, encoding="utf-8")
    given = ["analyze", "capture", "--model", str(tmp_path), "--prompt-file", str(text), "--output", str(path)]
    assert main([*given, "--layers", "0,2"]) == 0  # the others see a window only
    found = load_capture(path)
    assert list(found.layers) == [0, 2]
    assert found.layers[0].q.shape == (1, 2, 80, 16)
    assert found.scale == 0.25
    assert main(given) == 0
    assert list(load_capture(path).layers) == [0, 2]
    capsys.readouterr()
    assert main([*given, "--layers", "1,2"]) == 2
    assert "--layers [1] of " in capsys.readouterr().err
