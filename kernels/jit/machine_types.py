"""LLVM's names for what registers hold, for what emits code."""

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, F32 = ir.HalfType(), ir.FloatType()
