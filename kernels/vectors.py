"""Vectors of the processor at hand, for what emits code that LLVM would not make of loops."""

from typing import Any

from llvmlite import binding, ir

FLOAT, LONG, PLACE = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FLOAT_BYTES = 4


def _features() -> dict[str, bool]:
    """What the processor has, as far as LLVM can tell."""
    try:
        found: dict[str, bool] = binding.get_host_cpu_features()
    except RuntimeError:
        return {}
    return found


# Floats in a vector, and whether there are 32 registers for them, or 16.
LANES = 16 if _features().get("avx512f") else 8 if _features().get("avx") else 4
MANY_REGISTERS = LANES != 8
VECTOR = ir.VectorType(FLOAT, LANES)


def pointer_to(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> Any:
    """Pointer to an element of a numba array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [start])


def vector_at(builder: Any, pointer: Any, offset: Any, element: Any = FLOAT) -> Any:
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


def everywhere(builder: Any, value: Any) -> Any:
    """A vector with one float in all lanes."""
    undefined = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, value, LONG(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(LONG, LANES), None))
