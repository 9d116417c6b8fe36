"""LLVM's names for what registers hold, for what emits code."""

from llvmlite import ir

BYTE, WORD, LONG, PLACE = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()
