"""The KV cache of the decode service: one arena of slots, reserved before anything is computed."""

import threading
from types import TracebackType

import torch

from spectrumkv.common.errors import FailedPreconditionError, ResourceExhaustedError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.metrics import Metrics

# How soon a refused prefill may ask again: about the time in which a short answer frees its slots.
RETRY_AFTER_SECONDS = 1.0


class SlotArena:
    """All slots of a process. A slot holds one token's keys and values in every layer.

    A reservation is one run of neighbouring slots, so that attention reads a request's cache as a plain slice,
    without a page table or a gather. The price is fragmentation: first fit keeps the free runs long, and a
    request that only fits in pieces is refused like one that does not fit.

    Args:
        geometry: shape and dtype of the model's cache.
        memory_bytes: how much memory the slots may take.
        device: where the model runs.
        metrics: told about every reservation.

    Raises:
        FailedPreconditionError: the memory does not hold a single slot.
    """

    def __init__(self, geometry: KvGeometry, memory_bytes: int, device: torch.device, metrics: Metrics) -> None:
        self.geometry = geometry
        self.slot_bytes = geometry.layers * geometry.native_bytes_per_token_layer
        self.slots = memory_bytes // self.slot_bytes
        if self.slots < 1:
            raise FailedPreconditionError(
                f"--kv-memory of {memory_bytes} bytes holds no slot; one takes {self.slot_bytes} bytes"
            )
        shape = (geometry.layers, geometry.kv_heads, self.slots, geometry.head_dim)
        self.keys = torch.empty(shape, dtype=geometry.native_dtype, device=device)
        self.values = torch.empty(shape, dtype=geometry.native_dtype, device=device)
        self._metrics = metrics
        self._lock = threading.Lock()
        self._taken: list[Reservation] = []

    @property
    def used(self) -> int:
        """Slots reserved now."""
        with self._lock:
            return sum(reservation.capacity for reservation in self._taken)

    def reserve(self, capacity: int) -> "Reservation":
        """Hold `capacity` neighbouring slots until the reservation is released.

        Raises:
            FailedPreconditionError: more than there are at all.
            ResourceExhaustedError: more than are free now.
        """
        if capacity > self.slots:
            raise FailedPreconditionError(
                f"prompt and completion need {capacity} slots, and this decode worker has {self.slots}; "
                "raise its --kv-memory or ask for fewer tokens"
            )
        with self._lock:
            start = self._first_fit(capacity)
            reservation = Reservation(self, start, capacity)
            self._taken.append(reservation)
            self._taken.sort(key=lambda taken: taken.start)
            self._publish()
        return reservation

    def release(self, reservation: "Reservation") -> None:
        """Free the slots; a second call does nothing."""
        with self._lock:
            if reservation in self._taken:
                self._taken.remove(reservation)
                self._publish()

    def _first_fit(self, capacity: int) -> int:
        start = 0
        for taken in self._taken:
            if taken.start - start >= capacity:
                return start
            start = taken.start + taken.capacity
        if self.slots - start >= capacity:
            return start
        free = self.slots - sum(taken.capacity for taken in self._taken)
        raise ResourceExhaustedError(
            f"no run of {capacity} free KV slots; {free} of {self.slots} are free", RETRY_AFTER_SECONDS
        )

    def _publish(self) -> None:
        used = sum(taken.capacity for taken in self._taken)
        self._metrics.kv_slots_used_ratio.set(used / self.slots)
        self._metrics.kv_bytes_resident.set(used * self.slot_bytes)


class Reservation:
    """Slots held for one request; a context manager that frees them.

    Attributes:
        arena: whose slots they are.
        start: the first slot.
        capacity: how many slots, for prompt and completion.
        kept: per layer, bool `[capacity]` on the arena's device where a token of that layer was dropped, else
            None: attention leaves out what is False.
    """

    def __init__(self, arena: SlotArena, start: int, capacity: int) -> None:
        self.arena = arena
        self.start = start
        self.capacity = capacity
        self.kept: list[torch.Tensor | None] = [None] * arena.geometry.layers

    def keys(self, layer: int, first: int, end: int) -> torch.Tensor:
        """Keys of positions `first` to `end` − 1: a view `[kv_heads, end − first, head_dim]`."""
        return self.arena.keys[layer, :, self.start + first : self.start + end]

    def values(self, layer: int, first: int, end: int) -> torch.Tensor:
        """Values of positions `first` to `end` − 1: a view `[kv_heads, end − first, head_dim]`."""
        return self.arena.values[layer, :, self.start + first : self.start + end]

    def drop(self, layer: int, positions: torch.Tensor) -> None:
        """Leave tokens out of this layer's attention.

        Args:
            layer: from 0.
            positions: int64 `[m]`, positions in the prompt.
        """
        device = self.arena.keys.device
        positions = positions.to(device)
        kept = self.kept[layer]
        if kept is None:
            kept = self.kept[layer] = torch.ones(self.capacity, dtype=torch.bool, device=device)
        kept[positions] = False
        # Attention weighs a masked slot with zero, and zero times what an earlier request left there may be
        # NaN.
        self.keys(layer, 0, self.capacity)[:, positions] = 0
        self.values(layer, 0, self.capacity)[:, positions] = 0

    def release(self) -> None:
        """Free the slots; a second call does nothing."""
        self.arena.release(self)

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
