"""A process that can open no more files goes on with what it has, spins nowhere, and takes calls again afterwards."""

import contextlib
import http.client
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.gateway_process import running_gateway
from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import RunningPair, running_pair
from spectrumkv.common.service.config import Address
from tests.faults.connections.asking import ask
from tests.faults.connections.process import Process
from tests.faults.connections.test_idle_connections import HELLO, is_open
from tests.faults.report import tell
from tests.tiny_models import tiny_model
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Files that a process may still open, and connections that want one each.
FREE_FILES, CONNECTIONS = 6, 40
# Between two looks of those who were turned away.
COME_AGAIN_SECONDS = 0.2
# How long a process is watched while it has no file left, and how long a new caller waits in vain.
WATCH_SECONDS, IN_VAIN_SECONDS = 4.0, 2.0
# What a process that only waits may take of what one takes that never does.
MOST_PROCESSOR_SHARE = 0.2
MOST_LOG_LINES = 30
# A request of HTTP whose end does not come.
HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"


@dataclass(frozen=True)
class Services:
    """A pair and a gateway, as processes of their own."""

    pair: RunningPair
    gateway: Address
    log: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    settings = {"model": str(tiny_model("llama")), "int4": "on", "kv_memory": "64MiB", "policy": "fp16", **FREE_PORTS}
    log: list[str] = []
    gateway = Address("127.0.0.1", free_port())
    with (
        running_pair(settings, lambda name, line: log.append(f"{name} {line}")) as pair,
        running_gateway(pair, gateway, {}, lambda name, line: log.append(f"{name} {line}")),
    ):
        yield Services(pair, gateway, log)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextmanager
def few_files(process: Process) -> Iterator[None]:
    """Let a process open a few files more and no others."""
    before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    opened = set(map(int, os.listdir(f"/proc/{process.pid}/fd")))
    free = (number for number in range(before[1]) if number not in opened)
    resource.prlimit(
        process.pid, resource.RLIMIT_NOFILE, ([next(free) for _ in range(FREE_FILES)][-1] + 1, before[1])
    )
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)


class Crowd:
    """So many callers that a process has no file left for the next; who is turned away comes again."""

    def __init__(self, address: Address, hello: bytes) -> None:
        self._address, self._hello = address, hello
        self._gone = threading.Event()
        self._held = [self._connection() for _ in range(CONNECTIONS)]
        self._thread = threading.Thread(target=self._come_again, name="crowd")
        self._thread.start()

    def leave(self) -> None:
        self._gone.set()
        self._thread.join()
        for one in self._held:
            one.close()

    def _connection(self) -> socket.socket:
        opened = socket.create_connection((self._address.host, self._address.port), 20)
        with contextlib.suppress(OSError):
            opened.sendall(self._hello)
        return opened

    def _come_again(self) -> None:
        while not self._gone.wait(COME_AGAIN_SECONDS):
            for place, one in enumerate(self._held):
                if not is_open(one):
                    one.close()
                    self._held[place] = self._connection()


@contextmanager
def used_up(process: Process, address: Address, hello: bytes) -> Iterator[None]:
    """Hold so many connections to a process that it has no file left for the next."""
    limit, _ = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    crowd = Crowd(address, hello)
    try:
        until(lambda: set(range(limit)) <= set(map(int, os.listdir(f"/proc/{process.pid}/fd"))))
        yield
    finally:
        crowd.leave()


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def share_of_a_loop(process: Process) -> float:
    """What a process takes of a processor in a while, divided by what a loop without end takes beside it."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as loop:
        before = processor_seconds(process.pid), processor_seconds(loop.pid)
        time.sleep(WATCH_SECONDS)
        after = processor_seconds(process.pid), processor_seconds(loop.pid)
        loop.kill()
    return (after[0] - before[0]) / (after[1] - before[1])


class Stream:
    """A request that runs through all three processes, over HTTP."""

    def __init__(self, gateway: Address) -> None:
        self._connection = http.client.HTTPConnection(gateway.host, gateway.port, timeout=60)
        asked = {"prompt": list(range(100, 110)), "max_tokens": 1900, "stream": True, "ignore_eos": True}
        self._connection.request("POST", "/v1/completions", json.dumps(asked), {"content-type": "application/json"})
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200
        self.read(1)

    def read(self, events: int) -> None:
        """Read so many events more, of which none is the last."""
        while events:
            line = self._answer.readline()
            assert line, "the stream has ended"
            assert b"[DONE]" not in line
            assert b"error" not in line, line
            events -= line.startswith(b"data: ")

    def close(self) -> None:
        self._answer.close()
        self._connection.close()


def ask_grpc(address: Address) -> None:
    """Ask a service whether it serves, on a connection that no other channel of this process has."""
    with grpc.insecure_channel(str(address), [("grpc.use_local_subchannel_pool", 1)]) as channel:
        asked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=IN_VAIN_SECONDS)
    assert asked.status == health_pb2.HealthCheckResponse.SERVING


def ask_http(address: Address) -> None:
    """Ask a gateway, or for metrics, on a new connection."""
    connection = http.client.HTTPConnection(address.host, address.port, timeout=IN_VAIN_SECONDS)
    try:
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
    finally:
        connection.close()


def served(ask_newly: Callable[[Address], None], address: Address) -> bool:
    """Whether a new connection is served; anything but an honest error fails the test."""
    try:
        ask_newly(address)
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)  # noqa: PT017
        return False
    except (OSError, http.client.HTTPException):
        return False
    return True


@pytest.mark.parametrize("target", ["prefill", "decode", "metrics", "gateway"])
def test_it_goes_on_and_takes_calls_again(
    target: str, services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = services.pair
    address, hello, ask_newly = {
        "prefill": (pair.prefill.address, HELLO, ask_grpc),
        "decode": (pair.decode.address, HELLO, ask_grpc),
        "metrics": (pair.prefill.metrics_address, HEAD, ask_http),
        "gateway": (services.gateway, HEAD, ask_http),
    }[target]
    process = Process(pair.prefill.address.port if target == "metrics" else address.port)
    with SpectrumClient(pair.address) as connected:
        ask(connected)
        stream = Stream(services.gateway)
        with few_files(process):
            with used_up(process, address, hello):
                lines = len(services.log)
                stream.read(5)
                newcomers = [served(ask_newly, address) for _ in range(3)]
                assert not all(newcomers)
                # Its end gives the gateway a file back.
                stream.close()
                ask(connected)
                share = share_of_a_loop(process)
                said = services.log[lines:]
            until(lambda: served(ask_newly, address))
            ask(connected)
            Stream(services.gateway).close()
    tell(capsys, f"{target} without a file left: {share:.2f} of a loop's time, {len(said)} lines in the log")
    assert share < MOST_PROCESSOR_SHARE
    assert len(said) <= MOST_LOG_LINES, said[:5]
    assert process.pid == Process(pair.prefill.address.port if target == "metrics" else address.port).pid
