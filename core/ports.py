"""The ports: every way in which the core touches the world.

Owns the protocols behind which production and simulation stand. Does not know either.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from core.ids import WorkerLife
from core.plan import StepPlan, StepResult
from core.session import WorkerDescriptor
from core.stored_block import StorageFault, StoredBlock
from core.types import ChatPrompt


class StreamClosed(Exception):
    """The stream ended: the peer closed or reset it, or the connection was lost."""


class Clock(Protocol):
    """Monotonic seconds."""

    def now_s(self) -> float:
        """Return the current instant."""
        ...


class MessageStream(Protocol):
    """An ordered, bidirectional stream of messages: session values or raw transfer bytes."""

    transport: str
    """Name of the transport: shm, grpc, gloo and so on."""

    async def send(self, message: Any) -> None:  # noqa: ANN401 - a transport does not look inside
        """Send one message; waits while the peer's window is full, which holds 64 or more.

        Raises:
            StreamClosed: The stream has ended.
        """
        ...

    async def recv(self) -> Any:  # noqa: ANN401
        """Wait for the next message; bytes of it are valid until the next call.

        Raises:
            StreamClosed: The stream has ended and nothing is left to read.
        """
        ...

    async def close(self) -> None:
        """End the stream in good order; what was sent still arrives."""
        ...

    def reset(self) -> None:
        """Cut the stream at once; both sides see `StreamClosed`."""
        ...


StreamHandler = Callable[[MessageStream], Awaitable[None]]


class Network(Protocol):
    """Makes streams. One object carries one kind of stream (sessions, or transfers)."""

    async def dial(self, address: str) -> MessageStream:
        """Open a stream.

        Raises:
            StreamClosed: Nobody listens there.
        """
        ...

    async def listen(self, on_stream: StreamHandler) -> str:
        """Serve on a free port; returns the address to publish, without `;`."""
        ...

    async def close(self) -> None:
        """Stop listening and end every stream."""
        ...


OnLayer = Callable[[int, int], None]


class Runner(Protocol):
    """Executes step plans: rank processes, or the hash model."""

    async def execute(self, plan: StepPlan, on_layer: OnLayer) -> StepResult:
        """Run one step.

        `on_layer(step_id, layer)` is called as each layer's KV is complete, if
        `plan.report_layers`.

        Raises:
            WorkerLost: The rank group died; its KV pool is gone.
        """
        ...


@dataclass(frozen=True, slots=True)
class SharedPool:
    """A KV pool's segments as files: a name that changes with them, descriptors, sizes (bytes)."""

    name: bytes
    fds: tuple[int, ...]
    sizes: tuple[int, ...]


@runtime_checkable
class MappedStream(MessageStream, Protocol):
    """A stream between processes that share memory: KV need not travel on it."""

    peer_segments: list[memoryview] | None
    """The peer's KV pool, read-only, on the end that dialled."""

    pool_name: bytes
    """`SharedPool.name` of the accepting end's pool when the stream was dialled."""


class KVBytes(Protocol):
    """The bytes of a KV pool: `[layer][block]` in one segment per shard."""

    @property
    def generation(self) -> int:
        """Return how often the segments were replaced; raised before they change.

        Whoever keeps views compares it: views of replaced segments stay readable, and mean nothing.
        """
        ...

    def segments(self) -> list[memoryview]:
        """Return the whole of every shard, uint8 [pool bytes], writable, not copied."""
        ...

    def shared(self) -> SharedPool | None:
        """Return the same as files that another process can map, if they are."""
        ...

    def view(self, layer: int, block_id: int, shard: int) -> memoryview:
        """Return one layer of one block, uint8 [layer_block_bytes], writable, not copied."""
        ...


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """A block that goes between a pool and a slot of a store."""

    block: StoredBlock
    block_id: int
    slot: int


class BlockStore(Protocol):
    """Slots for blocks outside the pool: host memory, a disk.

    Which block lies in which slot is the caller's to know, who uses a slot for one thing at a time.
    The store proves it: a block is read if the slot holds exactly this one, as it was written.
    """

    async def write(
        self, copies: Sequence[BlockCopy], pool: KVBytes, is_still: Callable[[BlockCopy], bool]
    ) -> Sequence[StorageFault | None]:
        """Copy blocks out of the pool; returns one result each, None for a copy that stands.

        Args:
            copies: Which, and where to.
            pool: Theirs; others may write to a block that is not theirs any more.
            is_still: Asked after a block's bytes were taken and before its slot says so, perhaps
                in another thread: False if they may be another's. Then the slot holds nothing, for
                this life and the next.
        """
        ...

    async def read(
        self, copies: Sequence[BlockCopy], pool: KVBytes
    ) -> Sequence[StorageFault | None]:
        """Copy blocks into the pool, up to the first that fails; returns one result for each tried.

        What a failed copy leaves in its block of the pool is anything.
        """
        ...

    async def find(self) -> Sequence[tuple[int, StoredBlock]]:
        """Return what lies in which slot from an earlier life; called once, before anything else.

        Its bytes are compared when they are read, not now.
        """
        ...

    async def close(self) -> None:
        """Let go of files and threads; copies under way end first."""
        ...


