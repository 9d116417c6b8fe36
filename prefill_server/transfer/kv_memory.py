"""Bounds the memory that KV takes on prefill until it has left for decode: a prompt starts when its KV fits."""

import threading
from collections import deque

import torch

from spectrumkv.common.service.start_checks import memory_bytes

# Share of the memory that KV may take where no option says how much.
DEFAULT_SHARE = 0.5
# Assumed where the system does not say how much memory there is.
UNKNOWN_MEMORY_BYTES = 8 << 30


def default_kv_memory(device: torch.device) -> int:
    """Return how many bytes prompts' KV may take on a device where no option says it.

    Args:
        device: where the model runs.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = memory_bytes() or UNKNOWN_MEMORY_BYTES
    return int(DEFAULT_SHARE * memory)


class KvMemory:
    """Shares out the memory for KV that has not left yet, first come, first served.

    A prompt whose KV is larger than all of the memory starts once no other prompt holds any.

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

    def obtain(self, reservation: "KvReservation") -> bool:
        """Wait until the reservation's bytes are free, and hold them for it until its end.

        Args:
            reservation: one of this memory, for the first time.

        Returns:
            False where the reservation ended meanwhile.
        """
        with self._changed:
            if reservation.ended:
                return False
            self._waiting.append(reservation)
            self._hand_out()
            self._changed.wait_for(lambda: reservation.granted or reservation.ended)
            return not reservation.ended

    def take_back(self, reservation: "KvReservation") -> None:
        """End a reservation, whether it waits or holds memory; a second call does nothing."""
        with self._changed:
            if reservation.ended:
                return
            reservation.ended = True
            if reservation.granted:
                self._held_bytes -= reservation.needed_bytes
            elif reservation in self._waiting:
                self._waiting.remove(reservation)
            self._hand_out()
            self._changed.notify_all()

    def _hand_out(self) -> None:
        while self._waiting:
            first = self._waiting[0]
            if self._held_bytes and self._held_bytes + first.needed_bytes > self._total_bytes:
                return
            self._waiting.popleft()
            first.granted = True
            self._held_bytes += first.needed_bytes
            self._changed.notify_all()


class KvReservation:
    """Holds one prompt's part of the memory, from `obtain` to `end`.

    Args:
        memory: has the bytes.
        needed_bytes: of the whole prompt's KV.

    Attributes:
        granted: whether the bytes were handed out.
        ended: whether they are needed no more.
    """

    def __init__(self, memory: KvMemory, needed_bytes: int) -> None:
        self._memory = memory
        self.needed_bytes = needed_bytes
        self.granted = False
        self.ended = False

    def obtain(self) -> bool:
        """Wait for the bytes.

        Returns:
            False where the reservation ended meanwhile.
        """
        return self._memory.obtain(self)

    def end(self) -> None:
        """Give the bytes back, or wait for them no longer; a second call does nothing."""
        self._memory.take_back(self)
