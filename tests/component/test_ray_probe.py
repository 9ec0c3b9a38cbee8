"""A Ray cluster is asked how it is guarded, and its answer counts,
whatever this process has set."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cluster.ray.probe import METHOD, RayEndpoint, probe
from core.errors import ConfigError
from transport.certificates import make_certificates


@contextlib.contextmanager
def control_store(token="", tls=None):
    """Answer as Ray's control store does: to everybody, or to who has the token."""

    def check_alive(message, context):
        said = dict(context.invocation_metadata()).get("authorization")
        if token and said != f"Bearer {token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    service, _, method = METHOD[1:].partition("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(check_alive)}
    server = grpc.server(
        ThreadPoolExecutor(2), [grpc.method_handlers_generic_handler(service, handlers)]
    )
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = ((tls / "door.key").read_bytes(), (tls / "door.pem").read_bytes())
        roots = (tls / "ca.pem").read_bytes()
        credentials = grpc.ssl_server_credentials([pair], roots, require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(0).wait()


@pytest.fixture(autouse=True)
def _a_token_is_set_here(monkeypatch):
    """What this process would like says nothing of the cluster."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)


def test_a_cluster_that_answers_anybody_has_no_tokens_although_one_is_set_here():
    with control_store() as address:
        assert probe(address) == RayEndpoint(has_tokens=False, has_tls=False)


def test_a_cluster_that_wants_a_token_has_tokens():
    with control_store(token="b" * 64) as address:
        assert probe(address) == RayEndpoint(has_tokens=True, has_tls=False)


@pytest.mark.parametrize("token", ["", "b" * 64])
def test_a_cluster_behind_tls_is_asked_over_tls(token, tmp_path):
    make_certificates(tmp_path, ["localhost"])
    environment = {
        "RAY_TLS_CA_CERT": str(tmp_path / "ca.pem"),
        "RAY_TLS_SERVER_CERT": str(tmp_path / "door.pem"),
        "RAY_TLS_SERVER_KEY": str(tmp_path / "door.key"),
    }
    with control_store(token, tmp_path) as address:
        assert probe(address, environment) == RayEndpoint(has_tokens=bool(token), has_tls=True)
        with pytest.raises(ConfigError, match="RAY_TLS_CA_CERT"):
            probe(address, {})


def test_where_nobody_answers_nothing_is_believed():
    with control_store() as address:
        pass
    with pytest.raises(ConfigError, match="could not be asked"):
        probe(address, {})
