"""What the C library does with memory that was freed."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Keep what this process frees for its own next use; return whether the C library can.

    A step on a CPU makes and frees gigabytes of tensors. glibc gives them back to the system, which then hands out and
    clears every page anew: slower than most of what is done with the tensors. Kept, that happens once, and the process
    stays as large as it was at its peak. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_TRIM_THRESHOLD, -1) and libc.mallopt(M_MMAP_MAX, 0))
