"""What is measured beside the product's policies without being part of it: the registry of bench-only baselines.

Baselines send no messages. Their bytes follow from a formula that each one states; none of them counts framing,
which favours them. A baseline is a function that puts a prompt's KV into the slots, registered by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from spectrumkv.bench.methods.served_model import Prompt, SentBytes
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.registry import Registry
from spectrumkv.decode_server.kv_pool import Allocation, KvPool

Send = Callable[[Prompt, KvPool, Allocation, float], SentBytes]
"""Puts a prompt's KV at a budget into the slots and says what that took."""


@dataclass(frozen=True)
class Baseline:
    """A way to send KV that is only measured.

    Attributes:
        name: as `--policies` and rows give it.
        codec: what it writes, in rows.
        min_budget: least budget that it can keep to.
        max_budget: largest; the same as the least where it has one setting only.
        requires: module that an optional extra brings; None for none.
        run: does it.
    """

    name: str
    codec: str
    min_budget: float
    max_budget: float
    requires: str | None
    run: Send

    @property
    def fixed(self) -> bool:
        """Whether it has one setting only."""
        return self.min_budget == self.max_budget

    @property
    def installed(self) -> bool:
        """Whether the module that it needs is there."""
        # Looking for a module inside a package imports the package, which may be what is not there.
        package = (self.requires or "").partition(".")[0]
        return self.requires is None or (find_spec(package) is not None and find_spec(self.requires) is not None)

    def check(self, budget: float) -> None:
        """Check a budget.

        Raises:
            InvalidArgumentError: it is out of range.
        """
        if not self.min_budget <= budget <= self.max_budget:
            raise InvalidArgumentError(
                f"baseline {self.name!r} cannot keep to budget {budget}; "
                f"allowed is from {self.min_budget} to {self.max_budget}"
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
    """A baseline at one budget; see `Method`."""

    baseline: Baseline
    budget: float
    scorer: str = ""
    scope: str = ""

    @property
    def policy(self) -> str:
        """The baseline's name."""
        return self.baseline.name

    @property
    def codec(self) -> str:
        """What it writes."""
        return self.baseline.codec

    def send(self, prompt: Prompt, pool: KvPool, allocation: Allocation) -> SentBytes:
        """See `Method.send`."""
        return self.baseline.run(prompt, pool, allocation, self.budget)


def coded_bytes(elements: int, bits: int, groups: int) -> float:
    """Bytes of `elements` codes of `bits` bits and of `groups` 16-bit numbers beside them."""
    return elements * bits / 8 + groups * 2


@baseline("uniform-int3", codec="int3", min_budget=3 / 16)
def uniform_int3(prompt: Prompt, pool: KvPool, allocation: Allocation, budget: float) -> SentBytes:
    """Every token at symmetric INT3 (−3 … 3), a float16 scale for each token in each KV head.

    Bytes: 3 bits an element and 16 bits a scale.
    """
    counted = 0.0
    for layer in prompt.captured.layers:
        tokens = layer.tokens
        for states, slots in ((layer.keys, allocation.keys), (layer.values, allocation.values)):
            slots(layer.layer, 0, tokens).copy_(_rounded_symmetric(states, largest=3))
            counted += coded_bytes(states.numel(), 3, states.shape[0] * tokens)
    return SentBytes(counted, budget)


def _rounded_symmetric(states: torch.Tensor, largest: int) -> torch.Tensor:
    """Quantize `[…, head_dim]` symmetrically by the absolute maximum of each row, and back."""
    scales = (states.float().abs().amax(dim=-1, keepdim=True) / largest).half().float()
    # A row of zeros has scale 0 and stays zero.
    codes = (states.float() / scales.clamp(min=torch.finfo(torch.float16).tiny)).round().clamp(-largest, largest)
    return codes * scales
