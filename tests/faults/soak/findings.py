"""How much a soak tries, and what came of it."""

import collections
import math
import threading
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.deployment import Service


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    Attributes:
        requests: at least, in all; the first quarter is the warm-up.
        harms: at least, in all; requests are sent until so many are over.
        harm_seconds: between two harms.
        seed: of all that is drawn.
    """

    requests: int
    harms: int
    harm_seconds: float
    seed: int


@dataclass
class Harm:
    """What was done to a worker.

    Attributes:
        what: that it was killed, or the trouble in its process.
        began_at: by the monotonic clock.
        ended_at: when the process had ended; infinite until then.
    """

    what: str
    began_at: float
    ended_at: float = math.inf


@dataclass
class Findings:
    """What came of it.

    Attributes:
        outcomes: requests by how they ended.
        wrong: what must not happen, a sentence each.
        grown: services whose memory grew too much. A short soak, which warms up with 75 requests, cannot judge it.
        harms: what was done to workers.
        checked: greedy answers over exact KV compared with one process of transformers.
        checked_quantized: greedy answers over quantized KV compared with what the same request gets on a quiet day.
        growth: of services that were never killed, since the warm-up: resident memory after each later quarter, open
            files, threads.
    """

    outcomes: "collections.Counter[str]" = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)
    harms: list[Harm] = field(default_factory=list)
    checked: int = 0
    checked_quantized: int = 0
    growth: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def sentence(self, plan: Plan) -> str:
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        harms = ", ".join(
            f"{what} {count}" for what, count in collections.Counter(one.what for one in self.harms).items()
        )
        growth = "; ".join(f"{name}: {what}" for name, what in self.growth.items())
        return (
            f"soak: {sum(self.outcomes.values())} requests, seed {plan.seed}: {outcomes}; "
            f"{self.checked} greedy answers over exact and {self.checked_quantized} over quantized KV checked, "
            f"workers harmed: {harms}; {len(self.wrong)} wrong; growth since the first quarter: {growth}"
        )


@dataclass(frozen=True)
class Resources:
    """What a quiet process holds: resident bytes, open files, threads."""

    resident_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, service: Service) -> "Resources":
        assert service.process is not None
        directory = Path(f"/proc/{service.process.pid}")
        status = dict(line.split(":", 1) for line in (directory / "status").read_text().splitlines())
        return cls(
            int(status["VmRSS"].split()[0]) << 10, len(list((directory / "fd").iterdir())), int(status["Threads"])
        )
