"""Sparse attention in Dream's own code: `python examples/dream.py [folder or name on the hub]`, random without one."""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import baatt


class DreamSdpaAttention(nn.Linear):  # a stand-in: baatt knows the attention of Dream by the name of its class
    def forward(self, x):
        q, k, v = (y.unflatten(2, (4, 16)).transpose(1, 2) for y in super().forward(x).chunk(3, dim=2))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Sequential):
    def diffusion_generate(self, prompt, max_new_tokens, steps, mask=99):
        tokens = F.pad(prompt, (0, max_new_tokens), value=mask)
        for _ in range(steps):
            confidence, guess = self(tokens)[..., :mask].softmax(dim=-1).max(dim=-1)
            surest = confidence.masked_fill(tokens != mask, -1).topk(max_new_tokens // steps).indices
            tokens.scatter_(1, surest, guess.gather(1, surest))
        return tokens


if len(sys.argv) > 1:
    from transformers import AutoModel  # 4.46 to 4.57 run Dream's code

    model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, torch_dtype=torch.bfloat16)
else:
    model = Model(nn.Embedding(100, 64), *(DreamSdpaAttention(64, 192) for _ in range(4)), nn.Linear(64, 100))
model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
prompt = torch.randint(0, 90, (1, 960), device=next(model.parameters()).device)
with torch.no_grad(), baatt.enable(model, baatt.BAAttConfig(block_size=64, sparsity=0.5)) as handle:
    tokens = model.diffusion_generate(prompt, max_new_tokens=64, steps=4)
print(handle.report(), f"{tokens.shape[1] - 960} tokens after the prompt", sep="\n")
