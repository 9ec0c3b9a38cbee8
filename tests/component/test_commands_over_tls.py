"""Commands that reach a server over TLS, and what they say when they do not."""

import http.server
import json
import re
import ssl
import threading
from concurrent import futures
from functools import partial

import grpc
import pytest

from cli import chat, client
from cli.status import run_status
from cli.top import run_top
from client.endpoints import Endpoints, speaks_tls
from core.errors import ConfigError
from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc

# --- servers over TLS -----------------------------------------------------------------------------


class Parrot(generation_pb2_grpc.GenerationServicer):
    def GenerateStream(self, request, context):
        yield pb.GenerateStreamResponse(delta=pb.Delta(text=request.text))
        yield pb.GenerateStreamResponse(summary=pb.Summary())

    def Chat(self, request, context):
        yield pb.ChatResponse(delta=pb.Delta(text=request.messages[-1].content))
        yield pb.ChatResponse(summary=pb.Summary())


@pytest.fixture
def grpc_server(tls):
    """Makes servers: plain, over TLS, or over TLS for those that show a certificate."""
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


def test_generate_and_chat_reach_a_server_over_tls_whichever_way_the_authority_is_given(
    grpc_server, tls, monkeypatch, capsys
):
    address = grpc_server("tls")
    assert speaks_tls(address) and not speaks_tls(grpc_server("plain"))
    assert says(address, Endpoints(tls / "ca.pem")) == "hello"
    chat.run_chat(address, "", "hello", 0, 0.0, Endpoints(tls / "ca.pem"), as_json=False)
    assert capsys.readouterr().out.startswith("hello")
    monkeypatch.setenv("SSL_CERT_FILE", str(tls / "ca.pem"))
    assert says(address) == says(f"https://{address}") == "hello"
    assert says(grpc_server("plain")) == "hello", "the variable alone makes no server TLS"


def test_a_server_that_is_not_believed_gets_no_key_and_the_remedy_is_said(grpc_server, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "bt-x")
    with pytest.raises(ConfigError, match=r"give --ca \(or SSL_CERT_FILE\)"):
        says(grpc_server("tls"))


def test_a_server_that_asks_for_a_certificate_is_shown_one(grpc_server, tls):
    address, shown = grpc_server("mutual"), (tls / "router.pem", tls / "router.key")
    assert says(address, Endpoints(tls / "ca.pem", *shown)) == "hello"
    both = tls / "both.pem"
    both.write_bytes(shown[0].read_bytes() + shown[1].read_bytes())
    assert says(address, Endpoints(tls / "ca.pem", both)) == "hello"


def test_what_is_said_to_be_tls_never_becomes_plain_text(grpc_server, tls):
    with pytest.raises(ConfigError, match="http:// is plain text"):
        says(f"http://{grpc_server('tls')}", Endpoints(tls / "ca.pem"))
    files = Endpoints(tls / "ca.pem").grpc_files([grpc_server("plain")])
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


ROUTER = {
    "router_id": "router-a",
    "pid": 7,
    "host": "10.0.0.1",
    "http_port": 8000,
    "grpc_port": 9000,
    "metrics_port": 9100,
    "metrics_address": "10.0.0.1:9100",
}


class WebServers:
    """HTTP servers that answer every path with what `answers` holds, or send it `elsewhere`."""

    def __init__(self, tls):
        self.tls = tls
        counts = {"running": 3, "queued": 41, "refused": 7}
        self.answers = {
            "/ready": dict(READY),
            "/replicas": {"replicas": [], "routers": [ROUTER]},
            "/load": {"tiers": {"batch": counts}},
            "/links": {"links": []},
            "/metrics": "baton_requests_total 4\n",
        }
        self.keys = []
        self.elsewhere = ""
        self.servers = []

    def __call__(self, *, is_tls=True, is_mutual=False):
        """Start one more; returns its URL."""
        server = Server(("127.0.0.1", 0), partial(Handler, self))
        if is_tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.tls / "door.pem", self.tls / "door.key")
            if is_mutual:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(self.tls / "ca.pem")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.servers.append(server)
        return f"{'https' if is_tls else 'http'}://127.0.0.1:{server.server_port}"

    def close(self):
        for server in self.servers:
            server.shutdown()
            server.server_close()


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, servers, *arguments):
        self.servers = servers
        super().__init__(*arguments)

    def do_GET(self):
        answer = self.servers.answers[self.path]
        body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.servers.keys.append(self.headers["authorization"])
        if self.servers.elsewhere:
            self.send_response(302)
            self.send_header("location", self.servers.elsewhere)
            body = b"over there"
        else:
            self.send_response(200 if self.servers.answers["/ready"]["ready"] else 503)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def web_servers(tls):
    made = WebServers(tls)
    yield made
    made.close()


