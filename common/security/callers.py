"""Who a caller is by its token and its certificate, and whether it may bring work."""

import ssl
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import grpc

from spectrumkv.common.errors import PermissionDeniedError

# What a caller is called that showed neither an accepted token nor a certificate.
ANONYMOUS = "anonymous"

# What a certificate names its holder by, as gRPC tells it. Whoever writes a URI or a mail address into a certificate
# chooses it more freely than a host's name, so that each counts as what it is; addresses of mail and hosts never do.
_NAMES, _URIS, _OTHERS = ("x509_common_name", "peer_dns"), ("peer_uri",), ("peer_email", "peer_ip")
URI_PREFIX = "URI:"
_CERTIFICATE = "x509_pem_cert"
# How the strings of a certificate may be encoded (X.680, section 41): one, two or four bytes for an ASCII character.
_ENCODINGS = ("utf-8", "utf-16-be", "utf-32-be")

# gRPC runs a call's interceptors and its handler in one context.
_token_name: ContextVar[str | None] = ContextVar("token_name", default=None)


def set_token_name(name: str) -> None:
    """Set the name of the token that the present call brought."""
    _token_name.set(name)


def caller_name(context: grpc.ServicerContext) -> str:
    """Return what logs call a caller: its token's name, else its certificate's first one, else "anonymous"."""
    return _token_name.get() or next(iter(names_of(context)), ANONYMOUS)


def names_of(context: grpc.ServicerContext) -> tuple[str, ...]:
    """Return the names of the certificate that a caller showed, its common name first; none where it showed none."""
    return _properties(context, (*_NAMES, *_URIS, *_OTHERS))


def _properties(context: grpc.ServicerContext, kinds: tuple[str, ...]) -> tuple[str, ...]:
    properties = context.auth_context()
    return tuple(name.decode("utf-8", "replace") for kind in kinds for name in properties.get(kind, ()))


def _is_cut_off(name: str, context: grpc.ServicerContext) -> bool:
    """Return whether a name in the caller's certificate goes on after a NUL, at which gRPC ends every name.

    An authority that signs whatever it is asked to could otherwise be made to vouch for any name (CVE-2009-2408).
    """
    certificates = [
        ssl.PEM_cert_to_DER_cert(pem.decode("ascii")) for pem in context.auth_context().get(_CERTIFICATE, ())
    ]
    longer = [f"{name}\0".encode(encoding) for encoding in _ENCODINGS]
    # In DER no string that ends is followed by a zero byte.
    return any(start in certificate for start in longer for certificate in certificates)


class AllowedCallers:
    """Accepts requests only from callers whose certificate has one of the allowed names.

    Args:
        names: common names, names of hosts, and URIs after `URI:`; with none, every caller may that the server lets
            connect.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._uris = {name.removeprefix(URI_PREFIX) for name in names if name.startswith(URI_PREFIX)}
        self._names = {name for name in names if not name.startswith(URI_PREFIX)}

    def check(self, context: grpc.ServicerContext) -> None:
        """Refuse a caller without such a name.

        Raises:
            PermissionDeniedError: it has none.
        """
        if not (self._names or self._uris):
            return
        matching = [name for name in _properties(context, _NAMES) if name in self._names]
        matching += [uri for uri in _properties(context, _URIS) if uri in self._uris]
        if all(_is_cut_off(name, context) for name in matching):
            shown = ", ".join(names_of(context)) or "none"
            raise PermissionDeniedError(
                f"this server takes no work from this caller (--tls-client-names); its certificate's names: {shown}"
            )

    def unary(self, behaviour: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[..., Any]:
        """Return a handler with one answer that checks its caller first."""

        def checked(requests: Any, context: grpc.ServicerContext) -> Any:
            self.check(context)
            return behaviour(requests, context)

        return checked

    def stream(self, behaviour: Callable[[Any, grpc.ServicerContext], Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Return a handler with a stream of answers that checks its caller first."""

        def checked(requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            self.check(context)
            yield from behaviour(requests, context)

        return checked
