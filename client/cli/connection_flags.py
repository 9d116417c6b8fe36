"""The flags that say which server to talk to, and how it and this caller know each other."""

import argparse
from pathlib import Path

from spectrumkv.client.client import SpectrumClient
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.rpc.targets import Target
from spectrumkv.common.security import SYSTEM_ROOTS, ChannelSecurity, TlsFiles

DEFAULT_SERVER = "127.0.0.1:50051"


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--server` and the flags of its security."""
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--server",
        type=parse_server,
        default=DEFAULT_SERVER,
        metavar="HOST:PORT",
        help="the server to talk to, or numeric addresses of several, separated by commas (default: %(default)s)",
    )
    group.add_argument(
        "--tls-ca",
        metavar="FILE",
        help=f"use TLS; PEM file of the authority that vouches for the server ('{SYSTEM_ROOTS}': a public one)",
    )
    group.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="PEM file of a certificate to show to the server"
    )
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM file of that certificate's private key")
    group.add_argument(
        "--tls-name",
        metavar="NAME",
        help="the name that the server's certificate must be for (default: the one in --server)",
    )
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the bearer token to send (default: the environment variable SPECTRUMKV_TOKEN, if set)",
    )
    group.add_argument(
        "--allow-plaintext",
        action="store_true",
        help="talk to other machines without encryption where --tls-ca is not given",
    )


def connect(arguments: argparse.Namespace) -> SpectrumClient:
    """Return a client for the server that the flags name.

    Raises:
        InvalidArgumentError: the flags do not fit together, a file cannot be used, or plaintext is not allowed.
    """
    return SpectrumClient(arguments.server, _security(arguments))


def _security(arguments: argparse.Namespace) -> ChannelSecurity:
    tls = None
    if arguments.tls_ca is not None:
        ca = None if arguments.tls_ca == SYSTEM_ROOTS else Path(arguments.tls_ca)
        tls = TlsFiles(arguments.tls_cert, arguments.tls_key, ca)
    elif arguments.tls_cert is not None or arguments.tls_key is not None:
        raise InvalidArgumentError(
            f"--tls-cert and --tls-key need TLS; say with --tls-ca who vouches for it: '{SYSTEM_ROOTS}' or a file"
        )
    return ChannelSecurity(
        tls,
        arguments.token_file,
        allow_plaintext=arguments.allow_plaintext,
        server_name=arguments.tls_name,
    )


def parse_server(text: str) -> str:
    """Check "host:port", or several.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    try:
        return str(Target.parse(text))
    except InvalidArgumentError as error:
        raise argparse.ArgumentTypeError(error.message) from None
