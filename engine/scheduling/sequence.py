"""One request, or one choice of it, inside one engine.

Owns the mutable state of generation: tokens, counts, block table, status. Does not know blocks'
meaning or the network.

    NEW ──submit──▶ WAITING ──plan──▶ RUNNING ──finish──▶ FINISHED
                       ▲                │ │ prompt computed, KV promised to a peer
                       └───preempt──────┘ └──────────────▶ HOLDING ──release──▶ FINISHED
    NEW ──starting──▶ RESERVING ──blocks──▶ ARRIVING (KV on its way) ──attach──▶ RUNNING
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto
from math import inf
from typing import TypeAlias

from core.block_hash import BlockHash, BlockNaming
from core.ids import Epoch, WorkerId
from core.plan import History, SampleSpec
from core.stored_block import ChainDigest
from core.types import FinishReason, GenerateRequest, Logprob


class Status(Enum):
    """Where a sequence stands."""

    NEW = auto()
    WAITING = auto()
    RUNNING = auto()
    HOLDING = auto()
    RESERVING = auto()
    ARRIVING = auto()
    FINISHED = auto()


UNLIMITED_CREDIT = 2**31
Place: TypeAlias = tuple[float, ...]
"""In a queue: the instant at which a sequence is due, its key, infinity; lower goes first.

Before the infinity there is room for those who go right before it (`place_before`).
"""


@dataclass(slots=True)
class Handover:
    """A prefill sequence's promise to a decode worker."""

    partner: WorkerId = WorkerId("")
    is_announced: bool = False
    """The partner knows that the request is near the head of the line."""
    is_partnered: bool = False
    """The partner has reserved blocks; until then, computed KV may be taken back."""
    ran_ahead: bool = False
    """It was computed before its partner answered, which is done once."""
    is_read: bool = False
    """A transfer may be reading its blocks: they are pinned when they are taken back."""
    first_block: int = 0
    """The partner has the content of the blocks before this one."""
    first_tokens: dict[int, Logprob] = field(default_factory=dict)
    """By choice, once the prompt is computed."""


