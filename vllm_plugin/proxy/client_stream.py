"""The stream of events that the proxy answers a client with."""

from aiohttp import web

from spectrumkv.vllm_plugin.proxy.answers import event
from spectrumkv.vllm_plugin.proxy.bodies import Body


class ClientLeftError(Exception):
    """The client closed its stream, so that nothing is left to do for it.

    Args:
        stream: of the client.
    """

    def __init__(self, stream: web.StreamResponse) -> None:
        super().__init__("the client closed its stream")
        self.stream = stream


async def begin_events(http: web.Request) -> web.StreamResponse:
    """Send the status of an answer that is a stream of events.

    Args:
        http: the client's request.

    Returns:
        The stream.
    """
    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await stream.prepare(http)
    return stream


async def send(stream: web.StreamResponse, chunk: Body) -> None:
    """Send an event.

    Args:
        stream: the client's.
        chunk: the event's data.

    Raises:
        ClientLeftError: the client has closed the stream.
    """
    await write(stream, event(chunk) + b"\n")


async def write(stream: web.StreamResponse, data: bytes) -> None:
    """Write to a stream.

    Args:
        stream: the client's.
        data: any part of an event.

    Raises:
        ClientLeftError: the client has closed the stream.
    """
    try:
        await stream.write(data)
    except ConnectionResetError as error:
        # aiohttp's class is also that of a server's broken connection.
        raise ClientLeftError(stream) from error
