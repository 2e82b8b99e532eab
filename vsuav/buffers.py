"""Memory for the large results of networks on a CPU, used again once nobody holds the result any more.

The system fetches fresh memory page by page; for tens of megabytes that takes longer than many a layer's sums.
"""

import contextlib
import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LARGE, MOST = 1 << 20, 1 << 29
"""Bytes from which on memory is kept, for of smaller pieces the C library takes care; and most bytes that are kept."""
ALIGNED = 64

_spare: dict[int, list[np.ndarray]] = {}
"""Size in bytes -> what nobody holds. Threads only append, pop and list, each of which is one step."""
_asked: dict[int, None] = {}
"""Sizes asked for since `tidy`, the latest one last."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor on the CPU that holds anything, as `torch.empty`."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return torch.empty(shape, dtype=dtype)
    _asked.pop(size, None)
    _asked[size] = None
    spare = _spare.setdefault(size, [])
    try:
        room = spare.pop()
    except IndexError:
        room = np.empty(size + ALIGNED, np.uint8)
        room = room[-room.ctypes.data % ALIGNED :][:size]
    held = room[:]  # the tensor's memory, and all that share it, hold this and nothing else does
    weakref.finalize(held, _keep, spare, room).atexit = False
    return torch.from_numpy(held).view(dtype).view(shape)


def out(shape: Sequence[int], like: Tensor) -> Tensor | None:
    """What `empty` gives, for a result of the type of `like`; None where torch itself is to find memory for it."""
    own = like.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return empty(shape, like.dtype) if own else None


def _keep(spare: list[np.ndarray], room: np.ndarray) -> None:
    """Back to its list; where too much is kept then, those go whose size was asked for longest ago."""
    spare.append(room)
    kept = sum(size * len(rooms) for size, rooms in list(_spare.items()))
    for size in [*(_spare.keys() - _asked.keys()), *_asked]:
        rooms = _spare.get(size)
        while kept > MOST and rooms:
            with contextlib.suppress(IndexError):
                rooms.pop()
            kept -= size


def tidy() -> None:
    """Free what nobody holds of sizes that nobody asked for since the last time: those of a clip that has ended."""
    for size in _spare.keys() - _asked.keys():
        _spare.pop(size, None)
    _asked.clear()


def let_go() -> None:
    """Free what nobody holds."""
    _spare.clear()
