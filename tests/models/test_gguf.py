"""A GGUF file as our model: transformers' logits of the same weights, causal and not, and the tokenizer it holds."""

import functools
import struct

import pytest
import torch

import baatt
from baatt.models.gguf import MASK_NAME, GgufFile, load_gguf_tokenizer, load_llama
from baatt.stages.dense import dense_attention
from tests.models.gguf_files import GROUPS, HEADS, HIDDEN, LAYERS, WIDTH, write_gguf

transformers = pytest.importorskip("transformers")


def llama(tensors: dict[str, torch.Tensor]) -> "transformers.LlamaForCausalLM":
    """transformers' model of the tensors of a file, whose q and k have the channels of a rotation side by side."""
    config = transformers.LlamaConfig(
        vocab_size=len(tensors["token_embd.weight"]), hidden_size=WIDTH, intermediate_size=HIDDEN, rms_norm_eps=1e-5,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=GROUPS, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    names = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"], "lm_head.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }  # fmt: skip
    for name, tensor in tensors.items():
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            if part in ("attn_q", "attn_k"):
                heads, size = tensor.shape[0] * HEADS // WIDTH, WIDTH // HEADS
                tensor = tensor.reshape(heads, size // 2, 2, WIDTH).transpose(1, 2).reshape(tensor.shape)
            state[f"model.layers.{layer}.{names[part]}.weight"] = tensor
    model.load_state_dict(state)
    return model


def be_bidirectional(model: "transformers.LlamaForCausalLM") -> None:
    """What a diffusion model grown from a causal one changes in transformers."""
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


@pytest.mark.parametrize("kinds", [(3, 8), (2, 3), (0, 1)])
def test_causal_logits_are_those_of_transformers(tmp_path, kinds):
    theirs = llama(write_gguf(tmp_path / "tiny.gguf", kinds=kinds))
    ours = load_llama(tmp_path / "tiny.gguf")
    ids = torch.randint(17, ours.config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        found = ours(ids, attention=functools.partial(dense_attention, causal=1))
    everywhere_but_mask = torch.arange(expected.shape[-1]) != ours.config.mask_token_id
    torch.testing.assert_close(
        found[:, 1:, everywhere_but_mask], expected[:, :-1, everywhere_but_mask], atol=2e-4, rtol=0
    )
    mean = ours.transformer.wte.weight
    assert not torch.equal(mean[16], theirs.model.embed_tokens.weight[16])


@pytest.mark.parametrize("config", [None, baatt.BAAttConfig(sparsity=0.5, block_size=16, sort="none")])
def test_bidirectional_and_sparse_through_transformers(tmp_path, config):
    theirs = llama(write_gguf(tmp_path / "tiny.gguf"))
    ours = load_llama(tmp_path / "tiny.gguf")
    with torch.no_grad():
        theirs.model.embed_tokens.weight[16] = ours.transformer.wte.weight[16]
    be_bidirectional(theirs)
    ids = torch.randint(16, ours.config.vocab_size, (1, 128), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), baatt.enable(ours, config) as here, baatt.enable(theirs, config) as there:
        found, expected = ours(ids), theirs(ids).logits
        assert here.sparsity == there.sparsity
    assert (here.sparsity > 0) == (config is not None)
    torch.testing.assert_close(found[:, 1:], expected[:, :-1], atol=2e-4, rtol=0)
    torch.testing.assert_close(found[:, 0], expected[:, 0], atol=2e-4, rtol=0)


def test_tokenizer(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = load_gguf_tokenizer(tmp_path / "tiny.gguf")
    encoded = tokenizer.encode("the 12 the\n<|reserved 1|>")
    assert encoded.tokens == ["the", "Ġ", "1", "2", "Ġthe", "Ċ", "<|reserved 1|>"]
    assert tokenizer.decode(encoded.ids) == "the 12 the\n"
    assert tokenizer.token_to_id(MASK_NAME) == load_llama(tmp_path / "tiny.gguf").config.mask_token_id == 16


def test_what_is_refused(tmp_path):
    write_gguf(tmp_path / "other.gguf", architecture="qwen2")
    with pytest.raises(ValueError, match="architecture must be 'llama', got 'qwen2'"):
        load_llama(tmp_path / "other.gguf")
    (tmp_path / "no.gguf").write_bytes(b"GGML" + bytes(40))
    with pytest.raises(ValueError, match="must be a GGUF file of version 2 or 3"):
        GgufFile(tmp_path / "no.gguf")
    write_gguf(tmp_path / "tiny.gguf")
    stored = GgufFile(tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match=r"must have the tensor output\.weight, and has not"):
        stored.tensor("output.weight")
    shape, _, offset = stored._tensors["output_norm.weight"]
    stored._tensors["output_norm.weight"] = (shape, 12, offset)
    with pytest.raises(ValueError, match=r"output_norm\.weight must be in a format of \[0, 1, 2, 3, 8\], got 12"):
        stored.tensor("output_norm.weight")


@pytest.mark.parametrize("length", [0, 4, 8, 30, 500, -40])
def test_a_file_that_breaks_off_is_refused(tmp_path, length):
    whole = tmp_path / "whole.gguf"
    write_gguf(whole)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(whole.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"broken\.gguf: must (be a|hold all)"):
        load_llama(broken)


@pytest.mark.parametrize("text", [struct.pack("<QcI", 1, b"a", 99), struct.pack("<Q", 2**62)])
def test_what_is_no_header_is_refused(tmp_path, text):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text)
    with pytest.raises(ValueError, match="must be a whole GGUF file"):
        load_llama(tmp_path / "broken.gguf")