def place_before(place: Place, key: int) -> Place:
    """Return the place right before another one, behind all that were given before it so far."""
    return (*place[:-1], key, inf)


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and blocks of one choice, or of several until their first token is drawn."""

    key: int
    request: GenerateRequest
    epoch: Epoch
    choices: tuple[int, ...]
    token_ids: list[int]
    """The prompt, then the output."""
    naming: BlockNaming
    block_size_tokens: int
    credit: int
    """Output positions below it may be computed."""
    arrived_at: float
    """At this worker, on its clock (seconds), as the other instants here."""
    due: Place = (0.0, 0, inf)
    """Where it stands in every queue."""
    delay_s: float = 0.0
    """By which its tier stands back."""
    tenant: str = ""
    weight: float = 1.0
    """Of its tenant."""
    number: int = 0
    """Sequences of its tenant that came before it, since the tenant had nothing here."""
    num_overtaken: int = 0
    """Sequences behind it that took blocks while it waited for some."""
    handover: Handover | None = None
    status: Status = Status.NEW
    num_computed_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    spare_blocks: list[int] = field(default_factory=list)
    """Blocks to grow into, one for each choice."""
    parents: list[int] = field(default_factory=list)
    """Identity of what comes before each block, as far as it is known: the root first."""
    started_at: float | None = None
    prompt_done_at: float | None = None
    num_preemptions: int = 0
    num_parkings: int = 0
    """Times it was out of credit: its client did not read."""
    run_alone: bool = False
    """Nobody else may be in its steps: it is suspected of ending ranks."""
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    chain: list[ChainDigest] = field(default_factory=list)
    """Digests of its leading blocks, as far as somebody asked: that of the root first."""
    _hashes: list[BlockHash] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens after the prompt."""
        return len(self.token_ids) - len(self.request.token_ids)

    @property
    def num_missing_tokens(self) -> int:
        """Tokens whose KV is not computed; 1 for a sequence that decodes."""
        return len(self.token_ids) - self.num_computed_tokens

    def yields_to(self, other: Sequence) -> bool:
        """True if the other one is of a higher tier and due before it."""
        return self.delay_s > other.delay_s and self.due > other.due

    def shares_tier_with(self, other: Sequence) -> bool:
        """True if they stand back alike and their tenants take turns."""
        is_other = bool(self.tenant and other.tenant) and self.tenant != other.tenant
        return is_other and self.delay_s == other.delay_s

    @property
    def is_ahead(self) -> bool:
        """True while its partner has not answered: what is computed now may be for nobody."""
        return self.handover is not None and not self.handover.is_partnered

    @property
    def is_finished(self) -> bool:
        """True once its blocks may be gone."""
        return self.status is Status.FINISHED

    @property
    def is_out_of_credit(self) -> bool:
        """True while the client is too far behind for another position."""
        return self.num_output_tokens >= self.credit

    @property
    def needs_prompt_scores(self) -> bool:
        """True while the prompt has to be scored; cached blocks have no scores to give."""
        return self.request.sampling.prompt_logprobs is not None and self.prompt_done_at is None

    def targets(self, start: int, end: int) -> tuple[int, ...]:
        """Prompt tokens that follow positions `start` to `end`, if they are to be scored."""
        if not self.needs_prompt_scores:
            return ()
        return self.request.token_ids[start + 1 : end + 1]

    def full_block_hash(self, index: int) -> BlockHash:
        """Chained hash of the full block `index`; needs all its tokens to be known."""
        # Each block is hashed once, and forks take the hashes along.
        known = len(self._hashes)
        if index >= known:
            size = self.block_size_tokens
            fresh = self.token_ids[known * size : (index + 1) * size]
            self.naming.extend(self._hashes, fresh, size)
        return self._hashes[index]

    def hash_blocks(self) -> None:
        """Work out the hashes of all full blocks; asking for them later costs nothing."""
        if num_full := self.num_tokens // self.block_size_tokens:
            self.full_block_hash(num_full - 1)

    def fork(self, key: int, choice: int) -> Sequence:
        """Make the running sequence of one choice: this one's tokens, blocks and hashes so far.

        The references of the shared blocks are the caller's to take; spare blocks stay here.
        """
        return replace(
            self,
            key=key,
            # Where the prompt stood, yet a place of its own.
            due=place_before(self.due, key),
            choices=(choice,),
            status=Status.RUNNING,
            handover=None,
            token_ids=list(self.token_ids),
            block_table=list(self.block_table),
            spare_blocks=[],
            parents=list(self.parents),
            chain=list(self.chain),
            _hashes=list(self._hashes),
        )

    def block_tokens(self, index: int) -> list[int]:
        """Tokens of block `index` that are known."""
        size = self.block_size_tokens
        return self.token_ids[index * size : (index + 1) * size]

    def sample_specs(self) -> tuple[SampleSpec, ...]:
        """How to draw the next token of each choice."""
        sampling = self.request.sampling
        position = self.num_output_tokens
        banned: tuple[int, ...] = self._ends_of_bad_words()
        # Banned and not ignored: an end that is drawn too early would stay in the output.
        if position < sampling.min_tokens:
            banned += self.request.eos_token_ids + sampling.stop_token_ids
        history = self._history() if sampling.has_penalties else None
        return tuple(
            SampleSpec(choice, position, self.request.seed, sampling, banned, history)
            for choice in self.choices
        )

    def _ends_of_bad_words(self) -> tuple[int, ...]:
        """Tokens that would complete a bad word after what the output ends with."""
        first = len(self.request.token_ids)
        return tuple(
            word[-1]
            for word in self.request.sampling.bad_words
            if self.num_output_tokens >= len(word) - 1
            and tuple(self.token_ids[max(first, len(self.token_ids) - len(word) + 1) :])
            == word[:-1]
        )

    def _history(self) -> History:
        num_prompt_tokens = len(self.request.token_ids)
        # Presence and frequency count the output alone, and a prompt is long to send.
        looks_at_prompt = self.request.sampling.repetition_penalty != 1.0
        start = 0 if looks_at_prompt else num_prompt_tokens
        return History(self.token_ids, start, num_prompt_tokens, self.num_tokens)

    def finish_after(
        self, token_id: int, num_output_tokens: int
    ) -> tuple[FinishReason, int | None] | None:
        """Decide whether an output of `num_output_tokens` ending in `token_id` is final.

        Returns:
            The reason and the stop token that caused it, or None to go on.
        """
        sampling = self.request.sampling
        # Before the length: a stop at the last position is a stop.
        if num_output_tokens > sampling.min_tokens:
            if token_id in sampling.stop_token_ids:
                return FinishReason.STOP, token_id
            if token_id in self.request.eos_token_ids and not sampling.ignore_eos:
                return FinishReason.STOP, None
        if num_output_tokens >= sampling.max_tokens:
            return FinishReason.LENGTH, None
        return None
