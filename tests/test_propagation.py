"""Propagation against a pixel-by-pixel one, its laws, and the truncated chains against the whole ones."""

import math
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vsuav.flow import OUTSIDE, origins
from vsuav.propagation import backward_start, blend, forward_start, link, propagate


def moving(frames: int, height: int, width: int, seed: int, still: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """Flows "1 2 t-1 h w" there and back that agree nearly everywhere, without coordinates near a rounding tie."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randint(-2, 3, (1, 2, frames - 1, 1, 1), generator=generator).float()
    noise = torch.randint(-8, 9, (2, 1, 2, frames - 1, height, width), generator=generator) / 64
    noise[torch.rand(noise.shape, generator=generator) > still] *= 12
    return shift + noise[0] + 1 / 256, -shift + noise[1] + 1 / 256


def naive(x, forward, backward, fuse_scale=0.5, alpha1=0.001, alpha2=0.05, mode="fuse", interpolation="nearest"):
    """The definition, one pixel at a time, in Python floats."""
    _, frames, height, width = x.shape

    def at(image, row, column):
        return image[:, row, column] if 0 <= row < height and 0 <= column < width else torch.zeros(len(image))

    def sampled(image, row, column, how):
        if how == "nearest":
            return at(image, round(row), round(column))
        top, left = math.floor(row), math.floor(column)
        down, right = row - top, column - left
        upper = (1 - right) * at(image, top, left) + right * at(image, top, left + 1)
        lower = (1 - right) * at(image, top + 1, left) + right * at(image, top + 1, left + 1)
        return (1 - down) * upper + down * lower

    def step(current, source, there, back):
        out = current.clone()
        for row in range(height):
            for column in range(width):
                f = there[:, row, column].tolist()
                target = row + f[1], column + f[0]
                g = sampled(back, *target, "bilinear").tolist()
                error = (f[0] + g[0]) ** 2 + (f[1] + g[1]) ** 2
                if error < alpha1 * (f[0] ** 2 + f[1] ** 2 + g[0] ** 2 + g[1] ** 2) + alpha2:
                    value = sampled(source, *target, interpolation)
                    if mode == "fuse":
                        value = fuse_scale * value + (1 - fuse_scale) * current[:, row, column]
                    out[:, row, column] = value
        return out

    values = [x[:, i] for i in range(frames)]
    for i in range(frames - 2, -1, -1):
        values[i] = step(values[i], values[i + 1], forward[:, i], backward[:, i])
    for i in range(1, frames):
        values[i] = step(values[i], values[i - 1], backward[:, i - 1], forward[:, i - 1])
    return torch.stack(values, 1)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("options", [{}, {"fuse_scale": 0.3}, {"mode": "copy", "alpha1": 0.01, "alpha2": 0.5}])
def test_propagation_is_what_its_definition_says(options, interpolation):
    x = torch.randn(2, 4, 4, 7, 9)
    flows = [torch.cat(pair) for pair in zip(moving(4, 7, 9, 1), moving(4, 7, 9, 2), strict=True)]
    result = propagate(x, *flows, interpolation=interpolation, **options)
    for b in range(2):
        expected = naive(x[b], flows[0][b], flows[1][b], interpolation=interpolation, **options)
        assert (expected != x[b]).any() and (expected == x[b]).any()  # some pixels are propagated, some are not
        torch.testing.assert_close(result[b], expected, atol=1e-5, rtol=0)


def test_one_frame_is_left_alone():
    x = torch.randn(1, 4, 1, 5, 6)
    assert torch.equal(propagate(x, torch.zeros(1, 2, 0, 5, 6), torch.zeros(1, 2, 0, 5, 6)), x)


def test_flows_that_are_not_finite_change_nothing():
    x = torch.randn(1, 4, 5, 6, 7)
    for value in (float("nan"), float("inf")):
        broken = torch.full((1, 2, 4, 6, 7), value)
        assert torch.equal(propagate(x, broken, broken), x)
        assert torch.equal(propagate(x, broken, torch.zeros_like(broken)), x)


def test_a_still_clip_becomes_one_image_with_known_weights():
    """With no motion P_i and Q_i are means with weights 1/2, 1/4, … along the chains."""
    x = torch.randn(1, 4, 6, 3, 3)
    still = torch.zeros(1, 2, 5, 3, 3)
    back = [x[:, :, 5]]
    for i in range(4, -1, -1):
        back.insert(0, (back[0] + x[:, :, i]) / 2)
    out = [back[0]]
    for i in range(1, 6):
        out.append((out[-1] + back[i]) / 2)
    torch.testing.assert_close(propagate(x, still, still), torch.stack(out, 2))


def test_flow_of_another_size_is_resized_first():
    x = torch.randn(1, 4, 3, 4, 4)
    large = torch.zeros(1, 2, 2, 8, 8)
    large[:, 0] = 2  # two pixels of the larger grid are one of the latents'
    small = torch.zeros(1, 2, 2, 4, 4)
    small[:, 0] = 1
    torch.testing.assert_close(propagate(x, large, -large), propagate(x, small, -small))


def test_flows_must_fit_the_clip():
    x, flow = torch.zeros(1, 4, 5, 4, 4), torch.zeros(1, 2, 4, 4, 4)
    with pytest.raises(ValueError, match=r"backward must begin with the axes \(1, 2, 4\), got \(1, 2, 5, 4, 4\)"):
        propagate(x, flow, torch.zeros(1, 2, 5, 4, 4))
    with pytest.raises(ValueError, match="mode must be fuse or copy, got 'blend'"):
        propagate(x, flow, flow, mode="blend")


def one_link(*values: torch.Tensor) -> torch.Tensor:
    """`link` of one clip."""
    return link(*(v[None] for v in values))[0]


def test_half_precision_is_blended_in_float32_and_rounded_once():
    current, source = torch.randn(2, 4, 6, 7).half().unbind()
    there, back = (flow[0, :, 0] for flow in moving(2, 6, 7, 3))
    exact = one_link(current.float(), source.float(), there, back)
    assert torch.equal(one_link(current, source, there, back), exact.half())


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 3.0, 40.0]))
def test_known_origins_give_the_same_as_flows(height, width, seed, reach):
    """`blend` against `link`, with flows that agree, that do not, that lead outside, and that are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    current, source = torch.randn(2, 3, height, width, generator=generator)
    there = torch.randn(2, height, width, generator=generator) * reach
    back = torch.randn(2, 1, 1, generator=generator) * 0.1 - there.mean((1, 2), keepdim=True)
    there = torch.where(torch.rand(there.shape, generator=generator) < 0.7, there.mean((1, 2), keepdim=True), there)
    there[torch.rand(there.shape, generator=generator) < 0.05] = float("nan")
    there[torch.rand(there.shape, generator=generator) < 0.05] = float("-inf")
    back = back.expand(2, height, width)
    assert torch.equal(blend(current, source, origins(there, back)), one_link(current, source, there, back))


def test_a_trusted_pixel_from_outside_counts_as_zero():
    there, back = torch.zeros(2, 2, 1, 2)
    there[0], back[0] = torch.tensor([[0.0, 0.6]]), torch.tensor([[0.0, -1.3]])
    assert origins(there, back).tolist() == [[0, OUTSIDE]]
    assert blend(torch.ones(1, 1, 2), torch.ones(1, 1, 2), origins(there, back)).tolist() == [[[1.0, 0.5]]]


def truncated(x, forward, backward, radius: int, first: int) -> torch.Tensor:
    """Every frame from its own truncated chains; x "c t h w" is the shot that begins at the absolute frame `first`."""
    frames = x.shape[1]

    @lru_cache(None)
    def back(i: int, start: int) -> torch.Tensor:
        if i == start:
            return x[:, i]
        return one_link(x[:, i], back(i + 1, start), forward[:, i], backward[:, i])

    @lru_cache(None)
    def final(i: int, start: int) -> torch.Tensor:
        current = back(i, backward_start(i + first, radius, first + frames) - first)
        if i == start:
            return current
        return one_link(current, final(i - 1, start), backward[:, i - 1], forward[:, i - 1])

    return torch.stack([final(m, forward_start(m + first, radius, first) - first) for m in range(frames)], 1)


@settings(max_examples=40)
@given(st.integers(2, 30), st.integers(1, 8), st.integers(0, 11), st.integers(0, 999))
def test_truncated_chains_stay_within_their_bound(frames, radius, first, seed):
    """What is cut off is below 4 * 2^-R * max|x|, and nothing is for shots of at most R + 1 frames."""
    x = torch.randn(1, 2, frames, 4, 5, generator=torch.Generator().manual_seed(seed))
    forward, backward = moving(frames, 4, 5, seed, still=1.0)
    whole = propagate(x, forward, backward)[0]
    ours = truncated(x[0], forward[0], backward[0], radius, first)
    if frames <= radius + 1:
        assert torch.equal(ours, whole)
    bound = 4 * 2.0**-radius * x.abs().max() + 1e-6
    assert (ours - whole).abs().max() <= bound


def test_truncation_makes_a_difference_where_it_may():
    """The bound above is no empty promise: at a small radius the chains do differ."""
    x, flows = torch.randn(1, 2, 40, 4, 5), torch.zeros(1, 2, 39, 4, 5)
    assert not torch.equal(truncated(x[0], flows[0], flows[0], 2, 0), propagate(x, flows, flows)[0])


@given(st.integers(0, 300), st.integers(1, 40), st.integers(0, 60), st.integers(0, 60))
def test_chains_start_far_enough_on_the_grid_and_inside_the_shot(m, radius, before, after):
    start, stop = max(0, m - before), m + after + 1
    ahead, behind = backward_start(m, radius, stop), forward_start(m, radius, start)
    assert start <= behind <= m <= ahead < stop
    assert ahead == stop - 1 or (ahead % 6 == 0 and m + radius <= ahead < m + radius + 6)
    assert behind == start or (behind % 6 == 0 and m - radius - 6 < behind <= m - radius)
