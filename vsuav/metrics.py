"""How good a restored clip is: fidelity, steadiness, detail, colours.

Images are "n 3 h w" or "3 h w" RGB in [0, 1]; every function averages over the images it is given.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vsuav.flow import valid, warp

MOST_DB = 100.0
"""What an image without any error counts as."""


def luma(images: Tensor) -> Tensor:
    """BT.601 luma on the video scale, 16 … 235, "n 1 h w" float64: the one super-resolution papers measure on."""
    images = images[None] if images.ndim == 3 else images
    red, green, blue = images.double().unbind(1)
    return (16 + 65.481 * red + 128.553 * green + 24.966 * blue)[:, None]


def chroma(images: Tensor) -> Tensor:
    """BT.601 Cb and Cr on the video scale, 16 … 240 with 128 for grey, "n 2 h w" float64."""
    images = images[None] if images.ndim == 3 else images
    red, green, blue = images.double().unbind(1)
    cb = 128 - 37.797 * red - 74.203 * green + 112 * blue
    return torch.stack([cb, 128 + 112 * red - 93.786 * green - 18.214 * blue], 1)


def _planes(
    name: str, result: Tensor, truth: Tensor, border: int, of: Callable[[Tensor], Tensor] = luma
) -> Iterator[tuple[Tensor, Tensor]]:
    """`of` every image of both, "1 c h w", one at a time: a long clip in float64 would fill the memory."""
    if result.shape != truth.shape:
        raise ValueError(f"{name}: images must have one shape, got {tuple(result.shape)} and {tuple(truth.shape)}")
    if min(result.shape[-2:]) <= 2 * border:
        raise ValueError(f"{name}: border must leave pixels of {tuple(result.shape[-2:])}, got {border}")
    inner = slice(border, -border or None)
    for images in zip(*(x[None] if x.ndim == 3 else x for x in (result, truth)), strict=True):
        yield tuple(of(image)[..., inner, inner] for image in images)


def psnr_y(result: Tensor, truth: Tensor, border: int = 0) -> float:
    """Peak signal-to-noise ratio of the luma in dB, peak 255, without `border` pixels at every edge.

    An image counts as `MOST_DB` at most: one that is right to the bit would make the mean of all infinite.
    """
    return _psnr(_planes("psnr_y", result, truth, border))


def psnr_c(result: Tensor, truth: Tensor, border: int = 0) -> float:
    """The same of the colours, Cb and Cr together: what `psnr_y` does not see."""
    return _psnr(_planes("psnr_c", result, truth, border, chroma))


def _psnr(planes: Iterator[tuple[Tensor, Tensor]]) -> float:
    errors = [(r - t).square().mean() for r, t in planes]
    return (10 * torch.log10(255**2 / torch.stack(errors))).clamp(max=MOST_DB).mean().item()


def ssim_y(result: Tensor, truth: Tensor, border: int = 0) -> float:
    """Structural similarity of the luma (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, range 255."""
    taps = torch.exp(-torch.arange(-5, 6, dtype=torch.float64, device=result.device).square() / (2 * 1.5**2))
    taps = taps / taps.sum()

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for r, t in _planes("ssim_y", result, truth, border):
        if min(r.shape[-2:]) < 11:
            raise ValueError(f"ssim_y: images must be at least 11x11 inside the border, got {tuple(r.shape[-2:])}")
        mean_r, mean_t = mean(r), mean(t)
        variance_r, variance_t = mean(r.square()) - mean_r.square(), mean(t.square()) - mean_t.square()
        covariance = mean(r * t) - mean_r * mean_t
        similarity = (2 * mean_r * mean_t + c1) * (2 * covariance + c2)
        similarity /= (mean_r.square() + mean_t.square() + c1) * (variance_r + variance_t + c2)
        found.append(similarity.mean())
    return torch.stack(found).mean().item()


def warping_error(
    frames: Tensor,
    flow: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    reference: Tensor | None = None,
    alpha1: float = 0.01,
    alpha2: float = 0.5,
) -> float:
    """How much a clip "t 3 h w" flickers: squared error to the next frame warped along the flow, x 1000.

    flow       estimator, as `vsuav.flow.DIS()`
    reference  clip of the same shape that the flow is estimated on, by default the frames themselves
    Only pixels whose flow is confirmed by the way back (`flow.valid`) and leads to inside the frame count (Lai et al.
    2018). Means are over these pixels, then over the pairs; pairs without any are left out, nan if there are none.
    """
    reference = frames if reference is None else reference
    if frames.shape != reference.shape or frames.shape[0] < 2:
        raise ValueError(
            f"warping_error: needs at least 2 frames and a reference of their shape, got {tuple(frames.shape)} "
            f"and {tuple(reference.shape)}"
        )
    errors = []
    for i in range(len(frames) - 1):
        forward, backward = flow(reference[i] * 2 - 1, reference[i + 1] * 2 - 1)
        forward, backward = forward[None].to(frames.device), backward[None].to(frames.device)
        inside = warp(torch.ones_like(forward[:, :1]), forward, "bilinear") > 0.999
        trusted = (valid(forward, backward, alpha1, alpha2).bool() & inside)[0, 0]
        warped = warp(frames[i + 1][None].float(), forward, "bilinear")[0]
        error = (warped - frames[i].float()).square().mean(dim=0)[trusted]
        if error.numel():
            errors.append(error.double().mean().item())
    return 1000 * sum(errors) / len(errors) if errors else float("nan")


def temporal_profile(frames: Tensor, column: int) -> Tensor:
    """One pixel column of every frame side by side, "3 h t": steady clips give smooth stripes."""
    if not 0 <= column < frames.shape[-1]:
        raise ValueError(f"temporal_profile: column must be between 0 and {frames.shape[-1] - 1}, got {column}")
    return frames[..., column].permute(1, 2, 0).contiguous()


def high_frequency_energy(images: Tensor, cutoff: float = 0.125) -> float:
    """Mean power of the luma above `cutoff` cycles a pixel on either axis, in squared 8-bit levels.

    The default is the Nyquist frequency of an image 4 times smaller: what is above it cannot come from there. A Hann
    window keeps the image's edges from counting.
    """
    images = images[None] if images.ndim == 3 else images
    height, width = images.shape[-2:]
    wide = {"dtype": torch.float64, "device": images.device}
    window = torch.outer(*(torch.hann_window(side, periodic=False, **wide) for side in (height, width)))
    row, column = (torch.fft.fftfreq(side, **wide).abs() > cutoff for side in (height, width))
    found = []
    for image in images:
        y = luma(image)[0, 0]
        power = torch.fft.fft2((y - y.mean()) * window).abs().square()
        found.append(power[row[:, None] | column].sum() / (height * width) / window.square().sum())
    return torch.stack(found).mean().item()


def color_drift(images: Tensor, low_res: Tensor, cell: int = 8) -> float:
    """Mean distance of the colours of a result from its source "n 3 h w", in 8-bit levels.

    Both are averaged over cells of `cell` x `cell` source pixels, so that only colour counts, not detail.
    """
    images, low_res = (x[None] if x.ndim == 3 else x for x in (images, low_res))
    grid = tuple(max(1, side // cell) for side in low_res.shape[-2:])
    means = [F.adaptive_avg_pool2d(x.double(), grid) for x in (images, low_res)]
    return 255 * (means[0] - means[1]).abs().mean().item()
