"""A long run of everything at once: mixed requests, cancels, harmed workers; every greedy answer checked.

`python -m tests.faults.soak.soak` is `make soak`; `test_soak.py` runs a short form.
"""

import argparse
import itertools
import math
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.completion import Completion
from spectrumkv.client.request import KvChoice, TokenIds
from spectrumkv.common.errors import CancelledError, ResourceExhaustedError, SpectrumKVError, UnavailableError
from tests.faults import sabotage
from tests.faults.deployment import NOTHING, STUCK_SECONDS, Service, until
from tests.faults.fleet import Fleet, running_fleet
from tests.faults.soak.findings import Findings, Harm, Plan, Resources
from tests.faults.soak.requests import EXACT, QUANTIZED, coded_as, drawn, greedy
from tests.services.kv.test_lossless import random_prompt
from tests.services.reference import LOGIT_TIE, generate, reference_model, worst_gap
from tests.services.same_tokens import ALLOWED, disagreement
from tests.tiny_models import tiny_model

PROMPT_LENGTHS = (3, 17, 64, 130, 300, 700)
MOST_TOKENS = 48
CLIENTS = 8
CANCELLED_SHARE = 0.1
# Greedy over exact KV, checked against transformers; greedy over quantized KV, checked against a quiet day.
EXACT_SHARE, QUANTIZED_SHARE = 0.4, 0.3
# What happens to the last decode and the last prefill in turn.
KILLED = "killed"
HARMS = (
    ("decode", KILLED),
    ("prefill", KILLED),
    ("decode", sabotage.FAILING_STEP),
    ("prefill", sabotage.FROZEN_PASS),
    ("decode", sabotage.FROZEN_STEP),
)
# A worker in trouble ends by itself, if it gets requests; otherwise it is killed after this.
TROUBLE_SECONDS = STUCK_SECONDS + 15.0
# Who is told of a dead worker is told within this.
TOLD_SECONDS = 2.0
REQUEST_SECONDS = 60.0
# The first is the warm-up; what is held is looked at after each.
QUARTERS = 4
RSS_GROWTH = 0.05
MORE_DESCRIPTORS, MORE_THREADS = 6, 4


