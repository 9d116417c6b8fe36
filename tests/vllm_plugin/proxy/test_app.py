"""The proxy over HTTP, with stand-ins for vLLM servers that answer as vLLM does."""

import asyncio
import json
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp")

from tests.vllm_plugin.proxy.stubs import TRANSFER, Stub, post, serve  # noqa: E402


def test_the_first_token_is_prefills_and_the_others_decodes() -> None:
    prefill, decode = Stub(), Stub()

    async def check(session: Any, url: str) -> None:
        status, answer = await post(session, url)
        assert (status, answer["choices"][0]["text"]) == (200, " one two three")
        assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}

    serve([prefill], [decode], check)
    assert decode.asked[0]["prompt"] == [1, 2, 7]
    assert (decode.asked[0]["max_tokens"], decode.asked[0]["kv_transfer_params"]) == (2, TRANSFER)
    assert prefill.asked[0]["max_tokens"] == 1


def test_a_stream_is_one_stream() -> None:
    async def check(session: Any, url: str) -> None:
        asked = {"model": "m", "prompt": "Count:", "max_tokens": 3, "stream": True}
        async with session.post(f"{url}/v1/completions", json=asked) as answer:
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        chunks = await streamed(session, url)
        assert [one["choices"][0]["text"] for one in chunks] == [" one", " two", " three"]
        assert {one["id"] for one in chunks} == {"x"}

    serve([Stub()], [Stub()], check)


async def streamed(session: Any, url: str) -> list[Any]:
    """Return the events of a streamed answer but `[DONE]`."""
    asked = {"model": "m", "prompt": "Count:", "max_tokens": 3, "stream": True}
    async with session.post(f"{url}/v1/completions", json=asked) as answer:
        lines = (await answer.read()).split(b"\n")
    return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]


def test_a_stream_that_breaks_off_ends_with_an_error_and_repeats_no_token() -> None:
    decode = Stub(breaks=True)

    async def check(session: Any, url: str) -> None:
        *chunks, last = await streamed(session, url)
        assert [one["choices"][0]["text"] for one in chunks] == [" one", " two"]
        assert last["error"]["code"] == 502
        async with session.get(f"{url}/metrics") as answer:
            assert 'spectrumkv_proxy_requests_total{outcome="status_502"} 1.0' in await answer.text()

    serve([Stub()], [decode], check)
    assert len(decode.asked) == 1


@pytest.mark.parametrize("reports", [1, 2])
def test_a_stream_that_begins_with_an_error_is_asked_for_once_more_without_kv(reports: int) -> None:
    decode = Stub(reports=reports)

    async def check(session: Any, url: str) -> None:
        chunks = await streamed(session, url)
        texts = [one["choices"][0]["text"] for one in chunks if "choices" in one]
        assert texts == ([" one", " two", " three"] if reports == 1 else [" one"])
        assert [one["error"] for one in chunks if "error" in one] == [{"message": "no KV", "code": 500}] * (
            reports - 1
        )

    serve([Stub()], [decode], check)
    assert ["kv_transfer_params" in one for one in decode.asked] == [True, False]


def test_decode_computes_the_prompt_where_its_kv_did_not_come() -> None:
    decode = Stub(fails=1)

    async def check(session: Any, url: str) -> None:
        assert (await post(session, url))[1]["choices"][0]["text"] == " one two three"
        async with session.get(f"{url}/metrics") as answer:
            assert 'spectrumkv_proxy_retries_total{stage="decode"} 1.0' in await answer.text()

    serve([Stub()], [decode], check)
    assert ["kv_transfer_params" in one for one in decode.asked] == [True, False]


def test_another_prefill_server_takes_over() -> None:
    broken, well = Stub(fails=9), Stub()

    async def check(session: Any, url: str) -> None:
        assert (await post(session, url))[0] == 200

    serve([broken, well], [Stub()], check)
    assert len(well.asked) == 1


def test_a_server_that_closes_connections_as_requests_come_fails_none() -> None:
    async def check(session: Any, url: str) -> None:
        assert [(await post(session, url))[0] for _ in range(4)] == [200] * 4

    serve([Stub(keeps=False)], [Stub(keeps=False)], check)


def test_a_refusal_reaches_the_client_as_it_is() -> None:
    async def check(session: Any, url: str) -> None:
        assert await post(session, url, model="unknown") == (404, {"error": {"message": "no such model"}})
        status, answer = await post(session, url, prompt=["a", "b"])
        assert (status, "one prompt" in answer["error"]["message"]) == (400, True)

    serve([Stub()], [Stub()], check)


def test_a_client_that_leaves_ends_decodes_request() -> None:
    decode = Stub(hangs=True)

    async def check(session: Any, url: str) -> None:
        asked = {"model": "m", "prompt": "Count:", "max_tokens": 3, "stream": True}
        async with session.post(f"{url}/v1/completions", json=asked) as answer:
            assert await answer.content.readline()
            while not decode.asked:
                await asyncio.sleep(0.01)
            answer.close()
        await decode.left.wait()

    serve([Stub()], [decode], check)


def test_a_client_that_leaves_is_not_taken_for_a_decode_server_that_fails() -> None:
    decode = Stub(floods=True)
    asked = {"model": "m", "prompt": "Count:", "max_tokens": 3}

    async def check(session: aiohttp.ClientSession, url: str) -> None:
        async with session.post(f"{url}/v1/completions", json=asked | {"stream": True}) as answer:
            await answer.content.readline()
            answer.close()
        await decode.left.wait()
        decode.floods = False
        async with session.post(f"{url}/v1/completions", json=asked) as answer:
            assert answer.status == 200
        # None was asked to compute the prompt.
        assert ["kv_transfer_params" in body for body in decode.asked] == [True, True]
        async with session.get(f"{url}/metrics") as answer:
            assert 'spectrumkv_proxy_requests_total{outcome="cancelled"} 1.0' in await answer.text()

    serve([Stub()], [decode], check, cancels=False)


def test_health_tells_which_servers_answer() -> None:
    async def check(session: Any, url: str) -> None:
        async with session.get(f"{url}/health") as answer:
            assert (answer.status, await answer.json()) == (200, {"prefill": 1, "decode": 1})

    serve([Stub()], [Stub()], check)
