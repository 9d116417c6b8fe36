"""Bounds the memory that KV takes on prefill until it has left for decode: a prompt starts when its KV fits."""

import threading
import time
from collections import deque
from types import TracebackType

import torch

from spectrumkv.common.errors import CancelledError, FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.service import cgroup, machine

# Share of the memory that KV may take where no option says how much.
DEFAULT_SHARE = 0.5
# Assumed where the system does not say how much memory there is.
UNKNOWN_MEMORY_BYTES = 8 << 30


def kv_memory_bytes(asked: int | None, device: torch.device) -> int:
    """Return how many bytes prompts' KV may take.

    Args:
        asked: what --prefill-kv-memory says; with None it is half of the memory, or what there is beside the model
            where that is less.
        device: where the model runs.

    Raises:
        FailedPreconditionError: on a CPU, there is not so much memory beside the model.
    """
    if device.type == "cuda":
        return asked or int(DEFAULT_SHARE * torch.cuda.get_device_properties(device).total_memory)
    there = machine.bytes_left()
    if there is None:
        return asked or int(DEFAULT_SHARE * UNKNOWN_MEMORY_BYTES)
    wanted = asked or min(int(DEFAULT_SHARE * (cgroup.memory_bytes() or 0)), there)
    if wanted > there or not there:
        raise FailedPreconditionError(
            f"--prefill-kv-memory is {wanted} bytes, and this machine, or the control group of this process, has "
            f"{cgroup.memory_bytes()}, of which the model and requests leave {there}; set it lower, or give the "
            "service more memory"
        )
    return wanted


class KvMemory:
    """Shares out the memory for KV that has not left yet, first come, first served.

    Args:
        total_bytes: how much there is.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._changed = threading.Condition()
        self._held_bytes = 0
        self._waiting: deque[KvReservation] = deque()

    @property
    def waiting(self) -> int:
        """How many prompts wait for memory."""
        return len(self._waiting)

    def reservation(self, tokens: int, bytes_per_token: int, scope: RpcScope) -> "KvReservation":
        """Return what will hold a prompt's part of the memory.

        Args:
            tokens: of the prompt.
            bytes_per_token: of KV, in all layers.
            scope: the client's RPC.

        Raises:
            InvalidArgumentError: the prompt's KV is larger than all of the memory.
        """
        if tokens * bytes_per_token > self._total_bytes:
            raise InvalidArgumentError(
                f"the prompt has {tokens} tokens, whose KV takes {tokens * bytes_per_token} bytes; this service has "
                f"{self._total_bytes} bytes for KV (--prefill-kv-memory): send at most "
                f"{self._total_bytes // bytes_per_token} tokens"
            )
        return KvReservation(self, tokens * bytes_per_token, scope)

    def obtain(self, reservation: "KvReservation") -> bool:
        """Wait until the reservation's bytes are free, and hold them for it; return at once where it holds them.

        Args:
            reservation: one of this memory, no larger than it.

        Returns:
            False where the reservation ended meanwhile.
        """
        with self._changed:
            if not reservation.ended and not reservation.granted:
                self._waiting.append(reservation)
                self._hand_out()
                self._changed.wait_for(lambda: reservation.granted or reservation.ended)
            return not reservation.ended

    def take_back(self, reservation: "KvReservation", for_good: bool) -> None:
        """Take what a reservation holds; a second call does nothing.

        Args:
            reservation: one of this memory.
            for_good: whether it ends, also where it waits.
        """
        with self._changed:
            if reservation.granted:
                self._held_bytes -= reservation.needed_bytes
                reservation.granted = False
            if for_good and not reservation.ended:
                reservation.ended = True
                if reservation in self._waiting:
                    self._waiting.remove(reservation)
            self._hand_out()
            self._changed.notify_all()

    def _hand_out(self) -> None:
        while self._waiting:
            first = self._waiting[0]
            if self._held_bytes + first.needed_bytes > self._total_bytes:
                return
            self._waiting.popleft()
            first.granted = True
            self._held_bytes += first.needed_bytes
            self._changed.notify_all()


class KvReservation:
    """Holds one request's part of the memory, from `wait` until its KV has left; then it may obtain it once more.

    A context manager; leaving it, or the end of the request's RPC, gives the bytes back.

    Args:
        memory: has the bytes.
        needed_bytes: of the whole prompt's KV.
        scope: the client's RPC.

    Attributes:
        granted: whether it holds the bytes.
        ended: whether it needs them no more.
    """

    def __init__(self, memory: KvMemory, needed_bytes: int, scope: RpcScope) -> None:
        self._memory = memory
        self._scope = scope
        self.needed_bytes = needed_bytes
        self.granted = False
        self.ended = False
        scope.on_end(self.end)

    def wait(self) -> float:
        """Wait for the bytes, unless they are held already.

        Returns:
            The seconds that this took.

        Raises:
            CancelledError: the client went away.
            DeadlineExceededError: the deadline passed.
        """
        started = time.monotonic()
        if not self._memory.obtain(self):
            self._scope.check()
            raise CancelledError("the request ended while it waited for memory")
        return time.monotonic() - started

    def release(self) -> None:
        """Give the bytes back for now, since the KV has left; a second call does nothing."""
        self._memory.take_back(self, for_good=False)

    def end(self) -> None:
        """Give the bytes back, or wait for them no longer; a second call does nothing."""
        self._memory.take_back(self, for_good=True)

    def __enter__(self) -> "KvReservation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
