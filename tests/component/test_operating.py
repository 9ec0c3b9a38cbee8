"""The operator's side of processes, files and doors: what is told, reached and returned."""

import asyncio
import datetime
import http.server
import json
import logging
import os
import re
import signal
import ssl
import threading
from concurrent import futures

import grpc
import pytest
from support.doors import Doors

from cli import chat, client
from cli.status import run_status
from client.endpoints import Endpoints, speaks_tls
from cluster.certificate_expiry import CertificateEnds, earliest_end
from cluster.local import Child, LocalCluster, _log_end
from core import events
from core.config import BatonConfig, SecurityConfig
from core.errors import ConfigError, Overloaded, WorkerLost
from core.session import Role
from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc
from router.admission import Admission
from router.calls import Call
from router.observe.readiness import PROBLEMS
from router.observe.shedding import PERIOD_S, Shedding
from simulation.ports import MemoryStore
from transport import certificates as certs
from transport.certificates import make_certificates
from transport.tls import session_tls

DAY_S = 86400


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, events.LOGGER.name)
    return lambda: [(r.event, r.fields) for r in caplog.records if hasattr(r, "event")]


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder, ["localhost", "127.0.0.1"])
    return folder


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
    cluster.addresses.append((8000, 9000))
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


def test_load_that_is_shed_is_one_line_in_ten_seconds_with_how_much_that_was(told):
    now = [0.0]
    shedding = Shedding(Admission(4, 4, 1.0), lambda: now[0])
    shedding.note("invalid_value")
    for _ in range(500):
        shedding.note(Overloaded.code)
    now[0] += PERIOD_S
    shedding.note(Overloaded.code)
    assert [fields["refused"] for _, fields in told()] == [1, 500]


async def test_both_kinds_of_refusal_count_as_load_that_is_shed(told, tmp_path):
    doors = Doors(tmp_path)
    doors.service.recorder.call_ended(Call("http", "127.0.0.1", code=Overloaded.code))
    assert "load_shed" in [name for name, _ in told()]


# --- doors over TLS -------------------------------------------------------------------------------


class Parrot(generation_pb2_grpc.GenerationServicer):
    def GenerateStream(self, request, context):
        yield pb.GenerateStreamResponse(delta=pb.Delta(text=request.text))
        yield pb.GenerateStreamResponse(summary=pb.Summary())

    def Chat(self, request, context):
        yield pb.ChatResponse(delta=pb.Delta(text=request.messages[-1].content))
        yield pb.ChatResponse(summary=pb.Summary())


@pytest.fixture
def grpc_door(tls):
    """Makes doors: plain, over TLS, or over TLS for those that show a certificate."""
    servers = []

    def make(kind):
        server = grpc.server(futures.ThreadPoolExecutor(2))
        generation_pb2_grpc.add_GenerationServicer_to_server(Parrot(), server)
        if kind == "plain":
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            pair = (tls / "door.key").read_bytes(), (tls / "door.pem").read_bytes()
            credentials = grpc.ssl_server_credentials(
                [pair], (tls / "ca.pem").read_bytes(), kind == "mutual"
            )
            port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield make
    for server in servers:
        server.stop(0)


def says(address, access=None):
    access = access or Endpoints()
    request = pb.GenerateRequest(text="hello")
    return client.stream_answer(address, request, None, access).text


def test_generate_and_chat_reach_a_door_over_tls_whichever_way_the_authority_is_given(
    grpc_door, tls, monkeypatch, capsys
):
    address = grpc_door("tls")
    assert speaks_tls(address) and not speaks_tls(grpc_door("plain"))
    assert says(address, Endpoints(tls / "ca.pem")) == "hello"
    chat.run_chat(address, "", "hello", 0, 0.0, Endpoints(tls / "ca.pem"), as_json=False)
    assert capsys.readouterr().out.startswith("hello")
    monkeypatch.setenv("SSL_CERT_FILE", str(tls / "ca.pem"))
    assert says(address) == says(f"https://{address}") == "hello"
    assert says(grpc_door("plain")) == "hello", "the variable alone makes no door TLS"


def test_a_door_that_is_not_believed_gets_no_key_and_the_remedy_is_said(grpc_door, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "bt-x")
    with pytest.raises(ConfigError, match=r"give --ca \(or SSL_CERT_FILE\)"):
        says(grpc_door("tls"))


def test_a_door_that_asks_for_a_certificate_is_shown_one(grpc_door, tls):
    address, shown = grpc_door("mutual"), (tls / "router.pem", tls / "router.key")
    assert says(address, Endpoints(tls / "ca.pem", *shown)) == "hello"
    both = tls / "both.pem"
    both.write_bytes(shown[0].read_bytes() + shown[1].read_bytes())
    assert says(address, Endpoints(tls / "ca.pem", both)) == "hello"


