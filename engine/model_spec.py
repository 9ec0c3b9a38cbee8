"""What a Hugging Face folder holds, read without torch.

Owns the parsing of `config.json` and `generation_config.json`, the list of tensors a model must
have, and the strict comparison with the safetensors headers, in both directions. Does not load
weights. Called by `engine.weights`, by the worker (for its layout) and by `baton check-config`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ModelLoadError
from core.kv_layout import KVLayout

ARCHITECTURES = ("LlamaForCausalLM",)
MAX_HEADER_BYTES = 100 << 20
MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's stretching of low rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes and switches of one decoder-only transformer."""

    folder: Path
    name: str
    architecture: str
    digest: str
    vocabulary_size: int
    width: int
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_model_len: int
    is_tied: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    tensor_files: dict[str, str]

    def layout(self, block_size_tokens: int) -> KVLayout:
        """KV layout of one unsharded worker."""
        return KVLayout(self.digest, self.dtype, self.num_layers, self.num_kv_heads, self.head_size, block_size_tokens)

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor the folder must hold, no more and no fewer."""
        q, kv = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary_size, self.width),
            "model.norm.weight": (self.width,),
        }
        if not self.is_tied:
            shapes["lm_head.weight"] = (self.vocabulary_size, self.width)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            shapes |= {
                f"{prefix}input_layernorm.weight": (self.width,),
                f"{prefix}post_attention_layernorm.weight": (self.width,),
                f"{prefix}self_attn.q_proj.weight": (q, self.width),
                f"{prefix}self_attn.k_proj.weight": (kv, self.width),
                f"{prefix}self_attn.v_proj.weight": (kv, self.width),
                f"{prefix}self_attn.o_proj.weight": (self.width, q),
                f"{prefix}mlp.gate_proj.weight": (self.hidden, self.width),
                f"{prefix}mlp.up_proj.weight": (self.hidden, self.width),
                f"{prefix}mlp.down_proj.weight": (self.width, self.hidden),
            }
        return shapes


def read_model(folder: Path, dtype: str = "auto", max_model_len: int = 0, name: str = "") -> ModelSpec:
    """Read a folder's description and check that its tensors are exactly those expected.

    Args:
        folder: Hugging Face folder.
        dtype: `auto` keeps the stored one.
        max_model_len: Longest prompt plus output (tokens); 0: the model's own.
        name: Name in the API; empty: the folder's.

    Raises:
        ModelLoadError: Names the file, key or tensor at fault, and what was expected.
    """
    config = _read_json(folder / "config.json")
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ModelLoadError(
            f"architecture {architecture} of {folder.name} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ModelLoadError(f"config.json has {key} = true, which {architecture} here does not support")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelLoadError(f"config.json has hidden_act {config['hidden_act']}, only silu is supported")
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    own_len = _positive(config, "max_position_embeddings")
    if max_model_len > own_len:
        raise ModelLoadError(f"model.max_model_len {max_model_len} is above the model's own {own_len}")
    headers = _tensor_headers(folder)
    num_heads = _positive(config, "num_attention_heads")
    spec = ModelSpec(
        folder=folder,
        name=name or folder.name,
        architecture=architecture,
        digest=_digest(folder, sorted({file for file, _ in headers.values()})),
        vocabulary_size=_positive(config, "vocab_size"),
        width=_positive(config, "hidden_size"),
        hidden=_positive(config, "intermediate_size"),
        num_layers=_positive(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_size=config.get("head_dim") or _positive(config, "hidden_size") // num_heads,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(config),
        rope_scaling=_rope_scaling(config),
        max_model_len=max_model_len or own_len,
        is_tied=bool(config.get("tie_word_embeddings", False)),
        dtype=_dtype(config, dtype),
        eos_token_ids=_eos(config, generation),
        tensor_files={tensor: file for tensor, (file, _) in headers.items()},
    )
    if spec.num_heads % spec.num_kv_heads:
        raise ModelLoadError(f"{spec.num_heads} query heads cannot be shared by {spec.num_kv_heads} KV heads")
    _compare(spec.expected_tensors(), {tensor: shape for tensor, (_, shape) in headers.items()}, is_tied=spec.is_tied)
    return spec


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelLoadError(f"{path.name} has more than {MAX_JSON_BYTES} bytes")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"{path.parent.name}/{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelLoadError(f"{path.parent.name}/{path.name} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ModelLoadError(f"{path.parent.name}/{path.name} holds a {type(tree).__name__}, must be an object")
    return tree


def _positive(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelLoadError(f"config.json has {key} = {value!r}, must be a positive integer")
    return value


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes `rope_parameters`, earlier ones `rope_theta` and `rope_scaling`.
    return {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def _rope_theta(config: dict[str, Any]) -> float:
    return float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10_000.0)


def _rope_scaling(config: dict[str, Any]) -> RopeScaling | None:
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelLoadError(f"config.json has rope scaling {kind!r}, supported: default, llama3")
    try:
        return RopeScaling(
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise ModelLoadError(f"config.json's llama3 rope scaling lacks {error}") from error


def _dtype(config: dict[str, Any], wish: str) -> str:
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    chosen = stored if wish == "auto" else wish
    if chosen == "float16":
        chosen = "bfloat16"  # no fp16 kernels on CPU; bf16 has the range, so nothing overflows
    if chosen not in ("float32", "bfloat16"):
        raise ModelLoadError(f"weights of dtype {chosen} are not supported; set model.dtype to float32 or bfloat16")
    return chosen


def _eos(config: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _tensor_headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(f"{folder.name} holds no *.safetensors file; other weight formats are not read")
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        for tensor, shape in _read_header(folder / file).items():
            if tensor in found:
                raise ModelLoadError(f"tensor {tensor} is in {found[tensor][0]} and in {file}")
            found[tensor] = (file, shape)
    return found


def _read_header(path: Path) -> dict[str, tuple[int, ...]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ModelLoadError(f"{path.name} is not a safetensors file: its header claims {length} of {size} bytes")
        try:
            header = json.loads(file.read(length))
            shapes = {name: tuple(info["shape"]) for name, info in header.items() if name != "__metadata__"}
            end = max((info["data_offsets"][1] for name, info in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{path.name} has a malformed safetensors header: {error}") from error
    if 8 + length + end != size:
        raise ModelLoadError(
            f"{path.name} has {size} bytes, its header describes {8 + length + end}; it is truncated or damaged"
        )
    return shapes


def _digest(folder: Path, files: list[str]) -> str:
    """Fingerprint of the weights: headers, sizes, and the first and last MiB of every file."""
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=8)
    for name in files:
        path = folder / name
        digest.update(f"{name}:{path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def _compare(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], *, is_tied: bool) -> None:
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(found.keys() - expected.keys())
    if is_tied:
        surplus = [name for name in surplus if name != "lm_head.weight"]  # a stored copy of the embedding
    wrong = [f"{n} is {list(found[n])}, must be {list(s)}" for n, s in expected.items() if n in found and found[n] != s]
    problems = [
        f"{len(names)} {what}, first {names[0]}"
        for what, names in (("missing", missing), ("surplus", surplus), ("misshapen", sorted(wrong)))
        if names
    ]
    if problems:
        raise ModelLoadError("tensors do not match config.json: " + "; ".join(problems))
