"""What the decoder sees of the input: every frame mixed with those beside it, along the optical flow.

Networks and propagation keep latents steady, but a decoder that also looks at the input hands on whatever flickers
there: grain, and the noise of codecs. So the neighbours are brought to the frame's place and count where the flow is
trusted and they look like it. No weights, no training.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from vsuav import native
from vsuav.flow import origins

Match = tuple[Tensor, Tensor, Tensor]
"""A neighbour "3 h w", the flow that leads to it from the frame, and the one that leads back, both "2 h w"."""

LIKE = 0.1
"""Difference, of a range of 2, from which on a neighbour hardly counts: the width of a Gaussian."""
PATCH = 5
"""Side of the square of pixels over which likeness is judged."""


def degrained(frame: Tensor, matches: Iterable[Match], weight: float) -> Tensor:
    """The weighted mean of `frame` "3 h w", float32 in [-1, 1], and its neighbours; the frame's own weight is 1.

    A neighbour's pixel weighs `weight` * exp(-d / (2 LIKE^2)), where d is the mean squared difference over a patch, and
    nothing where the flow is not `flow.valid` or leads out of the frame.
    """
    total, change = frame.new_ones(1, *frame.shape[1:]), frame.new_zeros(frame.shape)
    for neighbour, there, back in matches:
        _add(frame, neighbour, there, origins(there, back), weight, change, total)
    return change.div_(total).add_(frame)


def _add(
    frame: Tensor, neighbour: Tensor, flow: Tensor, origin: Tensor, weight: float, change: Tensor, total: Tensor
) -> None:
    """Add what a neighbour differs by, times its weight, to `change` "3 h w", and the weight to `total` "1 h w".

    origin     `flow.origins` of the frame in the neighbour, "h w"
    """
    steep = -0.5 / LIKE**2
    if native.follows(frame, neighbour, flow):
        native.degrain(frame, neighbour, flow, origin, weight, steep, change, total)
        return
    trusted = (origin >= 0)[None]
    difference = torch.where(trusted, _sampled(neighbour, flow) - frame, 0)
    error = difference.square().mean(0, keepdim=True)
    distance = F.avg_pool2d(error, PATCH, 1, PATCH // 2, count_include_pad=False)
    share = torch.exp_(distance.mul_(steep)).mul_(weight).mul_(trusted)
    total += share
    change.addcmul_(difference, share)


def _sampled(x: Tensor, flow: Tensor) -> Tensor:
    """x "c h w" at (X + flow_x, Y + flow_y), bicubic (a = -0.75), its edge pixels going on outside."""
    height, width = flow.shape[-2:]
    column = (torch.arange(width, device=flow.device) + flow[0] + 0.5) * (2 / width) - 1
    row = (torch.arange(height, device=flow.device)[:, None] + flow[1] + 0.5) * (2 / height) - 1
    grid = torch.stack([column, row], dim=-1)
    return F.grid_sample(x[None], grid[None], "bicubic", "border", align_corners=False)[0]
