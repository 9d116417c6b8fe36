"""Whether policy "spectral" is written by its entropy coder or at fixed widths: by what requests have shown.

Coding runs while the prompt is computed and while earlier bytes travel. Where it takes no longer than either, its
quality is free. Where the model and the link are both faster than the coder (a GPU's prefill, a fast
network), the request would wait for the coder; then the fixed-width form of the same allocation goes out instead.
"""

import statistics
import threading
from collections import deque
from dataclasses import dataclass, field

from spectrumkv.common.kv.codecs.base import TierCodec, codecs
from spectrumkv.common.kv.codecs.spectral.tier_allocation import least_budget
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.prefill_server.transfer.pipeline import SentKv
from spectrumkv.prefill_server.transfer.plan import FIXED_WIDTH_CODEC, KvPlan

# Nobody notices a hand-off that is shorter by less, and short measurements are noise.
WORTH_SECONDS = 0.05
# Of so many of the latest requests the middle one counts, once there are three: a stall is no pace.
REMEMBERED, ENOUGH = 9, 3
# The link holds requests up where it takes at least this share of the time spent on coding.
LINK_SHARE = 0.1
# What the budget must leave above INT4 everywhere, for framing.
FRAMING_ROOM = 1.02


@dataclass
class RunningMedian:
    """Seconds for each unit of something, by the latest measurements."""

    measured: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def add(self, seconds: float, units: float) -> None:
        """Take in that `units` took `seconds`."""
        self.measured.append(seconds / units)

    @property
    def seconds(self) -> float | None:
        """The median; None before there are enough."""
        return statistics.median(self.measured) if len(self.measured) >= ENOUGH else None


@dataclass
class CodecSelector:
    """Chooses for each request, and learns from each.

    Attributes:
        geometry: shape and dtype of the model's cache.
        prefill: seconds a prompt token.
        coder: seconds that the entropy coder takes for a prompt token, scores included.
        links: seconds a byte on the way to each worker; see `_link_seconds`.
    """

    geometry: KvGeometry
    prefill: RunningMedian = field(default_factory=RunningMedian)
    coder: RunningMedian = field(default_factory=RunningMedian)
    links: dict[str, RunningMedian] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def select(self, plan: KvPlan, tokens: int, worker: str) -> KvPlan:
        """Return the plan with its codec settled.

        Args:
            plan: with a codec that may be open.
            tokens: of the prompt.
            worker: the decode worker that the KV goes to.
        """
        if not plan.codec_is_open:
            return plan
        codec = codecs.get(FIXED_WIDTH_CODEC)
        assert isinstance(codec, TierCodec)
        if plan.budget < FRAMING_ROOM * least_budget(codec, self.geometry):
            return plan
        reason = self._reason(plan.budget, tokens, worker)
        return plan.at_fixed_width(reason) if reason else plan

    def _reason(self, budget: float, tokens: int, worker: str) -> str:
        """Why the coder should not be used; empty where it should."""
        with self._lock:
            coder, prefill = self.coder.seconds, self.prefill.seconds
            link = self.links.get(worker, RunningMedian()).seconds
        if coder is None or prefill is None or link is None:
            return ""
        coding, computing = coder * tokens, prefill * tokens
        sending = link * budget * self.geometry.fp16_bytes(tokens)
        if coding - max(computing, sending) < WORTH_SECONDS:
            return ""
        return (
            f"coding would take {coding:.2f} s, longer than computing the prompt ({computing:.2f} s) and sending it "
            f"to {worker} ({sending:.2f} s)"
        )

    def observe(self, plan: KvPlan, tokens: int, worker: str, prefill_seconds: float, sent: SentKv) -> None:
        """Learn from a request that was sent to the end.

        Where coding took no time worth mentioning nothing is learned: what it takes for each token of a short prompt
        says nothing of a long one.

        Args:
            plan: as it was carried out.
            tokens: of the prompt.
            worker: the decode worker that the KV went to.
            prefill_seconds: what the model's pass took.
            sent: what left, and the time that took.
        """
        coded = plan.codec.needs_basis
        if not plan.codec_reason and not (coded and sent.coder_seconds >= WORTH_SECONDS):
            return
        with self._lock:
            self.prefill.add(prefill_seconds, tokens)
            if coded:
                self.coder.add(sent.coder_seconds, tokens)
            self.links.setdefault(worker, RunningMedian()).add(_link_seconds(sent), sent.message_bytes)


def _link_seconds(sent: SentKv) -> float:
    """How long the bytes would have travelled alone; 0 where both took turns and the link waited for the coder."""
    if sent.coded_ahead:
        return sent.link_seconds
    held_up = sent.link_seconds > LINK_SHARE * sent.encode_seconds
    # Bytes travel while the next ones are coded, so where the link holds up, both together are its time.
    return sent.encode_seconds + sent.link_seconds if held_up else 0.0