class Membership(Protocol):
    """Who is alive."""

    def members(self) -> tuple[WorkerDescriptor, ...]:
        """Return the last known members; never waits."""
        ...

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call `on_change` after every change."""
        ...

    def is_starting(self) -> bool:
        """True while more workers are expected, so that a request may wait for one."""
        ...


class StoreFailed(Exception):
    """The advisory store did not answer in time, or not well."""


class MemberStore(Protocol):
    """Where the members are mirrored; advisory, so every caller lives with `StoreFailed`."""

    async def put(self, members: str, ttl_s: float) -> None:
        """Write the list as JSON; it vanishes after `ttl_s`.

        Raises:
            StoreFailed: Within about 100 ms.
        """
        ...

    async def close(self) -> None:
        """Let go of the connection."""
        ...


START = ""
"""Position before a life's first batch."""


class PrefixStore(Protocol):
    """Where each life of a worker publishes what it caches; advisory, as `MemberStore`.

    A life has a log of batches, of which the last few thousand are kept, and the newest whole
    content in segments with a head. All of it vanishes `ttl_s` after the life's last call. Bytes
    are not looked into, and come back as anybody may have written them.
    """

    def age_s(self, position: str) -> float:
        """How long a batch had been there when `read_log` answered last, by the store's clock."""
        ...

    async def append(
        self, life: WorkerLife, batches: Sequence[bytes], ttl_s: float, after: str = START
    ) -> str:
        """Add to the log, in order; returns the position after the last.

        Args:
            life: Whose log.
            batches: At least one.
            ttl_s: See the class.
            after: Position of the one before them; `START`: there is none that matters.

        Raises:
            StoreFailed: The one before is gone, or the call failed; some may have been added.
        """
        ...

    async def write_whole(
        self, life: WorkerLife, number: int, head: bytes, segments: Sequence[bytes], ttl_s: float
    ) -> None:
        """Write the whole content, the head last; `number` names it, and no other of this life.

        Raises:
            StoreFailed: The head before is still there, or none.
        """
        ...

    async def renew(self, life: WorkerLife, number: int, ttl_s: float, after: str = START) -> bool:
        """Keep log, head and whole content; False if one of them is gone, or `after` in the log.

        Raises:
            StoreFailed: Within about 100 ms.
        """
        ...

    async def read_head(self, life: WorkerLife) -> bytes | None:
        """Read the newest head.

        Raises:
            StoreFailed: Within about 100 ms.
        """
        ...

    async def read_segment(self, life: WorkerLife, number: int, index: int) -> bytes | None:
        """Read one segment of a whole content.

        Raises:
            StoreFailed: Within about 100 ms.
        """
        ...

    async def read_log(
        self, positions: Mapping[WorkerLife, str], wait_s: float
    ) -> dict[WorkerLife, list[tuple[str, bytes]]]:
        """Read batches after these positions, each with its own; waits for some if there are none.

        Raises:
            StoreFailed: Within about 250 ms after `wait_s`.
        """
        ...

    async def close(self) -> None:
        """Let go of the connections."""
        ...


@dataclass(frozen=True, slots=True)
class StoredValue:
    """A value and its version: 1 or more."""

    version: int
    content: bytes


NO_ENTRY = StoredValue(0, b"")
"""What lies where nothing does."""


class QuotaStore(Protocol):
    """Named values that routers replace in turn; advisory, as `MemberStore`.

    A value replaces only one with a lower version, so that of two routers that have read the same
    one succeeds. Bytes are not looked into, and come back as anybody may have written them.
    """

    async def read(self, names: Sequence[str]) -> list[StoredValue]:
        """Read values, in the order of their names.

        Raises:
            StoreFailed: Within about 100 ms.
        """
        ...

    async def replace(
        self, name: str, value: StoredValue, ttl_s: float, others: Sequence[str] = ()
    ) -> list[StoredValue]:
        """Replace a value if its version is lower; either vanishes after `ttl_s` without a call.

        Returns:
            What lay there before, and what lies under the other names. It was replaced if the
            first has a lower version than `value`.

        Raises:
            StoreFailed: Within about 100 ms; it may have been replaced.
        """
        ...

    async def close(self) -> None:
        """Let go of the connection."""
        ...


class Tokenizer(Protocol):
    """Text to token ids, bounded in time and size."""

    async def encode(
        self,
        text: str,
        *,
        adds_special_tokens: bool = True,
        tenant: str = "",
        max_bytes: int = 0,
    ) -> list[int]:
        """Encode a prompt; tenants take turns. `max_bytes`: what may fit; 0: anything.

        Raises:
            PromptTooLong: It has more bytes than may fit.
            InvalidRequest: The text is too long or took too long.
        """
        ...

    async def encode_with_tokens(
        self, text: str, *, adds_special_tokens: bool, tenant: str = ""
    ) -> tuple[list[int], list[str]]:
        """Encode a text and name each token as the vocabulary does.

        Raises:
            InvalidRequest: The text is too long or took too long.
        """
        ...

    async def encode_chat(
        self, chat: ChatPrompt, *, tenant: str = "", max_bytes: int = 0
    ) -> list[int]:
        """Render messages with the model's chat template and encode the result.

        Raises:
            PromptTooLong: The rendered text has more bytes than may fit.
            InvalidRequest: The template refuses them, or a limit does.
        """
        ...
