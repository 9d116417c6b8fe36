"""Registers the serializer pair with LMCache (0.5): importing this module adds the serde type `spectrumkv`."""

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde.async_processor import AsyncSerdeProcessor
from lmcache.v1.distributed.serde.base import Deserializer, SerdeProcessor, Serializer
from lmcache.v1.distributed.serde.factory import get_registered_serde_types, register_serde_factory
from lmcache.v1.memory_management import MemoryObj

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.vllm_plugin.lmcache.packing import Packer

TYPE = "spectrumkv"
_OPTIONS = ("policy", "budget", "head_dim", "max_workers")


class SpectrumSerializer(Serializer):  # type: ignore[misc]  # LMCache is not installed where types are checked
    """Packs chunks.

    Args:
        packer: of the model.
    """

    def __init__(self, packer: Packer) -> None:
        self._packer = packer

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Pack a chunk into a buffer.

        Args:
            src: the chunk, KV_2LTD.
            dst: the buffer.
            key: not looked at.

        Returns:
            How many bytes were written.

        Raises:
            InvalidArgumentError: the buffer is too small.
        """
        packed = self._packer.pack(src.tensor)
        into = dst.tensor.view(torch.uint8).flatten()
        if len(packed) > into.numel():
            raise InvalidArgumentError(f"a chunk takes {len(packed)} bytes packed; the buffer has {into.numel()}")
        into[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        return len(packed)

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """Return the most bytes that a chunk of a layout can take packed."""
        (shape,), (dtype,) = layout_desc.shapes, layout_desc.dtypes
        return self._packer.most_bytes(shape, dtype)


class SpectrumDeserializer(Deserializer):  # type: ignore[misc]
    """Unpacks chunks.

    Args:
        packer: of the model.
    """

    def __init__(self, packer: Packer) -> None:
        self._packer = packer

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Unpack a buffer into a chunk; see `Packer.unpack`."""
        data = src.tensor.view(torch.uint8).flatten().cpu().numpy().data
        self._packer.unpack(data, dst.tensor)


def create(options: dict[str, object]) -> SerdeProcessor:
    """Make the pair from the keys beside `"type": "spectrumkv"`.

    Args:
        options: `head_dim`, and where they are not the defaults `policy` (greedy), `budget` (0.3), `max_workers`.

    Returns:
        The pair, as LMCache runs it.

    Raises:
        InvalidArgumentError: an option is unknown, missing or not allowed.
    """
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise InvalidArgumentError(f"unknown option {unknown[0]!r}; allowed: {', '.join(_OPTIONS)}")
    head_dim = options.get("head_dim")
    if type(head_dim) is not int or head_dim < 2:
        raise InvalidArgumentError(f"head_dim is {head_dim!r}; give the elements of one key of the model")
    packer = Packer(str(options.get("policy", "greedy")), float(str(options.get("budget", 0.3))), head_dim)
    workers = int(str(options.get("max_workers", 1)))
    return AsyncSerdeProcessor(SpectrumSerializer(packer), SpectrumDeserializer(packer), max_workers=workers)


if TYPE not in get_registered_serde_types():
    register_serde_factory(TYPE, create)
