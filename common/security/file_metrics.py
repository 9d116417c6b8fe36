"""Shows in the metrics when certificates expire, and whether replaced files of certificates or tokens can be used."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cryptography import x509

from spectrumkv.common.security.tls import Certificates, TlsFiles
from spectrumkv.common.security.token_file import read_tokens
from spectrumkv.common.security.watched_files import WatchedFiles
from spectrumkv.common.service.config import PrefillConfig, ServerConfig
from spectrumkv.common.telemetry.metrics import Metrics


def show_files(config: ServerConfig, metrics: Metrics) -> None:
    """Have each scrape look at the files that a service follows.

    Certificates and tokens are otherwise looked at when a connection or a call needs them, which may be long after a
    bad file was put in place.

    Args:
        config: names the files.
        metrics: shows them.

    Raises:
        InvalidArgumentError: a file cannot be used.
    """
    files = TlsFiles.named(config.tls_cert, config.tls_key, config.tls_ca)
    if files != TlsFiles():
        certificates = files.watch()
        _show_reload(metrics, "tls", certificates)
        for option, pem in (("tls_cert", _chain), ("tls_ca", _authorities)):
            if getattr(config, option) is not None:
                metrics.certificate_expiry.labels(option).set_function(partial(_expiry, certificates, pem))
    for option, path in _token_files(config):
        _show_reload(metrics, option, WatchedFiles([path], _reading_tokens(option, path)))


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


def _show_reload(metrics: Metrics, files: str, watched: WatchedFiles[Any]) -> None:
    def failed() -> bool:
        # This access reads the files again where they changed.
        _ = watched.current
        return watched.reload_failed

    metrics.file_reload_failed.labels(files).set_function(failed)


def _chain(certificates: Certificates) -> bytes:
    return certificates.chain or b""


def _authorities(certificates: Certificates) -> bytes:
    return certificates.ca or b""


def _token_files(config: ServerConfig) -> Iterator[tuple[str, Path]]:
    """Yield each file of tokens with the option that names it."""
    if config.token_file is not None:
        yield "token_file", Path(config.token_file)
    if isinstance(config, PrefillConfig) and config.decode_token_file is not None:
        yield "decode_token_file", Path(config.decode_token_file)


def _reading_tokens(option: str, path: Path) -> Callable[[], object]:
    return lambda: read_tokens("--" + option.replace("_", "-"), path)
