"""Read the bodies of requests."""

from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from spectrumkv.gateway.api.fields import RequestFields

Fields = TypeVar("Fields", bound=RequestFields)


async def read_body(kind: type[Fields], request: HttpRequest) -> Fields:
    """Return the fields of a request's body.

    Args:
        kind: the fields that the route has.
        request: the HTTP request.

    Returns:
        The fields, checked.

    Raises:
        pydantic.ValidationError: the body is no JSON object with these fields.
    """
    return kind.model_validate_json(await request.body())


def documented_by(kind: type[RequestFields]) -> dict[str, Any]:
    """Return what `/openapi.json` says of a route whose body `read_body` reads."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
