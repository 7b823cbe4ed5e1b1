"""Checks of what a party has on disk and of whom it talks to: keys, state, certificates, ports, stores, the server.

Only permissions, sizes and dates of secret files are looked at, never their content.
"""

import datetime
import os
import secrets
import socket
import ssl
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpunlearn.doctor.findings import Finding, failed, ok, warning
from mpunlearn.errors import MPUError

KEYS = ("**/identity.key", "node.key", "**/secret.key", "flower/*.key")
"""Where secret keys are, below the directory of a run or of a client."""
PRIVATE = ("state", "server", "client", "server/state", "flower", "memory")
"""Folders of a run or of a client that only their owner may enter."""
CERTIFICATES = ("flower/ca.crt", "flower/server.pem")
SOON_DAYS = 30
"""Certificates that end within this time are reported."""
CONNECT_SECONDS = 5.0
RENEW = "stop the server, remove RUN/flower/server.pem and ca.crt, resume, and give the clients the new invitation.json"


def permissions(folder: Path, name: str) -> Finding:
    """Whether only the owner can read the keys and the state below a folder.

    Args:
        folder: the directory of a run, of a client, or of lineages.
        name: the name of the check.
    """
    if not folder.is_dir():
        return failed(name, f"{folder} is not a directory", "give the directory of a run, or of a client")
    keys = sorted({path for pattern in KEYS for path in folder.glob(pattern)})
    folders = {path for path in map(folder.joinpath, PRIVATE) if path.is_dir()}
    folders |= {key.parent for key in keys if key.name == "secret.key"}
    for path in [*keys, *sorted(folders)]:
        about = path.lstat()
        mode = 0o700 if path.is_dir() else 0o600
        if stat.S_ISLNK(about.st_mode):
            return failed(name, f"{path} is a symbolic link", "replace it by the file itself")
        if about.st_uid != os.getuid():
            return failed(name, f"{path} belongs to user {about.st_uid}", f"run `chown {os.getuid()} {path}`")
        if about.st_mode & 0o077:
            found = f"other users can access {path} (mode {about.st_mode & 0o777:o})"
            return failed(name, found, f"run `chmod {mode:o} {path}`; if others may have read it, start a new run")
        if path.is_file() and not about.st_size:
            return failed(name, f"{path} is empty", "restore it from a backup")
    if not keys:
        return warning(name, f"no keys in {folder}", "they are created when the run starts, or by `client key`")
    return ok(name, f"{len(keys)} keys and {len(folders)} folders in {folder} are private")


def certificates(folder: Path) -> Iterator[Finding]:
    """The validity of the certificates of a run."""
    for path in map(folder.joinpath, CERTIFICATES):
        if path.is_file():
            yield certificate(path.read_bytes(), f"certificate {path.name}", RENEW)


def certificate(pem: bytes, name: str, advice: str) -> Finding:
    """Whether a certificate is valid now, and for how long."""
    from cryptography import x509

    try:
        loaded = x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        return failed(name, f"not a certificate: {error}", advice)
    now, begin, end = datetime.datetime.now(datetime.UTC), loaded.not_valid_before_utc, loaded.not_valid_after_utc
    dates = f"valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}"
    if now < begin:
        return failed(name, f"{dates}, which has not begun", "check the clocks of both machines")
    if now > end:
        return failed(name, f"{dates}, expired", advice)
    if end - now < datetime.timedelta(days=SOON_DAYS):
        return warning(name, f"{dates}, ends in {(end - now).days} days", advice)
    return ok(name, dates)


def port(host: str, number: int) -> Finding:
    """Whether the server can listen on a port."""
    name = f"port {number}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        return failed(
            name,
            f"cannot listen on {host}:{number} ({reason})",
            "end the program that uses it, or choose another --port",
        )
    return ok(name, f"free on {host}")


def store(url: str) -> Finding:
    """Whether a file can be written to a store, read back, and removed."""
    try:
        from mpunlearn.protocol.transfer import Store, redact
    except ImportError as error:
        return failed("store", f"cannot be checked without {error.name}", "install the missing library")
    shown = redact(url) if "://" in url else url
    local = url.removeprefix("file://")
    if "://" not in local and not Path(local).exists():
        return warning("store", f"{shown} does not exist and would be created", "is it the right place, and mounted?")
    key = f".mpunlearn-doctor-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory() as scratch:
        sent = Path(scratch) / "sent"
        sent.write_bytes(secrets.token_bytes(1024))
        try:
            opened = Store(url)
            file = opened.put(sent, f"{key}/probe")
            try:
                opened.fetch(f"{key}/probe", file, Path(scratch) / "received")
            finally:
                opened.remove(key)
        except (MPUError, OSError) as error:
            return failed(
                "store",
                f"{shown}: {str(error).replace(url, shown)}",
                "check the address, the credentials and the network",
            )
    return ok("store", f"{shown} can be written, read and cleared")


def server(invitation: Any) -> Iterator[Finding]:
    """Whether a client reaches the server of an invitation, and trusts its certificate.

    Args:
        invitation: a `protocol.flower.keys.Invitation`.
    """
    address, ca = invitation.address, invitation.ca
    if ca is not None:
        yield certificate(ca.encode(), "server's authority", "ask the server's owner for a new invitation.json")
    host, _, number = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(number)), CONNECT_SECONDS) as connection:
            if ca is None:
                yield ok("server", f"{address} responds, without TLS")
                return
            context = ssl.create_default_context(cadata=ca)
            context.set_alpn_protocols(["h2"])
            with context.wrap_socket(connection, server_hostname=host.strip("[]")) as secured:
                yield ok("server", f"{address} responds, {secured.version()}, certificate trusted")
    except ssl.SSLCertVerificationError as error:
        advice = "check both clocks, and ask the server's owner for the current invitation.json"
        yield failed("server", f"{address}: certificate not trusted ({error.verify_message})", advice)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "is the server up, is the address right, does a firewall block it?"
        yield failed("server", f"{address} cannot be reached ({reason})", advice)
