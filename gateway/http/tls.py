"""Serve HTTPS: TLS begins once a connection has a place, so that those that never finish it are bounded, too.

uvicorn itself knows a connection only when its handshake is over. Until then, for a minute, a silent caller would
hold a file that counts nowhere.
"""

import asyncio
import logging
from pathlib import Path
from ssl import SSLContext
from typing import Any

from spectrumkv.common.security.tls import server_context
from spectrumkv.common.security.watched_files import WatchedFiles, read_file
from spectrumkv.common.service.machine import max_connections
from spectrumkv.gateway.api.errors import HttpError
from spectrumkv.gateway.http.connection import BoundedConnection

logger = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 10.0


def watched_context(cert: Path, key: Path) -> WatchedFiles[SSLContext]:
    """Return the context of new connections, which is made again whenever the files change.

    Args:
        cert: PEM file of the certificate.
        key: PEM file of its private key.

    Raises:
        InvalidArgumentError: they cannot be used.
    """

    def read() -> SSLContext:
        for option, path in (("--tls-cert", cert), ("--tls-key", key)):
            read_file(option, path)
        return server_context(cert, key)

    return WatchedFiles([cert, key], read)


class TlsConnection(BoundedConnection):
    """Serve one connection, after its handshake.

    Args:
        watched: the context.
        named: what uvicorn gives a protocol.
    """

    def __init__(self, watched: WatchedFiles[SSLContext], **named: Any) -> None:
        super().__init__(**named)
        self._watched = watched
        self._is_secured = False
        # What follows the handshake at once.
        self._early = bytearray()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection of TCP, in the place of an idle one where there is no other place."""
        self.transport = transport
        self.connections.add(self)
        # The first bytes are the handshake's.
        transport.pause_reading()
        self._securing = self.loop.create_task(self._secure(transport))
        if len(self.connections) > max_connections():
            self._make_room()

    async def _secure(self, transport: asyncio.Transport) -> None:
        try:
            secured = await self.loop.start_tls(
                transport, self, self._watched.current, server_side=True, ssl_handshake_timeout=HANDSHAKE_SECONDS
            )
        except OSError as error:
            logger.debug("a TLS handshake failed: %s", error)
            self._abort()
            return
        if secured is None or self.transport.is_closing():
            self._abort()
            return
        self._is_secured = True
        super().connection_made(secured)
        if self._early:
            super().data_received(bytes(self._early))

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        if self._is_secured:
            super().data_received(data)
        else:
            self._early += data

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        if self._is_secured:
            super().connection_lost(exc)
        else:
            self._abort()

    def refuse(self, error: HttpError) -> None:
        """Answer with an error where that can be done, and close the connection."""
        if self._is_secured:
            super().refuse(error)
        else:
            self._abort()

    def _abort(self) -> None:
        self.connections.discard(self)
        self.transport.abort()
