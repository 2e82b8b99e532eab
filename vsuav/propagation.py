"""Bidirectional propagation of latents along optical flow: training-free consistency over a whole shot.

Every frame gets a backward value P, blended from the last frame towards the first, and from these a forward value Q,
blended from the first towards the last; Q is the result. One step of either chain is

    W = warp(value of the neighbour, flow to the neighbour)
    W = fuse_scale * W + (1 - fuse_scale) * current        mode "fuse"; "copy" leaves W alone
    result = W where the flow is valid, else current

For P_i the neighbour is P_{i+1} and the current frame x_i; for Q_i they are Q_{i-1} and P_i.
"""

import torch
from torch import Tensor

from vsuav import native
from vsuav.flow import UNTRUSTED, resize_flow, valid, warp

STRIDE = 6  # chains start on the grid of the denoising windows, so that neighbouring frames share them


def link(
    current: Tensor,
    source: Tensor,
    flow: Tensor,
    back_flow: Tensor,
    fuse_scale: float = 0.5,
    alpha1: float = 0.001,
    alpha2: float = 0.05,
    mode: str = "fuse",
    interpolation: str = "nearest",
) -> Tensor:
    """One step of a chain: `current` blended with `source`, the neighbour's value, both "b c h w".

    flow       from the current frame to the neighbour, "b 2 h w" in pixels
    back_flow  from the neighbour to the current frame
    The blend is float32, the result has the dtype of `current`.
    """
    if mode not in ("fuse", "copy"):
        raise ValueError(f"link: mode must be fuse or copy, got {mode!r}")
    warped = warp(source, flow, interpolation)
    if mode == "fuse":
        warped = (fuse_scale * warped.float() + (1 - fuse_scale) * current.float()).to(current.dtype)
    return torch.where(valid(flow, back_flow, alpha1, alpha2).bool(), warped, current)


def blend(current: Tensor, source: Tensor, origin: Tensor) -> Tensor:
    """`link` of one clip "c h w", float32, by its default options, where it is known which pixel comes from where.

    origin     `flow.origins` of the current frame in the neighbour, "h w"
    """
    if native.follows(current, source):
        return native.blend(current, source, origin)
    picked = source.flatten(1).index_select(1, origin.clamp(min=0).flatten()).view_as(source)
    picked = picked.mul_(0.5).masked_fill_(origin < 0, 0)  # in place: fresh memory costs more than the sums
    return picked.addcmul_(current, torch.where(origin == UNTRUSTED, 1.0, 0.5))


def propagate(x: Tensor, forward: Tensor, backward: Tensor, **options) -> Tensor:
    """Propagate x "b c t h w" over all its frames; the options are those of `link`. T = 1 is the identity.

    forward   "b 2 t-1 h w", the flow i leads from frame i to i+1
    backward  the flow i leads from frame i+1 to i
    Flows of another size are resized first.
    """
    frames = x.shape[2]
    if frames == 1:
        return x
    for name, flow in (("forward", forward), ("backward", backward)):
        if tuple(flow.shape[:3]) != (x.shape[0], 2, frames - 1):
            shape = (x.shape[0], 2, frames - 1)
            raise ValueError(f"propagate: {name} must begin with the axes {shape}, got {tuple(flow.shape)}")
    there, back = (_steps(flow, *x.shape[-2:]) for flow in (forward, backward))
    values = list(x.unbind(2))
    for i in range(len(values) - 2, -1, -1):
        values[i] = link(values[i], values[i + 1], there[i], back[i], **options)
    for i in range(1, len(values)):
        values[i] = link(values[i], values[i - 1], back[i - 1], there[i - 1], **options)
    return torch.stack(values, dim=2)


def _steps(flow: Tensor, height: int, width: int) -> list[Tensor]:
    """Flows "b 2 t h w" on the grid of the latents, "b 2 h w" for each step."""
    each = resize_flow(flow.movedim(2, 1).flatten(0, 1), height, width)
    return list(each.unflatten(0, (flow.shape[0], flow.shape[2])).unbind(1))


def backward_start(m: int, radius: int, stop: int) -> int:
    """Where the backward chain that yields P_m starts (P = x there), in a shot that ends before `stop`."""
    return min(stop - 1, STRIDE * -(-(m + radius) // STRIDE))


def forward_start(m: int, radius: int, start: int) -> int:
    """Where the forward chain that yields Q_m starts (Q = P there), in a shot that begins at `start`."""
    return max(start, STRIDE * ((m - radius) // STRIDE))
