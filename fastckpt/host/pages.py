"""Host memory directly from the kernel."""

from __future__ import annotations

import contextlib
import functools
import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

_HUGE_PAGE_BYTES = 2 << 20
_REPORTING = Path("/sys/module/page_reporting/parameters/page_reporting_order")
_MOST_ORDERS = 63


def fresh_pages(n_bytes: int) -> npt.NDArray[np.uint8]:
    """A zeroed array that begins at a page boundary, as direct I/O needs it.

    Pages are allocated when they are first touched, and freed when nobody holds the array. MemoryError.
    """
    private = (
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # Python's default is shared memory: it costs more, and a forked child would share it
    try:
        pages = mmap.mmap(-1, max(1, n_bytes), private)
    except OSError as error:
        raise MemoryError(f"{n_bytes} bytes of host memory: {error}") from error
    if n_bytes >= _HUGE_PAGE_BYTES and huge_pages_pay():
        with contextlib.suppress(OSError):  # the kernel may have no huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)[:n_bytes]


@functools.cache
def huge_pages_pay() -> bool:
    """Whether to ask for huge pages. They reduce the load of 505 MB from 0.36 s to 0.30 s.

    False in a virtual machine whose host takes free memory back (free page reporting of a balloon driver). The host takes blocks of the
    size of a huge page, and each block has to be fetched again: the same load took up to 0.71 s there.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        order = int(_REPORTING.read_text())
    except (OSError, ValueError):
        return True  # this kernel reports nothing
    return not 0 <= order <= _MOST_ORDERS  # -1 or 2 ** 32 - 1: no driver has asked for it
