"""The proxy over a vLLM server that prefills and our own decode service."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from spectrumkv.common.kv.geometry import HeadRange
from tests.services.pair import Pair, wait_until_nothing_is_held
from tests.vllm_plugin.proxy.handed_out import PROMPT, TOKENS, given_up, handed_out, own
from tests.vllm_plugin.proxy.stubs import Stub, post, serve

ASKED = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


@contextmanager
def prefilled(pair: Pair, policy: str = "native", budget: float = 1.0) -> Iterator[Stub]:
    """A stand-in for the server that prefilled, with a real connector."""
    with handed_out(pair.prefill, policy, budget, HeadRange(0, pair.prefill.geometry.kv_heads)) as (port, first):
        where = {"remote_host": "127.0.0.1", "remote_port": port, "remote_ranks": 1, "transfer_id": "t"}
        transfer = where | {"do_remote_prefill": True, "remote_num_tokens": len(PROMPT)}
        yield Stub(transfer=transfer, prompt=PROMPT, first=first)


def address(pair: Pair) -> str:
    return f"127.0.0.1:{pair.decode_port}"


@pytest.mark.parametrize(("policy", "budget"), [("native", 1.0), ("spectral", 0.5)])
def test_the_answer_goes_on_as_our_own_services_do(pair: Pair, policy: str, budget: float) -> None:
    expected = "".join(one.text for one in own(pair, policy, budget)[1:])

    async def check(session: Any, url: str) -> None:
        status, answer = await post(session, url, **ASKED)
        assert (status, answer["choices"][0]["text"]) == (200, " one" + expected)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == TOKENS

    with prefilled(pair, policy, budget) as prefill:
        serve([prefill], [], check, services=[address(pair)])


def test_tokens_are_streamed(pair: Pair) -> None:
    expected = "".join(one.text for one in own(pair, "native", 1.0)[1:])

    async def check(session: Any, url: str) -> None:
        asked = ASKED | {"model": "m", "prompt": "Count:", "stream": True, "stream_options": {"include_usage": True}}
        async with session.post(f"{url}/v1/completions", json=asked) as answer:
            lines = (await answer.read()).split(b"\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        assert "".join(choice["text"] for one in chunks for choice in one["choices"]) == " one" + expected
        assert chunks[-1]["usage"]["completion_tokens"] == TOKENS
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        assert b"data: [DONE]" in lines

    with prefilled(pair) as prefill:
        serve([prefill], [], check, services=[address(pair)])


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ({"stop": ["."]}, "this request's first token is not prefill's"),
        ({"logprobs": 2}, "logprobs is 2; a decode service allows None"),
        ({"temperature": 1000}, "temperature"),
        ({"made_up": 1}, "made_up is 1; a decode service does not take made_up; leave it out"),
    ],
)
def test_what_a_decode_service_cannot_do_is_refused_in_a_sentence(
    pair: Pair, field: dict[str, Any], sentence: str
) -> None:
    async def check(session: Any, url: str) -> None:
        status, answer = await post(session, url, **(ASKED | field))
        assert (status, sentence in answer["error"]["message"]) == (400, True), answer

    with prefilled(pair) as prefill:
        serve([prefill], [], check, services=[address(pair)])
        given_up(prefill.transfer["remote_port"])


def test_kv_that_is_gone_is_refused_once_and_not_computed(pair: Pair) -> None:
    async def check(session: Any, url: str) -> None:
        assert (await post(session, url, **ASKED))[0] == 200
        status, answer = await post(session, url, **ASKED)
        assert (status, "transfer" in answer["error"]["message"]) == (404, True)
        async with session.get(f"{url}/metrics") as metrics:
            assert 'retries_total{stage="decode"}' not in await metrics.text()

    with prefilled(pair) as prefill:
        serve([prefill], [], check, services=[address(pair)])


def test_prefill_with_several_ranks_is_refused(pair: Pair) -> None:
    async def check(session: Any, url: str) -> None:
        prefill.transfer = prefill.transfer | {"remote_ranks": 2}
        status, answer = await post(session, url, **ASKED)
        assert (status, "without tensor parallelism" in answer["error"]["message"]) == (400, True)

    with prefilled(pair) as prefill:
        serve([prefill], [], check, services=[address(pair)])
        given_up(prefill.transfer["remote_port"])


def test_a_client_that_leaves_ends_the_decode_stream(pair: Pair) -> None:
    async def check(session: Any, url: str) -> None:
        asked = {"model": "m", "prompt": "Count:", "stream": True} | ASKED | {"max_tokens": 300}
        async with session.post(f"{url}/v1/completions", json=asked) as answer:
            for _ in range(6):
                assert await answer.content.readline()
            answer.close()
        await asyncio.to_thread(wait_until_nothing_is_held, pair.decode_metrics, seconds=30)

    with prefilled(pair) as prefill:
        serve([prefill], [], check, services=[address(pair)])


def test_health_is_that_of_the_decode_services(pair: Pair) -> None:
    async def check(session: Any, url: str) -> None:
        async with session.get(f"{url}/health") as answer:
            assert (answer.status, await answer.json()) == (200, {"prefill": 1, "decode": 1})
        async with session.get(f"{url}/v1/models") as answer:
            assert (await answer.json())["data"][0]["object"] == "model"

    serve([Stub()], [], check, services=[address(pair)])


def test_a_decode_service_that_is_away_is_not_healthy() -> None:
    async def check(session: Any, url: str) -> None:
        while True:
            async with session.get(f"{url}/health") as answer:
                if answer.status == 503:
                    assert await answer.json() == {"prefill": 1, "decode": 0}
                    return
            await asyncio.sleep(0.05)

    serve([Stub()], [], check, services=["127.0.0.1:1"])
