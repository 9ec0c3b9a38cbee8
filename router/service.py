"""What the HTTP and the gRPC server share: requests, streams, tokens, and the account of calls.

Owns the composition of one router's service. Does not know HTTP or gRPC; `router.observe.status`
answers what operators ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from core import events, metrics
from core.config import RouterConfig
from core.errors import InvalidRequest, ServingError, SlowReader
from core.ids import Ids, RequestId
from core.ports import Clock, Tokenizer
from core.session import Role
from core.types import ChatPrompt, GenerateRequest, RequestEnded, outside
from router import calls
from router.access.bad_keys import BadKeys
from router.access.credentials import Keyring
from router.admission import CANARY_TIER, Admission
from router.calls import Call
from router.observe.canary import Canary
from router.observe.request_log import RequestLog
from router.observe.shedding import Shedding
from router.observe.status import ClusterStatus
from router.observe.telemetry import Telemetry
from router.observe.why import Explanations
from router.orchestrator import Orchestrator
from router.reply_thread import in_reply_thread
from router.request_builder import RequestBuilder, RequestParams, ServedModel, num_choices
from router.request_state import RequestState
from router.request_stream import StreamGroup
from router.text.detokenizing import TextModel
from router.workers.sessions import WorkerSessions

MAX_DETOKENIZE_TOKENS = 1 << 18


class GenerationService:
    """The generation service behind the servers."""

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
        self.model = model
        self.config = config
        self.text = text
        self._orchestrator = orchestrator
        self._admission = admission
        self._tokenizer = tokenizer
        self._builder = RequestBuilder(
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
        self.status = ClusterStatus(model.name, sessions, admission, self._canary)
        self.keyring = keyring
        self.bad_keys = BadKeys(clock.now_s)
        self._clock = clock
        self._started_at = clock.now_s()
        self._shedding = Shedding(admission, clock.now_s)
        self.explanations = Explanations()
        self._log = RequestLog(clock.now_s) if config.has_request_log else None
        self.telemetry = Telemetry(
            {
                metrics.RUNNING: lambda: {"": admission.num_running},
                metrics.QUEUED: lambda: {"": admission.num_queued},
                metrics.WORKERS: self.status.live_by_role,
                metrics.API_KEYS: keyring.num_by_state,
                metrics.CERTIFICATE_ENDS: self.status.certificate_ends,
                metrics.PROBLEMS: self.status.num_by_problem,
            }
        )
        orchestrator.on_ended = self._ended
        orchestrator.on_refused = self._refused
        orchestrator.attempts.on_retry = self.telemetry.retried

    def _ended(self, run: RequestState, ended: RequestEnded) -> None:
        if run.request.tier == CANARY_TIER:
            return
        call = calls.current()
        self.telemetry.request_ended(run, ended, call.server if call else "")
        self.explanations.note(run, ended)
        if self._log is not None:
            self._log.request_ended(run.request, ended, call)
        if call is not None:
            call.is_recorded = True

    def _refused(self, request: GenerateRequest, error: ServingError) -> None:
        call = calls.current()
        self.telemetry.request_refused(call.server if call else "", error)
        self._shedding.note(error.code)
        if self._log is not None:
            self._log.request_refused(request, error, call)
        if call is not None:
            call.is_recorded = True

    def call_ended(self, call: Call) -> None:
        """Log and count a refused call, unless the request that it started is recorded already.

        Both servers call this, and so does whatever turns a client away before it asked anything.
        """
        if call.is_recorded or not call.code:
            return
        call.is_recorded = True
        self.telemetry.call_refused(call)
        self._shedding.note(call.code)
        if self._log is not None:
            self._log.call_refused(call)

    def connection_refused(self, code: str, address: str) -> None:
        """Log and count an HTTP client that was turned away outside of any request."""
        # The request of a client that leaves its whole answer unread is counted already.
        outcome = "" if code == SlowReader.code else "rejected"
        self.call_ended(Call("http", address, code=code, outcome=outcome))

    # --- requests ---------------------------------------------------------------------------------

    async def make_request(self, params: RequestParams) -> GenerateRequest:
        """Validate parameters and turn them into a request.

        Raises:
            ServingError: Names what is wrong with them.
        """
        self._admission.check_open(params.identity.tenant)
        return await self._builder.make(params)

    async def make_requests(self, all_params: Sequence[RequestParams]) -> list[GenerateRequest]:
        """Make the requests of one reply; ids from the second on end in their index.

        Raises:
            ServingError: One of them is wrong; none is started.
        """
        if all_params:
            self._admission.check_open(all_params[0].identity.tenant)
            self._admission.check_share(len(all_params), num_choices(all_params[0]))
        made: list[GenerateRequest] = []
        for index, params in enumerate(all_params):
            request_id = f"{made[0].request_id}-{index}" if index else params.request_id
            made.append(await self._builder.make(replace(params, request_id=request_id)))
        return made

    def open(self, *requests: GenerateRequest) -> StreamGroup:
        """Start requests; their events come through the group."""
        return StreamGroup(self._orchestrator, requests)

    def abort(self, tenant: str, request_id: str) -> bool:
        """Cancel a tenant's request by id; False if it is not running."""
        return self._orchestrator.abort((tenant, RequestId(request_id)))

    # --- tokens -----------------------------------------------------------------------------------

    async def tokenize(
        self, model: str, prompt: str | ChatPrompt, *, adds_special_tokens: bool, tenant: str = ""
    ) -> tuple[list[int], list[str]]:
        """Return token ids of a text or a conversation, and the vocabulary's name of each.

        Raises:
            ServingError: As for a request with this prompt.
        """
        self._builder.check_model(model)
        if isinstance(prompt, str):
            return await self._tokenizer.encode_with_tokens(
                prompt, adds_special_tokens=adds_special_tokens, tenant=tenant
            )
        ids = list(await self._builder.encode(prompt, tenant=tenant))
        return ids, [self.text.name(i) for i in ids]

    async def detokenize(
        self, model: str, token_ids: Sequence[int], *, skips_special: bool = False
    ) -> str:
        """Return the text of token ids.

        Raises:
            ServingError: Another model is served, or an id is not in the vocabulary.
        """
        self._builder.check_model(model)
        if len(token_ids) > MAX_DETOKENIZE_TOKENS:
            raise InvalidRequest(
                "tokens", f"has {len(token_ids)} entries, the limit is {MAX_DETOKENIZE_TOKENS}"
            )
        wrong = outside(token_ids, self.model.vocabulary_size)
        if wrong is not None:
            raise InvalidRequest(
                "tokens", f"has id {wrong}, must be from 0 to {self.model.vocabulary_size - 1}"
            )
        # The decoder runs without the GIL: the loop serves others meanwhile.
        return await in_reply_thread(
            partial(self.text.text, skips_special=skips_special), token_ids
        )

    # --- life -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the canary, and follow changes of the key file."""
        self._canary.start()
        self.keyring.watch()

    def uptime_s(self) -> float:
        """Seconds since this router was composed."""
        return self._clock.now_s() - self._started_at

    async def stop(self, grace_s: float = 5.0) -> None:
        """Refuse new requests, let running ones finish for `grace_s`, then end the rest."""
        self._admission.is_draining = True
        events.DRAIN_BEGUN.tell(running=self._admission.num_running, grace_s=grace_s)
        await self._canary.stop()
        await self._orchestrator.drain(grace_s)
        events.DRAIN_ENDED.tell(left=self._admission.num_running)
        self.keyring.close()
        self.telemetry.close()
