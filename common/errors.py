"""One exception for each gRPC status that SpectrumKV answers with.

Code deep inside the project raises these without importing gRPC; `common.rpc` turns them into statuses in
one place. A message names what is wrong, the value, and what to do.
"""

import math


class SpectrumKVError(Exception):
    """An error that a caller is told about. `code` is the name of a `grpc.StatusCode`."""

    code = "INTERNAL"

    @property
    def message(self) -> str:
        """The sentence that the caller sees."""
        return str(self)


class InvalidArgumentError(SpectrumKVError):
    """The request is wrong whatever state the service is in."""

    code = "INVALID_ARGUMENT"


class UnauthenticatedError(SpectrumKVError):
    """The caller did not show that it may call: it sent no bearer token, or one that is not accepted."""

    code = "UNAUTHENTICATED"


class NotFoundError(SpectrumKVError):
    """The request names something that is not here, such as another model."""

    code = "NOT_FOUND"


class FailedPreconditionError(SpectrumKVError):
    """The two sides do not fit together; retrying changes nothing until somebody mends that."""

    code = "FAILED_PRECONDITION"


class BasisMissingError(FailedPreconditionError):
    """The receiver lacks the codec basis that Begin names; it can be sent one (`PutBasis`) and asked again."""


class ResourceExhaustedError(SpectrumKVError):
    """No room at present.

    Args:
        message: what is full.
        retry_after_seconds: when trying again makes sense, from 0 on; sent as `google.rpc.RetryInfo`.

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
        message: who is away.
        retry_after_seconds: named by a process that shuts down in order, since another one is likely to take its
            place; None where nobody can know.
    """

    code = "UNAVAILABLE"

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class UnreachableError(UnavailableError):
    """No word came from the peer itself: there is no connection to it, or it was lost.

    Never sent as such: to whom it is told, the one that tells it is a peer that answered.
    """


class UnimplementedError(SpectrumKVError):
    """This server does not serve that, or not to any more callers."""

    code = "UNIMPLEMENTED"


class DataLossError(SpectrumKVError):
    """KV arrived damaged, incomplete or twice.

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
    """The caller went away."""

    code = "CANCELLED"


class InternalError(SpectrumKVError):
    """A defect of ours or of the machine."""

    code = "INTERNAL"
