"""Keeps the bases that producers code in, and those of this rank's part of a stream, ready to decode."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

from spectrumkv.common.errors import BasisMissingError
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.geometry import HeadRange, KvGeometry
from spectrumkv.decode_server.bases import BasisStore
from spectrumkv.v1 import decode_pb2, transfer_pb2

# A consumer sees as many parts of a basis as its producers have kinds of ranks.
PARTS = 16


class StreamBases:
    """Finds the basis of a stream.

    Args:
        geometry: of all KV heads.
    """

    def __init__(self, geometry: KvGeometry) -> None:
        self._geometry = geometry
        self._store = BasisStore(geometry)
        self._lock = threading.Lock()
        self._parts: OrderedDict[tuple[bytes, HeadRange], Basis] = OrderedDict()

    def get(
        self, digest: bytes, heads: HeadRange, ask: Callable[[], Iterator[transfer_pb2.GetBasisResponse]]
    ) -> Basis:
        """Return the basis of some KV heads, and fetch it where it is not here.

        Args:
            digest: of the basis of all KV heads.
            heads: of the stream.
            ask: asks the producer for the basis.

        Returns:
            The basis, ready to decode.

        Raises:
            SpectrumKVError: the producer does not send it, or sends something else.
        """
        with self._lock:
            part = self._parts.get((digest, heads))
            if part is not None:
                self._parts.move_to_end((digest, heads))
                return part
            try:
                whole = self._store.get(digest)
            except BasisMissingError:
                self._store.receive(decode_pb2.PutBasisRequest(digest=one.digest, part=one.part) for one in ask())
                whole = self._store.get(digest)
            part = whole if heads.count == self._geometry.kv_heads else whole.of_heads(heads)
            part.prepare_decoding()
            self._parts[digest, heads] = part
            while len(self._parts) > PARTS:
                self._parts.popitem(last=False)
            return part
