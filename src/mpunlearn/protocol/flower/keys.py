"""Keys and certificates of a run, and the two files by which the parties exchange their public keys.

A client gives the server its `client.json`, with the public parts of its Ed25519 key, which signs results, and of the
ECDSA key of its node, with which Flower authenticates the node. The server gives every client its `invitation.json`,
with its address, the certificate of its own certificate authority, and the public key that verifies jobs. Neither file
is secret, but all authentication depends on them, so they must be exchanged over a channel that both parties trust.
"""

import datetime
import ipaddress
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mpunlearn.errors import FileError, PlanError, SchemaError
from mpunlearn.files import write_bytes, write_json
from mpunlearn.protocol.identity import HEX, Identity
from mpunlearn.schema import read

CERTIFICATE_YEARS = 2
"""Validity period of the certificates of a run."""
_NODE_KEY = re.compile(r"ecdsa-sha2-nistp384 [A-Za-z0-9+/=]+")
_ADDRESS = re.compile(r"([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):\d{1,5}")


@dataclass(frozen=True)
class ClientKeys:
    """The content of client.json, which a client gives to the server."""

    key: str
    """Ed25519 public key of the client, hexadecimal."""
    node: str
    """Public key of the client's node, in OpenSSH format."""

    def __post_init__(self) -> None:
        if not (HEX.fullmatch(self.key) and _NODE_KEY.fullmatch(self.node)):
            raise SchemaError("expected the two public keys written by `mpunlearn client key`")


@dataclass(frozen=True)
class Invitation:
    """The content of invitation.json, which the server gives to its clients."""

    address: str
    server_key: str
    ca: str | None = None
    """CA certificate to trust, in PEM format; None: no TLS, allowed on a loopback address only."""

    def __post_init__(self) -> None:
        if not (HEX.fullmatch(self.server_key) and _ADDRESS.fullmatch(self.address)):
            raise SchemaError("expected an address HOST:PORT and a public key")
        if self.ca is None and not loopback(self.address.rpartition(":")[0]):
            raise SchemaError(f"{self.address} is not a loopback address, but the invitation has no certificate")


def read_keys(path: str | Path) -> ClientKeys:
    """Reads a client.json.

    Raises:
        PlanError: the file cannot be read, or has invalid content.
    """
    try:
        return read(ClientKeys, Path(path))
    except (FileError, SchemaError) as error:
        raise PlanError(f"not a valid client.json: {error}") from error


def read_invitation(path: str | Path) -> Invitation:
    """Reads an invitation.json.

    Raises:
        PlanError: the file cannot be read, or has invalid content.
    """
    try:
        return read(Invitation, Path(path))
    except (FileError, SchemaError) as error:
        raise PlanError(f"not a valid invitation.json: {error}") from error


def client_keys(folder: Path) -> ClientKeys:
    """Reads the keys in a client's folder, or generates them if missing, and writes FOLDER/client.json."""
    identity, private = Identity.at(folder / "identity.key"), folder / "node.key"
    if not private.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        write_bytes(private, pem)
    loaded = serialization.load_ssh_private_key(private.read_bytes(), None)
    public = loaded.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    keys = ClientKeys(identity.public, public.decode())
    write_json(folder / "client.json", asdict(keys))
    return keys


def certificates(folder: Path, host: str) -> tuple[Path, Path, Path]:
    """Creates a certificate authority and a server certificate for a host and the loopback address, unless they exist.

    Returns:
        The PEM files of the authority's certificate, the server's certificate, and the server's private key.
    """
    ca_file, server_file, key_file = folder / "ca.crt", folder / "server.pem", folder / "server.key"
    if server_file.exists():
        return ca_file, server_file, key_file
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mpunlearn run")])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=365 * CERTIFICATE_YEARS))
        )

    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    ca = (
        builder(ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    if not loopback(host):
        names.append(x509.IPAddress(ipaddress.ip_address(host)) if _is_ip(host) else x509.DNSName(host))
    server = (
        builder(name, key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    write_bytes(ca_file, ca.public_bytes(pem), mode=0o644)
    private = key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    write_bytes(key_file, private)
    write_bytes(server_file, server.public_bytes(pem), mode=0o644)
    return ca_file, server_file, key_file


def loopback(host: str) -> bool:
    """Whether an address can be reached from its own machine only."""
    return host == "localhost" or (_is_ip(host) and ipaddress.ip_address(host.strip("[]")).is_loopback)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def invite(path: Path, invitation: Invitation) -> None:
    """Writes invitation.json."""
    write_json(path, asdict(invitation))
