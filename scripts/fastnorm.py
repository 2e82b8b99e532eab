"""The networks' joint group normalisation with a backward pass that is quick in channels-last memory on a CPU.

torch's own takes a quarter of a training step there. Same mathematics; statistics and parameter gradients in float32.
"""

import torch
from torch import Tensor, nn

from vsuav.layers import JointNorm, memory, video


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
        return torch.nn.functional.silu(y) if act else y

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
    m = memory(x)
    y = NormSiLU.apply(m.flatten(1, 3), norm.weight, norm.bias, norm.num_groups, norm.eps, act)
    return video(y.view(m.shape))


def speed_up(network: nn.Module) -> None:
    """Give every joint norm of `network` the quick backward pass."""
    for module in network.modules():
        if type(module) is JointNorm:
            module.forward = lambda x, act=False, norm=module: _forward(norm, x, act)
