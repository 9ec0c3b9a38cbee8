"""`baton certs`: development certificates, one for each role, signed by a new authority.

Owns making them, the names in them, and reading those names and the signer. A role
(`transport.tls`) is a DNS name, `router.baton.internal`; workers are also `worker.baton.internal`.
Production brings its own files of the same names. Does not know who uses them.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.errors import ConfigError
from transport.tls import DOMAIN, ROLES

DAYS = 365
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Always in the servers' certificate: commands on the machine itself use these."""


def make_certificates(folder: Path, hosts: list[str]) -> list[Path]:
    """Write an authority, a pair for each role and one for the servers.

    Args:
        folder: Created if necessary; files that exist already are an error.
        hosts: Names and addresses by which clients reach the servers from elsewhere.

    Raises:
        ConfigError: A file exists already.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # P-256: gRPC's BoringSSL and all clients take it, which is not true of Ed25519.
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _sign(
        _name("Baton development authority"),
        authority_key,
        None,
        authority_key,
        [],
        is_authority=True,
    )
    # The authority's key is never written: nobody can steal it to sign a role for himself.
    written = [_write(folder / "ca.pem", authority.public_bytes(serialization.Encoding.PEM), 0o644)]
    # A router dials workers of both pools by one name; their own names tell the pools apart.
    names = {
        role: [f"{role}.{DOMAIN}", *([f"worker.{DOMAIN}"] if role != "router" else [])]
        for role in ROLES
    }
    names["door"] = list(dict.fromkeys((*LOCAL_HOSTS, *hosts)))
    for role, hostnames in names.items():
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _sign(
            _name(f"Baton {role}"), key, authority, authority_key, hostnames, is_authority=False
        )
        plain = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        written.append(
            _write(
                folder / f"{role}.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644
            )
        )
        written.append(_write(folder / f"{role}.key", plain, 0o600))
    return written


def hosts_of(pem: bytes) -> list[str]:
    """Return the names and addresses that the first certificate of a chain is valid for.

    Raises:
        ValueError: There is no certificate.
    """
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    kinds = (x509.DNSName, x509.IPAddress)
    return [str(name.value) for name in names.value if isinstance(name, kinds)]


def is_signed_by(pem: bytes, authorities: bytes) -> bool:
    """True if one of the authorities (PEM) has signed the last certificate of a chain (PEM).

    Raises:
        ValueError: One of the two holds no certificate.
    """
    # A chain ends with what the authority signed itself.
    last = x509.load_pem_x509_certificates(pem)[-1]
    for authority in x509.load_pem_x509_certificates(authorities):
        with contextlib.suppress(ValueError, TypeError, InvalidSignature):
            last.verify_directly_issued_by(authority)
            return True
    return False


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _sign(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate | None,
    authority_key: ec.EllipticCurvePrivateKey,
    hostnames: list[str],
    *,
    is_authority: bool,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Another machine's clock may be behind.
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(
            x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None),
            critical=True,
        )
    )
    if not is_authority:
        # Both for all: a worker is a server to routers and a client of its peers.
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_alternative(h) for h in hostnames]), critical=False
        )
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    return builder.sign(authority_key, hashes.SHA256())


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, data: bytes, mode: int) -> Path:
    try:
        # O_EXCL: never over an existing key; the mode from the start, so nobody reads it meanwhile.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise ConfigError(
            f"{path.name} exists already; choose another folder or move it away"
        ) from error
    with os.fdopen(descriptor, "wb") as out:
        out.write(data)
    return path
