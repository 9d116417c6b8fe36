"""Several decode workers: the one with the most room is asked, and one that is lost before token 2 is replaced."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.completion import Completion
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.errors import FailedPreconditionError, UnavailableError
from spectrumkv.common.telemetry.metrics import Metrics
from tests.faults.link import TOWARDS_CLIENT, TOWARDS_SERVER, Link, link_to
from tests.services.kv.test_lossless import random_prompt
from tests.services.pair import decode_server, prefill_server, sample, total
from tests.waiting import until

# 3 KiB a slot of the tiny llama.
MANY, FEW = "24MiB", "12MiB"
PROMPT = TokenIds(tuple(random_prompt(400)))
SAMPLED = Sampling(max_tokens=24, ignore_eos=True, temperature=1.0, seed=11)


@dataclass(frozen=True)
class Workers:
    """Prefill in front of two decode workers, the larger one behind a link that can break.

    The larger one generates for one request at a time. Another prefill sends to it alone, past the link.
    """

    prefill_port: int
    other_port: int
    prefill_metrics: Metrics
    link: Link
    large: Metrics
    small: Metrics
    small_port: int

    def client(self) -> SpectrumClient:
        return SpectrumClient(f"127.0.0.1:{self.prefill_port}")

    @property
    def large_name(self) -> str:
        return self.link.address

    @property
    def small_name(self) -> str:
        return f"127.0.0.1:{self.small_port}"

    def free(self, worker: str) -> float:
        return sample(self.prefill_metrics, "decode_worker_slots_free", worker=worker)

    def passed_over(self, reason: str) -> float:
        return sample(self.prefill_metrics, "decode_workers_passed_over_total", reason=reason)

    def until_quiet(self) -> None:
        """Wait until nothing is held and prefill knows how much is free."""
        until(lambda: total(self.large, "kv_bytes_resident") == total(self.small, "kv_bytes_resident") == 0)
        until(lambda: self.free(self.large_name) > self.free(self.small_name) > 0)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, tiny_directories: dict[str, Path]) -> Iterator[Workers]:
    model = tiny_directories["llama"]
    with (
        decode_server(model, kv_memory=MANY, max_running="1") as (_, large, large_port),
        decode_server(model, kv_memory=FEW) as (_, small, small_port),
        link_to(large_port) as link,
        prefill_server(model, [large_port]) as (_, _, other_port),
        prefill_server(model, [link.port, small_port], chunk_bytes="4096") as (_, prefill, port),
    ):
        yield Workers(port, other_port, prefill, link, large, small, small_port)


@pytest.fixture
def workers(started: Workers) -> Iterator[Workers]:
    started.until_quiet()
    yield started
    started.link.release()


def ask(workers: Workers, sampling: Sampling = SAMPLED) -> Completion:
    with workers.client() as client:
        return client.generate(PROMPT, sampling=sampling, kv=KvChoice(policy="fp16"), timeout=60).result()


def test_the_worker_with_the_most_room_is_asked(workers: Workers) -> None:
    for _ in range(3):
        assert ask(workers).usage.decode_worker == workers.large_name


def test_what_prefill_reserved_counts_at_once(workers: Workers) -> None:
    """No answer of the worker is needed to know what this process has reserved on it."""
    with contextlib.ExitStack() as running, workers.client() as client:
        for _ in range(3):
            stream = running.enter_context(
                client.generate(TokenIds((1, 2)), sampling=Sampling(max_tokens=1400, ignore_eos=True), timeout=60)
            )
            next(stream)
        assert ask(workers).usage.decode_worker == workers.small_name


def test_what_others_reserved_is_heard_of(workers: Workers) -> None:
    with busy(workers, requests=4):
        until(lambda: workers.free(workers.large_name) < workers.free(workers.small_name))
        assert ask(workers).usage.decode_worker == workers.small_name


@contextlib.contextmanager
def busy(workers: Workers, requests: int) -> Iterator[None]:
    """Requests of another prefill run on the larger worker."""
    with SpectrumClient(f"127.0.0.1:{workers.other_port}") as other, contextlib.ExitStack() as running:
        for _ in range(requests):
            sampling = Sampling(max_tokens=1400, ignore_eos=True)
            next(running.enter_context(other.generate(TokenIds((1, 2)), sampling=sampling, timeout=60)))
        yield


@contextlib.contextmanager
def before_admission(workers: Workers) -> Iterator[Callable[[], None]]:
    workers.link.hold(TOWARDS_CLIENT)
    yield lambda: until(lambda: total(workers.large, "kv_bytes_resident") > 0)


@contextlib.contextmanager
def mid_transfer(workers: Workers) -> Iterator[Callable[[], None]]:
    workers.link.hold(TOWARDS_SERVER, 200_000)
    yield lambda: workers.link.wait_until_held(TOWARDS_SERVER)


@contextlib.contextmanager
def before_joining(workers: Workers) -> Iterator[Callable[[], None]]:
    """All KV has arrived; the one place in the running batch is taken."""
    with busy(workers, requests=1):
        until(lambda: total(workers.large, "requests_running") == 1)
        yield lambda: until(lambda: total(workers.large, "requests_waiting") == 1)


@pytest.mark.parametrize("phase", [before_admission, mid_transfer, before_joining])
def test_a_worker_lost_before_token_2_is_replaced_unseen(
    workers: Workers, phase: Callable[[Workers], contextlib.AbstractContextManager[Callable[[], None]]]
) -> None:
    """The client gets the tokens of a quiet day, each once; the metric tells what happened."""
    expected = ask(workers)
    workers.until_quiet()
    lost, away = workers.passed_over("lost"), workers.passed_over("unavailable")
    with phase(workers) as until_reached, workers.client() as client:
        stream = client.generate(PROMPT, sampling=SAMPLED, kv=KvChoice(policy="fp16"), timeout=60)
        until_reached()
        workers.link.reset()
        completion = stream.result()
    assert completion.token_ids == expected.token_ids
    assert completion.text == expected.text
    assert completion.usage.decode_worker == workers.small_name
    assert completion.usage.recomputed_prompt_tokens == 0
    assert completion.usage.kv_bytes_sent == expected.usage.kv_bytes_sent
    assert workers.passed_over("lost") - lost + workers.passed_over("unavailable") - away == 1


def test_a_worker_lost_after_token_2_is_named(workers: Workers) -> None:
    with workers.client() as client:
        stream = client.generate(TokenIds((1, 2)), sampling=Sampling(max_tokens=1400, ignore_eos=True), timeout=60)
        for _ in range(3):
            next(stream)
        workers.link.reset()
        with pytest.raises(UnavailableError, match=workers.large_name):
            stream.result()


def test_one_token_needs_no_worker_after_it(workers: Workers) -> None:
    """The only token is prefill's own: losing the worker costs nothing."""
    workers.link.hold(TOWARDS_SERVER, 200_000)
    with workers.client() as client:
        stream = client.generate(PROMPT, sampling=Sampling(max_tokens=1), kv=KvChoice(policy="fp16"), timeout=60)
        next(stream)
        workers.link.reset()
        assert len(stream.result().tokens) == 1


