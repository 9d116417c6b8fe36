"""Reads requests: checks what they ask for, fills in the defaults, and tokenizes their prompts."""

import concurrent.futures
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from spectrumkv.common.errors import CancelledError, InvalidArgumentError, NotFoundError, quoted
from spectrumkv.common.generation.conversation import allowed_tools
from spectrumkv.common.generation.params import MAX_LOGPROBS, SamplingParams
from spectrumkv.common.generation.prompt import PIECE_CHARACTERS, PromptReader, check_length
from spectrumkv.common.generation.structured.required_calls import required_calls
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.liveness.vitals import Vitals
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.rpc.channel import MAX_MESSAGE_BYTES
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.common.telemetry.request_log import check_request_id, current_request
from spectrumkv.common.tool_calls import format_of_template
from spectrumkv.prefill_server.progress import Progress
from spectrumkv.prefill_server.request import PrefillRequest
from spectrumkv.prefill_server.transfer import KvPlan
from spectrumkv.prefill_server.transfer.kv_map import check_detail
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import prefill_pb2

# Long prompts that are tokenized at once; short ones wait for none of them.
LONG_PROMPTS_AT_ONCE = 2
# What stop strings, bad words, a form and all else beside the prompt take at most.
OPTIONS_BYTES = 512 << 10
# What the log says of a tokenizer that hangs.
TOKENIZER = "the tokenizer"
# A limit on messages below this one would save little.
FEWEST_MESSAGE_BYTES = 1 << 20


