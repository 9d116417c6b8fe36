import asyncio
import math
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.common.service.config import text_of
from spectrumkv.common.service.options import Address, number, parse_addresses, parse_bytes


@given(st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True), st.integers(0, 65535))
def test_an_address_printed_and_read_back_is_itself(host, port):
    assert Address.parse(str(Address(host, port))) == Address(host, port)


@given(st.ip_addresses(), st.integers(0, 65535))
def test_every_ip_address_can_be_named(ip, port):
    host = f"[{ip}]" if ip.version == 6 else str(ip)
    if "%" in host:
        return
    address = Address.parse(f"{host}:{port}")
    assert (address.host, address.port) == (host, port)
    assert address.is_loopback == ip.is_loopback


@pytest.mark.parametrize(
    "text",
    [
        "", ":50051", "localhost", "localhost:", "localhost:65536", "localhost:-1", "localhost:٣", "localhost:1.5",
        "::1:50051", "[::1]", "[]:1", "[:::]:1", "[127.0.0.1]:1", "http://host:1", "host/path:1", "a b:1", "host:1 ",
        "host:000000001",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match=r"^HOST:PORT, such as 127\.0\.0\.1:50051 or \[::1\]:50051"):
        Address.parse(text)


@given(st.lists(st.builds(Address, st.just("decode-1.example"), st.integers(0, 65535)), min_size=1))
def test_addresses_printed_and_read_back_are_themselves(addresses):
    assert parse_addresses(text_of(addresses)) == tuple(addresses)
    assert parse_addresses(" , ".join(map(str, addresses))) == tuple(addresses)


@given(st.integers(1, (1 << 63) - 1))
def test_every_number_of_bytes_can_be_named_exactly(count):
    assert parse_bytes(str(count)) == count
    if count < 1 << 23:
        assert parse_bytes(f"{count}TiB") == count << 40
        assert parse_bytes(f"{count} MB") == count * 10**6


@pytest.mark.parametrize(
    "text", ["0", "0.4", "0.0001K", "9" * 30, "9" * 400, "99999999999TiB", "1e9", "4gib", "4XiB", "B", "٣"]
)
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(ValueError, match="a positive number of bytes such as 512MiB or 4GiB"):
        parse_bytes(text)


@given(st.floats() | st.integers(-10, 10).map(float))
def test_numbers_outside_their_range_are_refused(value):
    for low, high in [(0.05, 1.0), (0.0, math.inf), (-3.0, 3.0)]:
        parse = number(low, high)
        if math.isfinite(value) and low <= value <= high:
            assert parse(repr(value)) == value
        else:
            with pytest.raises(ValueError, match=r"^a number "):
                parse(repr(value))


@pytest.mark.parametrize("text", ["1.5", "1e3", "five", "0", "4097"])
def test_whole_numbers_are_whole(text):
    with pytest.raises(ValueError, match="a whole number from 1 to 4096"):
        number(1, 4096, int)(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_asyncio_sends_at_once_what_follows_unacknowledged_bytes(host: str) -> None:
    async def accepted_without_delay() -> bool:
        found = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with Address(host, 0).listener() as listener:
            async with await asyncio.start_server(serve, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
                try:
                    return bool(await found)
                finally:
                    writer.close()

    assert asyncio.run(accepted_without_delay())
