"""The models of benchmarks/end_to_end.py in their published sizes, with random weights made on the device.

In: a `Case`. Out: a `Client`: the model and one evaluation of it without arguments. Time does not depend on weights, so
none are loaded. Knows nothing of how attention is computed or timed.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baatt.models import MaskedDiffusionLM
from baatt.models.config import ModelConfig
from baatt.sampling import SamplerConfig, generate

#: LLaDA-8B-Instruct, Llama-3.1-8B, Wan2.1-T2V and HunyuanVideo, as their config.json have them.
LLADA_8B = {
    "d_model": 4096, "n_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288, "vocab_size": 126464,
    "mask_token_id": 126336, "eos_token_id": 126081, "rope_theta": 500_000.0,
}  # fmt: skip
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip
WAN_14B = {
    "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40,
}  # fmt: skip
WAN_1B = WAN_14B | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
HUNYUAN = {
    "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20, "num_single_layers": 40,
    "text_embed_dim": 4096, "pooled_projection_dim": 768,
}  # fmt: skip
#: Tokens of the prompt that the pipelines hand to the transformer.
WAN_TEXT, HUNYUAN_TEXT = 512, 256


class Case(NamedTuple):
    """kind: a name in `KINDS`; sizes: of the whole model; shape: tokens, or frames, rows and columns of latents.

    fewer: the sizes that make the model of a layer or two which is verified and warmed up with.
    answer: tokens to be generated; 0: one pass.
    """

    kind: str
    sizes: Mapping[str, Any]
    fewer: Mapping[str, int]
    shape: tuple[int, ...]
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.9)
    against: tuple[str, ...] = ("cudnn", "flash")
    answer: int = 0


class Client(NamedTuple):
    """What `baatt.enable` takes, the evaluation that is timed, and the one of which the results are compared."""

    model: Any
    run: Callable[[], Any]
    check: Callable[[], Tensor]


def build(case: Case, device: torch.device, dtype: torch.dtype, *, few: bool) -> Client:
    """The client of a case; few: with the layers of `Case.fewer` alone."""
    torch.manual_seed(0)
    sizes = dict(case.sizes) | (dict(case.fewer) if few else {})
    with torch.device(device):
        return KINDS[case.kind](case, sizes, dtype)


def parameters(client: Client) -> int:
    """Numbers of a model."""
    return sum(parameter.numel() for parameter in client.model.parameters())


def _llada(case: Case, sizes: dict[str, Any], dtype: torch.dtype) -> Client:
    """Logits of the last block of 32 tokens, which is what the sampler asks for; or a whole answer."""
    config = ModelConfig(**sizes)
    model = MaskedDiffusionLM(config).to(dtype).eval()
    (tokens,) = case.shape
    ids = torch.randint(config.mask_token_id, (1, tokens))
    ids[:, -32:] = config.mask_token_id

    def one_pass() -> Tensor:
        logits: Tensor = model(ids, logits_from=tokens - 32)
        return logits

    if not case.answer:
        return Client(model, one_pass, one_pass)
    # One token a step, no threshold: random weights are sure of nothing.
    sampler = SamplerConfig(steps=case.answer, gen_length=case.answer, block_length=32, cache="dual")
    prompt = ids[:, : tokens - case.answer]
    return Client(model, lambda: generate(model, prompt, None, sampler), one_pass)


def _decoder(case: Case, sizes: dict[str, Any], dtype: torch.dtype) -> Client:
    """The prompt of a causal decoder of transformers: fills a cache, gives the logits of the last token."""
    import transformers

    config = transformers.LlamaConfig(**sizes, attn_implementation="sdpa")
    model: Any = transformers.LlamaForCausalLM(config).to(dtype).eval()
    ids = torch.randint(config.vocab_size, (1, *case.shape))

    def run() -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
        return logits

    return Client(model, run, run)


def _wan(case: Case, sizes: dict[str, Any], dtype: torch.dtype) -> Client:
    """One denoising step of diffusers' Wan transformer, without guidance."""
    import diffusers

    model = _in_dtype(diffusers.WanTransformer3DModel(**sizes), dtype)
    given = {
        "hidden_states": torch.randn(1, sizes["in_channels"], *case.shape).to(dtype),
        "timestep": torch.tensor([500]), "encoder_hidden_states": torch.randn(1, WAN_TEXT, sizes["text_dim"]).to(dtype),
    }  # fmt: skip
    return _video(model, given)


def _hunyuan(case: Case, sizes: dict[str, Any], dtype: torch.dtype) -> Client:
    """One denoising step of diffusers' HunyuanVideo transformer; a prompt without padding."""
    import diffusers

    model = _in_dtype(diffusers.HunyuanVideoTransformer3DModel(**sizes), dtype)
    given = {
        "hidden_states": torch.randn(1, 16, *case.shape).to(dtype), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, HUNYUAN_TEXT, sizes["text_embed_dim"]).to(dtype),
        "encoder_attention_mask": torch.ones(1, HUNYUAN_TEXT, dtype=torch.int64),
        "pooled_projections": torch.randn(1, sizes["pooled_projection_dim"]).to(dtype),
        "guidance": torch.tensor([6000.0]).to(dtype),
    }  # fmt: skip
    return _video(model, given)


def _in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """As `from_pretrained` of diffusers loads it: some parts stay in float32."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    model = model.to(dtype).eval()
    for name, part in model.named_modules():
        if name.rpartition(".")[2] in kept:
            part.float()
    return model


def _video(model: Any, given: dict[str, Tensor]) -> Client:
    def run() -> Tensor:
        (sample,) = model(**given, return_dict=False)
        found: Tensor = sample
        return found

    return Client(model, run, run)


#: name -> makes the model and its evaluation
KINDS: dict[str, Callable[[Case, dict[str, Any], torch.dtype], Client]] = {
    "llada": _llada,
    "decoder": _decoder,
    "wan": _wan,
    "hunyuan": _hunyuan,
}


def tokens_of(case: Case) -> int:
    """Tokens of a self-attention: latents are cut into patches of 1 x 2 x 2, HunyuanVideo's text is among them."""
    if len(case.shape) == 1:
        return case.shape[0]
    frames, rows, columns = case.shape
    return frames * (rows // 2) * (columns // 2) + (HUNYUAN_TEXT if case.kind == "hunyuan" else 0)
