"""The merged model through transformers: the logits of ours, dense and sparse, padded and not."""

import dataclasses

import pytest
import torch

import baatt
from baatt.lab import smollm2
from baatt.models import MaskedDiffusionLM
from baatt.models.adapter import make_trainable, write_adapter
from baatt.models.gguf import load_llama
from tests.models.gguf_files import write_gguf
from tests.models.test_config import SMALL

transformers = pytest.importorskip("transformers")
from baatt.lab.llama import as_llama  # noqa: E402


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A tiny base with a random change merged into it, read back from its folder."""
    place = tmp_path_factory.mktemp("merged")
    write_gguf(place / "base.gguf")
    torch.manual_seed(0)
    drawn = {name: torch.randn_like(p) * 0.05 for name, p in make_trainable(load_llama(place / "base.gguf"), 2).items()}
    write_adapter(place / "adapter.safetensors", drawn, smollm2.sha256_of(place / "base.gguf"))
    smollm2.export(
        place / "base.gguf", place / "model", adapter=place / "adapter.safetensors", dtype=torch.float32
    )  # fmt: skip
    return MaskedDiffusionLM.from_pretrained(place / "model")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_logits_are_those_of_our_class(merged, sparsity, padded):
    theirs = as_llama(merged)
    config = None if sparsity is None else baatt.BAAttConfig(sparsity=sparsity, block_size=16)
    ids = torch.randint(17, merged.config.vocab_size, (2, 150), generator=torch.Generator().manual_seed(1))
    ids[:, 140:] = merged.config.mask_token_id
    real = torch.ones_like(ids)
    if padded:
        real[1, :37] = 0
    mask = real if padded else None
    with torch.no_grad(), baatt.enable(merged, config) as here, baatt.enable(theirs, config) as there:
        found, expected = merged(ids, mask), theirs(ids, attention_mask=mask).logits
    assert (here.sparse_calls, here.dense_calls) == (there.sparse_calls, there.dense_calls)
    assert here.sparsity == there.sparsity
    assert here.sparse_calls == (0 if config is None else merged.config.n_layers)
    told = (real[:, 1:] & real[:, :-1]).bool()  # the token before is what tells one
    torch.testing.assert_close(found[:, 1:][told], expected[:, :-1][told], atol=1e-5 * float(found.abs().max()), rtol=0)
    torch.testing.assert_close(found[0, 0], expected[0, 0], atol=1e-5 * float(found.abs().max()), rtol=0)


def test_without_baatt_it_is_the_same_dense_model_on_the_same_weights(merged):
    theirs = as_llama(merged)
    assert theirs.lm_head.weight.data_ptr() == merged.transformer.wte.weight.data_ptr()
    ids = torch.arange(20, 90)[None]
    with torch.no_grad():
        found, expected = merged(ids), theirs(ids).logits
    torch.testing.assert_close(found[:, 1:], expected[:, :-1], atol=1e-5 * float(found.abs().max()), rtol=0)


def test_an_untied_head_of_the_same_token(tmp_path):
    torch.manual_seed(1)
    ours = MaskedDiffusionLM(dataclasses.replace(SMALL, attention_layer_norm=False, weight_tying=False)).eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(as_llama(ours)(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)


def test_what_llama_has_not_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="model must have no biases and no norms of queries and keys"):
        as_llama(MaskedDiffusionLM(dataclasses.replace(SMALL, attention_layer_norm=True)))
    monkeypatch.setattr("baatt.lab.llama._sees_ahead", lambda model: False)
    with pytest.raises(RuntimeError, match=r"transformers must heed config\.is_causal, and [\d.]+ does not"):
        as_llama(MaskedDiffusionLM(dataclasses.replace(SMALL, attention_layer_norm=False)))
