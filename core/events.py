"""Every event that an operator can find in the log: name, level, meaning and fields in one table.

Owns the table and the logger that events go to; nothing is written before `core.logs` is
configured. Does not know formats.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

LOGGER = logging.getLogger("baton")
LOGGER.addHandler(logging.NullHandler())
INFO = logging.INFO
WARNING = logging.WARNING
ERROR = logging.ERROR


@dataclass(frozen=True, slots=True)
class Event:
    """One kind of event. Fields are facts: ids, numbers, reasons; no keys, prompts or outputs."""

    name: str
    level: int
    meaning: str
    fields: tuple[str, ...] = ()

    def log(self, **fields: object) -> None:
        """Write one log record: this event has happened, with these facts."""
        extra = {"event": self.name, "fields": fields}
        LOGGER.log(self.level, "%s %s", self.name, fields, extra=extra)


WORKER_FIELDS = ("worker_id", "role", "worker_pid", "node")

# --- the parent of all processes: `baton up` ------------------------------------------------------

CLUSTER_STARTS = Event(
    "cluster_starts",
    INFO,
    "`baton up` has checked its config",
    ("version", "model", "prefill", "decode", "routers"),
)
CLUSTER_READY = Event(
    "cluster_ready", INFO, "every process is up and the servers listen", ("http_port", "grpc_port")
)
CLUSTER_STOPS = Event("cluster_stops", INFO, "a signal came, or a router could not be kept up")
CONFIG_KEY_RENAMED = Event(
    "config_key_renamed",
    WARNING,
    "a setting was given by its old name, which the next release refuses",
    ("old", "new"),
)
CHILD_STARTED = Event(
    "child_started", INFO, "a worker or router process is ready", ("child", "child_pid")
)
CHILD_ENDED = Event(
    "child_ended",
    ERROR,
    "a worker or router process died; another is started",
    ("child", "child_pid", "reason"),
)
CHILD_LEFT = Event(
    "child_left",
    INFO,
    "a worker or router process was asked to end, and did; another is started",
    ("child", "child_pid"),
)
CHILD_FAILED = Event(
    "child_failed",
    ERROR,
    "a worker or router process did not start",
    ("child", "reason", "retry_in_s"),
)
STORE_RESTARTED = Event(
    "store_restarted",
    WARNING,
    "our Redis ended; another is started",
    ("reason", "lived_s", "restarts", "retry_in_s"),
)
LEFTOVERS_KILLED = Event(
    "leftovers_killed", INFO, "processes had outlived their cluster", ("pids",)
)

# --- routers --------------------------------------------------------------------------------------

ROUTER_LISTENS = Event(
    "router_listens",
    INFO,
    "the HTTP and the gRPC server listen, and the one for its metrics",
    ("http_port", "grpc_port", "metrics_port"),
)
ROUTER_READY = Event(
    "router_ready", INFO, "a request got through: `/ready` answers 200", ("canary_ms",)
)
ROUTER_NOT_READY = Event("router_not_ready", ERROR, "no request gets through", ("reason",))
WORKER_JOINED = Event("worker_joined", INFO, "a new worker answers this router", WORKER_FIELDS)
WORKER_LINK_LOST = Event(
    "worker_link_lost",
    WARNING,
    "the session broke; the router dials again",
    (*WORKER_FIELDS, "reason"),
)
WORKER_LINK_BACK = Event("worker_link_back", INFO, "the session stands again", WORKER_FIELDS)
WORKER_LOST = Event(
    "worker_lost",
    ERROR,
    "a worker died, hung or cannot be reached; its requests move",
    (*WORKER_FIELDS, "reason", "requests"),
)
WORKER_LEFT = Event("worker_left", INFO, "a worker is no member any more", WORKER_FIELDS)
WORKER_LEAVING = Event(
    "worker_leaving", INFO, "a worker drains: its requests move, and it ends", WORKER_FIELDS
)
WORKER_PAUSED = Event("worker_paused", WARNING, "a worker restarts its ranks", WORKER_FIELDS)
WORKER_RESUMED = Event("worker_resumed", INFO, "that worker takes requests again", WORKER_FIELDS)
STORE_DOWN = Event(
    "store_down", WARNING, "Redis does not answer; requests are served all the same", ("reason",)
)
STORE_UP = Event("store_up", INFO, "Redis answers")
PREFIX_INDEX_DOWN = Event(
    "prefix_index_down",
    WARNING,
    "the prefix index is not renewed; requests are served, with fewer hits",
    ("reason",),
)
PREFIX_INDEX_UP = Event("prefix_index_up", INFO, "the prefix index is renewed")
QUOTAS_LOCAL = Event(
    "quotas_local",
    WARNING,
    "routers cannot compare what keys have used: each grants up to its share of their limits",
    ("reason",),
)
QUOTAS_SHARED = Event("quotas_shared", INFO, "keys' quotas count over all routers again")
LOAD_SHED = Event(
    "load_shed",
    WARNING,
    "requests are refused: there is no room for them",
    ("refused", "running", "queued"),
)
SIDE_PROCESS_REPLACED = Event(
    "side_process_replaced",
    WARNING,
    "a process that tokenizes or parses died or took too long",
    ("module", "reason"),
)
DESCRIPTORS_SCARCE = Event(
    "descriptors_scarce",
    WARNING,
    "the process may open fewer files than its limits need: raise `ulimit -Hn`, or lower them",
    ("limit", "needed"),
)
REQUEST = Event(
    "request",
    INFO,
    "a request ended (`router.log_requests`)",
    (
        "request_id",
        "model",
        "operation",
        "outcome",
        "tenant",
        "tier",
        "server",
        "client",
        "prompt_tokens",
        "output_tokens",
        "cached_tokens",
        "n",
        "ttft_ms",
        "e2e_ms",
        "phases_ms",
        "path",
        "prefill_worker",
        "decode_worker",
        "kv_bytes",
        "attempts",
        "correlation_id",
        "trace_id",
    ),
)
REFUSAL = Event(
    "refusal",
    INFO,
    "a call was refused before it had a request of its own",
    ("outcome", "route", "tenant", "tier", "server", "client", "unlogged"),
)

# --- workers --------------------------------------------------------------------------------------

WORKER_READY = Event(
    "worker_ready",
    INFO,
    "a worker has loaded its model and listens",
    ("worker_id", "role", "tier", "model", "rank_pids", "took_s"),
)
WORKER_FAILED = Event("worker_failed", ERROR, "a worker cannot go on, and ends", ("reason",))
RANKS_LOST = Event(
    "ranks_lost",
    ERROR,
    "a worker's ranks died or stood still; their KV is lost",
    ("worker_id", "reason", "rank_pids", "attempts"),
)
BLOCKS_FOUND = Event(
    "blocks_found",
    INFO,
    "a storage tier holds blocks that an earlier life of the worker has written",
    ("storage", "blocks"),
)
STORAGE_FAILED = Event(
    "storage_failed",
    WARNING,
    "a block could not be written to a storage tier, or not be read; it is computed instead, and "
    "further failures of this kind are only counted",
    ("storage", "reason"),
)
RANKS_RESTARTED = Event(
    "ranks_restarted", INFO, "fresh ranks are ready", ("rank_pids", "exit_codes", "took_s")
)
RANK_LINGERS = Event(
    "rank_lingers",
    WARNING,
    "a rank was killed and has not ended yet; its worker goes on, and its memory is free later",
    ("rank_pid", "waited_s"),
)
ROUTER_CONNECTED = Event(
    "router_connected", INFO, "a router opened its session with this worker", ("router_id",)
)
ROUTER_GONE = Event(
    "router_gone",
    WARNING,
    "a router did not come back; its requests are cancelled here",
    ("router_id", "attempts"),
)
CARRIER_ENDED = Event(
    "carrier_ended", WARNING, "a sidecar, which moves KV, ended; another starts", ("kind", "reason")
)

# --- routers and workers --------------------------------------------------------------------------

STREAM_REFUSED = Event(
    "stream_refused",
    WARNING,
    "a caller outside the cluster opened a stream between processes; the count is since the start",
    ("stream", "peer", "refused", "reason"),
)
DRAIN_BEGUN = Event(
    "drain_begun", INFO, "nothing new is taken; what runs may end or move", ("running", "grace_s")
)
DRAIN_ENDED = Event("drain_ended", INFO, "the drain is over", ("left",))
CERTIFICATE_RENEWED = Event("certificate_renewed", INFO, "new files are in use", ("what",))
CERTIFICATE_UNUSABLE = Event(
    "certificate_unusable",
    ERROR,
    "new files cannot be used: the old stay in use",
    ("what", "reason"),
)
CERTIFICATE_ENDS_SOON = Event("certificate_ends_soon", WARNING, "renew it", ("what", "days_left"))
KEYS_RELOADED = Event("keys_reloaded", INFO, "the key file was read again", ("keys", "faults"))
KEY_LINE_REFUSED = Event(
    "key_line_refused", ERROR, "this line of the key file opens nothing", ("reason",)
)
KEY_TIER_UNKNOWN = Event(
    "key_tier_unknown",
    ERROR,
    "keys are of a tier that the config has not; they open, and are served in the default tier",
    ("tier", "keys", "served_as"),
)
KEY_CLASS_UNKNOWN = Event(
    "key_class_unknown",
    ERROR,
    "keys are of a class that `tenant_classes` does not list; they open, and count as default",
    ("tenant_class", "keys"),
)
KEY_FILE_LOST = Event(
    "key_file_lost",
    ERROR,
    "the key file is gone or cannot be read; unless it is mended, no key opens then",
    ("reason", "closes_in_s"),
)
KEYS_CLOSED = Event(
    "keys_closed", ERROR, "the key file stayed lost: no key opens any more", ("reason",)
)
KEY_FILE_BACK = Event("key_file_back", INFO, "the key file can be read again")

# --- every process --------------------------------------------------------------------------------

LINES_DROPPED = Event("lines_dropped", WARNING, "whatever reads the log was too slow", ("lines",))
BUG = Event(
    "bug",
    ERROR,
    "something failed that should not; nothing else has a traceback",
    ("logger", "message", "traceback"),
)
MESSAGE = Event(
    "message", WARNING, "what has no event of its own, of libraries too", ("logger", "message")
)

ALL = tuple(event for event in dict(globals()).values() if isinstance(event, Event))
