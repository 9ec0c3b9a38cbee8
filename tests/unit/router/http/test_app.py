"""Routes and headers of the HTTP server, over a service that answers at once."""

import logging
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient
from support.models import TINY

from core.config import RouterConfig
from core.errors import Unauthenticated
from core.ids import Ids
from core.types import ChoiceFinished, FinishReason, RequestEnded, TextDelta, Usage
from router.access.bad_keys import BadKeys
from router.access.credentials import ANYBODY
from router.http.app import make_app
from router.http.body_reading import BodyReader
from router.observe.request_log import RequestLog
from router.request_builder import RequestBuilder
from router.request_params import ServedModel
from router.text.detokenizing import TextModel

TEXT = TextModel(TINY)
MODEL = ServedModel("m", 264, 100, (257,), "float32", fingerprint="fp")
KEY = "bt-one"
PAGE = "https://chat.example"
ASK = {"prompt": [65], "max_tokens": 1}


class Ring:
    """A keyring of one key; without one, everybody may come in."""

    def __init__(self, key=""):
        self.key = key

    def identify(self, authorization, *_):
        if self.key and authorization != f"Bearer {self.key}":
            raise Unauthenticated("no valid key")
        return ANYBODY


class Answers:
    """The events of requests that are answered with one letter each."""

    def __init__(self, requests):
        self.requests, self.is_over = requests, False

    async def batch(self, timeout_s=None):
        self.is_over = True
        events = []
        for index in range(len(self.requests)):
            events += [
                (index, TextDelta(0, 0, (65,), "A")),
                (index, ChoiceFinished(0, FinishReason.LENGTH)),
                (index, RequestEnded(Usage(1, 1))),
            ]
        return events

    async def close(self):
        self.is_over = True


class Service:
    """As much of a `GenerationService` as the server needs."""

    def __init__(self, key="", **config):
        self.config, self.model, self.text = RouterConfig(**config), MODEL, TEXT
        self.keyring = Ring(key)
        self.bad_keys = BadKeys(lambda: 1.0)
        self.recorder = SimpleNamespace(call_ended=lambda call: None)
        self.charging = SimpleNamespace(headers=lambda identity: {})
        self.explanations = SimpleNamespace(router_id="router-1", num_routers=1)
        clock = SimpleNamespace(now_s=lambda: 1.0)
        self._maker = RequestBuilder(
            MODEL, self.config, None, clock, Ids(), b"key", lambda tier: [], TEXT
        )
        self.made = []

    def uptime_s(self):
        return 0.0

    def arrive(self, identity):
        pass

    async def prepare(self, wishes, *, is_resumable):
        self.made += [await self._maker.make(wish) for wish in wishes]
        return self.made[-len(wishes) :], None

    def open(self, *requests, charge=None):
        return Answers(requests)


def client(service):
    return TestClient(
        make_app(service, 5, BodyReader(4 << 20, 5.0, 30.0)), raise_server_exceptions=False
    )


def test_equal_trace_ids_are_different_requests_and_are_echoed_and_logged(caplog):
    service = Service()
    http = client(service)
    for stream in (False, True):
        reply = http.post(
            "/v1/completions", json={**ASK, "stream": stream}, headers={"x-request-id": "a-click"}
        )
        assert reply.status_code == 200 and reply.headers["x-request-id"] == "a-click"
    one, two = service.made
    assert one.request_id != two.request_id and one.seed != two.seed
    assert one.correlation_id == two.correlation_id == "a-click"
    with caplog.at_level(logging.INFO, "baton"):
        RequestLog().request_ended(one, RequestEnded(Usage(1, 1)))
    line = caplog.records[-1].fields
    assert (line["request_id"], line["correlation_id"]) == (one.request_id, "a-click")


def test_equal_idempotency_keys_are_one_request_with_one_randomness():
    service = Service()
    http = client(service)
    keys = [{"idempotency-key": "k-1", "x-request-id": f"try-{i}"} for i in range(2)]
    replies = [http.post("/v1/completions", json=ASK, headers=h) for h in keys]
    assert [reply.json()["id"] for reply in replies] == ["cmpl-k-1"] * 2
    assert [reply.headers["x-request-id"] for reply in replies] == ["try-0", "try-1"]
    assert service.made[0].seed == service.made[1].seed
    reply = http.post("/v1/completions", json={**ASK, "request_id": "own"}, headers=keys[0])
    assert reply.json()["id"] == "cmpl-own"
    bare = http.post("/v1/completions", json=ASK)
    assert bare.json()["id"] == f"cmpl-{bare.headers['x-request-id']}"
    long = http.post("/v1/completions", json=ASK, headers={"idempotency-key": "k" * 129})
    assert long.status_code == 400 and long.json()["error"]["param"] == "idempotency-key"


def test_a_stream_resumes_by_its_event_id_whatever_the_trace_is_called():
    service = Service()
    headers = {"last-event-id": "mine:0", "x-request-id": "another-click"}
    reply = client(service).post("/v1/completions", json={**ASK, "stream": True}, headers=headers)
    assert reply.status_code == 200 and service.made[0].request_id == "mine"
    assert "id: mine:" in reply.text


@pytest.mark.parametrize("path", ["/health", "/ping", "/v1/models", "/version"])
def test_what_may_be_read_may_be_asked_for_without_its_body(path):
    http = client(Service())
    head, get = http.head(path), http.get(path)
    assert head.status_code == get.status_code == 200
    assert head.headers["content-length"] == get.headers["content-length"]


PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


def test_a_preflight_is_answered_before_the_key_and_opens_nothing():
    http = client(Service(KEY, cors_origins=(PAGE,)))
    asked = http.options("/v1/completions", headers=PREFLIGHT)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert "x-stainless-lang" in asked.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in asked.headers
    refused = http.post("/v1/completions", json=ASK, headers={"origin": PAGE})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == PAGE
    own = {"origin": PAGE, "authorization": f"Bearer {KEY}"}
    served = http.post("/v1/completions", json=ASK, headers=own)
    assert served.status_code == 200
    assert "x-request-id" in served.headers["access-control-expose-headers"]


def test_pages_of_others_are_not_let_in_and_nobodys_unless_configured():
    other = {**PREFLIGHT, "origin": "https://evil.example"}
    closed = client(Service(KEY))
    listed = client(Service(KEY, cors_origins=(PAGE,)))
    for http, asked, status in ((closed, PREFLIGHT, 401), (listed, other, 400)):
        reply = http.options("/v1/completions", headers=asked)
        assert reply.status_code == status
        assert "access-control-allow-origin" not in reply.headers
    own = {"origin": "https://evil.example", "authorization": f"Bearer {KEY}"}
    served = listed.post("/v1/completions", json=ASK, headers=own)
    assert served.status_code == 200 and "access-control-allow-origin" not in served.headers


@pytest.mark.parametrize("origin", ["chat.example", "https://*.example", f"{PAGE}/", ""])
def test_an_origin_is_a_scheme_and_a_host(origin):
    assert RouterConfig(cors_origins=(PAGE, "http://localhost:3000", "*")).cors_origins
    with pytest.raises(ValidationError):
        RouterConfig(cors_origins=(origin,))
