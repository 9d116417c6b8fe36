"""What both sides of a codec must have in common for one model, and how it travels.

A basis is known by its digest and not by a codec: codecs that code in the same basis name the same type of basis, and
one upload serves them all.
"""

from abc import ABC, abstractmethod
from typing import Self

from spectrumkv.common.kv.geometry import HeadRange, KvGeometry


class Basis(ABC):
    """A transform, or the like, that a codec needs for one model and that both sides must share."""

    @property
    @abstractmethod
    def digest(self) -> bytes:
        """Return the SHA-256 of `serialized`, by which Begin names the basis."""

    @property
    @abstractmethod
    def serialized(self) -> bytes:
        """Return the basis as it travels."""

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """Return the bytes that the basis takes in memory once `prepare_decoding` has run."""

    @abstractmethod
    def prepare_decoding(self) -> None:
        """Compute what only decoding needs, so that no request waits for it.

        Raises:
            InvalidArgumentError: what is coded in the basis cannot be decoded.
        """

    @classmethod
    @abstractmethod
    def parse(cls, data: bytes, geometry: KvGeometry) -> Self:
        """Read a basis as it travels, and check that it is one for this model.

        Args:
            data: what `serialized` gave on the other side.
            geometry: shape and dtype of the model's cache.

        Returns:
            The basis.

        Raises:
            InvalidArgumentError: it is no basis of this type, or not one for this model.
        """

    @classmethod
    @abstractmethod
    def largest_bytes(cls, geometry: KvGeometry) -> int:
        """Return the most bytes that a serialized basis can have.

        Args:
            geometry: shape and dtype of the model's cache.
        """

    @abstractmethod
    def of_heads(self, heads: HeadRange) -> Self:
        """Return the basis of some KV heads; its digest is another one.

        Args:
            heads: of the model.
        """
