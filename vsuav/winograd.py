"""3x3 convolutions with a quarter of the multiplications (Winograd), for the wide layers of a network on a CPU.

F(4x4, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016, arXiv 1509.09308): along
each axis six pixels become six sums, each is multiplied by a sum of the weights as a matrix product over channels, and
the six products are added up to four results. The sums cost memory traffic, so it pays for wide layers only. float32,
where results differ by about as much as those of two libraries do (1e-6 of their size); in bfloat16 the sums lose too
many digits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE, SPAN = 4, 6
"""Results along an axis that are computed together, and pixels they depend on."""
WEIGHTS = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6),
           (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))  # fmt: skip
"""G of the paper: three weights to their six sums."""
WIDE, MANY, STRIP = 256, 2048, 256
"""Least channels, in and out, and least pixels of all frames for which it pays; tiles of 4x4 computed at a time."""


def pays(x: Tensor, weight: Tensor) -> bool:
    """Is it faster than a direct convolution of x "n i h w" with weight "o i 3 3"?"""
    return x.dtype == torch.float32 and min(weight.shape[:2]) >= WIDE and x[:, 0].numel() >= MANY


def _sums(d: Sequence[Tensor], out: Tensor) -> None:
    """Bᵀ d of the paper: six inputs to six sums."""
    near, far = torch.sub(d[4], d[2]), torch.sub(d[3], d[1])
    torch.add(near, torch.sub(d[0], d[2]), alpha=4, out=out[0])
    torch.add(torch.sub(d[5], d[3]), far, alpha=-4, out=out[5])
    torch.add(near, far, alpha=2, out=out[3])
    torch.add(near, far, alpha=-2, out=out[4])
    near, far = torch.add(d[4], d[2], alpha=-4), torch.add(d[3], d[1], alpha=-4)
    torch.add(near, far, out=out[1])
    torch.sub(near, far, out=out[2])


def _results(m: Tensor) -> tuple[Tensor, ...]:
    """Aᵀ m of the paper: six products to four results."""
    even, odd = m[1] + m[2], m[1] - m[2]
    twice, half = m[3] + m[4], m[3] - m[4]
    return (
        torch.add(even, twice).add_(m[0]), torch.add(odd, half, alpha=2), torch.add(even, twice, alpha=4),
        torch.add(odd, half, alpha=8).add_(m[5]),
    )  # fmt: skip


def _weights(weight: Tensor) -> Tensor:
    """The matrices "36 i o" of weight "o i 3 3", those of its columns' sums outermost."""
    sums = torch.tensor(WEIGHTS)
    flat = weight.permute(3, 2, 1, 0).reshape(9, -1)
    return (torch.kron(sums, sums) @ flat).view(SPAN * SPAN, weight.shape[1], weight.shape[0])


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution, zero padding 1, of x "n i h w" float32 with weight "o i 3 3" and bias "o": "n o h w"."""
    x = x.permute(0, 2, 3, 1)
    n, h, w, channels = x.shape
    high, wide, out = -(-h // TILE), -(-w // TILE), weight.shape[0]
    matrices = _weights(weight)
    x = F.pad(x, (0, 0, 1, TILE * wide + 1 - w, 1, TILE * high + 1 - h))
    y = x.new_empty(n, high, TILE, wide, TILE, out)
    count = min(n, max(1, STRIP // (high * wide)))
    rows = min(high, max(1, STRIP // wide))
    for i in range(0, n, count):
        for top in range(0, high, rows):
            part = x[i : i + count, TILE * top : TILE * (top + rows) + 2]
            lines = (part.shape[1] - 2) // TILE
            tiles = (SPAN, len(part), lines)
            across = x.new_empty(*tiles, part.shape[2], channels)
            _sums([part[:, j : j + TILE * lines - 3 : TILE] for j in range(SPAN)], across)
            sums = x.new_empty(SPAN, *tiles, wide, channels)
            _sums([across[:, :, :, j : j + TILE * wide - 3 : TILE] for j in range(SPAN)], sums)
            products = torch.bmm(sums.view(SPAN * SPAN, -1, channels), matrices).view(SPAN, *tiles, wide, out)
            place = y[i : i + count, top : top + rows]
            for b, column in enumerate(_results(products)):
                for a, result in enumerate(_results(column)):
                    torch.add(result, bias, out=place[:, :, a, :, b])
    return y.view(n, TILE * high, TILE * wide, out)[:, :h, :w].permute(0, 3, 1, 2)
