"""Huge pages for large tables: random rows then miss the processor's table of pages far less often."""

import contextlib
import ctypes
import sys

from torch import Tensor

MADV_HUGEPAGE = 14  # of Linux's mman.h
HUGE = 2 * 1024**2  # bytes of a huge page; smaller tensors gain nothing


def ask_for_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, whose memory Linux may now back by huge pages; before it is first written to. Elsewhere nothing."""
    size = tensor.numel() * tensor.element_size()
    if tensor.is_cpu and size >= 2 * HUGE and sys.platform == "linux":
        first = -(-tensor.data_ptr() // HUGE) * HUGE
        last = (tensor.data_ptr() + size) // HUGE * HUGE
        with contextlib.suppress(OSError, AttributeError):  # a hint: what refuses it works as before
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_HUGEPAGE)
    return tensor
