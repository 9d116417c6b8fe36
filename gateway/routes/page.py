"""Serve the page at `/`, which needs no token, and its files below `/page/`."""

from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

router = APIRouter()

INDEX = "index.html"
MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# The page loads its own files and asks its own server, and nothing else; no other page may show it in a frame.
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Another release of the gateway has other files.
    "cache-control": "no-cache",
}


def _read_files() -> dict[str, bytes]:
    """Return the page's files by name."""
    folder = files("spectrumkv.gateway") / "page"
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.name.rpartition(".")[2] in MEDIA_TYPES}


_FILES = _read_files()


@router.get("/", include_in_schema=False)
async def index() -> Response:
    """Return the page."""
    return _response(INDEX)


@router.get("/page/{name}", include_in_schema=False)
async def file(name: str) -> Response:
    """Return a file of the page.

    Raises:
        HTTPException: there is no such file.
    """
    if name not in _FILES or name == INDEX:
        raise HTTPException(404)
    return _response(name)


def _response(name: str) -> Response:
    return Response(_FILES[name], media_type=MEDIA_TYPES[name.rpartition(".")[2]], headers=HEADERS)
