"""A `MaskedDiffusionLM` of Llama's shape as the same model of transformers, bidirectional by `config.is_causal`.

In: our model. Out: a `LlamaForCausalLM` on the same weights, for code that wants one; `baatt.enable` makes it sparse as
any other. Its logits at a token are those of the head there: of a model that predicts the next token they tell the one
behind it, which ours has shifted already.
"""

from typing import Any

import torch

from baatt.models.llada import EMBEDDING, HEAD, MaskedDiffusionLM

#: Our name of a layer's part -> that of transformers.
PARTS = {
    "attn_norm": "input_layernorm", "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj", "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
}  # fmt: skip
OTHERS = {
    EMBEDDING: "model.embed_tokens.weight",
    HEAD: "lm_head.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
}


def as_llama(model: MaskedDiffusionLM) -> Any:
    """transformers' model of the same tensors, in evaluation mode; none is copied.

    Raises:
        ImportError: transformers is not installed.
        ValueError: a model with biases or norms of queries and keys, which Llama has not.
        RuntimeError: this version of transformers does not heed `config.is_causal`.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise ImportError("as_llama needs transformers: pip install 'baatt[transformers]'") from None
    size = model.config
    if size.include_bias or size.include_qkv_bias or size.attention_layer_norm:
        raise ValueError("model must have no biases and no norms of queries and keys, which Llama has not")
    config = LlamaConfig(
        vocab_size=size.logit_size, hidden_size=size.d_model, intermediate_size=size.mlp_hidden_size,
        num_hidden_layers=size.n_layers, num_attention_heads=size.n_heads, num_key_value_heads=size.kv_heads,
        rms_norm_eps=size.rms_norm_eps, rope_theta=size.rope_theta, tie_word_embeddings=size.weight_tying,
        max_position_embeddings=size.max_sequence_length, use_cache=False, pad_token_id=size.pad_token_id,
        eos_token_id=list(size.end_tokens) or None, bos_token_id=None,
    )  # fmt: skip
    config.is_causal = False
    theirs = LlamaForCausalLM(config)
    tensors = {_name(name): tensor for name, tensor in model.state_dict().items()}
    if size.weight_tying:
        tensors[OTHERS[HEAD]] = tensors[OTHERS[EMBEDDING]]
    theirs.load_state_dict(tensors, assign=True)
    theirs.tie_weights()
    theirs.to(model.transformer.wte.weight.device).eval()
    if not _sees_ahead(theirs):
        import transformers

        raise RuntimeError(f"transformers must heed config.is_causal, and {transformers.__version__} does not")
    return theirs


def _name(ours: str) -> str:
    if ours in OTHERS:
        return OTHERS[ours]
    _, _, _, layer, part, kind = ours.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.{kind}"


@torch.no_grad()
def _sees_ahead(model: Any) -> bool:
    """Whether what a token says changes with the one behind it, with a mask of padding and without."""
    ids = torch.tensor([[3, 4], [3, 5]], device=model.device)
    for mask in (None, torch.ones_like(ids)):
        first, second = model(ids, attention_mask=mask).logits[:, 0]
        if torch.equal(first, second):
            return False
    return True
