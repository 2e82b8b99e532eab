"""Metrics against scikit-image, against numpy, and on clips whose answer is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vsuav.metrics import (
    chroma,
    color_drift,
    high_frequency_energy,
    luma,
    psnr_c,
    psnr_y,
    ssim_y,
    temporal_profile,
    warping_error,
)


def pair(seed: int, height: int = 40, width: int = 33) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.avg_pool2d(torch.rand(2, 3, height + 4, width + 4, generator=generator), 5, stride=1)
    return (truth + 0.05 * torch.randn(truth.shape, generator=generator)).clamp(0, 1), truth


def planes(images: torch.Tensor, border: int = 0, of: int | slice = 0) -> list[np.ndarray]:
    """scikit-image's luma (or other planes) of every image, cropped."""
    inner = slice(border, -border or None)
    return [rgb2ycbcr(image.permute(1, 2, 0).double().numpy())[inner, inner, of] for image in images]


def test_luma_equals_scikit_image():
    result, _ = pair(0)
    np.testing.assert_allclose(luma(result)[:, 0].numpy(), planes(result), atol=1e-3)
    assert luma(torch.stack([torch.zeros(3, 1, 1), torch.ones(3, 1, 1)])).flatten().tolist() == [16, 235]


@given(st.integers(0, 50), st.sampled_from([0, 4]))
def test_psnr_and_ssim_equal_scikit_image(seed, border):
    result, truth = pair(seed)
    ours, theirs = planes(result, border), planes(truth, border)
    psnr = [peak_signal_noise_ratio(b, a, data_range=255) for a, b in zip(ours, theirs, strict=True)]
    ssim = [
        structural_similarity(a, b, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert psnr_y(result, truth, border) == pytest.approx(np.mean(psnr), abs=1e-3)
    assert ssim_y(result, truth, border) == pytest.approx(np.mean(ssim), abs=1e-4)
    assert psnr_y(result[0], truth[0], border) == pytest.approx(psnr[0], abs=1e-3)


@given(st.integers(0, 50), st.sampled_from([0, 4]))
def test_colours_equal_scikit_image(seed, border):
    result, truth = pair(seed)
    np.testing.assert_allclose(chroma(result).permute(0, 2, 3, 1).numpy(), planes(result, of=slice(1, 3)), atol=1e-3)
    colours = [planes(images, border, slice(1, 3)) for images in (result, truth)]
    psnr = [peak_signal_noise_ratio(b, a, data_range=255) for a, b in zip(*colours, strict=True)]
    assert psnr_c(result, truth, border) == pytest.approx(np.mean(psnr), abs=1e-3)
    assert psnr_c(truth + 0.1, truth) == 100, "a change of brightness is none of colour"


def test_equal_images_are_perfect():
    picture, other = pair(1)
    assert psnr_c(picture, picture) == 100
    assert psnr_y(picture, picture) == 100 and ssim_y(picture, picture) == pytest.approx(1, abs=1e-12)
    both = [psnr_y(picture, other), 100]
    mixed = torch.cat([other, picture]), torch.cat([picture, picture])
    assert psnr_y(*mixed) == pytest.approx(np.average(both, weights=[len(other), len(picture)]))


def test_images_that_cannot_be_compared_are_refused():
    picture = torch.rand(1, 3, 20, 20)
    with pytest.raises(ValueError, match="psnr_y: images must have one shape"):
        psnr_y(picture, picture[..., :10])
    with pytest.raises(ValueError, match="psnr_y: border must leave pixels"):
        psnr_y(picture, picture, border=10)
    with pytest.raises(ValueError, match="ssim_y: images must be at least 11x11"):
        ssim_y(picture, picture, border=5)


def exact(x: float, y: float):
    """An estimator that says everything moves by (x, y)."""

    def flow(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        forward = torch.tensor([x, y]).view(2, 1, 1).expand(2, *a.shape[-2:])
        return forward, -forward

    return flow


def test_a_clip_that_only_moves_has_no_warping_error():
    wide = torch.rand(3, 30, 40)
    frames = torch.stack([wide[:, 3 + n : 23 + n, 10 - 2 * n : 30 - 2 * n] for n in range(4)])
    assert warping_error(frames, exact(2, -1)) == pytest.approx(0, abs=1e-9)
    assert warping_error(frames, exact(0, 0)) > 10


def test_warping_error_is_the_mean_square_of_the_change_times_1000():
    frames = torch.full((3, 3, 16, 16), 0.5)
    frames[1] += 0.1
    assert warping_error(frames, exact(0, 0)) == pytest.approx(1000 * 0.01, rel=1e-5)


def test_pixels_that_leave_the_frame_or_are_hidden_do_not_count():
    frames = torch.zeros(2, 3, 16, 16)
    frames[0, :, :, 10:] = 1  # leaves to the right
    assert warping_error(frames, exact(6, 0)) == pytest.approx(0, abs=1e-9)

    def hidden(a, b):
        forward = torch.zeros(2, 16, 16)
        backward = torch.zeros(2, 16, 16)
        backward[:, :, 10:] = 5
        return forward, backward

    assert warping_error(frames, hidden) == 0
    assert math.isnan(warping_error(frames, exact(100, 0)))


def test_warping_error_takes_its_flow_from_the_reference_in_its_range():
    seen = []

    def flow(a, b):
        seen.append((a.min().item(), a.max().item()))
        return torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)

    reference = torch.zeros(2, 3, 8, 8)
    reference[..., :4] = 1
    warping_error(torch.rand(2, 3, 8, 8), flow, reference)
    assert seen == [(-1, 1)]
    with pytest.raises(ValueError, match="needs at least 2 frames"):
        warping_error(reference[:1], flow)


def test_a_temporal_profile_is_one_column_over_time():
    frames = torch.rand(5, 3, 6, 7)
    profile = temporal_profile(frames, 4)
    assert profile.shape == (3, 6, 5)
    for t in range(5):
        assert torch.equal(profile[:, :, t], frames[t, :, :, 4])
    with pytest.raises(ValueError, match="column must be between 0 and 6, got 7"):
        temporal_profile(frames, 7)


def test_high_frequency_energy_of_waves_and_noise():
    """A wave of amplitude A has the power A^2 / 2, in luma levels of 219 for the full range."""
    column = torch.arange(256, dtype=torch.float64)
    for cycles, expected in ((0.05, 0.0), (0.25, (219 * 0.2) ** 2 / 2)):
        wave = 0.5 + 0.2 * torch.sin(2 * torch.pi * cycles * column).expand(3, 256, 256)
        assert high_frequency_energy(wave) == pytest.approx(expected, rel=0.02, abs=0.05)
        assert high_frequency_energy(wave.transpose(1, 2)) == pytest.approx(expected, rel=0.02, abs=0.05)
    grey = 0.5 + 0.05 * torch.randn(4, 1, 128, 128).expand(4, 3, 128, 128)
    share = 1 - 0.25**2  # of the spectrum above 1/8 on either axis
    assert high_frequency_energy(grey) == pytest.approx((219 * 0.05) ** 2 * share, rel=0.05)


def test_color_drift_sees_casts_and_not_detail():
    low_res = torch.rand(2, 3, 16, 24)
    large = low_res.repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert color_drift(large, low_res) == pytest.approx(0, abs=1e-4)
    assert color_drift(large + 0.1, low_res) == pytest.approx(25.5, rel=1e-4)
    checkers = 0.1 * (-1.0) ** (torch.arange(64)[:, None] + torch.arange(96))
    assert color_drift(large + checkers, low_res) == pytest.approx(0, abs=1e-4)
