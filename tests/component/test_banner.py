"""A closed cluster as a new user makes it: the command it shows reaches it, and hints fit."""

import socket
import ssl
import threading

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli.banner import announce, arguments_to_reach
from cli.main import app
from client.endpoints import Endpoints
from core.config import BatonConfig
from core.errors import ConfigError
from transport.certificates import hosts_of, make_certificates

LOCAL = ["localhost", "127.0.0.1", "::1"]


def make(folder, *hosts):
    """Certificates as `baton certs` makes them."""
    named = [part for host in hosts for part in ("--host", host)]
    done = CliRunner().invoke(app, ["certs", "--out", str(folder), *named])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def serve_tls():
    """Makes servers that speak TLS with the certificate of a folder, and nothing else."""
    sockets = []

    def serve(listener, context):
        while True:
            try:
                accepted, _ = listener.accept()
            except OSError:
                return
            try:
                context.wrap_socket(accepted, server_side=True).close()
            except OSError:
                accepted.close()

    def start(folder):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "door.pem", folder / "door.key")
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)
        threading.Thread(target=serve, args=(listener, context), daemon=True).start()
        return f"https://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in sockets:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def closed(folder, host="127.0.0.1"):
    pair = {"door_certificate": f"{folder}/door.pem", "door_key": f"{folder}/door.key"}
    return BatonConfig.model_validate(
        {"router": {"host": host}, "security": {"api_keys": "keys", **pair}}
    )


def test_names_of_the_server_are_added_to_those_of_the_machine_itself(tmp_path):
    made = make(tmp_path / "tls", "my-host", "10.0.0.5", "localhost") / "door.pem"
    assert hosts_of(made.read_bytes()) == [*LOCAL, "my-host", "10.0.0.5"]
    assert hosts_of((make(tmp_path / "none") / "door.pem").read_bytes()) == LOCAL


def test_a_certificate_for_other_hosts_is_told_by_the_names_it_has(
    tmp_path, monkeypatch, serve_tls
):
    monkeypatch.setattr("transport.certificates.LOCAL_HOSTS", ())
    make_certificates(tmp_path / "tls", ["my-host", "10.0.0.5"])
    url = serve_tls(tmp_path / "tls")
    with pytest.raises(ConfigError, match="not valid for '127.0.0.1'") as refused:
        Endpoints(tmp_path / "tls" / "ca.pem").get(url, "/ready")
    assert "this server's certificate is for my-host, 10.0.0.5: reach it" in str(refused.value)
    assert "--ca" not in str(refused.value)


def test_an_authority_that_did_not_sign_is_told_by_its_file(tmp_path, monkeypatch, serve_tls):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    url = serve_tls(make(tmp_path / "tls"))
    other = make(tmp_path / "other") / "ca.pem"
    with pytest.raises(ConfigError, match=f"{other} is not the authority that signed it"):
        Endpoints(other).get(url, "/ready")
    with pytest.raises(ConfigError, match="give --ca "):
        Endpoints().get(url, "/ready")


def test_a_certificate_that_has_ended_is_told(tmp_path, monkeypatch, serve_tls):
    monkeypatch.setattr("transport.certificates.DAYS", -1 / 48)
    url = serve_tls(make(tmp_path / "tls"))
    with pytest.raises(ConfigError, match="give the servers a certificate that is valid today"):
        Endpoints(tmp_path / "tls" / "ca.pem").get(url, "/ready")


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("my-host", "my-host"),
        ("10.9.9.9", "localhost"),
    ],
)
def test_the_command_that_is_shown_names_a_host_and_an_authority_that_fit(tmp_path, host, reached):
    tls = make(tmp_path / "tls", "my-host")
    arguments = ["--grpc", f"{reached}:9000", "--ca", f"{tls}/ca.pem"]
    assert arguments_to_reach(closed(tls, host), 9000) == arguments
    make(tmp_path / "other")
    (tmp_path / "other" / "ca.pem").replace(tls / "ca.pem")
    assert arguments_to_reach(closed(tls, host), 9000) == arguments[:2], "it did not sign"


def test_a_cluster_with_keys_says_that_a_command_needs_one(tmp_path):
    def shown(config):
        console = Console(record=True, width=60)
        announce(console, config, [(8000, 9000)])
        return console.export_text()

    tls = make(tmp_path / "a folder")
    text = shown(closed(tls))
    command = f"try: baton generate 'def main(' --grpc 127.0.0.1:9000 --ca '{tls}/ca.pem'    Ctrl-C"
    assert command in text
    assert "with a key in OPENAI_API_KEY" in text
    assert "OPENAI_API_KEY" not in shown(BatonConfig())
