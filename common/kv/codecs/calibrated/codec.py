"""What the codecs of the calibrated basis state alike."""

import numpy as np

from spectrumkv.common.errors import DataLossError, InternalError
from spectrumkv.common.kv.codecs.base import Codec, needed_basis
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.encoder_request import EncoderRequest
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier


class CalibratedCodec(Codec):
    """A codec that sends every token as coefficients in the calibrated basis; see `Codec`."""

    tiers = frozenset({Tier.INT4, Tier.INT8, Tier.FP16})
    basis_type = CalibratedBasis
    basis_free = "absmax"

    def calibrated(self, request: EncoderRequest) -> CalibratedRequest:
        """Return what an encoder is told of a prompt.

        Args:
            request: with a byte budget.

        Returns:
            The request, whose basis fits the model's cache.

        Raises:
            FailedPreconditionError: there is no basis.
            InvalidArgumentError: the basis is not one for this model's cache.
        """
        return CalibratedRequest(
            self.calibrated_basis(request.basis, request.geometry),
            request.geometry,
            request.tokens,
            request.segment_bytes,
            request.scorer,
            request.seed,
        )

    def calibrated_basis(self, basis: Basis | None, geometry: KvGeometry) -> CalibratedBasis:
        """Return a basis that the codec can code in.

        Args:
            basis: the model's; None where there is none.
            geometry: shape and dtype of the model's cache.

        Returns:
            `basis`.

        Raises:
            FailedPreconditionError: there is none.
            InvalidArgumentError: it is not one for this model's cache.
            InternalError: it is of another type.
        """
        found = needed_basis(self, basis)
        if not isinstance(found, CalibratedBasis):
            raise InternalError(f"codec {self.name!r} was given a {type(found).__name__} as its basis")
        found.check_fits(geometry)
        return found


def check_tiers(codec: str, segment: KvSegment) -> None:
    """Refuse a segment with tokens that no codec of the calibrated basis sends.

    Args:
        codec: name of the codec.
        segment: as it arrived.

    Raises:
        DataLossError: a token is dropped, or has the model's own dtype.
    """
    of_each = np.bincount(segment.tiers.numpy(), minlength=len(Tier))
    if of_each[Tier.DROP] or of_each[Tier.NATIVE]:
        raise DataLossError(f"codec {codec} sends every token, at INT4, INT8 or FP16", "tier")
