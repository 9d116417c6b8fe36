"""What an encoder of coefficients is told of one prompt."""

from dataclasses import dataclass

from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.calibrated.importance import affordable_sinks
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import MAX_CHUNK_PAYLOAD_BYTES

# Fraction of a chunk that a segment is planned to fill; what comes out differs.
PLANNED_FILL = 0.6


@dataclass(frozen=True)
class CalibratedRequest:
    """One prompt that is to be coded in a calibrated basis.

    Attributes:
        basis: of the model.
        geometry: shape and dtype of the model's cache.
        tokens: of the prompt.
        segment_bytes: for all layers' segments, headers and tier maps included. A budget that is too small even for
            the coarsest steps is exceeded.
        scorer: name of the scorer that ranks tokens.
        seed: for scorers that draw.

    Raises:
        InvalidArgumentError: the basis is not one for this model's cache.
    """

    basis: CalibratedBasis
    geometry: KvGeometry
    tokens: int
    segment_bytes: int
    scorer: str
    seed: int

    def __post_init__(self) -> None:
        self.basis.check_fits(self.geometry)

    @property
    def sinks(self) -> int:
        """Count the first tokens that the budget has room for in the 16-bit dtype."""
        return affordable_sinks(self.segment_bytes, self.geometry)

    @property
    def token_bytes(self) -> float:
        """Return the bytes that a token of one layer may take, at least 1."""
        return max(1.0, self.segment_bytes / (self.geometry.layers * self.tokens))

    @property
    def segment_tokens(self) -> int:
        """Return how many tokens a segment is planned to have."""
        return max(1, int(PLANNED_FILL * MAX_CHUNK_PAYLOAD_BYTES / self.token_bytes))
