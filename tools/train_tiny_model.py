"""Train the tiny model and its draft: byte-level Llamas in Hugging Face format.

Owns the corpus (the interpreter's standard library sources, plus chat and JSON text made here), a
dense Llama written independently of `engine.model` (so that it can serve as a second opinion), the
training loop and the model card. Does not know the serving engine. Called by hand:

    .venv/bin/python tools/train_tiny_model.py            # about 20 minutes on one core
    .venv/bin/python tools/train_tiny_model.py --corpus my.txt --steps 400 --out /tmp/model

Deterministic: one torch thread, every random number from `--seed`. Byte b is token b; the ids from
256 up are special tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

SPECIAL_TOKENS = (
    "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>", "<|extra_0|>",
    "<|extra_1|>",
)  # fmt: skip
BEGIN, END, SYSTEM, USER, ASSISTANT, PAD = range(256, 262)
VOCABULARY = 256 + len(SPECIAL_TOKENS)  # 264, a multiple of 8
CHAT_TEMPLATE = (
    "<|begin|>{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one model."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    steps: int
    head_size: int = 32


TARGET = Shape("baton-tiny", layers=4, width=192, heads=8, kv_heads=2, hidden=512, steps=2600)
DRAFT = Shape("baton-tiny-draft", layers=1, width=96, heads=3, kv_heads=1, hidden=256, steps=2400)


# --- corpus ---------------------------------------------------------------------------------------


def standard_library_text(max_bytes: int = 4_000_000) -> bytes:
    """Sources of the standard library, sorted by name, without tests and data tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {
        "test",
        "tests",
        "site-packages",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "turtledemo",
    }
    total, parts = 0, []
    for path in sorted(root.rglob("*.py")):
        if skip & set(path.relative_to(root).parts):
            continue
        source = path.read_bytes()
        if not source.isascii() or len(source) < 500:
            continue
        parts.append(source)
        total += len(source)
        if total >= max_bytes:
            break
    return b"\n\n".join(parts)


def chat_text(rng: random.Random, num_dialogues: int) -> list[int]:
    """Dialogues from a small grammar of facts, as ids with the chat template's special tokens."""
    capitals = {
        "France": "Paris",
        "Italy": "Rome",
        "Spain": "Madrid",
        "Japan": "Tokyo",
        "Egypt": "Cairo",
        "Norway": "Oslo",
        "Peru": "Lima",
        "Kenya": "Nairobi",
        "Cuba": "Havana",
        "Austria": "Vienna",
    }
    colours = {
        "grass": "green",
        "the sky": "blue",
        "snow": "white",
        "coal": "black",
        "blood": "red",
    }
    ids: list[int] = []
    for _ in range(num_dialogues):
        kind = rng.randrange(6)
        a, b = rng.randrange(1, 13), rng.randrange(1, 13)
        if kind == 0:
            country = rng.choice(sorted(capitals))
            ask, say = (
                f"What is the capital of {country}?",
                f"The capital of {country} is {capitals[country]}.",
            )
        elif kind == 1:
            ask, say = f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
        elif kind == 2:
            thing = rng.choice(sorted(colours))
            ask, say = f"What colour is {thing}?", f"The colour of {thing} is {colours[thing]}."
        elif kind == 3:
            ask = f"Count from {a} to {a + 4}."
            say = ", ".join(str(n) for n in range(a, a + 5)) + "."
        elif kind == 4:
            ask, say = (
                rng.choice(["Hello!", "Good morning.", "Hi."]),
                "Hello! How can I help you today?",
            )
        else:
            record = {
                "name": rng.choice(["Ada", "Alan", "Grace", "Linus"]),
                "age": 20 + a,
                "active": b % 2 == 0,
            }
            ask = f"Give me {record['name']}, {record['age']}, as JSON."
            say = json.dumps(record)
        ids.append(BEGIN)
        if rng.random() < 0.3:
            ids += [SYSTEM, *b"You are a helpful assistant.", END]
        ids += [USER, *ask.encode(), END, ASSISTANT, *say.encode(), END]
    return ids


def json_text(rng: random.Random, num_records: int) -> list[int]:
    """Small JSON documents, one per `<|begin|>`."""
    ids: list[int] = []
    for _ in range(num_records):
        record = {
            "id": rng.randrange(10_000),
            "tool": rng.choice(["search", "weather", "calendar", "mail"]),
            "arguments": {
                "query": rng.choice(["news", "rain", "today", "paris"]),
                "limit": rng.randrange(1, 20),
            },
            "tags": rng.sample(["a", "b", "c", "d"], rng.randrange(1, 4)),
            "ok": rng.random() < 0.5,
        }
        ids += [BEGIN, *json.dumps(record, indent=rng.choice([None, 2])).encode(), END]
    return ids


