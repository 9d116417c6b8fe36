"""Compilation for CPUs: numba, and what LLVM is told beyond numba."""
