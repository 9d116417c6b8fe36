import os
import queue
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spectrumkv.client.local.pair_config import FREE_PORTS, plan_launches
from spectrumkv.common.errors import FailedPreconditionError, UnavailableError
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.service.process import exit_on_error
from spectrumkv.common.telemetry.log_output import MAX_WAITING_LINES
from spectrumkv.v1 import decode_pb2, decode_pb2_grpc
from tests.common.rpc.scripted import HEALTH, WAIT_SECONDS
from tests.common.telemetry.test_metrics_server import probe

ROOT = Path(__file__).parents[3]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def start(log: int = subprocess.PIPE, shell: str = "exec", **options: str) -> "subprocess.Popen[str]":
    """Start the process by a shell, which may do something first."""
    command = [sys.executable, "-m", "tests.common.service.serving_process"]
    given = [f"{key}={value}" for key, value in options.items()]
    return subprocess.Popen(
        ["/bin/sh", "-c", f'{shell} "$@"', "sh", *command, *given], cwd=ROOT, stderr=log, text=True
    )


@dataclass
class Child:
    """The process, a running echo stream to it, and a watch of its health."""

    process: "subprocess.Popen[str]"
    channel: grpc.Channel
    metrics_port: int
    requests: "queue.SimpleQueue[decode_pb2.DecodeRequest | None]"
    call: Any
    watch: Any

    def echo(self) -> None:
        self.requests.put(decode_pb2.DecodeRequest())
        next(self.call)

    def status(self) -> int:
        return next(self.watch).status

    def end(self) -> tuple[int, str]:
        _, log = self.process.communicate(timeout=WAIT_SECONDS)
        return self.process.returncode, log


@contextmanager
def child(**options: str) -> Iterator[Child]:
    process = start(**options)
    try:
        line = process.stderr.readline()
        port, metrics_port = map(
            int, re.search(r"serving on 127.0.0.1:(\d+), metrics on 127.0.0.1:(\d+)", line).groups()
        )
        with open_channel(f"127.0.0.1:{port}") as channel:
            requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
            call = decode_pb2_grpc.DecodeServiceStub(channel).Decode(iter(requests.get, None), timeout=WAIT_SECONDS)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS)
            one = Child(process, channel, metrics_port, requests, call, watch)
            one.echo()
            assert one.status() == HEALTH.SERVING
            yield one
            requests.put(None)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_lets_the_running_stream_finish_and_the_process_end_well(number):
    with child(grace="60") as one:
        with urllib.request.urlopen(f"http://127.0.0.1:{one.metrics_port}/metrics", timeout=WAIT_SECONDS) as answer:
            assert b"spectrumkv_requests_running" in answer.read()
        assert probe(one.metrics_port, "/ready") == probe(one.metrics_port, "/live") == 200
        one.process.send_signal(number)
        assert one.status() == HEALTH.NOT_SERVING
        # Nobody should send it more, and nobody should kill it.
        assert (probe(one.metrics_port, "/ready"), probe(one.metrics_port, "/live")) == (503, 200)
        one.echo()
        one.echo()
        assert one.process.poll() is None
        one.requests.put(None)
        assert list(one.call) == []
        assert one.call.code() is grpc.StatusCode.OK
        status, log = one.end()
    assert status == 0
    assert "draining: no new requests, running ones get 60 s" in log
    assert log.endswith("stopped\n")
    assert log.count("engine stopped") == 1


def test_without_grace_the_running_stream_ends_at_once():
    with child(grace="0") as one:
        one.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            list(one.call)
        assert isinstance(error_from_rpc(caught.value), UnavailableError)
        status, log = one.end()
    assert status == 0
    assert "engine stopped" in log


@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_the_running_stream(second):
    with child(grace="60") as one:
        one.process.send_signal(signal.SIGTERM)
        assert one.status() == HEALTH.NOT_SERVING
        one.echo()
        one.process.send_signal(second)
        with pytest.raises(grpc.RpcError) as caught:
            list(one.call)
        assert isinstance(error_from_rpc(caught.value), UnavailableError)
        status, log = one.end()
    assert status == 0
    assert "second signal" in log
    assert "engine stopped" in log


