"""Which requests decode takes: what Begin asks for is compared with what this worker has, and slots are reserved."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.prompt import check_length
from spectrumkv.common.generation.sampling import Sampler
from spectrumkv.common.generation.text import TextStream
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.decode_server.bases import BasisStore
from spectrumkv.decode_server.kv_pool import KvPool
from spectrumkv.decode_server.request import DecodeRequest
from spectrumkv.v1 import decode_pb2, kv_pb2


@contextmanager
def admit(begin: decode_pb2.Begin, loaded: LoadedModel, pool: KvPool, bases: BasisStore) -> Iterator[DecodeRequest]:
    """Check Begin and hold slots for the request until the block ends.

    Args:
        begin: as it arrived.
        loaded: the model that this worker serves.
        pool: has the slots.
        bases: the codec bases that prefill workers sent.

    Yields:
        The request.

    Raises:
        FailedPreconditionError: prefill serves another model, has the codec in another version, or the request needs
            more slots than there are.
        BasisMissingError: prefill has not sent the codec's basis.
        InvalidArgumentError: no worker could serve the request.
        ResourceExhaustedError: the request needs more slots than are free.
    """
    check_same_model(loaded.spec, ModelSpec.from_proto(begin.model))
    check_same_codec(begin.codec)
    if not begin.prompt_token_ids:
        raise InvalidArgumentError("Begin has no prompt tokens")
    check_token_id("Begin has", max(begin.prompt_token_ids), loaded.spec.vocab_size)
    codec = codecs.get(begin.codec.name)
    params = SamplingParams.from_proto(begin.sampling)
    check_length(len(begin.prompt_token_ids), params.max_tokens, loaded.context_length)
    with (
        bases.hold(begin.codec.basis_digest) if codec.needs_basis else nullcontext() as basis,
        pool.reserve(len(begin.prompt_token_ids) + params.max_tokens) as allocation,
    ):
        yield DecodeRequest(
            request_id=begin.request_id,
            prompt_token_ids=begin.prompt_token_ids,
            allocation=allocation,
            decoder=codec.decoder(loaded.geometry, basis),
            sampler=Sampler(params, begin.prompt_token_ids),
            text=TextStream(loaded.tokenizer, params, loaded.eos_token_ids, begin.prompt_token_ids),
        )


def check_same_model(mine: ModelSpec, theirs: ModelSpec) -> None:
    """Check that both sides serve the same model.

    Raises:
        FailedPreconditionError: they do not; the message names each field and both values.
    """
    differences = mine.differences(theirs)
    if differences:
        listed = "; ".join(f"{one.field} is {one.mine} on decode and {one.theirs} on prefill" for one in differences)
        raise FailedPreconditionError(f"prefill and decode serve different models: {listed}")


def check_same_codec(theirs: kv_pb2.CodecId) -> None:
    """Check that decode has prefill's codec, at prefill's version.

    Raises:
        FailedPreconditionError: it does not.
    """
    if theirs.name not in codecs.names():
        raise FailedPreconditionError(
            f"prefill sends codec {theirs.name!r}, unknown to decode, which has {', '.join(codecs)}"
        )
    mine = codecs.get(theirs.name).version
    if theirs.version != mine:
        raise FailedPreconditionError(
            f"codec {theirs.name!r}: decode has version {mine}, prefill {theirs.version}; "
            "run the same release on both"
        )


def check_token_id(who: str, token_id: int, vocab_size: int) -> None:
    """Check that the model has a token: on a GPU, one that it does not have would end the process.

    Raises:
        InvalidArgumentError: the model does not have it.
    """
    if token_id >= vocab_size:
        raise InvalidArgumentError(f"{who} token id {token_id}; the vocabulary has {vocab_size}")
