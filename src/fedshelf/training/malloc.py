"""Memory that training frees is kept for its next step, in large pages.

Each step allocates and frees the same few activations. The C library's default hands blocks of that size back to the
system time and again, and has them in pages of 4 KiB, which is dear under virtual machines: both together cost a small
model's step about a tenth (docs/explanation/simulation-engines.md).
"""

import ctypes
import mmap
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_PAGE = 2 << 20


def keep_freed_memory(*, large_pages: int = 256 << 20, largest: int = 1 << 30) -> bool:
    """Have this process keep what it frees, and its heap's next `large_pages` bytes in pages of 2 MiB.

    Blocks above `largest` bytes still go back to the system. Nothing is touched, so nothing is taken that is not used.
    Call it before the first training step. It changes no result.

    Returns:
        Whether it could be done: on Linux with the GNU C library alone.
    """
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt, sbrk, malloc, free, madvise = (
            getattr(libc, name) for name in ("mallopt", "sbrk", "malloc", "free", "madvise")
        )
    except (OSError, AttributeError):
        return False  # another C library has another allocator
    sbrk.restype, malloc.restype = ctypes.c_void_p, ctypes.c_void_p
    sbrk.argtypes, malloc.argtypes, free.argtypes = [ctypes.c_ssize_t], [ctypes.c_size_t], [ctypes.c_void_p]
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for option, value in ((_MMAP_THRESHOLD, largest), (_TRIM_THRESHOLD, 2 * largest - 1), (_TOP_PAD, _PAGE)):
        mallopt(option, value)
    block = malloc(large_pages)
    if not block:
        return False
    free(block)  # the heap now reaches that far, untouched
    end = sbrk(0)
    start = -(-(end - large_pages) // _PAGE) * _PAGE
    return bool(madvise(start, end - start, mmap.MADV_HUGEPAGE) == 0)
