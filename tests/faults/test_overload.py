"""More requests than fit: refused at once with a delay, no deadlock, and as much done as at the best load."""

import contextlib
import itertools
import queue
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import RunningPair, running_pair
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.errors import ResourceExhaustedError
from spectrumkv.decode_server.service import DecodeService
from tests.faults.report import tell
from tests.services.pair import decode_server, failing_steps, prefill_server, slowed_steps, total
from tests.services.pair import running_pair as pair_in_process
from tests.tiny_models import tiny_model
from tests.waiting import until

SHORT_PROMPT, LONG_PROMPT, COMPLETION = 48, 1500, 48
MEASURE_SECONDS = 5.0
ROUNDS = 5
CONCURRENCIES = (2, 4, 8, 16)
SATURATION = 3
GOODPUT_SHARE = 0.9


@dataclass(frozen=True)
class Outcome:
    """How one request ended.

    Attributes:
        prompt_tokens: its length.
        seconds: from sending to the end.
        retry_after: seconds after which a refused one was told to come back; None for one that was served.
    """

    prompt_tokens: int
    seconds: float
    retry_after: float | None

    @property
    def refused(self) -> bool:
        return self.retry_after is not None


def ask(client: SpectrumClient, prompt_tokens: int = SHORT_PROMPT) -> Outcome:
    """Send one request. Anything but a whole answer or a refusal with a delay is an error."""
    started = time.monotonic()
    prompt = TokenIds(tuple(range(50, 50 + prompt_tokens)))
    try:
        sampling = Sampling(max_tokens=COMPLETION, ignore_eos=True)
        completion = client.generate(prompt, sampling=sampling, timeout=60).result()
    except ResourceExhaustedError as refusal:
        return Outcome(prompt_tokens, time.monotonic() - started, refusal.retry_after_seconds)
    assert len(completion.tokens) == COMPLETION
    return Outcome(prompt_tokens, time.monotonic() - started, None)


@pytest.fixture(scope="module")
def small_pair() -> Iterator[RunningPair]:
    """Processes with room for a few requests, so that both bounds are met: places on prefill, slots on decode."""
    # 3 KiB a slot: a dozen requests of 96 tokens, one long one.
    options = {
        "model": str(tiny_model("llama")),
        "int4": "on",
        "kv_memory": "6MiB",
        "max_waiting": "16",
        **FREE_PORTS,
    }
    with running_pair(options) as pair:
        yield pair


def closed_loop(address: str, concurrency: int, seconds: float) -> float:
    """Goodput, in requests a second, with `concurrency` clients that ask again as soon as they have an answer."""
    until = time.monotonic() + seconds

    def work() -> int:
        done = 0
        with SpectrumClient(address) as client:
            while time.monotonic() < until:
                done += not ask(client).refused
        return done

    with ThreadPoolExecutor(concurrency) as pool:
        return sum(one.result() for one in [pool.submit(work) for _ in range(concurrency)]) / seconds


def open_loop(address: str, rate: float, seconds: float, prompts: tuple[int, ...]) -> list[Outcome]:
    """Send `rate` requests a second whatever becomes of them."""
    with SpectrumClient(address) as client, ThreadPoolExecutor(64) as pool:
        started, pending = time.monotonic(), []
        for number in range(int(rate * seconds)):
            # Arrivals by the clock are what an open loop is.
            time.sleep(max(0.0, started + number / rate - time.monotonic()))
            pending.append(pool.submit(ask, client, prompts[number % len(prompts)]))
        return [one.result() for one in pending]


