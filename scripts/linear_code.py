"""The latents of a bundled model: a fixed linear code of what a picture loses by 4x reduction, so nothing can collapse.

What is lost is the picture minus its 4x4 means, softened by a binomial 3x3 blur and enlarged bicubically. The softening
keeps the means' own fine detail in the code: it is where noise and blocks of a bad input are mended. The code are the
four strongest principal components of that, over 4x4 pixels x RGB, at unit variance. They hold next to no colour: the
picture has its input's. So a fifth number says where that colour is to go: 1 where the input has colour and the picture
has none, 0 where both have or neither.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def lost(x: Tensor) -> Tensor:
    """Pictures "n 3 4h 4w" in [-1, 1] minus what is left of them after reduction."""
    taps = x.new_tensor([0.25, 0.5, 0.25])
    means = F.pad(F.avg_pool2d(x, 4), (1, 1, 1, 1), mode="replicate")
    means = F.conv2d(means, torch.outer(taps, taps).expand(3, 1, 3, 3), groups=3)
    return x - F.interpolate(means, scale_factor=4, mode="bicubic", align_corners=False)


def components(stills: Tensor) -> Tensor:
    """The basis "4 48": principal components of `lost`, each scaled so that its coefficient has unit variance.

    stills "n 3 4h 4w" in [-1, 1].
    """
    patches = F.pixel_unshuffle(lost(stills), 4)[:, :, 2:-2, 2:-2].permute(0, 2, 3, 1).reshape(-1, 48)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    return (vectors[:, -4:].flip(1) / values[-4:].flip(0).sqrt()).T.contiguous()


def greyness(x: Tensor) -> Tensor:
    """exp(-c / 0.05), "n 1 h w", of pictures "n 3 h w" in [-1, 1]: c is how far a pixel is from grey."""
    red, green, blue = x.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.exp(-torch.hypot(0.564 * (blue - luma), 0.713 * (red - luma)) / 0.05)[:, None]


def encode(x: Tensor, low_res: Tensor, basis: Tensor) -> Tensor:
    """The code "b 5 t h w" of frames "b 3 t 4h 4w" whose input frames are low_res "b 3 t h w", both in [-1, 1]."""
    b, _, t = x.shape[:3]
    x, low_res = (v.transpose(1, 2).flatten(0, 1).float() for v in (x, low_res))
    parts = torch.einsum("nkhw,ck->nchw", F.pixel_unshuffle(lost(x), 4), basis)
    faded = (greyness(F.avg_pool2d(x, 4)) - greyness(low_res)).clamp(min=0)
    return torch.cat([parts, faded], 1).unflatten(0, (b, t)).transpose(1, 2)
