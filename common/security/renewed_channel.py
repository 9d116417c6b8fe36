"""Provides a TLS channel that follows its certificates.

gRPC's own channels keep the certificates that they were made with.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import grpc

from spectrumkv.common.security.tls import Certificates, channel_credentials
from spectrumkv.common.security.watched_files import WatchedFiles


class _Generation:
    """A gRPC channel that was made with one version of the certificates, and the number of calls that run on it."""

    def __init__(self, address: str, certificates: Certificates, options: Any) -> None:
        self.certificates = certificates
        self.channel = grpc.secure_channel(address, channel_credentials(certificates), options=options)
        self.calls = 0


class RenewedChannel(grpc.Channel):  # type: ignore[misc]  # grpc has no type information
    """A TLS channel whose new calls go over a new connection once the certificates have changed.

    Running calls stay on their connection. An outdated connection is closed when its last call is over.

    Args:
        address: "host:port".
        watched: authorities that verify the server, and the certificate to show.
        options: the channel's options, as gRPC takes them.
    """

    def __init__(self, address: str, watched: WatchedFiles[Certificates], options: Any) -> None:
        self._address = address
        self._watched = watched
        self._options = options
        self._lock = threading.Lock()
        self._subscribers: list[tuple[Callable[[Any], None], bool]] = []
        self._closed = False
        self._generations = [_Generation(address, watched.current, options)]

    def subscribe(self, callback: Callable[[Any], None], try_to_connect: bool = False) -> None:
        """Call `callback` with the connection's state, now and at each change, for this and later connections."""
        with self._lock:
            self._subscribers.append((callback, try_to_connect))
            self._generations[-1].channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Callable[[Any], None]) -> None:
        """Stop calling `callback`."""
        with self._lock:
            self._subscribers = [one for one in self._subscribers if one[0] is not callback]
            for generation in self._generations:
                generation.channel.unsubscribe(callback)

    def unary_unary(self, *arguments: Any, **named: Any) -> Any:
        """Return a callable of this method, as `grpc.Channel.unary_unary` does."""
        return _UnaryResponse(self, lambda channel: channel.unary_unary(*arguments, **named))

    def stream_unary(self, *arguments: Any, **named: Any) -> Any:
        """Return a callable of this method, as `grpc.Channel.stream_unary` does."""
        return _UnaryResponse(self, lambda channel: channel.stream_unary(*arguments, **named))

    def unary_stream(self, *arguments: Any, **named: Any) -> Any:
        """Return a callable of this method, as `grpc.Channel.unary_stream` does."""
        return _StreamedResponse(self, lambda channel: channel.unary_stream(*arguments, **named))

    def stream_stream(self, *arguments: Any, **named: Any) -> Any:
        """Return a callable of this method, as `grpc.Channel.stream_stream` does."""
        return _StreamedResponse(self, lambda channel: channel.stream_stream(*arguments, **named))

    def close(self) -> None:
        """Close every connection and cancel the running calls."""
        with self._lock:
            self._closed = True
            generations = list(self._generations)
        for generation in generations:
            generation.channel.close()

    def __enter__(self) -> "RenewedChannel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def hold(self) -> _Generation:
        """Return the connection for a new call; `release` must be called at the call's end."""
        certificates = self._watched.current
        with self._lock:
            newest = self._generations[-1]
            if newest.certificates is not certificates and not self._closed:
                newest = _Generation(self._address, certificates, self._options)
                self._generations.append(newest)
                for callback, try_to_connect in self._subscribers:
                    newest.channel.subscribe(callback, try_to_connect)
            newest.calls += 1
            outdated = self._take_outdated()
        _close(outdated)
        return newest

    def release(self, generation: _Generation) -> None:
        """Give the connection of a finished call back, and close it if it is outdated and idle."""
        with self._lock:
            generation.calls -= 1
            outdated = self._take_outdated()
        _close(outdated)

    def _take_outdated(self) -> list[_Generation]:
        idle = [one for one in self._generations[:-1] if one.calls == 0]
        self._generations = [one for one in self._generations if one not in idle]
        return idle


def _close(generations: list[_Generation]) -> None:
    for generation in generations:
        # Closing waits for gRPC's thread that runs callbacks, which may be the current one.
        threading.Thread(target=generation.channel.close, name="outdated-channel", daemon=True).start()


class _Calls:
    """Starts the calls of one method on the newest connection."""

    def __init__(self, channel: RenewedChannel, bind: Callable[[grpc.Channel], Any]) -> None:
        self._channel = channel
        self._bind = bind

    @contextmanager
    def _held(self) -> Iterator[Any]:
        generation = self._channel.hold()
        try:
            yield self._bind(generation.channel)
        finally:
            self._channel.release(generation)

    def _start(self, start: Callable[[Any], Any]) -> Any:
        """Return a call that runs in the background; at its end the connection is given back."""
        generation = self._channel.hold()
        try:
            call = start(self._bind(generation.channel))
        except BaseException:
            self._channel.release(generation)
            raise
        call.add_done_callback(lambda _: self._channel.release(generation))
        return call


class _UnaryResponse(_Calls):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with self._held() as method:
            return method(*arguments, **named)

    # gRPC's interceptors, such as `TokenSender`, make every unary call through this method.
    def with_call(self, *arguments: Any, **named: Any) -> Any:
        with self._held() as method:
            return method.with_call(*arguments, **named)

    def future(self, *arguments: Any, **named: Any) -> Any:
        return self._start(lambda method: method.future(*arguments, **named))


class _StreamedResponse(_Calls):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._start(lambda method: method(*arguments, **named))
