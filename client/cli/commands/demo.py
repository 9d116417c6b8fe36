"""Run `spectrumkv demo`: send one long prompt at three budgets and compare."""

import argparse
from collections import deque
from importlib.resources import files

from rich.console import Console

from spectrumkv.client.cli.commands.generate import echo_text
from spectrumkv.client.cli.tables import comparison_table
from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.completion import Completion
from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import log_on_stderr, running_pair, stopped_by_signals
from spectrumkv.client.local.service_process import KEPT_LINES
from spectrumkv.client.request import KvChoice, Message, Prompt, Sampling
from spectrumkv.common.errors import FailedPreconditionError, SpectrumKVError
from spectrumkv.v1.prefill_pb2 import PrefillServiceGetServerInfoResponse as PrefillInfo

QUESTION = "Who was the first keeper of the lighthouse?"
ANSWER = "The first keeper was Josiah Penrose"
MAX_TOKENS = 48
# Tokenizers make fewer tokens of English.
CHARACTERS_PER_TOKEN = 2
# Of the question and of the chat template, which may begin with a system message.
TOKENS_AROUND_DOCUMENT = 96
# Enough for the answer and the words around it.
LEAST_CHARACTERS = 256
# Budgets with the policy of each; None leaves the policy to the server.
RUNS: tuple[tuple[float, str | None], ...] = ((1.0, "fp16"), (0.5, None), (0.3, None))


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "demo",
        help="start both services, send a long prompt at three budgets, compare",
        description="Start both services on free ports, ask one question about a long document at three "
        "KV budgets, print the answers and what they used, and stop both.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="NAME", help="local directory or hub name (default: the embedded model)")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Start both services, ask the question at each budget, and print the comparison.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: a service could not be started, or refused a request.
    """
    out = Console(highlight=False, markup=False, soft_wrap=True)
    options = dict(FREE_PORTS) | ({"model": arguments.model} if arguments.model else {})
    out.print("starting a decode and a prefill service; the first start takes minutes")
    log = DemoLog()
    try:
        with stopped_by_signals(), running_pair(options, log.add) as pair, SpectrumClient(pair.address) as client:
            log.be_quiet()
            out.print(f"both are ready: prefill at {pair.prefill.address}, decode at {pair.decode.address}")
            out.print(f"question about a long document: {QUESTION}")
            completions = [(budget, ask(out, client, budget, policy)) for budget, policy in RUNS]
    except SpectrumKVError as error:
        # Now that the services have stopped, all that they said is read.
        log.show_kept()
        if "--" in error.message:
            out.print("demo itself takes --model only; spectrumkv up takes every option that the services name")
        raise
    Console().print(comparison_table(completions))
    return 0


class DemoLog:
    """Show what the services log until they are ready, so that the screen is not silent for minutes.

    Later lines are kept, and shown only after an error.
    """

    def __init__(self) -> None:
        self._show = log_on_stderr()
        self._quiet = False
        self._kept: deque[tuple[str, str]] = deque(maxlen=KEPT_LINES)

    def add(self, name: str, line: str) -> None:
        """Show or keep a line of a service's log."""
        if self._quiet:
            self._kept.append((name, line))
        else:
            self._show(name, line)

    def be_quiet(self) -> None:
        """Keep the lines that follow instead of showing them."""
        self._quiet = True

    def show_kept(self) -> None:
        """Show the kept lines."""
        for name, line in tuple(self._kept):
            self._show(name, line)


def document(characters: int | None = None) -> str:
    """Return the document that the demo asks about, or a stretch of it that has the answer.

    Args:
        characters: length of the stretch; None, or a length beyond the document's, for all of it.
    """
    text = (files("spectrumkv.client.cli.commands") / "demo_document.txt").read_text(encoding="utf-8")
    if characters is None:
        return text
    end_of_answer = text.index("\n", text.index(ANSWER))
    start = max(0, min(end_of_answer, text.index(ANSWER) + characters // 2) - characters)
    return text[start : start + characters]


def prefill_info(client: SpectrumClient) -> PrefillInfo:
    """Return what a prefill service says of itself.

    Args:
        client: connected to it.

    Raises:
        FailedPreconditionError: the server is a decode service.
    """
    info = client.server_info()
    if not isinstance(info, PrefillInfo):
        raise FailedPreconditionError(f"{client.address} is a decode service; name the prefill service before it")
    return info


def question_for(info: PrefillInfo, answer_tokens: int, most_characters: int | None = None) -> Prompt:
    """Return the question about as much of the document as a server's model takes.

    Args:
        info: what the prefill service says of itself.
        answer_tokens: tokens that the answer may have.
        most_characters: of the document; None for all of it.

    Returns:
        A chat message, or text where the model has no chat template.

    Raises:
        FailedPreconditionError: the model's context is too short.
    """
    room = CHARACTERS_PER_TOKEN * (info.model.context_length - answer_tokens - TOKENS_AROUND_DOCUMENT)
    if room < LEAST_CHARACTERS:
        raise FailedPreconditionError(
            f"{info.model_name} has a context of {info.model.context_length} tokens, which is too short for the "
            "question that is asked here; try `spectrumkv generate` with a prompt of your own"
        )
    asked = f"{document(min(room, most_characters or room))}\n\n{QUESTION}"
    return [Message("user", asked)] if info.has_chat_template else f"{asked}\n"


def ask(out: Console, client: SpectrumClient, budget: float, policy: str | None) -> Completion:
    """Ask the question at one budget, and show the answer as it comes.

    Args:
        out: shows the answer.
        client: connected to the prefill service.
        budget: of the KV.
        policy: of the KV; None is the server's default.

    Returns:
        The answer.

    Raises:
        SpectrumKVError: the server refused or ended the request, or its model's context is too short.
    """
    out.rule(f"budget {budget:g}, {policy or 'default'} policy", align="left")
    kv = KvChoice(budget=budget, policy=policy)
    prompt = question_for(prefill_info(client), MAX_TOKENS)
    with client.generate(prompt, sampling=Sampling(max_tokens=MAX_TOKENS), kv=kv) as stream:
        return echo_text(stream)