def test_a_worker_that_is_still_starting_is_waited_for(workers: Workers, tiny_directories: dict[str, Path]) -> None:
    """It is not asked before: what is sent is counted once, and nobody reads of a worker passed over."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    with (
        link_to(nobody) as link,
        prefill_server(tiny_directories["llama"], [link.port]) as (_, metrics, port),
        SpectrumClient(f"127.0.0.1:{port}") as client,
    ):
        stream = client.generate(PROMPT, sampling=SAMPLED, kv=KvChoice(policy="fp16"), timeout=60)
        until(lambda: total(metrics, "requests_running") == 1)
        assert client.server_info().decode_workers_away == [link.address]
        link.lead_to(workers.small_port)
        usage = stream.result().usage
        assert client.server_info().decode_workers_away == []
    assert total(metrics, "decode_workers_passed_over_total") == 0
    basis = sample(metrics, "kv_bytes_sent_total", tier="basis")
    assert total(metrics, "kv_bytes_sent_total") - basis == usage.kv_bytes_sent


def test_workers_that_do_not_fit_are_each_named(workers: Workers, tiny_directories: dict[str, Path]) -> None:
    large_port = workers.link.port
    with (
        prefill_server(tiny_directories["qwen2"], [large_port, workers.small_port]) as (_, metrics, port),
        SpectrumClient(f"127.0.0.1:{port}") as client,
        pytest.raises(FailedPreconditionError) as caught,
    ):
        client.generate(TokenIds((1, 2)), sampling=Sampling(max_tokens=2)).result()
    assert workers.large_name in caught.value.message
    assert workers.small_name in caught.value.message
    assert sample(metrics, "decode_workers_passed_over_total", reason="unfit") == 2
