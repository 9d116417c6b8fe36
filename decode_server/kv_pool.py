"""The KV cache of the decode service: a pool of slots, which requests reserve before anything is computed."""

import threading
from collections.abc import Iterator
from types import TracebackType

import torch

from spectrumkv.common.errors import FailedPreconditionError, ResourceExhaustedError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.service import cgroup, machine
from spectrumkv.common.telemetry.metrics import Metrics

# How soon a refused prefill may ask again: about the time in which a short answer frees its slots.
RETRY_AFTER_SECONDS = 1.0


class KvPool:
    """Holds all slots of a process. A slot has one token's keys and values in every layer.

    An allocation is one run of neighbouring slots, so that attention reads a request's cache as a plain slice,
    without a page table or a gather. The price is fragmentation: first fit keeps the free runs long, and a
    request that only fits in pieces is refused like one that does not fit.

    Args:
        geometry: shape and dtype of the model's cache.
        memory_bytes: the most memory that the slots may take.
        device: where the model runs.
        metrics: count the slots that are used.

    Attributes:
        geometry: shape and dtype of the model's cache.
        slots: how many slots requests can have.
        slot_bytes: memory of one slot.
        keys: `[layers, kv_heads, slots + 1, head_dim]` in the model's own dtype, on `device`; the last slot is spare.
        values: like `keys`.
        keep_mask: bool `[layers, slots + 1]` on `device`, False where a token of that layer was dropped.

    Raises:
        FailedPreconditionError: the memory does not hold a single slot, or there is not so much of it.
    """

    def __init__(self, geometry: KvGeometry, memory_bytes: int, device: torch.device, metrics: Metrics) -> None:
        self.geometry = geometry
        self.slot_bytes = geometry.layers * geometry.native_bytes_per_token_layer
        self.slots = memory_bytes // self.slot_bytes
        if self.slots < 1:
            raise FailedPreconditionError(
                f"--kv-memory of {memory_bytes} bytes holds no slot; one takes {self.slot_bytes} bytes"
            )
        there = machine.bytes_left()
        if device.type == "cpu" and there is not None and memory_bytes > there:
            raise FailedPreconditionError(
                f"--kv-memory is {memory_bytes} bytes, and this machine, or the control group of this process, has "
                f"{cgroup.memory_bytes()}, of which the model and requests leave {there}; set it lower, or give the "
                "service more memory"
            )
        # One slot more, which padding rows of a CUDA graph read and write.
        shape = (geometry.layers, geometry.kv_heads, self.slots + 1, geometry.head_dim)
        try:
            self.keys = torch.empty(shape, dtype=geometry.native_dtype, device=device)
            self.values = torch.empty(shape, dtype=geometry.native_dtype, device=device)
        except RuntimeError as error:
            # Torch raises this for memory that is not there, on any device.
            raise FailedPreconditionError(
                f"--kv-memory of {memory_bytes} bytes cannot be had on {device}: {str(error).splitlines()[0]}"
            ) from error
        self.keep_mask = torch.ones(geometry.layers, self.slots + 1, dtype=torch.bool, device=device)
        self._metrics = metrics
        self._lock = threading.Lock()
        self._taken: list[Allocation] = []
        self._publish()

    @property
    def spare_slot(self) -> int:
        """The slot that no request can have."""
        return self.slots

    @property
    def used(self) -> int:
        """How many slots requests hold now."""
        with self._lock:
            return sum(allocation.capacity for allocation in self._taken)

    def reserve(self, capacity: int) -> "Allocation":
        """Hold neighbouring slots until the allocation is released.

        Args:
            capacity: how many, 1 or more.

        Returns:
            The slots, a context manager that frees them.

        Raises:
            FailedPreconditionError: `capacity` exceeds the whole pool.
            ResourceExhaustedError: no run of free slots is long enough.
        """
        return self.reserve_each(1, capacity)[0]

    def reserve_each(self, count: int, capacity: int) -> tuple["Allocation", ...]:
        """Hold several runs of neighbouring slots until each is released, or none.

        Args:
            count: how many runs, 1 or more.
            capacity: slots of each, 1 or more.

        Returns:
            The runs, context managers that free them.

        Raises:
            FailedPreconditionError: the runs together exceed the whole pool.
            ResourceExhaustedError: not all of them have room now.
        """
        if count * capacity > self.slots:
            needed = f"{capacity} slots" if count == 1 else f"{capacity} slots for each of {count} answers"
            raise FailedPreconditionError(
                f"prompt and completion need {needed}, and this decode worker has {self.slots}; "
                "raise its --kv-memory or ask for fewer tokens" + (" or answers" if count > 1 else "")
            )
        allocations: list[Allocation] = []
        with self._lock:
            try:
                for _ in range(count):
                    allocations.append(Allocation(self, self._first_fit(capacity), capacity))
                    self._taken.append(allocations[-1])
                    self._taken.sort(key=lambda taken: taken.start)
            except ResourceExhaustedError:
                self._taken = [taken for taken in self._taken if taken not in allocations]
                raise
            self._publish()
        return tuple(allocations)

    def release(self, allocation: "Allocation") -> None:
        """Free the slots; a second call does nothing."""
        with self._lock:
            if allocation in self._taken:
                allocation.keep_all()
                self._taken.remove(allocation)
                self._publish()

    def _first_fit(self, capacity: int) -> int:
        for start, length in self._free_runs():
            if length >= capacity:
                return start
        free = self.slots - sum(taken.capacity for taken in self._taken)
        raise ResourceExhaustedError(
            f"no run of {capacity} free KV slots; {free} of {self.slots} are free", RETRY_AFTER_SECONDS
        )

    def _free_runs(self) -> Iterator[tuple[int, int]]:
        """Yield start and length of each run of free slots, empty ones too."""
        start = 0
        for taken in self._taken:
            yield start, taken.start - start
            start = taken.start + taken.capacity
        yield start, self.slots - start

    def _publish(self) -> None:
        used = sum(taken.capacity for taken in self._taken)
        self._metrics.kv_slots_used_ratio.set(used / self.slots)
        self._metrics.kv_slots_free_run_ratio.set(max(length for _, length in self._free_runs()) / self.slots)
        self._metrics.kv_bytes_resident.set(used * self.slot_bytes)


