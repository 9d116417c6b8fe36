"""Provides asyncio channels that follow their certificates, as `renewed_channel` does for threads."""

import asyncio
from typing import Any

import grpc.aio

from spectrumkv.common.security.tls import Certificates, channel_credentials
from spectrumkv.common.security.watched_files import WatchedFiles

# A channel whose certificates are outdated is closed when its calls are over, and after this long in any case.
LAST_CALL_SECONDS = 3600.0


class RenewedAsyncChannel:
    """Hands out a channel for each new call, another one once the certificates have changed.

    It is used on one event loop. Running calls stay on their connection.

    Args:
        uri: the server, as gRPC names it.
        watched: authorities that verify the server, and the certificate to show; None is plaintext.
        options: the channels' options, as gRPC takes them.
    """

    def __init__(self, uri: str, watched: WatchedFiles[Certificates] | None, options: Any) -> None:
        self._uri = uri
        self._watched = watched
        self._options = options
        self._certificates = None if watched is None else watched.current
        self._channel = self._open()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def current(self) -> grpc.aio.Channel:
        """The channel for a new call."""
        if self._watched is not None and self._watched.current is not self._certificates:
            outdated, self._certificates = self._channel, self._watched.current
            self._channel = self._open()
            task = asyncio.ensure_future(outdated.close(LAST_CALL_SECONDS))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        return self._channel

    async def close(self) -> None:
        """Close every connection and cancel the running calls."""
        for task in self._closing:
            task.cancel()
        await self._channel.close()

    def _open(self) -> grpc.aio.Channel:
        if self._certificates is None:
            return grpc.aio.insecure_channel(self._uri, options=self._options)
        return grpc.aio.secure_channel(self._uri, channel_credentials(self._certificates), options=self._options)
