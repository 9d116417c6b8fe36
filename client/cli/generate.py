"""`spectrumkv generate`: send one prompt, stream the answer, say what it cost."""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from spectrumkv.client.cli import connection_flags, generation_flags
from spectrumkv.client.cli.json_output import STDOUT, write_json
from spectrumkv.client.cli.output_file import check_writable
from spectrumkv.client.cli.tables import usage_table
from spectrumkv.client.client import DEFAULT_TIMEOUT_SECONDS, CompletionStream
from spectrumkv.client.completion import Completion
from spectrumkv.client.request import Message, Prompt, Request, TokenIds
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.telemetry.tracing import TraceContext

STDIN = "-"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "generate",
        help="send a prompt and stream the answer",
        description="Send a prompt; the answer goes to stdout as it arrives, then what it used to stderr.",
        allow_abbrev=False,
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read the prompt from FILE ('-': stdin)")
    prompt.add_argument(
        "--token-ids", type=generation_flags.parse_token_ids, metavar="IDS", help="a tokenized prompt: 1,2,3"
    )
    parser.add_argument("--chat", action="store_true", help="render the prompt with the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    parser.add_argument(
        "--timeout",
        type=generation_flags.parse_seconds,
        default=DEFAULT_TIMEOUT_SECONDS,
        metavar="S",
        help="seconds until the request is given up (default: %(default)g)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON ('-': stdout, instead of the text)")
    connection_flags.add_connection_flags(parser)
    generation_flags.add_sampling_flags(parser)
    generation_flags.add_kv_flags(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Do it.

    Raises:
        SpectrumKVError: the result could not be written, or the server refused or ended the request.
    """
    check_writable("--json", arguments.json)
    request = _request_from(arguments)
    with (
        connection_flags.connect(arguments) as client,
        client.send(request, arguments.timeout, _trace_of_caller()) as stream,
    ):
        completion = _read(stream, echo=arguments.json != STDOUT)
    Console(stderr=True).print(usage_table(completion, arguments.budget))
    if arguments.json is not None:
        write_json({"request": request.as_json()} | completion.as_json(), arguments.json)
    return 0


def echo_text(stream: CompletionStream) -> Completion:
    """Write text to stdout as it arrives, end the line, and return the completion."""
    started = False
    try:
        for token in stream:
            sys.stdout.write(token.text)
            sys.stdout.flush()
            started = True
    finally:
        # An error that comes midway is written on a line of its own.
        if started:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return stream.result()


def _trace_of_caller() -> TraceContext:
    """The trace that this command is part of, from the variables that OpenTelemetry defines for it."""
    return TraceContext(os.environ.get("TRACEPARENT", ""), os.environ.get("TRACESTATE", ""))


def _read(stream: CompletionStream, echo: bool) -> Completion:
    return echo_text(stream) if echo else stream.result()


def _request_from(arguments: argparse.Namespace) -> Request:
    """Put the request together; end the program with status 2 where the flags do not fit together."""
    parser: argparse.ArgumentParser = arguments.parser
    try:
        return Request(
            prompt=_prompt_from(arguments),
            sampling=generation_flags.sampling_from(arguments),
            kv=generation_flags.kv_choice_from(arguments),
            model=arguments.model,
        )
    except InvalidArgumentError as error:
        parser.error(error.message)


def _prompt_from(arguments: argparse.Namespace) -> Prompt:
    if arguments.system is not None and not arguments.chat:
        raise InvalidArgumentError("--system has a meaning with --chat only; add --chat")
    if arguments.token_ids is not None:
        if arguments.chat:
            raise InvalidArgumentError("--token-ids is a finished prompt; leave out --chat")
        return TokenIds(arguments.token_ids)
    text = _read_prompt(arguments.prompt_file) if arguments.prompt is None else arguments.prompt
    if not arguments.chat:
        return str(text)
    system = [] if arguments.system is None else [Message("system", arguments.system)]
    return [*system, Message("user", text)]


def _read_prompt(source: str) -> str:
    if source == STDIN and sys.stdin is None:
        raise InvalidArgumentError("--prompt-file -: standard input is closed; give the prompt there")
    try:
        if source == STDIN:
            # UTF-8 as in a file: in some locales, sys.stdin reads any bytes and makes surrogates of them.
            with open(sys.stdin.fileno(), encoding="utf-8", closefd=False) as stdin:
                return stdin.read()
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"--prompt-file {source}: {error}; give readable UTF-8 text") from error
