"""Serve `/v1/completions` and `/v1/chat/completions`."""

from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from spectrumkv.client.request import Prompt, Request, Sampling
from spectrumkv.client.tools import Tools
from spectrumkv.gateway.answers.chat import ChatWriter
from spectrumkv.gateway.answers.completion import CompletionWriter
from spectrumkv.gateway.answers.writer import AnswerOptions, AnswerWriter
from spectrumkv.gateway.api.chat import ChatFields
from spectrumkv.gateway.api.completion import CompletionFields
from spectrumkv.gateway.api.sampling import SamplingFields
from spectrumkv.gateway.gateway import caller_of, gateway_of
from spectrumkv.gateway.routes.body import documented_by, read_body

router = APIRouter()


@router.post("/v1/completions", openapi_extra=documented_by(CompletionFields))
async def completions(request: HttpRequest) -> Response:
    """Return completions of prompts."""
    fields = await read_body(CompletionFields, request)
    sampling = fields.sampling()
    options = _options(fields, sampling)
    requests = _requests(fields, sampling, options, fields.prompts, request)
    writer = await _writer(CompletionWriter, fields, request, options)
    return await gateway_of(request).answer(fields, requests, writer, caller_of(request))


@router.post("/v1/chat/completions", openapi_extra=documented_by(ChatFields))
async def chat_completions(request: HttpRequest) -> Response:
    """Return the answer in a conversation."""
    fields = await read_body(ChatFields, request)
    sampling = fields.sampling()
    options = _options(fields, sampling)
    requests = _requests(fields, sampling, options, [fields.prompt()], request)
    gateway = gateway_of(request)
    if fields.offered_tools.may_be_called:
        options = replace(options, call_format=await gateway.tool_call_format(caller_of(request)))
    writer = await _writer(ChatWriter, fields, request, options)
    return await gateway.answer(fields, requests, writer, caller_of(request))


def _requests(
    fields: CompletionFields | ChatFields,
    sampling: Sampling,
    options: AnswerOptions,
    prompts: Sequence[Prompt],
    request: HttpRequest,
) -> list[Request]:
    """Return a request to prefill for each prompt; several have the HTTP request's id with their place."""
    kv = fields.kv_choice()
    echoed_logprobs = sampling.logprobs if options.echo else None
    name = _name(fields, request)
    ids = [name] if len(prompts) == 1 else [f"{name}-{place}" for place in range(len(prompts))]
    return [
        Request(
            prompt=prompt,
            sampling=sampling,
            kv=kv,
            model=fields.model,
            request_id=one,
            # A map goes with the texts of its tokens.
            echo=options.echo or fields.map_detail is not None,
            prompt_logprobs=fields.prompt_logprobs if options.prompt_logprobs else echoed_logprobs,
            kv_map=fields.map_detail,
            tools=fields.offered_tools if isinstance(fields, ChatFields) else Tools(),
        )
        for prompt, one in zip(prompts, ids, strict=True)
    ]


async def _writer(
    kind: type[AnswerWriter], fields: CompletionFields | ChatFields, request: HttpRequest, options: AnswerOptions
) -> AnswerWriter:
    gateway, caller = gateway_of(request), caller_of(request)
    model = await gateway.served_model(fields.model, caller)
    return kind(_name(fields, request), model, gateway.texts, caller.authorization, options)


def _options(fields: CompletionFields | ChatFields, sampling: Sampling) -> AnswerOptions:
    """Return what the choices of the answer have."""
    return AnswerOptions(
        answers=fields.answers,
        echo=isinstance(fields, CompletionFields) and bool(fields.echo),
        logprobs=sampling.logprobs is not None,
        prompt_logprobs=fields.prompt_logprobs is not None,
        token_ids=bool(fields.return_token_ids),
        tokens_as_ids=bool(fields.return_tokens_as_token_ids),
    )


def _name(fields: SamplingFields, request: HttpRequest) -> str:
    return fields.request_id or caller_of(request).request_id
