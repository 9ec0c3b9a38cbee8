"""The model families: the shape of one decoder-only transformer, from its `config.json`.

Owns the list of architectures that are served and the translation of their config keys into
`Traits`; everything else is refused by name. Does not know tensors or files.

Sources: the families' own `config.json` and modelling code in transformers. Llama 2/3.x, Mistral
(arXiv:2310.06825), Qwen2/2.5/3, Gemma 1/2 (arXiv:2408.00118) and 3, Phi-3 (arXiv:2404.14219),
Mixtral (arXiv:2401.04088), Qwen3-MoE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from core.errors import ModelLoadError

Config = dict[str, Any]
MAX_NUMBER = 1e30


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of some layers: base, and how low frequencies are stretched."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True)
class Experts:
    """A sparse MLP: `per_token` of `num` experts of `intermediate_size` columns each."""

    num: int
    per_token: int
    intermediate_size: int
    is_normalised: bool
    prefix: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class LayerTraits:
    """One layer: `window` 0 sees everything, otherwise the last `window` positions."""

    window: int
    rope: int
    is_sparse: bool = False


@dataclass(frozen=True, slots=True)
class Traits:
    """How one family differs from another."""

    layers: tuple[LayerTraits, ...]
    ropes: tuple[Rope, ...]
    attention_scale: float
    rotary_size: int
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    has_post_norms: bool = False
    has_fused_projections: bool = False
    """Q, K and V are stored as one matrix, and so are gate and up."""
    has_norm_offset: bool = False
    embedding_scale: float = 1.0
    activation: str = "silu"
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    experts: Experts | None = None


ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"}
"""Gemma's old configs write gelu and mean the tanh form; no other family may."""


def _llama(config: Config, traits: Traits) -> Traits:
    bias = bool(config.get("attention_bias"))
    return replace(
        traits, has_qkv_bias=bias, has_o_bias=bias, has_mlp_bias=bool(config.get("mlp_bias"))
    )


def _mistral(config: Config, traits: Traits) -> Traits:
    return _with_windows(config, traits, default="sliding_attention")


def _qwen2(config: Config, traits: Traits) -> Traits:
    # Qwen 2 has these biases whatever `attention_bias` says.
    return replace(_qwen_windows(config, traits), has_qkv_bias=True)


def _qwen3(config: Config, traits: Traits) -> Traits:
    bias = bool(config.get("attention_bias"))
    return replace(
        _qwen_windows(config, traits), has_qk_norm=True, has_qkv_bias=bias, has_o_bias=bias
    )


def _qwen3_moe(config: Config, traits: Traits) -> Traits:
    experts = Experts(
        num=positive(config, "num_experts" if "num_experts" in config else "num_local_experts"),
        per_token=positive(config, "num_experts_per_tok"),
        intermediate_size=positive(config, "moe_intermediate_size"),
        is_normalised=bool(config.get("norm_topk_prob")),
        prefix="mlp",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
    )
    # Every step-th layer is sparse, unless it is listed as dense.
    step = int(config.get("decoder_sparse_step") or 1)
    dense = set(config.get("mlp_only_layers") or ())
    traits = _qwen3(config, traits)
    layers = tuple(
        replace(layer, is_sparse=index not in dense and (index + 1) % step == 0)
        for index, layer in enumerate(traits.layers)
    )
    return replace(traits, experts=experts, layers=layers)


def _mixtral(config: Config, traits: Traits) -> Traits:
    experts = Experts(
        num=positive(config, "num_local_experts"),
        per_token=positive(config, "num_experts_per_tok"),
        intermediate_size=positive(config, "intermediate_size"),
        # Mixtral always renormalises the chosen weights; Qwen3-MoE asks its config.
        is_normalised=True,
        prefix="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
    )
    traits = _with_windows(config, traits, default="sliding_attention")
    return replace(
        traits, experts=experts, layers=tuple(replace(x, is_sparse=True) for x in traits.layers)
    )


def _phi3(config: Config, traits: Traits) -> Traits:
    return replace(
        _with_windows(config, traits, default="sliding_attention"), has_fused_projections=True
    )


def _gemma(config: Config, traits: Traits) -> Traits:
    bias = bool(config.get("attention_bias"))
    return replace(
        traits,
        has_qkv_bias=bias,
        has_o_bias=bias,
        has_norm_offset=True,
        # As in the first Transformer (arXiv:1706.03762), and unlike Llama.
        embedding_scale=math.sqrt(positive(config, "hidden_size")),
        activation="gelu_tanh",
    )


def _gemma2(config: Config, traits: Traits) -> Traits:
    traits = _with_windows(config, _gemma(config, traits), default="sliding_attention", every=2)
    return replace(
        traits,
        has_post_norms=True,
        # Not always the head size: 144 in the 27B model, whose heads have 128 columns.
        attention_scale=number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=float(config.get("attn_logit_softcapping") or 0.0),
        final_softcap=float(config.get("final_logit_softcapping") or 0.0),
    )


def _gemma3(config: Config, traits: Traits) -> Traits:
    # Both spellings are in use; without either, every sixth layer sees everything.
    every = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    traits = _with_windows(
        config, _gemma2(config, traits), default="sliding_attention", every=every
    )
    settings = rope_settings(config)
    if "full_attention" in settings:
        ropes = (
            _rope(_settings(settings, "full_attention"), config),
            _rope(_settings(settings, "sliding_attention"), config),
        )
    else:
        # Layers with a window never look far, so theirs is the short base.
        local = Rope(number(config, "rope_local_base_freq", 10_000.0))
        ropes = (_rope({"rope_theta": 1_000_000.0, **settings}, config), local)
    layers = tuple(replace(layer, rope=1 if layer.window else 0) for layer in traits.layers)
    return replace(traits, has_qk_norm=True, ropes=ropes, layers=layers)


