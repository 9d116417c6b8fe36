import queue
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spectrumkv.common.errors import FailedPreconditionError, UnavailableError
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.service.process import exit_on_error
from spectrumkv.v1 import decode_pb2, decode_pb2_grpc
from tests.common.rpc.scripted import HEALTH, WAIT_SECONDS

ROOT = Path(__file__).parents[3]
SIGNALS = [signal.SIGTERM, signal.SIGINT]


def start(**options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.common.service.serving_process",
            *(f"{key}={value}" for key, value in options.items()),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
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
        one.process.send_signal(number)
        assert one.status() == HEALTH.NOT_SERVING
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
