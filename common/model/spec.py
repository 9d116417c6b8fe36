"""The description of a model that prefill and decode must agree on."""

import re
from dataclasses import dataclass, fields
from typing import NamedTuple

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.v1 import kv_pb2

_DTYPES = ("float32", "float16", "bfloat16")


class SpecDifference(NamedTuple):
    """A field in which two specs differ."""

    field: str
    mine: str | int
    theirs: str | int

    def __str__(self) -> str:
        return f"{self.field} is {self.mine} here and {self.theirs} there"


@dataclass(frozen=True)
class ModelSpec:
    """All that two processes must agree on before one may use the other's KV cache.

    Mirrors `spectrumkv.v1.ModelSpec`. Digests are SHA-256 in hexadecimal; `dtype` is what the model computes
    in; `context_length` is the longest prompt plus completion in tokens.
    """

    architecture: str
    weights_digest: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    rope_digest: str
    tokenizer_digest: str
    vocab_size: int
    context_length: int

    def __post_init__(self) -> None:
        if not self.architecture:
            raise InvalidArgumentError("the model spec names no architecture")
        for name in ("weights_digest", "rope_digest", "tokenizer_digest"):
            if not re.fullmatch("[0-9a-f]{64}", getattr(self, name)):
                raise InvalidArgumentError(
                    f"the model spec's {name} is {getattr(self, name)!r}; expected 64 hex digits"
                )
        for name in ("layers", "kv_heads", "head_dim", "vocab_size", "context_length"):
            if not 1 <= getattr(self, name) < 1 << 32:
                raise InvalidArgumentError(f"the model spec's {name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in _DTYPES:
            raise InvalidArgumentError(f"the model spec's dtype is {self.dtype!r}; valid: {', '.join(_DTYPES)}")

    def differences(self, other: "ModelSpec") -> list[SpecDifference]:
        """The fields in which `other` differs, in the order of declaration; empty where the two agree."""
        pairs = ((one.name, getattr(self, one.name), getattr(other, one.name)) for one in fields(self))
        return [SpecDifference(name, mine, theirs) for name, mine, theirs in pairs if mine != theirs]

    def to_proto(self) -> kv_pb2.ModelSpec:
        """The message that crosses the network."""
        return kv_pb2.ModelSpec(**{one.name: getattr(self, one.name) for one in fields(self)})

    @classmethod
    def from_proto(cls, message: kv_pb2.ModelSpec) -> "ModelSpec":
        """Read the message.

        Raises:
            InvalidArgumentError: a field is missing or cannot be right.
        """
        return cls(**{one.name: getattr(message, one.name) for one in fields(cls)})
