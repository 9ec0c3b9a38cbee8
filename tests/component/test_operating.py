"""The operator's side of processes, files and servers: what is told, reached and returned."""

import asyncio
import datetime
import json
import logging
import os
import re
import signal

import pytest
from support.router_servers import RouterServers

from cluster.certificate_expiry import CertificateEnds, earliest_end
from cluster.local import Child, LocalCluster, _log_end
from core import events
from core.config import BatonConfig, SecurityConfig
from core.errors import Overloaded, QueueFull, QueueTimeout, TooLate, WorkerLost
from core.session import Role
from router.admission import Admission
from router.calls import Call
from router.observe.readiness import PROBLEMS
from router.observe.routers import RouterEntry
from router.observe.shedding_log import PERIOD_S, SheddingLog
from simulation.ports import MemoryStore
from transport import certificates as certs
from transport.certificates import make_certificates
from transport.tls import session_tls

DAY_S = 86400


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, events.LOGGER.name)
    return lambda: [(r.event, r.fields) for r in caplog.records if hasattr(r, "event")]


# --- the parent of all processes ------------------------------------------------------------------


async def test_a_child_that_dies_or_does_not_start_is_told_of_with_pid_and_reason(
    told, monkeypatch
):
    reports = iter(
        [{"worker": {}}, {"error": "ModelLoadError", "message": "no such folder"}, {"worker": {}}]
    )
    pids = []

    async def spawn(kind, config):
        line = json.dumps(next(reports))
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", f"echo '{line}'; exec sleep 60", stdout=asyncio.subprocess.PIPE
        )
        pids.append(process.pid)
        return Child(process, -1)

    monkeypatch.setattr(Child, "spawn", spawn)
    monkeypatch.setattr("cluster.local.from_json", lambda tree: tree)
    cluster = LocalCluster(BatonConfig())
    await cluster._start_worker("decode-0")
    keeper = asyncio.create_task(cluster._keep("decode-0"))
    os.kill(pids[0], signal.SIGKILL)
    async with asyncio.timeout(30):
        while len(told()) < 3:
            await asyncio.sleep(0.01)
        os.kill(pids[1], signal.SIGKILL)
        while len(told()) < 5:
            await asyncio.sleep(0.01)
    keeper.cancel()
    await cluster._workers["decode-0"].stop()
    assert told() == [
        ("child_started", {"child": "decode-0", "child_pid": pids[0]}),
        ("child_ended", {"child": "decode-0", "child_pid": pids[0], "reason": "SIGKILL"}),
        ("child_failed", {"child": "decode-0", "reason": "no such folder", "retry_in_s": 1.0}),
        ("child_ended", {"child": "decode-0", "child_pid": pids[1], "reason": "SIGKILL"}),
        ("child_started", {"child": "decode-0", "child_pid": pids[2]}),
    ]


@pytest.mark.parametrize(
    ("how", "limit_s", "fact"),
    [
        ("exec sleep 60", 0.05, "prefill-1 was not ready within 0.05 s; its last line in the log"),
        ("exit 7", 60, "prefill-1 ended (exit code 7) before it was ready"),
        ("kill -9 $$", 60, "prefill-1 ended (SIGKILL) before it was ready"),
    ],
)
async def test_a_child_that_does_not_come_up_is_named_with_the_limit(how, limit_s, fact):
    """It does not go on behind the back of the one that takes its place."""
    process = await asyncio.create_subprocess_exec("sh", "-c", how, stdout=asyncio.subprocess.PIPE)
    with pytest.raises(WorkerLost) as caught:
        await Child(process, -1).recv("prefill-1", limit_s)
    assert caught.value.message.startswith(fact)
    async with asyncio.timeout(30):
        assert await process.wait() == {"exit 7": 7}.get(how, -signal.SIGKILL)


@pytest.mark.parametrize(("how", "event"), [("exit 0", "child_left"), ("exit 70", "child_ended")])
async def test_a_process_that_was_told_to_end_is_no_fault(told, how, event):
    process = await asyncio.create_subprocess_exec("sh", "-c", how)
    await process.wait()
    _log_end("decode-0", Child(process, -1))
    ((found, fields),) = told()
    assert found == event and fields["child_pid"] == process.pid
    assert fields.get("reason") == ("exit code 70" if event == "child_ended" else None)


async def test_a_router_that_dies_is_told_of(told, monkeypatch):
    cluster = LocalCluster(BatonConfig())
    process = await asyncio.create_subprocess_exec("sh", "-c", "exit 70")
    cluster._routers[0] = Child(process, -1)
    cluster.routers[0] = RouterEntry("router-a", 1, "127.0.0.1", 8000, 9000, 9100)
    cluster.failed = asyncio.get_running_loop().create_future()

    async def start(seat, config):
        raise WorkerLost("the port is taken")

    monkeypatch.setattr(cluster, "_start_router", start)
    monkeypatch.setattr("cluster.local.MAX_ROUTER_FAILURES", 1)
    await cluster._keep_router(0)
    assert told()[0] == (
        "child_ended",
        {"child": "router-0", "child_pid": process.pid, "reason": "exit code 70"},
    )
    assert told()[1][0] == "child_failed" and told()[1][1]["reason"] == "the port is taken"
    assert isinstance(cluster.failed.exception(), WorkerLost)


