"""What a codec is, and the registry of them.

A codec turns the keys and values of one prompt's layers into segments, within a budget, and segments back into keys
and values. It knows nothing of requests, chunks or networks. A codec states both halves side by side: `Codec.encoder`
and `Codec.decoder` make what codes and decodes one request. Its byte layout is documented in
proto/spectrumkv/v1/kv.proto; any change of the layout raises `version`, so that old and new refuse each other by
name.

Most codecs are told each token's tier by a policy: they are a `TierCodec` (see `codecs.tiered`), which has all but
the bytes. Others spend a budget of bytes themselves, and tell afterwards which tier each token came nearest to.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch

from spectrumkv.common.errors import FailedPreconditionError, InternalError, InvalidArgumentError
from spectrumkv.common.kv.allocation import TierAllocation
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.codecs.encoder_request import EncoderRequest
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies.base import Policy
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.registry import Registry

# What policies give tokens. Those that name no codec leave it to one that can write all of these.
POLICY_TIERS = frozenset({Tier.DROP, Tier.INT4, Tier.INT8, Tier.FP16})


class KvEncoder(Protocol):
    """What codes the layers of one prompt."""

    def encode(self, capture: LayerCapture) -> Iterator[KvSegment]:
        """Take the next layer, in the model's order, and yield the segments that are ready.

        Args:
            capture: the layer, or a later part of it where tokens leave as they are computed.

        Yields:
            Segments; each holds some tokens of a layer.

        Raises:
            InvalidArgumentError: an element is too large for its tier.
            NotFiniteError: an element is infinite or NaN.
        """
        ...


class SegmentDecoder(Protocol):
    """What decodes the segments of one request."""

    def decode(self, segment: KvSegment, keys: torch.Tensor, values: torch.Tensor) -> Mapping[Tier, int]:
        """Write a segment's tokens; leave dropped tokens' elements alone.

        Args:
            segment: as it arrived; its body may be read-only.
            keys: `[kv_heads, n, head_dim]` in the model's own dtype, any strides, on any device: a view of the slots.
            values: like `keys`.

        Returns:
            How many bytes of the segment's body each tier took.

        Raises:
            DataLossError: the codec cannot write one of the tiers, or the body does not fit them.
        """
        ...


class Codec(ABC):
    """One byte layout, with the encoders and decoders for it.

    Attributes:
        name: as requests and Begin give it.
        version: of the layout.
        tiers: that its tokens can have.
        basis_type: of the basis that both sides need; codecs that name the same type share one. None where the codec
            needs no basis.
        fallback: name of a faster codec that may write the same bit allocation where this one would hold a request
            up; None where there is none.
        gpu_codec: name of a codec that may write the same bit allocation and has kernels for GPUs; None where there
            is none, or the codec has such kernels itself.
        basis_free: name of a codec without a basis that may write the same bit allocation where a worker has not
            received this one's basis yet; None where there is none.
    """

    name: str
    version: int
    tiers: frozenset[Tier]
    basis_type: type[Basis] | None = None
    fallback: str | None = None
    gpu_codec: str | None = None
    basis_free: str | None = None

    @abstractmethod
    def encoder(self, request: EncoderRequest) -> KvEncoder:
        """Make what encodes one prompt.

        Args:
            request: the prompt, and how it is to be coded; `writes` holds for its policy.

        Returns:
            The encoder.

        Raises:
            FailedPreconditionError: the bit allocation needs a basis and there is none.
            InvalidArgumentError: the codec cannot keep to the budget.
        """

    @abstractmethod
    def decoder(self, geometry: KvGeometry, basis: Basis | None) -> SegmentDecoder:
        """Make what decodes one request's segments.

        Args:
            geometry: shape and dtype of the model's cache.
            basis: that Begin names; None where it names none.

        Returns:
            The decoder.

        Raises:
            FailedPreconditionError: the codec needs a basis and there is none.
        """

    def bytes_of_tokens(self, segment: KvSegment, geometry: KvGeometry, basis: Basis | None) -> np.ndarray:
        """Divide the bytes of a segment's body among its tokens.

        Here the tokens of a tier share its bytes evenly, which is what they take where a tier has one width. A codec
        whose tokens have widths of their own says those.

        Args:
            segment: as the encoder made it.
            geometry: shape and dtype of the model's cache.
            basis: that the segment is coded in; None for codecs that need none.

        Returns:
            float64 `[n]`, the body's bytes together.
        """
        tiers = segment.tiers.numpy()
        tokens = np.maximum(np.bincount(tiers, minlength=len(Tier)), 1)
        taken = np.array([segment.tier_bytes.get(tier, 0) for tier in Tier]) / tokens
        of_tokens: np.ndarray = taken[tiers]
        return of_tokens

    def prepare(self, geometry: KvGeometry) -> None:
        """Compile what the codec runs, so that no request waits for it. Codecs that compile nothing do nothing.

        It takes seconds where this machine never did, and a fraction of one where compiled code is in the cache.

        Args:
            geometry: shape and dtype of the model's cache.
        """
        return

    @property
    def needs_basis(self) -> bool:
        """Tell whether both sides need the same basis."""
        return self.basis_type is not None

    @property
    def may_hold_up_requests(self) -> bool:
        """Tell whether coding can be what a request waits for. A codec for which that holds names a fallback."""
        return self.fallback is not None

    @property
    def writes_all_tiers(self) -> bool:
        """Tell whether the codec writes every tier that policies give."""
        return self.tiers >= POLICY_TIERS

    def writes(self, policy: Policy) -> bool:
        """Return whether the codec can write what a policy allocates."""
        return policy.codec == self.name

    def check_policy(self, policy: Policy) -> None:
        """Refuse a policy that the codec cannot write.

        Args:
            policy: any.

        Raises:
            InvalidArgumentError: the codec cannot write it.
        """
        if self.writes(policy):
            return
        if policy.codec is not None:
            raise InvalidArgumentError(
                f"policy {policy.name!r} is written by codec {policy.codec!r}, not by {self.name!r}"
            )
        raise InvalidArgumentError(
            f"codec {self.name!r} cannot write policy {policy.name!r}: "
            f"it only has {', '.join(tier.label for tier in sorted(self.tiers))}"
        )

    def least_byte_budget(self, geometry: KvGeometry) -> float:
        """Return the least byte budget that the codec can keep to, framing left out; 0 where it meets any."""
        return 0.0

    def tier_allocation(self, request: EncoderRequest, token_bytes: Mapping[Tier, float]) -> TierAllocation:
        """Express the codec's own bit allocation in whole tiers, so that another codec can write it.

        Args:
            request: the prompt, and a policy with a byte budget whose codec this is.
            token_bytes: what a token of one layer takes of a body at each tier of the codec that will write it.

        Returns:
            The allocation.

        Raises:
            FailedPreconditionError: the bit allocation needs a basis and there is none.
            InternalError: the codec has no bit allocation of its own.
        """
        raise InternalError(f"codec {self.name!r} has no bit allocation of its own")

    def basis_digest(self, basis: Basis | None) -> bytes:
        """Return the digest by which Begin names the basis; empty for codecs that need none.

        Args:
            basis: the model's; None where there is none.

        Returns:
            SHA-256 or nothing.

        Raises:
            FailedPreconditionError: the codec needs a basis and there is none.
        """
        return needed_basis(self, basis).digest if self.needs_basis else b""


codecs: Registry[Codec] = Registry("codec")


def needed_basis(codec: Codec, basis: Basis | None) -> Basis:
    """Return a basis that a codec cannot do without.

    Args:
        codec: that needs it.
        basis: the model's; None where there is none.

    Returns:
        `basis`.

    Raises:
        FailedPreconditionError: there is none.
    """
    if basis is None:
        raise FailedPreconditionError(
            f"codec {codec.name!r} needs a basis, and this service has none for its model; ask for another policy"
        )
    return basis


def prepare_codecs(geometry: KvGeometry) -> None:
    """Prepare every codec; see `Codec.prepare`.

    Args:
        geometry: shape and dtype of the model's cache.
    """
    for name in codecs:
        codecs.get(name).prepare(geometry)


def basis_types() -> tuple[type[Basis], ...]:
    """Return the types of bases that the registered codecs need, each once."""
    needed = (codecs.get(name).basis_type for name in codecs)
    return tuple(dict.fromkeys(one for one in needed if one is not None))


def largest_basis_bytes(geometry: KvGeometry) -> int:
    """Return the most bytes that a serialized basis of any type can have; 0 where no codec needs one.

    Args:
        geometry: shape and dtype of the model's cache.
    """
    return max((one.largest_bytes(geometry) for one in basis_types()), default=0)


def parse_basis(data: bytes, geometry: KvGeometry) -> Basis:
    """Read a basis that some codec needs; what is in it tells its type.

    Args:
        data: as it travels.
        geometry: shape and dtype of the model's cache.

    Returns:
        The basis.

    Raises:
        InvalidArgumentError: it is of none of the types, or is not one for this model.
    """
    refusals = []
    for one in basis_types():
        try:
            return one.parse(data, geometry)
        except InvalidArgumentError as refusal:
            refusals.append(refusal.message)
    raise InvalidArgumentError("; ".join(refusals) or "no codec needs a basis")
