"""Self-ensemble: the mean of what becomes of turned copies of a clip, turned back (Lim et al. 2017, EDSR, 3.4).

What networks invent differs from copy to copy and averages out; what the input holds does not. Of the eight copies
there are, these four leave the finest texture, of every second pixel, in step with itself: the half turn and the
reflections in both diagonals. Mirrored left to right, an even number of columns swaps odd ones and even ones, and
texture would cancel out that has no other reason to.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Orientation(NamedTuple):
    """How a picture lies: rows and columns swapped, or turned by 180 degrees, or both. Done twice it is undone."""

    transposed: bool = False
    half: bool = False

    def __call__(self, pictures: Tensor) -> Tensor:
        """The same of whatever ends in "h w"."""
        pictures = pictures.mT if self.transposed else pictures
        return pictures.flip(-2, -1) if self.half else pictures


ORIENTATIONS: dict[int, tuple[Orientation, ...]] = {
    1: (Orientation(),),
    2: (Orientation(), Orientation(transposed=True)),
    4: (Orientation(), Orientation(transposed=True), Orientation(half=True), Orientation(transposed=True, half=True)),
}
"""How many copies -> how each of them lies."""


def averaged(run: Callable[[Tensor, Orientation], Tensor], frames: Tensor, copies: int) -> Tensor:
    """The mean of `copies` runs on frames "t c h w", each on a copy that lies otherwise. `run` is told how it lies."""
    return sum(lie(run(lie(frames), lie)) for lie in ORIENTATIONS[copies]) / copies


__all__ = ["ORIENTATIONS", "Orientation", "averaged"]
