"""The proxy tells decode of KV that prefill still computes, and takes it back where it will not be used."""

import asyncio
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from tests.vllm_plugin.proxy.stubs import ADDRESS, TRANSFER, Stub, post, serve


def test_kv_is_announced_to_the_server_that_decodes_once_prefills_address_is_known() -> None:
    prefill, decode = Stub(transfer=TRANSFER | ADDRESS), [Stub(), Stub()]

    async def check(session: Any, url: str) -> None:
        assert (await post(session, url))[0] == 200
        assert not any(one.announced.is_set() for one in decode)
        prefill.holds = asyncio.Event()
        asking = asyncio.create_task(post(session, url))
        waiting = [asyncio.create_task(one.announced.wait()) for one in decode]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        # Prefill has not answered yet.
        assert not asking.done()
        (chosen,) = [one for one in decode if one.announced.is_set()]
        prefill.holds.set()
        assert (await asking)[1]["choices"][0]["text"] == " one two three"
        for one in waiting:
            one.cancel()
        announcement, request = chosen.asked[-2:]
        assert announcement["kv_transfer_params"] == ADDRESS | {
            "do_remote_prefill": True,
            "prefetch": "begin",
            "transfer_id": prefill.asked[-1]["kv_transfer_params"]["transfer_id"],
        }
        assert (announcement["prompt"], announcement["max_tokens"], announcement["model"]) == ([1], 1, "m")
        assert request["prompt"] == [1, 2, 7]
        assert not chosen.dropped.is_set()

    serve([prefill], decode, check)


@pytest.mark.parametrize("ends", ["prefill breaks off", "the client leaves"])
def test_an_announcement_is_taken_back_where_no_request_follows(ends: str) -> None:
    prefill, decode = Stub(transfer=TRANSFER | ADDRESS), Stub()

    async def check(session: Any, url: str) -> None:
        assert (await post(session, url))[0] == 200
        prefill.holds = asyncio.Event()
        asking = asyncio.create_task(post(session, url))
        await decode.announced.wait()
        if ends == "the client leaves":
            asking.cancel()
        else:
            assert prefill.connections
            for one in prefill.connections:
                one.close()
            assert (await asking)[0] == 502
        await decode.dropped.wait()

    serve([prefill], [decode], check)


def test_a_decode_server_that_refuses_announcements_decodes_all_the_same() -> None:
    prefill, decode = Stub(transfer=TRANSFER | ADDRESS), Stub()

    async def check(session: Any, url: str) -> None:
        assert (await post(session, url))[0] == 200
        prefill.holds = asyncio.Event()
        decode.fails = 1
        asking = asyncio.create_task(post(session, url))
        while decode.fails:
            await asyncio.sleep(0.01)
        prefill.holds.set()
        assert (await asking)[1]["choices"][0]["text"] == " one two three"
        async with session.get(f"{url}/metrics") as answer:
            assert "spectrumkv_proxy_announcements_failed_total 1.0" in await answer.text()

    serve([prefill], [decode], check)


def test_nothing_is_announced_where_several_requests_take_the_kv() -> None:
    prefill, decode = Stub(transfer=TRANSFER | ADDRESS), Stub()

    async def check(session: Any, url: str) -> None:
        for _ in range(2):
            await post(session, url, n=2)
            await post(session, url, max_tokens=1)
        assert not decode.announced.is_set()

    serve([prefill], [decode], check)