def test_what_is_said_to_be_tls_never_becomes_plain_text(grpc_door, tls):
    with pytest.raises(ConfigError, match="http:// is plain text"):
        says(f"http://{grpc_door('tls')}", Endpoints(tls / "ca.pem"))
    files = Endpoints(tls / "ca.pem").grpc_files([grpc_door("plain")])
    assert files == ((tls / "ca.pem").read_bytes(), None, None)


READY = {
    "ready": True,
    "state": "ready",
    "problems": [],
    "store": "ok",
    "models": {
        "m": {
            "prefill": {"ready": 1, "total": 1, "configured": 1},
            "decode": {"ready": 1, "total": 1, "configured": 1},
            "canary_ms": 3.0,
            "canary_error": "",
        }
    },
}


@pytest.fixture
def web_door(tls):
    """A router's HTTP door in words: over TLS if it gets a context, saying what `answers` holds."""
    answers = {"/ready": dict(READY), "/replicas": {"replicas": []}}
    servers = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(answers[self.path]).encode()
            make.keys.append(self.headers["authorization"])
            if make.elsewhere:
                self.send_response(302)
                self.send_header("location", make.elsewhere)
                body = b"over there"
            else:
                self.send_response(200 if answers["/ready"]["ready"] else 503)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):
            pass

    def make(*, is_tls=True, is_mutual=False):
        server = Server(("127.0.0.1", 0), Handler)
        if is_tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls / "door.pem", tls / "door.key")
            if is_mutual:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(tls / "ca.pem")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"{'https' if is_tls else 'http'}://127.0.0.1:{server.server_port}"

    make.answers, make.keys, make.elsewhere = answers, [], ""
    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def status(url, *files):
    return run_status(url, Endpoints(*files), as_json=False)


def test_status_reaches_a_door_over_tls_and_says_what_is_wrong_if_it_does_not(
    web_door, tls, monkeypatch
):
    url, ca = web_door(), tls / "ca.pem"
    assert status(url, ca) == 0
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(ConfigError, match="give --ca"):
        status(url)
    with pytest.raises(ConfigError, match="this server speaks TLS: write https://"):
        status(url.replace("https", "http"))
    with pytest.raises(ConfigError, match="this server speaks plain text: write http://"):
        status(web_door(is_tls=False).replace("http", "https"), ca)
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    assert status(url) == 0
    mutual = web_door(is_mutual=True)
    with pytest.raises(ConfigError, match="no router answers"):
        status(mutual)
    assert status(mutual, ca, tls / "router.pem", tls / "router.key") == 0


def test_a_key_is_sent_to_nobody_but_the_door_that_was_named(web_door, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "bt-x")
    elsewhere = web_door(is_tls=False)
    web_door.elsewhere = f"{elsewhere}/ready"
    with pytest.raises(ConfigError, match="is no router"):
        status(web_door(is_tls=False))
    assert web_door.keys == ["Bearer bt-x"]


@pytest.mark.parametrize(
    ("state", "is_ready", "code"),
    [("ready", True, 0), ("degraded", True, 3), ("not_ready", False, 1)],
)
def test_status_says_every_problem_and_its_exit_code_tells_the_states_apart(
    web_door, capsys, state, is_ready, code
):
    problem = {"code": "pool_empty", "detail": "0 of 1 decode workers are ready"}
    found = [] if state == "ready" else [problem]
    web_door.answers["/ready"].update(ready=is_ready, state=state, problems=found)
    assert status(web_door(is_tls=False)) == code
    out = capsys.readouterr().out
    assert f"m: {state.replace('_', ' ')};" in out
    assert ("pool_empty: 0 of 1 decode workers are ready" in out) is bool(found)


async def test_metrics_count_what_is_not_as_configured_by_the_words_of_ready(tmp_path):
    doors = Doors(
        tmp_path,
        parts={"configured": {Role.PREFILL: 2, Role.DECODE: 1}, "store": MemoryStore()},
    )
    service = doors.service
    found = {}
    for state in ("down", "ok"):
        doors.mirror.state = state
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
    monkeypatch.setattr("core.ports.SystemClock.now_s", lambda _: now[0])
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
    doors = Doors(tmp_path, parts=ends)
    line = 'baton_certificate_expiration_timestamp_seconds{certificate="door"} 1.9e+09'
    assert line in doors.service.telemetry.text().decode()
