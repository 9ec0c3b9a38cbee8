"""A model that is a hash: every mistake with KV changes the very next token.

Owns a runner whose KV content is a digest chain and whose next token is a digest of the KV bytes it
actually reads. A stale, foreign, partial, reordered or flipped block therefore shows at once. Does
not know torch.

The slot of token i in a layer holds digest(slot i-1 as read, token i, scope, model, layer, shard).
Generation and epoch are never hashed in: the same tokens give the same content anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterable

from core.kv_layout import KVLayout
from core.plan import SampleSpec, StepItem, StepPlan, StepResult
from core.ports import OnLayer, SharedPool
from core.types import Logprob


class MemoryKV:
    """A KV pool in one bytearray; the simulated side of the `KVBytes` port."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        """Start zeroed."""
        self._layout = layout
        self._num_blocks = num_blocks
        self._shards: list[memoryview] = []
        self._views: list[list[list[memoryview]]] = []
        """By shard, layer and block; made once, since a simulation reads them millions of times."""
        self.generation = 0
        self.replace()

    def replace(self) -> None:
        """Switch to fresh, zeroed memory, as a rank group does when it starts again.

        Views into the old memory stay valid; nobody computes there any more.
        """
        layout = self._layout
        num_blocks = self._num_blocks
        size = self._layout.layer_block_bytes
        self.generation += 1
        self._shards = [
            memoryview(bytearray(layout.pool_bytes(num_blocks))) for _ in range(layout.num_shards)
        ]
        self._views = []
        for pool in self._shards:
            starts = [
                [layout.offset_bytes(i, b, num_blocks) for b in range(num_blocks)]
                for i in range(layout.num_layers)
            ]
            self._views.append([[pool[at : at + size] for at in row] for row in starts])

    def segments(self) -> list[memoryview]:
        """See `KVBytes`."""
        return self._shards

    def shared(self) -> SharedPool | None:
        """See `KVBytes`: this memory is the process's own."""
        return None

    def view(self, layer: int, block_id: int, shard: int) -> memoryview:
        """Return one layer of one block, uint8 [layer_block_bytes], not copied."""
        return self._views[shard][layer][block_id]

    def joined(self, layer: int, block_ids: Iterable[int], shard: int) -> bytes:
        """Copy one layer of some blocks, back to back."""
        return b"".join(map(self._views[shard][layer].__getitem__, block_ids))


