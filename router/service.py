"""What both doors share: from a validated wish to a stream of events, models, readiness, status.

Owns the making of `GenerateRequest`s, the bounded stream between orchestrator and door, and the
canary. Does not know HTTP or gRPC. Called by `router.openai_door` and `router.grpc_door`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from core import metrics
from core.config import RouterConfig
from core.errors import InvalidRequest, ModelNotFound, NoWorker, PromptTooLong
from core.ids import Ids, RequestId, seed_of
from core.ports import Clock, Tokenizer
from core.session import Role
from core.types import ChoiceFinished, GenerateRequest, Path, RequestEnded, RequestEvent, SamplingParams, TextDelta
from router.admission import Admission
from router.detokenizing import TextModel
from router.links import Links, LinkState
from router.orchestrator import Orchestrator, RequestRun
from router.telemetry import Telemetry

CANARY_TIER = "canary"
CANARY_TIMEOUT_S = 10.0
CANARY_TOKENS = 4
MAX_ID_CHARACTERS = 128


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the router knows of the model without torch."""

    name: str
    vocabulary_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str


class RequestStream:
    """Events of one running request, for one consumer.

    The queue needs no bound of its own: a worker computes at most `credit_positions` beyond what
    the consumer took.
    """

    def __init__(self, orchestrator: Orchestrator, request: GenerateRequest) -> None:
        """Start the request."""
        self.request = request
        self._orchestrator = orchestrator
        self._events: deque[RequestEvent] = deque()
        self._wake = asyncio.Event()
        self._taken: dict[int, int] = {}
        self._open_choices = set(range(request.sampling.n))
        self._task = asyncio.get_running_loop().create_task(orchestrator.run(request, self._emit))

    def _emit(self, event: RequestEvent) -> None:
        self._events.append(event)
        self._wake.set()

    async def next(self) -> RequestEvent:
        """Wait for the next event; `RequestEnded` is the last one."""
        while not self._events:
            self._wake.clear()
            await self._wake.wait()
        event = self._events.popleft()
        if isinstance(event, TextDelta):
            self._taken[event.choice] = event.position + len(event.token_ids)
        elif isinstance(event, ChoiceFinished):
            self._open_choices.discard(event.choice)
        if self._open_choices and self._open_choices <= self._taken.keys():
            # A choice that has ended needs no credit and must not hold back the others.
            self._orchestrator.consumed(self.request.request_id, min(self._taken[c] for c in self._open_choices))
        return event

    async def close(self) -> None:
        """Cancel the request if it still runs, and wait until it is gone."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class GenerationService:
    """The generation service behind the doors."""

    def __init__(  # noqa: PLR0913 - a composition point
        self,
        model: ServedModel,
        config: RouterConfig,
        orchestrator: Orchestrator,
        admission: Admission,
        links: Links,
        tokenizer: Tokenizer,
        text: TextModel,
        clock: Clock,
        ids: Ids,
        seed_key: bytes,
        expected_roles: frozenset[Role],
        *,
        must_cross: bool,
    ) -> None:
        """Keep the collaborators; `start` begins the canary.

        `expected_roles` are the pools the config asks for; with `must_cross` (path pd is forced) the router is
        ready only while all of them live.
        """
        self._expected_roles, self._must_cross, self._has_crossed = expected_roles, must_cross, False
        self.model, self.config, self.text = model, config, text
        self._orchestrator, self._admission, self._links = orchestrator, admission, links
        self._tokenizer, self._clock, self._ids, self._seed_key = tokenizer, clock, ids, seed_key
        self._canary_task: asyncio.Task[None] | None = None
        self.canary_s: float | None = None
        self.canary_error = "no canary has run yet"
        self.read_store_state: Callable[[], str] = lambda: "off"
        self.telemetry = Telemetry(
            {
                metrics.RUNNING: lambda: {"": admission.num_running},
                metrics.QUEUED: lambda: {"": admission.num_queued},
                metrics.WORKERS: self._live_by_role,
            }
        )
        orchestrator.on_ended = self._ended
        orchestrator.on_retry = self.telemetry.retried

    def _ended(self, run: RequestRun, ended: RequestEnded) -> None:
        if run.request.tier != CANARY_TIER:
            self.telemetry.request_ended(run, ended)

    # --- requests -----------------------------------------------------------------------------------

    async def make_request(
        self,
        model: str,
        prompt: str | Sequence[int],
        sampling: SamplingParams,
        request_id: str = "",
        time_limit_s: float | None = None,
    ) -> GenerateRequest:
        """Check a wish and turn it into a request.

        Raises:
            ModelNotFound: Another model is served.
            InvalidRequest: Names the field.
            PromptTooLong: Prompt plus output exceed the context window or every pool.
        """
        if model not in ("", self.model.name):
            raise ModelNotFound(f"model {model[:80]!r} is not served here; served: {self.model.name}")
        if len(request_id) > MAX_ID_CHARACTERS or not (request_id.isascii() and request_id.isprintable()):
            fact = f"has {len(request_id)} characters, must be at most {MAX_ID_CHARACTERS} printable ASCII ones"
            raise InvalidRequest("request_id", fact)
        sampling.validate(self.model.vocabulary_size)
        limit_s = self.config.deadline_s if time_limit_s is None else min(time_limit_s, self.config.deadline_s)
        deadline_at = self._clock.now_s() + limit_s
        token_ids = await self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self._check_prompt(token_ids, sampling)
        chosen_id = RequestId(request_id) if request_id else self._ids.request()
        seed = sampling.seed if sampling.seed is not None else seed_of(chosen_id, self._seed_key)
        return GenerateRequest(
            request_id=chosen_id, model=self.model.name, token_ids=tuple(token_ids), sampling=sampling, seed=seed,
            deadline_at=deadline_at, eos_token_ids=self.model.eos_token_ids,
        )  # fmt: skip

    def _check_prompt(self, token_ids: Sequence[int], sampling: SamplingParams) -> None:
        if not token_ids:
            raise InvalidRequest("prompt", "is empty; send at least one token")
        wrong = next((t for t in token_ids if not 0 <= t < self.model.vocabulary_size), None)
        if wrong is not None:
            raise InvalidRequest("prompt", f"has token id {wrong}, must be from 0 to {self.model.vocabulary_size - 1}")
        total = len(token_ids) + sampling.max_tokens
        if total > self.model.max_model_len:
            raise PromptTooLong(
                f"prompt of {len(token_ids)} tokens plus max_tokens {sampling.max_tokens} is {total}, the context window is "
                f"{self.model.max_model_len}; shorten one of them"
            )
        self._check_pools(total, sampling.n)

    def _check_pools(self, total: int, num_choices: int) -> None:
        """Refuse at the door what the smallest pool could never hold."""
        live = [c.descriptor for c in self._links.candidates()]
        for d in live:
            needed = -(-total // d.block_size_tokens) + num_choices
            if needed > d.num_blocks:
                raise PromptTooLong(
                    f"prompt plus max_tokens is {total} tokens and needs {needed} KV blocks, a worker's pool holds "
                    f"{d.num_blocks}; lower max_tokens or raise engine.num_blocks"
                )

    def open(self, request: GenerateRequest) -> RequestStream:
        """Start a request."""
        return RequestStream(self._orchestrator, request)

    def abort(self, request_id: str) -> bool:
        """Cancel a request by id; False if it is not running."""
        return self._orchestrator.abort(RequestId(request_id))

    # --- canary and status ----------------------------------------------------------------------------

    def start(self) -> None:
        """Begin the canary."""
        self._canary_task = asyncio.get_running_loop().create_task(self._canary())

    async def _canary(self) -> None:
        """Send a small request across both workers again and again: the proof behind /ready."""
        while True:
            changed = self._links.changed
            await self._canary_once()
            is_good = self.canary_s is not None
            try:
                async with asyncio.timeout(self.config.canary_interval_s if is_good else 1.0):
                    await changed.wait()
                    await asyncio.sleep(0.2)  # a change is seldom alone: a link goes, another comes
            except TimeoutError:
                pass

    async def _canary_once(self) -> None:
        missing = self._missing_roles()
        if missing:
            self.canary_s, self.canary_error = None, f"no {' and no '.join(missing)} worker is live"
            return
        started_at = self._clock.now_s()
        prompt = tuple(i % self.model.vocabulary_size for i in range(1, 9))
        request = GenerateRequest(
            request_id=self._ids.request(), model=self.model.name, token_ids=prompt,
            sampling=SamplingParams(temperature=0.0, max_tokens=CANARY_TOKENS, ignore_eos=True), seed=0,
            deadline_at=started_at + CANARY_TIMEOUT_S, tier=CANARY_TIER,
        )  # fmt: skip
        crosses = self._live_roles() == {Role.PREFILL, Role.DECODE}
        ended: list[RequestEvent] = []
        await self._orchestrator.run(request, ended.append, forced_path=Path.PD if crosses else Path.LOCAL)
        last = ended[-1]
        error = last.error if isinstance(last, RequestEnded) else NoWorker("the canary did not end")
        self.canary_s = None if error else self._clock.now_s() - started_at
        self.canary_error = error.message if error else ""
        self._has_crossed = self._has_crossed or (error is None and crosses)

    def _live_roles(self) -> set[Role]:
        return {c.descriptor.role for c in self._links.candidates()}

    def _missing_roles(self) -> list[str]:
        """List roles without which there is no readiness.

        All expected ones before the first canary has crossed, or always when it must cross; later any
        one worker is enough, since requests can run local.
        """
        live = self._live_roles()
        if self._must_cross or not self._has_crossed or not live:
            return sorted(self._expected_roles - live)
        return []

    @property
    def is_ready(self) -> bool:
        """True when the last canary got through and nobody it needs has gone since."""
        return self.canary_s is not None and not self._missing_roles() and not self._admission.is_draining

    def _live_by_role(self) -> dict[str, int]:
        live = [link.descriptor.role for link in self._links.all() if link.state is LinkState.LIVE]
        return {role.value: live.count(role) for role in Role}

    def readiness(self) -> dict[str, Any]:
        """Describe readiness per model."""
        live, links = self._live_by_role(), self._links.all()
        pools = {
            role.value: {"ready": live[role.value], "total": sum(1 for x in links if x.descriptor.role is role)}
            for role in Role
        }
        canary_ms = None if self.canary_s is None else round(self.canary_s * 1000, 3)
        return {
            "ready": self.is_ready,
            "store": self.read_store_state(),
            "models": {self.model.name: {**pools, "canary_ms": canary_ms, "canary_error": self.canary_error}},
        }

    def replicas(self) -> list[dict[str, Any]]:
        """Describe every worker, for `baton status`."""
        return [
            {
                "role": d.role.value, "tier": d.tier, "worker_id": d.worker_id, "pid": d.pid,
                "rank_pids": list(link.rank_pids), "node": d.node, "address": d.session_address,
                "state": link.state.name.lower() if link.is_ready else "restarting",
                "load": {
                    "running": link.load.num_running, "waiting": link.load.num_waiting,
                    "waiting_tokens": link.load.waiting_tokens, "free_blocks": link.load.free_blocks,
                    "cached_blocks": link.load.cached_blocks, "total_blocks": d.num_blocks,
                },
            }
            for link in self._links.all()
            for d in [link.descriptor]
        ]  # fmt: skip

    async def stop(self, grace_s: float = 5.0) -> None:
        """Take nothing new, let requests finish for a while, then end."""
        self._admission.is_draining = True
        if self._canary_task is not None:
            self._canary_task.cancel()
            await asyncio.gather(self._canary_task, return_exceptions=True)
        await self._orchestrator.drain(grace_s)
        self.telemetry.close()
