"""Signals at a gateway in a process of its own: running requests end in order, whatever their callers do."""

import http.client
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from tests.client.fake_servers import FakePrefill, finished, token
from tests.gateway.running import WAIT_SECONDS
from tests.waiting import until

STOPPING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
START_SECONDS = 60.0
# What the gateway says once it waits for a body.
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True)
class GatewayProcess:
    """A gateway that serves, and what it has logged."""

    process: "subprocess.Popen[str]"
    port: int
    lines: list[str]
    shuts_down: threading.Event
    opened: ExitStack

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        return self.opened.enter_context(closing(connection))

    def ask(self, stream: bool) -> http.client.HTTPConnection:
        connection = self.connect()
        body = {"prompt": "x", "model": "m", "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        return connection

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends_well(self) -> None:
        assert self.process.wait(START_SECONDS) == 0
        assert not [line for line in self.lines if "Traceback" in line]


@contextmanager
def gateway_process(prefill: FakePrefill, grace: str, under: Sequence[str] = ()) -> Iterator[GatewayProcess]:
    command = [*under, sys.executable, "-m", "spectrumkv.gateway", "--prefill", prefill.address]
    with subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0", "--grace", grace], stderr=subprocess.PIPE, text=True
    ) as process:
        lines: list[str] = []
        shuts_down = threading.Event()
        try:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line)
                if "serving HTTP on" in line:
                    port = int(line.split("127.0.0.1:")[1].split(",")[0])
                if "startup complete" in line:
                    break
            else:
                pytest.fail("the gateway ended before it served: " + "".join(lines))

            def read_on() -> None:
                for line in process.stderr or ():
                    lines.append(line)
                    if "Shutting down" in line:
                        shuts_down.set()

            reader = threading.Thread(target=read_on)
            reader.start()
            with ExitStack() as opened:
                opened.callback(reader.join, WAIT_SECONDS)
                opened.callback(process.kill)
                yield GatewayProcess(process, port, lines, shuts_down, opened)
        finally:
            process.kill()


@pytest.fixture
def held(prefill: FakePrefill) -> Iterator[threading.Event]:
    """Answers have one token, and the others once this is set."""
    may_go_on = threading.Event()

    def answer(request: Any, context: Any) -> Any:
        yield token(0, "a")
        may_go_on.wait(WAIT_SECONDS)
        yield token(1, "b", ends="STOP")
        yield finished(2)

    prefill.answer = answer
    yield may_go_on
    may_go_on.set()


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPPING)
def test_a_running_stream_ends_in_its_time(
    prefill: FakePrefill, held: threading.Event, number: signal.Signals
) -> None:
    with gateway_process(prefill, grace="60") as gateway:
        with gateway.ask(stream=True).getresponse() as response:
            assert response.readline().startswith(b"data: {")
            gateway.send(number)
            assert gateway.shuts_down.wait(WAIT_SECONDS)
            until(lambda: is_refused(gateway))
            held.set()
            assert response.read().endswith(b"data: [DONE]\n\n")
        gateway.ends_well()


def is_refused(gateway: GatewayProcess) -> bool:
    try:
        gateway.connect().connect()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        # The system resets what waits in a queue whose listener has just closed.
        pass
    return False


def cut_off(gateway: GatewayProcess, prefill: FakePrefill, end: Callable[[], None]) -> None:
    """Have requests ended that would go on, and look at what each caller was told."""
    streamed = gateway.ask(stream=True).getresponse()
    assert streamed.readline().startswith(b"data: {")
    whole = gateway.ask(stream=False)
    sending = gateway.connect()
    sending.putrequest("POST", "/v1/completions")
    sending.putheader("Content-Length", "100")
    sending.putheader("Expect", "100-continue")
    sending.endheaders()
    assert sending.sock.recv(len(CONTINUE)) == CONTINUE
    until(lambda: len(prefill.requests) == 2)
    end()
    with streamed:
        *_, last, done = [line for line in streamed.read().splitlines() if line]
    assert done == b"data: [DONE]"
    assert "this gateway is stopping" in json.loads(last.removeprefix(b"data: "))["error"]["message"]
    for connection in (whole, sending):
        with connection.getresponse() as response:
            assert response.status == 503
            assert response.headers["retry-after"] == "1"
            assert "this gateway is stopping" in json.loads(response.read())["error"]["message"]
    gateway.ends_well()


@pytest.mark.slow
@pytest.mark.usefixtures("held")
def test_what_runs_when_the_grace_is_over_is_told_so(prefill: FakePrefill) -> None:
    with gateway_process(prefill, grace="1") as gateway:
        cut_off(gateway, prefill, lambda: gateway.send(signal.SIGTERM))


@pytest.mark.slow
@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("second", STOPPING)
def test_a_second_signal_ends_what_runs(prefill: FakePrefill, second: signal.Signals) -> None:
    with gateway_process(prefill, grace="600") as gateway:

        def end() -> None:
            gateway.send(signal.SIGTERM)
            assert gateway.shuts_down.wait(WAIT_SECONDS)
            gateway.send(second)

        cut_off(gateway, prefill, end)


@pytest.mark.slow
def test_a_gateway_under_nohup_outlives_its_terminal(prefill: FakePrefill) -> None:
    with gateway_process(prefill, grace="1", under=["nohup"]) as gateway:
        gateway.send(signal.SIGHUP)
        with gateway.ask(stream=False).getresponse() as response:
            assert response.status == 200
        gateway.send(signal.SIGTERM)
        gateway.ends_well()
