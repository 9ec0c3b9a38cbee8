"""A model that is a hash: every mistake with KV changes the very next token.

Owns a runner whose KV content is a digest chain and whose next token is a digest of the KV bytes it
actually reads. A stale, foreign, partial, reordered or flipped block therefore shows at once. Does
not know torch.

The slot of token i in a layer holds digest(slot i-1 as read, token i, scope, model, layer, shard).
Generation and epoch are never hashed in: the same tokens give the same content anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

from core.kv_layout import KVLayout
from core.plan import SampleSpec, StepItem, StepPlan, StepResult
from core.ports import KVBytes, OnLayer, SharedPool
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


class HashModel:
    """A runner over `KVBytes`. `cost_s(plan)` is the virtual duration of a step."""

    def __init__(
        self,
        layout: KVLayout,
        kv: KVBytes,
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

    def _slot(self, item: StepItem, layer: int, shard: int, position: int) -> memoryview:
        block, offset = divmod(position, self._block_size_tokens)
        size = self._slot_bytes
        return self._kv.view(layer, item.block_table[block], shard)[
            offset * size : (offset + 1) * size
        ]

    def _write(self, item: StepItem, layer: int) -> None:
        for shard in range(self._layout.num_shards):
            key = f"{self._layout.model_digest}|{item.scope}|{layer}|{shard}".encode()
            # Read, not remembered: a wrong block before this one changes everything after it.
            parent = bytes(self._slot(item, layer, shard, item.start - 1)) if item.start else b""
            for position, token_id in enumerate(item.token_ids, item.start):
                content = token_id.to_bytes(4, "little") + key
                digest = hashlib.blake2b(
                    parent + content, digest_size=min(64, self._slot_bytes)
                ).digest()
                parent = (digest * (self._slot_bytes // len(digest) + 1))[: self._slot_bytes]
                self._slot(item, layer, shard, position)[:] = parent

    def _read(self, item: StepItem) -> bytes:
        end = item.start + len(item.token_ids)
        table = item.block_table[: self._layout.blocks_for(end)]
        seen = hashlib.blake2b(digest_size=16)
        for layer in range(self._layout.num_layers):
            for shard in range(self._layout.num_shards):
                views = [self._kv.view(layer, block_id, shard) for block_id in table]
                num_whole, rest = divmod(end, self._block_size_tokens)
                for view in views[:num_whole]:
                    seen.update(view)
                if rest:
                    seen.update(views[num_whole][: rest * self._slot_bytes])
        return seen.digest()

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
