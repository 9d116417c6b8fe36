"""Certificates: read from PEM files, checked before use, and followed when they are replaced."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.security.watched_files import WatchedFiles, read_file

# In place of a file of CA certificates: those that gRPC comes with, which are Mozilla's.
SYSTEM_ROOTS = "system"


@dataclass(frozen=True)
class Certificates:
    """What the files hold, PEM-encoded; None where there is no file."""

    chain: bytes | None
    key: bytes | None
    ca: bytes | None


@dataclass(frozen=True)
class TlsFiles:
    """The PEM files of one process.

    Attributes:
        cert: its certificate, followed by intermediate ones.
        key: the private key of the first, not encrypted.
        ca: certificates of the authorities that peers' certificates must come from; None: `SYSTEM_ROOTS`.

    Raises:
        InvalidArgumentError: a certificate comes without its key or a key without its certificate.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            given, missing = ("--tls-cert", "--tls-key") if self.key is None else ("--tls-key", "--tls-cert")
            raise InvalidArgumentError(f"{given} is given without {missing}; a certificate and its key go together")

    @classmethod
    def named(cls, cert: str | None, key: str | None, ca: str | None) -> "TlsFiles":
        """As the constructor, from options' values."""
        return cls(optional_path(cert), optional_path(key), optional_path(ca))

    def watch(self) -> WatchedFiles[Certificates]:
        """Return the certificates, which follow the files from now on.

        Raises:
            InvalidArgumentError: a file cannot be read, is no PEM, or key and certificate differ.
        """
        return WatchedFiles([path for path in (self.cert, self.key, self.ca) if path is not None], self._read)

    def _read(self) -> Certificates:
        files = (("--tls-cert", self.cert), ("--tls-key", self.key), ("--tls-ca", self.ca))
        chain, key, ca = (None if path is None else read_file(option, path) for option, path in files)
        if self.cert is not None and self.key is not None:
            _check_pair(self.cert, self.key)
        if self.ca is not None:
            _check_authorities(self.ca)
        return Certificates(chain, key, ca)


def optional_path(text: str | None) -> Path | None:
    """Return the path that an option names, if it names one."""
    return None if text is None else Path(text)


def server_credentials(watched: WatchedFiles[Certificates], verify_clients: bool) -> grpc.ServerCredentials:
    """Return credentials for a server's port; each new connection meets the files as they are then.

    Args:
        watched: certificate and key, and with `verify_clients` the authorities of clients' certificates.
        verify_clients: refuse clients that show no certificate of these authorities.
    """
    served = watched.current

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal served
        latest = watched.current
        if latest is served:
            return None
        served = latest
        return _configuration(latest, verify_clients)

    return grpc.dynamic_ssl_server_credentials(_configuration(served, verify_clients), fetch, verify_clients)


def channel_credentials(certificates: Certificates) -> grpc.ChannelCredentials:
    """Return credentials for a channel, as the files are now."""
    return grpc.ssl_channel_credentials(certificates.ca, certificates.key, certificates.chain)


def _configuration(certificates: Certificates, verify_clients: bool) -> grpc.ServerCertificateConfiguration:
    pair = (certificates.key, certificates.chain)
    return grpc.ssl_server_certificate_configuration([pair], certificates.ca if verify_clients else None)


def _check_pair(cert: Path, key: Path) -> None:
    """Refuse here, with a sentence, what gRPC would refuse connection by connection."""
    try:
        # Without `password`, OpenSSL would ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"--tls-cert {cert} and --tls-key {key} cannot be used: {_reason(error)}; they are a certificate "
            "and its own private key as PEM, the key not encrypted"
        ) from error


def _check_authorities(ca: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"--tls-ca {ca} cannot be used: {_reason(error)}; it holds one or more certificates as PEM"
        ) from error


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error).replace("_", " ").lower()
