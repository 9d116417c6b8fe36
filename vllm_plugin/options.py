"""States the connector's options once: keys of `kv_connector_extra_config`, checked as the services' flags are."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.budget import BUDGET_MEANING
from spectrumkv.common.service.config import SCORE_WINDOW, build
from spectrumkv.common.service.options import (
    Address,
    check_certificate_and_key,
    number,
    one_of,
    option,
    parse_bytes,
)


@dataclass(frozen=True, kw_only=True)
class ConnectorOptions:
    """The options of the connector for vLLM, of both roles."""

    policy: str = option("spectral", "how tokens are assigned to tiers, unless a request says")
    budget: float = option(0.3, f"what KV may cost relative to FP16: {BUDGET_MEANING}", number(0.05, 1))
    scorer: str = option("attention", "how tokens are ranked")
    window: int = option(SCORE_WINDOW, "queries at a prompt's end whose attention is scored", number(1, 4096, int))
    int4: str = option("on", "whether policies of tiers may use INT4", one_of("on", "off"))
    basis: str | None = option(None, "file of the codec's basis; found in the cache directory if not given")
    listen: Address = option(Address("127.0.0.1", 14600), "address that hands out KV; rank r adds r", Address.parse)
    advertise: str | None = option(None, "host name by which consumers reach it; the one in listen if not given")
    outbox_memory: int = option(1 << 30, "memory for KV that waits to be fetched", parse_bytes, shown="1GiB")
    time_to_live: float = option(120.0, "seconds after which KV that nobody fetches is dropped", number(1, 86400))
    fetches: int = option(4, "transfers that are fetched at once", number(1, 64, int))
    prefetches: int = option(16, "transfers that are received before their requests come", number(0, 64, int))
    prefetch_memory: int = option(1 << 30, "memory for what they receive", parse_bytes, shown="1GiB")
    fetch_timeout: float = option(60.0, "seconds that a fetch may take, waiting included", number(0.1, 86400))
    chunk_bytes: int = option(512 << 10, "payload bytes at which a chunk is sent", number(1 << 10, 1 << 20, int))
    tls_cert: str | None = option(None, "PEM file of this process's certificate; turns TLS on")
    tls_key: str | None = option(None, "PEM file of that certificate's private key")
    tls_ca: str | None = option(None, "PEM file of the authorities of the other side's certificates")
    token_file: str | None = option(None, "file of the bearer tokens that are accepted, or whose first one is sent")
    allow_plaintext: bool = option(False, "allow unencrypted traffic on addresses that other machines can reach")

    def __post_init__(self) -> None:
        check_certificate_and_key(self.tls_cert, self.tls_key)
        if not self.listen.is_loopback and self.tls_cert is None and not self.allow_plaintext:
            raise InvalidArgumentError(
                f"listen is {self.listen}, which other machines can reach, and traffic is not encrypted; give "
                "tls_cert and tls_key, or allow_plaintext"
            )
        if self.listen.host in ("0.0.0.0", "[::]") and self.advertise is None:  # noqa: S104  # compared, not bound
            raise InvalidArgumentError(
                f"listen is {self.listen}, which is no address to connect to; give advertise the name of this machine"
            )

    @classmethod
    def of(cls, extra_config: Mapping[str, Any]) -> "ConnectorOptions":
        """Read the options.

        Args:
            extra_config: `kv_connector_extra_config` of vLLM.

        Returns:
            The options.

        Raises:
            InvalidArgumentError: a key is unknown or a value is not allowed.
        """
        try:
            return build(cls, dict(extra_config))
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"kv_connector_extra_config: {error.message}") from None

    @property
    def host(self) -> str:
        """Return the host by which consumers reach this process."""
        return self.advertise or self.listen.host

    @property
    def basis_file(self) -> Path | None:
        """Return the path of the basis; None where it is to be found."""
        return None if self.basis is None else Path(self.basis)
