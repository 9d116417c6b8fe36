"""Run `spectrumkv generate`: send one prompt, stream the answer, and report what it used."""

import argparse
import os
import reprlib
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from spectrumkv.client.cli import flags
from spectrumkv.client.cli.map_picture import draw_map, figure_class
from spectrumkv.client.cli.map_text import print_map
from spectrumkv.client.cli.output import STDOUT, check_writable, write_json
from spectrumkv.client.cli.tables import usage_table
from spectrumkv.client.client import DEFAULT_TIMEOUT_SECONDS, CompletionStream
from spectrumkv.client.completion import Completion
from spectrumkv.client.kv_map import LAYERS, TOKENS
from spectrumkv.client.request import Message, Prompt, Request, TokenIds
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.telemetry.tracing import TraceContext

STDIN = "-"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "generate",
        help="send a prompt and stream the answer",
        description="Send a prompt; write the answer to stdout as it arrives, then what it used to stderr.",
        allow_abbrev=False,
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", nargs="?", metavar="PROMPT", help="text of the prompt")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read the prompt from FILE ('-': stdin)")
    prompt.add_argument(
        "--token-ids", type=flags.parse_token_ids, metavar="IDS", help="send these token ids as the prompt: 1,2,3"
    )
    parser.add_argument("--chat", action="store_true", help="render the prompt with the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message; needs --chat")
    parser.add_argument("--echo", action="store_true", help="write the prompt before the answer")
    parser.add_argument(
        "--prompt-logprobs",
        type=int,
        metavar="N",
        help="report the log-probability of each token of the prompt and of N alternatives (with --json)",
    )
    parser.add_argument(
        "--map",
        nargs="?",
        const=True,
        type=_parse_picture,
        metavar="FILE.png",
        help="show at what precision each token's KV was sent; with FILE.png, draw it for each layer",
    )
    parser.add_argument(
        "--timeout",
        type=flags.parse_seconds,
        default=DEFAULT_TIMEOUT_SECONDS,
        metavar="S",
        help="give up the request after S seconds (default: %(default)g)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the result as JSON ('-': to stdout, instead of the text)"
    )
    flags.add_connection_flags(parser)
    flags.add_sampling_flags(parser)
    flags.add_form_flags(parser)
    flags.add_kv_flags(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Send the prompt, and print the answer and what it used.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: the result cannot be written, or the server refused or ended the request.
    """
    check_writable("--json", arguments.json)
    if isinstance(arguments.map, Path):
        check_writable("--map", str(arguments.map))
        figure_class()
    request = _request_from(arguments)
    with (
        flags.connect(arguments) as client,
        client.send(request, arguments.timeout, _trace_of_caller()) as stream,
    ):
        completion = _read(stream, echo=arguments.json != STDOUT, answers=arguments.n or 1, prompt=arguments.echo)
    on_stderr = Console(stderr=True)
    if isinstance(arguments.map, Path):
        draw_map(completion, arguments.map)
    elif completion.kv_map is not None:
        print_map(on_stderr, completion.prompt_tokens, completion.kv_map)
    on_stderr.print(usage_table(completion, arguments.budget))
    if arguments.json is not None:
        write_json({"request": request.as_json()} | completion.as_json(), arguments.json)
    return 0


def echo_text(stream: CompletionStream) -> Completion:
    """Return the completion of a stream, after writing its text to stdout as it arrives."""
    started = False
    try:
        for token in stream:
            sys.stdout.write(token.text)
            sys.stdout.flush()
            started = True
    finally:
        # If an error ends the stream, its message starts on a new line.
        if started:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return stream.result()


def _trace_of_caller() -> TraceContext:
    """Return the trace that this command is part of, from the environment variables of OpenTelemetry."""
    return TraceContext(os.environ.get("TRACEPARENT", ""), os.environ.get("TRACESTATE", ""))


def _read(stream: CompletionStream, echo: bool, answers: int, prompt: bool) -> Completion:
    """Return the completion, after writing it if `echo`: one answer as it arrives, several one after another."""
    if not echo:
        return stream.result()
    if answers == 1 and not prompt:
        return echo_text(stream)
    completion = stream.result()
    before = "".join(token.text for token in completion.prompt_tokens) if prompt else ""
    for number, answer in enumerate(completion.answers):
        if answers > 1:
            sys.stdout.write(f"--- answer {number}\n")
        sys.stdout.write(f"{before}{answer.text}\n")
    return completion


def _request_from(arguments: argparse.Namespace) -> Request:
    """Return the request; end the program with status 2 if the flags contradict each other."""
    parser: argparse.ArgumentParser = arguments.parser
    try:
        return Request(
            prompt=_prompt_from(arguments),
            sampling=replace(flags.sampling_from(arguments), structured_output=flags.form_from(arguments)),
            kv=flags.kv_choice_from(arguments),
            model=arguments.model,
            echo=arguments.echo or arguments.map is not None,
            prompt_logprobs=arguments.prompt_logprobs,
            kv_map=_map_detail(arguments.map),
        )
    except InvalidArgumentError as error:
        parser.error(error.message)


def _parse_picture(text: str) -> Path:
    """Return the file of a picture; a prompt that stands behind --map is none.

    Raises:
        argparse.ArgumentTypeError: the name does not end in .png.
    """
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(
            f"{reprlib.repr(text)}; allowed: a file that ends in .png, or nothing: --map behind the prompt"
        )
    return Path(text)


def _map_detail(asked: Path | bool | None) -> str | None:
    if asked is None:
        return None
    return LAYERS if isinstance(asked, Path) else TOKENS


def _prompt_from(arguments: argparse.Namespace) -> Prompt:
    if arguments.system is not None and not arguments.chat:
        raise InvalidArgumentError("--system needs a chat template; add --chat")
    if arguments.token_ids is not None:
        if arguments.chat:
            raise InvalidArgumentError("--token-ids is rendered and tokenized already; leave out --chat")
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
            # Decode as UTF-8, as from a file: in some locales, sys.stdin turns invalid bytes into surrogates.
            with open(sys.stdin.fileno(), encoding="utf-8", closefd=False) as stdin:
                return stdin.read()
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"--prompt-file {source}: {error}; give readable UTF-8 text") from error