class RequestReader:
    """Makes requests out of the messages that clients send; what is cheap to check is checked first.

    Args:
        loaded: the model.
        config: the service's options.
        verdict: how strongly KV may be coded where a request leaves that open.
        basis: of the model, for codecs that need one; None where there is none.
        vitals: have a pulse of the thread that tokenizes; where it stands still, the process ends.
    """

    def __init__(
        self, loaded: LoadedModel, config: PrefillConfig, verdict: ProbeVerdict, basis: Basis | None, vitals: Vitals
    ) -> None:
        self._vitals = vitals
        self._loaded = loaded
        self._config = config
        self._verdict = verdict
        self._basis = basis
        self._prompts = PromptReader(
            loaded.tokenizer, loaded.spec.vocab_size, loaded.context_length, config.allow_control_tokens
        )
        self._long_prompts = ThreadPoolExecutor(LONG_PROMPTS_AT_ONCE, thread_name_prefix="tokenizer")

    def read(self, message: prefill_pb2.GenerateRequest, progress: Progress, scope: RpcScope) -> PrefillRequest:
        """Check a request and fill in the defaults.

        Args:
            message: as the client sent it.
            progress: starts with the message's arrival.
            scope: of the request; tokenizing ends with it.

        Returns:
            The request, ready to be served.

        Raises:
            NotFoundError: the request names another model.
            InvalidArgumentError: request id, prompt, sampling or KV options are not usable.
            FailedPreconditionError: the codec needs a basis and there is none.
            CancelledError: the caller went away.
            DeadlineExceededError: the deadline passed.
        """
        check_request_id(message.request_id)
        request_id = message.request_id or uuid.uuid4().hex
        current_request().note(request_id=request_id)
        loaded = self._loaded
        self.check_model(message.model)
        params = SamplingParams.from_proto(message.sampling).with_seed()
        params = self._with_required_calls(params, message)
        assert params.seed is not None
        params.check_vocabulary(loaded.spec.vocab_size)
        if params.structured_output is not None:
            loaded.vocabulary.grammars.matcher(params.structured_output)
        plan = KvPlan.resolve(message.kv, self._config, self._verdict, params.seed, self._basis)
        token_ids = self._read_prompt(message, scope)
        if not message.sampling.HasField("max_tokens"):
            params = params.with_room(loaded.context_length - len(token_ids))
        check_length(len(token_ids), params.max_tokens, loaded.context_length)
        current_request().note(prompt_tokens=len(token_ids), policy=plan.policy.name)
        logprobs = message.prompt_logprobs if message.HasField("prompt_logprobs") else None
        if logprobs is not None and logprobs > MAX_LOGPROBS:
            raise InvalidArgumentError(f"prompt_logprobs is {logprobs}; allowed: at most {MAX_LOGPROBS}")
        check_detail(message.kv_map, loaded.geometry.layers, len(token_ids))
        return PrefillRequest(request_id, token_ids, params, plan, progress, message.echo, logprobs, message.kv_map)

    @property
    def most_message_bytes(self) -> int:
        """The most bytes of a message worth receiving: twice what a request can need, so that most are told why."""
        needed = 2 * (self._prompts.most_bytes + OPTIONS_BYTES)
        return min(max(needed, FEWEST_MESSAGE_BYTES), MAX_MESSAGE_BYTES)

    def tokenize(self, message: prefill_pb2.GenerateRequest, scope: RpcScope) -> list[int]:
        """Return the token ids that a request's prompt has.

        Args:
            message: the request, of which prompt and model are read.
            scope: of the call; tokenizing ends with it.

        Returns:
            The token ids, at least one.

        Raises:
            NotFoundError: the request names another model.
            SpectrumKVError: the prompt cannot be read, or the call's time is over.
        """
        self.check_model(message.model)
        return self._read_prompt(message, scope)

    def detokenize(self, message: prefill_pb2.DetokenizeRequest) -> prefill_pb2.DetokenizeResponse:
        """Return the text of token ids, of all together and of each by itself.

        Args:
            message: the token ids, no more than the model's context holds.

        Returns:
            The texts.

        Raises:
            NotFoundError: the request names another model.
            InvalidArgumentError: the ids are too many, or not of the model.
        """
        self.check_model(message.model)
        with self._vitals.working(TOKENIZER):
            text, each = self._prompts.text_of(message.token_ids)
        return prefill_pb2.DetokenizeResponse(text=text, token_texts=each)

    def check_model(self, name: str) -> None:
        """Refuse a request for a model that is not served here; no name is any model.

        Args:
            name: from the request.

        Raises:
            NotFoundError: another model is served.
        """
        if name and name != self._loaded.name:
            raise NotFoundError(
                f"model {quoted(name)} is not served here; this service has {quoted(self._loaded.name)}"
            )

    def _with_required_calls(self, params: SamplingParams, message: prefill_pb2.GenerateRequest) -> SamplingParams:
        """Return the parameters with the form of tool calls, where the request requires one.

        Raises:
            InvalidArgumentError: there is no such tool, or another form is asked for too.
        """
        chat = message.chat
        if chat.tool_choice != prefill_pb2.TOOL_CHOICE_REQUIRED:
            return params
        if params.structured_output is not None:
            raise InvalidArgumentError("a required tool call has a form of its own; leave out structured_output")
        tokenizer = self._loaded.tokenizer
        call_format = format_of_template(str(tokenizer.chat_template))
        return replace(params, structured_output=required_calls(allowed_tools(chat), call_format, tokenizer))

    def stop(self) -> None:
        """End the threads; call this when no request is left."""
        self._long_prompts.shutdown(wait=False)

    def _read_prompt(self, message: prefill_pb2.GenerateRequest, scope: RpcScope) -> list[int]:
        """Return the prompt's token ids.

        A long prompt waits until fewer than `LONG_PROMPTS_AT_ONCE` are read, and is left where its request ends.

        Raises:
            SpectrumKVError: the prompt cannot be read, or the request's time is over.
            CancelledError: the caller went away.
        """
        if message.ByteSize() <= PIECE_CHARACTERS:
            return self._tokenize(message, scope)
        reading = self._long_prompts.submit(self._tokenize, message, scope)
        scope.on_end(reading.cancel)
        try:
            return reading.result()
        except concurrent.futures.CancelledError:
            scope.check()
            raise CancelledError("the request ended before its prompt was read") from None

    def _tokenize(self, message: prefill_pb2.GenerateRequest, scope: RpcScope) -> list[int]:
        def check() -> None:
            self._vitals.beat()
            scope.check()

        with self._vitals.working(TOKENIZER):
            return self._prompts.read(message, check)
