"""Read what an HTTP request says of its caller: which id and trace the request has, and with which token it comes."""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from spectrumkv.common.errors import UnauthenticatedError
from spectrumkv.common.security.tokens import METADATA_KEY, AcceptedTokens
from spectrumkv.common.telemetry.request_log import check_request_id
from spectrumkv.common.telemetry.tracing import TraceContext

REQUEST_ID = "x-request-id"
ANONYMOUS = "anonymous"
# Of the value of the header; a call to prefill has room for little more.
MAX_AUTHORIZATION_CHARACTERS = 1024

_SCHEME = "bearer "


@dataclass(frozen=True)
class Caller:
    """Hold what the services are told of a caller.

    Attributes:
        request_id: the caller's own, or one that is drawn here.
        trace: the trace that the request is part of.
        authorization: the header that calls to prefill bring; None leaves it to the gateway's own token.
        name: of its token where the gateway checks tokens, else "anonymous".
    """

    request_id: str
    trace: TraceContext
    authorization: str | None = None
    name: str = ANONYMOUS


class Credentials:
    """Decide with which authority a request goes on to prefill.

    Args:
        accepted: the tokens that the gateway accepts; None passes on what callers bring, and prefill checks it.
    """

    def __init__(self, accepted: AcceptedTokens | None) -> None:
        self._accepted = accepted

    def identify(self, headers: Iterable[tuple[bytes, bytes]], is_open: bool) -> Caller:
        """Return a request's caller.

        Args:
            headers: of the request, with names in lower case.
            is_open: whether the request needs no token.

        Returns:
            The caller.

        Raises:
            UnauthenticatedError: there is no token, several, or one that is not accepted.
            InvalidArgumentError: the request id cannot stand in a log.
        """
        pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
        request_id = next((value for name, value in pairs if name == REQUEST_ID), "")
        check_request_id(request_id)
        authorization, name = None, ANONYMOUS
        if not is_open:
            authorization, name = self._authority([value for name, value in pairs if name == METADATA_KEY])
        trace = TraceContext.from_metadata(pairs)
        return Caller(request_id or uuid.uuid4().hex, trace, authorization, name)

    def _authority(self, values: list[str]) -> tuple[str | None, str]:
        """Return the header for prefill and the caller's name.

        Raises:
            UnauthenticatedError: there is no token, several, or one that is not accepted.
        """
        if len(values) > 1 or any(not _is_sendable(value) for value in values):
            raise UnauthenticatedError("the Authorization header is no bearer token; send one, as 'Bearer TOKEN'")
        if self._accepted is None:
            return (values[0], ANONYMOUS) if values else (None, ANONYMOUS)
        if not values or values[0][: len(_SCHEME)].lower() != _SCHEME:
            raise UnauthenticatedError("this server asks for a bearer token; send it as the API key")
        name = self._accepted.name_of(values[0][len(_SCHEME) :].strip())
        if name is None:
            raise UnauthenticatedError("this server does not accept the bearer token; is it an old one?")
        return None, name


def _is_sendable(value: str) -> bool:
    return len(value) <= MAX_AUTHORIZATION_CHARACTERS and value.isascii() and value.isprintable()
