"""The model's config: what it reads of LLaDA's, what it writes, and what it refuses."""

import dataclasses
import json

import pytest

from baatt.models import ModelConfig

SMALL = ModelConfig(
    d_model=24,
    n_heads=6,
    n_kv_heads=2,
    n_layers=2,
    mlp_hidden_size=40,
    vocab_size=37,
    embedding_size=40,
    mask_token_id=36,
    rope_theta=100.0,
)
REAL = {  # config.json of LLaDA-8B
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": None,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}


def test_reads_the_real_config() -> None:
    config = ModelConfig.from_dict(REAL)
    assert (config.d_model, config.kv_heads, config.head_size, config.logit_size) == (4096, 32, 128, 126464)
    assert (config.mask_token_id, config.eos_token_id, config.rope_theta) == (126336, 126081, 500000.0)


def test_config_round_trip() -> None:
    for config in (SMALL, ModelConfig.from_dict(REAL)):
        again = ModelConfig.from_dict(config.to_dict())
        resolved = {"n_kv_heads": config.kv_heads, "embedding_size": config.logit_size}
        assert again == dataclasses.replace(config, **resolved)
    assert {name: ModelConfig.from_dict(REAL).to_dict()[name] for name in ("model_type", "rope", "alibi")} == {
        "model_type": "llada",
        "rope": True,
        "alibi": False,
    }


def test_mlp_width_from_ratio() -> None:
    assert ModelConfig.from_dict({**REAL, "mlp_hidden_size": None}).mlp_hidden_size == 4 * 4096


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("block_type", "sequential"),
        ("block_group_size", 2),
        ("activation_type", "swiglu"),
        ("layer_norm_type", "default"),
        ("layer_norm_type", "gemma_rms"),
        ("layer_norm_with_affine", False),
        ("attention_layer_norm_with_affine", False),
        ("bias_for_layer_norm", True),
        ("rope", False),
        ("alibi", True),
        ("multi_query_attention", True),
        ("scale_logits", True),
        ("input_emb_norm", True),
        ("clip_qkv", 8.0),
    ],
)
def test_refuses_what_is_not_implemented(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{key} must be .*, got {value!r}$"):
        ModelConfig.from_dict({**REAL, key: value})


SIZES = ("d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "vocab_size", "embedding_size")
TOKENS = ("mask_token_id", "eos_token_id", "pad_token_id")
SWITCHES = ("weight_tying", "attention_layer_norm", "include_bias", "include_qkv_bias")
NUMBERS = ("rope_theta", "rms_norm_eps", "init_std")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"d_model": 0}, ValueError, "d_model must be positive, got 0"),
        ({"n_layers": 2.0}, TypeError, "n_layers must be an int, got 2.0"),
        ({"n_heads": True}, TypeError, "n_heads must be an int, got True"),
        ({"d_model": 30}, ValueError, r"d_model must be a multiple of 2 \* n_heads=12, got 30"),
        ({"n_kv_heads": 4}, ValueError, "n_kv_heads must divide n_heads=6, got 4"),
        ({"n_kv_heads": 0}, ValueError, "n_kv_heads must be positive, got 0"),
        ({"embedding_size": 36}, ValueError, "embedding_size must be at least vocab_size=37, got 36"),
        ({"mask_token_id": 40}, ValueError, r"mask_token_id must be in \[0, 40\), got 40"),
        ({"rope_theta": 0.0}, ValueError, "rope_theta must be positive, got 0.0"),
        *(({name: [1]}, TypeError, rf"{name} must be an int, got \[1\]") for name in SIZES),
        *(({name: True}, TypeError, f"{name} must be an int, got True") for name in (*SIZES, *TOKENS)),
        *(({name: 1.0}, TypeError, f"{name} must be an int, got 1.0") for name in (*SIZES, *TOKENS)),
        *(({name: "1"}, TypeError, f"{name} must be an int, got '1'") for name in (*SIZES, *TOKENS)),
        *(({name: -1}, ValueError, rf"{name} must be in \[0, 40\), got -1") for name in TOKENS),
        *(({name: 40}, ValueError, rf"{name} must be in \[0, 40\), got 40") for name in TOKENS),
        *(({name: [1]}, TypeError, rf"{name} must be an int, got \[1\]") for name in ("mask_token_id", "pad_token_id")),
        ({"eos_token_id": [3, "4"]}, TypeError, "eos_token_id must be an int, got '4'"),
        ({"eos_token_id": [3, None]}, TypeError, "eos_token_id must be an int, got None"),
        ({"eos_token_id": (3, 40)}, ValueError, r"eos_token_id must be in \[0, 40\), got 40"),
        ({"eos_token_id": {}}, TypeError, "eos_token_id must be an int, got {}"),
        *(({name: "false"}, TypeError, f"{name} must be a bool, got 'false'") for name in SWITCHES),
        *(({name: 1}, TypeError, f"{name} must be a bool, got 1") for name in SWITCHES),
        *(({name: "1e-5"}, TypeError, f"{name} must be a number, got '1e-5'") for name in NUMBERS),
        *(({name: True}, TypeError, f"{name} must be a number, got True") for name in NUMBERS),
        *(({name: [1e-5]}, TypeError, rf"{name} must be a number, got \[1e-05\]") for name in NUMBERS),
        *(({name: float("nan")}, ValueError, f"{name} must be positive, got nan") for name in NUMBERS),
        ({"block_type": ["llama"]}, ValueError, "block_type must be 'llama'"),
        ({"block_type": "sequential"}, ValueError, "block_type must be 'llama'"),
    ],
)
def test_config_errors(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("given", "kept", "ends"),
    [([7, 5], (7, 5), (7, 5)), ((7,), 7, (7,)), ([], None, ()), (None, None, ()), (0, 0, (0,))],
)
def test_end_tokens(given: object, kept: object, ends: tuple[int, ...]) -> None:
    """One, several as a list, or none; written so that it is read back."""
    config = ModelConfig.from_dict({**REAL, "eos_token_id": given})
    assert (config.eos_token_id, config.end_tokens) == (kept, ends)
    written = json.loads(json.dumps(config.to_dict()))
    assert hash(ModelConfig.from_dict(written)) == hash(ModelConfig.from_dict(config.to_dict()))


