"""Run `spectrumkv check`: ask a deployment a question over compressed and over exact KV; compare the answers."""

import argparse
import math
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from spectrumkv.client.cli import flags
from spectrumkv.client.cli.commands.demo import prefill_info, question_for
from spectrumkv.client.cli.output import STDOUT, check_writable, write_json
from spectrumkv.client.cli.tables import facts_table
from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.completion import Completion, TokenEvent
from spectrumkv.client.request import KvChoice, Sampling
from spectrumkv.common.errors import FailedPreconditionError

DEFAULT_TIMEOUT_SECONDS = 120.0
DEFAULT_MAX_KL = 0.5
# KV in the model's own dtype, so that decode computes what one process would.
EXACT = KvChoice(policy="native")
MAX_TOKENS = 32
TOP_LOGPROBS = 20
# The prompt is long enough for several tiers and short enough for a CPU.
DOCUMENT_CHARACTERS = 3000
# By how much the counted budget may exceed the requested one: some policies do not count segment headers, tier maps
# and scales.
BUDGET_SLACK = 0.06


@dataclass(frozen=True)
class CheckResult:
    """Hold the two answers of a deployment.

    Attributes:
        server: the address of the prefill service.
        budget_target: the default budget of the prefill service.
        served: the completion at the server's defaults.
        exact: the completion over KV in the model's own dtype.
        max_kl: largest acceptable mean KL, in nats per token.
    """

    server: str
    budget_target: float
    served: Completion
    exact: Completion
    max_kl: float

    @property
    def agreeing_tokens(self) -> int:
        """Return how many tokens the two answers have in common before the first that differs."""
        pairs = zip(self.served.token_ids, self.exact.token_ids, strict=False)
        return next((place for place, (one, other) in enumerate(pairs) if one != other), len(self.exact.token_ids))

    @property
    def kl(self) -> float:
        """Return the mean KL divergence, in nats, of the served from the exact next-token distributions.

        The mean is taken over the tokens up to and including the first that differs, since these follow the same
        text. The first token is left out: prefill samples it. Each divergence is summed over the most likely tokens
        of the exact distribution. It is a lower bound: a token that the served answer does not list counts as if it
        were as likely as the last one listed.
        """
        places = range(1, min(self.agreeing_tokens + 1, len(self.exact.tokens), len(self.served.tokens)))
        found = [_divergence(self.exact.tokens[place], self.served.tokens[place]) for place in places]
        return sum(found) / len(found) if found else 0.0

    @property
    def problems(self) -> list[str]:
        """Return a sentence for each check that fails."""
        usage = self.served.usage
        recomputed = usage.recomputed_prompt_tokens + self.exact.usage.recomputed_prompt_tokens
        tier_bytes = sum(one.bytes for one in usage.tiers)
        found = [
            (
                recomputed > 0,
                f"decode computed {recomputed} prompt tokens again, so it does not use the KV that was sent",
            ),
            (
                self.agreeing_tokens == 0,
                "the first token differs between the two runs, although it does not depend on the KV that was sent",
            ),
            (
                not 0 < tier_bytes <= usage.kv_bytes_sent,
                f"the tiers account for {tier_bytes} of the {usage.kv_bytes_sent} bytes sent",
            ),
            (
                usage.budget_counted > self.budget_target + BUDGET_SLACK,
                f"the counted budget is {usage.budget_counted:.3f}; the server's default is {self.budget_target:g}",
            ),
            (
                not self.kl <= self.max_kl,
                f"the predictions over the KV that was sent have a mean KL of {self.kl:.3f} nats to those over exact "
                f"KV; the largest acceptable one is {self.max_kl:g} (--max-kl)",
            ),
        ]
        return [sentence for is_wrong, sentence in found if is_wrong]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "check",
        help="send one request through a running deployment and compare with exact KV",
        description="Ask one question twice, with the KV sent as the server does by default and as the model "
        "computed it; compare tokens, predictions, bytes and recomputed tokens. Exit with status 0 if all agree.",
        allow_abbrev=False,
    )
    flags.add_connection_flags(parser)
    parser.add_argument(
        "--timeout",
        type=flags.parse_seconds,
        default=DEFAULT_TIMEOUT_SECONDS,
        metavar="S",
        help="give up a request after S seconds (default: %(default)g)",
    )
    parser.add_argument(
        "--max-kl",
        type=parse_divergence,
        default=DEFAULT_MAX_KL,
        metavar="NATS",
        help="largest acceptable mean KL divergence from the predictions over exact KV (default: %(default)g)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the result as JSON ('-': to stdout, instead of the table)"
    )
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Check a deployment and report.

    Returns:
        The exit status: 0, or 1 if a check fails.

    Raises:
        SpectrumKVError: the result cannot be written, or the server cannot be reached, is not ready, or refuses a
            request.
    """
    check_writable("--json", arguments.json)
    with flags.connect(arguments) as client:
        result = self_check(client, arguments.timeout, arguments.max_kl)
    if arguments.json != STDOUT:
        _show(Console(), result)
    if arguments.json is not None:
        write_json(_as_json(result), arguments.json)
    for problem in result.problems:
        sys.stderr.write(f"{problem}\n")
    return 1 if result.problems else 0


def parse_divergence(text: str) -> float:
    """Return the positive number of nats in a text.

    Raises:
        argparse.ArgumentTypeError: the text is not such a number.
    """
    try:
        nats = float(text)
    except ValueError:
        nats = 0.0
    if not 0.0 < nats < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a positive number of nats")
    return nats


def _as_json(result: CheckResult) -> dict[str, Any]:
    usage = result.served.usage
    return {
        "server": result.server,
        "ok": not result.problems,
        "problems": result.problems,
        "policy": usage.policy,
        "codec": usage.codec,
        "decode_workers": sorted({usage.decode_worker, result.exact.usage.decode_worker}),
        "prompt_tokens": usage.prompt_tokens,
        "agreeing_tokens": result.agreeing_tokens,
        "compared_tokens": len(result.exact.tokens),
        "kl": result.kl,
        "budget_target": result.budget_target,
        "budget_counted": usage.budget_counted,
        "kv_bytes_sent": usage.kv_bytes_sent,
        "kv_fp16_bytes": usage.kv_fp16_bytes,
        "recomputed_prompt_tokens": usage.recomputed_prompt_tokens + result.exact.usage.recomputed_prompt_tokens,
        "text": result.served.text,
        "text_exact": result.exact.text,
    }


def _show(console: Console, result: CheckResult) -> None:
    usage = result.served.usage
    tokens = len(result.exact.tokens)
    console.print(
        facts_table(
            [
                ("server", result.server),
                ("policy, codec", f"{usage.policy}, {usage.codec}"),
                ("tokens before the answers differ", f"{result.agreeing_tokens} of {tokens}"),
                ("mean KL to exact KV", f"{result.kl:.5f} nats per token"),
                ("budget counted / default", f"{usage.budget_counted:.3f} / {result.budget_target:g}"),
                ("KV bytes sent / FP16", f"{usage.kv_bytes_sent:,} / {usage.kv_fp16_bytes:,}"),
                ("prompt tokens recomputed", str(usage.recomputed_prompt_tokens)),
                ("verdict", "failed" if result.problems else "passed"),
            ]
        )
    )


def self_check(client: SpectrumClient, timeout: float, max_kl: float) -> CheckResult:
    """Ask a deployment the same question at its defaults and over exact KV.

    Args:
        client: connected to the prefill service.
        timeout: seconds for each request.
        max_kl: largest acceptable mean KL, in nats per token.

    Returns:
        The two answers.

    Raises:
        FailedPreconditionError: the server is not a prefill service, or is not ready, or its model's context is too
            short.
        SpectrumKVError: the server refused or ended a request.
    """
    if not client.is_serving():
        raise FailedPreconditionError(f"{client.address} is not ready")
    info = prefill_info(client)
    prompt = question_for(info, MAX_TOKENS, DOCUMENT_CHARACTERS)
    sampling = Sampling(max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=TOP_LOGPROBS)
    served, exact = (
        client.generate(prompt, sampling=sampling, kv=kv, timeout=timeout).result() for kv in (KvChoice(), EXACT)
    )
    return CheckResult(client.address, info.defaults.budget, served, exact, max_kl)


def _divergence(exact: TokenEvent, served: TokenEvent) -> float:
    listed = {one.token_id: one.logprob for one in served.top_logprobs}
    if not listed or not exact.top_logprobs:
        return math.inf
    least = min(listed.values())
    terms = (math.exp(one.logprob) * (one.logprob - listed.get(one.token_id, least)) for one in exact.top_logprobs)
    return max(0.0, sum(terms))
