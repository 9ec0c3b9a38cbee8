"""Which paths need a key: all that are not literally open."""

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from router.access.bad_keys import BadKeys
from router.http.auth import HttpGuard

SPELLINGS = [
    "/",
    "/v1/models",
    "//health",
    "/health/",
    "/Health",
    "/HEALTH",
    "/health/../v1/models",
    "/health/%2e%2e/v1/models",
    "/health%2f..%2fv1/models",
    "/health;x",
    "/health%00",
    "/%68ealth/x",
    "/healthz",
    "/ping/x",
    "/v1/../health/x",
    "/metrics",
    "/docs",
    "/openapi.json",
    "/ready",
    "/load",
    "/replicas",
    "/version",
    "/tokenize",
    "/health\\",
    "/./health/x",
    "/ping%20",
    "/health?x=1/../v1/models#",
    "/ health",
    "/static-offline-docs/swagger-ui.css",
]


@pytest.fixture
def client(ring):
    async def app(scope, receive, send):
        await PlainTextResponse(
            scope["state"]["identity"].tenant if "identity" in scope.get("state", {}) else "open"
        )(scope, receive, send)

    bad_keys = BadKeys(lambda: ring.now[0])
    bad_keys.delay_s = lambda address: 0.0
    ring.ended = []
    return TestClient(HttpGuard(app, ring, bad_keys, ring.ended.append, lambda _: {})), ring


@pytest.mark.parametrize("path", SPELLINGS)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS", "HEAD"])
def test_no_spelling_of_a_path_slips_by(client, path, method):
    http, _ = client
    reply = http.request(method, path)
    if path.startswith("/health?"):
        assert reply.status_code == (
            200 if method in ("GET", "HEAD") else 401
        )  # a query is no path
    else:
        assert reply.status_code == 401, (method, path)
        assert reply.headers["www-authenticate"] == "Bearer"


def test_only_liveness_is_open_and_only_to_be_read(client):
    http, ring = client
    for path in ("/health", "/ping"):
        assert http.get(path).text == "open"
        assert http.post(path).status_code == 401
    assert (
        http.get("/metrics", headers={"authorization": f"Bearer {ring.keys['acme']}"}).text
        == "acme"
    )
    for prefix in ("x-forwarded-prefix", "x-original-url", "x-rewrite-url"):
        assert http.get("/v1/models", headers={prefix: "/health"}).status_code == 401
    twice = [
        ("authorization", f"Bearer {ring.keys['acme']}"),
        ("authorization", f"Bearer {ring.keys['bulk']}"),
    ]
    assert http.get("/metrics", headers=twice).status_code == 401
