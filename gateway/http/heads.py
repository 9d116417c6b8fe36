"""Refuse requests by their heads: too long, of two lengths, of a packed body, or sent by a page of another origin.

h11 has taken the head apart by then; it lets through what this module refuses.
"""

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from spectrumkv.common.errors import quoted
from spectrumkv.gateway.api.errors import HttpError

# Of a request's line and headers together. h11 itself bounds only those that come in several pieces.
MAX_HEAD_BYTES = 16 << 10
# Of a body that is sent as it is.
_PLAIN = (b"", b"identity")
# Methods that change nothing, and which pages may therefore use.
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_CLOSE = {"Connection": "close"}


class Heads:
    """Check the heads of one gateway's requests.

    Args:
        origins: whose pages may call, besides the gateway's own.
    """

    def __init__(self, origins: frozenset[str]) -> None:
        self._origins = origins

    def check(self, scope: MutableMapping[str, Any]) -> None:
        """Refuse a request that should not be read any further.

        Args:
            scope: of the request, as ASGI has it.

        Raises:
            HttpError: it should not.
        """
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = len(scope["raw_path"]) + len(scope["query_string"])
        if size + sum(len(name) + len(value) for name, value in headers) > MAX_HEAD_BYTES:
            error = too_long()
            raise error
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
            # A proxy may have read the other one, and taken the rest for a request of its own.
            said = "the request has both Content-Length and Transfer-Encoding; send one of them"
            raise HttpError(400, said, headers=_CLOSE)
        for encoding in _values(headers, b"content-encoding"):
            if encoding.strip().lower() not in _PLAIN:
                said = f"Content-Encoding is {quoted(encoding.decode('latin-1'))}; send the body as it is"
                raise HttpError(415, said)
        if scope["method"] not in _SAFE:
            self._check_origin(headers)

    def _check_origin(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Refuse what another site has a browser send: browsers ask first only for requests that say they are JSON.

        Raises:
            HttpError: another site's page sent it.
        """
        origin = next(_values(headers, b"origin"), b"").decode("latin-1")
        if not origin or origin in self._origins:
            return
        # Browsers say this to servers that they trust; a proxy may have changed Host.
        site = next(_values(headers, b"sec-fetch-site"), b"")
        host = next(_values(headers, b"host"), b"").decode("latin-1")
        if site not in (b"same-origin", b"none") and (site or _host_of(origin) != host.lower()):
            raise HttpError(
                403,
                f"a page of {quoted(origin)} may not call this server; name its origin in --cors-origins",
                "permission_error",
            )


def too_long() -> HttpError:
    """Return the error of a head that is too long."""
    said = f"the headers are longer than {MAX_HEAD_BYTES} bytes, all that is read; send shorter ones"
    return HttpError(431, said, headers=_CLOSE)


def _values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> Iterator[bytes]:
    return (value for one, value in headers if one == name)


def _host_of(origin: str) -> str:
    """Return the host and port that an origin names; "" where it names none, as "null"."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
