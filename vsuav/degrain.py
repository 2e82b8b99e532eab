"""What the decoder sees of the input: every frame mixed with those beside it, along the optical flow.

Networks and propagation keep latents steady, but a decoder that also looks at the input hands on whatever flickers
there: grain, and the noise of codecs. So the neighbours are brought to the frame's place and count where the flow is
trusted and they look like it. No weights, no training; but a network may be told what each of them would change.
"""

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


def beside(frame: Tensor, before: Match | None, after: Match | None) -> tuple[Tensor, Tensor]:
    """What the neighbours of `frame` "3 h w", float32 in [-1, 1], would change in it, and how much of that counts.

    A neighbour's pixel counts as exp(-d / (2 LIKE^2)), where d is the mean squared difference over a patch, and not at
    all where the flow is not `flow.valid` or leads out of the frame, or there is no neighbour.

    Returns:
        "2 3 h w", the difference to each neighbour times the share of it that counts, and these shares "2 1 h w".
    """
    changes, shares = frame.new_zeros(2, *frame.shape), frame.new_zeros(2, 1, *frame.shape[1:])
    for match, change, share in zip((before, after), changes, shares, strict=True):
        if match is not None:
            neighbour, there, back = match
            _compare(frame, neighbour, there, origins(there, back), change, share)
    return changes, shares


def degrained(frame: Tensor, changes: Tensor, shares: Tensor, weight: float) -> Tensor:
    """The mean of `frame` "3 h w" and its neighbours, from what `beside` says of them: the frame's own weight is 1, a
    neighbour's `weight` times its share."""
    return changes.sum(0).mul_(weight).div_(shares.sum(0).mul_(weight).add_(1)).add_(frame)


def _compare(frame: Tensor, neighbour: Tensor, flow: Tensor, origin: Tensor, change: Tensor, share: Tensor) -> None:
    """Write what a neighbour differs by, times its share, to `change` "3 h w", and the share to `share` "1 h w".

    origin     `flow.origins` of the frame in the neighbour, "h w"
    """
    steep = -0.5 / LIKE**2
    if native.follows(frame, neighbour, flow):
        native.beside(frame, neighbour, flow, origin, steep, change, share)
        return
    trusted = (origin >= 0)[None]
    difference = torch.where(trusted, _sampled(neighbour, flow) - frame, 0)
    error = difference.square().mean(0, keepdim=True)
    distance = F.avg_pool2d(error, PATCH, 1, PATCH // 2, count_include_pad=False)
    torch.mul(torch.exp_(distance.mul_(steep)), trusted, out=share)
    torch.mul(difference, share, out=change)


def _sampled(x: Tensor, flow: Tensor) -> Tensor:
    """x "c h w" at (X + flow_x, Y + flow_y), bicubic (a = -0.75), its edge pixels going on outside."""
    height, width = flow.shape[-2:]
    column = (torch.arange(width, device=flow.device) + flow[0] + 0.5) * (2 / width) - 1
    row = (torch.arange(height, device=flow.device)[:, None] + flow[1] + 0.5) * (2 / height) - 1
    grid = torch.stack([column, row], dim=-1)
    return F.grid_sample(x[None], grid[None], "bicubic", "border", align_corners=False)[0]
