"""Fused operations, one folder each: the same name is the folder, the function, its test and its benchmark.

Imported as `agln_fast.kernels`. A leaf: nothing here imports the rest of the package.
"""

__all__: list[str] = []
