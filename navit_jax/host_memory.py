"""Keeps the memory of a training step with the process between steps, for steps that run on the CPU.

XLA allocates a step's temporaries anew each time, and the C library gives blocks of that size back to the system, which
then clears every page again: for 1.3 GiB 340,000 page faults and 0.8 of 4.1 cpu-seconds a step. Kept, they cost none.

Compiling leaves 45,000 pieces of free memory, of as many sizes, between what lives on. The C library keeps them sorted
in lists, and a product that allocates its workspace walks them: 8 % of a step. So they are set aside.
"""

import contextlib
import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
_LEAST, _WHOLE, _SHRINK = 16 << 10, 64 << 20, 10 / 11
_kept = False


class _Info(ctypes.Structure):
    """glibc's struct mallinfo2, in bytes."""

    _fields_ = [(f"before_{i}", ctypes.c_size_t) for i in range(8)] + [
        ("free", ctypes.c_size_t),
        ("top", ctypes.c_size_t),
    ]


def keep() -> None:
    """Call before numpy and jax are imported: what threads do is settled when the first one starts.

    Does nothing with another C library than glibc.
    """
    global _kept
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)  # large blocks come from the heap, not from mappings that are undone when freed
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # and the heap does not shrink
    libc.mallopt(_M_ARENA_MAX, 1)  # threads share it: a thread's own arena cannot hold blocks above 64 MiB
    _kept = True


def release() -> None:
    """Gives freed memory back to the system; call after compiling, before the first step.

    Where memory is kept, what is free in pieces of 16 KiB or more is also set aside: its pages go back, its addresses
    are not used again. One whole block is left instead, for the workspaces of products and for batches.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library, or glibc before 2.33
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        if _kept:
            _set_aside(libc)


def _set_aside(libc: ctypes.CDLL) -> None:
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_long]
    libc.mallinfo2.restype = _Info
    free, end, size = libc.mallinfo2().free, libc.sbrk(0), _WHOLE
    while size >= _LEAST and free > 0:  # the latter ends it where the heap does not grow upwards
        piece = libc.malloc(size)
        if piece and piece + size <= end:
            free -= size
            continue
        libc.free(piece)  # not a piece, but new memory: none of this size is left
        size = int(size * _SHRINK)
    whole = libc.malloc(_WHOLE)
    libc.malloc(2 * _LEAST)  # stays, so that the block does not grow together with a step's temporaries
    libc.free(whole)
