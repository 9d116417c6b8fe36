"""Which servers are taken for well: one that is slow to say so may be busy, one that refuses is not there."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp")

from aiohttp import web  # noqa: E402

from spectrumkv.common.errors import UnavailableError  # noqa: E402
from spectrumkv.vllm_plugin.proxy import backends  # noqa: E402
from spectrumkv.vllm_plugin.proxy.backends import MOST_UNANSWERED, Backend, BackendGroup  # noqa: E402
from tests.vllm_plugin.proxy.stubs import listening  # noqa: E402


@dataclass
class Health:
    """What a server says of itself: a status, or nothing."""

    status: int | None = 200

    async def answer(self, http: web.Request) -> web.Response:
        if self.status is None:
            await asyncio.Event().wait()
        return web.Response(status=self.status or 0)


async def asked(says: Health, statuses: list[int | None], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a server was taken for well after each of its answers."""
    monkeypatch.setattr(backends, "ANSWER_SECONDS", 0.2)
    app = web.Application()
    app.add_routes([web.get("/health", says.answer)])
    found = []
    async with AsyncExitStack() as stack:
        group = BackendGroup("decode", (await stack.enter_async_context(listening(app)),))
        session: Any = await stack.enter_async_context(aiohttp.ClientSession())
        for says.status in statuses:
            await group.ask(session)
            found.append(group.healthy == 1)
    return found


def test_a_server_that_is_slow_to_answer_is_well_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = [200, None, None, 200, *[None] * MOST_UNANSWERED, 200, 503]
    found = asyncio.run(asked(Health(), statuses, monkeypatch))
    assert found == [True, True, True, True, True, True, False, True, False]


def test_a_server_that_refuses_or_was_ill_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asyncio.run(asked(Health(), [503, None, 200], monkeypatch)) == [False, False, True]

    async def nobody() -> None:
        group = BackendGroup("decode", ("http://127.0.0.1:1",))
        async with aiohttp.ClientSession() as session:
            await group.ask(session)
        with pytest.raises(UnavailableError, match="no decode server answers"), group.chosen():
            pass

    asyncio.run(nobody())
    assert Backend("http://a").healthy
