"""Small random checkpoints of every family, written by transformers: the independent oracle."""

from pathlib import Path

import torch
import transformers

TINY = Path(__file__).parent.parent.parent / "models" / "baton-tiny"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 500000.0}  # fmt: skip
GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 24,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES = {
    "llama-gqa": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-own-head-size": ("Llama", {"head_dim": 32}),
    "llama-3-rope": ("Llama", {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("Mistral", {"sliding_window": 21}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": (
        "Gemma2",
        {
            **GEMMA,
            "sliding_window": 19,
            "query_pre_attn_scalar": 40,
            "layer_types": SLIDING,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            **GEMMA,
            "sliding_window": 19,
            "query_pre_attn_scalar": 40,
            "layer_types": SLIDING,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "phi3-partial-window": (
        "Phi3",
        {
            "pad_token_id": 0,
            "sliding_window": 30,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "head_dim": 16,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
}


def random_model(folder: Path, family: str, seed: int = 0, dtype=torch.float32, **changes):
    """Save a random checkpoint with biases and norms that are not trivial;
    returns the model in eval mode."""
    kind, own = FAMILIES[family]
    settings = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    config_class = getattr(
        transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    )
    model_class = getattr(transformers, f"{kind}ForCausalLM")
    model = model_class(config_class(**{**settings, **own, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    shard = changes.pop("max_shard_size", "5GB")
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model


def random_llama(folder: Path, seed: int = 0, **changes):
    """Save a random Llama; returns the transformers model in eval mode."""
    return random_model(folder, "llama-gqa", seed, **changes)
