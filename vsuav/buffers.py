"""Memory for the large results of networks on a CPU, used again once nobody holds the result any more.

The system fetches fresh memory page by page; for tens of megabytes that takes longer than many a layer's sums.
"""

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 20
"""Bytes from which on memory is kept: of smaller pieces the C library takes care."""
ALIGNED = 64

_spare: dict[int, list[np.ndarray]] = {}
"""Size in bytes -> what nobody holds. Threads only append and pop, each of which is one step."""
_asked: set[int] = set()
"""Sizes asked for since `tidy`."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor on the CPU that holds anything, as `torch.empty`."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return torch.empty(shape, dtype=dtype)
    _asked.add(size)
    spare = _spare.setdefault(size, [])
    try:
        room = spare.pop()
    except IndexError:
        room = np.empty(size + ALIGNED, np.uint8)
        room = room[-room.ctypes.data % ALIGNED :][:size]
    held = room[:]  # the tensor's memory, and all that share it, hold this and nothing else does
    weakref.finalize(held, spare.append, room).atexit = False
    return torch.from_numpy(held).view(dtype).view(shape)


def tidy() -> None:
    """Free what nobody holds of sizes that nobody asked for since the last time: those of a clip that has ended."""
    for size in _spare.keys() - _asked:
        _spare.pop(size, None)
    _asked.clear()


def let_go() -> None:
    """Free what nobody holds."""
    _spare.clear()
