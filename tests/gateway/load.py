"""Streams through the gateway beside streams over gRPC alone, and what many requests leave in its memory.

    python -m tests.gateway.load latency --streams 200
    python -m tests.gateway.load memory --requests 10000

A prefill service of its own process answers in a fixed rhythm, so that what the gateway adds is all that differs.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from spectrumkv.client.async_client import AsyncSpectrumClient
from spectrumkv.client.request import Request

PREFILL, GATEWAY = "127.0.0.1:18741", ("127.0.0.1", 18742)
BODY = b'{"prompt": "Hello", "model": "paced", "stream": true}'
ASKED = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
LAST_EVENT, LAST_CHUNK = b"data: [DONE]\n\n", b"0\r\n\r\n"
Ask = Callable[[], Awaitable[None]]
# Of the requests of `memory`, so many callers leave after the first event.
LEAVE = 0.2


@dataclass
class Latencies:
    """What streams took, in seconds."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    errors: int = 0

    def add(self, sent: float, arrivals: list[float], expected: int) -> None:
        if len(arrivals) != expected:
            self.errors += 1
            return
        self.first.append(arrivals[0] - sent)
        self.gaps += [later - earlier for earlier, later in pairwise(arrivals)]

    @property
    def medians(self) -> tuple[float, float]:
        """TTFT and ITL in milliseconds."""
        return statistics.median(self.first) * 1000, statistics.median(self.gaps) * 1000


@contextmanager
def started(*words: str, ready: str) -> Iterator[subprocess.Popen[str]]:
    """Run a module until the block ends, from the line on that says it is ready."""
    arrived = threading.Event()

    def follow() -> None:
        for line in process.stdout or ():
            if ready in line:
                arrived.set()

    process = subprocess.Popen(
        [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    # Its later lines are read, too, so that it never waits for a reader.
    follower = threading.Thread(target=follow)
    follower.start()
    try:
        assert arrived.wait(60), f"{words[0]} is not ready"
        yield process
    finally:
        process.kill()
        process.wait()
        follower.join()
        if process.stdout is not None:
            process.stdout.close()


def gateway() -> AbstractContextManager["subprocess.Popen[str]"]:
    """Run a gateway in front of the paced service."""
    listen = f"--listen={GATEWAY[0]}:{GATEWAY[1]}"
    return started("spectrumkv.gateway", listen, f"--prefill={PREFILL}", ready="serving HTTP")


@asynccontextmanager
async def http_caller(found: Latencies, tokens: int) -> AsyncIterator[Ask]:
    """Connect to the gateway once, as clients with a pool do, and read one stream at each call."""
    reader, writer = await asyncio.open_connection(*GATEWAY, limit=1 << 20)

    async def ask() -> None:
        sent = time.perf_counter()
        writer.write(ASKED)
        arrivals = []
        while not LAST_EVENT.startswith(line := await reader.readline()):
            if line.startswith(b"data: {") and b'"finish_reason":null' in line:
                arrivals.append(time.perf_counter())
        await reader.readuntil(LAST_CHUNK)
        found.add(sent, arrivals, tokens)

    yield ask
    writer.close()


@asynccontextmanager
async def grpc_caller(client: AsyncSpectrumClient, found: Latencies, tokens: int) -> AsyncIterator[Ask]:
    """Read one stream of prefill's at each call; all callers share the client's connection."""

    async def ask() -> None:
        sent = time.perf_counter()
        arrivals = []
        async with client.send(Request(prompt="Hello")) as stream:
            async for _ in stream:
                arrivals.append(time.perf_counter())
        found.add(sent, arrivals, tokens)

    yield ask


async def side_by_side(
    streams: int, rounds: int, seconds: float, caller: Callable[[], AbstractAsyncContextManager[Ask]]
) -> None:
    """Keep so many streams running; each begins at its own time, as callers do, and is followed by another."""

    async def one(place: int) -> None:
        async with caller() as ask:
            await asyncio.sleep(place / streams * seconds)
            for _ in range(rounds):
                await ask()

    await asyncio.gather(*(one(place) for place in range(streams)))


async def compare(streams: int, tokens: int, gap: float, rounds: int) -> tuple[Latencies, Latencies]:
    """Run the two sides in turns, so many streams at once."""

    async def both(streams: int, http: Latencies, direct: Latencies) -> None:
        await side_by_side(streams, rounds, tokens * gap, lambda: grpc_caller(client, direct, tokens))
        await side_by_side(streams, rounds, tokens * gap, lambda: http_caller(http, tokens))

    http, direct = Latencies(), Latencies()
    async with AsyncSpectrumClient(PREFILL) as client:
        await both(1, Latencies(), Latencies())
        for _ in range(2):
            await both(streams, http, direct)
    return http, direct


async def one_of_many(chance: random.Random) -> None:
    """Ask once; some leave after the first event."""
    leaves = chance.random() < LEAVE
    reader, writer = await asyncio.open_connection(*GATEWAY, limit=1 << 20)
    writer.write(ASKED)
    if leaves:
        await reader.readuntil(b"\n\n")
        await reader.readline()
    else:
        await reader.readuntil(LAST_EVENT)
    writer.close()


def seconds_of(process: int) -> float:
    """Return the processor time that a process has taken."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def resident(process: int) -> float:
    """Return a process's memory in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def many(requests: int, process: int, at_once: int = 32) -> list[float]:
    """Ask so often, and return the gateway's memory after each tenth of the requests."""
    chance, memory = random.Random(0), []
    for _ in range(10):
        for _ in range(requests // 10 // at_once):
            await asyncio.gather(*(one_of_many(chance) for _ in range(at_once)))
        memory.append(resident(process))
    return memory


def main() -> None:
    """Measure, and print one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["latency", "memory"])
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--gap", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=10_000)
    given = parser.parse_args()
    tokens, gap = (4, 0.001) if given.what == "memory" else (given.tokens, given.gap)
    with started("tests.gateway.paced_prefill", PREFILL, str(tokens), str(gap), ready="serving"), gateway() as served:
        if given.what == "memory":
            memory = asyncio.run(many(given.requests, served.pid))
            each = seconds_of(served.pid) / given.requests
            shown = {"rss_mib": [round(one, 1) for one in memory], "processor_ms_of_a_request": round(each * 1000, 2)}
        else:
            http, direct = asyncio.run(compare(given.streams, tokens, gap, given.rounds))
            added = [over - alone for over, alone in zip(http.medians, direct.medians, strict=True)]
            shown = {
                "streams": given.streams,
                "http_ttft_itl_p50_ms": [round(one, 2) for one in http.medians],
                "grpc_ttft_itl_p50_ms": [round(one, 2) for one in direct.medians],
                "added_ttft_itl_p50_ms": [round(one, 2) for one in added],
                "errors": http.errors + direct.errors,
            }
    sys.stdout.write(json.dumps(shown) + "\n")


if __name__ == "__main__":
    main()
