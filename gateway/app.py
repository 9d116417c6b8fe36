"""Put the routes together, the exchange around them, and what browsers of other origins may do."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from spectrumkv.common.errors import InternalError, SpectrumKVError
from spectrumkv.common.security.tokens import AcceptedTokens
from spectrumkv.gateway.api.errors import HttpError
from spectrumkv.gateway.caller import REQUEST_ID, Credentials
from spectrumkv.gateway.config import GatewayConfig
from spectrumkv.gateway.gateway import Gateway
from spectrumkv.gateway.http.exchange import App, Exchange
from spectrumkv.gateway.http.heads import Heads
from spectrumkv.gateway.metrics import GatewayMetrics
from spectrumkv.gateway.routes import ROUTERS


def make_app(config: GatewayConfig, metrics: GatewayMetrics) -> App:
    """Return the gateway as an ASGI application.

    Args:
        config: the options.
        metrics: of the process.

    Returns:
        The application, which connects to prefill when its life begins.

    Raises:
        InvalidArgumentError: a file of certificates or tokens cannot be used.
    """

    @asynccontextmanager
    async def connected(app: FastAPI) -> AsyncIterator[None]:
        app.state.gateway = Gateway.connected(config, metrics)
        try:
            yield
        finally:
            await app.state.gateway.close()

    app = FastAPI(title="SpectrumKV", lifespan=connected, docs_url=None, redoc_url=None, redirect_slashes=False)
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(SpectrumKVError, _known)
    app.add_exception_handler(HttpError, _known)
    app.add_exception_handler(ValidationError, _known)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _defect)
    if config.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", REQUEST_ID, "traceparent", "tracestate"],
            expose_headers=[REQUEST_ID, "retry-after"],
        )
    metrics.show_files(config)
    accepted = AcceptedTokens(Path(config.token_file)) if config.token_file is not None else None
    return Exchange(
        app, Credentials(accepted), metrics, Heads(frozenset(config.origins)), config.max_requests, config.max_body
    )


async def _known(request: HttpRequest, error: Exception) -> Response:
    """Return the answer that names what is wrong."""
    if isinstance(error, ValidationError):
        found = HttpError.of_body(error)
    elif isinstance(error, SpectrumKVError):
        found = HttpError.of(error)
    else:
        found = error if isinstance(error, HttpError) else HttpError.of(InternalError(type(error).__name__))
    return JSONResponse(found.body, found.status, found.headers)


async def _defect(request: HttpRequest, error: Exception) -> Response:
    """Return the answer to a request that met a defect; the exchange logs it."""
    found = HttpError.of(InternalError(f"the gateway failed ({type(error).__name__}); its log has more"))
    return JSONResponse(found.body, found.status)


async def _no_route(request: HttpRequest, error: Exception) -> Response:
    """Return the answer to a request for a path or a method that there is none of."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict((error.headers if isinstance(error, HTTPException) else None) or {})
    what = f"{request.method[:20]} {request.url.path[:80]}"
    said = f"there is no {what} here; docs/gateway.md lists the routes, /openapi.json has them for programs"
    return JSONResponse(HttpError(status, said, "not_found_error").body, status, headers)
