"""The codec bases that prefill workers sent, kept for as long as the process lives."""

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

# A worker serves one model, so it meets one basis, and a second one while prefill workers are being upgraded.
MOST_BASES = 4


class BasisStore:
    """Bases by their digest; the one that was least recently used gives way.

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
            BasisMissingError: it has not been sent yet.
        """
        with self._lock:
            if digest not in self._bases:
                raise BasisMissingError(f"codec basis {digest.hex()[:16]} is not known here; send it with PutBasis")
            self._bases.move_to_end(digest)
            return self._bases[digest]

    def receive(self, pieces: Iterator[ArrivedPiece]) -> int:
        """Take a basis in pieces and keep it; return how many bytes the pieces took.

        Raises:
            DataLossError: what arrived is not what the digest says.
            InvalidArgumentError: it is no basis for this model, or larger than any.
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
        if hashlib.sha256(data).digest() != digest:
            raise DataLossError(f"a codec basis of {len(data)} bytes is not what its digest announces", "basis")
        basis = SpectralBasis.from_bytes(bytes(data))
        basis.check_fits(self._geometry)
        # Now, so that a transform which cannot be undone is refused before anything is sent in it.
        _ = basis.synthesis
        with self._lock:
            # What was made of one that is here already is kept with it.
            self._bases.setdefault(digest, basis)
            self._bases.move_to_end(digest)
            while len(self._bases) > MOST_BASES:
                self._bases.popitem(last=False)
        logger.info("received codec basis %s, %d bytes", digest.hex()[:16], len(data))
        return taken
