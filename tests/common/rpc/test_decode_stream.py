import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.wire import KvChunk
from spectrumkv.common.rpc.decode_stream import (
    append_checksum,
    deserialize_request,
    deserialize_response,
    serialize_request,
    serialize_response,
    serialized_bytes,
)
from spectrumkv.v1 import decode_pb2, generation_pb2, kv_pb2

BEGIN = decode_pb2.DecodeRequest(begin=decode_pb2.Begin(request_id="one", prompt_token_ids=[1, 2, 300]))
TOKEN = decode_pb2.DecodeResponse(token=generation_pb2.Token(index=1, token_id=7, text="x"))

chunks = st.builds(
    KvChunk,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.lists(st.binary(max_size=300), max_size=4).map(tuple),
)


def as_message(chunk: KvChunk) -> decode_pb2.DecodeRequest:
    payload = bytes(chunk.payload)
    return decode_pb2.DecodeRequest(
        chunk=kv_pb2.KvChunk(sequence=chunk.sequence, crc32c=chunk.crc32c, payload=payload)
    )


@given(chunks)
def test_a_chunk_is_encoded_as_protobuf_encodes_it(chunk: KvChunk) -> None:
    encoded = serialize_request(chunk)
    assert encoded == as_message(chunk).SerializeToString(deterministic=True)
    assert serialized_bytes(chunk) == len(encoded)


@given(chunks)
def test_a_chunk_is_read_as_protobuf_reads_it(chunk: KvChunk) -> None:
    arrived = deserialize_request(as_message(chunk).SerializeToString())
    assert isinstance(arrived, KvChunk)
    assert (arrived.sequence, arrived.crc32c) == (chunk.sequence, chunk.crc32c)
    assert bytes(arrived.payload) == bytes(chunk.payload)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_as_protobuf_reads_them(data: bytes) -> None:
    for candidate in (data, append_checksum(data), b"\x12" + data, b"\x12" + bytes((len(data),)) + data):
        try:
            arrived = deserialize_request(candidate)
        except DataLossError:
            assert not readable(candidate)
            continue
        expected = decode_pb2.DecodeRequest.FromString(candidate)
        if isinstance(arrived, KvChunk):
            read = (arrived.sequence, arrived.crc32c, bytes(arrived.payload))
            assert read == (expected.chunk.sequence, expected.chunk.crc32c, expected.chunk.payload)
        else:
            # The checksum, and a field of its number that may stand before it.
            expected.ClearField("crc32c")
            arrived.ClearField("crc32c")
            assert arrived == expected


def readable(data: bytes) -> bool:
    """Whether `data` is a chunk, or another request with the right checksum."""
    try:
        if decode_pb2.DecodeRequest.FromString(data).WhichOneof("message") == "chunk":
            return True
        decode_pb2.DecodeRequest.FromString(data[:-5])
    except DecodeError:
        return False
    return data == append_checksum(data[:-5])


def test_fields_in_another_order_are_read_too() -> None:
    inner = b"\x1a\x02ab" + b"\x15\x01\x00\x00\x00" + b"\x08\x07"
    arrived = deserialize_request(b"\x12" + bytes((len(inner),)) + inner)
    assert arrived == KvChunk(7, 1, (b"ab",))


def test_other_messages_stay_messages() -> None:
    assert deserialize_request(serialize_request(BEGIN)) == BEGIN
    assert serialized_bytes(BEGIN) == len(serialize_request(BEGIN))
    assert deserialize_response(serialize_response(TOKEN)) == TOKEN


def test_the_checksum_is_the_field_that_the_contract_says() -> None:
    request = decode_pb2.DecodeRequest.FromString(serialize_request(BEGIN))
    assert serialize_request(BEGIN) == request.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("encoded", "read"),
    [(serialize_request(BEGIN), deserialize_request), (serialize_response(TOKEN), deserialize_response)],
)
def test_every_flipped_bit_of_a_small_message_is_found(encoded, read) -> None:
    for bit in range(8 * len(encoded)):
        damaged = bytearray(encoded)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            arrived = read(bytes(damaged))
        except DataLossError:
            continue
        # A flip can make a chunk of a Begin, whose own checksum then does not fit.
        assert isinstance(arrived, KvChunk)
        assert arrived.checksum() != arrived.crc32c


def test_a_large_payload_is_not_copied() -> None:
    data = serialize_request(KvChunk(3, 9, (bytes(1 << 20),)))
    arrived = deserialize_request(data)
    assert isinstance(arrived, KvChunk)
    assert isinstance(arrived.payload, memoryview)
    assert arrived.payload.obj is data