class Soak:
    """Runs a plan on a fleet.

    Args:
        fleet: its last prefill and decode are harmed in turn; the others live through it all and are measured.
        plan: how much.
    """

    def __init__(self, fleet: Fleet, plan: Plan) -> None:
        self._fleet = fleet
        self._plan = plan
        self.findings = Findings()
        self._numbers = itertools.count()
        self._model = reference_model(tiny_model("llama"))
        self._prompts = [random_prompt(length) for length in PROMPT_LENGTHS]
        self._expected = [generate(self._model, prompt, MOST_TOKENS) for prompt in self._prompts]

    def run(self) -> Findings:
        self._quiet = self._quiet_answers()
        lasting = [self._fleet.decodes[0], self._fleet.prefills[0]]
        found = []
        with self._harming():
            for requests, harms in zip(
                divided(self._plan.requests, QUARTERS),
                itertools.accumulate(divided(self._plan.harms, QUARTERS)),
                strict=True,
            ):
                self._load(requests, harms)
                found.append([self._when_quiet(service) for service in lasting])
        for service in self._fleet.services:
            self._when_quiet(service)
        for service, (warm, *later) in zip(lasting, zip(*found, strict=True), strict=True):
            self._compare(service.name, warm, later)
        return self.findings

    def _quiet_answers(self) -> dict[tuple[int, KvChoice, str], Completion]:
        """What each prompt gets over each kind of quantized KV, by each codec, when nothing else runs.

        Where prefill chooses the codec it goes by what is slow just then, and a busy machine may have it take the
        other one.
        """
        answers = {}
        with self._fleet.client() as client:
            for which, prompt in enumerate(self._prompts):
                for kv in QUANTIZED:
                    for named in coded_as(kv):
                        asked = client.generate(TokenIds(tuple(prompt)), sampling=greedy(MOST_TOKENS), kv=named)
                        answer = asked.result()
                        answers[which, kv, answer.usage.codec] = answer
        return answers

    def _load(self, requests: int, harms: int) -> None:
        """Send so many requests, and more until so many harms are over: a fast machine outruns the harms."""
        first = next(self._numbers)
        numbers = itertools.chain([first], self._numbers)
        taking = threading.Lock()

        def number_of_next() -> int | None:
            with taking:
                number = next(numbers)
            over = sum(math.isfinite(harm.ended_at) for harm in tuple(self.findings.harms))
            return number if number < first + requests or over < harms else None

        def work() -> None:
            with self._fleet.client() as client:
                while (number := number_of_next()) is not None:
                    self._send(client, random.Random(f"{self._plan.seed}-{number}"))

        with ThreadPoolExecutor(CLIENTS) as pool:
            for outcome in [pool.submit(work) for _ in range(CLIENTS)]:
                outcome.result()

    @contextmanager
    def _harming(self) -> Iterator[None]:
        """Kill or break a worker now and then, and start it again."""
        over = threading.Event()
        harms = itertools.cycle(HARMS)

        def harm_until_over() -> None:
            while not over.wait(self._plan.harm_seconds):
                kind, what = next(harms)
                self._harm(self._fleet.decodes[-1] if kind == "decode" else self._fleet.prefills[-1], what)

        with ThreadPoolExecutor(1) as harmer:
            outcome = harmer.submit(harm_until_over)
            try:
                yield
            finally:
                over.set()
            outcome.result()

    def _harm(self, victim: Service, what: str) -> None:
        harm = Harm(what, time.monotonic())
        self.findings.harms.append(harm)
        if what != KILLED:
            victim.sabotage(what)
            with suppress(subprocess.TimeoutExpired):
                victim.wait_for_end(TROUBLE_SECONDS)
        victim.kill()
        harm.ended_at = time.monotonic()
        victim.switch.unlink(missing_ok=True)
        victim.start()
        victim.wait_until_serving()

    def _send(self, client: SpectrumClient, chance: random.Random) -> None:
        which, tokens = chance.randrange(len(self._prompts)), chance.randint(1, MOST_TOKENS)
        kind = chance.random()
        kv = EXACT if kind < EXACT_SHARE else chance.choice(QUANTIZED)
        checked = kind < EXACT_SHARE + QUANTIZED_SHARE
        sampling = greedy(tokens) if checked else drawn(tokens, chance)
        sent_at = time.monotonic()
        stream = client.generate(
            TokenIds(tuple(self._prompts[which])), sampling=sampling, kv=kv, timeout=REQUEST_SECONDS
        )
        cancel = None
        if chance.random() < CANCELLED_SHARE:
            cancel = threading.Timer(chance.random() * 0.4, stream.cancel)
            cancel.start()
        try:
            completion = stream.result()
        except SpectrumKVError as error:
            self._ended(error, sent_at, cancel is not None)
            return
        finally:
            if cancel is not None:
                cancel.cancel()
        self._count("done")
        if len(completion.tokens) != tokens or completion.usage.recomputed_prompt_tokens:
            self._wrong(f"{len(completion.tokens)} tokens of {tokens}: {completion.usage}")
        if checked and kv is EXACT:
            self._check_exact(which, completion.token_ids)
        elif checked:
            self._check_quantized(which, kv, completion)

    def _check_exact(self, which: int, token_ids: tuple[int, ...]) -> None:
        with self.findings.lock:
            self.findings.checked += 1
        if list(token_ids) != self._expected[which][: len(token_ids)]:
            gap = worst_gap(self._model, self._prompts[which], token_ids)
            if gap > LOGIT_TIE:
                self._wrong(f"prompt {which}: a token lies {gap} below the best")

    def _check_quantized(self, which: int, kv: KvChoice, completion: Completion) -> None:
        with self.findings.lock:
            self.findings.checked_quantized += 1
        difference = disagreement(completion, self._quiet[which, kv, completion.usage.codec])
        if difference > ALLOWED:
            self._wrong(f"prompt {which}, {kv}: {difference} nats from what it gets on a quiet day")

    def _ended(self, error: SpectrumKVError, sent_at: float, may_cancel: bool) -> None:
        """Judge an error: only a cancel, a refusal with a delay, and the loss of a worker may be."""
        now = time.monotonic()
        harmed = any(
            harm.began_at <= now and sent_at - TOLD_SECONDS <= harm.ended_at for harm in tuple(self.findings.harms)
        )
        if isinstance(error, CancelledError) and may_cancel:
            self._count("cancelled")
        elif isinstance(error, ResourceExhaustedError) and error.retry_after_seconds > 0:
            self._count("refused")
        elif isinstance(error, UnavailableError) and harmed:
            self._count("ended by a harm")
        else:
            self._count(error.code)
            self._wrong(f"{error.code}: {error.message}")

    def _when_quiet(self, service: Service) -> Resources:
        try:
            until(lambda: service.held() == NOTHING, 15.0, f"{service.name} holds nothing")
        except AssertionError as error:
            self._wrong(str(error))
        return Resources.of(service)

    def _compare(self, name: str, warm: Resources, later: Sequence[Resources]) -> None:
        growth = [one.resident_bytes / warm.resident_bytes - 1 for one in later]
        last = later[-1]
        more_descriptors, more_threads = last.descriptors - warm.descriptors, last.threads - warm.threads
        memory = ", ".join(f"{share:+.1%}" for share in growth)
        self.findings.growth[name] = f"memory {memory}, files {more_descriptors:+}, threads {more_threads:+}"
        if growth[-1] > RSS_GROWTH:
            self.findings.grown.append(f"{name} grew by {growth[-1]:.1%}")
        if more_descriptors > MORE_DESCRIPTORS:
            self._wrong(f"{name} has {last.descriptors} open files after {warm.descriptors}")
        if more_threads > MORE_THREADS:
            self._wrong(f"{name} has {last.threads} threads after {warm.threads}")

    def _count(self, outcome: str) -> None:
        with self.findings.lock:
            self.findings.outcomes[outcome] += 1

    def _wrong(self, sentence: str) -> None:
        with self.findings.lock:
            self.findings.wrong.append(sentence)


def divided(whole: int, parts: int) -> list[int]:
    """`whole` in so many parts that are as equal as can be."""
    return [(place + 1) * whole // parts - place * whole // parts for place in range(parts)]


def soak(plan: Plan, directory: Path) -> Findings:
    """Start two workers of each kind and run the plan."""
    options = {"kv_memory": "48MiB", "stuck_after": f"{STUCK_SECONDS:g}"}
    with running_fleet(directory, tiny_model("llama"), **options) as fleet:
        return Soak(fleet, plan).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--harm-seconds", type=float, default=60.0)
    parser.add_argument("--harms", type=int, default=len(HARMS), help="go on until so many harms are over")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    given = parser.parse_args()
    plan = Plan(given.requests, given.harms, given.harm_seconds, given.seed)
    with tempfile.TemporaryDirectory() as directory:
        findings = soak(plan, Path(directory))
    sys.stdout.write("\n".join([findings.sentence(plan), *findings.wrong, *findings.grown]) + "\n")
    return 1 if findings.wrong or findings.grown else 0


if __name__ == "__main__":
    sys.exit(main())
