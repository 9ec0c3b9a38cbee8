"""Keys and the gate: what is not literally open needs a key,
and a key opens what it is bound to."""

import asyncio
import threading
import time
from dataclasses import replace

import pytest
from support.router_servers import RouterServers

from cli.up import check_access
from core import events
from core.config import load_config
from core.errors import ConfigError, Unauthenticated
from core.tenant_classes import TenantClasses
from router.access import credentials
from router.access.credentials import LOST_FILE_GRACE_S, RELOAD_S, Keyring, new_key
from router.access.identities import ANYBODY, Identity, KeyRole
from router.access.key_file import check_keys
from router.tiers import Tiers
from simulation.loop import run_virtual


def opens(ring, tenant, after_s=2 * RELOAD_S):
    """Does a tenant's key open the servers, some seconds later?"""
    ring.now[0] += after_s
    try:
        return ring.identify(f"Bearer {ring.keys[tenant]}").tenant == tenant
    except Unauthenticated:
        return False


def test_a_key_names_its_tenant_and_tier(ring):
    assert ring.identify(f"Bearer {ring.keys['acme']}") == Identity("acme", "interactive")
    assert ring.identify(f"bearer {ring.keys['bulk']}") == Identity("bulk", "batch")


def test_keys_of_an_unknown_tier_open_in_the_default_one_and_are_told_at_each_reading(
    ring, monkeypatch
):
    """A tier that goes from the config must not lock out those who pay for it."""
    key, line = new_key("rich", "gold")
    plain, other = new_key("plain", "default")
    told = []
    monkeypatch.setattr(events.LOGGER, "handle", lambda record: told.append(record))
    ring.file.write_text(f"{line}\n{other}\n")
    ring.now[0] += 2 * RELOAD_S
    assert ring.identify(f"Bearer {key}") == Identity("rich", "standard")
    assert ring.identify(f"Bearer {plain}") == Identity("plain", "standard")
    Keyring(str(ring.file), lambda: 0.0, tiers=Tiers(default="batch"))
    found = [r.fields for r in told if r.event == events.KEY_TIER_UNKNOWN.name]
    facts = {"tier": "gold", "keys": 1}
    assert found == [{**facts, "served_as": "standard"}, {**facts, "served_as": "batch"}]
    assert ring.num_by_state() == {"valid": 2, "expired": 0, "refused": 0, "lost_file": 0}


def test_keys_that_come_later_add_no_class_to_those_of_the_config(ring, monkeypatch):
    """Their file changes under a running router, and a class is a label of metrics."""
    classes = TenantClasses(["gold"])
    held = Keyring(str(ring.file), lambda: ring.now[0], lambda: ring.wall[0], classes=classes)
    told = []
    monkeypatch.setattr(events.LOGGER, "handle", lambda record: told.append(record))
    made = {name: new_key(name, "batch", tenant_class=name) for name in ("gold", "vip", "new")}
    ring.file.write_text("".join(f"{line}\n" for _, line in made.values()))
    ring.now[0] += 2 * RELOAD_S
    found = [held.identify(f"Bearer {key}").tenant_class for key, _ in made.values()]
    assert found == ["gold", "default", "default"]
    unknown = [r.fields for r in told if r.event == events.KEY_CLASS_UNKNOWN.name]
    assert unknown == [{"tenant_class": name, "keys": 1} for name in ("vip", "new")]


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
    servers = RouterServers(tmp_path)
    servers.service.start()
    (tmp_path / "keys").unlink()
    async with asyncio.timeout(30):
        while "keys_closed" not in [getattr(r, "event", "") for r in caplog.records]:
            await asyncio.sleep(0.01)
    await servers.service.stop(0)
    assert servers.service.keyring._timer.cancelled()


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


def test_without_a_file_everybody_is_anybody():
    ring = Keyring("", time.monotonic, tiers=Tiers(default="batch"))
    assert ring.identify("") == replace(ANYBODY, tier="batch")


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


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "host.example"])
def test_keys_that_cross_a_network_in_the_clear_are_warned_of_by_name(ring, capsys, host):
    flags = {"router.host": host, "security.api_keys": str(ring.file)}
    check_access(load_config(flags=flags, environment={}))
    warning = capsys.readouterr().err
    assert all(word in warning for word in (host, "security.door_certificate", "plain text"))
    pair = {"security.door_certificate": "c", "security.door_key": "k"}
    for closed in (pair, {"security.trust_network": True}, {"router.host": "127.0.0.1"}):
        check_access(load_config(flags={**flags, **closed}, environment={}))
        assert capsys.readouterr().err == ""


def test_a_start_with_a_broken_key_file_is_refused(ring):
    ring.file.write_text("nonsense\n")
    with pytest.raises(ConfigError, match="line 1"):
        check_access(load_config(flags={"security.api_keys": str(ring.file)}, environment={}))


def test_no_key_may_pass_the_queue_as_the_routers_own_probe_does(tmp_path):
    with pytest.raises(ConfigError, match="the router's own"):
        new_key("acme", "canary")
    line = new_key("acme", "standard")[1].replace(" standard", " canary")
    (tmp_path / "keys").write_text(line + "\n")
    with pytest.raises(ConfigError, match="line 1: tier canary"):
        check_keys(str(tmp_path / "keys"), (), TenantClasses())
