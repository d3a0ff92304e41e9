"""A capture survives its file, holds what attention got, and foreign files are refused."""

import pytest
import torch
from safetensors.torch import save_file

from baatt.lab.capture import FORMAT, Capture, Heads, Recorder, load_capture, save_capture


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
    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=f"metadata format={FORMAT}, got None"):
        load_capture(path)
    save_file({"layers.0.q": torch.ones(1, 2, 3, 4)}, path, {"format": FORMAT})
    with pytest.raises(ValueError, match="q, k and v of every layer"):
        load_capture(path)
    wrong = Heads(torch.ones(1, 3, 5, 4), torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
    save_capture(Capture({0: wrong}, 1.0, {}), path)
    with pytest.raises(ValueError, match=r"H % G == 0, got \(1, 3, 5, 4\)"):
        load_capture(path)


def test_scale_of_a_foreign_file_defaults_to_the_usual_one(tmp_path):
    path = tmp_path / "capture.safetensors"
    save_file({f"layers.0.{name}": torch.ones(1, 2, 3, 16) for name in "qkv"}, path, {"format": FORMAT})
    assert load_capture(path).scale == 0.25
    assert load_capture(path).about == {}
