"""Layers with a backward pass that is quick, and right, in channels-last memory on a CPU. Same mathematics.

torch's own group normalisation takes a quarter of a training step there; here statistics and parameter gradients are
float32. (A GPU keeps torch's: one kernel, where these are thirty.) Its 3-D convolution in bfloat16 now and then gives
weight gradients out of uninitialised memory (1e17, seen with torch 2.15); here it is one 2-D convolution whose results
are added over time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsuav.layers import JointNorm, VolumeConv, clip, frames, memory, video


class NormSiLU(torch.autograd.Function):
    """SiLU(group_norm(m)) or group_norm(m) of "b n c", statistics over n and a group's channels."""

    # Broadcasting products and float32 sums are written the way that torch's CPU kernels do fast.

    @staticmethod
    def forward(ctx, m: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, act: bool) -> Tensor:
        b, n, c = m.shape
        wide = m.float()
        mean = wide.mean(dim=1).view(b, groups, -1).mean(dim=-1, keepdim=True)
        square = (wide * wide).sum(dim=1).view(b, groups, -1).sum(-1, keepdim=True)
        variance = (square / (n * (c // groups)) - mean.square()).clamp(min=0)
        scale_ = (variance + eps).rsqrt()
        scale = (scale_ * weight.float().view(groups, -1)).view(b, 1, c)
        shift = bias.float() - (mean * scale.view(b, groups, -1)).view(b, 1, c)
        y = m * scale.to(m.dtype) + shift.to(m.dtype)
        ctx.save_for_backward(m, weight, mean, scale_, scale, shift)
        ctx.groups, ctx.act = groups, act
        return F.silu(y) if act else y

    @staticmethod
    def backward(ctx, grad: Tensor):
        m, weight, mean, rstd, scale, shift = ctx.saved_tensors
        b, n, c = m.shape
        if ctx.act:
            y = m * scale.to(m.dtype) + shift.to(m.dtype)
            grad = torch.ops.aten.silu_backward(grad.contiguous(), y)
        total = grad.float().sum(dim=1)
        product = (grad * m).float().sum(dim=1)
        product = (product.view(b, ctx.groups, -1) - mean * total.view(b, ctx.groups, -1)) * rstd
        by_weight = weight.float().view(ctx.groups, -1)
        count = n * (c // ctx.groups)
        mean_grad = (total.view(b, ctx.groups, -1) * by_weight).sum(-1, keepdim=True) / count
        mean_product = (product * by_weight).sum(-1, keepdim=True) / count
        slope = -rstd.square() * mean_product
        offset = -rstd * mean_grad - slope * mean
        wide = lambda v: v.expand(b, ctx.groups, c // ctx.groups).reshape(b, 1, c).to(m.dtype)  # noqa: E731
        result = m * wide(slope) + wide(offset) + grad * scale.to(m.dtype)
        return result, product.sum(0).view(c).to(weight.dtype), total.sum(0).to(weight.dtype), None, None, None


def _forward(norm: JointNorm, x: Tensor, act: bool = False) -> Tensor:
    if x.device.type != "cpu":
        return JointNorm.forward(norm, x, act).to(x.dtype)
    m = memory(x)
    y = NormSiLU.apply(m.flatten(1, 3), norm.weight, norm.bias, norm.num_groups, norm.eps, act)
    return video(y.view(m.shape))


def _volume(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """A 3x3x3 convolution with zero padding 1: out(t) = W0 x(t-1) + W1 x(t) + W2 x(t+1) + bias."""
    if x.shape[2] == 1:
        return clip(F.conv2d(frames(x), weight[:, :, 1], bias, padding=1), 1)
    stacked = weight.permute(2, 0, 1, 3, 4).flatten(0, 1)
    before, now, after = clip(F.conv2d(frames(x), stacked, padding=1), x.shape[2]).chunk(3, dim=1)
    shifted = F.pad(before[:, :, :-1], (0, 0, 0, 0, 1, 0)) + F.pad(after[:, :, 1:], (0, 0, 0, 0, 0, 1))
    return now + shifted + bias[:, None, None, None].to(now.dtype)


def speed_up(network: nn.Module) -> None:
    """Give the joint norms and 3-D convolutions of `network` the quick backward passes."""
    for module in network.modules():
        if isinstance(module, VolumeConv):
            module.convolve = lambda x, bias, weight=module.weight: _volume(weight, x, bias)
        if type(module) is JointNorm:
            module.forward = lambda x, act=False, norm=module: _forward(norm, x, act)
