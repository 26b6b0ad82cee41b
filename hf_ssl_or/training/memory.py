"""Memory of a step on a CPU: kept from one step to the next."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc, malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that tensors free, for the whole process; elsewhere does nothing.

    By default it returns each large block to the system and asks for it again in the next step, where getting the
    pages takes as long as computing with them. What a process holds stays what its largest step needs.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST)
