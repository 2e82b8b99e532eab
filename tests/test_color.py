"""Colour correction against numpy and scipy, and what it promises about means and detail."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from vsuav.color import adain, bicubic, wavelet


def blurred(x: np.ndarray) -> np.ndarray:
    """Five dilated binomial blurs of one plane "h w", each as one explicit kernel."""
    for dilation in (1, 2, 4, 8, 16):
        taps = np.zeros(2 * dilation + 1)
        taps[[0, dilation, -1]] = 0.25, 0.5, 0.25
        x = ndimage.correlate(x, np.outer(taps, taps), mode="nearest")
    return x


@pytest.mark.parametrize("size", [(20, 24), (3, 50), (70, 41)])
def test_wavelet_swaps_the_low_frequencies(size):
    content, style = torch.rand(2, 2, 3, *size).mul(2).sub(1).unbind()
    low = [np.vectorize(blurred, signature="(h,w)->(h,w)")(x.double().numpy()) for x in (content, style)]
    expected = content.numpy() - low[0] + low[1]
    np.testing.assert_allclose(wavelet(content, style).numpy(), expected, atol=2e-6)


def test_wavelet_changes_neither_of_its_inputs():
    content, style = torch.rand(2, 1, 3, 9, 9).unbind()
    before = content.clone(), style.clone()
    wavelet(content, style)
    assert torch.equal(content, before[0]) and torch.equal(style, before[1])


@given(st.integers(0, 99))
def test_wavelet_takes_a_flat_cast_away_and_keeps_detail(seed):
    generator = torch.Generator().manual_seed(seed)
    picture = torch.rand(1, 3, 16, 18, generator=generator)
    cast = torch.rand(1, 3, 1, 1, generator=generator)
    torch.testing.assert_close(wavelet(picture + cast, picture), picture, atol=2e-6, rtol=0)


@given(st.integers(0, 99))
def test_adain_gives_every_channel_the_mean_and_deviation_of_the_style(seed):
    generator = torch.Generator().manual_seed(seed)
    content, style = torch.randn(2, 2, 3, 12, 15, generator=generator).unbind()
    result = adain(0.3 * content + 0.2, style).double().numpy()
    wanted = style.double().numpy()
    np.testing.assert_allclose(result.mean(axis=(2, 3)), wanted.mean(axis=(2, 3)), atol=1e-5)
    np.testing.assert_allclose(result.std(axis=(2, 3), ddof=1), wanted.std(axis=(2, 3), ddof=1), rtol=1e-3)


def test_adain_survives_flat_frames():
    flat, style = torch.full((1, 3, 8, 8), 0.25), torch.rand(1, 3, 8, 8)
    result = adain(flat, style)
    torch.testing.assert_close(result, style.mean(dim=(2, 3), keepdim=True).expand_as(result))


def test_frames_are_corrected_alone():
    content, style = torch.rand(2, 3, 3, 20, 20).unbind()
    for correct in (adain, wavelet):
        together = correct(content, style)
        for n in range(3):
            torch.testing.assert_close(together[n : n + 1], correct(content[n : n + 1], style[n : n + 1]))


def test_the_style_is_opencvs_bicubic_enlargement():
    frame = torch.rand(1, 3, 9, 11)
    expected = cv2.resize(frame[0].permute(1, 2, 0).numpy(), (44, 36), interpolation=cv2.INTER_CUBIC)
    style = bicubic(frame, 4)
    assert style.shape == (1, 3, 36, 44)
    torch.testing.assert_close(style[0].permute(1, 2, 0), torch.from_numpy(expected), atol=2e-5, rtol=0)


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 2, 4, 8]))
def test_bicubic_enlargement_is_torchs_at_every_size(height, width, times):
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height * width))
    expected = F.interpolate(x.double(), scale_factor=times, mode="bicubic", align_corners=False)
    for laid_out in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(bicubic(laid_out, times).double(), expected, atol=3e-6, rtol=0)
