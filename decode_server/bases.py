"""Keeps the codec bases that prefill workers sent, for as long as the process lives."""

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator

from spectrumkv.common.errors import BasisMissingError, DataLossError, InvalidArgumentError
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.rpc.decode_methods import ArrivedPiece

logger = logging.getLogger(__name__)

# A worker serves one model, so it gets one basis, and a second one while prefill workers are upgraded.
MOST_BASES = 4


class BasisStore:
    """Holds bases by their digest; the least recently used one is dropped when there are too many.

    Args:
        geometry: shape and dtype of the model's cache.
    """

    def __init__(self, geometry: KvGeometry) -> None:
        self._geometry = geometry
        self._largest = SpectralBasis.largest_bytes(geometry)
        self._lock = threading.Lock()
        self._bases: OrderedDict[bytes, SpectralBasis] = OrderedDict()

    def get(self, digest: bytes) -> SpectralBasis:
        """Return the basis of a digest.

        Raises:
            BasisMissingError: no prefill worker has sent it yet.
        """
        with self._lock:
            if digest not in self._bases:
                raise BasisMissingError(f"codec basis {digest.hex()[:16]} is not known here; send it with PutBasis")
            self._bases.move_to_end(digest)
            return self._bases[digest]

    def receive(self, pieces: Iterator[ArrivedPiece]) -> int:
        """Receive a basis in pieces and keep it, or answer whether it is here already.

        Args:
            pieces: as they arrived, in order.

        Returns:
            How many bytes the messages had.

        Raises:
            BasisMissingError: all that was sent is the digest of a basis that is not here.
            DataLossError: a piece is damaged, or the basis has another digest than announced.
            InvalidArgumentError: it is no basis for this model, or is larger than any.
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
            return taken
        if hashlib.sha256(data).digest() != digest:
            raise DataLossError(f"a codec basis of {len(data)} bytes is not what its digest announces", "basis")
        basis = SpectralBasis.from_bytes(bytes(data))
        basis.check_fits(self._geometry)
        # Inverted now, so that a transform which cannot be is refused before any KV is sent in it.
        _ = basis.synthesis
        with self._lock:
            # A basis that is here already stays, with its inverse.
            self._bases.setdefault(digest, basis)
            self._bases.move_to_end(digest)
            while len(self._bases) > MOST_BASES:
                self._bases.popitem(last=False)
        logger.info("received codec basis %s, %d bytes", digest.hex()[:16], len(data))
        return taken
