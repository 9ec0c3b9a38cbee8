"""Keys and the gate: what is not literally open needs a key, and a key opens what it is bound to."""

import time

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from core.config import load_config
from core.errors import ConfigError, Unauthenticated
from router.credentials import ANYBODY, RELOAD_S, Identity, Keyring, new_key
from router.http_guard import Guard


@pytest.fixture
def ring(tmp_path):
    keys = {
        tenant: new_key(tenant, tier)
        for tenant, tier in (("acme", "interactive"), ("bulk", "batch"))
    }
    file = tmp_path / "keys"
    file.write_text("# who may come in\n\n" + "\n".join(line for _, line in keys.values()) + "\n")
    now = [0.0]
    ring = Keyring(str(file), lambda: now[0])
    ring.now, ring.file, ring.keys = now, file, {t: key for t, (key, _) in keys.items()}
    return ring


def test_a_key_names_its_tenant_and_tier(ring):
    assert ring.identify(f"Bearer {ring.keys['acme']}") == Identity("acme", "interactive")
    assert ring.identify(f"bearer {ring.keys['bulk']}") == Identity("bulk", "batch")


def wrong_headers(keys):
    acme, bulk = keys["acme"], keys["bulk"]
    return [
        "", "Bearer", "Bearer ", acme, f"Basic {acme}", f"Bearer {acme[:-1]}", f"Bearer {acme}x", f"Bearer {acme.upper()}",
        f"Bearer bt-00000000-{acme[-32:]}", f"Bearer {acme[:12]}{bulk[12:]}", f"Bearer {acme} {bulk}", "Bearer " + "a" * 9999,
        f"Bearer {acme[:-1]}{'0' if acme[-1] != '0' else '1'}",
    ]  # fmt: skip


def test_any_other_header_is_refused_and_none_says_why(ring):
    messages = set()
    for header in wrong_headers(ring.keys):
        with pytest.raises(Unauthenticated) as caught:
            ring.identify(header)
        messages.add(caught.value.message)
    assert len(messages) == 1 and ring.keys["acme"][:11] not in messages.pop()


def test_the_file_holds_no_secret_and_two_keys_of_one_tenant_differ(ring):
    text = ring.file.read_text()
    assert all(key.split("-")[2] not in text for key in ring.keys.values())
    assert new_key("a", "b")[0] != new_key("a", "b")[0]


def test_keys_come_and_go_without_a_restart_and_a_broken_file_harms_nobody(ring):
    key, line = new_key("late", "standard")
    ring.file.write_text(line + "\n")
    ring.now[0] += 2 * RELOAD_S
    assert ring.identify(f"Bearer {key}").tenant == "late"
    with pytest.raises(Unauthenticated):
        ring.identify(f"Bearer {ring.keys['acme']}")
    for harm in (lambda: ring.file.write_text("nonsense\n"), ring.file.unlink):
        harm()
        ring.now[0] += 2 * RELOAD_S
        assert ring.identify(f"Bearer {key}").tenant == "late"


def test_without_a_file_everybody_is_anybody():
    assert Keyring("", time.monotonic).identify("") == ANYBODY


@pytest.mark.parametrize("line", ["one two", "a b c d e f", "n zz00 00 t r"])
def test_a_broken_file_is_refused_at_start_with_its_line(tmp_path, line):
    (tmp_path / "keys").write_text(f"# c\n{line}\n")
    with pytest.raises(ConfigError, match="line 2"):
        Keyring(str(tmp_path / "keys"), time.monotonic)
    with pytest.raises(ConfigError, match="cannot be read"):
        Keyring(str(tmp_path / "none"), time.monotonic)


@pytest.mark.parametrize("name", ["", "a b", "ä", "x" * 65, "a/b"])
def test_names_of_tenants_are_names(name):
    with pytest.raises(ConfigError, match="tenant"):
        new_key(name, "standard")


SPELLINGS = [
    "/", "/v1/models", "//health", "/health/", "/Health", "/HEALTH", "/health/../v1/models", "/health/%2e%2e/v1/models",
    "/health%2f..%2fv1/models", "/health;x", "/health%00", "/%68ealth/x", "/healthz", "/ping/x", "/v1/../health/x", "/metrics",
    "/docs", "/openapi.json", "/ready", "/load", "/replicas", "/version", "/tokenize", "/health\\", "/./health/x", "/ping%20",
    "/health?x=1/../v1/models#", "/ health", "/static-offline-docs/swagger-ui.css",
]  # fmt: skip


@pytest.fixture
def client(ring):
    async def app(scope, receive, send):
        await PlainTextResponse(
            scope["state"]["identity"].tenant if "identity" in scope.get("state", {}) else "open"
        )(scope, receive, send)

    return TestClient(Guard(app, ring)), ring


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


def test_an_open_address_needs_keys():
    with pytest.raises(ConfigError, match="baton keys add"):
        load_config(flags={"router.host": "0.0.0.0"}, environment={})
    assert (
        load_config(
            flags={"router.host": "0.0.0.0", "security.api_keys": "k"}, environment={}
        ).router.host
        == "0.0.0.0"
    )
    with pytest.raises(ConfigError, match="door_key go together"):
        load_config(flags={"security.door_certificate": "x"}, environment={})


def test_no_key_may_pass_the_queue_as_the_routers_own_probe_does(tmp_path):
    with pytest.raises(ConfigError, match="the router's own"):
        new_key("acme", "canary")
    (tmp_path / "keys").write_text(new_key("acme", "standard")[1].replace(" standard", " canary"))
    with pytest.raises(ConfigError, match="line 1: tier canary"):
        Keyring(str(tmp_path / "keys"), time.monotonic)
