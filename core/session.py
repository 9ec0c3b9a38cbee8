"""The messages between a router and a worker on their one session stream.

    router -> worker   Hello, Submit, Cancel, Credit, OfferPrefix, ConnectPeers, RouterHeartbeat
    worker -> router   Welcome, StepFrame, Progress, PeerReport

Owns the messages as frozen values. Does not know how they are encoded. Durations travel, instants
never do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from core.errors import ServingError
from core.ids import Epoch, Incarnation, RouterId, RunId, TransferId, WorkerId
from core.types import FinishReason, GenerateRequest, Logprob


class Role(StrEnum):
    """Which pool a worker belongs to. Any worker can execute any task."""

    PREFILL = "prefill"
    DECODE = "decode"


class PoolId(NamedTuple):
    """One pool of workers: what they are for, and whose they are."""

    role: Role
    tier: str = ""
    """Whose own pool it is; empty: all tiers share it."""

    def __str__(self) -> str:
        """Write it as names of workers and deployments begin: `decode`, `decode-batch`."""
        return f"{self.role.value}-{self.tier}" if self.tier else self.role.value

    @classmethod
    def parse(cls, text: str) -> PoolId:
        """Read what `str` has written."""
        role, _, tier = text.partition("-")
        return cls(Role(role), tier)

    @property
    def setting(self) -> str:
        """The key of its settings in a config."""
        return f"tiers.{self.tier}.pools.{self.role}" if self.tier else f"pools.{self.role}"


class Task(StrEnum):
    """What a worker does in one attempt."""

    PREFILL = "prefill"
    DECODE = "decode"
    LOCAL = "local"


@dataclass(frozen=True, slots=True)
class WorkerDescriptor:
    """Who a worker is and what it can hold; constant for one incarnation."""

    worker_id: WorkerId
    role: Role
    incarnation: Incarnation
    session_address: str
    transfer_address: str
    model: str
    content_digest: str
    block_size_tokens: int
    num_blocks: int
    max_model_len: int
    tier: str = ""
    """Whose own pool it is in; empty: all tiers share it."""
    node: str = ""
    pid: int = 0
    rank_pids: tuple[int, ...] = ()
    exports_kv: bool = True
    """What it computes can be read by peers; a decode worker's device keeps it to itself."""

    @property
    def pool(self) -> PoolId:
        """The pool that it is in."""
        return PoolId(self.role, self.tier)


@dataclass(frozen=True, slots=True)
class Wanted:
    """After a reconnect: an attempt the router still wants, and how far it has come.

    The limit of the last Credit is repeated because that message may have been lost with the
    stream; without it a parked sequence would wait for ever.
    """

    run_id: RunId
    epoch: Epoch
    next_positions: tuple[int, ...]
    """Per choice."""
    credit: int = 0
    num_scores: int = 0
    """Prompt log probabilities that have come."""
    finished_choices: tuple[int, ...] = ()
    is_coming: bool = False
    """Its Submit follows on this stream, perhaps again: the last stream may have brought it."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Open or re-open a session; attempts not in `wanted` are cancelled.

    `stream_number` rises over a router's streams: one that was dialled earlier and comes later is
    refused.
    """

    router_id: RouterId
    wanted: tuple[Wanted, ...] = ()
    stream_number: int = 0


@dataclass(frozen=True, slots=True)
class PrefixSource:
    """A peer was asked by `OfferPrefix` to send the first `num_tokens` of a prompt.

    Fetching them is worth a wait of `wait_s`; then they are computed, as after any failure.
    """

    transfer_id: TransferId
    peer_address: str
    num_tokens: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class Submit:
    """Take part in one attempt. `emitted[c]` are the tokens of choice c the client already has.

    The request goes by its run's id: see `run_id`.
    """

    request: GenerateRequest
    epoch: Epoch
    task: Task
    emitted: tuple[tuple[int, ...], ...]
    finished_choices: tuple[int, ...] = ()
    credit: int = 256
    transfer_id: TransferId = TransferId(b"")
    peer_id: WorkerId = WorkerId("")
    peer_incarnation: Incarnation = Incarnation(0)
    peer_address: str = ""
    run_alone: bool = False
    age_s: float = 0.0
    """Seconds since the router received the request: one that moves keeps its place in line."""
    prefix_source: PrefixSource | None = None
    """For a task that computes the prompt."""

    @property
    def run_id(self) -> RunId:
        """What the router calls this run; it stands where the client's id stood."""
        return RunId(self.request.request_id)


