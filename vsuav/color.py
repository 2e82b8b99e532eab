"""Colour correction: the restored frame keeps its detail and takes the colours of its low-resolution source.

Frames are "n 3 H W", float32, in about [-1, 1]; every frame is treated alone. `style` is the source enlarged to the
size of `content` (`bicubic4`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 5  # the coarsest blur reaches 1 + 2 + 4 + 8 + 16 = 31 pixels


def bicubic4(low_res: Tensor) -> Tensor:
    """Enlarge "n 3 h w" to "n 3 4h 4w": cubic with a = -0.75, corners not aligned, no antialiasing, not clamped."""
    size = (4 * low_res.shape[-2], 4 * low_res.shape[-1])
    return F.interpolate(low_res.float(), size=size, mode="bicubic", align_corners=False)


def adain(content: Tensor, style: Tensor) -> Tensor:
    """Give every channel of `content` the mean and deviation it has in `style` (Huang and Belongie 2017)."""
    content_mean, content_std = _statistics(content)
    style_mean, style_std = _statistics(style)
    return (content - content_mean) / content_std * style_std + style_mean


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation over all pixels, each "n 3 1 1"; the deviation is sqrt(unbiased variance + 1e-5)."""
    variance, mean = torch.var_mean(x, dim=(-2, -1), keepdim=True)
    return mean, (variance + 1e-5).sqrt()


def wavelet(content: Tensor, style: Tensor) -> Tensor:
    """High frequencies of `content` on the low ones of `style`, split by an undecimated wavelet of 5 levels.

    content - low(content) + low(style), where low is linear and therefore computed once, of the difference.
    """
    return content + _low(style - content)


def _low(x: Tensor) -> Tensor:
    """What is left of x after blurring with [1 2 1] x [1 2 1] / 16 at dilations 1, 2, 4, 8, 16, edges replicated."""
    for level in range(LEVELS):
        dilation = 2**level
        for axis in (-1, -2):
            pads = [dilation, dilation, 0, 0] if axis == -1 else [0, 0, dilation, dilation]
            padded = F.pad(x, pads, mode="replicate")
            length = x.shape[axis]
            x = padded.narrow(axis, 0, length) + padded.narrow(axis, 2 * dilation, length)
            x.add_(padded.narrow(axis, dilation, length), alpha=2)
    return x * 16.0**-LEVELS
