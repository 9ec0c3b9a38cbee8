"""What the HTTP and the gRPC server share: requests, streams, tokens, and the router's life.

Owns the way from a client's parameters to a running request, and what starts and stops with a
router. Does not know HTTP or gRPC; `router.observe.status` answers what operators ask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from core import events
from core.config import RouterConfig
from core.errors import InvalidRequest
from core.ids import RequestId
from core.ports import Clock, Tokenizer
from core.types import ChatPrompt, GenerateRequest, RequestEnded, outside
from router import calls
from router.access.bad_keys import BadKeys
from router.access.credentials import Keyring
from router.access.identities import Identity, Right
from router.admission import Admission
from router.charging import Charging, ReplyCharge
from router.observe.canary import Canary
from router.observe.explanations import Explanations
from router.observe.prefix_report import ReadReport
from router.observe.prompt_report import PromptReport
from router.observe.recorder import Recorder
from router.observe.status import ClusterStatus
from router.observe.telemetry import Telemetry
from router.reply_thread import in_reply_thread
from router.request_builder import RequestBuilder
from router.request_params import RequestParams, ServedModel, num_choices
from router.request_stream import RequestRunner, StreamGroup
from router.text.detokenizing import TextModel
from router.turns import Turns

MAX_DETOKENIZE_TOKENS = 1 << 18


class GenerationService:
    """The generation service behind the servers."""

    def __init__(  # noqa: PLR0913 - what both servers share meets here
        self,
        *,
        model: ServedModel,
        config: RouterConfig,
        runner: RequestRunner,
        admission: Admission,
        builder: RequestBuilder,
        tokenizer: Tokenizer,
        text: TextModel,
        canary: Canary,
        status: ClusterStatus,
        telemetry: Telemetry,
        recorder: Recorder,
        keyring: Keyring,
        read_prefix_report: ReadReport,
        explanations: Explanations,
        prompt_report: PromptReport,
        charging: Charging,
        clock: Clock,
    ) -> None:
        """Serve with these parts; `start` begins what runs without calls."""
        self.read_prefix_report = read_prefix_report
        self.explanations = explanations
        self._prompt_report = prompt_report
        self.model = model
        self.config = config
        self.text = text
        self.status = status
        self.telemetry = telemetry
        self.recorder = recorder
        self.keyring = keyring
        self.charging = charging
        self.bad_keys = BadKeys(clock.now_s)
        self._runner = runner
        self._admission = admission
        self._builder = builder
        self._tokenizer = tokenizer
        self._canary = canary
        self._clock = clock
        self._turns = Turns()
        self._started_at = clock.now_s()

    # --- requests ---------------------------------------------------------------------------------

    def arrive(self, identity: Identity) -> None:
        """Count a caller's request as arriving before it is read; `calls.arrived` ends that.

        Raises:
            Overloaded: No tier open to it has room in time.
            Draining: The router is shutting down.
        """
        tiers = self._builder.tiers_open_to(identity)
        calls.arrives(self._admission.arrive(identity.tier, identity.tenant, tiers))

    @contextmanager
    def _arriving(self, params: RequestParams) -> Iterator[None]:
        """Count a request as arriving in the tier that it asks for, while it is prepared."""
        calls.arrived()
        tier = self._builder.tier_of(params)
        calls.asks_for(tier)
        leave = self._admission.arrive(tier, params.identity.tenant, is_whole=True)
        try:
            yield
        finally:
            leave()

    async def prepare(
        self, all_params: Sequence[RequestParams], *, is_resumable: bool = False
    ) -> tuple[list[GenerateRequest], ReplyCharge | None]:
        """Make the requests of one reply, and charge them to their key.

        Args:
            all_params: What one caller has asked for, in one call.
            is_resumable: The client learns the first one's id, and may come back with it.

        Returns:
            The requests, whose ids from the second on end in their index, and what `open` gets.

        Raises:
            ServingError: One of them is wrong, or the key's quota is used up; none is started.
        """
        with self._arriving(all_params[0]):
            made = await self._made(all_params)
            # After tokenizing, which says what they cost, and before any other work.
            charge = await self.charging.charge(all_params, made, is_resumable=is_resumable)
        return made, charge

    async def _made(self, all_params: Sequence[RequestParams]) -> list[GenerateRequest]:
        self._admission.check_share(len(all_params), num_choices(all_params[0]))
        made: list[GenerateRequest] = []
        for index, params in enumerate(all_params):
            # Ids that follow from the first: who resumes the reply names that one alone.
            request_id = f"{made[0].request_id}-{index}" if index else params.request_id
            made.append(await self._builder.make(replace(params, request_id=request_id)))
        return made

    async def explain_prompt(self, params: RequestParams) -> dict[str, Any]:
        """Say who holds how much of a prompt, and where its request would go now.

        Raises:
            ServingError: As for a request with these parameters.
        """
        return await self._prompt_report.of(await self._builder.make(params))

    def open(self, *requests: GenerateRequest, charge: ReplyCharge | None = None) -> StreamGroup:
        """Start requests; their events come through the group, and their ends settle `charge`."""
        if charge is None:
            return StreamGroup(self._runner, requests, self._turns)

        def request_ended(ended: RequestEnded | None) -> None:
            cost = charge.request_ended(ended)
            if cost is not None:
                self.explanations.note_cost((r.run_key for r in requests), cost)

        return StreamGroup(self._runner, requests, self._turns, request_ended)

    def explain_request(self, names: Sequence[str], identity: Identity) -> dict[str, Any]:
        """Say why a request that has ended went where it did; tenants see their own.

        Args:
            names: What its id may be; the first that is known counts.
            identity: Who asks.

        Raises:
            RequestNotFound: None such is remembered.
        """
        sees_all = identity.has(Right.OBSERVE)
        for name in names:
            found = self.explanations.of(name, None if sees_all else identity.tenant)
            if found is not None:
                return found
        raise self.explanations.not_found(names[0], sees_all=sees_all)

    def abort(self, tenant: str, request_id: str) -> bool:
        """Cancel a tenant's request by id; False if it is not running."""
        return self._runner.abort((tenant, RequestId(request_id)))

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
        """Start the canary, follow changes of the key file, and share quotas with other routers."""
        self._canary.start()
        self.charging.start()
        self.keyring.watch()

    def uptime_s(self) -> float:
        """Seconds since this router was composed."""
        return self._clock.now_s() - self._started_at

    async def stop(self, grace_s: float = 5.0) -> None:
        """Refuse new requests, let running ones finish for `grace_s`, then end the rest."""
        # First of all: `/ready` says so at once, and balancers send the next request elsewhere.
        self._admission.is_draining = True
        events.DRAIN_BEGUN.log(running=self._admission.num_running, grace_s=grace_s)
        await self._canary.stop()
        await self._runner.drain(grace_s)
        await self.charging.stop()
        events.DRAIN_ENDED.log(left=self._admission.num_running)
        self.keyring.close()
        self.telemetry.close()
