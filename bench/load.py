"""The load of `baton bench serve`: which requests, and when each is due.

Owns arrivals (closed loop, Poisson, gamma, trace) and prompts, all from one seed. Does not know
HTTP.

Gaps are gamma distributed with shape `burstiness` and mean 1 / rate: 1 is Poisson, less is
burstier. A trace row's block ids become block contents, so equal ids give equal tokens, and prefix
caches see what they saw in production.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError

FIRST_TOKEN_ID = 3
"""In most vocabularies, lower ids are special tokens."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: due `due_s` after the start (None: as soon as there is room)."""

    index: int
    due_s: float | None
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Shape:
    """The load that the user asked for."""

    requests: int
    input_tokens: int
    output_tokens: int
    rate: float = 0.0
    burstiness: float = 1.0
    trace: str = ""
    trace_divide: int = 1
    trace_block_tokens: int = 512
    """Tokens that each of the trace's `hash_ids` stands for."""
    speed: float = 1.0
    seed: int = 0
    vocabulary_size: int = 256


def plan(shape: Shape) -> list[Planned]:
    """Make every request of a run.

    Raises:
        ConfigError: The trace cannot be read.
    """
    rng = random.Random(shape.seed)  # noqa: S311 - a load, not a secret
    if shape.trace:
        return [*_from_trace(shape, rng)]
    due_s = 0.0
    planned = []
    for index in range(shape.requests):
        prompt = _tokens(rng, shape.input_tokens, shape.vocabulary_size)
        planned.append(Planned(index, due_s if shape.rate else None, prompt, shape.output_tokens))
        if shape.rate:
            due_s += rng.gammavariate(shape.burstiness, 1 / (shape.rate * shape.burstiness))
    return planned


def _tokens(rng: random.Random, count: int, vocabulary_size: int) -> tuple[int, ...]:
    low = min(FIRST_TOKEN_ID, vocabulary_size - 1)
    return tuple(rng.randrange(low, vocabulary_size) for _ in range(count))


def _from_trace(shape: Shape, rng: random.Random) -> Iterator[Planned]:
    for index, row in enumerate(_rows(Path(shape.trace))):
        if index == shape.requests:
            return
        try:
            size = max(1, int(row["input_tokens"]) // shape.trace_divide)
            output = max(1, int(row["output_tokens"]) // shape.trace_divide)
            due_s = float(row["arrival_s"]) / shape.speed
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"trace row {index + 1} lacks or garbles {error}; see `baton bench serve --help`"
            ) from error
        yield Planned(index, due_s, _prompt(row.get("hash_ids") or [], size, shape, rng), output)


def _prompt(hash_ids: list[int], size: int, shape: Shape, rng: random.Random) -> tuple[int, ...]:
    """Concatenate the blocks; fill the rest with random tokens."""
    tokens: list[int] = []
    block = max(1, shape.trace_block_tokens // shape.trace_divide)
    for block_id in hash_ids:
        # From the id alone: equal ids are equal tokens in every row and every run.
        of_block = random.Random(f"{shape.seed}:{block_id}")  # noqa: S311
        tokens += _tokens(of_block, block, shape.vocabulary_size)
    tokens = tokens[:size]
    return (*tokens, *_tokens(rng, size - len(tokens), shape.vocabulary_size))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a trace: JSON lines or CSV, gzipped or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            if ".jsonl" in path.name:
                yield from (json.loads(line) for line in lines)
            else:
                yield from csv.DictReader(lines)
    except (OSError, ValueError) as error:
        raise ConfigError(f"trace {path.name} cannot be read: {error}") from error
