"""Run inside the prefill namespace: send one prompt after another, and record tokens and bytes on the link.

`main` reads an `Errand` as JSON from standard input and writes a list of `Observed` as JSON to standard output.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from spectrumkv.bench.link.network import LINK
from spectrumkv.bench.report.results import describe_served_model
from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.errors import InternalError
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.service.process import exit_on_error

SAMPLE_SECONDS = 0.005
STAGE_METRIC = "spectrumkv_request_duration_seconds"
SCRAPE_SECONDS = 10.0
# Only the two services can reach these namespaces, and no proxy that the environment names can.
SECURITY = ChannelSecurity(allow_plaintext=True, allow_proxy=False)
DIRECT = build_opener(ProxyHandler({}))


@dataclass(frozen=True)
class Setting:
    """Name a way to send KV.

    Attributes:
        name: its name in rows and plots.
        policy: the policy of the request.
        budget: the budget of the request; None is the policy's own.
        scope: "model" sends nothing before the last layer has run.
    """

    name: str
    policy: str
    budget: float | None
    scope: str

    def choice(self) -> KvChoice:
        """Return the KV choice of a request."""
        return KvChoice(policy=self.policy, budget=self.budget, scope=self.scope)


@dataclass(frozen=True)
class Errand:
    """Say what to send.

    Attributes:
        server: the prefill service, "host:port".
        decode: the decode service, "host:port".
        metrics: prefill's address for Prometheus, "host:port".
        ready_seconds: seconds until both services must be ready.
        settings: sent in turn, in every round.
        rounds: rounds that count; one more warms up.
        prompt_tokens: length of the prompt.
        output_tokens: tokens to generate.
        seed: seed of the random prompt.
    """

    server: str
    decode: str
    metrics: str
    ready_seconds: float
    settings: tuple[Setting, ...]
    rounds: int
    prompt_tokens: int
    output_tokens: int
    seed: int

    def to_json(self) -> str:
        """Return the errand as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Errand":
        """Return the errand that a JSON text describes."""
        content = json.loads(text)
        return cls(**content | {"settings": tuple(Setting(**one) for one in content["settings"])})


@dataclass(frozen=True)
class Observed:
    """Record one request. Times are in seconds after the request was sent.

    Attributes:
        setting: name of its setting.
        round: its round, from 0.
        arrivals: arrival times of its tokens.
        ended: when its answer ended.
        stages: seconds spent in "queue", "prefill", "encode" and "transfer", from prefill's metrics.
        wire: pairs of a time and the bytes that had left through the link by then.
        kv_bytes_sent: serialized bytes sent to decode.
        budget_counted: these bytes relative to FP16.
        codec: the codec; prefill may choose it by the link's bandwidth.
    """

    setting: str
    round: int
    arrivals: tuple[float, ...]
    ended: float
    stages: dict[str, float]
    wire: tuple[tuple[float, int], ...]
    kv_bytes_sent: int
    budget_counted: float
    codec: str


def main() -> None:
    """Do the errand on standard input, and write what was observed to standard output."""
    exit_on_error(lambda: _do(Errand.from_json(sys.stdin.read())))


def _do(errand: Errand) -> None:
    with SpectrumClient(errand.decode, SECURITY) as decode, SpectrumClient(errand.server) as prefill:
        for client in (decode, prefill):
            client.wait_until_serving(errand.ready_seconds)
        info: Any = prefill.server_info()
        observed = list(_observe(prefill, errand, _prompt(errand, info.model.vocab_size)))
    json.dump({"model": describe_served_model(info), "observed": [asdict(one) for one in observed]}, sys.stdout)


def _prompt(errand: Errand, vocab_size: int) -> TokenIds:
    drawn = np.random.default_rng(errand.seed).integers(0, vocab_size, errand.prompt_tokens)
    return TokenIds(tuple(drawn.tolist()))


def _observe(client: SpectrumClient, errand: Errand, prompt: TokenIds) -> Iterator[Observed]:
    sampling = Sampling(max_tokens=errand.output_tokens, temperature=0.0, ignore_eos=True)
    # The first request warms up; its setting does not matter.
    client.generate(prompt, sampling=sampling, kv=errand.settings[-1].choice()).result()
    for number in range(errand.rounds):
        for setting in errand.settings:
            before = _stage_seconds(errand.metrics)
            with _sampled_wire() as wire:
                sent = time.perf_counter()
                completion = client.generate(prompt, sampling=sampling, kv=setting.choice()).result()
            after = _stage_seconds(errand.metrics)
            yield Observed(
                setting=setting.name,
                round=number,
                arrivals=tuple(token.arrived_seconds for token in completion.tokens),
                ended=completion.finished.arrived_seconds,
                stages={stage: after[stage] - before.get(stage, 0.0) for stage in after},
                wire=_changes(wire, sent),
                kv_bytes_sent=completion.usage.kv_bytes_sent,
                budget_counted=completion.usage.budget_counted,
                codec=completion.usage.codec,
            )


def _stage_seconds(metrics: str) -> dict[str, float]:
    """Return the seconds that all requests so far spent in each stage of prefill."""
    with DIRECT.open(f"http://{metrics}/metrics", timeout=SCRAPE_SECONDS) as response:
        text = response.read().decode()
    return {
        sample.labels["stage"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"{STAGE_METRIC}_sum"
    }


@contextmanager
def _sampled_wire() -> Iterator[list[tuple[float, int]]]:
    """Yield a growing list of samples of `time.perf_counter` and of the bytes sent through the link."""
    samples = [(time.perf_counter(), link_bytes_sent())]
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_SECONDS):
            samples.append((time.perf_counter(), link_bytes_sent()))

    thread = threading.Thread(target=sample, name="wire", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def link_bytes_sent() -> int:
    """Return the bytes that left through the link in this process's namespace; see proc_net(5).

    Raises:
        InternalError: the namespace has no link of that name.
    """
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == LINK:
            return int(counters.split()[8])
    raise InternalError(f"there is no {LINK} in this network namespace")


def _changes(samples: Sequence[tuple[float, int]], sent: float) -> tuple[tuple[float, int], ...]:
    """Return times after the request was sent and bytes since the first sample, without samples amid equal ones."""
    first = samples[0][1]
    neighbours = zip(samples[:-2], samples[1:-1], samples[2:], strict=True)
    return tuple(
        (moment - sent, counter - first)
        for (_, previous), (moment, counter), (_, following) in neighbours
        if previous != counter or counter != following
    )


if __name__ == "__main__":
    main()