class HashModel:
    """A runner over `MemoryKV`. `cost_s(plan)` is the virtual duration of a step."""

    def __init__(
        self,
        layout: KVLayout,
        kv: MemoryKV,
        vocabulary_size: int,
        wait: Callable[[float], Awaitable[None]],
        cost_s: Callable[[StepPlan], float],
    ) -> None:
        """Keep the pool; `wait` sleeps on the caller's clock."""
        self._layout = layout
        self._kv = kv
        self._vocabulary_size = vocabulary_size
        self._wait = wait
        self._cost_s = cost_s
        self._block_size_tokens = layout.block_size_tokens
        self._slot_bytes = layout.slot_bytes
        self._digest_bytes = min(64, layout.slot_bytes)
        self._num_repeats = -(-layout.slot_bytes // self._digest_bytes)

    async def execute(self, plan: StepPlan, on_layer: OnLayer) -> StepResult:
        """Run one step layer by layer, spreading its cost evenly."""
        layer_s = self._cost_s(plan) / self._layout.num_layers
        # Before any write, since a copied block may be written in the same step.
        for source, destination in plan.copies:
            self._copy(source, destination)
        # Layer by layer with a wait in each: transfers overlap with the step, as in production.
        for layer in range(self._layout.num_layers):
            for item in plan.items:
                self._write(item, layer)
            await self._wait(layer_s)
            on_layer(plan.step_id, layer)
        tokens = {}
        scored = {}
        for item in plan.items:
            if item.targets:
                scored[item.sequence_key] = self._score(item)
            if item.samples:
                seen = self._read(item)
                for spec in item.samples:
                    tokens[item.sequence_key, spec.choice] = self._draw(seen, spec)
        return StepResult(plan.step_id, tokens, scored=scored)

    def _score(self, item: StepItem) -> tuple[Logprob, ...]:
        """Score each target by the KV of the position before it, which hashes all that precedes."""
        scores = []
        for index, target in enumerate(item.targets):
            slot = self._slot(item, self._layout.num_layers - 1, 0, item.start + index)
            digest = hashlib.blake2b(slot, digest_size=8).digest()
            first = int.from_bytes(digest, "little")
            top = tuple(
                ((first + rank) % self._vocabulary_size, -0.5 * (rank + 1))
                for rank in range(item.num_target_logprobs)
            )
            scores.append(Logprob(target, -1.0 - (first + target) % 997, top))
        return tuple(scores)

    def _copy(self, source: int, destination: int) -> None:
        for layer in range(self._layout.num_layers):
            for shard in range(self._layout.num_shards):
                self._kv.view(layer, destination, shard)[:] = self._kv.view(layer, source, shard)

    def _slot(self, item: StepItem, layer: int, shard: int, position: int) -> bytes:
        block, offset = divmod(position, self._block_size_tokens)
        start = offset * self._slot_bytes
        view = self._kv.view(layer, item.block_table[block], shard)
        return bytes(view[start : start + self._slot_bytes])

    def _write(self, item: StepItem, layer: int) -> None:
        contents = [token_id.to_bytes(4, "little") for token_id in item.token_ids]
        for shard in range(self._layout.num_shards):
            key = f"{self._layout.model_digest}|{item.scope}|{layer}|{shard}".encode()
            # Read, not remembered: a wrong block before this one changes everything after it.
            parent = self._slot(item, layer, shard, item.start - 1) if item.start else b""
            self._put(item, layer, shard, self._chain(parent, contents, key))

    def _chain(self, parent: bytes, contents: list[bytes], key: bytes) -> bytes:
        """Compute the slots of a chunk, back to back."""
        slots = []
        digest_bytes = self._digest_bytes
        for content in contents:
            digest = hashlib.blake2b(parent + content + key, digest_size=digest_bytes).digest()
            parent = (digest * self._num_repeats)[: self._slot_bytes]
            slots.append(parent)
        return b"".join(slots)

    def _put(self, item: StepItem, layer: int, shard: int, slots: bytes) -> None:
        block, offset = divmod(item.start, self._block_size_tokens)
        block_bytes = self._block_size_tokens * self._slot_bytes
        at = offset * self._slot_bytes
        taken = 0
        while taken < len(slots):
            size = min(block_bytes - at, len(slots) - taken)
            view = self._kv.view(layer, item.block_table[block], shard)
            view[at : at + size] = slots[taken : taken + size]
            taken += size
            block += 1
            at = 0

    def _read(self, item: StepItem) -> bytes:
        end = item.start + len(item.token_ids)
        table = item.block_table[: self._layout.blocks_for(end)]
        num_bytes = end * self._slot_bytes
        # In one piece: to hash each block by itself took a third of a simulation's time.
        seen = [
            self._kv.joined(layer, table, shard)[:num_bytes]
            for layer in range(self._layout.num_layers)
            for shard in range(self._layout.num_shards)
        ]
        return hashlib.blake2b(b"".join(seen), digest_size=16).digest()

    def _draw(self, seen: bytes, spec: SampleSpec) -> Logprob:
        salt = (
            b""
            if spec.params.temperature == 0
            else f"{spec.seed}|{spec.choice}|{spec.position}".encode()
        )
        # Banned tokens are drawn again; they are few, so 64 tries are plenty.
        for attempt in range(64):
            digest = hashlib.blake2b(seen + salt + bytes([attempt]), digest_size=8).digest()
            token_id = int.from_bytes(digest, "little") % self._vocabulary_size
            if token_id not in spec.banned:
                break
        return Logprob(token_id, -1.0)
