"""Every transition of a transfer from one state to the next, by name.

Owns the names. Does not know what happens in a transition.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Transition(StrEnum):
    """What happened, on which side."""

    SENDER_OFFERED = "sender_offered"
    SENDER_PARKED = "sender_parked"
    SENDER_NOT_FOUND = "sender_not_found"
    SENDER_OPENED = "sender_opened"
    SENDER_INCOMPATIBLE = "sender_incompatible"
    SENDER_STARTED = "sender_started"
    SENDER_PARTNERED = "sender_partnered"
    SENDER_SENT = "sender_sent"
    SENDER_RESENT = "sender_resent"
    SENDER_RESTARTED = "sender_restarted"
    SENDER_COMMITTED = "sender_committed"
    SENDER_FINISHED = "sender_finished"
    SENDER_ACKED = "sender_acked"
    SENDER_REFUSED = "sender_refused"
    SENDER_LOST = "sender_lost"
    SENDER_EXPIRED = "sender_expired"
    SENDER_ENDED = "sender_ended"
    RECEIVER_FETCHING = "receiver_fetching"
    RECEIVER_UNREACHED = "receiver_unreached"
    RECEIVER_NOT_FOUND = "receiver_not_found"
    RECEIVER_STARTING = "receiver_starting"
    RECEIVER_RESERVED = "receiver_reserved"
    RECEIVER_REFUSED = "receiver_refused"
    RECEIVER_RECEIVED = "receiver_received"
    RECEIVER_DAMAGED = "receiver_damaged"
    RECEIVER_RESTARTED = "receiver_restarted"
    RECEIVER_COMMITTED = "receiver_committed"
    RECEIVER_ARRIVED = "receiver_arrived"
    RECEIVER_ACKED = "receiver_acked"
    RECEIVER_FINISHED = "receiver_finished"
    RECEIVER_FAILED = "receiver_failed"
    RECEIVER_ENDED = "receiver_ended"


Note = Callable[[Transition], None]
