"""Reads certificates from PEM files, checks them before use, and reads them again when they are replaced."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.security.watched_files import WatchedFiles, read_file
from spectrumkv.common.service.options import check_certificate_and_key, flag_name

# Stands for the CA certificates that gRPC comes with, which are Mozilla's, in place of a file.
SYSTEM_ROOTS = "system"


@dataclass(frozen=True)
class Certificates:
    """The contents of the files, PEM-encoded; None where there is no file."""

    chain: bytes | None
    key: bytes | None
    ca: bytes | None


@dataclass(frozen=True)
class TlsFiles:
    """The PEM files of one process.

    Attributes:
        cert: the process's certificate, followed by intermediate ones.
        key: the private key of the first certificate, not encrypted.
        ca: certificates of the authorities that peers' certificates must come from; None is `SYSTEM_ROOTS`.
        options: what the options' names begin with, as in "tls" for `tls_cert`, `tls_key` and `tls_ca`.

    Raises:
        InvalidArgumentError: a certificate comes without its key or a key without its certificate.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    options: str = "tls"

    def __post_init__(self) -> None:
        check_certificate_and_key(self.cert, self.key, self.options)

    @classmethod
    def named(cls, cert: str | None, key: str | None, ca: str | None, options: str = "tls") -> "TlsFiles":
        """Return the files that options name.

        Raises:
            InvalidArgumentError: a certificate comes without its key or a key without its certificate.
        """
        return cls(optional_path(cert), optional_path(key), optional_path(ca), options)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that are given."""
        return tuple(path for path in (self.cert, self.key, self.ca) if path is not None)

    def watch(self) -> WatchedFiles[Certificates]:
        """Return the certificates; they are read again whenever the files change.

        Raises:
            InvalidArgumentError: a file cannot be read or is not PEM, or the key does not belong to the certificate.
        """
        return WatchedFiles(self.paths, self._read)

    def _read(self) -> Certificates:
        flags = (flag_name(f"{self.options}_{kind}") for kind in ("cert", "key", "ca"))
        files = zip(flags, (self.cert, self.key, self.ca), strict=True)
        chain, key, ca = (None if path is None else read_file(flag, path) for flag, path in files)
        if self.cert is not None and self.key is not None:
            # A bad pair is refused with a sentence now; gRPC would refuse it at each connection.
            server_context(self.cert, self.key, self.options)
        if self.ca is not None:
            _check_authorities(self.ca, flag_name(f"{self.options}_ca"))
        return Certificates(chain, key, ca)


def optional_path(text: str | None) -> Path | None:
    """Return the path that an option names; None if the option is not given."""
    return None if text is None else Path(text)


def server_credentials(watched: WatchedFiles[Certificates], verify_clients: bool) -> grpc.ServerCredentials:
    """Return credentials for a server's port, which use the current files for each new connection.

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
    """Return credentials for a channel."""
    return grpc.ssl_channel_credentials(certificates.ca, certificates.key, certificates.chain)


def _configuration(certificates: Certificates, verify_clients: bool) -> grpc.ServerCertificateConfiguration:
    pair = (certificates.key, certificates.chain)
    return grpc.ssl_server_certificate_configuration([pair], certificates.ca if verify_clients else None)


def server_context(cert: Path, key: Path, options: str = "tls") -> ssl.SSLContext:
    """Return what a server shows a certificate with, for TLS 1.2 and newer.

    Args:
        cert: PEM file of the certificate, followed by intermediate ones.
        key: PEM file of its private key, not encrypted.
        options: what the names of their options begin with.

    Raises:
        InvalidArgumentError: the files are not a certificate and its private key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without `password`, OpenSSL would ask for one on the terminal.
        context.load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        pair = f"{flag_name(f'{options}_cert')} {cert} and {flag_name(f'{options}_key')} {key}"
        raise InvalidArgumentError(
            f"{pair} cannot be used: {_reason(error)}; they are a certificate and its own private key as PEM, the "
            "key not encrypted"
        ) from error
    return context


def _check_authorities(ca: Path, flag: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"{flag} {ca} cannot be used: {_reason(error)}; it holds one or more certificates as PEM"
        ) from error


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error).replace("_", " ").lower()
