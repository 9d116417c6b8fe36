"""Memory fetched ahead of its use, for loops whose order processors cannot foresee."""

from typing import Any

from llvmlite import ir
from numba import types

from spectrumkv.kernels.jit.compiled import compiled, intrinsic
from spectrumkv.kernels.jit.machine_types import I8, I32

# Elements of 32 bits in a line of the cache, and LLVM's words for "to be read", "often" and "data".
LINE = 16
READ, OFTEN, DATA = 0, 3, 1


@intrinsic
def _fetch_line(_: Any, array: Any, index: Any) -> Any:
    """Ask for the line that holds an element, and do not wait for it."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, I32, I32, I32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(prefetch, [place, I32(READ), I32(OFTEN), I32(DATA)])
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@compiled
def fetch(array: Any, start: int, length: int) -> None:
    """Ask for elements of a contiguous array of 32 bits each, from `start` on; none is read, wherever they are."""
    for index in range(start, start + length, LINE):
        _fetch_line(array, index)
