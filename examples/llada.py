"""Sparse attention in LLaDA's own code: `python examples/llada.py [folder or name on the hub]`, random without one."""

import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import baatt


class Block(nn.Linear):  # a stand-in: the blocks of LLaDA have this method too
    def _scaled_dot_product_attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p)

    def forward(self, x):
        q, k, v = (y.unflatten(2, (4, 16)).transpose(1, 2) for y in super().forward(x).chunk(3, dim=2))
        return x + self._scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Sequential):
    def forward(self, input_ids):
        return SimpleNamespace(logits=super().forward(input_ids))


if len(sys.argv) > 1:
    from transformers import AutoModel  # 4.46 to 4.57 run LLaDA's code

    model, mask = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, torch_dtype=torch.bfloat16), 126336
else:
    model, mask = Model(nn.Embedding(100, 64), *(Block(64, 192) for _ in range(4)), nn.Linear(64, 100)), 99
model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
tokens = F.pad(torch.randint(0, 90, (1, 960)), (0, 64), value=mask).to(next(model.parameters()).device)
with torch.no_grad(), baatt.enable(model, baatt.BAAttConfig(block_size=64, sparsity=0.5)) as handle:
    for _ in range(4):  # uncovers the 16 tokens that the model is surest of
        confidence, guess = model(tokens).logits[..., :mask].softmax(dim=-1).max(dim=-1)
        surest = confidence.masked_fill(tokens != mask, -1).topk(16).indices
        tokens.scatter_(1, surest, guess.gather(1, surest))
print(handle.report(), f"{(tokens == mask).sum()} masks left", sep="\n")
