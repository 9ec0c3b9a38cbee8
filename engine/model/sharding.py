"""Which part of every tensor one rank of a group holds.

Owns the arithmetic of tensor parallelism: heads, hidden columns, vocabulary rows. Does not know
tensors or processes.

Source: Megatron-LM, arXiv:1909.08053. Query heads, gate, up and the head of the vocabulary are cut
by rows (columns of the product), the output and down projections by columns, so that two sums per
layer join the parts. With fewer KV heads than ranks, neighbouring ranks hold copies of one head.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import ModelLoadError
from engine.checkpoint.model_spec import ModelSpec

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True, slots=True)
class Cut:
    """Which ranges of which axis a rank reads; several ranges are put end to end."""

    axis: int
    ranges: tuple[range, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size`."""

    spec: ModelSpec
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        """Refuse a split that leaves a remainder.

        Raises:
            ModelLoadError: Names the number that `size` does not divide.
        """
        check_split(self.spec, self.size)

    @property
    def num_heads(self) -> int:
        """Query heads of this rank."""
        return self.spec.num_heads // self.size

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""
        return max(1, self.spec.num_kv_heads // self.size)

    @property
    def vocabulary(self) -> range:
        """Token ids whose embedding and logit this rank holds."""
        return self.vocabulary_of(self.rank)

    def vocabulary_of(self, rank: int) -> range:
        """Token ids of any rank; shares may differ by one."""
        total = self.spec.vocabulary_size
        return range(rank * total // self.size, (rank + 1) * total // self.size)

    def cut(self, name: str) -> Cut | None:
        """What to read of the tensor of this name; None: all of it."""
        if self.size == 1:
            return None
        *_, module, kind = name.split(".")
        if module in ("embed_tokens", "lm_head"):
            return Cut(ROWS, (self.vocabulary,))
        q, kv = self._heads(self.spec.num_heads), self._kv_heads()
        if module == "q_proj":
            return Cut(ROWS, (q,))
        if module in ("k_proj", "v_proj"):
            return Cut(ROWS, (kv,))
        if module == "qkv_proj":
            # Phi-3 stores all of Q, then K, then V: a rank's share is three ranges of one tensor.
            first_k = self.spec.num_heads * self.spec.head_size
            first_v = first_k + self.spec.num_kv_heads * self.spec.head_size
            return Cut(ROWS, (q, _moved(kv, first_k), _moved(kv, first_v)))
        if module == "o_proj":
            return Cut(COLUMNS, (q,)) if kind == "weight" else None
        return self._mlp_cut(name, module, kind)

    def _mlp_cut(self, name: str, module: str, kind: str) -> Cut | None:
        experts = self.spec.traits.experts
        is_expert = ".experts." in name
        hidden = (
            experts.intermediate_size
            if is_expert and experts is not None
            else self.spec.intermediate_size
        )
        mine = self._share(hidden)
        if is_expert and experts is not None:
            # Mixtral names its projections w1, w3, w2.
            module = {experts.gate: "gate_proj", experts.up: "up_proj", experts.down: "down_proj"}[
                module
            ]
        if module in ("gate_proj", "up_proj"):
            return Cut(ROWS, (mine,))
        if module == "gate_up_proj":
            return Cut(ROWS, (mine, _moved(mine, hidden)))
        if module == "down_proj":
            return Cut(COLUMNS, (mine,)) if kind == "weight" else None
        return None

    def has(self, name: str) -> bool:
        """False for a bias that is added once to a sum over ranks, and belongs to rank 0."""
        return self.rank == 0 or not name.endswith(("o_proj.bias", "down_proj.bias"))

    def _share(self, total: int) -> range:
        share = total // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def _heads(self, total: int) -> range:
        mine = self._share(total)
        return range(mine.start * self.spec.head_size, mine.stop * self.spec.head_size)

    def _kv_heads(self) -> range:
        # Neighbours share a KV head where heads are few: it is the one their query heads attend to.
        first = self.rank * self.spec.num_kv_heads // self.size
        return range(first * self.spec.head_size, (first + self.num_kv_heads) * self.spec.head_size)


def _moved(part: range, by: int) -> range:
    return range(part.start + by, part.stop + by)


def check_split(spec: ModelSpec, size: int) -> None:
    """Refuse a group size that does not divide the model.

    Raises:
        ModelLoadError: Names every number at fault and the sizes that work.
    """
    problems = _remainders(spec, size)
    if problems:
        good = [n for n in range(1, spec.num_heads + 1) if not _remainders(spec, n)]
        raise ModelLoadError(
            f"tensor_parallel_size {size} does not divide {' and '.join(problems)} of {spec.name}; "
            f"possible: {good}"
        )


def _remainders(spec: ModelSpec, size: int) -> list[str]:
    problems = []
    if spec.num_heads % size:
        problems.append(f"{spec.num_heads} query heads")
    # Either divides the other: ranks have several heads each, or several ranks have one.
    if spec.num_kv_heads % size and size % spec.num_kv_heads:
        problems.append(f"{spec.num_kv_heads} KV heads")
    if spec.intermediate_size % size:
        problems.append(f"{spec.intermediate_size} hidden columns")
    experts = spec.traits.experts
    if experts is not None and experts.intermediate_size % size:
        problems.append(f"{experts.intermediate_size} columns of an expert")
    return problems
