"""The input as the decoder sees it, beside OpenCV's remapping and NumPy loops, and on clips whose mean is known."""

import cv2
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from vsuav import native
from vsuav.degrain import LIKE, PATCH, beside, degrained
from vsuav.flow import valid


@pytest.fixture(autouse=True, params=["as it is here", "by torch"])
def code(request, monkeypatch):
    """With this project's own machine code, where there is some, and without."""
    if request.param == "by torch":
        monkeypatch.setattr(native, "KIND", None)


SIZES = st.sampled_from([(1, 1), (3, 7), (16, 16), (23, 40)])


def smooth(size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    coarse = torch.rand(1, 3, -(-size[0] // 4) + 1, -(-size[1] // 4) + 1, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[0] * 2 - 1


def mixed(frame, matches, weight):
    return degrained(frame, *beside(frame, *matches, *[None] * (2 - len(matches))), weight)


def by_hand(frame, matches, weight):
    """The definition, pixel by pixel, with what OpenCV samples at the flow (a = -0.75, in 32nds of a pixel)."""
    _, height, width = frame.shape
    sums, counts = frame.double().numpy().copy(), np.ones((height, width))
    for neighbour, there, back in matches:
        rows, columns = np.mgrid[:height, :width].astype(np.float32)
        places = columns + there[0].numpy(), rows + there[1].numpy()
        picture = neighbour.permute(1, 2, 0).contiguous().numpy()
        found = cv2.remap(picture, *places, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        found = found.reshape(height, width, 3).transpose(2, 0, 1)
        inside = (places[0].round() >= 0) & (places[0].round() < width)
        inside &= (places[1].round() >= 0) & (places[1].round() < height)
        trusted = inside & valid(there[None], back[None])[0, 0].bool().numpy()
        errors = np.where(trusted, ((found - frame.numpy()) ** 2).mean(0), 0)
        for y in range(height):
            for x in range(width):
                patch = errors[max(0, y - PATCH // 2) : y + PATCH // 2 + 1, max(0, x - PATCH // 2) : x + PATCH // 2 + 1]
                share = weight * np.exp(-patch.mean() / (2 * LIKE**2)) * trusted[y, x]
                sums[:, y, x] += share * found[:, y, x]
                counts[y, x] += share
    return torch.from_numpy(sums / counts).float()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIZES, st.integers(0, 2**16), st.sampled_from([0.2, 0.5, 1.0]), st.integers(1, 2))
def test_it_is_the_weighted_mean_of_what_the_flow_finds(size, seed, weight, neighbours):
    generator = torch.Generator().manual_seed(seed)
    frame = smooth(size, generator)
    matches = []
    for _ in range(neighbours):
        there = torch.randint(-64, 65, (2, 1, 1), generator=generator).expand(2, *size) / 32
        there = there + (torch.rand(size, generator=generator) < 0.1) * 0.5
        back = -there + (torch.rand(size, generator=generator) < 0.2) * 3.0
        likely = frame + 0.3 * torch.randn(3, *size, generator=generator)
        matches.append((likely, there.contiguous(), back.contiguous()))
    torch.testing.assert_close(mixed(frame, matches, weight), by_hand(frame, matches, weight), rtol=0, atol=1e-5)


def still(noise: float, seed: int = 0, size=(48, 64)) -> tuple[torch.Tensor, list]:
    """A grey picture, and three noisy frames of it that do not move: the middle one and the others as its matches."""
    frames = 0.1 + noise * torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(seed))
    resting = torch.zeros(2, *size)
    return frames[1], [(frames[0], resting, resting), (frames[2], resting, resting)]


@pytest.mark.parametrize("weight", [0.2, 0.5, 1.0])
def test_grain_is_averaged_by_the_weights(weight):
    """Three like frames weigh 1, w and w: the variance falls to (1 + 2 w^2) / (1 + 2 w)^2."""
    frame, matches = still(0.003)
    left = (mixed(frame, matches, weight) - 0.1).var() / (frame - 0.1).var()
    assert left.item() == pytest.approx((1 + 2 * weight**2) / (1 + 2 * weight) ** 2, rel=0.03)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**16), st.floats(0, 1, width=32))
def test_frames_that_are_alike_come_back_as_they_were(seed, weight):
    frame = smooth((16, 24), torch.Generator().manual_seed(seed))
    resting = torch.zeros(2, 16, 24)
    torch.testing.assert_close(mixed(frame, [(frame, resting, resting)] * 2, weight), frame, rtol=0, atol=1e-6)


def test_each_neighbour_has_its_place_and_its_differences():
    """The frame before comes first; what is not there is nothing, and what is alike counts whole."""
    resting = torch.zeros(2, 20, 20)
    dark = torch.full((3, 20, 20), -0.5)
    changes, shares = beside(dark, (dark + 0.01, resting, resting), None)
    counted = np.exp(-0.5 * (0.01 / LIKE) ** 2)
    torch.testing.assert_close(shares[0], torch.full((1, 20, 20), counted, dtype=torch.float32))
    torch.testing.assert_close(changes[0], torch.full((3, 20, 20), 0.01 * counted, dtype=torch.float32))
    assert not changes[1].any() and not shares[1].any()
    for here, there in zip(beside(dark, None, (dark + 0.01, resting, resting)), (changes, shares), strict=True):
        assert torch.equal(here.flip(0), there)


def test_without_trust_or_neighbours_nothing_changes():
    frame, matches = still(0.05)
    leading_out = torch.full((2, 48, 64), 1000.0)
    lost = torch.full((2, 48, 64), float("nan"))
    assert torch.equal(mixed(frame, [], 1.0), frame)
    for there, back in ((matches[0][1], matches[0][1] + 1), (leading_out, -leading_out), (lost, lost)):
        assert torch.equal(mixed(frame, [(matches[0][0], there, back)], 1.0), frame)


def test_a_flash_leaves_its_neighbours_alone():
    """What is 0.4 brighter weighs exp(-8); a change of light by a hundredth of the range nearly as if it were none."""
    resting = torch.zeros(2, 20, 20)
    dark = torch.full((3, 20, 20), -0.5)
    for lighter, share in ((0.4, np.exp(-8)), (0.02, np.exp(-0.02))):
        moved = (mixed(dark, [(dark + lighter, resting, resting)], 1.0) - dark).mean().item()
        assert moved == pytest.approx(lighter * share / (1 + share), rel=1e-3)


def test_a_moving_ramp_is_found_between_pixels():
    """Cubics are nearly exact on a ramp, so one shifted by 0.4 of a pixel brings the very same frame back."""
    columns = torch.arange(32.0).expand(3, 8, 32) / 40 - 0.4
    there = torch.stack([torch.full((8, 32), 0.4), torch.zeros(8, 32)])
    seen = mixed(columns, [(columns - 0.01, there, -there)], 1.0)
    torch.testing.assert_close(seen[..., 2:-3], columns[..., 2:-3], rtol=0, atol=5e-4)