FAMILIES: dict[str, Callable[[Config, Traits], Traits]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "MixtralForCausalLM": _mixtral,
    "Phi3ForCausalLM": _phi3,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
}
ALWAYS_TIED = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")


def read_traits(architecture: str, config: Config, num_layers: int, head_size: int) -> Traits:
    """Translate a config.

    Raises:
        ModelLoadError: The family, or something it asks for, is not served; names the key.
    """
    family = FAMILIES.get(architecture)
    if family is None:
        raise ModelLoadError(
            f"architecture {architecture} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    # Ignoring them would not fail: it would answer nonsense.
    for key in ("quantization_config", "use_bidirectional_attention"):
        if config.get(key):
            raise ModelLoadError(
                f"config.json has {key} = {str(config[key])[:60]!r}, which is not supported"
            )
    is_gemma = architecture in ALWAYS_TIED
    activation = (
        config.get("hidden_activation")
        or config.get("hidden_act")
        or ("gelu" if is_gemma else "silu")
    )
    if ACTIVATIONS.get(activation) != ("gelu_tanh" if is_gemma else "silu"):
        raise ModelLoadError(
            f"config.json has hidden_act {activation!r}, which {architecture} does not support here"
        )
    settings = rope_settings(config)
    # Some models rotate only the first columns of a head.
    partial = float(
        settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    )
    plain = Traits(
        layers=(LayerTraits(0, 0),) * num_layers,
        ropes=() if "full_attention" in settings else (_rope(settings, config),),
        attention_scale=head_size**-0.5,
        rotary_size=int(head_size * partial),
    )
    return family(config, plain)


def positive(config: Config, key: str, absent: int = 0) -> int:
    """Read a positive integer; `absent` stands for a key that is missing or null.

    Raises:
        ModelLoadError: Anything else.
    """
    value = config.get(key)
    if value is None and absent:
        return absent
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelLoadError(f"config.json has {key} = {value!r}, must be a positive integer")
    return value


def number(config: Config, key: str, default: float) -> float:
    """Read a number that is not negative; absent means the default, null does not.

    Raises:
        ModelLoadError: Anything else.
    """
    value = config.get(key, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_NUMBER:
        raise ModelLoadError(
            f"config.json has {key} = {value!r:.60}, must be a number from 0 to {MAX_NUMBER:g}"
        )
    return float(value)


def rope_settings(config: Config) -> Config:
    """Merge both spellings: transformers 5 writes `rope_parameters`, earlier ones `rope_scaling`.

    Some writers store every key they know, the unused ones as null: those are left out.
    """
    return {
        **({"rope_theta": config["rope_theta"]} if config.get("rope_theta") else {}),
        **_settings(config, "rope_scaling"),
        **_settings(config, "rope_parameters"),
    }


def _settings(config: Config, key: str) -> Config:
    settings = config.get(key) or {}
    if not isinstance(settings, dict):
        raise ModelLoadError(f"config.json has {key} = {settings!r:.60}, must be an object")
    return {name: value for name, value in settings.items() if value is not None}


def _rope(settings: Config, config: Config) -> Rope:
    # `type` is the older spelling.
    kind = settings.get("rope_type", settings.get("type", "default"))
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    try:
        if kind == "default":
            return Rope(theta)
        if kind == "linear":
            return Rope(theta, kind, factor=float(settings["factor"]))
        if kind == "llama3":
            return Rope(
                theta,
                kind,
                float(settings["factor"]),
                float(settings["low_freq_factor"]),
                float(settings["high_freq_factor"]),
                int(settings["original_max_position_embeddings"]),
            )
    except KeyError as error:
        raise ModelLoadError(f"config.json's {kind} rope scaling lacks {error}") from error
    raise ModelLoadError(
        f"config.json has rope scaling {kind!r}, supported: default, linear, llama3"
    )


def _with_windows(config: Config, traits: Traits, default: str, every: int = 0) -> Traits:
    """Give sliding layers their window.

    `layer_types` decides; without it each `every`-th layer sees everything, the others `default`.
    """
    window = int(config.get("sliding_window") or 0)
    kinds = config.get("layer_types") or [
        "full_attention" if every and (index + 1) % every == 0 else default
        for index in range(len(traits.layers))
    ]
    if len(kinds) != len(traits.layers):
        raise ModelLoadError(
            f"config.json has {len(kinds)} layer_types for {len(traits.layers)} layers"
        )
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelLoadError(f"config.json has layer type {min(unknown)!r}, which is not supported")
    layers = tuple(
        replace(layer, window=window if kind == "sliding_attention" else 0)
        for layer, kind in zip(traits.layers, kinds, strict=True)
    )
    return replace(traits, layers=layers)


def _qwen_windows(config: Config, traits: Traits) -> Traits:
    # Qwen's configs name a window even where it is off.
    if not config.get("use_sliding_window"):
        return traits
    first = int(config.get("max_window_layers") or 0)
    kinds = [
        "sliding_attention" if i >= first else "full_attention" for i in range(len(traits.layers))
    ]
    return _with_windows({"layer_types": kinds, **config}, traits, default="full_attention")
