"""Run `spectrumkv up`: start both services on this machine, and stop them on Ctrl-C."""

import argparse
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields

from spectrumkv.client.cli import flags
from spectrumkv.client.cli.flags import DEFAULT_SERVER
from spectrumkv.client.cli.runner import EXIT_INTERRUPTED
from spectrumkv.client.local.gateway_process import running_gateway
from spectrumkv.client.local.pair_config import PairConfig
from spectrumkv.client.local.running_pair import (
    READY_TIMEOUT_SECONDS,
    RunningPair,
    log_on_stderr,
    running_pair,
    stopped_by_signals,
)
from spectrumkv.common.service.command_line import add_flags
from spectrumkv.common.service.options import Address
from spectrumkv.common.telemetry.log_output import STDOUT, LineOutput


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "up",
        help="start both services on this machine",
        description="Start a decode and a prefill service; Ctrl-C stops both. Port 0 means any free port.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ready-timeout",
        type=flags.parse_seconds,
        default=READY_TIMEOUT_SECONDS,
        metavar="S",
        help="stop if the services are not ready after S seconds (default: %(default)g)",
    )
    parser.add_argument(
        "--http",
        type=_parse_address,
        metavar="HOST:PORT",
        help="serve the OpenAI API over HTTP on this address, too, such as 127.0.0.1:8000",
    )
    add_flags(parser, PairConfig)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Run both services until Ctrl-C.

    Returns:
        The exit status: 0, or 130 if Ctrl-C cut the start or the stop short.

    Raises:
        InvalidArgumentError: an option has a value that is not allowed, or an address is in use.
        UnavailableError: a service ended, and the other was stopped.
        DeadlineExceededError: a service was not ready in time.
    """
    given = vars(arguments)
    options = {one.name: given[one.name] for one in fields(PairConfig) if one.name in given}
    out = LineOutput(STDOUT)
    ready = False
    try:
        with stopped_by_signals(), running_pair(options, log_on_stderr(), arguments.ready_timeout) as pair:
            ready = True
            with _gateway(pair, arguments), suppress(KeyboardInterrupt):
                _announce(out, pair, arguments.http)
                pair.wait_for_death()
            out.write_line("stopping after the running requests (Ctrl-C again ends them)")
    except KeyboardInterrupt:
        out.write_line("stopped at once" if ready else "stopped before both services were ready")
        return EXIT_INTERRUPTED
    else:
        out.write_line("both services have stopped")
        return 0
    finally:
        out.flush()


def _parse_address(text: str) -> Address:
    try:
        return Address.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {error}") from None


@contextmanager
def _gateway(pair: RunningPair, arguments: argparse.Namespace) -> Iterator[None]:
    """Serve HTTP beside the pair while the block runs, if `--http` says where."""
    if arguments.http is None:
        yield
        return
    given = vars(arguments)
    names: tuple[str, ...] = ("log_level", "log_format", "grace")
    shared = {name: str(given[name]) for name in names if name in given}
    with running_gateway(pair, arguments.http, shared, log_on_stderr()):
        yield


def _announce(out: LineOutput, pair: RunningPair, http: Address | None = None) -> None:
    for launch in (pair.decode, pair.prefill):
        metrics = f"http://{launch.metrics_address}/metrics"
        out.write_line(f"{launch.name} serves on {launch.address}, metrics at {metrics}")
    if http is not None:
        out.write_line(f"gateway serves the OpenAI API on http://{http}/v1, and a page on http://{http}/")
    words = " ".join(["spectrumkv generate", *map(shlex.quote, _connection_flags(pair))])
    out.write_line(f'ready; try: {words} --chat "Why is the sky blue?"   (Ctrl-C stops both)')


def _connection_flags(pair: RunningPair) -> list[str]:
    """Return the flags with which this machine's clients reach the pair."""
    security, address = pair.security, pair.prefill.address.from_here
    flags = [] if str(address) == DEFAULT_SERVER else ["--server", str(address)]
    if security.tls is not None:
        files = {"--tls-ca": security.tls.ca, "--tls-cert": security.tls.cert, "--tls-key": security.tls.key}
        flags += [word for flag, path in files.items() if path is not None for word in (flag, str(path))]
    elif not address.is_loopback:
        flags.append("--allow-plaintext")
    return flags if security.token_file is None else [*flags, "--token-file", str(security.token_file)]
