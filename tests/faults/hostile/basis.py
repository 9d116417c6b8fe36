"""Uploads of codec bases that no honest prefill sends: lies about size and digest, wrong shapes, NaN."""

import hashlib
import json
import math
import random
import struct
from collections.abc import Callable

import torch
from safetensors.torch import load, save

from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.v1 import decode_pb2

Tensors = dict[str, torch.Tensor]
FLOATS = (0.0, -1.0, 1e-45, 1e-38, 1e30, 3e38, math.inf, -math.inf, math.nan)
DOUBLES = (*FLOATS, 1e-300, 1e300)
PIECES = (3000, 50_000, 1 << 20, 2 << 20)


def upload(chance: random.Random, basis: CalibratedBasis) -> tuple[bytes, list[bytes]]:
    """The digest that is announced, and the messages of one hostile PutBasis."""
    data = chance.choice(BASES)(chance, basis)
    digest = hashlib.sha256(data).digest()
    if chance.random() < 0.15:
        digest = chance.choice((b"", bytes(31), bytes(32), chance.randbytes(32), bytes(5000)))
    size = chance.choice(PIECES)
    pieces = [
        decode_pb2.PutBasisRequest(digest=digest, part=data[start : start + size])
        for start in range(0, len(data), size)
    ]
    messages = [piece.SerializeToString() for piece in pieces]
    if chance.random() < 0.2:
        chance.choice(SHUFFLES)(chance, messages)
    return digest, messages


def _tensors(chance: random.Random, basis: CalibratedBasis) -> bytes:
    """Tensors of other shapes, dtypes, names or contents, well packed."""
    tensors = load(basis.serialized)
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice(list(tensors))
        chance.choice(TENSOR_HARMS)(chance, tensors, name)
        if not tensors:
            break
    return bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _shape(chance: random.Random, tensors: Tensors, name: str) -> None:
    tensor = torch.atleast_1d(tensors[name])
    others = (
        tensor[:0],
        tensor[:1],
        tensor[None],
        tensor.flatten(),
        tensor.transpose(0, -1),
        torch.cat([tensor, tensor]),
        torch.zeros(()),
        torch.zeros(0, 2, 0, 0),
    )
    tensors[name] = chance.choice(others)


def _dtype(chance: random.Random, tensors: Tensors, name: str) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.float32, torch.int64, torch.bool, torch.uint8)
    tensors[name] = tensors[name].to(chance.choice(dtypes))


def _name(chance: random.Random, tensors: Tensors, name: str) -> None:
    tensor = tensors.pop(name)
    if chance.random() < 0.5:
        tensors[chance.choice(("", "meann", "layers", "self", "synthesis", "__init__", "\0"))] = tensor


def _values(chance: random.Random, tensors: Tensors, name: str) -> None:
    """A number that is none, or one that no calibration finds, in one place or in all."""
    tensor = tensors[name].clone(memory_format=torch.contiguous_format)
    number = chance.choice(DOUBLES if tensor.dtype == torch.float64 else FLOATS)
    if not tensor.is_floating_point() or not tensor.numel():
        return
    flat = tensor.view(-1)
    flat[chance.choice((slice(None), slice(0, 1), chance.randrange(flat.numel())))] = number
    tensors[name] = tensor


def _singular(chance: random.Random, tensors: Tensors, name: str) -> None:
    """A transform that cannot be undone, or nearly cannot."""
    analysis = tensors.get("analysis")
    if analysis is None or analysis.dim() != 5 or not analysis.numel():
        return
    analysis = analysis.clone()
    analysis[-1, -1, -1, :, 0] = analysis[-1, -1, -1, :, -1] * chance.choice((0.0, 1.0, 1e-20))
    tensors["analysis"] = analysis


TENSOR_HARMS: tuple[Callable[[random.Random, Tensors, str], None], ...] = (
    _shape,
    _dtype,
    _name,
    _values,
    _values,
    _singular,
)


def _header(chance: random.Random, basis: CalibratedBasis) -> bytes:
    """A file whose header lies: about its own length, or about where tensors lie and how large they are."""
    data = basis.serialized
    (size,) = struct.unpack_from("<Q", data)
    if chance.random() < 0.4:
        return struct.pack("<Q", chance.choice((0, 1, size - 1, size + 8, 1 << 27, 1 << 62, 2**64 - 1))) + data[8:]
    header = json.loads(data[8 : 8 + size])
    name = chance.choice([one for one in header if one != "__metadata__"])
    field, values = chance.choice(
        (
            ("shape", ([], [0], [1 << 62, 4], [2**64 - 1], [3, 2, 2, 64, 64, 1 << 40], "x")),
            ("data_offsets", ([0, 0], [0, 1 << 62], [2**63, 2**64 - 1], [8, 4], [0], None)),
            ("dtype", ("F8_E4M3", "I64", "F99", 7, None)),
        )
    )
    header[name][field] = chance.choice(values)
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + data[8 + size :]


def _bytes(chance: random.Random, basis: CalibratedBasis) -> bytes:
    data = bytearray(basis.serialized)
    for _ in range(chance.choice((1, 3, 30))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data[: chance.choice((len(data), len(data) - 1, chance.randrange(len(data)), 7, 0))])


def _too_large(chance: random.Random, basis: CalibratedBasis) -> bytes:
    return basis.serialized + bytes(chance.choice((1, 5000, 1 << 20, 4 << 20)))


def _sound(chance: random.Random, basis: CalibratedBasis) -> bytes:
    return basis.serialized


BASES: tuple[Callable[[random.Random, CalibratedBasis], bytes], ...] = (
    _tensors,
    _tensors,
    _tensors,
    _tensors,
    _header,
    _bytes,
    _too_large,
    _sound,
)


def _lose(chance: random.Random, messages: list[bytes]) -> None:
    place = chance.randrange(max(1, len(messages)))
    del messages[place : place + 1]


def _break_off(chance: random.Random, messages: list[bytes]) -> None:
    del messages[chance.randrange(len(messages) + 1) :]


def _insert(chance: random.Random, messages: list[bytes]) -> None:
    other = decode_pb2.PutBasisRequest(
        digest=chance.randbytes(32), part=chance.randbytes(chance.choice((0, 9, 9000)))
    )
    nonsense = chance.choice((b"", b"\xff" * 20, b"\x0a\xff\xff\xff\x7f", other.SerializeToString()))
    messages.insert(chance.randrange(len(messages) + 1), nonsense)


def _shuffle(chance: random.Random, messages: list[bytes]) -> None:
    chance.shuffle(messages)


SHUFFLES: tuple[Callable[[random.Random, list[bytes]], None], ...] = (_lose, _break_off, _insert, _shuffle)
