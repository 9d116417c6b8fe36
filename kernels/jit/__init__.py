"""Compilation for CPUs: numba compiles the loops, and LLVM is told directly what loops in Python cannot say.

Read `docs/compiled-loops.md` first. `compiled` has the decorators, `llvm` the instructions that numba lacks, `gemm`
and `softmax` the loops that several operations share, `strided` the way from tensors to memory, `cache` the
directories. Nothing is imported here: numba takes a third of a second to import, and `cache` is used without it.
"""
