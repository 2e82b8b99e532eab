"""Convolutions with fewer multiplications against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vsuav import native, winograd
from vsuav.layers import FrameConv


@pytest.fixture(autouse=True)
def _without_machine_code(monkeypatch):
    monkeypatch.setattr(native, "KIND", None)


def operands(n, i, o, h, w, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(n, i, h, w).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(o, i, 3, 3) / (9 * i) ** 0.5, torch.randn(o)


def exact(x, weight, bias):
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=1)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3), i=st.integers(1, 5), o=st.integers(1, 5), h=st.integers(1, 19), w=st.integers(1, 19),
    strip=st.sampled_from([1, 2, 3, 5, 256]), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_size_in_any_strips(n, i, o, h, w, strip, seed):
    x, weight, bias = operands(n, i, o, h, w, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "STRIP", strip)
        y = winograd.convolve(x, weight, bias)
    assert y.shape == (n, o, h, w)
    torch.testing.assert_close(y.double(), exact(x, weight, bias), atol=3e-5, rtol=0)


def test_wide_layers_are_nearly_as_exact_as_torch():
    x, weight, bias = operands(2, 256, 256, 33, 31)
    truth = exact(x, weight, bias)
    ours = (winograd.convolve(x, weight, bias) - truth).square().mean().sqrt()
    theirs = (F.conv2d(x, weight, bias, padding=1) - truth).square().mean().sqrt()
    assert ours < 5e-6 and ours < 10 * theirs


@pytest.mark.parametrize(
    ("channels", "side", "dtype", "taken"),
    [
        (256, 32, torch.float32, True), (255, 32, torch.float32, False), (256, 31, torch.float32, False),
        (256, 32, torch.bfloat16, False),
    ],
)  # fmt: skip
def test_layers_take_it_where_it_pays(channels, side, dtype, taken, monkeypatch):
    called = []
    monkeypatch.setattr(winograd, "convolve", lambda x, *rest: called.append(x) or x)
    layer = FrameConv(channels, channels, 3, padding=1).to(dtype)
    x = torch.randn(1, channels, 2, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        y = layer(x)
    assert y.shape == x.shape and bool(called) == taken


def test_never_where_gradients_are_wanted_nor_with_a_stride(monkeypatch):
    monkeypatch.setattr(winograd, "convolve", None)
    x = torch.randn(1, 256, 2, 32, 32)
    FrameConv(256, 256, 3, padding=1)(x).sum().backward()
    with torch.no_grad():
        assert FrameConv(256, 256, 3, stride=2, padding=1)(x).shape == (1, 256, 2, 16, 16)
        assert FrameConv(256, 256, 3)(x).shape == (1, 256, 2, 30, 30)


def test_a_layer_gives_the_same_with_it_and_without(monkeypatch):
    torch.manual_seed(1)
    layer = FrameConv(256, 320, 3, padding=1)
    nn.init.normal_(layer.bias)
    x, shift, add = torch.randn(1, 256, 3, 28, 30), torch.randn(1, 320), torch.randn(1, 320, 3, 28, 30)
    with torch.no_grad():
        with_it = layer(x, shift, add)
        monkeypatch.setattr(winograd, "MANY", 10**9)
        torch.testing.assert_close(with_it, layer(x, shift, add), atol=1e-4, rtol=0)
