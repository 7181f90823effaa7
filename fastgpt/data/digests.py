"""A set of document digests, small enough to hold one for every document of a large corpus."""

from __future__ import annotations

import struct
from array import array

from .documents import DIGEST_BYTES

_PAIR = struct.Struct("<QQ")


class DigestSet:
    """16 bytes a slot, at most two thirds of the slots taken: a third of what a set of `bytes` needs."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(DIGEST_BYTES << 10))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, digest: bytes) -> bool:
        """Put it in; False where it was there already."""
        if not self._place(*_PAIR.unpack(digest)):
            return False
        self._count += 1
        if 3 * self._count > len(self._slots):
            self._grow()
        return True

    def _place(self, low: int, high: int) -> bool:
        high = high or 1  # zero marks a free slot
        slots, mask = self._slots, len(self._slots) // 2 - 1
        slot = low & mask
        while taken := slots[2 * slot + 1]:
            if taken == high and slots[2 * slot] == low:
                return False
            slot = (slot + 1) & mask
        slots[2 * slot], slots[2 * slot + 1] = low, high
        return True

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(2 * old.itemsize * len(old)))
        for slot in range(0, len(old), 2):
            if old[slot + 1]:
                self._place(old[slot], old[slot + 1])
