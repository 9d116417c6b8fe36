"""What can happen to a stream of messages, and a man in the middle to whom it happens."""

import contextlib
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from spectrumkv.common.rpc.channel import open_channel

METHOD = "/spectrumkv.v1.DecodeService/Decode"

Messages = Iterable[bytes]
Damage = Callable[[Messages, int, random.Random], Iterator[bytes]]


def flip(messages: Messages, at: int, chance: random.Random) -> Iterator[bytes]:
    """One bit of message `at` is flipped."""
    for place, message in enumerate(messages):
        yield flipped(message, chance) if place == at else message


def truncate(messages: Messages, at: int, chance: random.Random) -> Iterator[bytes]:
    """Message `at` loses its end."""
    for place, message in enumerate(messages):
        yield message[: chance.randrange(len(message))] if place == at else message


def drop(messages: Messages, at: int, chance: random.Random) -> Iterator[bytes]:
    """Message `at` does not arrive."""
    for place, message in enumerate(messages):
        if place != at:
            yield message


def double(messages: Messages, at: int, chance: random.Random) -> Iterator[bytes]:
    """Message `at` arrives twice."""
    for place, message in enumerate(messages):
        yield message
        if place == at:
            yield message


def reorder(messages: Messages, at: int, chance: random.Random) -> Iterator[bytes]:
    """Message `at` arrives after the one that follows it."""
    late = None
    for place, message in enumerate(messages):
        if place == at:
            late = message
            continue
        yield message
        if late is not None:
            yield late
            late = None


def replace(messages: Messages, at: int, chance: random.Random) -> Iterator[bytes]:
    """Message `at` becomes as many other bytes."""
    for place, message in enumerate(messages):
        yield chance.randbytes(len(message)) if place == at else message


DAMAGES: dict[str, Damage] = {one.__name__: one for one in (flip, truncate, drop, double, reorder, replace)}


def flipped(data: bytes, chance: random.Random) -> bytes:
    bit = chance.randrange(8 * len(data))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def untouched(messages: Messages) -> Iterator[bytes]:
    yield from messages


@dataclass
class ManInTheMiddle:
    """Sits between prefill and decode and relays raw messages.

    Attributes:
        port: where prefill finds it.
        requests: what happens to the next stream's requests.
        responses: what happens to its responses.
        request_count: requests of the last stream, as prefill sent them.
        response_count: responses of the last stream, as decode sent them.
    """

    port: int
    requests: Callable[[Messages], Iterator[bytes]] = untouched
    responses: Callable[[Messages], Iterator[bytes]] = untouched
    request_count: int = 0
    response_count: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def harm(self, direction: str, damage: Damage, at: int, chance: random.Random) -> None:
        """Damage message `at` of the next stream."""
        self.requests = self.responses = untouched
        setattr(self, direction, lambda messages: damage(messages, at, chance))

    def counted(self, messages: Messages, name: str) -> Iterator[bytes]:
        setattr(self, name, 0)
        for message in messages:
            setattr(self, name, getattr(self, name) + 1)
            yield message


@contextlib.contextmanager
def man_in_the_middle(decode_port: int) -> Iterator[ManInTheMiddle]:
    channel = open_channel(f"127.0.0.1:{decode_port}")
    upstream = channel.stream_stream(METHOD)
    man = ManInTheMiddle(0)

    def relay(requests: Messages, context: Any) -> Iterator[bytes]:
        sent = man.requests(_until_gone(man.counted(requests, "request_count")))
        call = upstream(sent, timeout=context.time_remaining())
        context.add_callback(call.cancel)
        try:
            yield from man.responses(man.counted(call, "response_count"))
        except grpc.RpcError as error:
            context.set_trailing_metadata(error.trailing_metadata() or ())
            context.abort(error.code(), error.details())

    def _until_gone(messages: Messages) -> Iterator[bytes]:
        # Prefill going away ends the iterator with an error that the upstream call learns of by `cancel`.
        with contextlib.suppress(grpc.RpcError):
            yield from messages

    server = grpc.server(ThreadPoolExecutor(8))
    handler = grpc.method_handlers_generic_handler(
        "spectrumkv.v1.DecodeService", {"Decode": grpc.stream_stream_rpc_method_handler(relay)}
    )
    server.add_generic_rpc_handlers((handler,))
    man.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield man
    finally:
        server.stop(0).wait()
        channel.close()
