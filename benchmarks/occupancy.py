"""How many blocks of a kernel a multiprocessor holds at a time: the formula, for the chips that have kernels here.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". How registers and shared memory
are handed out: cuda_occupancy.h of the CUDA toolkit, which tests/test_static.py compares this with.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class Chip:
    """What a multiprocessor has."""

    warps: int
    blocks: int
    shared_bytes: int
    """For all blocks."""
    registers: int = 65536
    partitions: int = 4
    """Each has its share of the registers, and a warp stays in one."""
    register_unit: int = 256
    """A warp's registers are handed out in these."""
    shared_unit: int = 128
    """A block's shared memory, in bytes, is handed out in these."""
    shared_reserved: int = 1024
    """Of each block's shared memory, for the system."""


CHIPS = {"sm_80": Chip(warps=64, blocks=32, shared_bytes=164 << 10), "sm_90a": Chip(64, 32, 228 << 10)}


@dataclass(frozen=True)
class Occupancy:
    """How full a multiprocessor is, and by what it is limited."""

    blocks: int
    warps: int
    share: float
    """Of the warps that it could hold."""
    limit: str


def occupancy(chip: Chip, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """Of blocks of `threads` that take `registers` each and share `shared_bytes`, static and dynamic."""
    warps = -(-threads // WARP)
    of_warp = _round_up(registers * WARP, chip.register_unit)
    of_block = _round_up(shared_bytes + chip.shared_reserved, chip.shared_unit)
    limits = {
        "warps": chip.warps // warps,
        "registers": chip.registers // chip.partitions // of_warp * chip.partitions // warps,
        "shared memory": chip.shared_bytes // of_block,
        "blocks": chip.blocks,
    }
    limit = min(limits, key=limits.__getitem__)
    blocks = limits[limit]
    return Occupancy(blocks, blocks * warps, blocks * warps / chip.warps, limit)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
