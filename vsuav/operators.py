"""The operations layers are made of, each by the fastest operator this machine has for it.

On a CPU, in inference, operators are named. torch's front doors choose one by switches of the whole process, which
other filters of a script may turn at any time (`torch.nn.attention.sdpa_kernel`, `torch.backends.mkldnn.flags`): the
same call would give other last bits from one frame to the next.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from vsuav import native
from vsuav.arithmetic import ATTENTIONS, all_held


def _fused_dtypes() -> set[torch.dtype]:
    """Types for which this machine's CPU library has linear layers with a sum, a product or a GELU built in."""
    operators = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(operators, "_linear_pointwise")):
        return set()
    return {torch.float32} | ({torch.bfloat16} if operators._is_mkldnn_bf16_supported() else set())


FUSED_DTYPES = _fused_dtypes()


def inferring(x: Tensor, weight: Tensor) -> bool:
    """Is this inference on a CPU, in one type? (Fused layers know neither gradients, autocast nor compiling.)"""
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def fused(x: Tensor, weight: Tensor) -> bool:
    """Is this inference on a CPU that has the fused layers?"""
    return x.dtype in FUSED_DTYPES and inferring(x, weight)


def as_frame(x: Tensor) -> Tensor:
    """From "… i" to "1 1 n i", contiguous: as if all were pixels of one frame."""
    return x.contiguous().view(1, 1, -1, x.shape[-1])


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """x "… i" -> x weightᵀ + bias + add "… o"."""
    if inferring(x, weight) and native.multiplies(x, weight):
        y = native.affine(as_frame(x), weight, bias, None if add is None else as_frame(add))
        return y.view(*x.shape[:-1], -1)
    if fused(x, weight):
        if add is None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, add.contiguous(), weight, bias, "add")
    y = F.linear(x, weight, bias)
    return y if add is None else y + add


def gated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """a GELU(g), exact GELU, where (a, g) are the halves of x weightᵀ + bias."""
    if inferring(x, weight) and native.multiplies(x, weight[: len(weight) // 2]):
        return native.affine(as_frame(x), weight, bias, gated=True).view(*x.shape[:-1], -1)
    if fused(x, weight):
        (weight_a, weight_g), (bias_a, bias_g) = weight.chunk(2), bias.chunk(2)
        gate = torch.ops.mkldnn._linear_pointwise(x, weight_g, bias_g, "gelu", [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gate, weight_a, bias_a, "mul")
    a, g = F.linear(x, weight, bias).chunk(2, dim=-1)
    return a * F.gelu(g)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...] | None = None
) -> Tensor:
    """The convolution of x "n i h w" (or "n i t h w") with weight "o i kh kw" (or "o i kt kh kw"), bias "o"."""
    once = (1,) * len(padding)
    stride = stride or once
    if fused(x, weight):
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, once, 1, "none", [], "")
    return (F.conv2d if x.dim() == 4 else F.conv3d)(x, weight, bias, stride, padding)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + bias) v of q "n heads i d", k and v "n heads j d", bias as "n heads i j" or narrower."""
    if inferring(q, k) and min(q.numel(), k.numel()):
        bias = None if bias is None else bias.contiguous()  # torch 2.6 reads its rows as if they were
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)[0]
    held = q.device.type != "cpu" and not torch.compiler.is_compiling()
    with all_held(ATTENTIONS) if held else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
