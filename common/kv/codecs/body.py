"""What the bodies of codecs have in common: sections back to back, in memory of the host.

A codec lists its sections once; encoding and decoding both cut the same body into the same views, so the two
cannot disagree about an offset.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from spectrumkv.common.errors import DataLossError, InternalError, InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.tiers import Tier


@dataclass(frozen=True)
class Section:
    """Describe one C-ordered array in a body.

    Attributes:
        tier: the tier whose bytes these are.
        shape: of the array; a dimension may be 0.
        dtype: of its elements.
    """

    tier: Tier
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Count the array's bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def body_bytes(sections: Iterable[Section]) -> int:
    """Return the bytes of a body of these sections."""
    return sum(section.bytes for section in sections)


def bytes_by_tier(sections: Iterable[Section], tiers: Iterable[Tier]) -> dict[Tier, int]:
    """Return the bytes that each of `tiers` takes of a body of these sections."""
    taken = dict.fromkeys(sorted(tiers), 0)
    for section in sections:
        taken[section.tier] += section.bytes
    return taken


def cut(body: torch.Tensor, sections: Sequence[Section]) -> list[torch.Tensor]:
    """Cut a body into its sections, as views of it wherever its alignment allows.

    Args:
        body: uint8 `[body_bytes(sections)]`, contiguous.
        sections: in the order of the layout.

    Returns:
        A tensor of each section's shape and dtype.
    """
    views = []
    for part, section in zip(torch.split(body, [section.bytes for section in sections]), sections, strict=True):
        # Torch views bytes as wider elements only at a multiple of their width from the start of their
        # storage. A body that `encode` made or that arrived in a chunk has its own storage, or none is wider.
        if part.storage_offset() % section.dtype.itemsize:
            part = part.clone()
        views.append(part.view(section.dtype).view(section.shape))
    return views


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


def check_length(body: torch.Tensor, sections: Sequence[Section]) -> None:
    """Refuse a body that is cut off, or longer than its tiers explain.

    Args:
        body: uint8 `[b]`.
        sections: that its tiers make.

    Raises:
        DataLossError: with the reason `length`.
    """
    expected = body_bytes(sections)
    if body.numel() != expected:
        raise DataLossError(
            f"a segment's body has {body.numel()} bytes; its tier map makes that {expected}", reason="length"
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
