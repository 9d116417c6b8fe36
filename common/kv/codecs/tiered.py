"""Codecs that are told each token's tier: what they share, so that a codec file has the bytes and nothing else."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.allocation import PolicyTiers, RankedTiers, TierAllocation
from spectrumkv.common.kv.budget import BudgetKind
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import Codec, KvEncoder, SegmentDecoder, codecs
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.codecs.encoder_request import EncoderRequest
from spectrumkv.common.kv.codecs.segmentation import segment_boundaries, tier_segments, token_bytes
from spectrumkv.common.kv.codecs.tier_decoder import TierDecoder
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies.base import Policy
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.kv.tiers import Tier


@dataclass(frozen=True)
class EncodedSegment:
    """A run of tokens of one layer, coded.

    Attributes:
        body: uint8 `[b]` on the CPU, `b` even.
        tier_bytes: how many bytes of `body` each tier took.
    """

    body: torch.Tensor
    tier_bytes: dict[Tier, int]


class TierCodec(Codec):
    """A codec that is told each token's tier, and turns tensors into bytes and back at that tier."""

    @abstractmethod
    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, tiers: torch.Tensor, geometry: KvGeometry
    ) -> EncodedSegment:
        """Code `n` tokens.

        Args:
            keys: `[kv_heads, n, head_dim]` in `geometry.native_dtype`, any strides.
            values: like `keys`.
            tiers: uint8 `[n]` on the CPU.
            geometry: shape and dtype of the model's cache.

        Returns:
            The tokens, coded.

        Raises:
            InvalidArgumentError: an element is too large for its tier.
            NotFiniteError: an element is infinite or NaN.
        """

    @abstractmethod
    def decode(
        self,
        body: torch.Tensor,
        tiers: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        geometry: KvGeometry,
    ) -> dict[Tier, int]:
        """Write the tokens of `body` into `keys` and `values`; leave dropped tokens' elements alone.

        Args:
            body: uint8 `[b]` on the CPU, as `encode` made it; it may be read-only.
            tiers: uint8 `[n]` on the CPU.
            keys: `[kv_heads, n, head_dim]` in `geometry.native_dtype`, any strides, on any device: a view
                of the KV slots.
            values: like `keys`.
            geometry: shape and dtype of the model's cache.

        Returns:
            How many bytes of `body` each tier took, as in `EncodedSegment.tier_bytes`.

        Raises:
            DataLossError: the codec cannot write one of the tiers, the body's length does not fit them, or a
                scale is not finite.
        """

    def decode_segments(
        self,
        coded: Sequence[torch.Tensor],
        tiers: Sequence[torch.Tensor],
        slots: Sequence[tuple[torch.Tensor, torch.Tensor]],
        geometry: KvGeometry,
    ) -> list[dict[Tier, int]]:
        """Write the tokens of several segments, of any layers; see `decode`.

        Args:
            coded: one body for each segment.
            tiers: for each segment.
            slots: keys and values of each segment, views of one cache.
            geometry: see `decode`.

        Returns:
            For each segment how many bytes of its body each tier took.

        Raises:
            DataLossError: see `decode`.
        """
        return [
            self.decode(body, of_tokens, *states, geometry)
            for body, of_tokens, states in zip(coded, tiers, slots, strict=True)
        ]

    def encode_segments(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        tiers: torch.Tensor,
        boundaries: Sequence[int],
        geometry: KvGeometry,
    ) -> Iterator[EncodedSegment]:
        """Code `n` tokens in several segments, one after another; see `encode`.

        Args:
            keys: see `encode`.
            values: see `encode`.
            tiers: see `encode`.
            boundaries: the first token of each segment, rising from 0, and n.
            geometry: see `encode`.

        Yields:
            Each segment, coded.
        """
        for first, end in pairwise(boundaries):
            yield self.encode(keys[:, first:end], values[:, first:end], tiers[first:end], geometry)

    def encode_ranked(
        self, keys: torch.Tensor, values: torch.Tensor, tiers: RankedTiers, geometry: KvGeometry
    ) -> Iterator[tuple[torch.Tensor, EncodedSegment]]:
        """Code a layer on a GPU at tiers that the host does not know yet, and here waits for.

        Args:
            keys: see `encode`.
            values: see `encode`.
            tiers: what they follow from.
            geometry: see `encode`.

        Yields:
            The tiers of each segment's tokens, uint8 `[n]` on the CPU, and the segment, coded.

        Raises:
            NotFiniteError: a score or an element is infinite or NaN.
            InvalidArgumentError: an element is too large for its tier.
        """
        known = tiers.on_host()
        boundaries = segment_boundaries(self, known, geometry)
        coded = self.encode_segments(keys, values, known, boundaries, geometry)
        for (first, end), segment in zip(pairwise(boundaries), coded, strict=True):
            yield known[first:end], segment

    def encoder(self, request: EncoderRequest) -> KvEncoder:
        """Make an encoder that writes the policy's tiers, or another codec's bit allocation in whole tiers.

        Args:
            request: the prompt, and how it is to be coded.

        Returns:
            The encoder.

        Raises:
            InvalidArgumentError: the byte budget is less than the codec takes with every token at its cheapest tier.
        """
        geometry = request.geometry
        if request.budget.kind is BudgetKind.TIER_COST:
            allocation = PolicyTiers(
                policy=request.policy,
                tier_budget=request.budget.value,
                scorer=request.scorer,
                int4=request.int4,
                seed=request.seed,
                layers=geometry.layers,
            )
            if request.scope == "model":
                return OneTierEncoder(self, geometry, allocation)
            return TieredEncoder(self, geometry, allocation)
        least = self.least_byte_budget(geometry)
        if request.budget.value < least:
            raise InvalidArgumentError(
                f"codec {self.name!r} takes {least:.3f} of FP16 with every token at {self.cheapest_tier.name}, and "
                f"the budget is {request.budget.value:g}; ask for more, or leave the codec to the server"
            )
        taken = {tier: token_bytes(self, tier, geometry) for tier in self.tiers}
        owner = codecs.get(request.policy.codec or self.name)
        return TieredEncoder(self, geometry, owner.tier_allocation(request, taken))

    def decoder(self, geometry: KvGeometry, basis: Basis | None) -> SegmentDecoder:
        """Return a decoder, which needs no basis; see `Codec.decoder`."""
        return TierDecoder(self, geometry)

    def writes(self, policy: Policy) -> bool:
        """Return whether the codec has the policy's tiers; a policy of another codec must leave tiers to that.

        Args:
            policy: any.
        """
        free = policy.codec is None or policy.budget_kind is BudgetKind.BYTES
        return policy.codec == self.name or (free and self.writes_all_tiers)

    @property
    def cheapest_tier(self) -> Tier:
        """Return the cheapest tier at which a token is sent."""
        return min(self.tiers - {Tier.DROP})

    def least_byte_budget(self, geometry: KvGeometry) -> float:
        """Return what the codec takes of FP16 with every token at its cheapest tier, headers left out.

        Args:
            geometry: shape and dtype of the model's cache.
        """
        return token_bytes(self, self.cheapest_tier, geometry) / geometry.fp16_bytes_per_layer(1)


