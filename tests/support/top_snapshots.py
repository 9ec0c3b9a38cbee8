"""Two looks of `baton top` at a router, ten seconds apart, with every figure by hand.

Owns what the router said. Does not know what is made of it.
"""

from cli.top_figures import Snapshot, totals_of

READINESS = {
    "state": "degraded",
    "problems": [{"code": "pool_short", "detail": "1 of 2 decode workers are ready"}],
    "store": "ok",
    "models": {"m": {}},
}


def worker(name, role, used, cached, running=0, waiting=0, tokens=0):
    load = {
        "running": running,
        "waiting": waiting,
        "waiting_tokens": tokens,
        "free_blocks": 200 - used - cached,
        "cached_blocks": cached,
        "total_blocks": 200,
    }
    return {
        "worker_id": name,
        "role": role,
        "tier": "",
        "node": "n",
        "state": "live",
        "load": load,
    }


WORKERS = [
    worker("prefill-0", "prefill", 0, 150, waiting=2, tokens=900),
    worker("decode-0", "decode", 104, 20, running=3),
    # Nothing reported yet.
    {**worker("decode-1", "decode", 200, 0), "state": "dialling"},
]
TIERS = {
    "interactive": {"running": 2, "queued": 0, "refused": 0},
    "batch": {"running": 1, "queued": 7, "refused": 4},
}


def link(transport, round_trip_ms, gb_per_s, error=None):
    return {
        "prefill": "prefill-0",
        "decode": "decode-0",
        "transport": transport,
        "round_trip_ms": round_trip_ms,
        "gb_per_s": gb_per_s,
        "error": error,
    }


LINKS = [link("shm", 0.125, 4.5), link("shm", 0.25, 2.25), link("", 0.0, None, "refused")]


def exposition(ended, met, missed, prompt, output, kv_bytes, preemptions):
    return f"""
# TYPE baton_requests_total counter
baton_requests_total{{outcome="finished"}} {ended - 1}
baton_requests_total{{outcome="failed"}} 1
# TYPE baton_slo_requests_total counter
baton_slo_requests_total{{result="met",tier="interactive"}} {met}
baton_slo_requests_total{{result="missed",tier="interactive"}} {missed}
baton_slo_requests_total{{result="met",tier="batch"}} 0
baton_slo_requests_total{{result="missed",tier="batch"}} 0
# TYPE baton_prompt_tokens_total counter
baton_prompt_tokens_total{{tier="interactive"}} {prompt}
baton_prompt_tokens_total{{tier="batch"}} 100
# TYPE baton_generation_tokens_total counter
baton_generation_tokens_total{{tier="interactive"}} {output}
baton_generation_tokens_total{{tier="batch"}} 0
# TYPE baton_kv_transfer_bytes_total counter
baton_kv_transfer_bytes_total {kv_bytes}
# TYPE baton_worker_preemptions gauge
baton_worker_preemptions{{worker="decode-0"}} {preemptions}
# TYPE baton_ttft_seconds histogram
baton_ttft_seconds_bucket{{le="+Inf",tier="interactive"}} {ended}
baton_ttft_seconds_count{{tier="interactive"}} {ended}
baton_ttft_seconds_sum{{tier="interactive"}} 1.5
"""


def snapshot(at_s, text, router="router-1"):
    return Snapshot(at_s, router, READINESS, WORKERS, TIERS, LINKS, totals_of(text))


FIRST = snapshot(100.0, exposition(10, 4, 1, 500, 200, 1_000_000, 3))
SECOND = snapshot(110.0, exposition(50, 40, 5, 1500, 1000, 31_000_000, 8))
RESTARTED = snapshot(112.0, exposition(2, 1, 0, 40, 20, 0, 0))
