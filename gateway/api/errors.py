"""Turn errors into the OpenAI API's form with the right HTTP status."""

import math
import reprlib
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from spectrumkv.common.errors import (
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    SpectrumKVError,
    UnauthenticatedError,
    UnavailableError,
)
from spectrumkv.gateway.api.fields import FieldError

# nginx's status for a caller that went away before its answer; logs and metrics have it, nobody receives it.
CLIENT_CLOSED_REQUEST = 499

# Status, `type` and `code` of the OpenAI API for each error.
_FORMS: dict[type[SpectrumKVError], tuple[int, str, str | None]] = {
    InvalidArgumentError: (400, "invalid_request_error", None),
    FailedPreconditionError: (400, "invalid_request_error", "failed_precondition"),
    UnauthenticatedError: (401, "authentication_error", "invalid_api_key"),
    PermissionDeniedError: (403, "permission_error", None),
    NotFoundError: (404, "not_found_error", "model_not_found"),
    DeadlineExceededError: (408, "timeout_error", "deadline_exceeded"),
    ResourceExhaustedError: (429, "rate_limit_error", "no_room"),
    CancelledError: (CLIENT_CLOSED_REQUEST, "cancelled_error", None),
    UnavailableError: (503, "service_unavailable_error", None),
}
_OTHER = (500, "server_error", None)


@dataclass(eq=False)
class HttpError(Exception):
    """Hold an error as HTTP callers see it. It is not frozen: whoever catches an exception sets its traceback.

    Attributes:
        status: of HTTP.
        message: one sentence.
        kind: the OpenAI API's `type`.
        param: the field that is at fault; None where none is.
        code: the OpenAI API's `code`, which programs compare.
        headers: beside the usual ones.
    """

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: SpectrumKVError) -> "HttpError":
        """Return what an error of the services or the client is to an HTTP caller."""
        known = next((form for kind, form in _FORMS.items() if isinstance(error, kind)), _OTHER)
        status, kind, code = known
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        delay = error.retry_after_seconds if isinstance(error, ResourceExhaustedError | UnavailableError) else None
        if delay is not None:
            headers["Retry-After"] = str(max(1, math.ceil(delay)))
        return cls(status, error.message, kind, code=code, headers=headers)

    @classmethod
    def of_body(cls, error: ValidationError) -> "HttpError":
        """Return what is wrong with a request's body: the first thing that pydantic found, in a sentence."""
        found = error.errors(include_url=False)[0]
        # Members of a union stand in the place, too: "str", "list[str]".
        parts = (part[:80] for part in map(str, found["loc"]) if part != "str" and not part.endswith("]"))
        place = ".".join(parts)
        context = found.get("ctx", {})
        said_by_us = context.get("error")
        if isinstance(said_by_us, FieldError):
            param = ".".join(filter(None, (place, said_by_us.param)))
            return cls(400, said_by_us.message, param=param or None)
        said = found["msg"][:1].lower() + found["msg"][1:]
        if found["type"] == "json_invalid":
            return cls(400, f"the body is no JSON: {context.get('error', said)}; send one JSON object in UTF-8")
        if found["type"] == "missing":
            return cls(400, f"{place} is missing; it must be given", param=place)
        return cls(400, f"{place or 'the body'} is {reprlib.repr(found['input'])}; {said}", param=place or None)

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer, or the data of the event that ends a stream."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
