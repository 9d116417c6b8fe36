import socket
import threading

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.common.errors import CancelledError, DeadlineExceededError, SpectrumKVError
from spectrumkv.common.rpc import readiness
from tests.client.fake_servers import FakePrefill, prefill_server, serving, stop


def free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def waiting(client, timeout):
    """Start the wait in a thread; return the thread and where its outcome will be."""
    outcome = []

    def wait():
        try:
            client.wait_until_serving(timeout)
        except SpectrumKVError as error:
            outcome.append(error)
        else:
            outcome.append("ready")

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, outcome


def test_a_server_that_starts_later_is_noticed():
    address = free_address()
    with SpectrumClient(address) as client:
        thread, outcome = waiting(client, 30)
        server = prefill_server(FakePrefill())
        server.bind(address)
        server.start()
        thread.join(30)
        stop(server)
    assert outcome == ["ready"]


def test_a_server_that_drains_is_not_ready_and_the_error_says_so():
    server = prefill_server(FakePrefill())
    with serving(server) as address, SpectrumClient(address) as client:
        server._health.enter_graceful_shutdown()
        with pytest.raises(DeadlineExceededError, match=r"not ready after 0\.2 s \(health: NOT_SERVING\)"):
            client.wait_until_serving(0.2)
        assert not client.is_serving()


def test_nobody_comes():
    address = free_address()
    with SpectrumClient(address) as client, pytest.raises(DeadlineExceededError, match="no answer"):
        client.wait_until_serving(0.2)


def test_closing_the_client_calls_the_wait_off():
    with SpectrumClient(free_address()) as client:
        thread, outcome = waiting(client, 30)
        client.close()
    thread.join(10)
    assert len(outcome) == 1
    assert isinstance(outcome[0], CancelledError)


def test_a_client_closed_just_when_the_time_is_up_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    with SpectrumClient(free_address()) as client:
        ask = readiness.is_serving

        def close_and_ask(channel, timeout):
            client.close()
            return ask(channel, timeout)

        monkeypatch.setattr(readiness, "is_serving", close_and_ask)
        with pytest.raises(DeadlineExceededError, match=r"\(no answer\)"):
            client.wait_until_serving(0.1)
