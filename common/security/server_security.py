"""What a server asks of those who connect."""

from dataclasses import dataclass
from pathlib import Path

import grpc

from spectrumkv.common.security.tls import TlsFiles, optional_path, server_credentials
from spectrumkv.common.security.tokens import AcceptedTokens, TokenInterceptor
from spectrumkv.common.service.config import ServerConfig


@dataclass(frozen=True)
class ServerSecurity:
    """How a server is guarded; by default not at all, which is for loopback.

    Attributes:
        tls: its certificate, and where clients are verified their authorities; None serves plaintext.
        verify_clients: refuse clients without a certificate of `tls.ca` (mutual TLS).
        token_file: accepted bearer tokens; None asks for none.
    """

    tls: TlsFiles | None = None
    verify_clients: bool = False
    token_file: Path | None = None

    @classmethod
    def from_config(cls, config: ServerConfig) -> "ServerSecurity":
        """Read a service's options.

        Raises:
            InvalidArgumentError: a certificate comes without its key.
        """
        serves_tls = config.tls_cert is not None
        return cls(
            tls=TlsFiles.named(config.tls_cert, config.tls_key, config.tls_ca) if serves_tls else None,
            verify_clients=config.tls_ca is not None and config.tls_clients == "verified",
            token_file=optional_path(config.token_file),
        )

    def check(self) -> None:
        """Check the files.

        Raises:
            InvalidArgumentError: one cannot be used.
        """
        self.interceptors()
        if self.tls is not None:
            self.tls.watch()

    def interceptors(self) -> tuple[grpc.ServerInterceptor, ...]:
        """Return what stands before the handlers.

        Raises:
            InvalidArgumentError: the file of tokens cannot be used.
        """
        return () if self.token_file is None else (TokenInterceptor(AcceptedTokens(self.token_file)),)

    def add_port(self, server: grpc.Server, address: str) -> int:
        """Let `server` listen on `address`; return the port.

        Raises:
            InvalidArgumentError: a certificate or key cannot be used.
            RuntimeError: the address cannot be bound.
        """
        if self.tls is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, server_credentials(self.tls.watch(), self.verify_clients)))
