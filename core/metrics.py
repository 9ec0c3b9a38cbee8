"""Every metric's name, kind, unit and labels in one table.

Owns the table. Does not know the library that counts. Labels are bounded: never a request or user
id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Those of vLLM's `time_to_first_token_seconds`, up to 80 s, so that its dashboards fit.
LATENCY_BUCKETS_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)


@dataclass(frozen=True, slots=True)
class Metric:
    """One family. Counters and histograms are cumulative, gauges are read when scraped."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()


TTFT = Metric("baton_ttft_seconds", "histogram", "router receipt to first token sent", ("tier",))
ITL = Metric(
    "baton_itl_seconds", "histogram", "gap between two deliveries of one request", ("tier",)
)
E2E = Metric("baton_e2e_seconds", "histogram", "router receipt to end")
PHASE = Metric(
    "baton_request_phase_seconds",
    "histogram",
    "time in one phase; the phases of a request add up to its end-to-end time",
    ("phase",),
)
REQUESTS = Metric("baton_requests_total", "counter", "ended requests", ("outcome", "tenant_class"))
SLO_REQUESTS = Metric(
    "baton_slo_requests_total",
    "counter",
    "requests that met the SLO of their tier (`tiers.NAME.slo_ttft_s`, `slo_tpot_s`) or missed it, "
    "those that failed or found no room among the latter; what the caller cancelled or got wrong "
    "is in neither",
    ("tier", "result", "tenant_class"),
)
SLO_OBJECTIVE = Metric(
    "baton_slo_objective",
    "gauge",
    "share of a tier's requests that should meet its SLO (`tiers.NAME.slo_objective`)",
    ("tier",),
)
REFUSALS = Metric(
    "baton_refusals_total",
    "counter",
    "calls and requests that were answered with an error before they ran, and whole answers that "
    "were never read",
    ("server", "code", "tenant_class"),
)
ERRORS = Metric(
    "baton_request_errors_total",
    "counter",
    "requests that ran and ended with an error, a client that left or read too slowly among them",
    ("server", "code"),
)
BAD_KEYS = Metric(
    "baton_bad_keys_total",
    "counter",
    "calls without a valid API key, by where they came from",
    ("client",),
)
API_KEYS = Metric(
    "baton_api_keys",
    "gauge",
    "keys that open, keys that have expired, lines refused, and 1 while the file is lost",
    ("state",),
)
QUOTA_LOCAL_DECISIONS = Metric(
    "baton_quota_local_decisions_total",
    "counter",
    "requests whose key's quota a router decided alone, within its share: Redis was away or slow",
)
PROMPT_TOKENS = Metric(
    "baton_prompt_tokens_total",
    "counter",
    "prompt tokens of ended requests",
    ("tier", "tenant_class"),
)
OUTPUT_TOKENS = Metric(
    "baton_generation_tokens_total",
    "counter",
    "output tokens of ended requests",
    ("tier", "tenant_class"),
)
CACHED_TOKENS = Metric(
    "baton_prefix_hit_tokens_total", "counter", "prompt tokens found in a prefix cache", ("tier",)
)
COST = Metric(
    "baton_cost_total",
    "counter",
    "what ended requests cost their callers, in the currency of `tiers.NAME.output_price_per_mtok`",
    ("tier", "tenant_class"),
)
POOL_PRICE = Metric(
    "baton_pool_price_per_hour",
    "gauge",
    "what the live workers of a pool cost an hour, in the currency of `pools.NAME.price_per_hour`",
    ("role", "tier"),
)
KV_BYTES = Metric("baton_kv_transfer_bytes_total", "counter", "KV bytes handed over")
TRANSFERS = Metric("baton_kv_transfers_total", "counter", "hand-overs that arrived", ("transport",))
FRAGMENTS_RESENT = Metric(
    "baton_kv_parts_healed_total",
    "counter",
    "fragments of KV that came damaged and were sent again",
)
PREFIX_FETCHES = Metric(
    "baton_prefix_fetches_total",
    "counter",
    "prefixes that were to come from a peer: fetched, or why they were computed instead",
    ("outcome",),
)
PLACEMENT_ERROR = Metric(
    "baton_placement_error_seconds",
    "histogram",
    "by how much the phases that placement predicts (queue, prompt, exposed transfer) came late or "
    "early, of requests with one attempt",
    ("path", "direction"),
)
PLACEMENT_REGRET = Metric(
    "baton_placement_regret_seconds",
    "histogram",
    "by how much they, and what others lost, cost more than the best other candidate was predicted "
    "to; 0: they did not",
    ("path",),
)
ATTEMPTS = Metric("baton_attempts_total", "counter", "attempts started", ("path",))
RETRIES = Metric("baton_retries_total", "counter", "attempts caused by a fault", ("reason",))
RUNNING = Metric(
    "baton_requests_running", "gauge", "permits that requests of a tier hold", ("tier",)
)
QUEUED = Metric(
    "baton_requests_queued", "gauge", "requests of a tier that wait for a permit", ("tier",)
)
OVERFLOWED = Metric(
    "baton_requests_overflowed",
    "gauge",
    "requests of a tier that found no room in it and were let into its `overflow_to`",
    ("tier",),
)
REFUSED = Metric(
    "baton_requests_refused",
    "gauge",
    "requests of a tier for which there was no room to wait, or no permit in time, since the start",
    ("tier",),
)
WORKERS = Metric("baton_pool_replicas", "gauge", "workers with a live session", ("role", "tier"))
ROUTERS = Metric(
    "baton_routers",
    "gauge",
    "routers of the cluster: configured (`router.replicas`), and listening as far as this one "
    "knows",
    ("state",),
)
CERTIFICATE_ENDS = Metric(
    "baton_certificate_expiration_timestamp_seconds",
    "gauge",
    "when a certificate in use ends (Unix time): door, authority, or the role it is for; days left "
    "are (this - time()) / 86400",
    ("certificate",),
)
PROBLEMS = Metric(
    "baton_problems", "gauge", "what is not as configured, as `/ready` names it", ("code",)
)
PREFIX_ENTRIES = Metric(
    "baton_prefix_index_entries", "gauge", "blocks of workers that the router's view holds"
)
PREFIX_AGE = Metric(
    "baton_prefix_index_age_seconds",
    "gauge",
    "time since the store last answered; it grows while Redis is away, and hits fall",
)
PREFIX_REFUSED = Metric(
    "baton_prefix_index_refused",
    "gauge",
    "entries in Redis that did not count since the start: forged, malformed, or of another version",
    ("reason",),
)
PREFIX_GAPS = Metric(
    "baton_prefix_index_gaps", "gauge", "batches found missing since the start; hits fall"
)
PREFIX_LAG = Metric(
    "baton_prefix_index_lag_seconds",
    "gauge",
    "longest time of the last 10 s that a worker's batch lay in Redis before it was read; the "
    "worker waits up to 0.02 s before it writes one",
)
PREFIX_TOKENS = Metric(
    "baton_prefix_tokens_total",
    "counter",
    "tokens of computed prompts by what became of them: hit; expected at the worker, but evicted "
    "since, unfinished (a prompt on its way was to bring them) or stale (the view has them still); "
    "elsewhere (another worker has them, and this one was cheaper); not_cached",
    ("outcome",),
)
PREFIX_STORAGE_TOKENS = Metric(
    "baton_prefix_storage_hit_tokens_total",
    "counter",
    "prompt tokens found in a cache, by the storage tier in which the router knew them; "
    "unpublished: it did not",
    ("storage",),
)
STALE_PLACEMENTS = Metric(
    "baton_prefix_stale_placements_total",
    "counter",
    "requests whose worker held less of the prompt than the router expected",
    ("cause",),
)
WORKER_BLOCKS = Metric(
    "baton_worker_kv_blocks",
    "gauge",
    "KV blocks of a worker's pool: used by sequences, cached (free for the taking), free; of more "
    "than 512 workers the others are summed up as other",
    ("worker", "state"),
)
WORKER_SEQUENCES = Metric(
    "baton_worker_sequences",
    "gauge",
    "sequences that run and wait at a worker",
    ("worker", "state"),
)
WORKER_WAITING_TOKENS = Metric(
    "baton_worker_waiting_tokens",
    "gauge",
    "prompt tokens that a worker has still to compute",
    ("worker",),
)
WORKER_PREEMPTIONS = Metric(
    "baton_worker_preemptions",
    "gauge",
    "sequences of a worker that gave up their blocks or place to others, over all its starts; what "
    "is not cached any more is computed again",
    ("worker",),
)
WORKER_EXPOSED = Metric(
    "baton_worker_exposed_transfer_seconds",
    "gauge",
    "by which KV that a worker sends comes behind the first token, smoothed over the last minute's "
    "hand-overs; of the others together, the longest",
    ("worker",),
)
STORED_BLOCKS = Metric(
    "baton_storage_blocks",
    "gauge",
    "KV blocks that live workers keep below their pools, by storage tier",
    ("storage",),
)
STORED_HITS = Metric(
    "baton_storage_hit_blocks",
    "gauge",
    "blocks that workers have loaded from a storage tier, those that have left among them",
    ("storage",),
)
STORAGE_FAULTS = Metric(
    "baton_storage_faults",
    "gauge",
    "blocks that workers could not write to a storage tier or read from it, those that have left "
    "among them; each costs a hit",
    ("reason",),
)
ALL = tuple(metric for metric in dict(globals()).values() if isinstance(metric, Metric))
OUTCOMES = ("finished", "rejected", "cancelled", "failed")
