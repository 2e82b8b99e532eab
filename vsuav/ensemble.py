"""Self-ensemble: the mean of what becomes of mirrored copies of a clip, mirrored back (Lim et al. 2017, EDSR, 3.4).

What networks invent differs from copy to copy and averages out; what the input holds does not.
"""

from collections.abc import Callable

from torch import Tensor

MIRRORS: dict[int, tuple[tuple[int, ...], ...]] = {1: ((),), 2: ((), (-1,)), 4: ((), (-1,), (-2,), (-2, -1))}
"""How many copies -> the axes each of them is mirrored along, of whatever ends in "h w"."""


def averaged(run: Callable[[Tensor], Tensor], frames: Tensor, copies: int) -> Tensor:
    """The mean of `copies` runs, each on mirrored frames "t c h w" and mirrored back."""
    return sum(run(frames.flip(axes)).flip(axes) for axes in MIRRORS[copies]) / copies


__all__ = ["MIRRORS", "averaged"]