class Allocation:
    """Holds slots for one request; a context manager that frees them.

    Attributes:
        pool: whose slots they are.
        start: the first slot.
        capacity: how many slots there are, for prompt and completion.
    """

    def __init__(self, pool: KvPool, start: int, capacity: int) -> None:
        self.pool = pool
        self.start = start
        self.capacity = capacity
        self._with_gaps: set[int] = set()

    def keys(self, layer: int, first: int, end: int) -> torch.Tensor:
        """Return keys of one layer.

        Args:
            layer: from 0.
            first: position of the first token.
            end: position after the last token.

        Returns:
            `[kv_heads, end − first, head_dim]` in the model's own dtype on the pool's device, a view of the slots.
        """
        return self.pool.keys[layer, :, self.start + first : self.start + end]

    def values(self, layer: int, first: int, end: int) -> torch.Tensor:
        """Return values of one layer; see `keys`."""
        return self.pool.values[layer, :, self.start + first : self.start + end]

    def keep_mask(self, layer: int) -> torch.Tensor | None:
        """Return which tokens attention may look at in one layer.

        Args:
            layer: from 0.

        Returns:
            bool `[capacity]` on the pool's device, a view of the pool's mask, False where a token was dropped; None
            where no token of the layer was.
        """
        return self._mask(layer) if layer in self._with_gaps else None

    def _mask(self, layer: int) -> torch.Tensor:
        return self.pool.keep_mask[layer, self.start : self.start + self.capacity]

    def drop(self, layer: int, positions: torch.Tensor) -> None:
        """Leave tokens out of this layer's attention.

        Args:
            layer: from 0.
            positions: int64 `[m]` on any device, positions in the prompt.
        """
        positions = positions.to(self.pool.keys.device)
        self._with_gaps.add(layer)
        self._mask(layer).index_fill_(0, positions, False)
        # Attention weighs a masked slot with zero, and zero times what an earlier request left there may be NaN.
        self.keys(layer, 0, self.capacity).index_fill_(1, positions, 0)
        self.values(layer, 0, self.capacity).index_fill_(1, positions, 0)

    def copy_prompt(self, other: "Allocation", tokens: int) -> None:
        """Copy the KV of a prompt, and which of its tokens were dropped.

        Args:
            other: of the same pool; it holds the prompt.
            tokens: length of the prompt.
        """
        for states in (self.pool.keys, self.pool.values):
            states[:, :, self.start : self.start + tokens] = states[:, :, other.start : other.start + tokens]
        for layer in other._with_gaps:
            self._with_gaps.add(layer)
            self._mask(layer)[:tokens] = other._mask(layer)[:tokens]

    def keep_all(self) -> None:
        """Undo every `drop`, so that the next request sees all of its slots."""
        for layer in self._with_gaps:
            self._mask(layer).fill_(True)
        self._with_gaps.clear()

    def release(self) -> None:
        """Free the slots; a second call does nothing."""
        self.pool.release(self)

    def __enter__(self) -> "Allocation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
