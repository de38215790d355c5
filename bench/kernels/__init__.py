"""Kernels by themselves: cross-compilation and rooflines."""
