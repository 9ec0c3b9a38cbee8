"""Keys and the gate: what is not literally open needs a key,
and a key opens what it is bound to."""

import asyncio
import threading
import time

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from support.doors import Doors

from cli.up import check_ports
from core import events
from core.config import load_config
from core.errors import ConfigError, PermissionDenied, Unauthenticated
from router.access import credentials
from router.access.bad_keys import BadKeys
from router.access.credentials import LOST_FILE_GRACE_S, RELOAD_S, Keyring, new_key
from router.access.identities import ANYBODY, Identity, KeyRole, Right
from router.access.key_file import check_keys, parse_keys, parse_line
from router.http.auth import Guard
from simulation.loop import run_virtual


@pytest.fixture
def ring(tmp_path):
    keys = {
        tenant: new_key(tenant, tier)
        for tenant, tier in (("acme", "interactive"), ("bulk", "batch"))
    }
    file = tmp_path / "keys"
    file.write_text("# who may come in\n\n" + "\n".join(line for _, line in keys.values()) + "\n")
    now, wall = [0.0], [1.8e9]
    ring = Keyring(str(file), lambda: now[0], lambda: wall[0])
    ring.now, ring.wall, ring.file = now, wall, file
    ring.keys = {t: key for t, (key, _) in keys.items()}
    ring.lines = {t: line for t, (_, line) in keys.items()}
    return ring


def opens(ring, tenant, after_s=2 * RELOAD_S):
    """Does a tenant's key open the doors, some seconds later?"""
    ring.now[0] += after_s
    try:
        return ring.identify(f"Bearer {ring.keys[tenant]}").tenant == tenant
    except Unauthenticated:
        return False


def test_a_key_names_its_tenant_and_tier(ring):
    assert ring.identify(f"Bearer {ring.keys['acme']}") == Identity("acme", "interactive")
    assert ring.identify(f"bearer {ring.keys['bulk']}") == Identity("bulk", "batch")


def wrong_headers(keys):
    acme, bulk = keys["acme"], keys["bulk"]
    return [
        "",
        "Bearer",
        "Bearer ",
        acme,
        f"Basic {acme}",
        f"Bearer {acme[:-1]}",
        f"Bearer {acme}x",
        f"Bearer {acme.upper()}",
        f"Bearer bt-00000000-{acme[-32:]}",
        f"Bearer {acme[:12]}{bulk[12:]}",
        f"Bearer {acme} {bulk}",
        "Bearer " + "a" * 9999,
        f"Bearer {acme[:-1]}{'0' if acme[-1] != '0' else '1'}",
    ]


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


def test_keys_come_and_go_without_a_restart(ring):
    key, line = new_key("late", "standard")
    ring.file.write_text(line + "\n")
    ring.now[0] += 2 * RELOAD_S
    assert ring.identify(f"Bearer {key}").tenant == "late"
    assert not opens(ring, "acme") and not opens(ring, "bulk")


@pytest.mark.parametrize(
    "broken", ["a line with a typo", "{bulk} role=king", "{bulk} expires=soon", "{bulk} color=red"]
)
def test_a_broken_line_is_told_and_opens_nothing_and_keeps_no_revoked_key_alive(
    ring, caplog, broken
):
    ring.file.write_text(f"{ring.lines['acme']}\n{broken.format(**ring.lines)}\n")
    assert opens(ring, "acme") and not opens(ring, "bulk")
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert "line 2" in caplog.text and ring.keys["bulk"].split("-")[2] not in caplog.text
    assert ring.num_by_state() == {"valid": 1, "expired": 0, "refused": 1, "lost_file": 0}
    ring.file.write_text("\n".join(ring.lines.values()) + "\n")
    assert opens(ring, "bulk") and ring.num_by_state()["refused"] == 0


@pytest.mark.parametrize("how", ["gone", "a folder", "written by anybody"])
def test_without_a_readable_file_keys_hold_for_a_moment_and_then_none_does(ring, caplog, how):
    text = ring.file.read_text()
    if how == "written by anybody":
        ring.file.chmod(0o666)
    else:
        ring.file.unlink()
    if how == "a folder":
        ring.file.mkdir()
    assert opens(ring, "acme") and ring.num_by_state()["lost_file"] == 1
    assert opens(ring, "acme", LOST_FILE_GRACE_S - 2 * RELOAD_S - 0.1)
    assert len(caplog.records) == 1, "told once, and at once"
    assert not opens(ring, "acme") and not opens(ring, "acme", 3600)
    assert ring.num_by_state() == {"valid": 0, "expired": 0, "refused": 0, "lost_file": 1}
    assert [r.levelname for r in caplog.records] == ["ERROR"] * 2, "and once when the keys end"
    if how == "a folder":
        ring.file.rmdir()
    ring.file.write_text(text)
    ring.file.chmod(0o600)
    assert opens(ring, "acme") and ring.num_by_state()["lost_file"] == 0


