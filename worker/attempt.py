"""One attempt at one request, as one worker sees it, and what its router has not been sent.

Owns the output log of each choice (so that positions can be sent again), the prompt's scores, how
far they were sent, and how many bytes that takes. Does not know scheduling or streams.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.errors import InvalidRequest
from core.ids import Epoch, RouterId, RunId
from core.session import AttemptEnded, Submit, TokenDelta, Wanted, WorkerTiming
from core.types import MAX_TOP_LOGPROBS, FinishReason, Logprob
from engine.scheduling.sequence import Sequence

TOKEN_BYTES = 8
LOGPROB_BYTES = 24
TOP_BYTES = 20
ROW_BYTES = TOKEN_BYTES + LOGPROB_BYTES + MAX_TOP_LOGPROBS * TOP_BYTES
DELTA_BYTES = 1024
ENDED_BYTES = 6 << 10
"""Upper bounds of what these take on the wire."""
MIN_SHARE_BYTES = 8 << 10
"""Room for any one of them: an attempt that gets so much moves on."""


@dataclass(slots=True)
class ChoiceLog:
    """Tokens of one choice from position `base` on; the first `num_sent` have been sent."""

    base: int
    tokens: list[Logprob] = field(default_factory=list)
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    num_sent: int = 0
    is_finish_sent: bool = False

    @property
    def has_unsent(self) -> bool:
        """True if a delta is due."""
        return self.num_sent < len(self.tokens) or (
            self.finish is not None and not self.is_finish_sent
        )


@dataclass(slots=True)
class FrameShare:
    """What an attempt has put into one frame, and an upper bound of its size there."""

    deltas: list[TokenDelta] = field(default_factory=list)
    ended: list[AttemptEnded] = field(default_factory=list)
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class Attempt:
    """State of one attempt; emptied when its router cancels or forgets it."""

    router_id: RouterId
    submit: Submit
    run_id: RunId = field(init=False)
    """The run's id."""
    epoch: Epoch = field(init=False)
    """The attempt's number."""
    sequences: list[Sequence] = field(default_factory=list)
    logs: dict[int, ChoiceLog] = field(default_factory=dict)
    timings: WorkerTiming | None = None
    prompt_logprobs: tuple[Logprob, ...] = ()
    num_scores_sent: int = 0
    is_timing_sent: bool = False
    ended: AttemptEnded | None = None
    is_end_sent: bool = False
    finished_choices: set[int] = field(default_factory=set)
    """Those that the client no longer waits for."""

    def __post_init__(self) -> None:
        """Take over from the Submit what is asked for at every token, and what had finished."""
        self.run_id = self.submit.run_id
        self.epoch = self.submit.epoch
        self.finished_choices.update(self.submit.finished_choices)

    @property
    def open_choices(self) -> tuple[int, ...]:
        """Choices that the client still waits for."""
        all_choices = range(self.submit.request.sampling.n)
        return tuple(c for c in all_choices if c not in self.finished_choices)

    @property
    def is_whole(self) -> bool:
        """True when every choice that the client waits for has finished."""
        return all(c in self.logs and self.logs[c].finish is not None for c in self.open_choices)

    @property
    def has_unsent(self) -> bool:
        """True while there is something that the router has not been sent."""
        return self._has_unsent_output or (self.ended is not None and not self.is_end_sent)

    @property
    def _has_unsent_scores(self) -> bool:
        return self.num_scores_sent < len(self.prompt_logprobs)

    @property
    def _has_unsent_output(self) -> bool:
        # A plain loop: it runs for every attempt of every frame.
        for choice, log in self.logs.items():
            if log.has_unsent and choice not in self.finished_choices:
                return True
        return self._has_unsent_scores

    def append(self, choice: int, position: int, token: Logprob) -> ChoiceLog:
        """Log a token; a position that is already there is left alone. Returns the choice's log."""
        log = self.logs.get(choice)
        if log is None:
            log = self.logs[choice] = ChoiceLog(base=position)
        # What stands may have been sent, so a position that comes again never replaces it.
        if position - log.base >= len(log.tokens):
            log.tokens.append(token)
        return log

    def take(self, room_bytes: int) -> FrameShare:
        """Take what is unsent, as far as there is room; it counts as sent from now on.

        Args:
            room_bytes: At least `MIN_SHARE_BYTES`.
        """
        share = FrameShare()
        for choice, log in self.logs.items():
            left_bytes = room_bytes - share.num_bytes - DELTA_BYTES
            # Less room than for one row: a delta would have a head and nothing in it.
            if choice in self.finished_choices or left_bytes < ROW_BYTES:
                continue
            if log.has_unsent or self._has_unsent_scores:
                self._take_delta(choice, log, left_bytes, share)
        # The end goes last: a router that has it waits for nothing more of this attempt.
        is_end_due = not self._has_unsent_output and not self.is_end_sent
        if self.ended is not None and is_end_due and room_bytes - share.num_bytes >= ENDED_BYTES:
            share.ended.append(self.ended)
            share.num_bytes += ENDED_BYTES
            self.is_end_sent = True
        return share

    def _take_delta(self, choice: int, log: ChoiceLog, room_bytes: int, share: FrameShare) -> None:
        """Add one delta: the prompt's scores, when they are all sent the tokens, then the end."""
        start = self.num_scores_sent
        # A router takes scores before tokens, so no token goes out while a score is unsent.
        scores, num_score_bytes = _fitting(self.prompt_logprobs, start, room_bytes, has_top=True)
        self.num_scores_sent += len(scores)
        is_scored = not self._has_unsent_scores
        left_bytes = room_bytes - num_score_bytes if is_scored else 0
        position = log.num_sent
        has_top = self.submit.request.sampling.logprobs is not None
        tokens, num_token_bytes = _fitting(log.tokens, position, left_bytes, has_top=has_top)
        log.num_sent += len(tokens)
        # A finish closes its choice, so it goes with the last token and not before.
        is_all = is_scored and log.num_sent == len(log.tokens)
        log.is_finish_sent = is_all and log.finish is not None
        share.num_bytes += DELTA_BYTES + num_score_bytes + num_token_bytes
        share.deltas.append(
            TokenDelta(
                run_id=self.run_id,
                epoch=self.epoch,
                choice=choice,
                position=log.base + position,
                token_ids=tuple(t.token_id for t in tokens),
                logprobs=tokens if has_top else (),
                finish=log.finish if is_all else None,
                stop_token_id=log.stop_token_id if is_all else None,
                timings=self.timings if is_scored and not self.is_timing_sent else None,
                prompt_logprobs=scores,
                prompt_start=start,
            )
        )
        self.is_timing_sent = self.is_timing_sent or is_scored

    def drop_output(self) -> None:
        """Forget what is logged: it cannot be sent, and only the attempt's end will be."""
        self.logs.clear()
        self.prompt_logprobs = ()
        self.num_scores_sent = 0

    def rewind(self, wanted: Wanted) -> None:
        """After a reconnect: what the router does not list as received is sent again.

        Raises:
            InvalidRequest: It does not list every choice; nothing was changed.
        """
        n = self.submit.request.sampling.n
        num_listed = len(wanted.next_positions)
        if num_listed != n:
            raise InvalidRequest("next_positions", f"are {num_listed}, the request has {n} choices")
        for choice, log in self.logs.items():
            # Clamped: a router may have come further, or less far, than this worker's log goes.
            log.num_sent = min(max(wanted.next_positions[choice] - log.base, 0), len(log.tokens))
            # A finish, an end and a timing can be received twice without harm, but not go missing.
            log.is_finish_sent = False
        self.num_scores_sent = min(wanted.num_scores, len(self.prompt_logprobs))
        self.is_end_sent = False
        self.is_timing_sent = False


def _fitting(
    rows: list[Logprob] | tuple[Logprob, ...], start: int, room_bytes: int, *, has_top: bool
) -> tuple[tuple[Logprob, ...], int]:
    """Take rows from `start` on while there is room; returns them and their size in bytes."""
    end = start
    num_bytes = 0
    while end < len(rows):
        size = TOKEN_BYTES
        size += LOGPROB_BYTES + TOP_BYTES * len(rows[end].top) if has_top else 0
        if num_bytes + size > room_bytes:
            break
        end += 1
        num_bytes += size
    return tuple(rows[start:end]), num_bytes
