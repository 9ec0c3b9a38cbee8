"""`baton explain request`: which router is asked, and what a person reads."""

import itertools
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.routers import MAX_ROUTERS, TRIES_PER_ROUTER
from client.endpoints import Endpoints
from core.errors import ConfigError

FOUND: dict[str, Any] = {
    "request_id": "r",
    "tenant": "acme",
    "tier": "batch",
    "router": "router-2",
    "ended_s_ago": 3.5,
    "outcome": "ok",
    "prompt_tokens": 100,
    "output_tokens": 7,
    "cached_tokens": 48,
    "fetch_outcome": "",
    "fetched_tokens": 0,
    "fetch_ms": 0.0,
    "ttft_ms": 91.5,
    "e2e_ms": 400.0,
    "permit_wait_ms": 12.5,
    "phases_ms": {"tokenize": 1.0, "exposed_transfer": 10.0},
    "charge": {
        "charged": {"requests": 1, "tokens": 116},
        "paid": {"requests": 0, "tokens": 0},
        "used": {"requests": 1, "tokens": 107},
        "num_requests": 1,
    },
    "attempts": [
        {"epoch": 0, "path": "pd", "workers": ["p1", "d1"], "outcome": "draining", "is_move": True},
        {"epoch": 1, "path": "pd", "workers": [], "outcome": "no_worker", "is_move": False},
    ],
    "decision": {
        "path": "pd",
        "prefill_worker": "p1",
        "decode_worker": "d1",
        "reason": "prompt is worth a transfer",
        "uncached_tokens": 52,
    },
    "candidates": [],
    "measured": {
        "queue_ms": 3.0,
        "fetch_ms": 0.0,
        "prefill_ms": 71.0,
        "transfer_ms": 10.0,
        "total_ms": 84.0,
        "predicted_ms": 80.0,
        "error_ms": 4.0,
        "best_other": {"path": "local", "worker": "d1", "total_ms": 95.0, "delay_ms": 2.0},
        "regret_ms": -11.0,
    },
}
UNKNOWN = {"error": {"message": "router-1 remembers no request r", "code": "request_not_found"}}


def explain(monkeypatch, answers, *options):
    """Run the command on answers in turn; returns the result, and how many were asked for."""
    asked = []

    def answer(_, url, path):
        asked.append(path)
        return next(answers)

    monkeypatch.setattr(Endpoints, "get_with_headers", answer)
    run = CliRunner().invoke(app, ["explain", "request", "a/b", *options], terminal_width=200)
    assert set(asked) == {"/explain/a%2Fb"}
    return run, len(asked)


def of_router(name, tree, num_routers=2):
    return tree, {"x-baton-router": name, "x-baton-num-routers": str(num_routers)}


def test_routers_behind_one_address_are_asked_until_one_remembers(monkeypatch):
    answers = iter([*[of_router("router-1", UNKNOWN)] * 3, of_router("router-2", FOUND)])
    run, num_asked = explain(monkeypatch, answers, "-o", "json")
    assert run.exit_code == 0 and num_asked == 4 and json.loads(run.output) == FOUND


@pytest.mark.parametrize(
    ("names", "num_routers", "num_asked"),
    [
        (["router-1"], 1, 1),
        (["router-1", "router-1", "router-2"], 2, 3),
        (itertools.repeat("router-1"), 2, 2 * TRIES_PER_ROUTER),
    ],
    ids=["one", "each has answered", "one never answers"],
)
def test_when_each_has_been_asked_the_routers_own_words_are_the_error(
    monkeypatch, names, num_routers, num_asked
):
    answers = (of_router(name, UNKNOWN, num_routers) for name in names)
    run, asked = explain(monkeypatch, answers)
    assert asked == num_asked
    assert isinstance(run.exception, ConfigError)
    assert run.exception.message == UNKNOWN["error"]["message"]


@pytest.mark.parametrize(
    ("claimed", "num_asked"),
    [
        ("two", 1),
        ("-3", 1),
        ("0", 1),
        ("1e3", 1),
        ("9" * 5000, 1),
        ("9999", TRIES_PER_ROUTER * MAX_ROUTERS),
    ],
)
def test_a_server_that_lies_about_the_number_of_routers_neither_breaks_nor_binds_it(
    monkeypatch, claimed, num_asked
):
    answers = (of_router("router-1", UNKNOWN, claimed) for _ in itertools.count())
    run, asked = explain(monkeypatch, answers)
    assert isinstance(run.exception, ConfigError) and asked == num_asked


def test_a_name_is_shown_as_it_is_and_is_no_markup(monkeypatch):
    name = "[/x] [red]:key:"
    tree = FOUND | {
        "candidates": [
            {
                "path": "pd",
                "worker": name,
                "source": "",
                **dict.fromkeys(("cached_tokens", "uncached_tokens", "queued_tokens"), 1),
                "fetched_tokens": 0,
                **dict.fromkeys(("fetch_ms", "prefill_ms", "transfer_ms", "decode_ms"), 1.0),
                **dict.fromkeys(("total_ms", "delay_ms", "weighed_ms"), 4.0),
            }
        ]
    }
    run, _ = explain(monkeypatch, iter([of_router("r", tree)]))
    assert run.exit_code == 0 and name in run.output


def test_a_person_reads_what_it_took_who_tried_and_what_was_charged(monkeypatch):
    run, _ = explain(monkeypatch, iter([of_router("router-2", FOUND)]))
    lines = [" ".join(line.split()) for line in run.output.splitlines()]
    text = " ".join(lines)
    for words in (
        "path pd on p1 and d1: prompt is worth a transfer",
        "measured 84.0 ms (queue 3.0, prompt 71.0, exposed transfer 10.0)",
        "predicted 80.0 ms: error +4.0 ms",
        "best other candidate: local on d1, 95.0 ms and 2.0 ms for others: regret -11.0 ms",
        "attempt 0: pd on p1 and d1: draining (a move, no fault)",
        "attempt 1: pd on no worker: no_worker",
        "ok of tenant acme, 3.5 s ago at router-2; 100 prompt tokens, 48 cached; 7 output tokens",
        "tier batch: waited 12.5 ms for a permit",
        "TTFT 91.5 ms, end to end 400.0 ms: tokenize 1.0, exposed transfer 10.0",
        "quota: 1 requests and 116 tokens charged, 1 requests and 107 tokens used",
    ):
        assert words in text, words


def test_what_was_not_measured_or_charged_is_said(monkeypatch):
    tree = {k: v for k, v in FOUND.items() if k != "measured"} | {"charge": None}
    text = " ".join(explain(monkeypatch, iter([of_router("r", tree)]))[0].output.split())
    assert "not measured: it had several attempts" in text and "charged to no quota" in text
    measured = {k: v for k, v in FOUND["measured"].items() if k not in ("best_other", "regret_ms")}
    tree = FOUND | {"measured": measured}
    text = " ".join(explain(monkeypatch, iter([of_router("r", tree)]))[0].output.split())
    assert "no other candidate" in text and "regret +" not in text
