"""Long prompts in chunks get what they get in one pass, and let others go between."""

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError as BaseCancelledError
from concurrent.futures import Future

import pytest
import torch

from spectrumkv.common.errors import CancelledError, InvalidArgumentError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.model.load import load_model
from spectrumkv.prefill_server.engine.chunked_prefill import chunk_bounds
from spectrumkv.prefill_server.engine.engine import PrefillEngine
from spectrumkv.prefill_server.engine.prompt_queue import PromptResult
from tests.tiny_models import ARCHITECTURES, tiny_model

WINDOW = 8
CHUNK = 20
SIDES = ("queries", "keys", "values")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def engines(request: pytest.FixtureRequest) -> Iterator[tuple[PrefillEngine, PrefillEngine]]:
    """One that runs prompts in chunks, and one that does not."""
    first, second = (load_model(str(tiny_model(request.param)), "cpu") for _ in range(2))
    with PrefillEngine(first, WINDOW, CHUNK) as chunked, PrefillEngine(second, WINDOW, None) as whole:
        yield chunked, whole


@pytest.fixture
def llama() -> Iterator[PrefillEngine]:
    with PrefillEngine(load_model(str(tiny_model("llama")), "cpu"), WINDOW, CHUNK) as engine:
        yield engine


def prompt(tokens: int) -> list[int]:
    return torch.randint(10, 40000, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("tokens", "bounds"),
    [(1, [0, 1]), (39, [0, 39]), (40, [0, 20, 40]), (99, [0, 24, 49, 74, 99]), (100, [0, 20, 40, 60, 80, 100])],
)
def test_chunks_are_even_and_never_short(tokens: int, bounds: list[int]) -> None:
    assert chunk_bounds(tokens, CHUNK) == bounds


@pytest.mark.parametrize("tokens", [40, 99])
def test_chunks_show_with_the_last_one_what_one_pass_shows(
    engines: tuple[PrefillEngine, PrefillEngine], tokens: int
) -> None:
    shown: list[list[LayerCapture]] = [[], []]
    results = [
        engine.submit(prompt(tokens), mine.append).result() for engine, mine in zip(engines, shown, strict=True)
    ]
    assert_close(results[0].logits, results[1].logits)
    assert [one.layer for one in shown[0]] == [one.layer for one in shown[1]]
    for actual, expected in zip(*shown, strict=True):
        assert actual.first == 0
        for side in SIDES:
            assert_close(getattr(actual, side), getattr(expected, side))


def test_chunks_that_may_leave_are_shown_one_by_one(engines: tuple[PrefillEngine, PrefillEngine]) -> None:
    tokens = 99
    chunks: list[LayerCapture] = []
    whole: list[LayerCapture] = []
    in_chunks = engines[0].submit(prompt(tokens), chunks.append, streams_chunks=True).result()
    assert_close(in_chunks.logits, engines[1].submit(prompt(tokens), whole.append).result().logits)
    layers = len(whole)
    firsts = chunk_bounds(tokens, CHUNK)[:-1]
    assert [(one.first, one.layer) for one in chunks] == [
        (first, layer) for first in firsts for layer in range(layers)
    ]
    for layer, expected in enumerate(whole):
        mine = chunks[layer::layers]
        for side in ("keys", "values"):
            assert_close(torch.cat([getattr(one, side) for one in mine], dim=1), getattr(expected, side))
        assert_close(mine[-1].queries, expected.queries)


def test_a_short_prompt_goes_between_the_chunks_of_a_long_one(llama: PrefillEngine) -> None:
    order: list[tuple[str, int]] = []
    begun, submitted = threading.Event(), threading.Event()

    def long_hook(capture: LayerCapture) -> None:
        begun.set()
        submitted.wait(60)
        if capture.layer == 0:
            order.append(("long", capture.first))

    def short_hook(capture: LayerCapture) -> None:
        if capture.layer == 0:
            order.append(("short", capture.first))

    long: Future[PromptResult] = llama.submit(prompt(60), long_hook, streams_chunks=True)
    assert begun.wait(60)
    short = llama.submit(prompt(5), short_hook)
    submitted.set()
    results = [one.result(60) for one in (long, short)]
    assert order == [("long", 0), ("short", 0), ("long", 20), ("long", 40)]
    assert results[0].compute_seconds > 0
    assert results[0].queue_seconds >= results[1].compute_seconds
    assert llama.waiting == 0


def test_a_prompt_that_nobody_waits_for_ends_with_its_layer(llama: PrefillEngine) -> None:
    layers: list[int] = []
    futures: list[Future[PromptResult]] = []
    submitted = threading.Event()

    def give_up(capture: LayerCapture) -> None:
        submitted.wait(60)
        layers.append(capture.layer)
        futures[0].cancel()

    futures.append(llama.submit(prompt(60), give_up, streams_chunks=True))
    submitted.set()
    # Whatever comes next runs after the pass.
    llama.submit_call(lambda: None).result(60)
    llama.submit_call(lambda: None).result(60)
    assert futures[0].cancelled()
    assert layers == [0]
    assert llama.waiting == 0


def test_what_the_hook_raises_ends_the_prompt(llama: PrefillEngine) -> None:
    def refuse(capture: LayerCapture) -> None:
        raise CancelledError("the stream is over")

    with pytest.raises(CancelledError, match="the stream is over"):
        llama.submit(prompt(60), refuse).result(60)
    assert llama.submit(prompt(60), lambda capture: None).result(60).logits.isfinite().all()


class Hook:
    """Sees the first layer of a chunk, and ends its prompt there in one way or another."""

    def __init__(self, ending: str) -> None:
        self.ending = ending
        self.outcome: Future[PromptResult] | None = None
        self.submitted = threading.Event()

    def __call__(self, capture: LayerCapture) -> None:
        self.submitted.wait(30)
        assert self.outcome is not None
        if self.ending == "the client leaves":
            self.outcome.cancel()
        elif capture.layer == 1:
            raise InvalidArgumentError("an element is infinite")


@pytest.mark.parametrize("tokens", [CHUNK, 5 * CHUNK])
@pytest.mark.parametrize("ending", ["the client leaves", "the hook fails", "it is computed"])
def test_what_ended_is_not_left_to_the_garbage_collector(llama: PrefillEngine, ending: str, tokens: int) -> None:
    """A cache is as large as gigabytes, and a service that has nothing to do collects nothing."""
    hook = Hook(ending)
    left = weakref.ref(hook)
    gc.collect()
    gc.disable()
    try:
        if ending == "it is computed":
            llama.submit(prompt(tokens), lambda _, hook=hook: None, streams_chunks=True).result()
        else:
            hook.outcome = llama.submit(prompt(tokens), hook, streams_chunks=True)
            hook.submitted.set()
            with contextlib.suppress(BaseCancelledError, InvalidArgumentError):
                hook.outcome.result(timeout=60)
            hook.outcome = None
        del hook
        llama.submit_call(lambda: None).result()
        assert left() is None
    finally:
        gc.enable()
