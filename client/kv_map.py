"""Hold at what precision the prompt's KV was sent, token by token, and sort it into levels that can be shown."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spectrumkv.v1 import prefill_pb2

TOKENS, LAYERS = "tokens", "layers"
DETAILS = {TOKENS: prefill_pb2.KV_MAP_DETAIL_TOKENS, LAYERS: prefill_pb2.KV_MAP_DETAIL_LAYERS}


@dataclass(frozen=True)
class Level:
    """Describe numbers of bits that are shown alike.

    Attributes:
        least: bits per element from which on a token has this level.
        mark: stands for the level where there is no colour.
        name: says what the level is.
        colour: of the level, as "#rrggbb"; the order of the levels can be told from the colours' lightness, too.
    """

    least: float
    mark: str
    name: str
    colour: str


# The colours are matplotlib's "plasma", but for the lightest two, which would glare where a whole prompt has them.
# A tier of codec absmax takes its width and a scale: where heads have 64 elements, 4.25 bits at INT4, 8.25 at INT8.
LEVELS = (
    Level(0.0, "·", "not sent", "#8a8a8a"),
    Level(1e-6, "0", "under 1 bit", "#0d0887"),
    Level(1.0, "1", "1 to 2 bits", "#46039f"),
    Level(2.0, "2", "2 to 3 bits", "#7201a8"),
    Level(3.0, "3", "3 to 4 bits", "#9c179e"),
    Level(4.0, "4", "4 to 5 bits", "#bd3786"),
    Level(5.0, "5", "5 to 6 bits", "#d8576b"),
    Level(6.0, "6", "6 to 7 bits", "#ed7953"),
    Level(7.0, "7", "7 to 8 bits", "#fb9f3a"),
    Level(8.0, "8", "8 to 12 bits", "#fdc45e"),
    Level(12.0, "F", "12 bits and more", "#fbe9a3"),
)
_LEAST = [level.least for level in LEVELS]


def level_of(bits: float) -> Level:
    """Return the level that a number of bits per element has."""
    return LEVELS[bisect_right(_LEAST, bits) - 1]


@dataclass(frozen=True)
class KvMap:
    """Hold the bits per element that each token of the prompt was sent at; `prefill.proto` says what they count.

    Args:
        bits: for each token, the mean over the layers.
        layers: for each layer from 0 up, and each token in it; empty where the request did not ask for layers.
    """

    bits: tuple[float, ...]
    layers: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def from_proto(cls, message: prefill_pb2.KvMap) -> "KvMap":
        """Return the content of the protobuf message."""
        return cls(tuple(message.bits), tuple(tuple(layer.bits) for layer in message.layers))

    def as_json(self, digits: int = 3) -> dict[str, Any]:
        """Return the numbers, rounded to so many decimals; `layers` only where there are some."""
        said: dict[str, Any] = {"bits": _rounded(self.bits, digits)}
        return said | ({"layers": [_rounded(layer, digits) for layer in self.layers]} if self.layers else {})


def _rounded(bits: Sequence[float], digits: int) -> list[float]:
    return [round(one, digits) for one in bits]
