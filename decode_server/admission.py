"""Which requests decode takes: what Begin asks for is compared with what this worker has, and slots are reserved."""

import queue
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError, SpectrumKVError, quoted
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.prompt import check_length
from spectrumkv.common.generation.sampling import Sampler
from spectrumkv.common.generation.text import TextStream
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.decode_server.bases import BasisStore
from spectrumkv.decode_server.kv_pool import KvPool
from spectrumkv.decode_server.request import DecodeAnswer, DecodeRequest, GeneratedToken
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
    outcomes: queue.SimpleQueue[GeneratedToken | SpectrumKVError] = queue.SimpleQueue()
    with (
        bases.hold(begin.codec.basis_digest) if codec.needs_basis else nullcontext() as basis,
        ExitStack() as held,
    ):
        allocations = pool.reserve_each(params.n, len(begin.prompt_token_ids) + params.max_tokens)
        for allocation in allocations:
            held.enter_context(allocation)
        answers = tuple(
            DecodeAnswer(
                index=index,
                prompt_token_ids=begin.prompt_token_ids,
                allocation=allocation,
                sampler=Sampler(of_answer, begin.prompt_token_ids, loaded.vocabulary),
                text=TextStream(loaded.tokenizer, of_answer, loaded.eos_token_ids, begin.prompt_token_ids),
                outcomes=outcomes,
            )
            for index, (of_answer, allocation) in enumerate(zip(params.answers(), allocations, strict=True))
        )
        yield DecodeRequest(decoder=codec.decoder(loaded.geometry, basis), answers=answers)


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
            f"prefill sends codec {quoted(theirs.name)}, unknown to decode, which has {', '.join(codecs)}"
        )
    mine = codecs.get(theirs.name).version
    if theirs.version != mine:
        raise FailedPreconditionError(
            f"codec {quoted(theirs.name)}: decode has version {mine}, prefill {theirs.version}; "
            "run the same release on both"
        )


def first_tokens(end: decode_pb2.End) -> list[decode_pb2.FirstToken]:
    """Return the token of each answer that prefill sampled."""
    return [decode_pb2.FirstToken(token_id=end.first_token_id, finished=end.finished), *end.other_first_tokens]


def check_first_tokens(first: Sequence[decode_pb2.FirstToken], answers: int, vocab_size: int) -> None:
    """Check that End has a token of the model for each answer.

    Raises:
        InvalidArgumentError: it has another number of them, or one that the model does not have.
    """
    if len(first) != answers:
        raise InvalidArgumentError(f"End has {len(first)} first tokens; the request has {answers} answers")
    for one in first:
        check_token_id("End has the first", one.token_id, vocab_size)


def check_token_id(who: str, token_id: int, vocab_size: int) -> None:
    """Check that the model has a token: on a GPU, one that it does not have would end the process.

    Raises:
        InvalidArgumentError: the model does not have it.
    """
    if token_id >= vocab_size:
        raise InvalidArgumentError(f"{who} token id {token_id}; the vocabulary has {vocab_size}")
