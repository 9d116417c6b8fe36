"""A checksum at the end of every small message of the Decode stream.

Chunks bring a checksum of their payload. Everything else that crosses between prefill and decode (Begin, End,
Admitted, tokens, Finished) ends with the field `crc32c`, the CRC-32C of all bytes before it, so that a flipped
prompt token, seed or generated token is found out before anybody acts on it.
"""

import crc32c

from spectrumkv.common.errors import DataLossError

# Field 15, four bytes: the highest number of the two messages, so that every implementation writes it last.
_SEAL_TAG = 15 << 3 | 5
CHECKSUM_BYTES = 5


def append_checksum(encoded: bytes) -> bytes:
    """Return a message's encoding with its checksum appended.

    Args:
        encoded: a DecodeRequest or DecodeResponse without `crc32c`.
    """
    checksum: int = crc32c.crc32c(encoded)
    return encoded + bytes((_SEAL_TAG,)) + checksum.to_bytes(4, "little")


def split_checksum(sealed: bytes) -> bytes:
    """Inverse of `append_checksum`.

    Raises:
        DataLossError: the checksum is missing or is not that of the bytes before it.
    """
    encoded, tag, announced = sealed[:-CHECKSUM_BYTES], sealed[-CHECKSUM_BYTES:-4], sealed[-4:]
    if tag != bytes((_SEAL_TAG,)):
        raise DataLossError(f"a message of {len(sealed)} bytes does not end with its checksum", "malformed")
    actual = crc32c.crc32c(encoded)
    if actual != int.from_bytes(announced, "little"):
        raise DataLossError(
            f"a message of {len(sealed)} bytes has CRC-32C {actual:#010x}, "
            f"announced {int.from_bytes(announced, 'little'):#010x}",
            "crc",
        )
    return encoded
