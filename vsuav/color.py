"""Colour correction: the restored frame keeps its detail and takes the colours of its low-resolution source.

Frames are "n 3 H W", float32, in about [-1, 1]; every frame is treated alone. `style` is the source enlarged to the
size of `content` (`bicubic`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vsuav import buffers

LEVELS = 5  # the coarsest blur reaches 1 + 2 + 4 + 8 + 16 = 31 pixels


def bicubic(x: Tensor, times: int) -> Tensor:
    """Enlarge "n c h w" `times`: cubic with a = -0.75, corners not aligned, no antialiasing, not clamped; float32."""
    x = _stretched(x.float(), times, -1)
    return _stretched(x, times, -2)


def _stretched(x: Tensor, times: int, axis: int) -> Tensor:
    """x enlarged along one of its last two axes; every phase is a sum of four neighbours, edges replicated."""
    length = x.shape[axis]
    padded = F.pad(x, [2, 2, 0, 0] if axis == -1 else [0, 0, 2, 2], mode="replicate")
    phases = []
    for phase in range(times):
        place = (phase + 0.5) / times + 1.5
        first = math.floor(place) - 1
        taps = [(padded.narrow(axis, first + j, length), _cubic(place - first - j)) for j in range(4)]
        total = taps[0][0] * taps[0][1]
        for part, weight in taps[1:]:
            total.add_(part, alpha=weight)
        phases.append(total)
    *shape, high, wide = x.shape
    shape = (*shape, high, wide, times) if axis == -1 else (*shape, high, times, wide)
    return torch.stack(phases, dim=axis, out=buffers.out(shape, total)).flatten(axis - 1, axis)


def _cubic(distance: float, a: float = -0.75) -> float:
    """The weight of a neighbour so far away (Keys 1981)."""
    d = abs(distance)
    return ((a + 2) * d - (a + 3)) * d * d + 1 if d <= 1 else ((a * d - 5 * a) * d + 8 * a) * d - 4 * a


def adain(content: Tensor, style: Tensor) -> Tensor:
    """Give every channel of `content` the mean and deviation it has in `style` (Huang and Belongie 2017)."""
    content_mean, content_std = _statistics(content)
    style_mean, style_std = _statistics(style)
    return (content - content_mean).mul_(style_std / content_std).add_(style_mean)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation over all pixels, each "n 3 1 1"; the deviation is sqrt(unbiased variance + 1e-5)."""
    variance, mean = torch.var_mean(x, dim=(-2, -1), keepdim=True)
    return mean, (variance + 1e-5).sqrt()


def wavelet(content: Tensor, style: Tensor) -> Tensor:
    """High frequencies of `content` on the low ones of `style`, split by an undecimated wavelet of 5 levels.

    content - low(content) + low(style), where low is linear and therefore computed once, of the difference; on a CPU a
    plane at a time, which stays in its last cache.
    """
    difference = torch.sub(style, content, out=buffers.out(style.shape, style))
    planes = difference.flatten(0, 1)
    spare = torch.empty_like(planes[:1] if planes.device.type == "cpu" else planes)
    for some in planes.split(len(spare)):
        _low(some, spare)
    return difference.add_(content)


def _low(x: Tensor, blurred: Tensor) -> None:
    """Leave of x what is left after blurring with [1 2 1] x [1 2 1] / 16 at dilations 1, 2, 4, 8, 16, edges replicated.

    x and `blurred`, which may hold anything, take turns: fresh memory costs more than the sums.
    """
    for level in range(LEVELS):
        for axis in (-1, -2):
            length = x.shape[axis]
            reach = min(2**level, length)
            torch.mul(x, 2, out=blurred)
            rest = length - reach
            blurred.narrow(axis, reach, rest).add_(x.narrow(axis, 0, rest))
            blurred.narrow(axis, 0, reach).add_(x.narrow(axis, 0, 1))
            blurred.narrow(axis, 0, rest).add_(x.narrow(axis, reach, rest))
            blurred.narrow(axis, rest, reach).add_(x.narrow(axis, length - 1, 1))
            x, blurred = blurred, x  # two turns a level: the last leaves x where it was
    x.mul_(16.0**-LEVELS)
