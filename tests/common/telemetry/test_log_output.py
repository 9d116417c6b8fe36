import errno
import fcntl
import logging
import os
import threading

import pytest

from spectrumkv.common.telemetry.log_output import MAX_WAITING_LINES, LogOutput
from spectrumkv.common.telemetry.request_log import JsonFormatter

SECONDS = 30.0


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    yield reading, writing
    os.close(writing)


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("a", logging.INFO, "", 0, text, None, None)


def read_lines(descriptor: int, last: str) -> list[str]:
    """The lines up to the one that contains `last`."""
    lines = []
    with open(descriptor, encoding="utf-8") as stream:
        for line in stream:
            lines.append(line.rstrip("\n"))
            if last in line:
                break
    return lines


def test_a_line_is_in_the_pipe_when_the_call_returns(pipe):
    reading, writing = pipe
    LogOutput(writing).emit(record("the last words ☃"))
    os.set_blocking(reading, False)
    assert os.read(reading, 100).decode() == "the last words ☃\n"
    os.close(reading)


def test_a_pipe_that_nobody_reads_stops_nobody_and_lines_beyond_the_bound_are_counted(pipe):
    reading, writing = pipe
    output = LogOutput(writing)
    counted = []
    output.lines.count_with(counted.append)
    logged = 2 * MAX_WAITING_LINES
    for number in range(logged):
        output.emit(record(f"{number:99}"))
    dropped = output.lines.dropped
    assert logged - MAX_WAITING_LINES - 4096 // 100 <= dropped <= logged - MAX_WAITING_LINES
    assert sum(counted) == dropped
    lines = read_lines(reading, "dropped")
    assert [int(line) for line in lines[:-1]] == list(range(logged - dropped))
    assert lines[-1].startswith(f"{dropped} log lines were dropped so far")


def test_a_line_longer_than_the_pipe_comes_whole(pipe):
    reading, writing = pipe
    output = LogOutput(writing)
    output.emit(record("x" * 50_000))
    output.emit(record("end"))
    assert read_lines(reading, "end") == ["x" * 50_000, "end"]


def test_what_is_said_of_dropped_lines_has_the_log_s_format(pipe):
    reading, writing = pipe
    output = LogOutput(writing)
    output.setFormatter(JsonFormatter())
    for _ in range(2 * MAX_WAITING_LINES):
        output.emit(record("x" * 100))
    assert read_lines(reading, "dropped")[-1].startswith('{"time": ')


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC], ids=errno.errorcode.get)
def test_lines_that_cannot_be_written_are_dropped_and_the_writer_rests(number):
    if number == errno.EPIPE:
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open("/dev/full", os.O_WRONLY)
    output = LogOutput(writing)
    for _ in range(10):
        output.emit(record("x"))
    assert output.lines.dropped == 10
    output.flush()
    assert output.lines.dropped == 10
    os.close(writing)


def test_the_end_waits_for_lines_that_somebody_reads_and_not_for_others(pipe):
    reading, writing = pipe
    output = LogOutput(writing)
    for _ in range(100):
        output.emit(record("x" * 99))
    output.flush()
    reader = threading.Thread(target=read_lines, args=(reading, "end"))
    reader.start()
    output.emit(record("end"))
    reader.join(SECONDS)
    assert not reader.is_alive()


def test_a_record_that_cannot_be_formatted_raises_nothing(pipe, capsys):
    reading, writing = pipe
    LogOutput(writing).emit(logging.LogRecord("a", logging.INFO, "", 0, "%d", ("x",), None))
    assert "Logging error" in capsys.readouterr().err
    os.close(reading)
