"""Serve `/tokenize` and `/detokenize`, as vLLM has them."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest

from spectrumkv.gateway.api.tokens import DetokenizeFields, TokenizeFields
from spectrumkv.gateway.gateway import caller_of, gateway_of
from spectrumkv.gateway.routes.body import documented_by, read_body

router = APIRouter()


@router.post("/tokenize", openapi_extra=documented_by(TokenizeFields))
async def tokenize(request: HttpRequest) -> dict[str, Any]:
    """Return the token ids of a prompt."""
    fields = await read_body(TokenizeFields, request)
    gateway, authorization = gateway_of(request), caller_of(request).authorization
    answer = await gateway.client.tokenize(fields.request(), authorization=authorization)
    ids = list(answer.token_ids)
    texts = await gateway.texts.of(ids, authorization) if fields.return_token_strs else {}
    return {
        "count": len(ids),
        "max_model_len": answer.context_length,
        "tokens": ids,
        "token_strs": [texts[one] for one in ids] if fields.return_token_strs else None,
    }


@router.post("/detokenize", openapi_extra=documented_by(DetokenizeFields))
async def detokenize(request: HttpRequest) -> dict[str, Any]:
    """Return the text of token ids."""
    fields = await read_body(DetokenizeFields, request)
    answer = await gateway_of(request).client.detokenize(
        fields.tokens, fields.model, authorization=caller_of(request).authorization
    )
    return {"prompt": answer.text}
