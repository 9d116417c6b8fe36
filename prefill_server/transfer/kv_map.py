"""Says at what precision each token of a prompt was sent, counted from the segments as they leave."""

import numpy as np

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.v1 import prefill_pb2

# Numbers of a map layer by layer, which take 4 bytes each of a message of at most 8 MiB.
MOST_LAYER_NUMBERS = 1 << 20
DETAILS = prefill_pb2.KvMapDetail


class KvMap:
    """Adds up what the tokens of one prompt take, segment by segment.

    Args:
        plan: how the KV is coded, with the codec that was chosen.
        geometry: shape and dtype of the model's cache.
        tokens: of the prompt.
        by_layer: whether each layer is kept apart.
    """

    def __init__(self, plan: KvPlan, geometry: KvGeometry, tokens: int, by_layer: bool) -> None:
        self._plan = plan
        self._geometry = geometry
        self._by_layer = by_layer
        self._bytes = np.zeros((geometry.layers if by_layer else 1, tokens))

    def add(self, segment: KvSegment) -> None:
        """Take in a segment that is about to leave.

        Args:
            segment: as the encoder made it; its body is on the CPU.
        """
        taken = self._plan.codec.bytes_of_tokens(segment, self._geometry, self._plan.basis)
        row = segment.layer if self._by_layer else 0
        self._bytes[row, segment.first_token : segment.first_token + len(taken)] += taken

    def to_proto(self) -> prefill_pb2.KvMap:
        """Return the protobuf message, once every segment has left."""
        bits = self._bytes * (8 / self._geometry.elements_per_token_layer)
        message = prefill_pb2.KvMap(bits=bits.sum(axis=0) / self._geometry.layers)
        if self._by_layer:
            message.layers.extend(prefill_pb2.KvMapLayer(bits=row) for row in bits)
        return message


def check_detail(detail: int, layers: int, tokens: int) -> None:
    """Refuse a detail that there is none of, or a map that is too large for a message.

    Args:
        detail: that a request asks for, a value of `KvMapDetail`.
        layers: of the model.
        tokens: of the prompt.

    Raises:
        InvalidArgumentError: it is one of these.
    """
    if detail not in DETAILS.values():
        allowed = ", ".join(f"{number} ({name})" for name, number in DETAILS.items())
        raise InvalidArgumentError(f"kv_map is {detail}; allowed: {allowed}")
    if detail == prefill_pb2.KV_MAP_DETAIL_LAYERS and layers * tokens > MOST_LAYER_NUMBERS:
        raise InvalidArgumentError(
            f"kv_map layer by layer would have {layers * tokens} numbers, for {tokens} tokens in {layers} layers; "
            f"allowed: at most {MOST_LAYER_NUMBERS}; ask for the mean of each token"
        )
