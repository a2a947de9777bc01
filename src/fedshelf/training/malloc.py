"""Keeps freed memory in the process for the next training step, in large pages.

Each step allocates and frees the same activations. By default, the C library returns blocks of that size to the system
each time, and uses pages of 4 KiB, which are expensive under virtual machines: together this costs about a tenth of a
small model's step (docs/explanation/simulation-engines.md).
"""

import ctypes
import mmap
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_PAGE = 2 << 20


def keep_freed_memory(*, large_pages: int = 256 << 20, largest: int = 1 << 30) -> bool:
    """Keep freed memory in this process, and use pages of 2 MiB for the heap's next `large_pages` bytes.

    Call this before the first training step. Untouched memory is not used, and results do not change.

    Args:
        large_pages: bytes of the heap in large pages.
        largest: larger blocks, in bytes, are still returned to the system.

    Returns:
        Whether it is supported: only on Linux with the GNU C library.
    """
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt, sbrk, malloc, free, madvise = (
            getattr(libc, name) for name in ("mallopt", "sbrk", "malloc", "free", "madvise")
        )
    except (OSError, AttributeError):
        return False  # other C libraries have another allocator
    sbrk.restype, malloc.restype = ctypes.c_void_p, ctypes.c_void_p
    sbrk.argtypes, malloc.argtypes, free.argtypes = [ctypes.c_ssize_t], [ctypes.c_size_t], [ctypes.c_void_p]
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for option, value in ((_MMAP_THRESHOLD, largest), (_TRIM_THRESHOLD, 2 * largest - 1), (_TOP_PAD, _PAGE)):
        mallopt(option, value)
    block = malloc(large_pages)
    if not block:
        return False
    free(block)  # the heap now extends that far, untouched
    end = sbrk(0)
    start = -(-(end - large_pages) // _PAGE) * _PAGE
    return bool(madvise(start, end - start, mmap.MADV_HUGEPAGE) == 0)
