"""Has SpectrumKV's own decode service go on from a prompt that a vLLM server computed.

The messages of a transfer are those of a Decode stream but for their first and last one, so that chunks pass through
as they are: nothing is decoded here.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from spectrumkv.common.errors import BasisMissingError, FailedPreconditionError
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.kv.codecs.base import parse_basis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.model.load import named_dtype
from spectrumkv.common.rpc.decode_methods import ask_for_basis, begin_basis, decode_info_method, open_decode_stream
from spectrumkv.common.rpc.decode_protocol import expect_admitted, tokens_and_finished
from spectrumkv.common.rpc.decode_stream import Request
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.common.rpc.transfer_methods import begin_fetch, chunks_until_end, expect_header, get_basis
from spectrumkv.v1 import decode_pb2, generation_pb2, kv_pb2, transfer_pb2


@dataclass(frozen=True)
class HandedOut:
    """A prompt that a vLLM server computed.

    Attributes:
        transfer_id: names the transfer of its KV.
        request_id: of the request.
        prompt_token_ids: of the prompt.
        first_token_id: that prefill sampled.
        sampling: of the rest; its seed is drawn where it has none.
    """

    transfer_id: str
    request_id: str
    prompt_token_ids: list[int]
    first_token_id: int
    sampling: SamplingParams


class BridgedDecode:
    """Generates on a decode service from KV that a vLLM server hands out; `cancel` ends it from another thread.

    Args:
        handed_out: the prompt.
        producer: channel to the vLLM server's connector, which holds all KV heads.
        decode: channel to the decode service.
        timeout: seconds that all of it may take.
    """

    def __init__(self, handed_out: HandedOut, producer: grpc.Channel, decode: grpc.Channel, timeout: float) -> None:
        self._handed_out, self._timeout = handed_out, timeout
        self._producer, self._decode = producer, decode
        self._lock = threading.Lock()
        self._calls: list[Any] = []
        self._cancelled = False

    def cancel(self) -> None:
        """End both calls; `tokens` raises CancelledError if it has not ended."""
        with self._lock:
            self._cancelled = True
            for call in self._calls:
                call.cancel()

    def tokens(self) -> Iterator[generation_pb2.Token]:
        """Generate.

        Yields:
            The tokens after the first one.

        Raises:
            SpectrumKVError: one side refuses, or some of the KV or of the tokens did not come as it was sent.
        """
        handed_out, producer, decode, timeout = self._handed_out, self._producer, self._decode, self._timeout
        try:
            info = decode_info_method(decode)(decode_pb2.DecodeServiceGetServerInfoRequest(), timeout=timeout)
            fetch = self._begun(begin_fetch(producer, _fetch_request(handed_out, info), timeout))
            header = expect_header(fetch)
            _check_heads(header, info.model)
            if header.codec.basis_digest:
                _give_basis(header.codec, info.model, producer, decode, timeout)
            begin = decode_pb2.Begin(
                request_id=handed_out.request_id,
                model=info.model,
                codec=header.codec,
                prompt_token_ids=handed_out.prompt_token_ids,
                sampling=handed_out.sampling.with_seed().to_proto(),
            )
            stream = _stream(begin, fetch, handed_out.first_token_id)
            call = self._begun(open_decode_stream(decode)(stream, timeout=timeout))
            expect_admitted(call)
            for response in tokens_and_finished(call, info.model.vocab_size):
                if response.WhichOneof("message") == "token":
                    yield response.token
        except grpc.RpcError as error:
            failure = error_from_rpc(error)
            raise failure from None
        finally:
            self.cancel()

    def _begun(self, call: Any) -> Any:
        with self._lock:
            self._calls.append(call)
            if self._cancelled:
                call.cancel()
        return call


def _fetch_request(
    handed_out: HandedOut, info: decode_pb2.DecodeServiceGetServerInfoResponse
) -> transfer_pb2.FetchRequest:
    return transfer_pb2.FetchRequest(
        transfer_id=handed_out.transfer_id,
        request_id=handed_out.request_id,
        model=info.model,
        codecs=info.codecs,
        rank=0,
        ranks=1,
    )


def _check_heads(header: transfer_pb2.TransferHeader, model: kv_pb2.ModelSpec) -> None:
    """Refuse a stream that holds a part of the heads: a Decode stream has them all.

    Raises:
        FailedPreconditionError: it does.
    """
    if (header.first_head, header.end_head) != (0, model.kv_heads):
        raise FailedPreconditionError(
            f"the transfer holds KV heads {header.first_head} to {header.end_head - 1} of {model.kv_heads}; a decode "
            "service takes KV from one vLLM rank, so serve prefill without tensor parallelism"
        )


def _give_basis(
    codec: kv_pb2.CodecId, model: kv_pb2.ModelSpec, producer: grpc.Channel, decode: grpc.Channel, timeout: float
) -> None:
    """Send decode the basis that the producer codes in, unless it is there."""
    geometry = KvGeometry(model.layers, model.kv_heads, model.head_dim, named_dtype(model.dtype))
    data = b"".join(piece.part for piece in get_basis(producer, codec.basis_digest, timeout))
    basis = parse_basis(data, geometry)
    try:
        ask_for_basis(decode, basis, timeout).result()
    except grpc.RpcError as error:
        refusal = error_from_rpc(error)
        if not isinstance(refusal, BasisMissingError):
            raise refusal from None
        begin_basis(decode, basis, timeout)[0].result()


def _stream(begin: decode_pb2.Begin, fetch: Any, first_token_id: int) -> Iterator[Request]:
    """Make a Decode stream of a transfer's messages.

    Yields:
        Begin, the chunks, End.

    Raises:
        DataLossError: the transfer is damaged or incomplete.
    """
    yield decode_pb2.DecodeRequest(begin=begin)
    for message in chunks_until_end(fetch):
        if isinstance(message, KvChunk):
            yield message
            continue
        end = message.end
        yield decode_pb2.DecodeRequest(
            end=decode_pb2.End(
                first_token_id=first_token_id, chunks=end.chunks, payload_bytes=end.payload_bytes, digest=end.digest
            )
        )
