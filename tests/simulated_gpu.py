"""A GPU that is none: tensors that say they are on one, so that a machine without one runs the code for GPUs.

Each such tensor holds a tensor of the CPU. Operations of torch run on that, kernels of Triton in its interpreter;
what a GPU would be asked to do is counted on the way. Counts are all that can be learned here: no time, and no race.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction

GPU = torch.device("cuda:0")
# Operations that only prepare memory.
FREE = {
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
    torch.ops.aten.resize_.default,
}
# Operations whose result, or its shape, the host has to know before it goes on.
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.bincount.default,
}


@dataclass
class GpuWork:
    """What a GPU was asked to do.

    Attributes:
        launches: kernels and copies, by name: what costs the host a call, and the GPU a gap.
        waits: times that the host waited for the GPU, by the reason.
        pinned_allocations: buffers of page-locked memory that were made, each of which stops the whole GPU.
    """

    launches: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    pinned_allocations: int = 0

    def clear(self) -> None:
        """Begin to count anew."""
        self.launches.clear()
        self.waits.clear()
        self.pinned_allocations = 0


class GpuTensor(torch.Tensor):
    """A tensor that says it is on a GPU."""

    inner: torch.Tensor
    work: GpuWork
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor, work: GpuWork) -> "GpuTensor":
        # Of a device that torch has everywhere; `device` says another.
        made: GpuTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner, made.work = inner, work
        return made

    def get_device(self) -> int:
        """Return the GPU's number."""
        return 0

    def record_stream(self, stream: Any) -> None:
        """Do nothing: no memory is used again before its time."""

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            self.work.launches.append("fill")
            value = GpuTensor(torch.tensor(value, dtype=self.dtype), self.work)
        super().__setitem__(index, value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on what the tensors hold, and count it."""
        kwargs = dict(kwargs or {})
        gpu = [one for one in tree_leaves((args, kwargs)) if isinstance(one, GpuTensor)]
        work = gpu[0].work
        wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        to_host = wanted is not None and wanted.type == "cpu"
        copies_to_host = func is torch.ops.aten.copy_.default and not isinstance(args[0], GpuTensor)
        masks = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        if not func.is_view and func not in FREE:
            work.launches.append(str(func))
        if func in WAITING or to_host or masks or (copies_to_host and not (len(args) > 2 and args[2])):
            work.waits.append(str(func))
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if to_host or copies_to_host:
            return args[0] if copies_to_host else result
        for one in gpu:
            if result is one.inner:
                return one
        return tree_map(lambda one: GpuTensor(one, work) if isinstance(one, torch.Tensor) else one, result)


def _held(one: Any) -> Any:
    return one.inner if isinstance(one, GpuTensor) else one


class _Factories(TorchFunctionMode):
    """Makes tensors on the GPU, and page-locked memory, where torch would look for a driver."""

    def __init__(self, work: GpuWork) -> None:
        super().__init__()
        self._work = work
        self._pinned: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.pin_memory:
            self._work.pinned_allocations += 1
            return args[0]
        if kwargs.pop("pin_memory", False):
            self._work.pinned_allocations += 1
        gpu = [one for one in (*args[1:2], kwargs.get("device")) if one is not None and _is_gpu(one)]
        if not gpu or any(isinstance(one, GpuTensor) for one in args[:1]):
            return func(*args, **kwargs)
        if func is torch.Tensor.to:
            self._work.launches.append("copy to the GPU")
            return GpuTensor(args[0].clone(), self._work)
        kwargs["device"] = torch.device("cpu")
        if func is not torch.empty:
            self._work.launches.append(func.__name__)
        return GpuTensor(func(*args, **kwargs), self._work)


def _is_gpu(one: Any) -> bool:
    return isinstance(one, torch.device | str) and torch.device(one).type == "cuda"


class _Waiting:
    """A stream or an event: nothing but what is waited for."""

    def __init__(self, work: GpuWork) -> None:
        self._work = work

    def synchronize(self) -> None:
        self._work.waits.append("synchronize")

    def record_event(self, *_: Any) -> "_Waiting":
        return self

    def record(self, *_: Any) -> None:
        """Do nothing: all work is done at once."""

    def wait_event(self, _: "_Waiting") -> None:
        """Do nothing: all work is done at once."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: "_Waiting") -> float:
        return 0.0


@contextmanager
def simulated_gpu() -> Iterator[GpuWork]:
    """Let the thread that runs a `with` block use a GPU that is none.

    Yields:
        What the GPU is asked to do; tensors come there by `to(GPU)`.
    """
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, for which kernels are compiled and not interpreted")
    work = GpuWork()
    run = InterpretedFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        work.launches.append(self.__name__)
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        assert all(isinstance(one, GpuTensor) for one in tensors), f"{self.__name__} reads memory of the host"
        return run(self, *map(_held, args), **kwargs)

    def waiting(*_: Any, **__: Any) -> _Waiting:
        return _Waiting(work)

    with (
        patch.object(InterpretedFunction, "run", counted),
        patch.multiple(
            torch.cuda,
            Stream=waiting,
            Event=waiting,
            current_stream=waiting,
            stream=lambda _: nullcontext(),
            device=lambda _: nullcontext(),
        ),
        _Factories(work),
    ):
        yield work
