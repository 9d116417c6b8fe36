"""Register baselines: methods that are measured beside the services' policies and not part of the services.

Baselines send no messages. The docstring of each one states how its bytes are counted; none counts framing, which
favours them. A baseline is a function that writes a prompt's KV into the slots, registered by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from spectrumkv.bench.methods.method import Prompt, SentBytes
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.registry import Registry
from spectrumkv.decode_server.kv_pool import Allocation, KvPool

# Writes a prompt's KV at a budget into the slots, and returns what that took.
Send = Callable[[Prompt, KvPool, Allocation, float], SentBytes]


@dataclass(frozen=True)
class Baseline:
    """Describe a way to send KV that is only measured.

    Attributes:
        name: its name in `--policies` and rows.
        codec: its codec in rows.
        min_budget: smallest budget that it can keep.
        max_budget: largest budget; it equals the smallest if there is only one setting.
        requires: module of an optional extra that it needs; None if it needs none.
        run: writes the KV into the slots.
    """

    name: str
    codec: str
    min_budget: float
    max_budget: float
    requires: str | None
    run: Send

    @property
    def fixed(self) -> bool:
        """Return whether it has only one setting."""
        return self.min_budget == self.max_budget

    @property
    def installed(self) -> bool:
        """Return whether the module that it needs is installed."""
        # Looking for a module inside a package imports the package, which may itself be missing.
        package = (self.requires or "").partition(".")[0]
        return self.requires is None or (find_spec(package) is not None and find_spec(self.requires) is not None)

    def check(self, budget: float) -> None:
        """Check a budget.

        Raises:
            InvalidArgumentError: the budget is out of range.
        """
        if not self.min_budget <= budget <= self.max_budget:
            raise InvalidArgumentError(
                f"baseline {self.name!r} cannot keep budget {budget}; allowed: {self.min_budget} to {self.max_budget}"
            )


baselines: Registry[Baseline] = Registry("baseline")


def baseline(
    name: str, codec: str, min_budget: float, max_budget: float | None = None, requires: str | None = None
) -> Callable[[Send], Send]:
    """Return a decorator that registers a function as the baseline `name`; see `Baseline`."""

    def add(run: Send) -> Send:
        top = min_budget if max_budget is None else max_budget
        baselines.register(name)(Baseline(name, codec, min_budget, top, requires, run))
        return run

    return add


@dataclass(frozen=True)
class BaselineMethod:
    """Run a baseline at one budget; see `Method`."""

    baseline: Baseline
    budget: float
    scorer: str = ""
    scope: str = ""

    @property
    def policy(self) -> str:
        """Return the baseline's name."""
        return self.baseline.name

    @property
    def codec(self) -> str:
        """Return the baseline's codec."""
        return self.baseline.codec

    def send(self, prompt: Prompt, pool: KvPool, allocation: Allocation) -> SentBytes:
        """Return what sending took; see `Method.send`."""
        return self.baseline.run(prompt, pool, allocation, self.budget)


def coded_bytes(elements: int, bits: int, groups: int) -> float:
    """Return the bytes of `elements` codes of `bits` bits and of `groups` 16-bit numbers beside them."""
    return elements * bits / 8 + groups * 2


@baseline("uniform-int3", codec="int3", min_budget=3 / 16)
def uniform_int3(prompt: Prompt, pool: KvPool, allocation: Allocation, budget: float) -> SentBytes:
    """Quantize every token symmetrically to INT3 (−3 … 3), with a float16 scale for each token in each KV head.

    Bytes: 3 bits for each element and 16 bits for each scale.

    Returns:
        The counted bytes and the tier budget.
    """
    counted = 0.0
    for layer in prompt.captured.layers:
        tokens = layer.tokens
        for states, slots in ((layer.keys, allocation.keys), (layer.values, allocation.values)):
            slots(layer.layer, 0, tokens).copy_(_rounded_symmetric(states, largest=3))
            counted += coded_bytes(states.numel(), 3, states.shape[0] * tokens)
    return SentBytes(counted, budget)


def _rounded_symmetric(states: torch.Tensor, largest: int) -> torch.Tensor:
    """Return `[…, head_dim]` quantized symmetrically by the absolute maximum of each row, dequantized to float32."""
    scales = (states.float().abs().amax(dim=-1, keepdim=True) / largest).half().float()
    # A row of zeros has scale 0 and stays zero.
    codes = (states.float() / scales.clamp(min=torch.finfo(torch.float16).tiny)).round().clamp(-largest, largest)
    return codes * scales
