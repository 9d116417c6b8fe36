"""A long run of everything at once: mixed requests, cancels, killed workers; every greedy answer checked.

`python -m tests.faults.soak` is `make soak`; `test_soak.py` runs a short form.
"""

import argparse
import collections
import itertools
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.errors import CancelledError, ResourceExhaustedError, SpectrumKVError, UnavailableError
from tests.faults.deployment import NOTHING, Service, until
from tests.faults.fleet import Fleet, running_fleet
from tests.services.reference import LOGIT_TIE, generate, reference_model, worst_gap
from tests.services.test_lossless import random_prompt
from tests.tiny_models import tiny_model

PROMPT_LENGTHS = (3, 17, 64, 130, 300, 700)
MOST_TOKENS = 48
CLIENTS = 8
CANCELLED_SHARE = 0.1
# Who is told of a dead worker is told within this.
TOLD_SECONDS = 2.0
REQUEST_SECONDS = 60.0
RSS_GROWTH = 0.05
MORE_DESCRIPTORS, MORE_THREADS = 6, 4


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    Attributes:
        requests: in all; the first quarter is the warm-up.
        kill_seconds: between two kills.
        seed: of all that is drawn.
    """

    requests: int
    kill_seconds: float
    seed: int


@dataclass
class Findings:
    """What came of it.

    Attributes:
        outcomes: requests by how they ended.
        wrong: what must not happen, a sentence each.
        kills: when a worker was killed, by the monotonic clock.
        checked: greedy answers compared with one process of transformers.
        growth: of the resident memory of services that were never killed, since the warm-up.
    """

    outcomes: "collections.Counter[str]" = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    checked: int = 0
    growth: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def sentence(self, plan: Plan) -> str:
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        growth = ", ".join(f"{name} {share:+.1%}" for name, share in self.growth.items())
        return (
            f"soak: {sum(self.outcomes.values())} requests, seed {plan.seed}: {outcomes}; "
            f"{self.checked} greedy answers checked, {len(self.kills)} workers killed, memory {growth}, "
            f"{len(self.wrong)} wrong"
        )


@dataclass(frozen=True)
class Resources:
    """What a quiet process holds: resident bytes, open files, threads."""

    resident_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, service: Service) -> "Resources":
        assert service.process is not None
        directory = Path(f"/proc/{service.process.pid}")
        status = dict(line.split(":", 1) for line in (directory / "status").read_text().splitlines())
        return cls(
            int(status["VmRSS"].split()[0]) << 10, len(list((directory / "fd").iterdir())), int(status["Threads"])
        )


class Soak:
    """Runs a plan on a fleet.

    Args:
        fleet: its last prefill and decode are killed in turn; the others live through it all and are measured.
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
        lasting = [self._fleet.decodes[0], self._fleet.prefills[0]]
        warm_up = self._plan.requests // 4
        self._load(warm_up)
        before = {service.name: self._when_quiet(service) for service in lasting}
        self._load(self._plan.requests - warm_up)
        for service in self._fleet.services:
            self._when_quiet(service)
        for service in lasting:
            self._compare(service.name, before[service.name], self._when_quiet(service))
        return self.findings

    def _load(self, requests: int) -> None:
        """Send so many requests while a worker is killed now and then."""
        first = next(self._numbers)
        numbers = itertools.chain([first], itertools.islice(self._numbers, requests - 1))
        taking, over = threading.Lock(), threading.Event()
        killer = threading.Thread(target=self._kill_until, args=(over,))
        killer.start()

        def work() -> None:
            with self._fleet.client() as client:
                while True:
                    with taking:
                        number = next(numbers, None)
                    if number is None:
                        return
                    self._send(client, random.Random(f"{self._plan.seed}-{number}"))

        try:
            with ThreadPoolExecutor(CLIENTS) as pool:
                for outcome in [pool.submit(work) for _ in range(CLIENTS)]:
                    outcome.result()
        finally:
            over.set()
            killer.join()

    def _kill_until(self, over: threading.Event) -> None:
        victims = itertools.cycle([self._fleet.decodes[-1], self._fleet.prefills[-1]])
        while not over.wait(self._plan.kill_seconds):
            victim = next(victims)
            self.findings.kills.append(time.monotonic())
            victim.kill()
            victim.start()
            victim.wait_until_serving()

    def _send(self, client: SpectrumClient, chance: random.Random) -> None:
        which, tokens = chance.randrange(len(self._prompts)), chance.randint(1, MOST_TOKENS)
        checked = chance.random() < 0.6
        if checked:
            kv, sampling = KvChoice(policy="native"), Sampling(max_tokens=tokens, ignore_eos=True)
        else:
            kv = KvChoice(budget=chance.choice((0.3, 0.5, 0.8, None)))
            sampling = Sampling(
                max_tokens=tokens,
                ignore_eos=True,
                temperature=chance.choice((0.0, 0.7, 1.2)),
                top_p=chance.choice((0.5, 0.9, 1.0)),
                seed=chance.randrange(1 << 32),
            )
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
        if checked:
            self._check(which, completion.token_ids)

    def _check(self, which: int, token_ids: tuple[int, ...]) -> None:
        with self.findings.lock:
            self.findings.checked += 1
        if list(token_ids) != self._expected[which][: len(token_ids)]:
            gap = worst_gap(self._model, self._prompts[which], token_ids)
            if gap > LOGIT_TIE:
                self._wrong(f"prompt {which}: a token lies {gap} below the best")

    def _ended(self, error: SpectrumKVError, sent_at: float, may_cancel: bool) -> None:
        """Judge an error: only a cancel, a refusal with a delay, and the loss of a worker may be."""
        now = time.monotonic()
        killed = any(sent_at - TOLD_SECONDS <= kill <= now for kill in self.findings.kills)
        if isinstance(error, CancelledError) and may_cancel:
            self._count("cancelled")
        elif isinstance(error, ResourceExhaustedError) and error.retry_after_seconds > 0:
            self._count("refused")
        elif isinstance(error, UnavailableError) and killed:
            self._count("ended by a kill")
        else:
            self._count(error.code)
            self._wrong(f"{error.code}: {error.message}")

    def _when_quiet(self, service: Service) -> Resources:
        try:
            until(lambda: service.held() == NOTHING, 15.0, f"{service.name} holds nothing")
        except AssertionError as error:
            self._wrong(str(error))
        return Resources.of(service)

    def _compare(self, name: str, before: Resources, after: Resources) -> None:
        growth = after.resident_bytes / before.resident_bytes - 1
        self.findings.growth[name] = growth
        if growth > RSS_GROWTH:
            self._wrong(f"{name} grew by {growth:.1%}")
        if after.descriptors > before.descriptors + MORE_DESCRIPTORS:
            self._wrong(f"{name} has {after.descriptors} open files after {before.descriptors}")
        if after.threads > before.threads + MORE_THREADS:
            self._wrong(f"{name} has {after.threads} threads after {before.threads}")

    def _count(self, outcome: str) -> None:
        with self.findings.lock:
            self.findings.outcomes[outcome] += 1

    def _wrong(self, sentence: str) -> None:
        with self.findings.lock:
            self.findings.wrong.append(sentence)


def soak(plan: Plan, directory: Path) -> Findings:
    """Start two workers of each kind and run the plan."""
    with running_fleet(directory, tiny_model("llama"), kv_memory="48MiB") as fleet:
        return Soak(fleet, plan).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--kill-seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    given = parser.parse_args()
    plan = Plan(given.requests, given.kill_seconds, given.seed)
    with tempfile.TemporaryDirectory() as directory:
        findings = soak(plan, Path(directory))
    sys.stdout.write("\n".join([findings.sentence(plan), *findings.wrong]) + "\n")
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
