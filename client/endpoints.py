"""How a command reaches a cluster's servers: over TLS or not, whom it trusts, what it shows.

Owns the one rule for all commands: `--ca`, else `SSL_CERT_FILE`, else what the system trusts; a
client certificate if a proxy requires one; the API key from the environment, never from the command
line, which everyone on a machine can read. What a server answers cannot steer the terminal on
which it is shown. Does not know what is asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from core.errors import ConfigError

API_KEY_VARIABLE = "OPENAI_API_KEY"
HTTP_TIMEOUT_S = 10.0
LOOK_TIMEOUT_S = 5.0
TLS_RECORDS = (0x15, 0x16)
"""First byte of a TLS server's answer: an alert, or its side of the handshake."""


def api_key() -> str:
    """Return the user's API key; empty if there is none."""
    return os.environ.get(API_KEY_VARIABLE, "")


def authorization() -> dict[str, str]:
    """Return the header with the API key, if the environment has one."""
    key = api_key()
    return {"Authorization": f"Bearer {key}"} if key else {}


@dataclass(frozen=True)
class Endpoints:
    """Certificates of one command; without any it trusts what the system trusts."""

    ca: Path | None = None
    """PEM of the authority to trust."""
    certificate: Path | None = None
    """PEM chain to show, with its key."""
    key: Path | None = None

    @cached_property
    def context(self) -> ssl.SSLContext:
        """TLS context for HTTPS.

        Raises:
            ConfigError: A file cannot be used.
        """
        try:
            context = ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except OSError as error:  # errors of TLS are of this kind, too
            raise ConfigError(
                f"--ca, --cert or --key cannot be used: {error.strerror or error}"
            ) from error
        return context

    def grpc_files(self, addresses: list[str]) -> tuple[bytes, bytes | None, bytes | None] | None:
        """Return authorities, key and chain (PEM) for a gRPC client; None for plain text.

        An address may decide itself, with `https://` or `http://`; `--ca` or `--cert` mean TLS;
        otherwise the servers are probed.

        Raises:
            ConfigError: A file cannot be used, or a server's certificate is not trusted.
        """
        schemes = {address.partition("://")[0] for address in addresses if "://" in address}
        has_certificates = self.ca is not None or self.certificate is not None
        if "http" in schemes:
            if has_certificates or "https" in schemes:
                raise ConfigError("http:// is plain text; write https:// with --ca or --cert")
            return None
        private = [address for address in addresses if speaks_tls(address)]
        if not private and not has_certificates and "https" not in schemes:
            return None
        for address in private:
            self._check(address)
        # gRPC brings roots of its own: the system's are what HTTPS here trusts, too.
        roots = self.ca or ssl.get_default_verify_paths().cafile
        key = self.key or self.certificate
        return (
            Path(roots).read_bytes() if roots else b"",
            key.read_bytes() if key else None,
            self.certificate.read_bytes() if self.certificate else None,
        )

    def _check(self, address: str) -> None:
        """Try one handshake: gRPC would retry for ever, and report it in its own words."""
        place = host_and_port(address)
        try:
            with (
                socket.create_connection(place, LOOK_TIMEOUT_S) as wire,
                self.context.wrap_socket(wire, server_hostname=place[0]),
            ):
                pass
        except ssl.SSLCertVerificationError as error:
            raise self.unreachable(address, error) from error
        except OSError:
            return  # it has gone, or requires a certificate: the request will report that

    def get(self, url: str, path: str) -> dict[str, Any]:
        """Send a GET to a router.

        Raises:
            ConfigError: Nobody answers, the key has no right to it, or the router refuses it.
        """
        return _unrefused(url, self.get_with_headers(url, path)[0])

    def get_field(self, url: str, path: str, name: str) -> Any:  # noqa: ANN401 - any JSON
        """Send a GET to a router, for one field of its answer.

        Raises:
            ConfigError: As for `get`, or there is no such field.
        """
        return self.get_fields(url, path, name)[0]

    def get_fields(self, url: str, path: str, *names: str) -> list[Any]:
        """Send a GET to a router, for several fields of its answer.

        Raises:
            ConfigError: As for `get_field`.
        """
        answer = self.get(url, path)
        if not answer.keys() >= set(names):
            raise ConfigError(f"the server at {url}{path} is no router")
        return [answer[name] for name in names]

    def get_text(self, url: str, path: str) -> tuple[str, Mapping[str, str]]:
        """Send a GET to a router for what is no JSON, over a connection of its own.

        Returns:
            The answer and its headers.

        Raises:
            ConfigError: Nobody answers, or the key has no right to it.
        """
        answer, headers = self._exchange(url, path, None)
        return answer.decode(errors="replace"), headers

    def get_with_headers(self, url: str, path: str) -> tuple[dict[str, Any], Mapping[str, str]]:
        """Send a GET to a router, over a connection of its own.

        Returns:
            The answer, which may be an error, and its headers.

        Raises:
            ConfigError: Nobody answers, or the key has no right to it.
        """
        answer, headers = self._exchange(url, path, None)
        return _tree(url, path, answer), headers

    def post(self, url: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send a POST to a router.

        Raises:
            ConfigError: Nobody answers, the key has no right to it, or the router refuses it.
        """
        answer, _ = self._exchange(url, path, json.dumps(body).encode())
        return _unrefused(url, _tree(url, path, answer))

    def _exchange(self, url: str, path: str, body: bytes | None) -> tuple[bytes, Mapping[str, str]]:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {url} must begin with http:// or https://")
        try:
            # The scheme is checked above.
            request = Request(  # noqa: S310
                url.rstrip("/") + path,
                body,
                authorization() | ({"Content-Type": "application/json"} if body else {}),
            )
            opener = build_opener(HTTPSHandler(context=self.context), _Stay)
            with opener.open(request, timeout=HTTP_TIMEOUT_S) as reply:
                answer, headers = reply.read(), reply.headers
        except HTTPError as error:
            if error.code == HTTPStatus.UNAUTHORIZED:
                raise ConfigError(
                    f"the router at {url} wants an API key; set {API_KEY_VARIABLE}"
                ) from error
            # A POST may be refused for its body: the router's own words follow.
            if error.code == HTTPStatus.FORBIDDEN and body is None:
                raise ConfigError(
                    f"the key in {API_KEY_VARIABLE} may not ask the router at {url} for {path}; "
                    "use one of role metrics or admin (`baton keys add --role`)"
                ) from error
            answer, headers = error.read(), error.headers  # /ready answers 503 with a body
        except (URLError, OSError) as error:
            raise self.unreachable(url, error) from error
        return answer, headers

    def unreachable(self, url: str, error: Exception) -> ConfigError:
        """Make the error that explains why nobody answers, and what to do."""
        text = str(error)
        if "CERTIFICATE_VERIFY_FAILED" in text:
            remedy = self._remedy_of_trust(url, text)
        elif "WRONG_VERSION_NUMBER" in text or "record layer failure" in text:
            remedy = "this server speaks plain text: write http://"
        elif url.startswith("http://") and speaks_tls(url):
            remedy = "this server speaks TLS: write https://"
        else:
            remedy = "is `baton up` running?"
        return ConfigError(f"no router answers at {url}: {text}; {remedy}")

    def _remedy_of_trust(self, url: str, text: str) -> str:
        """Return what to do about a certificate that TLS does not trust, by its message."""
        if "is not valid for" in text:
            hosts = ", ".join(_hosts_at(url)) or "no host"
            return (
                f"this server's certificate is for {hosts}: reach it by one of these, or give it "
                "one for this address (`baton certs --host`)"
            )
        if "has expired" in text or "not yet valid" in text:
            return "give the servers a certificate that is valid today, or set this machine's clock"
        if self.ca is None:
            return "give --ca (or SSL_CERT_FILE) the authority that signed the servers' certificate"
        return f"{self.ca} is not the authority that signed it: give --ca the one that did"


def refusal(url: str, answer: Mapping[str, Any]) -> ConfigError:
    """Make the error of an answer that is one, or is no router's."""
    words = words_of(answer)
    return ConfigError(
        f"the router at {url} refuses: {words}" if words else f"the server at {url} is no router"
    )


def words_of(answer: Mapping[str, Any]) -> str:
    """Return what an answer that is an error says; empty: nothing."""
    error = answer.get("error", "")
    return str(error.get("message", "") if isinstance(error, dict) else error)


def _unrefused(url: str, answer: dict[str, Any]) -> dict[str, Any]:
    # Beside an answer there may be an error in words.
    if isinstance(answer.get("error"), dict):
        raise refusal(url, answer)
    return answer


def _tree(url: str, path: str, answer: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the server at {url}{path} is no router") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"the server at {url}{path} is no router")
    return {_printable(name): _printable(value) for name, value in tree.items()}


def _printable(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """Write out what would steer a terminal: whoever chose a name is not trusted with it."""
    if isinstance(value, str):
        return value if value.isprintable() else "".join(map(_shown, value))
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(item) for name, item in value.items()}
    return value


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


def _hosts_at(address: str) -> list[str]:
    """Return the hosts of a server's certificate; none if it shows no certificate."""
    from transport.certificates import hosts_of  # noqa: PLC0415 - most commands see no certificate

    try:
        pem = ssl.get_server_certificate(host_and_port(address), timeout=LOOK_TIMEOUT_S)
        return hosts_of(pem.encode())
    except (OSError, ValueError):
        return []


class _Stay(HTTPRedirectHandler):
    """Follows no redirect: the API key would go along, to another host or in plain text."""

    def redirect_request(self, *_: object) -> None:
        """Return None, which makes a redirect an `HTTPError`."""


def host_and_port(address: str) -> tuple[str, int]:
    """Return host and port of an address or URL.

    Raises:
        ConfigError: It is neither.
    """
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        return parts.hostname or "localhost", parts.port or 443
    except ValueError as error:
        raise ConfigError(f"{address} is no address of a server: {error}") from error


def speaks_tls(address: str) -> bool:
    """Send a TLS hello, and look at the answer's first byte; False if nobody answers."""
    place = host_and_port(address)
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    hello = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=place[0])
    with contextlib.suppress(ssl.SSLWantReadError):
        hello.do_handshake()
    try:
        with socket.create_connection(place, LOOK_TIMEOUT_S) as wire:
            wire.sendall(outgoing.read())
            first = wire.recv(1)
    except OSError:
        return False
    return bool(first) and first[0] in TLS_RECORDS