@pytest.mark.parametrize("option", ["listen", "metrics_listen"])
def test_a_port_in_use_ends_the_process_with_a_sentence(option):
    with child(grace="0") as one:
        taken = f"127.0.0.1:{one.metrics_port}"
        _, log = (second := start(**{option: taken})).communicate(timeout=WAIT_SECONDS)
        one.requests.put(None)
    assert second.returncode == 1
    last = log.splitlines()[-1]
    assert last.startswith("error: cannot ")
    assert taken in last
    assert last.endswith("is another server using the port?")
    assert "Traceback" not in log


def test_a_known_error_becomes_a_sentence_and_status_1():
    def main():
        raise FailedPreconditionError("the model is not here; name another with --model")

    with pytest.raises(SystemExit) as caught:
        exit_on_error(main)
    assert caught.value.code == "error: the model is not here; name another with --model"


def test_an_interrupt_while_starting_becomes_status_130():
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        exit_on_error(main)
    assert caught.value.code == 130


def test_an_unknown_error_keeps_its_traceback():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exit_on_error(main)


@contextmanager
def full_pipe() -> Iterator[int]:
    """The end to write to of a pipe that is full and that nobody reads."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"\n")
    os.set_blocking(writing, True)
    yield writing
    os.close(writing)
    os.close(reading)


def dropped_lines(metrics_port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=WAIT_SECONDS) as answer:
        return int(float(re.search(rb"^spectrumkv_log_lines_dropped_total (\S+)$", answer.read(), re.M)[1]))


def test_a_log_that_nobody_reads_stops_neither_requests_nor_the_end():
    launch = plan_launches(FREE_PORTS)[0]
    with full_pipe() as log:
        process = start(log, listen=str(launch.address), metrics_listen=str(launch.metrics_address), grace="60")
        try:
            with open_channel(str(launch.address)) as channel:
                decode = decode_pb2_grpc.DecodeServiceStub(channel).Decode
                # Each ends with a line in the log.
                for number in range(MAX_WAITING_LINES + 100):
                    wait = {"wait_for_ready": number == 0, "timeout": WAIT_SECONDS}
                    assert len(list(decode(iter([decode_pb2.DecodeRequest()]), **wait))) == 1
                assert dropped_lines(launch.metrics_address.port) >= 100
                process.send_signal(signal.SIGTERM)
                assert process.wait(WAIT_SECONDS) == 0
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("place", ["a full disk", "a reader that has gone", "nowhere"])
def test_a_log_that_cannot_be_written_stops_nothing(place):
    launch = plan_launches(FREE_PORTS)[0]
    with ExitStack() as opened:
        if place == "a full disk":
            log = opened.enter_context(open("/dev/full", "w")).fileno()
        else:
            reading, log = os.pipe()
            os.close(reading)
            opened.callback(os.close, log)
        options = {"listen": str(launch.address), "metrics_listen": str(launch.metrics_address)}
        command = "exec 2>&-; exec" if place == "nowhere" else "exec"
        process = start(log, shell=command, **options)
        try:
            with open_channel(str(launch.address)) as channel:
                decode = decode_pb2_grpc.DecodeServiceStub(channel).Decode
                answer = decode(iter([decode_pb2.DecodeRequest()]), wait_for_ready=True, timeout=WAIT_SECONDS)
                assert len(list(answer)) == 1
                assert dropped_lines(launch.metrics_address.port) >= (0 if place == "nowhere" else 1)
                process.send_signal(signal.SIGTERM)
                assert process.wait(WAIT_SECONDS) == 0
        finally:
            process.kill()
            process.wait()


def test_no_other_writer_waits_for_whoever_reads_standard_error():
    """The lines of C libraries, for instance, which know nothing of our handler."""
    code = (
        "import os; from spectrumkv.common.service.process import set_up_logging; set_up_logging('info')\n"
        "try: os.write(2, b'x' * 4096)\n"
        "except BlockingIOError: os._exit(0)\n"
        "os._exit(1)"
    )
    with full_pipe() as log:
        assert (
            subprocess.run([sys.executable, "-c", code], stderr=log, timeout=WAIT_SECONDS, check=False).returncode
            == 0
        )


def test_a_process_without_standard_error_gets_one():
    code = (
        "import faulthandler, sys; from spectrumkv.common.service.process import set_up_logging\n"
        "set_up_logging('info'); faulthandler.enable(); sys.stderr.write('x'); sys.stderr.flush()"
    )
    command = ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(command, timeout=WAIT_SECONDS, check=False).returncode == 0
