"""Run `spectrumkv-health`: ask a server's standard gRPC health service once, as health checks of containers do.

The command loads no model library, since a check runs every few seconds for as long as the service does.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from spectrumkv.client.cli import flags
from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.readiness import is_serving
from spectrumkv.common.telemetry.log_output import prepare_standard_streams

SERVER_VARIABLE = "SPECTRUMKV_SERVER"
DEFAULT_TIMEOUT_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 where the server is ready, 1 where it is not or cannot be asked.

    Args:
        arguments: the words of the command line; None takes those of the process.
    """
    prepare_standard_streams()
    parsed = build_parser().parse_args(arguments)
    try:
        with open_channel(parsed.server, flags.channel_security(parsed)) as channel:
            ready = is_serving(channel, parsed.timeout)
    except SpectrumKVError as error:
        print(f"{parsed.server}: {error.code}: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    if not ready:
        print(f"{parsed.server} is not ready", file=sys.stderr)  # noqa: T201
    return 0 if ready else 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; the environment may name the server."""
    parser = argparse.ArgumentParser(
        prog="spectrumkv-health",
        description="Exit with status 0 only if a server is ready; a token is not needed.",
        allow_abbrev=False,
    )
    flags.add_connection_flags(parser)
    parser.set_defaults(server=os.environ.get(SERVER_VARIABLE, flags.DEFAULT_SERVER))
    parser.add_argument(
        "--timeout",
        type=flags.parse_seconds,
        default=DEFAULT_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="time that the server has to answer (default: %(default)g)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
