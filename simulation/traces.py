"""Traces of requests: their arrival, their lengths, and which blocks begin their prompts.

Owns the formats, their errors and the ideal hit rate of a trace. Does not know clusters or time.

JSON lines or CSV, gzipped or not. Each field has a name here and those that known publishers use:

    here             Mooncake, Bailian          Azure              BurstGPT
    arrival_s        timestamp (in ms; in s)    TIMESTAMP          Timestamp
    input_tokens     input_length               ContextTokens      Request tokens
    output_tokens    output_length              GeneratedTokens    Response tokens
    hash_ids         hash_ids                   one for each block, chained over all before it
    session, t_in_session_s                     for arrival_s: each turn waits for the last one
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from core.errors import ConfigError

ARRIVALS = ("arrival_s", "timestamp", "TIMESTAMP", "Timestamp")
INPUTS = ("input_tokens", "input_length", "ContextTokens", "Request tokens")
OUTPUTS = ("output_tokens", "output_length", "GeneratedTokens", "Response tokens")
MAX_TOKENS = 100_000_000
"""Of one request; more is a broken file."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace."""

    arrival_s: float
    """Since the start of the trace; in a session, since the start of the session."""
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    session: str = ""
    """Requests of one session follow one another; empty: it comes when it comes."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The requests in order, and the tokens that one of their block ids stands for."""

    requests: tuple[TraceRequest, ...]
    block_tokens: int

    @property
    def longest_tokens(self) -> int:
        """Longest prompt."""
        return max(request.input_tokens for request in self.requests)


def read_trace(path: Path, block_tokens: int = 0) -> Trace:
    """Read a trace.

    Args:
        path: The file.
        block_tokens: Tokens of a block; 0: worked out from the lengths.

    Raises:
        ConfigError: It cannot be read; names the row and what is wrong with it.
    """
    requests: list[TraceRequest] = []
    is_in_ms = False
    for number, row in enumerate(_rows(path), 1):
        if number == 1:
            # Mooncake counts milliseconds under the name under which Bailian counts seconds.
            is_in_ms = "timestamp" in row and "chat_id" not in row
        try:
            requests.append(_request(row))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{path}, row {number}: {_what(error)}") from error
    if not requests:
        raise ConfigError(f"{path} has no requests")
    if not requests[0].session:
        start_s = min(request.arrival_s for request in requests)
        unit_s = 1e-3 if is_in_ms else 1.0
        requests = [
            replace(request, arrival_s=(request.arrival_s - start_s) * unit_s)
            for request in requests
        ]
        requests.sort(key=lambda request: request.arrival_s)
    return Trace(tuple(requests), _block_tokens(path, requests, block_tokens))


def ideal_hit_rate(trace: Trace) -> float:
    """Share of prompt tokens that one cache without bounds would have had at their arrival."""
    seen: set[int] = set()
    num_hit = 0
    num_tokens = 0
    for request in trace.requests:
        num_tokens += request.input_tokens
        num_blocks = 0
        for block in request.hash_ids:
            if block not in seen:
                break
            num_blocks += 1
        num_hit += min(num_blocks * trace.block_tokens, request.input_tokens)
        seen.update(request.hash_ids)
    return num_hit / num_tokens


def _what(error: Exception) -> str:
    """Name what is wrong with a row."""
    if isinstance(error, KeyError):
        return f"has no {error.args[0]}"
    return str(error)


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    is_csv = path.name.removesuffix(".gz").endswith(".csv")
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as lines:
            if is_csv:
                yield from csv.DictReader(lines)
                return
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ConfigError(f"{path}, line {number}: is no JSON object")
                yield row
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, RecursionError) as error:
        raise ConfigError(
            f"{path}, line {number}: {error}; a trace is JSON lines or CSV (*.csv, *.csv.gz)"
        ) from error


def _request(row: Mapping[str, Any]) -> TraceRequest:
    session = row.get("session")
    arrival = row["t_in_session_s"] if session is not None else _field(row, ARRIVALS)
    hash_ids = row.get("hash_ids") or ()
    if not isinstance(hash_ids, list | tuple) or not all(type(h) is int for h in hash_ids):
        raise ValueError("hash_ids is no list of integers")
    return TraceRequest(
        arrival_s=_seconds(arrival),
        input_tokens=_count(row, INPUTS),
        output_tokens=_count(row, OUTPUTS),
        hash_ids=tuple(hash_ids),
        session="" if session is None else f"s{session}",
    )


def _field(row: Mapping[str, Any], names: Sequence[str]) -> Any:  # noqa: ANN401 - any JSON
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise KeyError(f"{names[0]} (nor {', '.join(names[1:])})")


def _count(row: Mapping[str, Any], names: Sequence[str]) -> int:
    number = float(_field(row, names))
    if not 0 <= number <= MAX_TOKENS:
        raise ValueError(f"{names[0]} is {number:g}, must be from 0 to {MAX_TOKENS}")
    return max(1, int(number))


def _seconds(value: Any) -> float:  # noqa: ANN401 - any JSON
    try:
        seconds = float(value)
    except ValueError:
        # Azure: a date and a time with seven digits of a second, of which Python knows six.
        seconds = datetime.fromisoformat(value.strip()[:26]).timestamp()
    if not abs(seconds) < 1e12:
        raise ValueError(f"arrival_s is {seconds}")
    return seconds


def _block_tokens(path: Path, requests: Sequence[TraceRequest], wanted: int) -> int:
    """Work out the size of a block from the prompt with the most of them."""
    longest = max(requests, key=lambda request: len(request.hash_ids))
    num_blocks = len(longest.hash_ids)
    if num_blocks == 0:
        return wanted or 16
    size = wanted
    if not size:
        size = 1
        while size * num_blocks < longest.input_tokens - size + 1:
            size *= 2
    if not (num_blocks - 2) * size <= longest.input_tokens <= (num_blocks + 2) * size:
        raise ConfigError(
            f"{path}: {num_blocks} blocks of {size} tokens are no prompt of "
            f"{longest.input_tokens} tokens; set the tokens of a block with --block-tokens"
        )
    return size
