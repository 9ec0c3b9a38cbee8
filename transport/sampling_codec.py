"""Sampling parameters to protobuf and back, field by field as the two sides declare them.

Owns which fields stay in the router. Does not know requests. A field that `SamplingParams` and the
message `Sampling` both have travels; nothing is listed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any

from core.types import SamplingParams
from protos.baton.internal.v1 import session_pb2 as pb

ROUTER_ONLY = frozenset({"stop", "include_stop", "skip_special_tokens"})
"""Fields about text, which the message does not have: workers know tokens alone."""

_DECLARED = frozenset(one.name for one in fields(SamplingParams))
_FIELDS: dict[str, Any] = {
    name: field
    for name, field in pb.Sampling.DESCRIPTOR.fields_by_name.items()
    if name in _DECLARED
}
_OPTIONAL = tuple(name for name, field in _FIELDS.items() if field.has_presence)
_LISTS = tuple(name for name, field in _FIELDS.items() if field.is_repeated)
_SCALARS = tuple(name for name in _FIELDS if name not in (*_OPTIONAL, *_LISTS))
_ENTRIES: dict[str, tuple[str, ...]] = {
    name: tuple(one.name for one in _FIELDS[name].message_type.fields)
    for name in _LISTS
    if _FIELDS[name].message_type is not None
}
"""Of lists of messages: the fields that make an entry's tuple, or the one list that an entry is."""
_SAME = tuple(name for name in _FIELDS if name not in _ENTRIES)

_scalars_of: Callable[[pb.Sampling], tuple[Any, ...]] = attrgetter(*_SCALARS)
_same_of: Callable[[SamplingParams], tuple[Any, ...]] = attrgetter(*_SAME)


def sampling_to_wire(params: SamplingParams, seed: int) -> pb.Sampling:
    """Encode all that a worker needs; the run's seed stands for the one that was asked for."""
    given = dict(zip(_SAME, _same_of(params), strict=True))
    # Workers draw by the run's seed, also when no seed was asked for.
    given["seed"] = seed
    for name, names in _ENTRIES.items():
        given[name] = [_entry_to_wire(names, entry) for entry in getattr(params, name)]
    return pb.Sampling(**given)


def sampling_from_wire(wire: pb.Sampling) -> SamplingParams:
    """Decode; a field that has presence and is not there is as it is by default."""
    given = dict(zip(_SCALARS, _scalars_of(wire), strict=True))
    for name in _OPTIONAL:
        if wire.HasField(name):
            given[name] = getattr(wire, name)
    for name in _LISTS:
        entries = getattr(wire, name)
        names = _ENTRIES.get(name)
        given[name] = tuple(_entry_from_wire(names, e) for e in entries) if names else (*entries,)
    return SamplingParams(**given)


def _entry_to_wire(names: tuple[str, ...], entry: tuple[Any, ...]) -> dict[str, Any]:
    return {names[0]: entry} if len(names) == 1 else dict(zip(names, entry, strict=True))


def _entry_from_wire(names: tuple[str, ...], entry: Any) -> tuple[Any, ...]:  # noqa: ANN401
    values = tuple(getattr(entry, name) for name in names)
    return tuple(values[0]) if len(names) == 1 else values