# --- load -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Overloaded, QueueFull, QueueTimeout, TooLate])
def test_load_that_is_shed_is_one_line_in_ten_seconds_with_how_much_that_was(told, kind):
    now = [0.0]
    shedding = SheddingLog(Admission(4, 4, 1.0), lambda: now[0])
    shedding.note("invalid_value")
    for _ in range(500):
        shedding.note(kind.code)
    now[0] += PERIOD_S
    shedding.note(kind.code)
    assert [fields["refused"] for _, fields in told()] == [1, 500]


async def test_both_kinds_of_refusal_count_as_load_that_is_shed(told, tmp_path):
    servers = RouterServers(tmp_path)
    servers.service.recorder.call_ended(Call("http", "127.0.0.1", code=Overloaded.code))
    assert "load_shed" in [name for name, _ in told()]


async def test_metrics_count_what_is_not_as_configured_by_the_words_of_ready(tmp_path):
    servers = RouterServers(
        tmp_path,
        parts={"configured": {Role.PREFILL: 2, Role.DECODE: 1}, "store": MemoryStore()},
    )
    service = servers.service
    found = {}
    for state in ("down", "ok"):
        servers.mirror.state = state
        lines = service.telemetry.text().decode().splitlines()
        counts = (re.fullmatch(r'baton_problems\{code="(\w+)"\} (.*)', line) for line in lines)
        found[state] = {match[1]: float(match[2]) for match in counts if match}
    await service.stop(0)
    none = dict.fromkeys(PROBLEMS, 0.0)
    missing = {**none, "starting": 1.0, "pool_empty": 2.0}
    assert found == {"down": {**missing, "store_unreachable": 1.0}, "ok": missing}


# --- certificates ---------------------------------------------------------------------------------


def made(folder, monkeypatch, days):
    """Certificates that end in some days."""
    for old in folder.iterdir():
        old.unlink()
    monkeypatch.setattr(certs, "DAYS", days)
    make_certificates(folder, ["localhost"])
    return datetime.datetime.now(datetime.UTC).timestamp() + days * DAY_S


def test_ends_of_all_certificates_are_known_and_follow_a_renewal(tmp_path, monkeypatch, told):
    ends_at = made(tmp_path, monkeypatch, 40)
    security = SecurityConfig(tls_dir=str(tmp_path))
    now = [0.0]
    monkeypatch.setattr("core.clocks.SystemClock.now_s", lambda _: now[0])
    tls = session_tls(security, "router")
    ends = CertificateEnds(security, "router", tls, (tmp_path / "door.pem").read_bytes)
    names = {"door", "authority", "router", "prefill", "decode"}
    assert set(ends.read()) == names
    assert all(abs(end - ends_at) < 60 for end in ends.read().values())
    worker = CertificateEnds(security, "decode", session_tls(security, "decode"))
    assert set(worker.read()) == {"authority", "decode"}
    renewed = made(tmp_path, monkeypatch, 80)
    now[0] += 2.0
    assert all(abs(end - renewed) < 60 for end in ends.read().values())
    assert told() == [("certificate_renewed", {"what": "the certificate of role router"})]


async def test_a_certificate_that_ends_soon_is_warned_of(tmp_path, monkeypatch, told):
    made(tmp_path, monkeypatch, 7)
    ends = CertificateEnds(SecurityConfig(), "router", None, (tmp_path / "door.pem").read_bytes)
    ends.watch()
    ends.close()
    assert told() == [("certificate_ends_soon", {"what": "door", "days_left": 7.0})]
    made(tmp_path, monkeypatch, 31)
    ends.watch()
    ends.close()
    assert len(told()) == 1


def test_of_a_chain_the_earliest_end_counts(tmp_path, monkeypatch):
    first = made(tmp_path, monkeypatch, 300)
    late = (tmp_path / "door.pem").read_bytes()
    soon = made(tmp_path, monkeypatch, 3)
    chain = late + (tmp_path / "ca.pem").read_bytes()
    assert abs(earliest_end(chain) - soon) < 60 < first - soon


async def test_the_metric_shows_when_each_certificate_ends(tmp_path):
    ends = {"read_certificate_ends": lambda: {"door": 1_900_000_000}}
    servers = RouterServers(tmp_path, parts=ends)
    line = 'baton_certificate_expiration_timestamp_seconds{certificate="door"} 1.9e+09'
    assert line in servers.service.telemetry.text().decode()
