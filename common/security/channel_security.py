"""What a caller asks of the server that it connects to, and shows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.rpc.targets import Target
from spectrumkv.common.security.renewed_channel import RenewedChannel
from spectrumkv.common.security.tls import TlsFiles, optional_path
from spectrumkv.common.security.tokens import TokenSender, token_source
from spectrumkv.common.service.config import PrefillConfig

Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class ChannelSecurity:
    """How a channel is guarded; by default it is plaintext and reaches loopback only.

    Attributes:
        tls: verifies the server by `tls.ca`, and shows `tls.cert` to one that asks; None is plaintext.
        token_file: the first token in it goes with every call; None takes the environment's SPECTRUMKV_TOKEN, if set.
        named_by: the flag that names `token_file`, for errors.
        allow_plaintext: let plaintext go to other machines too.
        server_name: the name that the server's certificate must be for; None is the one in its address.
    """

    tls: TlsFiles | None = None
    token_file: Path | None = None
    named_by: str = "--token-file"
    allow_plaintext: bool = False
    server_name: str | None = None

    @classmethod
    def to_decode(cls, config: PrefillConfig) -> "ChannelSecurity":
        """Read prefill's options: TLS where it knows the authorities of decode's certificates.

        Raises:
            InvalidArgumentError: a certificate comes without its key.
        """
        knows_authority = config.tls_ca is not None
        return cls(
            tls=TlsFiles.named(config.tls_cert, config.tls_key, config.tls_ca) if knows_authority else None,
            token_file=optional_path(config.decode_token_file),
            named_by="--decode-token-file",
            allow_plaintext=config.allow_plaintext,
        )

    def check(self) -> None:
        """Check the files.

        Raises:
            InvalidArgumentError: one cannot be used.
        """
        token_source(self.named_by, self.token_file)
        if self.tls is not None:
            self.tls.watch()

    def open(self, target: Target, options: Options) -> grpc.Channel:
        """Return a channel to `target`. It connects when it is first used.

        Raises:
            InvalidArgumentError: a file cannot be used, plaintext would leave this machine, or several servers have
                no name in common.
        """
        token = token_source(self.named_by, self.token_file)
        options = (*options, *target.options)
        channel = self._plaintext(target, options) if self.tls is None else self._encrypted(self.tls, target, options)
        return channel if token is None else grpc.intercept_channel(channel, TokenSender(token))

    def _plaintext(self, target: Target, options: Options) -> grpc.Channel:
        if not self.allow_plaintext and not target.is_loopback:
            raise InvalidArgumentError(
                f"{target} is another machine, and what goes there would not be encrypted; verify it by its "
                "certificate with --tls-ca, or pass --allow-plaintext"
            )
        return grpc.insecure_channel(target.uri, options=options)

    def _encrypted(self, tls: TlsFiles, target: Target, options: Options) -> grpc.Channel:
        name = self.server_name
        if name is None and len(target.addresses) > 1:
            if len(target.hosts) > 1:
                raise InvalidArgumentError(
                    f"the servers are {target}; say with --tls-name which name all their certificates are for"
                )
            (name,) = target.hosts
        # For a list gRPC would expect the whole list in a certificate.
        named = () if name is None else (("grpc.ssl_target_name_override", name.strip("[]")),)
        return RenewedChannel(target.uri, tls.watch(), (*options, *named))
