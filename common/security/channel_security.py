"""Opens channels that verify the server and send the caller's certificate and token."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.rpc.targets import Target
from spectrumkv.common.security.renewed_async_channel import RenewedAsyncChannel
from spectrumkv.common.security.renewed_channel import RenewedChannel
from spectrumkv.common.security.tls import TlsFiles, optional_path
from spectrumkv.common.security.tokens import TokenSender, TokenSource, token_source
from spectrumkv.common.service.config import PrefillConfig

Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class ChannelSecurity:
    """The security of a channel; by default it is plaintext and reaches loopback only.

    Attributes:
        tls: the channel verifies the server by `tls.ca`, and shows `tls.cert` if the server asks for a certificate;
            None is plaintext.
        token_file: the first token in this file goes with every call; with None the one in the environment's
            SPECTRUMKV_TOKEN, if it is set.
        named_by: the flag that names `token_file`, for errors.
        allow_plaintext: let plaintext go to other machines too.
        server_name: the name that the server's certificate must be for; None is the name in its address.
        allow_proxy: connect through the proxy that the environment names (`https_proxy` and its like), except to
            loopback.
    """

    tls: TlsFiles | None = None
    token_file: Path | None = None
    named_by: str = "--token-file"
    allow_plaintext: bool = False
    server_name: str | None = None
    allow_proxy: bool = True

    @classmethod
    def to_decode(cls, config: PrefillConfig) -> "ChannelSecurity":
        """Return the security of prefill's channels to decode: no proxy, and TLS if `--tls-ca` names authorities.

        Args:
            config: prefill's options.

        Raises:
            InvalidArgumentError: a certificate comes without its key.
        """
        knows_authority = config.tls_ca is not None
        return cls(
            tls=TlsFiles.named(config.tls_cert, config.tls_key, config.tls_ca) if knows_authority else None,
            token_file=optional_path(config.decode_token_file),
            named_by="--decode-token-file",
            allow_plaintext=config.allow_plaintext,
            allow_proxy=False,
        )

    def check(self) -> None:
        """Check that the files can be used.

        Raises:
            InvalidArgumentError: a file cannot be used.
        """
        self.token()
        if self.tls is not None:
            self.tls.watch()

    def open(self, target: Target, options: Options) -> grpc.Channel:
        """Return a channel that connects when it is first used.

        Args:
            target: the server, or several servers.
            options: further options of gRPC.

        Raises:
            InvalidArgumentError: a file cannot be used, plaintext would leave this machine, or several servers have
                different names and `server_name` is None.
        """
        token = self.token()
        options = self._options_for(target, options)
        channel = (
            grpc.insecure_channel(target.uri, options=options)
            if self.tls is None
            else RenewedChannel(target.uri, self.tls.watch(), options)
        )
        return channel if token is None else grpc.intercept_channel(channel, TokenSender(token))

    def open_async(self, target: Target, options: Options) -> RenewedAsyncChannel:
        """Return a channel for asyncio that connects when it is first used; its calls bring no token by themselves.

        Args:
            target: the server, or several servers.
            options: further options of gRPC.

        Raises:
            InvalidArgumentError: a file cannot be used, plaintext would leave this machine, or several servers have
                different names and `server_name` is None.
        """
        watched = None if self.tls is None else self.tls.watch()
        return RenewedAsyncChannel(target.uri, watched, self._options_for(target, options))

    def token(self) -> TokenSource | None:
        """Return what gives the token that calls bring; None where there is none.

        Raises:
            InvalidArgumentError: the token cannot be used.
        """
        return token_source(self.named_by, self.token_file)

    def _options_for(self, target: Target, options: Options) -> Options:
        """Return a channel's options, after checking that it may be opened.

        Raises:
            InvalidArgumentError: plaintext would leave this machine, or several servers have different names.
        """
        options = (*options, *target.options)
        if target.avoids_proxies or not self.allow_proxy:
            # gRPC otherwise sends even 127.0.0.1 to the proxy that the environment names, prompt and token with it.
            options = (*options, ("grpc.enable_http_proxy", 0))
        if self.tls is None:
            self._check_plaintext(target)
            return options
        name = self._certificate_name(target)
        # Without this option, gRPC would look for the whole list of addresses in a certificate.
        return options if name is None else (*options, ("grpc.ssl_target_name_override", name.strip("[]")))

    def _check_plaintext(self, target: Target) -> None:
        if not self.allow_plaintext and not target.is_loopback:
            raise InvalidArgumentError(
                f"{target} is another machine, and traffic to it would not be encrypted; verify it by its "
                "certificate with --tls-ca, or pass --allow-plaintext"
            )

    def _certificate_name(self, target: Target) -> str | None:
        """Return the name that the servers' certificates must be for; None is the name in the one address.

        Raises:
            InvalidArgumentError: several servers have different names.
        """
        if self.server_name is not None or len(target.addresses) == 1:
            return self.server_name
        if len(target.hosts) > 1:
            raise InvalidArgumentError(
                f"the servers are {target}; say with --tls-name which name all their certificates are for"
            )
        (name,) = target.hosts
        return name
