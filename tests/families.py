"""Tiny random dense models of every supported family."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_sparse_attention as hsa

# What a family needs beyond the common sizes below: small experts, a short window, layers of both kinds.
_WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
EXTRA = {
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"use_sliding_window": True, **_WINDOWED},
    "qwen3": {"use_sliding_window": True, **_WINDOWED},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "olmo3": _WINDOWED,
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
    "phi3": {"pad_token_id": 0, "sliding_window": 6},
    "gemma3_text": {**_WINDOWED, "query_pre_attn_scalar": 8},
    "cohere2": _WINDOWED,
    "glm4": {"pad_token_id": 0},
    "starcoder2": {"sliding_window": 6, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "seed_oss": {"residual_dropout": 0.0},
    "exaone4": _WINDOWED,
    # Squared ReLU: with larger weights its logits grow until their own rounding is what is compared.
    "nemotron": {"initializer_range": 0.1},
}
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
    # Larger than a trained model's: attention that is nearly uniform would hide a wrong mask.
    "initializer_range": 0.15,
}
NAMES = list(hsa.FAMILIES)


def dense_config(name: str, **changes):
    """A tiny config of a family."""
    return AutoConfig.for_model(name, **{**COMMON, **EXTRA.get(name, {}), **changes})


def dense_model(name: str, seed: int = 0, **changes):
    """A tiny random dense model in float32, in evaluation mode, on Transformers' eager attention."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(dense_config(name, **changes), attn_implementation="eager")
    return model.float().eval()


def sparse_model(dense, map_name: str = "asentmax", **settings):
    """The sparse model with a dense model's weights, new parameters at their start."""
    config = hsa.sparse_config(dense.config, hsa.SparseAttentionConfig(map=map_name, **settings))
    model = getattr(hsa, f"Sparse{type(dense).__name__}")(config).to(dense.dtype).eval()
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected
    assert {name for name in missing if "sparse_" not in name} == set()
    return model


def stir(model, scale: float = 0.5, seed: int = 1):
    """Moves the new parameters away from their start, where several of them would have no effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "sparse_" in name:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens without the special ones, (batch, length)."""
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))
