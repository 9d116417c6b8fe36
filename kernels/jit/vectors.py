"""Vectors of the processor at hand, for what emits code that LLVM would not make of loops."""

import platform
from typing import Any

from llvmlite import binding, ir

from spectrumkv.kernels.jit.machine_types import F32, I32

FLOAT_BYTES = 4
X86 = ("x86_64", "AMD64")


def _features() -> dict[str, bool]:
    """What the processor has, as far as LLVM can tell."""
    try:
        found: dict[str, bool] = binding.get_host_cpu_features()
    except RuntimeError:
        return {}
    return found


# Floats in a vector, and whether there are 32 registers for them, or 16. Vectors of 4 are NEON's, which has 32: what
# of x86 has no AVX does not convert float16 either.
LANES = 16 if _features().get("avx512f") else 8 if _features().get("avx") else 4
MANY_REGISTERS = LANES != 8
VECTOR = ir.VectorType(F32, LANES)


def converts_float16() -> bool:
    """Whether the processor converts float16 to float32 and back; else LLVM calls functions that are not there."""
    return platform.machine() not in X86 or any(_features().get(one) for one in ("f16c", "avx512f"))


def pointer_to(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> Any:
    """Pointer to an element of a numba array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [start])


def vector_at(builder: Any, pointer: Any, offset: Any, element: Any = F32) -> Any:
    """Pointer to the vector of `LANES` elements that starts so many elements on."""
    return builder.bitcast(builder.gep(pointer, [offset]), ir.VectorType(element, LANES).as_pointer())


def load(builder: Any, pointer: Any, alignment: int = FLOAT_BYTES) -> Any:
    """A vector that lies at any multiple of so many bytes."""
    loaded = builder.load(pointer)
    loaded.align = alignment
    return loaded


def store(builder: Any, value: Any, pointer: Any) -> None:
    """Store a vector of floats at any address of floats."""
    builder.store(value, pointer).align = FLOAT_BYTES


def splat(builder: Any, value: Any) -> Any:
    """A vector with one float in all lanes."""
    undefined = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, value, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, LANES), None))


def exchanged_lanes(apart: int) -> tuple[Any, Any]:
    """Masks that shuffle a pair of vectors into one of the lanes that stay and one of those that change places.

    With `apart` 1, 2, 4 … in turn, that transposes as many vectors as they have lanes (Eklundh 1972). Lanes of the
    second vector are numbered on from those of the first.
    """
    stay = [lane if not lane & apart else LANES + lane - apart for lane in range(LANES)]
    move = [lane + apart if not lane & apart else LANES + lane for lane in range(LANES)]
    kind = ir.VectorType(I32, LANES)
    return ir.Constant(kind, stay), ir.Constant(kind, move)
