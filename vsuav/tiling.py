"""Covers of an axis: windows and decode chunks in time, tiles in space, and the weights that blend them.

Everything sits on absolute grids, so the cover of a frame depends on the frame and on the shot around it, never on
what was asked for. Times are absolute frame numbers; a span is half open, ``(start, stop)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Span = tuple[int, int]

WINDOW = 8
STRIDE = 6
CHUNK = 3
BLOCK = 6


def window(index: int, start: int, stop: int) -> Span:
    """Window `index` of the grid 0, 6, 12, … moved inside the shot ``[start, stop)``; a short shot is one window."""
    if stop - start <= WINDOW:
        return start, stop
    first = min(max(STRIDE * index, start), stop - WINDOW)
    return first, first + WINDOW


def windows_of(frame: int, start: int, stop: int) -> list[Span]:
    """The windows of the shot ``[start, stop)`` that contain `frame`, in the order in which they are merged.

    A window that the grid visits twice (at the end of a shot) is listed twice: it counts twice in the merge.
    `start` and `stop` farther than `WINDOW` frames from `frame` do not change the result.
    """
    first, last = max(start // STRIDE, (frame - 2 * WINDOW) // STRIDE), min((stop - 1) // STRIDE, frame // STRIDE + 2)
    spans = (window(i, start, stop) for i in range(first, last + 1))
    return [span for span in spans if span[0] <= frame < span[1]]


def merge(predictions: Sequence[Tensor]) -> Tensor:
    """Merge a frame's predictions in order of visit: the first as it is, every later one halves what was there."""
    merged = predictions[0]
    for prediction in predictions[1:]:
        merged = (0.5 * merged).add_(0.5 * prediction)
    return merged


@dataclass(frozen=True)
class Chunk:
    """One decoder call: frames ``[start, stop)`` are decoded, those of ``[start, keep)`` are used."""

    start: int
    stop: int
    keep: int


def chunk_of(frame: int, start: int, stop: int) -> Chunk:
    """The decode chunk of `frame` in the shot ``[start, stop)``, on the absolute grid 0, 3, 6, …"""
    line = frame // CHUNK * CHUNK
    first = max(line, start)
    return Chunk(first, min(first + CHUNK, stop), min(line + CHUNK, stop))


def block_of(frame: int) -> int:
    """Number of the block of frames that is served together with `frame`."""
    return frame // BLOCK


@dataclass(frozen=True)
class Tile:
    """A crop ``[top:bottom, left:right]`` of the input frame, in pixels."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def crop(self) -> tuple[slice, slice]:
        """Slices of the last two axes."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


def axis_tiles(length: int, size: int, overlap: int) -> list[Span]:
    """Equal spans of at most `size` that cover ``[0, length)`` with at least `overlap` between neighbours.

    All spans have the same length (one shape for the network) and are spread evenly.
    """
    if size <= 0 or length <= size:
        return [(0, length)]
    count = -(-(length - overlap) // (size - overlap))
    return [(start, start + size) for start in ((length - size) * i // (count - 1) for i in range(count))]


@lru_cache(maxsize=64)
def tiles(height: int, width: int, size: tuple[int, int], overlap: int) -> tuple[Tile, ...]:
    """Tiles of a frame, rows outer; `size` is ``(width, height)`` in input pixels, 0 on an axis means all of it."""
    rows, columns = axis_tiles(height, size[1], overlap), axis_tiles(width, size[0], overlap)
    return tuple(Tile(top, bottom, left, right) for top, bottom in rows for left, right in columns)


def band_rows(height: int, width: int, size: tuple[int, int]) -> int:
    """Rows of a band over the whole width with about as many pixels as a tile of `size` has; `height` if it fits."""
    if len(tiles(height, width, size, 0)) == 1:
        return height
    side = [limit or length for limit, length in zip(size, (width, height), strict=True)]
    return max(1, side[0] * side[1] // width)


def _ramp(length: int, low: int, high: int) -> Tensor:
    """Weight along an axis that rises smoothly over `low` pixels and falls over `high`; never zero."""
    position = torch.arange(length, dtype=torch.float32) + 0.5
    weight = torch.ones(length)
    for width, distance in ((low, position), (high, length - position)):
        if width:
            weight = weight * torch.sin((distance / width).clamp(max=1) * (torch.pi / 2)) ** 2
    return weight


def blend_weights(cover: Sequence[Tile], height: int, width: int) -> list[Tensor]:
    """Smooth weights ``"h w"`` of each tile, float32, that add up to one on every pixel of the frame."""
    raw = []
    for tile in cover:
        vertical = [(t.top, t.bottom) for t in cover if (t.left, t.right) == (tile.left, tile.right)]
        horizontal = [(t.left, t.right) for t in cover if (t.top, t.bottom) == (tile.top, tile.bottom)]
        rows = _ramp(tile.bottom - tile.top, *_overlaps((tile.top, tile.bottom), vertical))
        columns = _ramp(tile.right - tile.left, *_overlaps((tile.left, tile.right), horizontal))
        raw.append(rows[:, None] * columns[None, :])
    total = torch.zeros(height, width)
    for tile, weight in zip(cover, raw, strict=True):
        total[tile.crop] += weight
    return [weight / total[tile.crop] for tile, weight in zip(cover, raw, strict=True)]


def _overlaps(span: Span, spans: Sequence[Span]) -> tuple[int, int]:
    """How far the nearest neighbours before and after `span` reach into it."""
    low = max((stop - span[0] for start, stop in spans if start < span[0]), default=0)
    high = max((span[1] - start for start, stop in spans if start > span[0]), default=0)
    return max(low, 0), max(high, 0)