@pytest.mark.slow
def test_goodput_at_three_times_saturation(small_pair: RunningPair, capsys: pytest.CaptureFixture[str]) -> None:
    closed_loop(small_pair.address, 2, 2.0)
    rates = {
        concurrency: closed_loop(small_pair.address, concurrency, MEASURE_SECONDS) for concurrency in CONCURRENCIES
    }
    best = max(rates, key=lambda concurrency: rates[concurrency])
    peaks, goodputs, outcomes = [], [], []
    # In turns, so that whatever else the machine does bears on both alike.
    for _ in range(ROUNDS):
        peaks.append(closed_loop(small_pair.address, best, MEASURE_SECONDS))
        outcomes += (
            round_of := open_loop(small_pair.address, SATURATION * rates[best], MEASURE_SECONDS, (SHORT_PROMPT,))
        )
        goodputs.append(sum(not one.refused for one in round_of) / MEASURE_SECONDS)
    peak, goodput = statistics.median(peaks), statistics.median(goodputs)
    # Each round's goodput over the peak just before it: the pace of the machine cancels.
    share = statistics.median(goodput / peak for goodput, peak in zip(goodputs, peaks, strict=True))
    refused = [one.seconds for one in outcomes if one.refused]
    tell(
        capsys,
        f"peak {peak:.1f} requests/s; at {SATURATION} times that {goodput:.1f}/s done ({share:.2f} of it), "
        f"{len(refused)} refused, half of them within {statistics.median(refused) * 1e3:.0f} ms",
    )
    assert refused
    assert all(one.retry_after > 0 for one in outcomes if one.retry_after is not None)
    assert share >= GOODPUT_SHARE
    with SpectrumClient(small_pair.address) as client:
        assert client.is_serving()
        assert not ask(client).refused


@pytest.mark.slow
def test_short_and_long_prompts_side_by_side(small_pair: RunningPair, capsys: pytest.CaptureFixture[str]) -> None:
    """A report: who is refused how often, and who waits how long, when every third prompt is long."""
    closed_loop(small_pair.address, 2, 2.0)
    rate = closed_loop(small_pair.address, 4, MEASURE_SECONDS)
    outcomes = open_loop(small_pair.address, rate, MEASURE_SECONDS, (SHORT_PROMPT, SHORT_PROMPT, LONG_PROMPT))
    for name, length in (("short", SHORT_PROMPT), ("long", LONG_PROMPT)):
        mine = [one for one in outcomes if one.prompt_tokens == length]
        done = [one.seconds for one in mine if not one.refused]
        assert done, f"no {name} prompt was served"
        tell(
            capsys,
            f"{name} prompts ({length} tokens): {len(done)} of {len(mine)} served, "
            f"median {statistics.median(done) * 1e3:.0f} ms",
        )


def test_a_crowd_is_served_or_told_when_to_come_back() -> None:
    """Forty at once where six fit: nobody hangs, the bounds hold, and afterwards all is free."""
    options = {"kv_memory": str(6 * (SHORT_PROMPT + COMPLETION) * 3072), "max_running": "2"}
    model: Path = tiny_model("llama")
    with pair_in_process(model, decode=options, prefill={"max_waiting": "8"}) as pair, pair.client() as client:
        outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        start = threading.Barrier(40)

        def come() -> None:
            start.wait()
            outcomes.put(ask(client))

        crowd = [threading.Thread(target=come) for _ in range(40)]
        for one in crowd:
            one.start()
        for one in crowd:
            one.join(60)
        results = [outcomes.get_nowait() for _ in crowd]
        served = sum(not one.refused for one in results)
        assert 2 <= served < 40
        assert all(one.retry_after > 0 for one in results if one.retry_after is not None)
        assert total(pair.prefill_metrics, "requests_waiting") == 0
        assert not ask(client).refused
        assert total(pair.decode_metrics, "kv_bytes_resident") == 0


SERVED_PROMPTS = [TokenIds(tuple(range(start, start + SHORT_PROMPT))) for start in range(50, 130, 10)]
SHORT_ANSWER = Sampling(max_tokens=24, ignore_eos=True, temperature=0.0)
CLIENTS, SLOW_CLIENTS = 10, 1
# What a slow reader does between two tokens.
PAUSE_SECONDS = 0.05
FAILING_SHARE, SLOW_SHARE = 0.7, 0.7


