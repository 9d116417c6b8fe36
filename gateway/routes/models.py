"""Serve `/v1/models`."""

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest

from spectrumkv.common.errors import quoted
from spectrumkv.gateway.api.errors import HttpError
from spectrumkv.gateway.gateway import caller_of, gateway_of

router = APIRouter()
# Nothing says when a model was made; the API wants a time all the same.
_STARTED = int(time.time())


@router.get("/v1/models")
async def models(request: HttpRequest) -> dict[str, Any]:
    """Return the one model that is served, as a list."""
    return {"object": "list", "data": [await _model(request)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: HttpRequest) -> dict[str, Any]:
    """Return what is known of the model that is served.

    Raises:
        HttpError: the name is another.
    """
    served = await _model(request)
    if name != served["id"]:
        raise HttpError(
            404,
            f"model {quoted(name)} is not served here; this server has {quoted(served['id'])}",
            "not_found_error",
            code="model_not_found",
        )
    return served


async def _model(request: HttpRequest) -> dict[str, Any]:
    info = await gateway_of(request).client.server_info(authorization=caller_of(request).authorization)
    return {
        "id": info.model_name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "spectrumkv",
        "max_model_len": info.model.context_length,
    }