@dataclass(frozen=True)
class TieredEncoder:
    """A `KvEncoder` that codes each layer at tiers of its own, as it comes.

    Attributes:
        codec: writes the tiers.
        geometry: shape and dtype of the model's cache.
        allocation: decides the tiers.
    """

    codec: TierCodec
    geometry: KvGeometry
    allocation: TierAllocation

    def encode(self, capture: LayerCapture) -> Iterator[KvSegment]:
        """Code a layer; see `KvEncoder.encode`.

        Args:
            capture: the layer.

        Yields:
            Its segments.
        """
        for segment in tier_segments(self.codec, capture, self.allocation.tiers(capture), self.geometry):
            self.allocation.account(segment.wire_bytes)
            yield segment


@dataclass(frozen=True)
class OneTierEncoder:
    """A `KvEncoder` that codes each token at one tier in all layers, once all layers have come.

    Attributes:
        codec: writes the tiers.
        geometry: shape and dtype of the model's cache.
        allocation: decides the tiers.
    """

    codec: TierCodec
    geometry: KvGeometry
    allocation: PolicyTiers
    _held: list[LayerCapture] = field(default_factory=list, init=False)

    def encode(self, capture: LayerCapture) -> Iterator[KvSegment]:
        """Hold a layer; code them all with the last one. See `KvEncoder.encode`.

        Args:
            capture: the layer.

        Yields:
            The segments of all layers, after the last one.
        """
        self._held.append(capture)
        if len(self._held) == self.geometry.layers:
            tiers = self.allocation.tiers_in_all_layers(self._held)
            while self._held:
                yield from tier_segments(self.codec, self._held.pop(0), tiers, self.geometry)


def tier_codecs() -> dict[str, TierCodec]:
    """Return the codecs that write the tiers of policies, by name."""
    return {name: codec for name in codecs if isinstance(codec := codecs.get(name), TierCodec)}
