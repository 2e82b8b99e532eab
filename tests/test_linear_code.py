"""The bundled model's code: what it keeps of a picture, and how it says that colour is to go."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from linear_code import components, encode, lost


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(-0.8, 0.8, (6, 3, 16, 16)).astype(np.float32))
    return F.interpolate(coarse, size=(48, 48), mode="bicubic").clamp(-1, 1)


def reduced(x):
    """Every 4x4 block's mean."""
    return torch.from_numpy(x.numpy().reshape(len(x), 3, 12, 4, 12, 4).mean((3, 5)))


def test_the_code_of_a_constant_picture_is_zero_and_of_noise_is_not():
    basis = torch.randn(4, 48)
    flat = torch.full((1, 3, 2, 32, 32), 0.3)
    assert encode(flat, flat[..., ::4, ::4], basis).abs().max() < 1e-4
    noise = encode(torch.randn(1, 3, 2, 32, 32), flat[..., ::4, ::4], basis)
    assert noise.shape == (1, 5, 2, 8, 8) and noise[:, :4].abs().mean() > 0.1


def test_the_code_keeps_the_strongest_components_at_unit_variance(pictures):
    """Against numpy's singular values of the same patches."""
    basis = components(pictures)
    code = encode(pictures[:, :, None], reduced(pictures)[:, :, None], basis)[:, :4, 0, 2:-2, 2:-2]
    code = code.permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(code.T @ code / len(code), torch.eye(4), atol=1e-3, rtol=0)
    patches = F.pixel_unshuffle(lost(pictures), 4)[:, :, 2:-2, 2:-2].permute(0, 2, 3, 1).reshape(-1, 48)
    strongest = np.linalg.svd(patches.numpy(), compute_uv=False)[:4] / len(patches) ** 0.5
    np.testing.assert_allclose(1 / basis.norm(dim=1).numpy(), strongest, rtol=1e-3)


def test_the_fifth_number_is_the_colour_that_is_to_go(pictures):
    luma = [cv2.cvtColor(picture.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY) for picture in pictures]
    grey = torch.from_numpy(np.stack(luma))[:, None].expand(-1, 3, -1, -1)
    basis = components(pictures)
    faded = lambda x, low: encode(x[:, :, None], reduced(low)[:, :, None], basis)[:, 4]  # noqa: E731
    assert faded(grey, pictures).mean() > 0.8
    assert max(faded(x, x).abs().max() for x in (pictures, grey)) < 1e-4 and faded(pictures, grey).max() < 1e-4
    half = faded(grey + 0.05 * (pictures - grey), pictures)
    assert (half < faded(grey, pictures)).float().mean() > 0.9 and half.mean() > 0.1


def test_every_block_is_coded_by_itself_but_for_its_surroundings(pictures):
    basis = components(pictures)
    clip = pictures[:2, :, None]
    changed = clip.clone()
    changed[..., :8, :8] = 0
    low = reduced(pictures)[:2, :, None]
    assert (encode(clip, low, basis)[..., 6:, 6:] == encode(changed, low, basis)[..., 6:, 6:]).all()
