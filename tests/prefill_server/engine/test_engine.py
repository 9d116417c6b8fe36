"""Prompts that share a pass get what they get alone."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import torch

from spectrumkv.common.errors import CancelledError, UnavailableError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.model.load import load_model
from spectrumkv.prefill_server.engine.engine import BATCH_TOKENS, PrefillEngine
from spectrumkv.prefill_server.engine.prompt_queue import PromptResult
from tests.tiny_models import ARCHITECTURES, tiny_model

WINDOW = 8
# Shorter than the window, longer than the sliding windows of the tiny models, and one as long as another.
LENGTHS = (5, 90, 31, 90)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def engine(request: pytest.FixtureRequest) -> Iterator[PrefillEngine]:
    with PrefillEngine(load_model(str(tiny_model(request.param)), "cpu"), WINDOW) as engine:
        yield engine


@pytest.fixture(scope="module")
def llama() -> Iterator[PrefillEngine]:
    with PrefillEngine(load_model(str(tiny_model("llama")), "cpu"), WINDOW) as engine:
        yield engine


def prompts(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, 40000, (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def busy(engine: PrefillEngine) -> Iterator[None]:
    """Keep the engine from its queue for as long as the block runs."""
    begun, free = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        free.wait()

    engine.submit_call(wait)
    # A call that an earlier pass left over would take the first of the prompts to come.
    begun.wait()
    try:
        yield
    finally:
        free.set()


def queued(
    engine: PrefillEngine, token_ids: Sequence[Sequence[int]]
) -> tuple[list[PromptResult], list[list[LayerCapture]]]:
    """Results and layers of prompts that were all waiting before the first one began."""
    layers: list[list[LayerCapture]] = [[] for _ in token_ids]
    with busy(engine):
        futures = [engine.submit(ids, mine.append) for ids, mine in zip(token_ids, layers, strict=True)]
        assert engine.waiting == len(token_ids)
    return [future.result() for future in futures], layers


@pytest.mark.parametrize("lengths", [LENGTHS, (90,)], ids=["together", "alone"])
def test_a_layer_that_waits_keeps_no_more_memory_than_its_own(engine: PrefillEngine, lengths: Sequence[int]) -> None:
    """Neither all queries of the pass, nor the keys and values of its other prompts."""
    _, layers = queued(engine, prompts(lengths))
    for length, mine in zip(lengths, layers, strict=True):
        kept = {
            states.untyped_storage().data_ptr(): states.untyped_storage().nbytes()
            for layer in mine
            for states in (layer.queries, layer.keys, layer.values)
        }
        shown = sum(
            states.numel() * states.element_size()
            for layer in mine
            for states in (layer.queries, layer.keys, layer.values)
        )
        assert sum(kept.values()) == shown
        assert all(layer.keys.shape[1] == length for layer in mine)


def test_prompts_that_share_a_pass_get_what_they_get_alone(engine: PrefillEngine) -> None:
    token_ids = prompts(LENGTHS)
    together, layers = queued(engine, token_ids)
    assert len({result.compute_seconds for result in together}) == 1
    for ids, result, mine in zip(token_ids, together, layers, strict=True):
        alone: list[LayerCapture] = []
        expected = engine.submit(ids, alone.append).result()
        torch.testing.assert_close(result.logits, expected.logits, rtol=1e-3, atol=1e-3)
        assert [one.layer for one in mine] == [one.layer for one in alone]
        for actual, wanted in zip(mine, alone, strict=True):
            for side in ("queries", "keys", "values"):
                torch.testing.assert_close(getattr(actual, side), getattr(wanted, side), rtol=1e-3, atol=1e-3)


def test_passes_are_bounded_and_in_order(llama: PrefillEngine) -> None:
    short = BATCH_TOKENS // 4
    results, _ = queued(llama, prompts([short, short, short, short, short, BATCH_TOKENS + 1, 3]))
    seconds = [result.compute_seconds for result in results]
    # The shortest comes first, and three more fill its pass; two are left, and what is too long to share.
    assert len({seconds[6], *seconds[:3]}) == 1
    assert len(set(seconds[3:5])) == 1
    assert len(set(seconds)) == 3
    waited = [result.queue_seconds for result in results]
    assert waited[2] < waited[3] < waited[5]


def test_what_a_hook_raises_ends_its_own_prompt(llama: PrefillEngine) -> None:
    def refuse(capture: LayerCapture) -> None:
        raise UnavailableError("the link is down")

    layers: list[LayerCapture] = []
    with busy(llama):
        lost: Future[PromptResult] = llama.submit(prompts([20])[0], refuse)
        kept = llama.submit(prompts([30])[0], layers.append)
    with pytest.raises(UnavailableError, match="the link is down"):
        lost.result()
    assert kept.result().logits.isfinite().all()
    assert {one.keys.shape[1] for one in layers} == {30}


def test_a_pass_ends_with_its_last_request(llama: PrefillEngine) -> None:
    seen: list[LayerCapture] = []
    futures: list[Future[PromptResult]] = []

    def give_up(capture: LayerCapture) -> None:
        seen.append(capture)
        futures[0].cancel()
        raise CancelledError("gone")

    with busy(llama):
        futures.append(llama.submit(prompts([20])[0], seen.append))
        futures.append(llama.submit(prompts([20])[0], give_up))
    with pytest.raises(CancelledError):
        futures[1].result()
    # Whatever comes next runs after the pass.
    llama.submit_call(lambda: None).result()
    assert [one.layer for one in seen] == [0, 0]


def test_nobody_computes_what_nobody_waits_for(llama: PrefillEngine) -> None:
    layers: list[LayerCapture] = []
    with busy(llama):
        given_up = llama.submit(prompts([20])[0], layers.append)
        given_up.cancel()
        assert llama.waiting == 0
    llama.submit_call(lambda: None).result()
    assert not layers


def test_a_short_prompt_does_not_wait_for_long_ones_that_wait(llama: PrefillEngine) -> None:
    order: list[int] = []

    def hook(capture: LayerCapture) -> None:
        if capture.layer == 0:
            order.append(capture.keys.shape[1])

    busy = threading.Event()
    llama.submit_call(busy.wait)
    futures = [llama.submit([5] * tokens, hook) for tokens in (300, 200, 3)]
    assert llama.waiting == 3
    busy.set()
    for future in futures:
        assert future.result(60).logits.ndim == 1
    assert order == [3, 200, 300]
    assert llama.waiting == 0


@pytest.mark.parametrize("tokens", [30, 100], ids=["in one pass", "in chunks"])
def test_each_layer_is_progress_and_an_idle_engine_has_no_pulse(tokens: int) -> None:
    pulses: list[Mapping[int, int]] = []
    with PrefillEngine(load_model(str(tiny_model("llama")), "cpu"), WINDOW, chunk_tokens=20) as engine:
        (ids,) = prompts([tokens])
        engine.submit(ids, lambda capture: pulses.append(engine.vitals.pulses), streams_chunks=True).result()
        # The engine's next call runs once the pass has been left.
        assert not engine.submit_call(lambda: engine.vitals.pulses).result()
    beats = [beat for one in pulses for beat in one.values()]
    assert len(set(beats)) == len(beats) == len(pulses) >= 3


@pytest.mark.parametrize("method", ["_next_batch", "_run_pass"])
@pytest.mark.parametrize("error", [RuntimeError("injected"), SystemExit("injected")])
def test_an_error_outside_of_a_pass_is_the_engines_end(
    monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException
) -> None:
    """Nobody would tell the prompts, which would wait until their deadlines."""
    engine = PrefillEngine(load_model(str(tiny_model("llama")), "cpu"), WINDOW)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(engine, method, fail)
    try:
        engine.submit([1, 2, 3], lambda capture: None)
    finally:
        engine.stop()
    assert engine.vitals.failure == f"the prefill engine failed: {type(error).__name__}: injected"
