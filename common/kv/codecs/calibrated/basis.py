"""The calibrated basis of a model: what both sides must have in common, and how it travels."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.geometry import HeadRange, KvGeometry

# Keys and values, in this order, in every tensor with a `side`.
SIDES = 2
# Names, dtypes and shapes of six tensors take a few hundred.
SAFETENSORS_HEADER_BYTES = 4096
# Models have factors near 1; keys are float32 before and after.
LARGEST_SCALING = 1e6
# A table of angles has a power of two of positions, and no fewer.
LEAST_POSITIONS = 256
# The key of `std` in the serialized form. It is bytes on the wire and part of the digest.
STD_KEY = "spread"


@dataclass(frozen=True, eq=False)
class CalibratedBasis(Basis):
    """A transform for each layer, side (keys, values) and KV head.

    With z a key before its rotary embedding, or a value, the coefficients are `(z − mean) @ analysis`; an error
    of one unit in any of them moves the model's output about equally.

    Attributes:
        mean: float32 `[layers, 2, kv_heads, head_dim]`.
        analysis: float32 `[layers, 2, kv_heads, head_dim, head_dim]`, invertible; columns ordered by falling `std`.
        std: float32 `[layers, 2, kv_heads, head_dim]`, standard deviation of each coefficient.
        attention_exponent: float32 `[layers]`, the power of its mean attention with which a token's sensitivity
            grows.
        rope_frequencies: float64 `[layers, head_dim / 2]`, radians per position; layers with a sliding window may
            turn keys otherwise than the others do (Gemma 3, arXiv 2503.19786, section 2).
        rope_scaling: float64 `[layers]`, factor that the rotary embedding applies to keys besides the rotation.

    Raises:
        InvalidArgumentError: shapes do not fit together, an element is not finite, or one is out of range.
    """

    mean: torch.Tensor
    analysis: torch.Tensor
    std: torch.Tensor
    attention_exponent: torch.Tensor
    rope_frequencies: torch.Tensor
    rope_scaling: torch.Tensor

    def __post_init__(self) -> None:
        layers, _, kv_heads, head_dim = self.mean.shape
        shapes = {
            "mean": (layers, SIDES, kv_heads, head_dim),
            "analysis": (layers, SIDES, kv_heads, head_dim, head_dim),
            "std": (layers, SIDES, kv_heads, head_dim),
            "attention_exponent": (layers,),
            "rope_frequencies": (layers, head_dim // 2),
            "rope_scaling": (layers,),
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            dtype = torch.float64 if name.startswith("rope_") else torch.float32
            if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.isfinite().all():
                raise InvalidArgumentError(
                    f"the basis's {name} is {tensor.dtype} {list(tensor.shape)}; it must be {dtype} {list(shape)} "
                    "and finite"
                )
        if not (self.std > 0).all():
            raise InvalidArgumentError("the basis has a coefficient whose standard deviation is not positive")
        outside = (self.rope_scaling < 1 / LARGEST_SCALING) | (self.rope_scaling > LARGEST_SCALING)
        if outside.any():
            raise InvalidArgumentError(
                f"the basis's rope_scaling is {float(self.rope_scaling[outside][0])} in layer "
                f"{int(outside.nonzero()[0])}; {1 / LARGEST_SCALING:g} to {LARGEST_SCALING:g} are allowed"
            )

    @property
    def head_dim(self) -> int:
        """Count the elements of one key or value."""
        return self.mean.shape[-1]

    @cached_property
    def synthesis(self) -> torch.Tensor:
        """Invert `analysis`.

        Returns:
            float32, of `analysis`'s shape.

        Raises:
            InvalidArgumentError: `analysis` has no inverse.
        """
        message = "the basis has a transform that cannot be undone"
        try:
            # Not by torch, whose MKL fails at batches of large matrices once a number of threads was set.
            inverse = np.linalg.inv(self.analysis.double().numpy())
        except np.linalg.LinAlgError as error:
            raise InvalidArgumentError(message) from error
        synthesis = torch.from_numpy(inverse).float()
        if not synthesis.isfinite().all():
            raise InvalidArgumentError(message)
        return synthesis

    @cached_property
    def serialized(self) -> bytes:
        """Serialize the basis in the format of safetensors, which `from_bytes` reads."""
        tensors = {
            "mean": self.mean,
            "analysis": self.analysis,
            STD_KEY: self.std,
            "attention_exponent": self.attention_exponent,
            "rope_frequencies": self.rope_frequencies,
            "rope_scaling": self.rope_scaling,
        }
        data: bytes = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        return data

    @cached_property
    def digest(self) -> bytes:
        """Compute the SHA-256 of the serialized basis."""
        return hashlib.sha256(self.serialized).digest()

    @property
    def memory_bytes(self) -> int:
        """Count the bytes of the transform and of its inverse; nothing else is large."""
        return 2 * self.analysis.nbytes

    def prepare_decoding(self) -> None:
        """Invert the transform; see `Basis.prepare_decoding`."""
        _ = self.synthesis

    @classmethod
    def largest_bytes(cls, geometry: KvGeometry) -> int:
        """Return the most bytes that a serialized basis can have; see `Basis.largest_bytes`."""
        vectors = geometry.layers * SIDES * geometry.kv_heads * geometry.head_dim
        floats = vectors * (geometry.head_dim + 2) + geometry.layers
        doubles = geometry.layers * (geometry.head_dim // 2 + 1)
        return 4 * floats + 8 * doubles + SAFETENSORS_HEADER_BYTES

    def check_fits(self, geometry: KvGeometry) -> None:
        """Check that the basis is one for this model's cache.

        Args:
            geometry: shape and dtype of the model's cache.

        Raises:
            InvalidArgumentError: it is not.
        """
        layers, _, kv_heads, head_dim = self.mean.shape
        mine, theirs = (layers, kv_heads, head_dim), (geometry.layers, geometry.kv_heads, geometry.head_dim)
        if mine != theirs:
            raise InvalidArgumentError(f"the basis has (layers, KV heads, head_dim) = {mine}; the model has {theirs}")

    def rotation(self, layer: int, first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up the rotary angles of a run of positions in one layer.

        Args:
            layer: from 0.
            first: the first position.
            tokens: how many positions.

        Returns:
            Cosine and sine, float32 `[tokens, head_dim / 2]` each.
        """
        return angles(self._frequencies[layer], first, tokens)

    @cached_property
    def _frequencies(self) -> tuple[tuple[float, ...], ...]:
        return tuple(map(tuple, self.rope_frequencies.tolist()))

    def of_heads(self, heads: HeadRange) -> Self:
        """Return the basis of some KV heads; see `Basis.of_heads`."""
        span = slice(heads.first, heads.end)
        return replace(self, mean=self.mean[:, :, span], analysis=self.analysis[:, :, span], std=self.std[:, :, span])

    @classmethod
    def parse(cls, data: bytes, geometry: KvGeometry) -> Self:
        """Return the basis that was read, which fits the model; see `Basis.parse`."""
        basis = cls.from_bytes(data)
        basis.check_fits(geometry)
        return basis

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a basis; the inverse of `serialized`.

        Args:
            data: in the format of safetensors.

        Returns:
            The basis.

        Raises:
            InvalidArgumentError: `data` is no basis.
        """
        try:
            tensors = load(data)
            std = tensors.pop(STD_KEY)
            return cls(**tensors, std=std)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InvalidArgumentError(f"these {len(data)} bytes are no calibrated basis: {error}") from error


def identity_basis(geometry: KvGeometry) -> CalibratedBasis:
    """Return a basis that changes nothing, for trials before a model's own is known.

    Args:
        geometry: shape and dtype of the model's cache.
    """
    layers, head_dim = geometry.layers, geometry.head_dim
    lead = (layers, SIDES, geometry.kv_heads)
    return CalibratedBasis(
        mean=torch.zeros(*lead, head_dim),
        analysis=torch.eye(head_dim).expand(*lead, -1, -1).contiguous(),
        std=torch.ones(*lead, head_dim),
        attention_exponent=torch.ones(layers),
        rope_frequencies=torch.ones(layers, head_dim // 2, dtype=torch.float64),
        rope_scaling=torch.ones(layers, dtype=torch.float64),
    )


def angles(frequencies: tuple[float, ...], first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotary angles of a run of positions.

    Args:
        frequencies: radians per position, `head_dim / 2` of them.
        first: the first position.
        tokens: how many positions.

    Returns:
        Cosine and sine, float32 `[tokens, head_dim / 2]` each: views of a table that is kept.
    """
    end = first + tokens
    cosine, sine = _angle_table(frequencies, max(LEAST_POSITIONS, 1 << (end - 1).bit_length()))
    return cosine[first:end], sine[first:end]


@lru_cache(maxsize=16)
def _angle_table(frequencies: tuple[float, ...], positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine from position 0 on: all layers and segments of all prompts look up the same ones."""
    turned = torch.arange(positions, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return turned.cos().float(), turned.sin().float()


def rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding (RoPE, arXiv 2104.09864, section 3.2.2) in the halves layout of `transformers`.

    Args:
        states: float `[heads, n, d]`.
        cosine: float32 `[n, d / 2]` of each position's angles.
        sine: like `cosine`; minus the sine undoes the rotation.

    Returns:
        `[heads, n, d]`: elements j and j + d/2 turned by the angle of their position.
    """
    low, high = states.chunk(2, dim=-1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)
