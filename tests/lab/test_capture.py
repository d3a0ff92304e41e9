"""A capture survives its file, holds what attention got, and foreign files are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from baatt.lab.capture import LAYOUT, Capture, Heads, Recorder, load_capture, save_capture


def heads(seed=0, groups=2):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda count, tokens: torch.randn(1, count, tokens, 8, generator=generator)  # noqa: E731
    return Heads(draw(4, 30), draw(groups, 50), draw(groups, 50))


def test_recorder_keeps_the_first_call_of_wanted_layers():
    recorder, first, second = Recorder([1]), heads(1), heads(2)
    for each in (first, second):
        for layer in range(2):
            recorder.keep(layer, *each)
    assert list(recorder.found) == [1]
    assert all(torch.equal(one, two) for one, two in zip(recorder.found[1], first, strict=True))
    with pytest.raises(ValueError, match="attention must be bidirectional in a capture, got causal=1"):
        recorder.keep(1, *first, causal=1)


def test_file(tmp_path):
    path = tmp_path / "capture.safetensors"
    save_capture(Capture({0: heads(0), 3: heads(3)}, 0.25, {"model": "x", "text": "a\nb"}), path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    found = load_capture(path)
    assert found.scale == 0.25
    assert found.about == {"model": "x", "text": "a\nb"}
    assert list(found.layers) == [0, 3]
    assert torch.equal(found.layers[3].v, heads(3).v)
    assert list(load_capture(path, [3]).layers) == [3]
    with pytest.raises(ValueError, match=r"holds layers \[0, 3\], asked for \[1\]"):
        load_capture(path, [1])


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "capture.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_capture(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        load_capture(path)
    wrong = Heads(torch.ones(1, 3, 5, 4), torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
    save_capture(Capture({0: wrong}, 1.0, {}), path)
    with pytest.raises(ValueError, match=r"H % G == 0, got \(1, 3, 5, 4\)"):
        load_capture(path)


def test_scale_of_a_foreign_file_defaults_to_the_usual_one(tmp_path):
    path = tmp_path / "capture.safetensors"
    save_file({f"layers.0.{name}": torch.ones(1, 2, 3, 16) for name in "qkv"}, path)
    assert load_capture(path).scale == 0.25
    assert load_capture(path).about == {"model": path.name}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"scale": "0.5"}])
@pytest.mark.parametrize(
    ("prefixes", "layers"), [([""], [0]), (["layers.3."], [3]), (["layers.10.", "layers.2.", "layers.0."], [0, 2, 10])]
)
def test_own_tensors_need_names_only(tmp_path, prefixes, layers, metadata):
    path, tensors = tmp_path / "mine.safetensors", heads(1)._asdict()
    save_file({prefix + name: x.clone() for prefix in prefixes for name, x in tensors.items()}, path, metadata)
    found = load_capture(path)
    assert list(found.layers) == layers
    assert torch.equal(found.layers[layers[0]].k, tensors["k"])
    assert found.scale == (0.5 if "scale" in (metadata or {}) else 8**-0.5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "got no tensor"),
        (["weight"], "got the tensor 'weight'"),
        (["0.q", "0.k", "0.v"], r"layers\.0\.q.*got the tensor '0\.[qkv]'"),
        (["layers.a.q"], "got the tensor 'layers.a.q'"),
        (["q", "k", "v", "mask"], "got the tensor 'mask'"),
        (["q"], "layer 0 lacks k and v"),
        (["layers.1.q", "layers.1.k", "layers.1.v", "layers.2.k", "layers.2.v"], "layer 2 lacks q"),
        (["q", "k", "v", "layers.0.q"], "must hold every tensor once"),
    ],
)
def test_other_names_are_refused_with_the_layout(tmp_path, names, message):
    path = tmp_path / "mine.safetensors"
    save_file({name: torch.ones(1, 2, 3, 4) for name in names}, path)
    with pytest.raises(ValueError, match=message):
        load_capture(path)


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (lambda x: x[0], None, r"q must be \[B, H, N, D\].* got \(4, 30, 8\)"),
        (lambda x: x[:, :, :0], None, "none of them 0"),
        (lambda x: x.long(), None, "q must hold floating point numbers, got torch.int64"),
        (lambda x: x / 0, None, "q must be finite"),
        (lambda x: x, {"scale": "big"}, "a number as the metadata scale"),
        (lambda x: x, {"scale": "-1"}, "a positive number as the metadata scale, got -1.0"),
        (lambda x: x, {"about": "{"}, "JSON as about"),
        (lambda x: x, {"about": "3"}, "JSON as about"),
    ],
)
def test_tensors_that_attention_cannot_take(tmp_path, change, metadata, message):
    path = tmp_path / "mine.safetensors"
    save_file({name: change(x).contiguous() for name, x in heads()._asdict().items()}, path, metadata)
    with pytest.raises(ValueError, match=message):
        load_capture(path)


def test_the_page_on_own_tensors_has_the_layout():
    page = (Path(__file__).parents[2] / "docs" / "analyze.md").read_text(encoding="utf-8")
    assert LAYOUT in " ".join(page.replace("`", "").split())
