"""Whether a prompt that could cross to its decode worker is computed on that one instead.

Owns the comparison of prices. Does not know how costs are predicted, or which workers could serve.

    price = seconds to the first token + seconds that the sequences beside it lose together

A prompt that is computed on another worker takes nothing from sequences that decode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from core.config import PlacementConfig
from router.cost import Cost

MAX_SPEED_RATIO = 10.0
"""Of two measured speeds that are further apart, one is taken for a measurement gone wrong."""


@dataclass(frozen=True, slots=True)
class PathChoice:
    """The outcome, and why."""

    local: Cost | None
    """Of the worker that serves alone; None: the prompt crosses."""
    reason: str


def choose_path(across: Cost, local: Sequence[Cost], rules: PlacementConfig) -> PathChoice:
    """Let a short prompt stay; compare prices for any other.

    What cannot be compared crosses: then `local_below_tokens` alone has decided.

    Args:
        across: Of the best sender, with its transfer.
        local: Of workers that could serve alone, the best first; at least one.
        rules: What is short, and what a longer prompt must save to stay.
    """
    best = local[0]
    if best.uncached_tokens < rules.local_below_tokens:
        tokens = f"{best.uncached_tokens} tokens"
        if best.cached_tokens:
            tokens += f", without {best.cached_tokens} cached at {best.worker_id},"
        return PathChoice(best, f"prompt of {tokens} is below {rules.local_below_tokens}")
    best = min(local, key=lambda cost: cost.price_s)
    doubt = _doubt(best, across)
    if doubt:
        return PathChoice(None, f"prompt is worth a transfer: {doubt}")
    prices = (
        f"{best.total_s * 1e3:.0f} ms at {best.worker_id} and {best.delay_s * 1e3:.0f} ms for "
        f"others there, {across.price_s * 1e3:.0f} ms across"
    )
    if across.price_s - best.price_s <= rules.min_local_saving * across.price_s:
        return PathChoice(None, f"prompt is worth a transfer: {prices}")
    if best.cached_tokens > across.cached_tokens:
        return PathChoice(best, f"{best.worker_id} holds {best.cached_tokens} tokens: {prices}")
    return PathChoice(best, f"prompt is not worth a transfer: {prices}")


def _doubt(best: Cost, across: Cost) -> str:
    """Say why the prices cannot be compared; nothing if they can."""
    if not math.isfinite(best.price_s) or not math.isfinite(across.price_s):
        return "a prediction is no number"
    speeds = across.measured_tokens_per_s, best.measured_tokens_per_s
    # Without any measurement both count as equally fast: whoever holds more is cheaper then, too.
    if not speeds[0] and best.cached_tokens <= across.cached_tokens:
        return f"the speed of {across.worker_id} is not measured"
    if all(speeds) and max(speeds) > MAX_SPEED_RATIO * min(speeds):
        return (
            f"{speeds[0]:.0f} tokens/s at {across.worker_id} and {speeds[1]:.0f} at "
            f"{best.worker_id} are too far apart"
        )
    return ""
