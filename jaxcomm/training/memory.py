"""Keeping freed memory: on CPU a step then makes no page faults.

A step allocates its new state and frees the old one. glibc gives such memory back to the kernel
(the top of a heap, whole heaps of threads, arrays of more than 32 MB), and the next step's page
faults can take longer than its arithmetic.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # <malloc.h>


def keep_memory() -> bool:
    """Tells the C library to keep what is freed, in one heap, for the life of the process.

    For programs that compute on CPU. Call it first of all: heaps of threads that run already stay.
    The environment variable GLIBC_TUNABLES does the same from outside:
    glibc.malloc.trim_threshold=8589934592:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1.

    Returns:
      Whether there is a glibc that listens.

    Example:
      >>> import jaxcomm
      >>> kept = jaxcomm.keep_memory()
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return all([tell(_TRIM_THRESHOLD, -1), tell(_MMAP_MAX, 0), tell(_ARENA_MAX, 1)])
