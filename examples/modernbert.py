"""Sparse attention in the global layers of ModernBERT: `python examples/modernbert.py [folder or name on the hub]`.

Without an argument a tiny random model stands in; any other model of transformers that attends in both directions works
the same way. Padding is heeded; the layers with a sliding window stay as they are, and the report says so.
"""

import sys

import torch
from transformers import AutoModel, ModernBertConfig

import baatt
from baatt import BAAttConfig

if len(sys.argv) > 1:
    model = AutoModel.from_pretrained(sys.argv[1])
else:
    torch.manual_seed(0)
    size = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    model = AutoModel.from_config(ModernBertConfig(**size, **special, num_attention_heads=4))
model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

# Two documents, the second of them shorter.
length = min(4096, model.config.max_position_embeddings)
tokens = torch.randint(3, model.config.vocab_size, (2, length), device=model.device)
mask = torch.ones_like(tokens)
mask[1, length // 2 :] = 0

with torch.no_grad():
    dense = model(tokens, attention_mask=mask).last_hidden_state
    with baatt.enable(model, BAAttConfig(block_size=64, sparsity=0.5)) as handle:
        sparse = model(tokens, attention_mask=mask).last_hidden_state

print(handle.report())
dense, sparse = dense[mask.bool()], sparse[mask.bool()]
print(f"relative difference to dense: {(sparse - dense).norm() / dense.norm():.2e}")