def status(url, *files):
    return run_status(url, Endpoints(*files), as_json=False)


def top_once(url, *files):
    run_top(url, Endpoints(*files), interval_s=0.1, is_once=True, as_json=True)


def test_status_reaches_a_server_over_tls_and_says_what_is_wrong_if_it_does_not(
    web_servers, tls, monkeypatch
):
    url, ca = web_servers(), tls / "ca.pem"
    assert status(url, ca) == 0
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(ConfigError, match="give --ca"):
        status(url)
    with pytest.raises(ConfigError, match="this server speaks TLS: write https://"):
        status(url.replace("https", "http"))
    with pytest.raises(ConfigError, match="this server speaks plain text: write http://"):
        status(web_servers(is_tls=False).replace("http", "https"), ca)
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    assert status(url) == 0
    mutual = web_servers(is_mutual=True)
    with pytest.raises(ConfigError, match="no router answers"):
        status(mutual)
    assert status(mutual, ca, tls / "router.pem", tls / "router.key") == 0


def test_a_key_is_sent_to_nobody_but_the_server_that_was_named(web_servers, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "bt-x")
    elsewhere = web_servers(is_tls=False)
    web_servers.elsewhere = f"{elsewhere}/ready"
    with pytest.raises(ConfigError, match="is no router"):
        status(web_servers(is_tls=False))
    assert web_servers.keys == ["Bearer bt-x"]


def test_status_shows_how_many_of_each_tier_run_wait_and_were_refused(web_servers, capsys):
    assert status(web_servers(is_tls=False)) == 0
    assert re.search(r"batch +3 +41 +0 +7 *$", capsys.readouterr().out, re.M)


def test_status_shows_where_each_router_listens_and_shows_its_metrics(web_servers, capsys):
    url = web_servers(is_tls=False)
    assert status(url) == 0
    assert re.search(r"router-a +7 +8000 +9000 +10\.0\.0\.1:9100 *$", capsys.readouterr().out, re.M)
    assert run_status(url, Endpoints(), as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["routers"] == [ROUTER]


def test_top_reaches_a_server_over_tls_with_a_key(web_servers, tls, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "bt-x")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    url = web_servers()
    with pytest.raises(ConfigError, match="give --ca"):
        top_once(url)
    top_once(url, tls / "ca.pem")
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "ready" and found["tiers"]["batch"]["queued"] == 41
    assert found["requests_per_s"] == 0.0
    assert found["routers"] == [ROUTER]
    # Every question of both looks carries the key.
    assert web_servers.keys == ["Bearer bt-x"] * 10


def test_top_says_that_what_shows_no_metrics_is_no_router(web_servers):
    web_servers.answers["/metrics"] = "<html>hello</html>"
    with pytest.raises(ConfigError, match="/metrics is no router"):
        top_once(web_servers(is_tls=False))


@pytest.mark.parametrize(
    ("state", "is_ready", "code"),
    [("ready", True, 0), ("degraded", True, 3), ("not_ready", False, 1)],
)
def test_status_says_every_problem_and_its_exit_code_tells_the_states_apart(
    web_servers, capsys, state, is_ready, code
):
    problem = {"code": "pool_empty", "detail": "0 of 1 decode workers are ready"}
    found = [] if state == "ready" else [problem]
    web_servers.answers["/ready"].update(ready=is_ready, state=state, problems=found)
    assert status(web_servers(is_tls=False)) == code
    out = capsys.readouterr().out
    assert f"m: {state.replace('_', ' ')};" in out
    assert ("pool_empty: 0 of 1 decode workers are ready" in out) is bool(found)
