"""Defines one exception for each gRPC status that SpectrumKV answers with.

Code raises these without importing gRPC; `common.rpc` turns them into statuses in one place. A message names what is
wrong, the value, and what to do.
"""

import math

# Of a value that an error quotes: a name of more characters says no more, and a status or a page shows it whole.
QUOTED_CHARACTERS = 100


class SpectrumKVError(Exception):
    """An error that is reported to the caller; `code` is the name of a `grpc.StatusCode`."""

    code = "INTERNAL"

    @property
    def message(self) -> str:
        """The sentence that the caller sees."""
        return str(self)


class InvalidArgumentError(SpectrumKVError):
    """The request is wrong, whatever state the service is in."""

    code = "INVALID_ARGUMENT"


class UnauthenticatedError(SpectrumKVError):
    """The caller did not show that it may call: it sent no bearer token, or one that is not accepted."""

    code = "UNAUTHENTICATED"


class PermissionDeniedError(SpectrumKVError):
    """The caller showed who it is, and may not call this."""

    code = "PERMISSION_DENIED"


class NotFoundError(SpectrumKVError):
    """The request names something that this service does not have, such as another model."""

    code = "NOT_FOUND"


class FailedPreconditionError(SpectrumKVError):
    """The two sides do not fit together; a retry fails as well until somebody changes one of them."""

    code = "FAILED_PRECONDITION"


class ContextTooShortError(FailedPreconditionError):
    """The model takes too few tokens to be calibrated or probed."""


class BasisMissingError(FailedPreconditionError):
    """The receiver lacks the codec basis that Begin names; the sender can send it (`PutBasis`) and try again."""


class ResourceExhaustedError(SpectrumKVError):
    """The service has no room at present.

    Args:
        message: what is full.
        retry_after_seconds: the seconds after which a retry makes sense, 0 or more; sent as `google.rpc.RetryInfo`.

    Raises:
        ValueError: the seconds are negative or not finite.
    """

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        if not 0 <= retry_after_seconds < math.inf:
            raise ValueError(f"retry_after_seconds is {retry_after_seconds}; allowed: 0 or more")
        self.retry_after_seconds = retry_after_seconds


class UnavailableError(SpectrumKVError):
    """A peer cannot be reached, or this process is shutting down.

    Args:
        message: which peer cannot be reached.
        retry_after_seconds: the seconds after which a retry makes sense; None if unknown. A process that shuts down
            in order names them, since another one is likely to take its place.
    """

    code = "UNAVAILABLE"

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class UnreachableError(UnavailableError):
    """The peer itself did not answer: there is no connection to it, or the connection was lost.

    This error is never sent over the network: the process that would send it is a peer that answers.
    """


class DroppedError(UnavailableError):
    """gRPC itself ended the call: the peer has too many waiting, lets go of the connection, or stops.

    This error is never sent over the network.
    """


class UnansweredError(UnavailableError):
    """The peer is connected, and did not answer this request in the time in which it should have.

    This error is never sent over the network.
    """


class UnimplementedError(SpectrumKVError):
    """This server does not serve the method, or serves it to no more callers."""

    code = "UNIMPLEMENTED"


class DataLossError(SpectrumKVError):
    """The KV arrived damaged, incomplete or twice.

    Args:
        message: what was found.
        reason: one word for the `reason` label of `spectrumkv_chunks_rejected_total`.
    """

    code = "DATA_LOSS"

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class DeadlineExceededError(SpectrumKVError):
    """The request's time ran out."""

    code = "DEADLINE_EXCEEDED"


class CancelledError(SpectrumKVError):
    """The caller cancelled the request or disconnected."""

    code = "CANCELLED"


class InternalError(SpectrumKVError):
    """A defect of SpectrumKV or of the machine."""

    code = "INTERNAL"


class NotFiniteError(InternalError):
    """The model computed something infinite or NaN: its weights, its dtype or the machine are at fault."""


def quoted(value: object) -> str:
    """Return a value as a message quotes it: whole where it is short, or else its beginning and its length.

    Args:
        value: what a caller sent, or a setting; text is quoted as Python writes it, so that control characters show.
    """
    text = value if isinstance(value, str) else repr(value)
    beginning = text[:QUOTED_CHARACTERS]
    if isinstance(value, str):
        beginning = repr(beginning)
    return beginning if len(text) <= QUOTED_CHARACTERS else f"{beginning}… ({len(text):,} characters)"
