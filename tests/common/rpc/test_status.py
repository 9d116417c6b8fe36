import logging
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import pytest
from google.rpc import code_pb2, status_pb2

from spectrumkv.common import errors
from spectrumkv.common.errors import (
    BasisMissingError,
    DataLossError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SpectrumKVError,
)
from spectrumkv.common.rpc.channel import MAX_MESSAGE_BYTES, open_channel
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.rpc.status import MAX_STATUS_MESSAGE_BYTES, error_from_rpc, to_status
from spectrumkv.v1 import prefill_pb2, prefill_pb2_grpc
from tests.common.rpc.scripted import WAIT_SECONDS, response, served, wait

SENTENCE = "budget is 2; allowed: from 0.05 to 1 – “so” it is"
ERRORS = [
    error
    for error in vars(errors).values()
    if isinstance(error, type)
    and issubclass(error, SpectrumKVError)
    and error is not SpectrumKVError
    # A caller learns of a missing method by a sentence: see the test of unmapped statuses.
    and error is not errors.UnimplementedError
    # No peer says that it could not be reached.
    and error is not errors.UnreachableError
    # These are told apart within a process; a peer learns of the kind that they are of.
    and error not in (errors.ContextTooShortError, errors.DroppedError, errors.NotFiniteError, errors.UnansweredError)
]
EXTRA = {ResourceExhaustedError: (2.5,), DataLossError: ("crc",)}


def raising(error):
    def handler(request, context):
        yield response()
        raise error

    return handler


def raising_unary(error):
    def handler(request, context):
        raise error

    return handler


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_crosses_a_stream_and_comes_back_as_itself(kind):
    with served(raising(kind(SENTENCE, *EXTRA.get(kind, ())))) as server:
        with pytest.raises(grpc.RpcError) as caught:
            list(server.generate())
        assert caught.value.code() is getattr(grpc.StatusCode, kind.code)
        assert caught.value.details() == SENTENCE
        back = error_from_rpc(caught.value)
        assert type(back) is kind
        assert back.message == SENTENCE
        assert server.code() == kind.code


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_crosses_a_unary_call_and_comes_back_as_itself(kind):
    with served(info=raising_unary(kind(SENTENCE, *EXTRA.get(kind, ())))) as server:
        with pytest.raises(grpc.RpcError) as caught:
            server.prefill.GetServerInfo(prefill_pb2.PrefillServiceGetServerInfoRequest(), timeout=WAIT_SECONDS)
        back = error_from_rpc(caught.value)
        assert (type(back), back.message) == (kind, SENTENCE)
        assert server.codes.empty()


@pytest.mark.parametrize("seconds", [0.0, 0.25, 1.9999999996, 90.0])
def test_the_retry_delay_travels(seconds):
    with served(raising(ResourceExhaustedError("full", seconds))) as server:
        with pytest.raises(grpc.RpcError) as caught:
            list(server.generate())
        back = error_from_rpc(caught.value)
    assert isinstance(back, ResourceExhaustedError)
    assert back.retry_after_seconds == pytest.approx(seconds, abs=1e-8)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_retry_delay_that_cannot_travel_is_refused(seconds):
    with pytest.raises(ValueError, match="retry_after_seconds"):
        ResourceExhaustedError("full", seconds)


def test_an_unknown_exception_becomes_internal_with_type_and_message_and_is_logged(caplog):
    with served(raising(KeyError("layer 7"))) as server, caplog.at_level(logging.ERROR):
        with pytest.raises(grpc.RpcError) as caught:
            list(server.generate())
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert caught.value.details() == "KeyError: 'layer 7'; the server's log has more"
        assert isinstance(error_from_rpc(caught.value), InternalError)
        assert server.code() == "INTERNAL"
    logged = [record for record in caplog.records if record.exc_info]
    assert [record.exc_info[0] for record in logged] == [KeyError]


@pytest.mark.parametrize("unit", ["x", "é", "鍵", "%", "\n", "\ud800"])
def test_a_long_or_odd_message_arrives_shortened_instead_of_breaking_the_status(unit):
    error = InvalidArgumentError("prompt: " + unit * 50_000)
    with served(raising(error)) as server, pytest.raises(grpc.RpcError) as caught:
        list(server.generate())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("prompt: ")
    assert caught.value.details().endswith("…")
    assert len(caught.value.details().encode()) <= MAX_STATUS_MESSAGE_BYTES


def test_a_message_over_the_limit_is_refused_with_both_sizes():
    with served(most_message_bytes=MAX_MESSAGE_BYTES) as server:
        request = prefill_pb2.GenerateRequest(text="x" * (MAX_MESSAGE_BYTES + 1))
        with pytest.raises(grpc.RpcError) as caught:
            list(server.prefill.Generate(request, timeout=WAIT_SECONDS))
        back = error_from_rpc(caught.value)
        # A retry cannot mend it, so it must not come back as ResourceExhaustedError.
        assert isinstance(back, InvalidArgumentError)
        assert str(MAX_MESSAGE_BYTES) in back.message
        assert str(request.ByteSize()) in back.message

        with grpc.insecure_channel(server.address) as unbounded:
            stub = prefill_pb2_grpc.PrefillServiceStub(unbounded)
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(request, timeout=WAIT_SECONDS))
        back = error_from_rpc(caught.value)
        assert isinstance(back, InvalidArgumentError)
        assert str(MAX_MESSAGE_BYTES) in back.message
        assert [one.token.text for one in server.generate()] == ["yes"]


