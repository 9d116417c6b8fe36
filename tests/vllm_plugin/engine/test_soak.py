"""Many requests at once get the right answers, whoever leaves and whichever server dies, and leave nothing behind."""

import asyncio
import logging
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_plugin.engine.conftest import Server, Servers, free_port, serving, wait_for
from tests.vllm_plugin.engine.soak import (
    Answer,
    Distance,
    Soak,
    Wish,
    exact_predictions,
    places_with_one_past,
    wishes,
)
from tests.vllm_plugin.engine.test_servers import LAST_BITS, prompt

logger = logging.getLogger(__name__)

CLIENTS = 8
SHORT, LONG = 40, 500
# An answer over exact KV has the exact log-probabilities, but for the last bits.
EXACT = Distance(LAST_BITS, LAST_BITS, 1e-4)
# A transfer that nobody fetched is dropped after 20 s.
EMPTY_SECONDS = 60.0
# The long soak has the time to wait for servers on a busy machine.
START_SECONDS = 900.0


@contextmanager
def proxied(folder: Path, prefill: str, decode: str) -> Iterator[str]:
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable, "-m", "spectrumkv.client.cli.main", "vllm-proxy", "--prefill", prefill, "--decode", decode,
        "--listen", url.removeprefix("http://"),
    ]  # fmt: skip
    with (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: is_healthy(url), 60, folder)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def name_of(wish: Wish) -> Any:
    return wish.params.get("policy") or wish.params["budget"]


def failures(answers: list[Answer]) -> list[str]:
    """Log how many requests ended how, and return why some failed."""
    found = [
        f"{len(one.wish.prompt)} tokens, {one.wish.params}: {one.reason}"
        for one in answers
        if one.outcome == "failed"
    ]
    logger.info("%s %s", dict(Counter(one.outcome for one in answers)), found)
    return found


def measured(answers: list[Answer], exact_server: Server) -> list[list[dict[int, float]]]:
    return asyncio.run(exact_predictions(exact_server.url, answers, 4))


def check_answers(answers: list[Answer], asked: int, url: str, exact_server: Server) -> None:
    """Compare native answers with exact ones, and those over coded KV also with answers to the same questions now."""
    assert len(answers) == asked
    answered = [one for one in answers if one.outcome == "answered"]
    native = [one for one in answered if name_of(one.wish) == "native"]
    for one, exact in zip(native, measured(native, exact_server), strict=True):
        assert Distance.of(one, exact).is_at_most(EXACT), (one, Distance.of(one, exact))
    check_coded([one for one in answered if name_of(one.wish) != "native"], url, exact_server)


def check_coded(coded: list[Answer], url: str, exact_server: Server) -> None:
    """Hold each answer over coded KV to be as far from exact as an answer to its question on quiet servers.

    The same bound must tell that the answer is none to the next one's question.
    """
    quiet = asyncio.run(Soak(url, 1).run([replace(one.wish, leaves=None, salt="quiet") for one in coded]))
    assert failures(quiet) == []
    others = [replace(one, wish=other.wish) for one, other in zip(coded, [*coded[1:], coded[0]], strict=True)]
    wrong, passed = [], []
    for one, again, *exact in zip(
        coded, quiet, *(measured(each, exact_server) for each in (coded, quiet, others)), strict=True
    ):
        places = places_with_one_past(one, again)
        mine, now, other = (
            Distance.of(answer, theirs, places) for answer, theirs in zip((one, again, one), exact, strict=True)
        )
        asked = f"{one.wish.params}, {len(one.wish.prompt)} tokens, {places} places alike"
        if not mine.is_at_most(now.doubled()):
            wrong.append((asked, mine, now))
        if other.is_at_most(now.doubled()):
            passed.append((asked, other, now))
    logger.info(
        "of %d answers over coded KV %d are too far from exact, and of as many to other questions %d are not",
        len(coded),
        len(wrong),
        len(passed),
    )
    assert (wrong, passed) == ([], [])


def check_nothing_is_left(prefill: Server, decode: Server, logs: Path | None = None) -> None:
    """Wait until both servers have given all pages back, and the outbox its bytes."""

    def is_empty() -> bool:
        # The outbox is looked through in each step.
        prefill.complete(prompt(8), 1)
        pages = [one.metric("vllm:kv_cache_usage_perc") for one in (prefill, decode)]
        return pages == [0, 0] and prefill.metric("spectrumkv:kv_outbox_bytes") == 0

    wait_for(is_empty, EMPTY_SECONDS, logs)


def test_mixed_requests_are_right_and_leave_nothing(servers: Servers, tmp_path: Path) -> None:
    asked = wishes(SHORT)
    before = servers.decode.metric("spectrumkv:kv_tokens_loaded_total")
    with proxied(tmp_path, servers.prefill.url, servers.decode.url) as url:
        answers = asyncio.run(Soak(url, CLIENTS).run(asked))
        assert failures(answers) == []
        loaded = servers.decode.metric("spectrumkv:kv_tokens_loaded_total") - before
        assert loaded >= sum(len(one.wish.prompt) for one in answers if one.outcome == "answered")
        check_nothing_is_left(servers.prefill, servers.decode)
        check_answers(answers, SHORT, url, servers.prefill)


class Replaced:
    """A server that can be killed, and comes back at the same address."""

    def __init__(self, role: str, folder: Path) -> None:
        self._role, self._folder = role, folder
        self._ports = free_port(), free_port()
        self._running = ExitStack()
        self.server = self._start()

    def _start(self) -> Server:
        port, transfer_port = self._ports
        return self._running.enter_context(serving(self._role, self._folder, port=port, transfer_port=transfer_port))

    async def kill(self) -> None:
        """Kill it, and return when another one is ready in its place."""
        self.server.kill()
        self._running.close()
        self.server = self._start()
        await asyncio.to_thread(self.wait)

    def wait(self) -> None:
        wait_for(lambda: self.server.is_ready, START_SECONDS, self._folder)

    def close(self) -> None:
        self._running.close()


@pytest.mark.exhaustive
@pytest.mark.timeout(5400)
def test_500_requests_while_servers_die(tmp_path: Path) -> None:
    prefill, decode = Replaced("kv_producer", tmp_path), Replaced("kv_consumer", tmp_path)
    try:
        for one in (prefill, decode):
            one.wait()
        with proxied(tmp_path, prefill.server.url, decode.server.url) as url:

            def killing(one: Replaced) -> Callable[[], Awaitable[None]]:
                async def kill() -> None:
                    await one.kill()
                    await asyncio.to_thread(wait_for, lambda: is_healthy(url), 30, tmp_path)

                return kill

            kills = {LONG // 3: killing(prefill), LONG * 2 // 3: killing(decode)}
            answers = asyncio.run(Soak(url, CLIENTS, kills).run(wishes(LONG)))
            # What was under way when a server died may fail, and nothing else.
            assert len(failures(answers)) <= len(kills) * CLIENTS
            check_nothing_is_left(prefill.server, decode.server, tmp_path)
            check_answers(answers, LONG, url, prefill.server)
    finally:
        for one in (prefill, decode):
            one.close()