def test_a_file_is_lost_and_back_though_nobody_calls(ring, monkeypatch, caplog):
    told = []
    caplog.set_level("INFO", events.LOGGER.name)
    monkeypatch.setattr(events.LOGGER, "handle", lambda r: told.append((r.event, ring._now_s(), r)))

    async def main():
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(ring, "_now_s", lambda: loop.time() - begun)
        begun = loop.time()
        ring.watch()
        text = ring.file.read_text()
        await asyncio.sleep(9.25)
        ring.file.unlink()
        await asyncio.sleep(10.75)
        ring.file.write_text(text)
        await asyncio.sleep(10)
        ring.close()
        ring.file.unlink()
        await asyncio.sleep(100)

    run_virtual(main())
    (lost, lost_s, lost_record), (closed, closed_s, _), *back = told
    assert (lost, closed, [event for event, *_ in back]) == (
        "key_file_lost",
        "keys_closed",
        ["keys_reloaded", "key_file_back"],
    )
    assert 9.25 <= lost_s <= 9.25 + RELOAD_S
    assert closed_s - lost_s == lost_record.fields["closes_in_s"] == LOST_FILE_GRACE_S - RELOAD_S
    assert back[0][1] <= 20 + RELOAD_S


async def test_a_router_looks_at_its_key_file_from_start_to_stop(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(credentials, "RELOAD_S", 0.01)
    monkeypatch.setattr(credentials, "LOST_FILE_GRACE_S", 0.05)
    doors = Doors(tmp_path)
    doors.service.start()
    (tmp_path / "keys").unlink()
    async with asyncio.timeout(30):
        while "keys_closed" not in [getattr(r, "event", "") for r in caplog.records]:
            await asyncio.sleep(0.01)
    await doors.service.stop(0)
    assert doors.service.keyring._timer.cancelled()


def test_a_long_file_is_read_off_the_loop_and_then_holds(ring, monkeypatch):
    may_read, readers = threading.Event(), []

    def read(path):
        readers.append(threading.current_thread())
        may_read.wait(30)
        return credentials_read(path)

    credentials_read = credentials._read
    monkeypatch.setattr(credentials, "_read", read)
    ring.file.write_text(ring.lines["acme"] + "\n" + "# much\n" * 10_000)
    assert opens(ring, "bulk") and opens(ring, "bulk"), "what was good holds until it is read"
    may_read.set()
    ring._reading.exception(30)
    assert not opens(ring, "bulk", 0) and opens(ring, "acme")
    assert len(readers) == 1 and readers[0] is not threading.current_thread()
    ring.file.write_text(ring.lines["bulk"] + "\n")
    assert opens(ring, "bulk") and readers[1] is threading.current_thread()


def test_whoever_comes_first_after_an_hour_without_a_file_is_refused(ring):
    ring.file.unlink()
    assert not opens(ring, "acme", 3600)


def test_of_two_lines_with_one_name_neither_opens(ring):
    ring.file.write_text(f"{ring.lines['acme']}\n{ring.lines['acme'].replace('acme', 'evil')}\n")
    ring.now[0] += 2 * RELOAD_S
    with pytest.raises(Unauthenticated):
        ring.identify(f"Bearer {ring.keys['acme']}")
    keys, faults = parse_keys(f"{ring.lines['acme']}\n" * 3)
    assert not keys and len(faults) == 2 and "line 3" in faults[1] and "line 1" in faults[1]


def test_a_key_ends_at_its_time(ring):
    key, line = new_key("acme", "standard", KeyRole.TENANT, ring.wall[0] + 60)
    ring.file.write_text(line + "\n")
    ring.now[0] += 2 * RELOAD_S
    ring.wall[0] += 59.9
    assert ring.identify(f"Bearer {key}").tenant == "acme"
    ring.wall[0] += 0.2
    with pytest.raises(Unauthenticated):
        ring.identify(f"Bearer {key}")
    assert ring.num_by_state()["expired"] == 1 and ring.num_by_state()["valid"] == 0


def test_a_line_that_was_cut_off_opens_nothing_and_harms_no_other():
    """Without its end a key would last for ever, and a scraper's would generate."""
    whole = new_key("acme", "batch")[1]
    line = new_key("ops", "standard", KeyRole.METRICS, 1.9e9)[1]
    for length in range(1, len(line) + 1):
        keys, faults = parse_keys(f"{whole}\n{line[:length]}")
        assert [key.text() for key in keys.values()] == [whole]
        assert [fault[: len(CUT_OFF)] for fault in faults] == [CUT_OFF]
    keys, faults = parse_keys(f"{whole}\n{line}\n# a note needs no end")
    assert [key.text() for key in keys.values()] == [whole, line] and not faults


@pytest.mark.parametrize("role", KeyRole)
def test_a_line_says_all_that_its_key_may(role):
    _, line = new_key("acme", "batch", role, 1.9e9)
    read = parse_line(line)
    assert read.identity == Identity("acme", "batch", role) and read.expires_at == 1.9e9
    assert read.text() == line and line.endswith("expires=2030-03-17T17:46:40Z")


def test_each_role_has_its_rights_and_no_others():
    rights = {role: set() for role in KeyRole}
    for role in KeyRole:
        for right in Right:
            try:
                Identity("t", "standard", role).check(right)
                rights[role].add(right)
            except PermissionDenied as error:
                assert "admin" in error.message
    assert rights == {
        KeyRole.TENANT: {Right.ANY_KEY, Right.GENERATE},
        KeyRole.METRICS: {Right.ANY_KEY, Right.OBSERVE},
        KeyRole.ADMIN: set(Right),
    }
    assert all(ANYBODY.check(right) is None for right in Right), "an open cluster stays open"


def test_without_a_file_everybody_is_anybody():
    assert Keyring("", time.monotonic).identify("") == ANYBODY


HASH = "00" * 32
CUT_OFF = "security.api_keys, line 2: has no newline at its end"


@pytest.mark.parametrize(
    "line",
    [
        "one two",
        "a b c d e f",
        f"01234567 zz {HASH} t r",
        "01234567 00 11 t r",
        f"01234567 00 {HASH} t! r",
        f"0123456 00 {HASH} t r",
    ],
)
def test_a_broken_file_is_refused_at_start_with_its_line(tmp_path, line):
    file = tmp_path / "keys"
    file.write_text(f"# c\n{line}\n")
    with pytest.raises(ConfigError, match="line 2"):
        check_keys(str(file))
    ring = Keyring(str(file), time.monotonic)  # a router that comes back meanwhile serves the rest
    assert ring.num_by_state()["refused"] == 1
    with pytest.raises(ConfigError, match="cannot be read"):
        check_keys(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read"):
        Keyring(str(tmp_path / "none"), time.monotonic)


def test_a_file_that_anybody_may_write_is_refused_at_start(ring):
    check_keys(str(ring.file))
    ring.file.chmod(0o602)
    for refuse in (check_keys, lambda path: Keyring(path, time.monotonic)):
        with pytest.raises(ConfigError, match="every user of this machine"):
            refuse(str(ring.file))


@pytest.mark.parametrize("name", ["", "a b", "ä", "x" * 65, "a/b"])
def test_names_of_tenants_are_names(name):
    with pytest.raises(ConfigError, match="tenant"):
        new_key(name, "standard")


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
    return TestClient(Guard(app, ring, bad_keys, ring.ended.append)), ring


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


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "door.example"])
def test_keys_that_cross_a_network_in_the_clear_are_warned_of_by_name(ring, capsys, host):
    flags = {"router.host": host, "security.api_keys": str(ring.file)}
    check_ports(load_config(flags=flags, environment={}))
    warning = capsys.readouterr().err
    assert all(word in warning for word in (host, "security.door_certificate", "plain text"))
    pair = {"security.door_certificate": "c", "security.door_key": "k"}
    for closed in (pair, {"security.trust_network": True}, {"router.host": "127.0.0.1"}):
        check_ports(load_config(flags={**flags, **closed}, environment={}))
        assert capsys.readouterr().err == ""


def test_a_start_with_a_broken_key_file_is_refused(ring):
    ring.file.write_text("nonsense\n")
    with pytest.raises(ConfigError, match="line 1"):
        check_ports(load_config(flags={"security.api_keys": str(ring.file)}, environment={}))


def test_no_key_may_pass_the_queue_as_the_routers_own_probe_does(tmp_path):
    with pytest.raises(ConfigError, match="the router's own"):
        new_key("acme", "canary")
    line = new_key("acme", "standard")[1].replace(" standard", " canary")
    (tmp_path / "keys").write_text(line + "\n")
    with pytest.raises(ConfigError, match="line 1: tier canary"):
        check_keys(str(tmp_path / "keys"))
