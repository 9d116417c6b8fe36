"""Say what a device check compares, and how large it is: a 7B model on a GPU, or one that only tries the check."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectrumkv.client.request import KvChoice

if TYPE_CHECKING:
    from spectrumkv.common.kv.geometry import KvGeometry

# Ways of sending KV: policies, with the codec that writes them after a colon where it is not the policy's own. A new
# one joins by its name here.
CONTENDERS = ("native", "adaptive", "spectral:absmax", "spectral:fixed_rate")
BUDGET = 0.3


def kv_choice(contender: str, budget: float = BUDGET) -> KvChoice:
    """Return what a request asks for.

    Args:
        contender: a name like those in `CONTENDERS`.
        budget: asked for where the policy leaves a choice of budgets.

    Raises:
        InvalidArgumentError: the policy is unknown.
    """
    # Loading torch takes seconds, so --help does without.
    from spectrumkv.common.kv.policies import policies

    name, _, codec = contender.partition(":")
    policy = policies.get(name)
    fixed = policy.min_budget == policy.max_budget
    return KvChoice(policy=name, codec=codec or None, budget=None if fixed else budget)


@dataclass(frozen=True)
class Scale:
    """Hold the sizes of all stages.

    Attributes:
        device: "cuda" or "cpu".
        shape: a name of `bench.models.shaped_model.SHAPES`.
        kernel_tests: pytest's expression (`-k`) for the tests of the stage `kernels`.
        layers: of the cache that codecs are timed on, like the next three.
        kv_heads: of a layer.
        head_dim: elements of a key in a head.
        tokens: of that cache, and of each prompt.
        codec_rounds: rounds of the stage `codec` that count.
        timeline_rounds: rounds of the stage `timeline` that count.
        streams: how many requests run at once, one row of the stage `streams` for each.
        output_tokens: that each stream generates.
        stream_rounds: rounds of the stage `streams`.
        kv_memory: of the decode service, as `--kv-memory` takes it.
        caveat: why the figures are no measurement; empty where they are one.
    """

    device: str
    shape: str
    kernel_tests: str
    layers: int
    kv_heads: int
    head_dim: int
    tokens: int
    codec_rounds: int
    timeline_rounds: int
    streams: tuple[int, ...]
    output_tokens: int
    stream_rounds: int
    kv_memory: str
    caveat: str = ""

    @property
    def geometry(self) -> "KvGeometry":
        """Return the shape of the cache that codecs are timed on."""
        # Loading torch takes seconds, so --help does without.
        import torch

        from spectrumkv.common.kv.geometry import KvGeometry

        return KvGeometry(self.layers, self.kv_heads, self.head_dim, torch.bfloat16)


FULL = Scale(
    device="cuda",
    shape="mistral-7b",
    kernel_tests="triton or gpu",
    layers=32,
    kv_heads=8,
    head_dim=128,
    tokens=4096,
    codec_rounds=5,
    timeline_rounds=7,
    streams=(1, 8, 32),
    output_tokens=64,
    stream_rounds=2,
    # 32 requests of 4,160 tokens take 17 GB.
    kv_memory="20GiB",
)
TINY = Scale(
    device="cpu",
    shape="tiny",
    kernel_tests="triton and every_dtype",
    layers=2,
    kv_heads=2,
    head_dim=64,
    tokens=160,
    codec_rounds=1,
    timeline_rounds=2,
    streams=(1, 2),
    output_tokens=4,
    stream_rounds=1,
    kv_memory="64MiB",
    caveat="tiny shapes on a CPU, kernels on Triton's interpreter: this tries the check and measures nothing",
)