@contextlib.contextmanager
def four_workers() -> Iterator[tuple[list[DecodeService], str]]:
    """Prefill in front of four decode workers, as sockets of this process."""
    model = tiny_model("llama")
    with contextlib.ExitStack() as running:
        workers = [running.enter_context(decode_server(model, kv_memory="6MiB")) for _ in range(4)]
        ports = [port for _, _, port in workers]
        _, metrics, port = running.enter_context(prefill_server(model, ports))
        until(lambda: total(metrics, "decode_worker_accepting") == len(workers))
        yield [service for service, _, _ in workers], f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def healthy() -> Iterator[str]:
    """The address of a fleet that nobody harms, to measure others by."""
    with four_workers() as (_, address):
        yield address


def answers_in(address: str, seconds: float, slow_clients: int) -> list[tuple[int, tuple[int, ...]]]:
    """Have `CLIENTS` ask one request after another; return which prompt each answer was to, and its tokens."""
    end = time.monotonic() + seconds

    def work(number: int) -> list[tuple[int, tuple[int, ...]]]:
        found = []
        with SpectrumClient(address) as client:
            for turn in itertools.count(number):
                if time.monotonic() >= end:
                    return found
                which = turn % len(SERVED_PROMPTS)
                tokens = []
                kv = KvChoice(policy="fp16")
                for token in client.generate(SERVED_PROMPTS[which], sampling=SHORT_ANSWER, kv=kv, timeout=60):
                    tokens.append(token.token_id)
                    if number < slow_clients:
                        time.sleep(PAUSE_SECONDS)
                found.append((which, tuple(tokens)))
        return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        return [one for answers in pool.map(work, range(CLIENTS)) for one in answers]


@pytest.mark.slow
def test_a_failing_worker_of_four_and_slow_readers_cost_little(
    healthy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Goodput is that of the healthy fleet but for a share, and every answer is right: no client sees an error."""
    with four_workers() as (workers, harmed), contextlib.ExitStack() as failing:
        with SpectrumClient(healthy) as client:
            kv = KvChoice(policy="fp16")
            expected = [client.generate(one, sampling=SHORT_ANSWER, kv=kv).result() for one in SERVED_PROMPTS]
        right = {(which, tuple(answer.token_ids)) for which, answer in enumerate(expected)}
        failing.enter_context(failing_steps(workers[0], RuntimeError("CUDA error: an illegal memory access")))
        rates: dict[str, list[float]] = {healthy: [], harmed: []}
        # In turns, so that whatever else the machine does bears on both alike.
        for _ in range(ROUNDS):
            for address, slow_clients in ((healthy, 0), (harmed, SLOW_CLIENTS)):
                answers = answers_in(address, MEASURE_SECONDS, slow_clients)
                assert set(answers) <= right
                rates[address].append(len(answers) / MEASURE_SECONDS)
    peak, goodput = (statistics.median(rates[address]) for address in (healthy, harmed))
    tell(capsys, f"healthy {peak:.1f} requests/s; one of four workers failing and slow readers {goodput:.1f}/s")
    assert goodput >= FAILING_SHARE * peak


@pytest.mark.slow
def test_a_slow_worker_of_four_costs_little(healthy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One whose steps take ten times as long: requests go to the other three, though it has the most free slots."""
    with four_workers() as (workers, harmed), slowed_steps(workers[0], 10.0):
        rates: dict[str, list[float]] = {healthy: [], harmed: []}
        # In turns, so that whatever else the machine does bears on both alike.
        for _ in range(ROUNDS):
            for address, found in rates.items():
                found.append(len(answers_in(address, MEASURE_SECONDS, slow_clients=0)) / MEASURE_SECONDS)
    peak, goodput = (statistics.median(found) for found in rates.values())
    share = statistics.median(mine / theirs for theirs, mine in zip(*rates.values(), strict=True))
    tell(capsys, f"healthy {peak:.1f} requests/s; one of four workers ten times slower {goodput:.1f}/s ({share:.2f})")
    assert share >= SLOW_SHARE
