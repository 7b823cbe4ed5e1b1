"""Keys and certificates of a run: the server's own certificate authority, the nodes' keys, and the two files to exchange.

A client gives the server `client.json`: its Ed25519 key, which signs results, and its node's ECDSA key, by which Flower
authenticates it. The server gives every client `invitation.json`: the address, the certificate to trust, and the key that signs
jobs. Neither file is secret, but everything else rests on them: exchange them over a channel that both parties trust.
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
"""How long a run's certificates are valid."""
_NODE_KEY = re.compile(r"ecdsa-sha2-nistp384 [A-Za-z0-9+/=]+")
_ADDRESS = re.compile(r"([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):\d{1,5}")


@dataclass(frozen=True)
class ClientKeys:
    """What a client tells the server about itself: client.json."""

    key: str
    """Ed25519 public key, hexadecimal."""
    node: str
    """Its node's public key, in OpenSSH format."""

    def __post_init__(self) -> None:
        if not (HEX.fullmatch(self.key) and _NODE_KEY.fullmatch(self.node)):
            raise SchemaError("expected the two keys that `mpunlearn client key` writes")


@dataclass(frozen=True)
class Invitation:
    """What a server tells its clients: invitation.json."""

    address: str
    server_key: str
    ca: str | None = None
    """The certificate to trust, PEM; None: no TLS, on a loopback address."""

    def __post_init__(self) -> None:
        if not (HEX.fullmatch(self.server_key) and _ADDRESS.fullmatch(self.address)):
            raise SchemaError("expected an address HOST:PORT and a public key")
        if self.ca is None and not loopback(self.address.rpartition(":")[0]):
            raise SchemaError(f"{self.address} is not a loopback address, but the invitation has no certificate")


def read_keys(path: str | Path) -> ClientKeys:
    """The content of a client.json.

    Raises:
        PlanError: it cannot be read.
    """
    try:
        return read(ClientKeys, Path(path))
    except (FileError, SchemaError) as error:
        raise PlanError(f"not a client's client.json: {error}") from error


def read_invitation(path: str | Path) -> Invitation:
    """The content of an invitation.json.

    Raises:
        PlanError: it cannot be read.
    """
    try:
        return read(Invitation, Path(path))
    except (FileError, SchemaError) as error:
        raise PlanError(f"not a server's invitation.json: {error}") from error


def client_keys(folder: Path) -> ClientKeys:
    """The keys in a client's folder, generated if there are none; also writes their public part, FOLDER/client.json."""
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
    """A certificate authority and the server's certificate, for a host name and for the loopback address; created once.

    Returns:
        The PEM files of the authority's certificate, the server's certificate, and the server's key.
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
