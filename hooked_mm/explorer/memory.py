"""Memory that a visit held, given back to the machine when it has ended."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc


def give_back() -> bool:
    """Free what nobody refers to any more, and hand pages that are empty back to the system.

    What is freed stays with the process otherwise, in pieces that lie between others: the C library keeps them for what
    may come, a set for every thread.

    Returns:
        Whether the system's C library can hand pages back; elsewhere what was freed stays reserved.
    """
    gc.collect()
    name = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim is None:
        return False
    trim(0)
    return True
