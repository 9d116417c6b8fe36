"""Refuses bodies of codec `absmax` with elements or scales that are infinite or NaN, on either side."""

from collections.abc import Mapping

import torch

from spectrumkv.common.errors import DataLossError, InvalidArgumentError, NotFiniteError
from spectrumkv.common.kv.codecs import body as bodies
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.kernels import absmax as kernels
from spectrumkv.kernels.absmax import FORMATS
from spectrumkv.kernels.body import BodyLayout


def check_sent(
    body: torch.Tensor, layout: BodyLayout, states: Mapping[str, torch.Tensor], tiers: torch.Tensor
) -> None:
    """Refuse a body in which quantizing left an infinity or a NaN, and name the element that caused it.

    Args:
        body: uint8, as it is sent.
        layout: of the body.
        states: "keys" and "values" as they came, each `[kv_heads, n, head_dim]`.
        tiers: uint8 `[n]` on the CPU.

    Raises:
        NotFiniteError: an element is infinite or NaN.
        InvalidArgumentError: an element is too large for the tier of its token.
    """
    for section, data in zip(layout.sections, layout.split(body), strict=True):
        if not section.dtype.is_floating_point or kernels.halves_are_finite(data, section.dtype):
            continue
        sides = data.clone().view(section.dtype).view(section.shape)
        side = 0 if not bodies.is_finite(sides[0]) else 1
        name, sent = list(states.items())[side]
        if section.tier == Tier.FP16:
            kept = (tiers == Tier.FP16).to(sent.device)
            bodies.refuse_infinite(name, Tier.FP16, sent[:, kept], section.dtype)
        broken = int((~sides[side].isfinite()).sum())
        largest = torch.finfo(torch.float16).max * FORMATS[section.tier].largest
        coded = sent[:, (tiers == section.tier).to(sent.device)]
        kind = InvalidArgumentError if bool(coded.isfinite().all()) else NotFiniteError
        raise kind(
            f"{name} of {broken} of {sides[side].numel()} token-heads cannot be coded at tier "
            f"{Tier(section.tier).name}: they hold an element that is infinite, NaN, or beyond ±{largest:.6g}"
        )


def check_received_scales(body: torch.Tensor, layout: BodyLayout) -> None:
    """Refuse a body with scales that are infinite or NaN.

    Args:
        body: uint8 `[b]`, as it arrived.
        layout: of the body.

    Raises:
        DataLossError: with the reason `scale`.
    """
    for section, data in zip(layout.sections, layout.split(body), strict=True):
        is_scale = section.dtype.is_floating_point and section.tier != Tier.FP16
        if is_scale and not kernels.halves_are_finite(data, section.dtype):
            scales = data.clone().view(section.dtype)
            broken = int((~scales.isfinite()).sum())
            raise DataLossError(
                f"{broken} of {scales.numel()} {Tier(section.tier).name} scales of a segment are infinite or NaN",
                reason="scale",
            )
