"""Read the bodies of requests."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from spectrumkv.gateway.api.fields import RequestFields

# Longer bodies are read on a thread, one at a time: the streams of others go on meanwhile, and only one of them takes
# several times its length for its parts.
LARGE_BYTES = 64 << 10

Fields = TypeVar("Fields", bound=RequestFields)

_reader = ThreadPoolExecutor(1, thread_name_prefix="large-body")


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
    body = await request.body()
    if len(body) <= LARGE_BYTES:
        return kind.read(body)
    return await asyncio.get_running_loop().run_in_executor(_reader, kind.read, body)


def documented_by(kind: type[RequestFields]) -> dict[str, Any]:
    """Return what `/openapi.json` says of a route whose body `read_body` reads."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
