"""Run `spectrumkv demo`: send one long prompt at three budgets and compare."""

import argparse
from collections import deque
from importlib.resources import files

from rich.console import Console

from spectrumkv.client.cli.generate import echo_text
from spectrumkv.client.cli.tables import comparison_table
from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.completion import Completion
from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import log_on_stderr, running_pair, stopped_by_signals
from spectrumkv.client.local.service_process import KEPT_LINES
from spectrumkv.client.request import KvChoice, Message, Sampling
from spectrumkv.common.errors import SpectrumKVError

QUESTION = "Who was the first keeper of the lighthouse?"
MAX_TOKENS = 48
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
            completions = [(budget, _ask(out, client, budget, policy)) for budget, policy in RUNS]
    except SpectrumKVError:
        # Now that the services have stopped, all that they said is read.
        log.show_kept()
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


def document() -> str:
    """Return the document that the demo asks about."""
    return (files("spectrumkv.client.cli") / "demo_document.txt").read_text(encoding="utf-8")


def _ask(out: Console, client: SpectrumClient, budget: float, policy: str | None) -> Completion:
    out.rule(f"budget {budget:g}, {policy or 'default'} policy", align="left")
    prompt = [Message("user", f"{document()}\n\n{QUESTION}")]
    kv = KvChoice(budget=budget, policy=policy)
    with client.generate(prompt, sampling=Sampling(max_tokens=MAX_TOKENS), kv=kv) as stream:
        return echo_text(stream)
