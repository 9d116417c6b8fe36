"""Thousands of idle connections from one address, which would use up a process's files, while a client asks."""

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import RunningPair, running_pair
from spectrumkv.common.service.config import Address
from tests.faults.connections.asking import ask, median_of
from tests.faults.connections.process import Process
from tests.faults.report import tell
from tests.tiny_models import tiny_model
from tests.waiting import until

STRANGER = "127.0.0.2"
# What an HTTP/2 client says first: its preface, and settings without any.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
IDLE, REQUESTS = 2000, 15
FEW_FILES = 256


@contextmanager
def idle_connections(address: Address, count: int) -> Iterator[list[socket.socket]]:
    """Hold so many connections that say hello and nothing else; the server may have closed some."""
    with ExitStack() as held:
        opened = []
        for _ in range(count):
            one = held.enter_context(socket.create_connection((address.host, address.port), 20, (STRANGER, 0)))
            one.sendall(HELLO)
            opened.append(one)
        yield opened


def is_open(connection: socket.socket) -> bool:
    """Whether the server has not closed a connection, after reading what it has sent."""
    connection.setblocking(False)
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def files_limited_to(count: int) -> Iterator[None]:
    """Have the processes that are started meanwhile open so many files at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def services(files: int, **options: str) -> Iterator[RunningPair]:
    settings = {"model": str(tiny_model("llama")), "int4": "on", "kv_memory": "16MiB", **FREE_PORTS, **options}
    with ExitStack() as running:
        with files_limited_to(files):
            pair = running.enter_context(running_pair(settings))
        yield pair


@pytest.fixture(scope="module")
def pair_of_few_files() -> Iterator[RunningPair]:
    with services(FEW_FILES) as pair:
        yield pair


@pytest.mark.slow
@pytest.mark.parametrize("service", ["prefill", "decode"])
def test_idle_connections_do_not_use_up_a_processs_files(
    pair_of_few_files: RunningPair, service: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = pair_of_few_files
    with SpectrumClient(pair.address) as client:
        address = {"prefill": pair.prefill, "decode": pair.decode}[service].address
        ask(client)
        process = Process(address.port)
        with idle_connections(address, IDLE) as held:
            until(lambda: sum(map(is_open, held)) <= FEW_FILES // 4)
            assert process.files < FEW_FILES * 3 // 4
            ask(client)
            with SpectrumClient(str(address)) as newcomer:
                newcomer.wait_until_serving(20)
            tell(capsys, f"{service}: {process.files} of {FEW_FILES} files open beside {IDLE} idle connections")
        with SpectrumClient(str(address)) as newcomer:
            newcomer.wait_until_serving(20)
        ask(client)
        assert process.pid == Process(address.port).pid


@pytest.mark.slow
def test_what_idle_connections_cost_where_they_are_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    with services(8192, max_connections_per_address="4096") as pair, SpectrumClient(pair.address) as client:
        median_of(client, REQUESTS)
        process, quiet = Process(pair.prefill.address.port), median_of(client, REQUESTS)
        before = process.files, process.status("VmRSS"), process.status("Threads")
        with idle_connections(pair.prefill.address, IDLE) as held:
            until(lambda: process.files >= before[0] + IDLE)
            beside = median_of(client, REQUESTS)
            after = process.files, process.status("VmRSS"), process.status("Threads")
            assert all(map(is_open, held))
        files, kilobytes, threads = (new - old for new, old in zip(after, before, strict=True))
        tell(
            capsys,
            f"{IDLE} idle connections: {files} files, {kilobytes} kB of memory, {threads} threads; "
            f"a request takes {quiet * 1e3:.1f} ms without and {beside * 1e3:.1f} ms with them",
        )
        assert threads <= 4
        assert beside <= 2 * quiet
