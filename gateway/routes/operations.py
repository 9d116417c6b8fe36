"""Serve `/health` and `/metrics`, which need no token."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from spectrumkv.common.errors import UnavailableError
from spectrumkv.gateway.gateway import gateway_of

router = APIRouter()
# How long prefill may take to say whether it is ready.
HEALTH_SECONDS = 5.0


@router.get("/health")
async def health(request: HttpRequest) -> Response:
    """Return 200 where a prefill service is ready.

    Raises:
        UnavailableError: none is.
    """
    if not await gateway_of(request).client.is_serving(HEALTH_SECONDS):
        raise UnavailableError("prefill is not ready; ask again later", 1.0)
    return Response()


@router.get("/metrics")
async def metrics(request: HttpRequest) -> Response:
    """Return what Prometheus reads."""
    text = generate_latest(gateway_of(request).metrics.registry)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})
