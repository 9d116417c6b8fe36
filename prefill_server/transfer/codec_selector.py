"""Chooses the codec of a request: on a GPU the one with kernels, elsewhere by what earlier requests took.

On a CPU, coding runs while the prompt is computed and while earlier bytes travel. Where coding takes no longer than
either, its quality is free. Where the model and the link are both faster than the coder, the request would wait for
it; then another codec writes the same bit allocation: the fallback. A GPU outruns every coder on the CPU, so there
the codec with kernels writes it from the first request on. Where those kernels were found wrong at start, the codec
without a basis stands in.
"""

import statistics
import threading
from collections import deque
from dataclasses import dataclass, field

from spectrumkv.common.kv.codecs.base import Codec
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.transfer.sent_kv import SentKv

# A hand-off that is shorter by less is not worth a worse codec, and shorter measurements are noise.
WORTH_SECONDS = 0.05
# Median of the last nine; at least three, so that one stall cannot decide.
REMEMBERED, ENOUGH = 9, 3
# The link is the bottleneck if requests wait for it at least this fraction of the time spent on coding.
LINK_SHARE = 0.1
# Room for framing: the least budget of a codec without a basis times this must fit the request's.
FRAMING_ROOM = 1.02


@dataclass
class RunningMedian:
    """The median of the latest measurements, in seconds per unit."""

    measured: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def add(self, seconds: float, units: float) -> None:
        """Take in a measurement.

        Args:
            seconds: that the units took together.
            units: more than 0.
        """
        self.measured.append(seconds / units)

    @property
    def seconds(self) -> float | None:
        """Return the median; None before there are enough measurements."""
        return statistics.median(self.measured) if len(self.measured) >= ENOUGH else None


@dataclass
class CodecSelector:
    """What chooses the codec of each request by what earlier requests took.

    Attributes:
        geometry: shape and dtype of the model's cache.
        on_gpu: whether the model runs on a GPU.
        kernels_code: whether the codecs' kernels work there.
        prefill: seconds that the model takes per prompt token.
        coders: by name, seconds that a codec takes per prompt token, scores included.
        links: seconds per byte on the way to each worker; see `_link_seconds`.
    """

    geometry: KvGeometry
    on_gpu: bool = False
    kernels_code: bool = False
    prefill: RunningMedian = field(default_factory=RunningMedian)
    coders: dict[str, RunningMedian] = field(default_factory=dict)
    links: dict[str, RunningMedian] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def basis_free(self, plan: KvPlan) -> Codec | None:
        """Return the codec that may write a request's KV without a basis within its budget; None where there is none.

        Args:
            plan: of the request.
        """
        codec = plan.basis_free
        if codec is None or plan.budget.value < FRAMING_ROOM * codec.least_byte_budget(self.geometry):
            return None
        return codec

    def select(self, plan: KvPlan, tokens: int, worker: str, lacks_basis: bool = False) -> KvPlan:
        """Settle the codec of a request.

        Args:
            plan: with a codec that may be open.
            tokens: of the prompt.
            worker: the decode worker that the KV goes to.
            lacks_basis: whether that worker has not received the basis yet.

        Returns:
            The plan, or the same plan written by another codec.
        """
        if lacks_basis and plan.codec.needs_basis:
            basis_free = self.basis_free(plan)
            reason = f"{worker} has not received the codec's basis yet"
            return plan if basis_free is None else plan.with_fallback(basis_free, reason)
        if self.kernels_code and plan.gpu_codec is not None:
            reason = f"the model runs on a GPU, and codec {plan.codec.name} does not"
            return plan.with_fallback(plan.gpu_codec, reason)
        fallback = self.basis_free(plan) if self.on_gpu else plan.fallback
        if fallback is None:
            return plan
        reason = self._reason(plan.codec.name, fallback.name, plan.budget.value, tokens, worker)
        return plan.with_fallback(fallback, reason) if reason else plan

    def _reason(self, codec: str, fallback: str, budget: float, tokens: int, worker: str) -> str:
        """Return why the fallback should be used; nothing where it should not."""
        with self._lock:
            coder, faster = (self.coders.get(one, RunningMedian()).seconds for one in (codec, fallback))
            prefill, link = self.prefill.seconds, self.links.get(worker, RunningMedian()).seconds
        if coder is None or prefill is None or link is None:
            return ""
        # Which codec is faster is a matter of machine and budget: the fallback is tried before it is judged.
        if faster is not None and (coder - faster) * tokens < WORTH_SECONDS:
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

        A request that a slow codec wrote times the coder, the model and the link, if coding took `WORTH_SECONDS` or
        more: the time per token of a short prompt says nothing of a long one. A request that was given another codec
        times the model and the link, however short it is; otherwise nobody would notice that the link became slow. It
        times that codec, too, if coding took as long. Other requests teach nothing.

        Args:
            plan: as it was carried out.
            tokens: of the prompt.
            worker: the decode worker that the KV went to.
            prefill_seconds: that the model's forward pass took.
            sent: what left, and the time that took.
        """
        is_measured = plan.codec.may_hold_up_requests or plan.uses_fallback
        times_coder = is_measured and sent.coder_seconds >= WORTH_SECONDS
        if not (times_coder or plan.uses_fallback):
            return
        with self._lock:
            self.prefill.add(prefill_seconds, tokens)
            if times_coder:
                self.coders.setdefault(plan.codec.name, RunningMedian()).add(sent.coder_seconds, tokens)
            self.links.setdefault(worker, RunningMedian()).add(_link_seconds(sent), sent.message_bytes)

    def forget(self, worker: str) -> None:
        """Drop what was learnt of the way to a worker that has left for good.

        Args:
            worker: its address.
        """
        with self._lock:
            self.links.pop(worker, None)


def _link_seconds(sent: SentKv) -> float:
    """Return how long the bytes would have travelled alone; 0 where the link waited for the coder."""
    if sent.coded_ahead:
        return sent.link_seconds
    held_up = sent.link_seconds > LINK_SHARE * sent.encode_seconds
    # Bytes travel while the next ones are coded, so where the link is the bottleneck, both together are its time.
    return sent.encode_seconds + sent.link_seconds if held_up else 0.0
