"""State every option of the gateway once, as `common.service.config` does for the services."""

from dataclasses import dataclass

from spectrumkv.client.client import DEFAULT_TIMEOUT_SECONDS
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.rpc.targets import Target
from spectrumkv.common.security import SYSTEM_ROOTS, ChannelSecurity, TlsFiles
from spectrumkv.common.security.tls import optional_path
from spectrumkv.common.service.options import (
    WEEK_SECONDS,
    Address,
    check_certificate_and_key,
    number,
    one_of,
    option,
    parse_addresses,
    parse_bytes,
)


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """The options of the gateway.

    Raises:
        InvalidArgumentError: options contradict each other, or plaintext would leave this machine.
    """

    listen: Address = option(Address("127.0.0.1", 8000), "address to serve HTTP on", Address.parse)
    prefill: tuple[Address, ...] = option(
        (Address("127.0.0.1", 50051),), "prefill services, separated by commas", parse_addresses
    )
    prefill_tls_ca: str | None = option(
        None, "PEM file of the authorities of prefill's certificate, or 'system'; turns TLS to prefill on"
    )
    prefill_tls_cert: str | None = option(None, "PEM file of the certificate to show to prefill")
    prefill_tls_key: str | None = option(None, "PEM file of that certificate's private key")
    prefill_tls_name: str | None = option(None, "name that prefill's certificate is for, if not its address")
    prefill_token_file: str | None = option(
        None, "file whose first bearer token is sent to prefill, for all callers; needs --token-file"
    )
    token_file: str | None = option(
        None,
        "file of the accepted bearer tokens, one a line; if not given, callers' own tokens are passed on to prefill, "
        "which checks them",
    )
    tls_cert: str | None = option(None, "PEM file of the certificate to serve HTTPS with")
    tls_key: str | None = option(None, "PEM file of that certificate's private key")
    allow_plaintext: bool = option(False, "allow unencrypted traffic with other machines")
    cors_origins: str | None = option(
        None, "origins, separated by commas, whose pages in browsers may call; none if not given"
    )
    max_requests: int = option(512, "requests that may be in the gateway at once", number(1, 65536, int))
    max_body: int = option(8 << 20, "bytes of a request's body", parse_bytes, shown="8MiB")
    deadline: float = option(
        DEFAULT_TIMEOUT_SECONDS, "seconds after which a request ends", number(0.001, WEEK_SECONDS)
    )
    grace: float = option(30.0, "seconds that running requests may take after SIGTERM", number(0, WEEK_SECONDS))
    log_level: str = option("info", "least severe level to log", one_of("debug", "info", "warning", "error"))
    log_format: str = option("text", "format of log lines", one_of("text", "json"))

    def __post_init__(self) -> None:
        check_certificate_and_key(self.tls_cert, self.tls_key)
        check_certificate_and_key(self.prefill_tls_cert, self.prefill_tls_key, "prefill_tls")
        if self.prefill_tls_cert is not None and self.prefill_tls_ca is None:
            raise InvalidArgumentError("--prefill-tls-cert is given without --prefill-tls-ca; name the authorities")
        if self.prefill_token_file is not None and self.token_file is None:
            raise InvalidArgumentError(
                "--prefill-token-file would lend its token to every caller; give --token-file, too, by which callers "
                "are known"
            )
        if self.tls_cert is None and not self.listen.is_loopback and not self.allow_plaintext:
            raise InvalidArgumentError(
                f"--listen is {self.listen}, which other machines can reach, and traffic is not encrypted; give "
                "--tls-cert and --tls-key, or pass --allow-plaintext"
            )

    @property
    def target(self) -> str:
        """The prefill services as a client names them."""
        return str(Target(self.prefill))

    @property
    def checks_tokens(self) -> bool:
        """Whether the gateway itself knows callers by their tokens."""
        return self.token_file is not None

    @property
    def origins(self) -> list[str]:
        """The origins whose pages may call."""
        return [one.strip() for one in (self.cors_origins or "").split(",") if one.strip()]

    @property
    def prefill_files(self) -> TlsFiles:
        """The files of certificates for the connections to prefill; none where those are plaintext."""
        ca = None if self.prefill_tls_ca == SYSTEM_ROOTS else self.prefill_tls_ca
        return TlsFiles.named(self.prefill_tls_cert, self.prefill_tls_key, ca, "prefill_tls")

    def security(self) -> ChannelSecurity:
        """Return how the gateway talks to prefill."""
        return ChannelSecurity(
            tls=self.prefill_files if self.prefill_tls_ca is not None else None,
            token_file=optional_path(self.prefill_token_file),
            named_by="--prefill-token-file",
            allow_plaintext=self.allow_plaintext,
            server_name=self.prefill_tls_name,
            allow_proxy=False,
        )
