"""Opens the ports of servers, and checks the certificates and tokens of callers."""

from dataclasses import dataclass
from pathlib import Path

import grpc

from spectrumkv.common.security.tls import TlsFiles, optional_path, server_credentials
from spectrumkv.common.security.tokens import AcceptedTokens, TokenInterceptor
from spectrumkv.common.service.config import ServerConfig


@dataclass(frozen=True)
class ServerSecurity:
    """The security of a server; by default there is none, which is for loopback.

    Attributes:
        tls: the server's certificate, and with `verify_clients` the clients' authorities; None serves plaintext.
        verify_clients: refuse clients without a certificate of `tls.ca` (mutual TLS).
        client_names: a caller's certificate must have one of these names to bring work; with none, any may.
        token_file: the file of accepted bearer tokens; with None calls need no token.
    """

    tls: TlsFiles | None = None
    verify_clients: bool = False
    token_file: Path | None = None
    client_names: frozenset[str] = frozenset()

    @classmethod
    def from_config(cls, config: ServerConfig) -> "ServerSecurity":
        """Return the security that a service's options ask for.

        Args:
            config: the options.

        Raises:
            InvalidArgumentError: a certificate comes without its key.
        """
        serves_tls = config.tls_cert is not None
        return cls(
            tls=TlsFiles.named(config.tls_cert, config.tls_key, config.tls_ca) if serves_tls else None,
            verify_clients=config.tls_ca is not None and config.tls_clients == "verified",
            token_file=optional_path(config.token_file),
            client_names=frozenset(
                name.strip() for name in (config.tls_client_names or "").split(",") if name.strip()
            ),
        )

    def check(self) -> None:
        """Check that the files can be used.

        Raises:
            InvalidArgumentError: a file cannot be used.
        """
        self.interceptors()
        if self.tls is not None:
            self.tls.watch()

    def interceptors(self) -> tuple[grpc.ServerInterceptor, ...]:
        """Return the interceptors that refuse calls before they reach the handlers.

        Raises:
            InvalidArgumentError: the file of tokens cannot be used.
        """
        return () if self.token_file is None else (TokenInterceptor(AcceptedTokens(self.token_file)),)

    def add_port(self, server: grpc.Server, address: str) -> int:
        """Let a server listen on an address.

        Args:
            server: the server.
            address: "host:port"; port 0 is any free port.

        Returns:
            The port.

        Raises:
            InvalidArgumentError: a certificate or key cannot be used.
            RuntimeError: the address cannot be bound.
        """
        if self.tls is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, server_credentials(self.tls.watch(), self.verify_clients)))
