"""One attempt at one request, as one worker sees it, and what the router still has to hear of it.

Owns the output log of each choice (so that positions can be sent again) and how far it was sent.
Does not know scheduling or streams. Called by `worker.worker` (writes) and `worker.sessions`
(reads).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.ids import Epoch, RequestId, RouterId
from core.session import AttemptEnded, PhaseTimings, Submit, TokenDelta
from core.types import FinishReason, Logprob
from engine.sequence import Sequence


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


@dataclass(slots=True, eq=False)
class Attempt:
    """State of one attempt; owned by `Worker`, emptied when its router cancels or forgets it."""

    router_id: RouterId
    submit: Submit
    sequences: list[Sequence] = field(default_factory=list)
    logs: dict[int, ChoiceLog] = field(default_factory=dict)
    timings: PhaseTimings | None = None
    prompt_logprobs: tuple[Logprob, ...] = ()
    is_timing_sent: bool = False
    ended: AttemptEnded | None = None
    is_end_sent: bool = False

    @property
    def request_id(self) -> RequestId:
        """The request."""
        return self.submit.request.request_id

    @property
    def epoch(self) -> Epoch:
        """The attempt's number."""
        return self.submit.epoch

    @property
    def open_choices(self) -> tuple[int, ...]:
        """Choices that the client still waits for."""
        done = self.submit.finished_choices
        return tuple(c for c in range(self.submit.request.sampling.n) if c not in done)

    def append(self, choice: int, position: int, token: Logprob) -> bool:
        """Log a token; a position that is already there is left alone.

        Returns:
            True if it was new.
        """
        log = self.logs.setdefault(choice, ChoiceLog(base=position))
        if position - log.base < len(log.tokens):
            return False
        log.tokens.append(token)
        return True

    def take_deltas(self) -> list[TokenDelta]:
        """Take what is unsent, as deltas; it counts as sent from now on."""
        deltas = []
        for choice, log in self.logs.items():
            if not log.has_unsent:
                continue
            fresh = log.tokens[log.num_sent :]
            wants_logprobs = self.submit.request.sampling.logprobs is not None
            deltas.append(
                TokenDelta(
                    request_id=self.request_id,
                    epoch=self.epoch,
                    choice=choice,
                    position=log.base + log.num_sent,
                    token_ids=tuple(t.token_id for t in fresh),
                    logprobs=tuple(fresh) if wants_logprobs else (),
                    finish=log.finish,
                    stop_token_id=log.stop_token_id,
                    timings=None if self.is_timing_sent else self.timings,
                    prompt_logprobs=() if self.is_timing_sent else self.prompt_logprobs,
                )
            )
            log.num_sent = len(log.tokens)
            log.is_finish_sent = log.finish is not None
            self.is_timing_sent = True
        return deltas

    def rewind(self, next_positions: tuple[int, ...]) -> None:
        """After a reconnect: positions from these on were not received."""
        for choice, log in self.logs.items():
            log.num_sent = min(max(next_positions[choice] - log.base, 0), len(log.tokens))
            log.is_finish_sent = False
        self.is_end_sent = False
        self.is_timing_sent = False
