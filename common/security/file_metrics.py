"""Shows in the metrics when certificates expire, and whether replaced files of certificates or tokens can be used."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cryptography import x509
from prometheus_client import CollectorRegistry, Gauge

from spectrumkv.common.security.tls import Certificates, TlsFiles
from spectrumkv.common.security.token_file import read_tokens
from spectrumkv.common.security.watched_files import WatchedFiles
from spectrumkv.common.service.config import PrefillConfig, ServerConfig
from spectrumkv.common.service.options import flag_name


class FileMetrics:
    """Hold what each scrape finds in the files that a process follows; services and gateway have them alike.

    Certificates and tokens are otherwise looked at when a connection or a call needs them, which may be long after a
    bad file was put in place.

    Args:
        registry: the registry of the process's metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.certificate_expiry = Gauge(
            "spectrumkv_certificate_expiry_timestamp_seconds",
            "When the first certificate of a file expires, in seconds since 1970.",
            ("file",),
            registry=registry,
        )
        self.reload_failed = Gauge(
            "spectrumkv_file_reload_failed",
            "1 where files of certificates or tokens were replaced by ones that cannot be used, otherwise 0.",
            ("files",),
            registry=registry,
        )

    def show_certificates(self, files: TlsFiles) -> None:
        """Have each scrape look at a certificate, its key and authorities.

        Args:
            files: the files; none are given where there is no TLS.

        Raises:
            InvalidArgumentError: a file cannot be used.
        """
        if not files.paths:
            return
        certificates = files.watch()
        self._show_reload(files.options, certificates)
        for kind, path, pem in (("cert", files.cert, _chain), ("ca", files.ca, _authorities)):
            if path is not None:
                expiry = self.certificate_expiry.labels(f"{files.options}_{kind}")
                expiry.set_function(partial(_expiry, certificates, pem))

    def show_tokens(self, option: str, file: str | None) -> None:
        """Have each scrape look at a file of tokens.

        Args:
            option: name of the option that names it.
            file: the file; None where the option is not given.

        Raises:
            InvalidArgumentError: the file cannot be used.
        """
        if file is not None:
            path = Path(file)
            self._show_reload(option, WatchedFiles([path], partial(read_tokens, flag_name(option), path)))

    def _show_reload(self, files: str, watched: WatchedFiles[Any]) -> None:
        def failed() -> bool:
            # This access reads the files again where they changed.
            _ = watched.current
            return watched.reload_failed

        self.reload_failed.labels(files).set_function(failed)


def show_files(config: ServerConfig, shown: FileMetrics) -> None:
    """Have each scrape look at the files that a service follows.

    Args:
        config: names the files.
        shown: of the service.

    Raises:
        InvalidArgumentError: a file cannot be used.
    """
    shown.show_certificates(TlsFiles.named(config.tls_cert, config.tls_key, config.tls_ca))
    shown.show_tokens("token_file", config.token_file)
    if isinstance(config, PrefillConfig):
        shown.show_tokens("decode_token_file", config.decode_token_file)


def first_expiry(pem: bytes) -> float:
    """Return when the first of some certificates expires.

    Args:
        pem: one or more certificates, PEM-encoded.

    Returns:
        Seconds since 1970, UTC.
    """
    return min(one.not_valid_after_utc.timestamp() for one in x509.load_pem_x509_certificates(pem))


def _expiry(certificates: WatchedFiles[Certificates], pem: Callable[[Certificates], bytes]) -> float:
    return first_expiry(pem(certificates.current))


def _chain(certificates: Certificates) -> bytes:
    return certificates.chain or b""


def _authorities(certificates: Certificates) -> bytes:
    return certificates.ca or b""
