"""How a Ray cluster is guarded: it is called without a token, first in plain text.

Owns that call and the meaning of the answer. Does not know Ray's libraries: their environment says
what this process is configured for, the cluster's answer says what it requires.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from core.errors import ConfigError

METHOD = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""Any method of the control store will do: tokens are checked before messages."""
TIMEOUT_S = 5.0
OPTIONS = (("grpc.enable_http_proxy", 0),)


@dataclass(frozen=True, slots=True)
class RayEndpoint:
    """How a Ray cluster's control store is guarded."""

    has_tokens: bool
    has_tls: bool


LOCAL_RAY = RayEndpoint(has_tokens=True, has_tls=False)
"""A fresh Ray of our own: it has a token and listens on loopback."""


def endpoint_of_environment(environment: Mapping[str, str]) -> RayEndpoint:
    """Return how a Ray started in this environment would be guarded; no running one is asked."""
    is_on = environment.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    return RayEndpoint(has_tokens=environment.get("RAY_AUTH_MODE") == "token", has_tls=is_on)


def probe(address: str, environment: Mapping[str, str] | None = None) -> RayEndpoint:
    """Ask the control store at `address` without a token.

    Raises:
        ConfigError: It answers neither in plain text nor over TLS.
    """
    code = _ask(address, None)
    # Any answer is plain text understood; a TLS server hangs up on it.
    if code is not grpc.StatusCode.UNAVAILABLE:
        return RayEndpoint(has_tokens=code is grpc.StatusCode.UNAUTHENTICATED, has_tls=False)
    code = _ask(address, _credentials(os.environ if environment is None else environment))
    if code is grpc.StatusCode.UNAVAILABLE:
        raise ConfigError(
            f"the Ray cluster at {address} could not be asked how it is guarded; if it speaks TLS, "
            "RAY_TLS_CA_CERT, RAY_TLS_SERVER_CERT and RAY_TLS_SERVER_KEY must name its files here"
        )
    return RayEndpoint(has_tokens=code is grpc.StatusCode.UNAUTHENTICATED, has_tls=True)


def _ask(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    """Return how a call without a token ends; OK if it is simply answered."""
    channel = (
        grpc.secure_channel(address, credentials, options=OPTIONS)
        if credentials
        else grpc.insecure_channel(address, options=OPTIONS)
    )
    with channel:
        try:
            channel.unary_unary(METHOD)(b"", timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def _credentials(environment: Mapping[str, str]) -> grpc.ChannelCredentials:
    """Read the certificates that Ray's variables name; without them there are none to show."""
    names = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_SERVER_CERT")
    try:
        found = [Path(environment[name]).read_bytes() for name in names]
    except (KeyError, OSError):
        # Without the files: the server's own certificate may be signed by a public authority.
        return grpc.ssl_channel_credentials()
    return grpc.ssl_channel_credentials(*found)
