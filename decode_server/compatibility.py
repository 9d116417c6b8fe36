"""Whether prefill and decode may work together: on one model, with one codec."""

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.v1 import kv_pb2


def check_same_model(mine: ModelSpec, theirs: ModelSpec) -> None:
    """Check that both sides serve the same model.

    Raises:
        FailedPreconditionError: they do not; the message names each field and both values.
    """
    differences = mine.differences(theirs)
    if differences:
        listed = "; ".join(f"{one.field} is {one.mine} on decode and {one.theirs} on prefill" for one in differences)
        raise FailedPreconditionError(f"prefill and decode serve different models: {listed}")


def check_same_codec(theirs: kv_pb2.CodecId) -> None:
    """Check that decode has prefill's codec, at prefill's version.

    Raises:
        FailedPreconditionError: it does not.
    """
    if theirs.name not in codecs.names():
        raise FailedPreconditionError(
            f"prefill sends codec {theirs.name!r}, unknown to decode, which has {', '.join(codecs)}"
        )
    mine = codecs.get(theirs.name).version
    if theirs.version != mine:
        raise FailedPreconditionError(
            f"codec {theirs.name!r}: decode has version {mine}, prefill {theirs.version}; "
            "run the same release on both"
        )
