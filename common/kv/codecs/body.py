"""What codecs do with bodies besides laying them out: read them, bring them to the host, refuse what is wrong."""

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from spectrumkv.common.errors import DataLossError, InternalError, InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels.body import BodyLayout


class BodyReader:
    """Takes a body apart, front to back, and refuses one that is cut off or too long.

    Args:
        body: uint8 `[b]` as it arrived.

    Attributes:
        position: byte of the body that is taken next.
    """

    def __init__(self, body: memoryview) -> None:
        self._body = body
        self.position = 0

    def take(self, size: int) -> memoryview:
        """Take the next bytes.

        Args:
            size: how many.

        Returns:
            A view of them.

        Raises:
            DataLossError: the body has fewer.
        """
        end = self.position + size
        if end > len(self._body):
            raise DataLossError(f"a segment's body of {len(self._body)} bytes is cut off; {end} are needed", "length")
        taken = self._body[self.position : end]
        self.position = end
        return taken

    def header(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Take the next bytes as the fields of a struct.

        Args:
            layout: of the fields.

        Returns:
            The fields.

        Raises:
            DataLossError: the body has fewer bytes.
        """
        return layout.unpack(self.take(layout.size))

    def array(self, count: int, dtype: np.dtype | type) -> np.ndarray:
        """Take the next bytes as elements.

        Args:
            count: how many elements.
            dtype: of the elements.

        Returns:
            `[count]`, a view of them.

        Raises:
            DataLossError: the body has fewer bytes.
        """
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)

    def finish(self, padding: int = 0) -> None:
        """Check that nothing is left.

        Args:
            padding: how many bytes may be.

        Raises:
            DataLossError: more are.
        """
        left = len(self._body) - self.position
        if left > padding:
            raise DataLossError(f"a segment's body has {left} bytes too many", "length")


def bytes_by_tier(layout: BodyLayout, tiers: Iterable[Tier]) -> dict[Tier, int]:
    """Return the bytes that each of `tiers` takes of a body."""
    taken = dict.fromkeys(sorted(tiers), 0)
    for section, length in zip(layout.sections, layout.lengths, strict=True):
        taken[Tier(section.tier)] += length
    return taken


def to_host(body: torch.Tensor) -> torch.Tensor:
    """Bring a body into memory of the CPU.

    Args:
        body: uint8 `[b]` on any device.

    Returns:
        uint8 `[b]` on the CPU, complete when this returns; `body` itself where it is there already.
    """
    if not body.is_cuda:
        return body
    # A GPU copies into page-locked memory several times faster.
    host = torch.empty(body.shape, dtype=body.dtype, pin_memory=True)
    return host.copy_(body)


def is_finite(states: torch.Tensor) -> bool:
    """Return whether no element is infinite or NaN.

    Args:
        states: any floating-point tensor, on the CPU.
    """
    # Both bounds keep a NaN, and finding them is ten times as fast as isfinite on every element.
    return not states.numel() or all(bool(bound.isfinite()) for bound in states.aminmax())


def check_states(keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, geometry: KvGeometry) -> None:
    """Refuse tensors that are not what `TierCodec` describes.

    Args:
        keys: `[kv_heads, n, head_dim]` in `geometry.native_dtype`.
        values: like `keys`.
        tiers: uint8 `[n]` on the CPU.
        geometry: shape and dtype of the model's cache.

    Raises:
        InternalError: shape or dtype do not fit the geometry, or keys and values are on different devices.
    """
    shape = (geometry.kv_heads, tiers.numel(), geometry.head_dim)
    for name, states in (("keys", keys), ("values", values)):
        if states.shape != shape or states.dtype != geometry.native_dtype or states.device != keys.device:
            raise InternalError(
                f"{name} are {states.dtype} {list(states.shape)} on {states.device}; a segment of "
                f"{tiers.numel()} tokens has {geometry.native_dtype} {list(shape)} on {keys.device}"
            )


def check_length(body: torch.Tensor, layout: BodyLayout) -> None:
    """Refuse a body that is cut off, or longer than its tiers explain.

    Args:
        body: uint8 `[b]`.
        layout: that its tiers make.

    Raises:
        DataLossError: with the reason `length`.
    """
    if body.numel() != layout.bytes:
        raise DataLossError(
            f"a segment's body has {body.numel()} bytes; its tier map makes that {layout.bytes}", reason="length"
        )


def refuse_infinite(side: str, tier: Tier, states: torch.Tensor, coded_dtype: torch.dtype) -> None:
    """Refuse states that are not all finite in the dtype they are sent in, and say what is wrong with them.

    Args:
        side: "keys" or "values".
        tier: that they were to be sent at.
        states: their elements before coding, not empty.
        coded_dtype: dtype of the tier.

    Raises:
        NotFiniteError: some are infinite or NaN to begin with.
        InvalidArgumentError: all are finite, and some do not fit the dtype.
    """
    broken = int((~states.isfinite()).sum())
    too_large = int((~states.to(coded_dtype).isfinite()).sum()) - broken
    problems = []
    if broken:
        problems.append(f"{broken} are infinite or NaN")
    if too_large:
        largest = float(states.abs().nan_to_num(nan=0.0, posinf=0.0).max())
        problems.append(
            f"{too_large} do not fit {coded_dtype}, whose range is ±{torch.finfo(coded_dtype).max:.6g}; "
            f"the largest magnitude is {largest:.6g}"
        )
    kind = NotFiniteError if broken else InvalidArgumentError
    raise kind(f"of {states.numel()} elements of {side} at tier {tier.name}, {' and '.join(problems)}")