def test_an_answer_over_the_limit_is_the_peers_fault() -> None:
    def too_large(request: object, context: object) -> Iterator[prefill_pb2.GenerateResponse]:
        yield response("x" * (MAX_MESSAGE_BYTES + 1))

    # Without a limit of its own, as a server of another implementation.
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.max_send_message_length", -1)])
    generate = grpc.unary_stream_rpc_method_handler(too_large, None, prefill_pb2.GenerateResponse.SerializeToString)
    methods = {"Generate": generate}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("spectrumkv.v1.PrefillService", methods),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    with open_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(
            prefill_pb2_grpc.PrefillServiceStub(channel).Generate(prefill_pb2.GenerateRequest(), timeout=WAIT_SECONDS)
        )
    server.stop(0).wait()
    error = error_from_rpc(caught.value)
    assert type(error) is InternalError
    assert error.message.startswith("the peer sent a message that is too large: ")
    assert str(MAX_MESSAGE_BYTES) in error.message


@pytest.mark.parametrize("seconds", [0.0, 0.001])
def test_a_deadline_far_too_short_gives_our_sentence(seconds):
    def until_the_end(request, context):
        with RpcScope(context, 60.0) as scope:
            over = threading.Event()
            scope.on_end(over.set)
            wait(over)
            scope.check()
        yield response()

    with served(until_the_end) as server:
        with pytest.raises(grpc.RpcError) as caught:
            list(server.generate(timeout=seconds))
        back = error_from_rpc(caught.value)
    assert isinstance(back, DeadlineExceededError)
    assert back.message == "the deadline passed; allow more time or ask for fewer tokens"


def test_a_peer_that_is_away_is_told_from_one_that_says_that_another_is():
    with served(raising(errors.UnreachableError("decode worker 1 is away"))) as server:
        with pytest.raises(grpc.RpcError) as caught:
            list(server.generate())
        assert type(error_from_rpc(caught.value)) is errors.UnavailableError
        server.server.drain(0, threading.Event())
        # A call on the connection that was there may still learn that the server let go of it.
        with open_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
            list(replace(server, channel=channel).generate())
        assert type(error_from_rpc(caught.value)) is errors.UnreachableError


def test_an_unmapped_status_keeps_its_code_in_the_message():
    with served(stream="Decode") as server:
        with pytest.raises(grpc.RpcError) as caught:
            list(server.generate())
        back = error_from_rpc(caught.value)
    assert isinstance(back, InternalError)
    assert back.message == "the peer answered UNIMPLEMENTED: Method not found!"


class _Call(grpc.RpcError):
    """A finished call as a peer of another make may leave it."""

    def __init__(self, metadata):
        self._metadata = metadata

    def code(self):
        return grpc.StatusCode.RESOURCE_EXHAUSTED

    def details(self):
        return "full"

    def trailing_metadata(self):
        return self._metadata


@pytest.mark.parametrize(
    "details",
    [
        b"\xff\xff no protobuf",
        status_pb2.Status(code=code_pb2.INTERNAL, message="full").SerializeToString(),
        status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="full").SerializeToString(),
        None,
    ],
)
def test_status_details_that_make_no_sense_leave_the_status(details):
    back = error_from_rpc(_Call(None if details is None else (("grpc-status-details-bin", details),)))
    assert isinstance(back, ResourceExhaustedError)
    assert (back.message, back.retry_after_seconds) == ("full", 1.0)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (errors.ContextTooShortError, errors.FailedPreconditionError),
        (errors.NotFiniteError, errors.InternalError),
        (errors.UnansweredError, errors.UnavailableError),
    ],
)
def test_what_only_a_process_tells_apart_crosses_as_the_kind_that_it_is_of(kind, told):
    with served(raising(kind(SENTENCE))) as server:
        with pytest.raises(grpc.RpcError) as caught:
            list(server.generate())
        error = error_from_rpc(caught.value)
        assert (type(error), error.message) == (told, SENTENCE)


def test_every_error_has_a_status_code_of_its_own():
    codes = [kind.code for kind in ERRORS if kind is not BasisMissingError]
    assert len(set(codes)) == len(codes)
    for kind in ERRORS:
        status = to_status(kind("what", *EXTRA.get(kind, ())))
        assert status.code is getattr(grpc.StatusCode, kind.code)


def test_a_stream_that_ends_well_is_counted_once():
    with served() as server:
        assert [one.token.text for one in server.generate()] == ["yes"]
        assert server.code() == "OK"
        with pytest.raises(queue.Empty):
            server.codes.get_nowait()
