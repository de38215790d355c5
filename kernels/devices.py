"""The GPUs that kernels are compiled for without one: data."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DEVICES", "Device"]


class Device(NamedTuple):
    """processors: multiprocessors of the best-known GPU of a capability. threads, blocks: at once on one of them.
    shared_kib: that a block may use there; all blocks of a multiprocessor may use 1 more, and each takes 1 for itself.
    """

    name: str
    processors: int
    threads: int
    blocks: int
    shared_kib: int

    def blocks_at_once(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Blocks that a multiprocessor runs at once, of so many threads, registers a thread, and bytes a block.

        A warp's registers are given out by 256, and there are 65536 (CUDA occupancy calculator).
        """
        warps = -(-threads // 32)
        by_registers = 65536 // (-(-32 * registers // 256) * 256) // warps
        by_shared = ((self.shared_kib + 1) << 10) // (shared_bytes + 1024)
        return min(self.blocks, self.threads // (32 * warps), by_registers, by_shared)


DEVICES = {
    "sm80": Device("A100", 108, 2048, 32, 163),
    "sm86": Device("RTX 3090", 82, 1536, 16, 99),
    "sm89": Device("L4", 58, 1536, 24, 99),
    "sm90": Device("H200", 132, 2048, 32, 227),
    "sm100": Device("B200", 148, 2048, 32, 227),
    "sm120": Device("RTX 5090", 170, 1536, 24, 99),
}
"""By compute capability (CUDA C++ Programming Guide, table "Technical Specifications")."""