def test_mlp_ratio_of_another_type() -> None:
    values = {**REAL, "mlp_hidden_size": None}
    assert ModelConfig.from_dict({**values, "mlp_ratio": 2.5}).mlp_hidden_size == 10240
    for ratio in ("4", [4], True):
        with pytest.raises(TypeError, match=r"^mlp_ratio must be a number, got"):
            ModelConfig.from_dict({**values, "mlp_ratio": ratio})
    with pytest.raises(TypeError, match=r"^mlp_hidden_size must be an int, got"):
        ModelConfig.from_dict({**values, "mlp_ratio": 0.0003})
    with pytest.raises(TypeError, match=r"^d_model must be an int, got '4096'"):
        ModelConfig.from_dict({**values, "d_model": "4096"})


def test_config_of_quantised_weights() -> None:
    with pytest.raises(ValueError, match=r"^quantization_config must be None .*, got \{'bits': 4\}$"):
        ModelConfig.from_dict({**REAL, "quantization_config": {"bits": 4}})


def test_config_needs_its_keys() -> None:
    with pytest.raises(ValueError, match=r"missing \['d_model', 'mask_token_id'\]"):
        ModelConfig.from_dict({k: v for k, v in REAL.items() if k not in ("d_model", "mask_token_id")})
    with pytest.raises(ValueError, match="bias_for_layer_norm must be false when include_bias is true, got None"):
        ModelConfig.from_dict({**REAL, "include_bias": True, "bias_for_layer_norm": None})
