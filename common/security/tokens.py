"""Checks the bearer tokens (RFC 6750) that a server accepts, and sends a caller's token. No token is ever logged."""

import hashlib
import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import grpc
from grpc_health.v1 import health

from spectrumkv.common.errors import InvalidArgumentError, UnauthenticatedError
from spectrumkv.common.security.callers import set_token_name
from spectrumkv.common.security.token_file import TOKEN_RULE, is_token, read_tokens
from spectrumkv.common.security.watched_files import WatchedFiles

TOKEN_VARIABLE = "SPECTRUMKV_TOKEN"  # noqa: S105  # the name of a variable
METADATA_KEY = "authorization"

_SCHEME = "bearer "
# Health checks need no token: load balancers and orchestrators have none, and learn no more than ready or not.
_OPEN_METHODS = f"/{health.SERVICE_NAME}/"


class AcceptedTokens:
    """The tokens that a server accepts, which are those that its file holds now.

    Args:
        path: the file, which is read again when it changes.

    Raises:
        InvalidArgumentError: the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        # Digests have one length, so that the time of a comparison does not tell a token's length either.
        self._names = WatchedFiles(
            [path], lambda: {_digest(one.token): one.name for one in read_tokens("--token-file", path)}
        )

    def name_of(self, presented: str) -> str | None:
        """Return an accepted token's name, or None, in a time that depends only on the number of accepted tokens."""
        digest = _digest(presented)
        found = None
        for accepted, name in self._names.current.items():
            found = name if hmac.compare_digest(accepted, digest) else found
        return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


class TokenInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc has no type information
    """Lets health checks and calls with an accepted token through; of other calls not even the request is read.

    Handlers find the token's name with `callers.caller_name`.

    Args:
        tokens: the accepted tokens.
    """

    def __init__(self, tokens: AcceptedTokens) -> None:
        self._tokens = tokens

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Return the handler that `continuation` finds, or a handler that refuses the call."""
        if handler_call_details.method.startswith(_OPEN_METHODS):
            return continuation(handler_call_details)
        refusal = self._refusal(handler_call_details.invocation_metadata)
        if refusal is None:
            return continuation(handler_call_details)
        # A streaming handler may end a call of any kind without waiting for its request.
        return grpc.stream_stream_rpc_method_handler(Refusal(refusal))

    def _refusal(self, metadata: Any) -> UnauthenticatedError | None:
        values = [value for key, value in metadata if key == METADATA_KEY]
        if len(values) != 1 or values[0][: len(_SCHEME)].lower() != _SCHEME:
            return UnauthenticatedError(
                f"this server asks for a bearer token; name its file with --token-file, or set {TOKEN_VARIABLE}"
            )
        name = self._tokens.name_of(values[0][len(_SCHEME) :].strip())
        if name is None:
            return UnauthenticatedError("this server does not accept the bearer token; is it an old one?")
        set_token_name(name)
        return None


@dataclass(frozen=True)
class Refusal:
    """A handler's behaviour that ends a call before any of its messages is read.

    Attributes:
        error: says why.
    """

    error: UnauthenticatedError

    def __call__(self, requests: Any, context: grpc.ServicerContext) -> NoReturn:
        """Refuse the call.

        Raises:
            UnauthenticatedError: always.
        """
        raise self.error


TokenSource = Callable[[], str]


def token_source(option: str, path: Path | None) -> TokenSource | None:
    """Find out where a caller's token comes from.

    Args:
        option: the flag that named the file, for the error.
        path: the file, which is read again when it changes; None takes the environment's SPECTRUMKV_TOKEN.

    Returns:
        A function that returns the token to send, which is the file's first one; None if there is no token.

    Raises:
        InvalidArgumentError: the file cannot be used, or the value of SPECTRUMKV_TOKEN is not a token.
    """
    if path is not None:
        watched = WatchedFiles([path], lambda: read_tokens(option, path)[0].token)
        return lambda: watched.current
    token = os.environ.get(TOKEN_VARIABLE, "")
    if token and not is_token(token):
        raise InvalidArgumentError(f"{TOKEN_VARIABLE} is not a token; allowed: {TOKEN_RULE}")
    return (lambda: token) if token else None


class _CallDetails(NamedTuple):
    """An implementation of `grpc.ClientCallDetails`, which grpc itself lacks."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class TokenSender(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """Sends a token with every call on a channel.

    Args:
        token: returns the token; it is called when a call starts.
    """

    def __init__(self, token: TokenSource) -> None:
        self._token = token

    def _send(self, continuation: Any, details: Any, request: Any) -> Any:
        added = (METADATA_KEY, f"Bearer {self._token()}")
        return continuation(
            _CallDetails(
                details.method,
                details.timeout,
                (*(details.metadata or ()), added),
                details.credentials,
                details.wait_for_ready,
                details.compression,
            ),
            request,
        )

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = intercept_stream_stream = _send
