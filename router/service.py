"""What both doors share: requests, streams, tokens, models, readiness, status.

Owns the composition of the router's parts into one service. Does not know HTTP or gRPC.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from core import events, metrics
from core.config import RouterConfig
from core.errors import InvalidRequest, Overloaded, ServingError, SlowReader
from core.ids import Ids, RequestId
from core.ports import Clock, Tokenizer
from core.session import Role, RouteReport, WorkerDescriptor
from core.types import ChatPrompt, GenerateRequest, RequestEnded, outside
from router import calls
from router.access.bad_keys import BadKeys
from router.access.credentials import Keyring
from router.admission import CANARY_TIER, Admission
from router.calls import Call
from router.observe.canary import Canary
from router.observe.readiness import PROBLEMS, View, num_usable, pools_of, state_of
from router.observe.request_log import RequestLog
from router.observe.shedding import Shedding
from router.observe.telemetry import Telemetry
from router.orchestrator import Orchestrator
from router.reply_thread import in_reply_thread
from router.request_builder import RequestBuilder, RequestParams, ServedModel, num_choices
from router.request_state import RequestState
from router.request_stream import StreamGroup
from router.text.detokenizing import TextModel
from router.workers.session import SessionState
from router.workers.sessions import WorkerSessions

MAX_DETOKENIZE_TOKENS = 1 << 18


class GenerationService:
    """The generation service behind the doors."""

    def __init__(  # noqa: PLR0913 - a composition point
        self,
        model: ServedModel,
        config: RouterConfig,
        orchestrator: Orchestrator,
        admission: Admission,
        sessions: WorkerSessions,
        tokenizer: Tokenizer,
        text: TextModel,
        clock: Clock,
        ids: Ids,
        seed_key: bytes,
        keyring: Keyring,
        expected_roles: frozenset[Role],
        *,
        must_cross: bool,
    ) -> None:
        """Compose; `start` begins what runs without calls."""
        self.model, self.config, self.text = model, config, text
        self._orchestrator = orchestrator
        self._admission = admission
        self._sessions = sessions
        self._tokenizer = tokenizer
        self._maker = RequestBuilder(
            model,
            config,
            tokenizer,
            clock,
            ids,
            seed_key,
            lambda: [c.descriptor for c in sessions.candidates()],
            text,
        )
        self._canary = Canary(
            model, config, orchestrator, sessions, clock, ids, expected_roles, must_cross=must_cross
        )
        self.keyring = keyring
        self.bad_keys = BadKeys(clock.now_s)
        self._measuring = asyncio.Lock()
        self._clock, self._started_at = clock, clock.now_s()
        self._shedding = Shedding(admission, clock.now_s)
        self._log = RequestLog(clock.now_s) if config.has_request_log else None
        self.read_store_state: Callable[[], str] = lambda: "off"
        self.read_certificate_ends: Callable[[], dict[str, int]] = dict
        self.configured: Mapping[Role, int] = {}
        """Workers that each pool should have."""
        self.telemetry = Telemetry(
            {
                metrics.RUNNING: lambda: {"": admission.num_running},
                metrics.QUEUED: lambda: {"": admission.num_queued},
                metrics.WORKERS: self._live_by_role,
                metrics.API_KEYS: keyring.num_by_state,
                metrics.CERTIFICATE_ENDS: self._certificate_ends,
                metrics.PROBLEMS: self._num_by_problem,
            }
        )
        orchestrator.on_ended = self._ended
        orchestrator.on_refused = self._refused
        orchestrator.on_retry = self.telemetry.retried

    def _ended(self, run: RequestState, ended: RequestEnded) -> None:
        if run.request.tier == CANARY_TIER:
            return
        call = calls.current()
        self.telemetry.request_ended(run, ended, call.door if call else "")
        if self._log is not None:
            self._log.request_ended(run.request, ended, call)
        if call is not None:
            call.is_told = True

    def _refused(self, request: GenerateRequest, error: ServingError) -> None:
        call = calls.current()
        self.telemetry.request_refused(call.door if call else "", error)
        self._shedding.note(error.code)
        if self._log is not None:
            self._log.request_refused(request, error, call)
        if call is not None:
            call.is_told = True

    def call_ended(self, call: Call) -> None:
        """Tell and count a call that was refused, unless a request of its own has been told.

        Both doors, and whatever turns a client away before it has asked for anything, say it here.
        """
        if call.is_told or not call.code:
            return
        call.is_told = True
        self.telemetry.call_refused(call)
        self._shedding.note(call.code)
        if self._log is not None:
            self._log.call_refused(call)

    def connection_refused(self, code: str, address: str) -> None:
        """Tell and count a client of the HTTP door that was turned away outside of any request.

        The request of one that leaves its whole answer unread is counted already.
        """
        outcome = "" if code == SlowReader.code else "rejected"
        self.call_ended(Call("http", address, code=code, outcome=outcome))

    # --- requests ---------------------------------------------------------------------------------

    async def make_request(self, params: RequestParams) -> GenerateRequest:
        """Check a wish and turn it into a request.

        Raises:
            ServingError: Names what is wrong with it.
        """
        self._admission.check_open(params.identity.tenant)
        return await self._maker.make(params)

    async def make_requests(self, all_params: Sequence[RequestParams]) -> list[GenerateRequest]:
        """Make the requests of one reply; from the second on, ids end in their number.

        Raises:
            ServingError: One of them is wrong; none is started.
        """
        if all_params:
            self._admission.check_open(all_params[0].identity.tenant)
            self._admission.check_share(len(all_params), num_choices(all_params[0]))
        made: list[GenerateRequest] = []
        for index, params in enumerate(all_params):
            request_id = f"{made[0].request_id}-{index}" if index else params.request_id
            made.append(await self._maker.make(replace(params, request_id=request_id)))
        return made

    def open(self, *requests: GenerateRequest) -> StreamGroup:
        """Start requests."""
        return StreamGroup(self._orchestrator, requests)

    def abort(self, tenant: str, request_id: str) -> bool:
        """Cancel a tenant's request by id; False if it is not running."""
        return self._orchestrator.abort((tenant, RequestId(request_id)))

    # --- tokens -----------------------------------------------------------------------------------

    async def tokenize(
        self, model: str, prompt: str | ChatPrompt, *, adds_special_tokens: bool, tenant: str = ""
    ) -> tuple[list[int], list[str]]:
        """Token ids of a text or a conversation, and each token as the vocabulary names it.

        Raises:
            ServingError: As for a request with this prompt.
        """
        self._maker.check_model(model)
        if isinstance(prompt, str):
            return await self._tokenizer.encode_with_tokens(
                prompt, adds_special_tokens=adds_special_tokens, tenant=tenant
            )
        ids = list(await self._maker.encode(prompt, tenant=tenant))
        return ids, [self.text.name(i) for i in ids]

    async def detokenize(
        self, model: str, token_ids: Sequence[int], *, skips_special: bool = False
    ) -> str:
        """Text of token ids.

        Raises:
            ServingError: Another model is served, or an id is not in the vocabulary.
        """
        self._maker.check_model(model)
        if len(token_ids) > MAX_DETOKENIZE_TOKENS:
            raise InvalidRequest(
                "tokens", f"has {len(token_ids)} entries, the limit is {MAX_DETOKENIZE_TOKENS}"
            )
        wrong = outside(token_ids, self.model.vocabulary_size)
        if wrong is not None:
            raise InvalidRequest(
                "tokens", f"has id {wrong}, must be from 0 to {self.model.vocabulary_size - 1}"
            )
        # The decoder runs without the interpreter's lock: meanwhile the loop serves others.
        return await in_reply_thread(
            partial(self.text.text, skips_special=skips_special), token_ids
        )

    # --- readiness and status ---------------------------------------------------------------------

    def start(self) -> None:
        """Begin the canary, and to look at the key file."""
        self._canary.start()
        self.keyring.watch()

    def tell_readiness(self, tell: Callable[[bool], Awaitable[None]]) -> None:
        """Let somebody know after every canary whether the router is ready."""
        self._canary.on_checked = tell

    @property
    def is_ready(self) -> bool:
        """True when a request can get through."""
        return self._canary.is_good and not self._admission.is_draining

    def _certificate_ends(self) -> dict[str, int]:
        return self.read_certificate_ends()

    def _live_by_role(self) -> dict[str, int]:
        sessions = self._sessions.all()
        return {role.value: num_usable(sessions, role) for role in Role}

    def _view(self) -> View:
        return View(
            sessions=self._sessions.all(),
            configured=self.configured,
            store=self.read_store_state(),
            is_draining=self._admission.is_draining,
            is_starting=not self._canary.has_passed,
            canary_error=self._canary.error,
        )

    def _num_by_problem(self) -> dict[str, int]:
        found = Counter(problem.code for problem in self._view().problems())
        return {code: found[code] for code in PROBLEMS}

    def readiness(self) -> dict[str, Any]:
        """Describe readiness per model, and everything that is not as configured."""
        view = self._view()
        problems = view.problems()
        canary_ms = None if self._canary.took_s is None else round(self._canary.took_s * 1000, 3)
        return {
            "ready": self.is_ready,
            "state": state_of(problems, is_ready=self.is_ready),
            "problems": [problem.tree() for problem in problems],
            "store": view.store,
            "models": {
                self.model.name: {
                    **pools_of(view.sessions, self.configured),
                    "canary_ms": canary_ms,
                    "canary_error": self._canary.error,
                }
            },
        }

    def replicas(self) -> list[dict[str, Any]]:
        """Describe every worker, for `baton status`."""
        return [
            {
                "role": d.role.value,
                "tier": d.tier,
                "worker_id": d.worker_id,
                "pid": d.pid,
                "rank_pids": list(session.rank_pids),
                "node": d.node,
                "address": d.session_address.rpartition("@")[2],
                "state": session.state.name.lower() if session.is_ready else "restarting",
                "load": {
                    "running": session.load.num_running,
                    "waiting": session.load.num_waiting,
                    "waiting_tokens": session.load.waiting_tokens,
                    "free_blocks": session.load.free_blocks,
                    "cached_blocks": session.load.cached_blocks,
                    "total_blocks": d.num_blocks,
                },
            }
            for session in self._sessions.all()
            for d in [session.descriptor]
        ]

    def routes(self) -> list[dict[str, Any]]:
        """Describe how KV goes between workers, as found when they met or were measured last."""
        senders = {x.descriptor.transfer_address: x.descriptor for x in self._sessions.all()}
        return [
            _route(senders[address], session.descriptor, route)
            for session in self._sessions.all()
            for address, route in session.routes.reports.items()
            if address in senders
        ]

    async def measure_routes(self, mib: int) -> list[dict[str, Any]]:
        """Move some MiB over every way and describe it.

        Raises:
            Overloaded: Somebody is measuring; two at once would measure one another, and load the
                workers twice.
        """
        if self._measuring.locked():
            raise Overloaded(
                "the links are being measured for somebody else; try again in some seconds", 5.0
            )
        async with self._measuring:
            return [_route(*found) for found in await self._sessions.measure(mib << 20)]

    def uptime_s(self) -> float:
        """Seconds since this router was made."""
        return self._clock.now_s() - self._started_at

    def load(self) -> dict[str, Any]:
        """Describe the load of the router and of each pool."""
        pools: dict[str, dict[str, int]] = {
            role.value: {
                "replicas": 0,
                "running": 0,
                "waiting": 0,
                "waiting_tokens": 0,
                "free_blocks": 0,
            }
            for role in Role
        }
        for session in self._sessions.all():
            pool = pools[session.descriptor.role.value]
            pool["replicas"] += session.state is SessionState.LIVE
            pool["running"] += session.load.num_running
            pool["waiting"] += session.load.num_waiting
            pool["waiting_tokens"] += session.load.waiting_tokens
            pool["free_blocks"] += session.load.free_blocks + session.load.cached_blocks
        running, queued = self._admission.num_running, self._admission.num_queued
        return {
            "server_load": running + queued,
            "running": running,
            "queued": queued,
            "pools": pools,
        }

    async def stop(self, grace_s: float = 5.0) -> None:
        """Take nothing new, let requests finish for a while, then end."""
        self._admission.is_draining = True
        events.DRAIN_BEGUN.tell(running=self._admission.num_running, grace_s=grace_s)
        await self._canary.stop()
        await self._orchestrator.drain(grace_s)
        events.DRAIN_ENDED.tell(left=self._admission.num_running)
        self.keyring.close()
        self.telemetry.close()


def _route(
    sender: WorkerDescriptor, receiver: WorkerDescriptor, route: RouteReport
) -> dict[str, Any]:
    return {
        "prefill": sender.worker_id,
        "decode": receiver.worker_id,
        "transport": route.transport,
        "round_trip_ms": round(route.round_trip_s * 1000, 3),
        "gb_per_s": round(route.gb_per_s, 3) or None,
        "error": route.error or None,
    }