def build_corpus(extra: Path | None, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Named streams of token ids (int64 [N]): 95 % to train on, the last 5 % held out."""
    rng = random.Random(seed)
    streams = {
        "python": list(standard_library_text()),
        "chat": chat_text(rng, 9_000),
        "json": json_text(rng, 3_000),
    }
    if extra is not None:
        streams["corpus"] = list(extra.read_bytes())
    train, held_out = {}, {}
    for name, ids in streams.items():
        cut = len(ids) * 95 // 100
        train[name], held_out[name] = torch.tensor(ids[:cut]), torch.tensor(ids[cut:])
    return train, held_out


# --- a dense Llama --------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


class Layer(nn.Module):
    """One decoder layer; parameter names are Hugging Face's."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(s.width), RMSNorm(s.width)
        linear = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
        self.self_attn = nn.ModuleDict({
            "q_proj": linear(s.width, s.heads * s.head_size),
            "k_proj": linear(s.width, s.kv_heads * s.head_size),
            "v_proj": linear(s.width, s.kv_heads * s.head_size),
            "o_proj": linear(s.heads * s.head_size, s.width),
        })  # fmt: skip
        self.mlp = nn.ModuleDict({
            "gate_proj": linear(s.width, s.hidden),
            "up_proj": linear(s.width, s.hidden),
            "down_proj": linear(s.hidden, s.width),
        })  # fmt: skip

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (batch, length, _) = self.shape, x.shape
        h = self.input_layernorm(x)
        q, k, v = (
            self.self_attn[f"{n}_proj"](h).view(batch, length, heads, s.head_size).transpose(1, 2)
            for n, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads))
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(s.heads // s.kv_heads, dim=1) for t in (k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.self_attn["o_proj"](a.transpose(1, 2).reshape(batch, length, -1))
        h = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split form."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Llama(nn.Module):
    """Decoder-only transformer with tied embeddings."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.embed_tokens = nn.Embedding(VOCABULARY, s.width)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = RMSNorm(s.width)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = (
                    0.02 / math.sqrt(2 * s.layers)
                    if "o_proj" in name or "down_proj" in name
                    else 0.02
                )
                nn.init.normal_(p, std=std)

    def forward(self, ids: Tensor) -> Tensor:
        half = self.shape.head_size // 2
        angle = torch.outer(
            torch.arange(ids.shape[1]).float(), 10_000.0 ** (-torch.arange(half) / half)
        )
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin())
        return self.norm(x) @ self.embed_tokens.weight.T


# --- training -------------------------------------------------------------------------------------


def sample_batch(
    train: dict[str, Tensor], batch: int, length: int, generator: torch.Generator
) -> Tensor:
    """Random windows, int64 [batch, length + 1]; half Python, the rest of the other streams."""
    names = sorted(train)
    rest = [n for n in names if n != "python"]
    rows = []
    for i in range(batch):
        name = "python" if i % 2 == 0 else rest[i // 2 % len(rest)]
        start = int(torch.randint(len(train[name]) - length - 1, (1,), generator=generator))
        rows.append(train[name][start : start + length + 1])
    return torch.stack(rows)


@torch.no_grad()
def bits_per_byte(model: Llama, ids: Tensor, length: int = 256, windows: int = 64) -> float:
    """Mean cross entropy in bits per token over the first windows of a held-out stream."""
    count = min(windows, (len(ids) - 1) // length)
    x = torch.stack([ids[i * length : i * length + length + 1] for i in range(count)])
    loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    return float(loss) / math.log(2)


def train_model(s: Shape, train: dict[str, Tensor], steps: int, seed: int) -> Llama:
    """AdamW with warm-up and a cosine from 3e-3; prints a progress bar."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Llama(s)
    decay = [p for p in model.parameters() if p.dim() == 2]
    other = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}% loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(s.name, total=steps, loss=float("nan"))
        for step in range(steps):
            scale = min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * max(scale, 0.02)
            x = sample_batch(train, 8, 256, generator)
            loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update(task, advance=1, loss=float(loss.detach()))
    return model.eval()


# --- files ----------------------------------------------------------------------------------------


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: byte b is id b, special tokens follow from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet, extra = {b: chr(b) for b in printable}, 0
    for b in range(256):
        if b not in alphabet:
            alphabet[b], extra = chr(256 + extra), extra + 1
    tokenizer = Tokenizer(models.BPE(vocab={alphabet[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS]
    )
    return tokenizer


def save_model(model: Llama, folder: Path, scores: dict[str, float], steps: int, seed: int) -> None:
    """Write a Hugging Face folder: weights, config, tokenizer, generation config, model card."""
    s = model.shape
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{k}": v.detach().contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
        "hidden_size": s.width, "intermediate_size": s.hidden, "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "head_dim": s.head_size,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None,
        "max_position_embeddings": 2048, "tie_word_embeddings": True, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD,
        "torch_dtype": "float32",
    }  # fmt: skip
    generation = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (
        ("config", config),
        ("generation_config", generation),
        ("tokenizer_config", tokenizer_config),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    rows = "\n".join(f"| {name} | {score:.3f} |" for name, score in scores.items())
    count = sum(p.numel() for p in model.parameters())
    (folder / "README.md").write_text(
        f"# {s.name}\n\nA byte-level Llama of {count:,} parameters ({s.layers} layers, width {s.width}, {s.heads} query and"
        f" {s.kv_heads} KV heads of {s.head_size}), trained by `tools/train_tiny_model.py` for {steps} steps of 2,048 bytes"
        f" (seed {seed}) on the Python standard library's sources and on chat and JSON text made by that script.\n"
        "It exists so that Baton can be seen and tested with a real model on any machine; it knows nothing worth asking.\n\n"
        f"| held-out text (last 5 %) | bits per byte |\n|---|---|\n{rows}\n\n"
        "The standard library is PSF-2.0; these weights are Apache-2.0 like the rest of the "
        "project.\n"
    )


def main() -> None:
    """Train both models and write them under `--out`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "models")
    parser.add_argument("--corpus", type=Path, help="one more text file to learn from")
    parser.add_argument("--steps", type=int, help="steps for both models (default: 2600 and 2400)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    train, held_out = build_corpus(options.corpus, options.seed)
    for s in (DRAFT, TARGET):
        steps = options.steps or s.steps
        model = train_model(s, train, steps, options.seed)
        scores = {name: bits_per_byte(model, ids) for name, ids in held_out.items()}
        save_model(model, options.out / s.name, scores, steps, options.seed)
        print(s.name, {name: round(score, 3) for name, score in scores.items()})


if __name__ == "__main__":
    main()