@dataclass(frozen=True, slots=True)
class Cancel:
    """The router no longer wants this attempt (and any older one)."""

    run_id: RunId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Credit:
    """Positions below `limit` may be computed for every choice but the finished ones.

    The router ends a choice at a stop string, of which workers know nothing; it reports that here.
    """

    run_id: RunId
    epoch: Epoch
    limit: int
    finished_choices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OfferPrefix:
    """Send a peer the leading blocks of a prompt that are cached here, by an ordinary transfer.

    `token_ids` are those of the prefix and one more; what is not cached is not offered.
    """

    transfer_id: TransferId
    token_ids: tuple[int, ...]
    scope: str
    receiver_id: WorkerId
    receiver_incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class ConnectPeers:
    """These peers may be named in Submits: open KV routes to them now.

    Each route is measured with `probe_bytes`.
    """

    addresses: tuple[str, ...]
    probe_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RouterHeartbeat:
    """Nothing else to send; renews the leases of this router's requests."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """The worker's answer to Hello."""

    descriptor: WorkerDescriptor


class FetchOutcome(StrEnum):
    """How the fetch of a prefix ended; unless it was fetched, it was computed."""

    FETCHED = "fetched"
    HELD = "held"
    """It was here already."""
    NO_ROOM = "no_room"
    NOT_HELD = "not_held"
    """The peer has it no more, or serves too many already."""
    LATE = "late"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What became of a `PrefixSource`; `outcome` is empty where there was none."""

    outcome: str = ""
    num_tokens: int = 0
    """Tokens that came."""
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerTiming:
    """Durations (seconds) and sizes of a worker's task, zero where it had none."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    cached_tokens: int = 0
    kv_bytes: int = 0
    kv_blocks: int = 0
    kv_transport: str = ""
    kv_fragments_resent: int = 0
    fetch: FetchReport = FetchReport()


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens of one choice, numbered; `finish` closes the choice after the last of them.

    Prompt log probabilities, if they were asked for, go before any token, over as many deltas as
    they need; a delta may bring some of them and no token.
    """

    run_id: RunId
    epoch: Epoch
    choice: int
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    timings: WorkerTiming | None = None
    """With the first tokens of an attempt: what this worker has spent so far."""
    prompt_logprobs: tuple[Logprob, ...] = ()
    prompt_start: int = 0
    """How many of them were in earlier deltas."""


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """A worker's task is over: done when `error` is None."""

    run_id: RunId
    epoch: Epoch
    task: Task
    timings: WorkerTiming
    error: ServingError | None = None


@dataclass(frozen=True, slots=True)
class StepFrame:
    """Everything one router needs to know after an engine step."""

    step_id: int
    deltas: tuple[TokenDelta, ...] = ()
    ended: tuple[AttemptEnded, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """A worker's load, for placement and for `baton status`."""

    num_waiting: int = 0
    num_running: int = 0
    waiting_tokens: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    num_preemptions: int = 0
    """Since the worker's start."""


@dataclass(frozen=True, slots=True)
class StorageLoad:
    """A storage tier below a worker's pool."""

    tier: str
    blocks: int
    """That it holds now."""
    hit_blocks: int
    """Loaded into the pool since the worker's start."""
    faults: Mapping[str, int] = field(default_factory=dict)
    """Blocks that could not be written or read since then, by `StorageFault`."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Counters sent every 500 ms, idle or busy. Work in hand and no movement for 3 s means hung."""

    steps: int
    layers_done: int
    work_in_hand: bool
    load: Load = field(default_factory=Load)
    rank_pids: tuple[int, ...] = ()
    is_ready: bool = True
    is_leaving: bool = False
    """It drains, and ends when its requests have moved."""
    storage: tuple[StorageLoad, ...] = ()


@dataclass(frozen=True, slots=True)
class RouteReport:
    """How KV would come from a peer: transport, round trip, speed (0: not measured); or why not."""

    address: str
    transport: str = ""
    round_trip_s: float = 0.0
    gb_per_s: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class PeerReport:
    """What a worker found when it connected to its peers."""

    routes: tuple[RouteReport, ...]


ToWorker = Hello | Submit | Cancel | Credit | OfferPrefix | ConnectPeers | RouterHeartbeat
ToRouter = Welcome | StepFrame | Progress | PeerReport
