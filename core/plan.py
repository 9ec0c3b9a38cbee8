"""One engine step as plain integers: what to compute, and what came out.

Owns the contract between scheduler and runner. Does not know tensors, clocks or requests.

A plan copies neither block tables nor histories: it refers to the sequence's own lists, which only
the scheduler changes: it may append, and never changes the stated part while a step runs. A reader
looks at the stated part of a list and keeps nothing of it past the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from core.types import Logprob, SamplingParams

NOTHING_TO_DRAW = "every token of the vocabulary is banned"
"""Why a sequence failed whose own request left no token to draw: the client's mistake."""


@dataclass(frozen=True, slots=True)
class History:
    """The tokens that penalties look at. All samples of an item share one.

    `token_ids` is the sequence's own list: the prompt, then the output. Those from `start` to
    `num_tokens` count, of which the ones before `num_prompt_tokens` are the prompt. While a key is
    not released, its list only grows.
    """

    token_ids: Sequence[int]
    start: int
    num_prompt_tokens: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """One draw: the request's parameters, and what only this token of this choice has.

    `position` is the output position: 0 for the first token. `seed` is the run's, also where the
    parameters leave it open. `history` is there if the parameters have penalties.
    """

    choice: int
    position: int
    seed: int
    params: SamplingParams
    banned: tuple[int, ...] = ()
    history: History | None = None


@dataclass(frozen=True, slots=True)
class StepItem:
    """One sequence's share of a step: compute KV for `token_ids` at `start`, then maybe sample.

    `block_table` is the sequence's own list and covers every position up to
    `start + len(token_ids)`; entries behind those are none of the step's business. While a key is
    not released, entries before the block of `start` stay as they were in its earlier items: the
    scheduler appends, or replaces the block that it is about to write (copy on write). `samples` is
    empty while prompt tokens remain; several entries draw the first token of several choices.
    `targets` are the tokens that follow the first rows, to be scored with their
    `num_target_logprobs` likeliest rivals.
    """

    sequence_key: int
    start: int
    token_ids: tuple[int, ...]
    block_table: Sequence[int]
    samples: tuple[SampleSpec, ...] = ()
    scope: str = ""
    targets: tuple[int, ...] = ()
    num_target_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Empty plans are not executed.

    `released` are the keys of sequences that ended or gave up their blocks since the last executed
    plan: what is remembered of them is forgotten before the items are read, in which such a key may
    stand again with a new table. Every key that was in an executed plan is released once it is out;
    keys that never were may be named too. `arrived` blocks came from another worker or
    a storage tier since the last executed plan; then `copies` (source, destination block) are done.
    """

    step_id: int
    items: tuple[StepItem, ...]
    copies: tuple[tuple[int, int], ...] = ()
    report_layers: bool = False
    arrived: tuple[int, ...] = ()
    released: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return sum(len(item.token_ids) for item in self.items)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sampled tokens by (sequence key, choice), and the sequences that failed, with the reason."""

    step_id: int
    tokens: dict[tuple[int, int], Logprob] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    scored: dict[int, tuple[Logprob, ...]] = field(default_factory=dict)
    """By sequence key: the log probabilities of an item's `targets`."""
