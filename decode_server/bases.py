"""Keeps the codec bases that prefill workers sent, for as long as the process lives."""

import hashlib
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from spectrumkv.common.errors import (
    BasisMissingError,
    DataLossError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from spectrumkv.common.kv.codecs.base import largest_basis_bytes, parse_basis
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.rpc.decode_methods import ArrivedPiece

logger = logging.getLogger(__name__)

# Prefill services on machines of different kinds find different bases for the same model, unless one of them is
# published to all: so many bytes of bases are kept, and as many as four bases of a large model take.
STORE_BYTES = 64 << 20
FEWEST_BASES = 4
# Requests that use bases end sooner or later.
RETRY_SECONDS = 1.0
# A basis takes no more in memory, ready to decode, than so many times its serialized size.
KEPT_RATIO = 2


class BasisStore:
    """Holds bases by their digest, in a bounded number of bytes; the one longest out of use gives way.

    Args:
        geometry: shape and dtype of the model's cache.
        most_bytes: what all bases together may take; none for `STORE_BYTES`, or the bytes of four bases.
    """

    def __init__(self, geometry: KvGeometry, most_bytes: int | None = None) -> None:
        self._geometry = geometry
        self._largest = largest_basis_bytes(geometry)
        self._most_bytes = most_bytes or max(STORE_BYTES, FEWEST_BASES * KEPT_RATIO * self._largest)
        self._lock = threading.Lock()
        self._bases: OrderedDict[bytes, Basis] = OrderedDict()
        self._users: Counter[bytes] = Counter()

    def get(self, digest: bytes) -> Basis:
        """Return the basis of a digest.

        Raises:
            BasisMissingError: no prefill worker has sent it yet.
        """
        with self._lock:
            return self._found(digest)

    @contextmanager
    def hold(self, digest: bytes) -> Iterator[Basis]:
        """Yield the basis of a digest, which is not dropped until the block ends.

        Raises:
            BasisMissingError: no prefill worker has sent it yet.
        """
        with self._lock:
            basis = self._found(digest)
            self._users[digest] += 1
        try:
            yield basis
        finally:
            with self._lock:
                self._users[digest] -= 1

    def receive(self, pieces: Iterator[ArrivedPiece]) -> int:
        """Receive a basis in pieces and keep it, or answer whether it is here already.

        Args:
            pieces: as they arrived, in order.

        Returns:
            How many bytes the messages had; 0 where they only asked.

        Raises:
            BasisMissingError: all that was sent is the digest of a basis that is not here.
            DataLossError: a piece is damaged, or the basis has another digest than announced.
            InvalidArgumentError: it is no basis for this model, or is larger than any.
            ResourceExhaustedError: requests use all bases that are here, and there is no room for one more.
        """
        digest, data, taken = b"", bytearray(), 0
        for piece in pieces:
            if isinstance(piece, DataLossError):
                raise piece
            digest = digest or piece.digest
            if piece.digest != digest:
                raise DataLossError("the pieces of a codec basis announce different digests", "basis")
            data += piece.part
            taken += piece.ByteSize()
            if len(data) > self._largest:
                raise InvalidArgumentError(
                    f"a codec basis of more than {self._largest} bytes was sent; one for this model is no larger"
                )
        if digest and not data:
            self.get(digest)
            return 0
        if hashlib.sha256(data).digest() != digest:
            raise DataLossError(f"a codec basis of {len(data)} bytes is not what its digest announces", "basis")
        basis = parse_basis(bytes(data), self._geometry)
        basis.prepare_decoding()
        self._keep(digest, basis)
        logger.info("received codec basis %s, %d bytes", digest.hex()[:16], len(data))
        return taken

    def _found(self, digest: bytes) -> Basis:
        if digest not in self._bases:
            raise BasisMissingError(f"codec basis {digest.hex()[:16]} is not known here; send it with PutBasis")
        self._bases.move_to_end(digest)
        return self._bases[digest]

    def _keep(self, digest: bytes, basis: Basis) -> None:
        """Keep a basis, in the place of some that nobody uses where there is no room.

        Raises:
            ResourceExhaustedError: all others are in use.
        """
        with self._lock:
            if digest in self._bases:
                # It stays, with its inverse.
                self._bases.move_to_end(digest)
                return
            room = self._most_bytes - basis.memory_bytes
            unused = [one for one in self._bases if not self._users[one]]
            while self._bases and sum(one.memory_bytes for one in self._bases.values()) > room:
                if not unused:
                    raise ResourceExhaustedError(
                        f"decode has no memory for another codec basis: running requests use the {len(self._bases)} "
                        "that it keeps; give all prefill services one basis (`spectrumkv basis export`, `import`)",
                        RETRY_SECONDS,
                    )
                dropped = unused.pop(0)
                del self._bases[dropped]
                logger.info("dropped codec basis %s, which was not in use", dropped.hex()[:16])
            self._bases[digest] = basis
