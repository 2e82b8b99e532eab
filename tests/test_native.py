"""The project's own machine code against torch in float64, and against the layers without it."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vsuav import native
from vsuav.checkpoint import load
from vsuav.degrain import beside
from vsuav.engine import Engine
from vsuav.enlarger import Plain
from vsuav.flow import origins
from vsuav.folders import locate
from vsuav.layers import (
    FrameConv,
    JointNorm,
    ResBlock,
    TimeConv,
    Up,
    VolumeConv,
    lay_out,
    memory,
    video,
)  # fmt: skip
from vsuav.networks import Networks, choose
from vsuav.operators import affine, gated
from vsuav.propagation import blend
from vsuav.shots import Shots
from vsuav.store import Store
from vsuav.turns import working_threads

there = pytest.mark.skipif(native.KIND is None, reason="this CPU has no machine code here, or it was not compiled")
SOURCES = sorted(Path(native.__file__).parent.glob("native*.cpp"))


def clip_of(b, c, t, h, w):
    return torch.randn(b, c, t, h, w).contiguous(memory_format=torch.channels_last_3d)


def nearly(result, truth, share=4e-5):
    """Within a share of the largest value: what sums with factors up to 32 cost in float32."""
    assert (result - truth).abs().max() <= share * max(1.0, truth.abs().max().item())


def exact(m, weight, bias, add=None, norm=None, enlarge=1, activate=False):
    """What `native.convolve` promises, in float64, by torch's own operations."""
    x = video(m).double()
    if norm is not None:
        scale, shift = (n.double()[:, :, None, None, None] for n in norm)
        x = F.silu(x * scale + shift)
    x = F.interpolate(x, scale_factor=(1, enlarge, enlarge), mode="nearest")
    weight = weight if weight.dim() == 5 else weight[:, :, None]
    y = F.conv3d(x, weight.double(), bias.double(), padding=(weight.shape[2] // 2, 1, 1))
    y = y if add is None else y + video(add).double()
    return memory(F.silu(y) if activate else y)


@pytest.fixture(scope="module", params=["this CPU's", "16 at a time", "16 at a time, pairs"])
def library(request, tmp_path_factory):
    """The code as it was built, and the same with vectors twice as long and with products of pairs of bfloat16 numbers,
    whatever this CPU has."""
    if request.param == "this CPU's":
        return native._library
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    file = tmp_path_factory.mktemp("native") / "wide.so"
    flags = ["-O1", "-std=c++17", "-DLANES=16", "-mavx2", "-mfma", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
    flags.append("-DPAIRS=true" if request.param.endswith("pairs") else "-DPAIRS=false")
    subprocess.run([compiler, *flags, "-o", file, *SOURCES], check=True)
    return native.opened(file)


def test_code_from_other_source_is_refused(monkeypatch):
    with pytest.raises(OSError, match="other source"):
        native.opened(Path(torch._C.__file__))
    if native.KIND is not None:
        file = next(Path(native.__file__).parent.glob(f"_native_{native.KIND}.*"))
        assert native.opened(file).sizes()
        monkeypatch.setattr(native, "_Line", native._Norm)
        with pytest.raises(OSError, match="other source"):
            native.opened(file)


@there
def test_code_for_pairs_is_taken_where_the_cpu_multiplies_them(monkeypatch):
    plain = torch.backends.cpu.get_cpu_capability().lower()
    for_pairs = any(Path(native.__file__).parent.glob(f"_native_{plain}_bf16.*.so"))  # not made by every compiler
    wanted = f"{plain}_bf16" if "avx512_bf16" in native.BFLOAT16 and for_pairs else plain
    assert wanted == native.KIND
    monkeypatch.setattr(native, "BFLOAT16", ())
    assert native._built()[0] == plain


@there
@settings(max_examples=80, deadline=None)
@given(
    b=st.integers(1, 2), t=st.integers(1, 7), h=st.integers(1, 15), w=st.integers(1, 15),
    inputs=st.sampled_from([16, 32, 48]), outputs=st.sampled_from([3, 16, 28, 32]), volume=st.booleans(),
    added=st.booleans(), normed=st.booleans(), enlarge=st.sampled_from([1, 2]), activate=st.booleans(),
    columns_first=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_convolutions_of_any_size(
    library, b, t, h, w, inputs, outputs, volume, added, normed, enlarge, activate, columns_first, seed
):
    torch.manual_seed(seed)
    taps = (3, 3, 3) if volume else (3, 3)
    weight = torch.randn(outputs, inputs, *taps) / (27 * inputs) ** 0.5
    if columns_first:
        weight = weight.transpose(-1, -2)
    m, bias = torch.randn(b, t, h, w, inputs), torch.randn(outputs)
    add = torch.randn(b, t, h * enlarge, w * enlarge, outputs) if added else None
    norm = (torch.rand(b, inputs) + 0.5, torch.randn(b, inputs)) if normed else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", library)
        y = native.convolve(m, weight, bias, add, norm, enlarge, activate)
    truth = exact(m, weight, bias, add, norm, enlarge, activate)
    assert y.shape == truth.shape
    nearly(y, truth)


def whole_numbers(*shape, most=4):
    """bfloat16 numbers with which products, sums and their rounding are exact."""
    return torch.randint(-most, most + 1, shape).bfloat16()


def half_a_unit(result, truth, also):
    """Is every number the truth's within the rounding to bfloat16 and `also`?"""
    assert ((result.double() - truth).abs() <= 2**-8 * truth.abs() + also).all()


@there
@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 2), t=st.integers(1, 5), h=st.integers(1, 13), w=st.integers(1, 13),
    inputs=st.sampled_from([16, 48]), outputs=st.sampled_from([3, 16, 32]), volume=st.booleans(), added=st.booleans(),
    normed=st.booleans(), enlarge=st.sampled_from([1, 2]), activate=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_convolutions_of_bfloat16_are_float32s_rounded(
    library, b, t, h, w, inputs, outputs, volume, added, normed, enlarge, activate, seed
):
    torch.manual_seed(seed)
    weight = (torch.randn(outputs, inputs, *[3] * (2 + volume)) / (27 * inputs) ** 0.5).bfloat16()
    m, bias = torch.randn(b, t, h, w, inputs).bfloat16(), torch.randn(outputs).bfloat16()
    add = torch.randn(b, t, h * enlarge, w * enlarge, outputs).bfloat16() if added else None
    norm = (torch.rand(b, inputs) + 0.5, torch.randn(b, inputs)) if normed else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", library)
        y = native.convolve(m, weight, bias, add, norm, enlarge, activate)
        wide = None if add is None else add.float()
        wanted = native.convolve(m.float(), weight.float(), bias, wide, norm, enlarge, activate)
    assert torch.equal(y, wanted.bfloat16())


@there
@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 2), t=st.integers(1, 5), h=st.integers(1, 13), w=st.integers(1, 13),
    block=st.sampled_from([12, 48]), inputs=st.sampled_from([16, 48, 512]), outputs=st.sampled_from([3, 16, 32]),
    volume=st.booleans(), added=st.booleans(), enlarge=st.sampled_from([1, 2]), seed=st.integers(0, 9),
)  # fmt: skip
def test_small_tiles_of_bfloat16(library, b, t, h, w, block, inputs, outputs, volume, added, enlarge, seed):
    """Of whole numbers, exactly; of any, normalised or not, as well as their sums are rounded."""
    torch.manual_seed(seed)
    shape = (outputs, inputs, *[3] * (2 + volume))
    weight, m, bias = 4 * whole_numbers(*shape, most=2), whole_numbers(b, t, h, w, inputs), whole_numbers(outputs)
    add = whole_numbers(b, t, h * enlarge, w * enlarge, outputs) if added else None
    fine, norm = torch.randn(*shape) / (27 * inputs) ** 0.5, (torch.rand(b, inputs) + 0.5, torch.randn(b, inputs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", library)
        patch.setattr(native, "_tiles", lambda *given: (2, block))
        y = native.convolve(m, weight, bias, add, None, enlarge)
        z = native.convolve(m, fine.bfloat16(), bias, add, norm, enlarge)
    assert torch.equal(y.double(), exact(m, weight, bias, add, None, enlarge).bfloat16().double())
    half_a_unit(z, exact(m, fine.bfloat16(), bias, add, norm, enlarge), 0.05)


@there
@pytest.mark.parametrize("inputs", [48, 272], ids=["tiles of 6", "tiles of 4"])
@pytest.mark.parametrize("volume", [False, True])
def test_many_channels_and_many_blocks(library, monkeypatch, inputs, volume):
    monkeypatch.setattr(native, "_library", library)
    torch.manual_seed(0)
    m, bias = torch.randn(1, 5, 45, 50, inputs), torch.randn(64)
    weight = torch.randn(64, inputs, *[3] * (2 + volume))
    weight /= weight[0].numel() ** 0.5
    truth, flat = exact(m, weight, bias), weight if volume else weight[:, :, None]
    ours = (native.convolve(m, weight, bias) - truth).square().mean().sqrt()
    theirs = (memory(F.conv3d(video(m), flat, bias, padding=(int(volume), 1, 1))) - truth).square().mean().sqrt()
    assert ours < 5e-6 and ours < (20 if inputs == 48 else 10) * theirs


@there
@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 2), t=st.integers(1, 3), h=st.integers(1, 40), w=st.integers(1, 40),
    channels=st.sampled_from([16, 48]), groups=st.sampled_from([1, 2, 8]), act=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), offset=st.sampled_from([0.0, 300.0]),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_norms(library, b, t, h, w, channels, groups, act, dtype, offset, seed):
    torch.manual_seed(seed)
    m, weight, bias = torch.randn(b, t, h, w, channels) + offset, torch.randn(channels), torch.randn(channels)
    m = m.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", library)
        y = native.line(m, *native.moments(m, weight, bias, groups, 1e-5), act)
    truth = F.group_norm(video(m).double(), groups, weight.double(), bias.double(), 1e-5)
    truth = memory(F.silu(truth) if act else truth)
    assert y.dtype == dtype
    half_a_unit = 2**-8 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(y.double(), truth, atol=2e-3 if offset else 2e-5, rtol=half_a_unit)


@there
def test_bfloat16_is_rounded_as_torch_does(library, monkeypatch):
    monkeypatch.setattr(native, "_library", library)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(1, 1, 1, -1, 16)
    for factor in (1.0, 1 / 3):
        y = native.line(every, torch.full((1, 16), factor), torch.zeros(1, 16), act=False)
        torch.testing.assert_close(y, (every.float() * factor).bfloat16(), atol=0, rtol=0, equal_nan=True)


@there
def test_silu_over_all_floats(library, monkeypatch):
    monkeypatch.setattr(native, "_library", library)
    x = torch.cat([torch.linspace(-120, 120, 4096), torch.logspace(-30, 38, 2048), -torch.logspace(-30, 38, 2048)])
    y = native.line(x.view(1, 1, 1, -1, 16), torch.ones(1, 16), torch.zeros(1, 16), True).flatten()
    truth = F.silu(x.double())
    assert torch.isfinite(y).all()
    assert ((y - truth).abs() <= (4e-7 + 7e-8 * x.clamp(max=0).abs()) * truth.abs() + 1e-18 * x.abs()).all()


@there
@settings(max_examples=80, deadline=None)
@given(
    b=st.integers(1, 2), t=st.integers(1, 9), pixels=st.integers(12, 130), inputs=st.sampled_from([16, 48, 64]),
    outputs=st.sampled_from([16, 48]), taps=st.sampled_from([1, 3, 5]), added=st.booleans(), biased=st.booleans(),
    normed=st.booleans(), transposed=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_linear_layers_and_convolutions_over_time(
    library, b, t, pixels, inputs, outputs, taps, added, biased, normed, transposed, seed
):
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs, taps) / (taps * inputs) ** 0.5
    if transposed:
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    m, bias = torch.randn(b, t, pixels, inputs), torch.randn(outputs) if biased else None
    add = torch.randn(b, t, pixels, outputs) if added else None
    norm = (torch.rand(b, inputs) + 0.5, torch.randn(b, inputs)) if normed else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", library)
        y = native.affine(m, weight[..., 0] if taps == 1 else weight, bias, add, norm)
    x = m.double()
    if norm is not None:
        x = F.silu(x * norm[0].double()[:, None, None] + norm[1].double()[:, None, None])
    truth = F.conv2d(x.permute(0, 3, 1, 2), weight.double()[..., None], None if bias is None else bias.double(),
                     padding=(taps // 2, 0)).permute(0, 2, 3, 1)  # fmt: skip
    nearly(y, truth if add is None else truth + add, 2e-6 if taps == 1 else 1e-5)


@there
@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 2), t=st.integers(1, 9), pixels=st.integers(12, 130), inputs=st.sampled_from([16, 48, 512]),
    outputs=st.sampled_from([16, 48]), taps=st.sampled_from([1, 3, 5]), added=st.booleans(), biased=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_linear_layers_of_bfloat16(library, b, t, pixels, inputs, outputs, taps, added, biased, seed):
    torch.manual_seed(seed)
    m, bias = whole_numbers(b, t, pixels, inputs), whole_numbers(outputs) if biased else None
    weight, add = whole_numbers(outputs, inputs, taps), whole_numbers(b, t, pixels, outputs) if added else None
    fine = (torch.randn(outputs, inputs, taps) / (taps * inputs) ** 0.5).bfloat16()
    norm = torch.rand(b, inputs), torch.randn(b, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", library)
        y = native.affine(m, weight[..., 0] if taps == 1 else weight, bias, add)
        z = native.affine(m, fine[..., 0] if taps == 1 else fine, bias, add, norm)

    def truth(x, weight):
        offset, x = None if bias is None else bias.double(), x.permute(0, 3, 1, 2)
        sums = F.conv2d(x, weight.double()[..., None], offset, padding=(taps // 2, 0)).permute(0, 2, 3, 1)
        return sums if add is None else sums + add.double()

    direct = y.double() - truth(m.double(), weight)  # the sums of frames by Winograd's way are not exact
    assert (direct.abs() <= 2**-8 * y.double().abs() + 1e-2).all()
    x = F.silu(m.double() * norm[0].double()[:, None, None] + norm[1].double()[:, None, None])
    half_a_unit(z, truth(x, fine), 0.02)


@there
@pytest.mark.parametrize("inputs", [7, 24])
def test_gated_layers_of_bfloat16(library, monkeypatch, inputs):
    """Also of an odd number of channels, which do not pair up."""
    monkeypatch.setattr(native, "_library", library)
    torch.manual_seed(0)
    m, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((1, 2, 37, inputs), (2 * 48, inputs), (2 * 48,)))
    a, g = F.linear(m.double(), weight.double(), bias.double()).chunk(2, dim=-1)
    half_a_unit(native.affine(m, weight, bias, gated=True), a * F.gelu(g), 1e-4)


@there
def test_gated_layers(library, monkeypatch):
    monkeypatch.setattr(native, "_library", library)
    torch.manual_seed(0)
    m, weight, bias = torch.randn(1, 2, 37, 24), torch.randn(2 * 48, 24) / 5, torch.randn(2 * 48)
    a, g = F.linear(m.double(), weight.double(), bias.double()).chunk(2, dim=-1)
    nearly(native.affine(m, weight, bias, gated=True), a * F.gelu(g), 1e-6)


@there
def test_gelu_over_all_floats(library, monkeypatch):
    monkeypatch.setattr(native, "_library", library)
    x = torch.cat([torch.linspace(-40, 40, 4096), torch.logspace(-30, 18, 1024), -torch.logspace(-30, 18, 1024)])
    weight = torch.zeros(32, 1)
    weight[16:] = 1  # a is 1 by its bias, g is x
    y = native.affine(x.view(1, 1, -1, 1), weight, torch.cat([torch.ones(16), torch.zeros(16)]), gated=True)
    assert ((y[0, 0, :, 0] - F.gelu(x.double())).abs() <= 3e-7 * x.abs()).all()
    endless = torch.cat([torch.ones(16), torch.full((16,), torch.inf)])
    assert (native.affine(torch.zeros(1, 1, 48, 1), torch.zeros(32, 1), endless, gated=True) == torch.inf).all()


def attended(q, k, v, heads):
    """What `native.attend` promises, in float64."""
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@there
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 2), queries=st.integers(1, 130), keys=st.one_of(st.integers(1, 40), st.integers(200, 700)),
    heads=st.integers(1, 3), size=st.sampled_from([16, 48, 64]), spread=st.sampled_from([0.1, 1.0, 30.0]),
    offset=st.sampled_from([0.0, 100.0]), seed=st.integers(0, 9),
)  # fmt: skip
def test_attention(library, n, queries, keys, heads, size, spread, offset, seed):
    """Also where one score is far larger than all others, and where a common part makes all large."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(n, rows, heads * size) for rows in (queries, keys, keys))
    q *= spread
    k[..., 0] += offset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", library)
        y = native.attend(q, k, v, heads)
    scores = spread * (10 + offset)
    nearly(y, attended(q, k, v, heads), 4e-6 + 4e-7 * scores)


@there
def test_attention_from_low_to_high_scores(library, monkeypatch):
    """Every block of keys outweighs those before it; or none counts but the first."""
    monkeypatch.setattr(native, "_library", library)
    torch.manual_seed(0)
    q, v = torch.ones(1, 50, 16), torch.randn(1, 1000, 16)
    k = torch.linspace(-60, 60, 1000)[:, None].expand(-1, 16)[None]
    for keys in (k, k.flip(1)):
        nearly(native.attend(q, keys, v, 1), attended(q, keys, v, 1), 1e-4)


def turned(x, turns):
    """x "b t n heads d" with its first pairs of channels multiplied by complex turns "t pairs"."""
    turns = F.pad(turns.to(torch.complex128), (0, x.shape[-1] // 2 - turns.shape[1]), value=1)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns[:, None, None]).flatten(-2)


@there
@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 2), t=st.integers(1, 16), n=st.integers(1, 40), heads=st.integers(1, 3),
    size=st.sampled_from([32, 48, 64]), pairs=st.sampled_from([0, 5, 16]), seed=st.integers(0, 9),
)  # fmt: skip
def test_attention_over_time(library, b, t, n, heads, size, pairs, seed):
    torch.manual_seed(seed)
    q, k, v = (2 * torch.randn(b, t, n, heads * size) for _ in range(3))
    turns, bias = torch.polar(torch.ones(t, pairs), torch.randn(t, pairs)), torch.randn(t, t, heads).permute(2, 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", library)
        y = native.attend_over_time(q, k, v, heads, turns, bias)
    q, k, v = (x.double().unflatten(-1, (heads, -1)) for x in (q, k, v))
    q, k = (turned(x, turns).permute(0, 2, 3, 1, 4) for x in (q, k))
    truth = F.scaled_dot_product_attention(q, k, v.permute(0, 2, 3, 1, 4), bias.double())
    nearly(y, truth.permute(0, 3, 1, 2, 4).flatten(3), 1e-5)


@there
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 2), queries=st.integers(1, 130), keys=st.one_of(st.integers(1, 40), st.integers(200, 700)),
    heads=st.integers(1, 3), size=st.sampled_from([16, 48]), spread=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_attention_of_bfloat16(library, n, queries, keys, heads, size, spread, seed):
    """What is rounded is the result and, where pairs are multiplied, the shares of the keys."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(n, rows, heads * size) for rows in (queries, keys, keys))
    q, k, v = (q * spread).bfloat16(), k.bfloat16(), v.bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", library)
        y = native.attend(q, k, v, heads)
    assert y.dtype is torch.bfloat16
    half_a_unit(y, attended(q, k, v, heads), 2**-8 * v.abs().max() + 1e-5 * spread)


@there
def test_attention_over_time_of_bfloat16_is_float32s_rounded(library, monkeypatch):
    monkeypatch.setattr(native, "_library", library)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, 30, 96).bfloat16() for _ in range(3))
    turns, bias = torch.polar(torch.ones(8, 16), torch.randn(8, 16)), torch.randn(2, 8, 8)
    wide = native.attend_over_time(q.float(), k.float(), v.float(), 2, turns, bias)
    assert torch.equal(native.attend_over_time(q, k, v, 2, turns, bias), wide.bfloat16())


@there
def test_attention_of_any_layout():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 30, 8, 32).transpose(1, 2) for _ in range(3))
    turns, bias = torch.polar(torch.ones(8, 16), torch.randn(8, 16)), torch.randn(2, 8, 8)
    straight = [x.contiguous() for x in (q, k, v)]
    wanted = native.attend_over_time(*straight, 2, turns, bias)
    assert torch.equal(native.attend_over_time(q, k, v, 2, turns, bias), wanted)
    assert torch.equal(native.attend(q[0], k[0], v[0], 2), native.attend(*(x[0] for x in straight), 2))


@there
@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 20), width=st.integers(1, 40), channels=st.integers(1, 5),
    reach=st.sampled_from([0.0, 0.3, 4.0, 60.0, 1e30]), step=st.sampled_from([0.0, 0.25, 0.5]), seed=st.integers(0, 99),
)  # fmt: skip
def test_propagation_is_that_of_torch_to_the_bit(library, height, width, channels, reach, step, seed):
    """Flows that agree, are between centres, lead outside or far away, and are no numbers."""
    torch.manual_seed(seed)
    mean, size = torch.randn(2, 1, 1) * reach, (2, height, width)
    there, back = mean + 0.2 * torch.randn(size), -mean + 0.2 * torch.randn(size)
    if step:
        there, back = (there / step).round() * step, (back / step).round() * step
    for flow, value in ((there, torch.nan), (there, torch.inf), (back, -torch.inf)):
        flow[torch.rand(size) < 0.02] = value
    current, source = torch.randn(2, channels, height, width)
    source[torch.rand(source.shape) < 0.02] = torch.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", library)
        place = origins(there, back)
        blended = blend(current, source, place)
        patch.setattr(native, "KIND", None)
        assert torch.equal(place, origins(there, back))
        assert torch.equal(blended, blend(current, source, place))


@there
@pytest.mark.parametrize("size", [(1, 1), (9, 4), (33, 50)])
def test_frames_are_degrained_as_by_torch(library, monkeypatch, size):
    monkeypatch.setattr(native, "_library", library)
    generator = torch.Generator().manual_seed(size[1])
    frame, neighbour = torch.randn(2, 3, *size, generator=generator) / 8
    flow = 3 * torch.randn(2, *size, generator=generator)
    back = torch.where(torch.rand(size, generator=generator) < 0.8, -flow.mean((1, 2), keepdim=True), flow)
    flow = flow.mean((1, 2), keepdim=True).expand(2, *size).contiguous()
    found = beside(frame, (neighbour, flow, back), (frame, back, flow))
    monkeypatch.setattr(native, "KIND", None)
    for ours, expected in zip(found, beside(frame, (neighbour, flow, back), (frame, back, flow)), strict=True):
        assert (ours - expected).abs().max() < 3e-6  # places up to 50, each by other sums in float32


@there
def test_scores_below_all_floats_count_for_nothing(library, monkeypatch):
    monkeypatch.setattr(native, "_library", library)
    q, v = torch.full((1, 2048, 16), 1e20), torch.randn(1, 600, 16)
    k = torch.cat([torch.full((1, 300, 16), -1e20), torch.randn(1, 300, 16) * 1e-20], 1)
    wanted = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    nearly(native.attend(q, k, v, 1), wanted)


@there
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_type_of_torch_does_not_matter(default):
    """Another plugin of the same process may set it; memory left from then must not be too small afterwards."""
    torch.manual_seed(0)
    m, weight, bias = torch.randn(1, 3, 40, 50, 32), torch.randn(32, 32, 3, 3) / 17, torch.randn(32)
    q = torch.randn(1, 2100, 32)
    f = torch.randn(2, 40, 50)

    def results():
        norm = native.moments(m, bias, bias, 2, 1e-5)
        return (*norm, native.convolve(m, weight, bias, None, norm), native.attend(q, q, q, 2), native.origins(f, -f))

    wanted = results()
    native.unload()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        meanwhile = results()
    finally:
        torch.set_default_dtype(before)
    for ours in (meanwhile, results()):
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@there
def test_parameters_of_any_layout():
    torch.manual_seed(0)
    m, weight, bias = torch.randn(1, 2, 40, 50, 32), torch.randn(32, 32, 3, 3) / 17, torch.randn(64)[::2]
    straight = bias.contiguous()
    assert torch.equal(native.convolve(m, weight, bias), native.convolve(m, weight, straight))
    linear = weight[..., 0, 0]
    assert torch.equal(native.affine(m, linear, bias), native.affine(m, linear, straight))
    ours, wanted = native.moments(m, bias, bias, 2, 1e-5), native.moments(m, straight, straight, 2, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@there
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1])
def test_what_is_not_a_number_stays_so(library, monkeypatch, bits):
    """Whatever it was made by: x86, or a GPU, which sets all bits."""
    monkeypatch.setattr(native, "_library", library)
    q = torch.randn(1, 60, 16)
    k = q.clone()
    q.view(torch.int32)[0, 7, 3] = bits
    assert native.attend(q, k, k, 1).isnan().all(2)[0].tolist() == [i == 7 for i in range(60)]
    assert native.attend(k, q, k, 1).isnan().all()
    q, k, turns = q.view(1, 4, 15, 16), k.view(1, 4, 15, 16), torch.ones(4, 8, dtype=torch.cfloat)
    spoilt = native.attend_over_time(k, q, k, 1, turns, torch.zeros(1, 4, 4)).isnan().all(3)[0]
    assert spoilt.tolist() == [[i == 7 for i in range(15)]] * 4
    m = torch.zeros(1, 1, 6, 6, 16)
    m.view(torch.int32)[0, 0, 3, 3, 5] = bits
    ones, zeros = torch.ones(1, 16), torch.zeros(1, 16)
    assert native.line(m, ones, zeros, True)[0, 0, 3, 3].isnan().tolist() == [i == 5 for i in range(16)]
    y = native.convolve(m, torch.randn(16, 16, 3, 3), zeros[0], norm=(ones, zeros))
    assert y[0, 0, 2:5, 2:5].isnan().all()


@there
@pytest.mark.parametrize("volume", [False, True])
def test_bits_do_not_depend_on_threads(volume):
    torch.manual_seed(0)
    m, norm = torch.randn(2, 3, 37, 41, 48), JointNorm(2, 48, 1e-5)
    weight, bias = torch.randn(32, 48, *([3] * (2 + volume))), torch.randn(32)
    turns, apart = torch.randn(3, 8, dtype=torch.cfloat), torch.randn(3, 3, 3)
    results = []
    for threads in (1, 2, 3, 4):
        with working_threads(threads), torch.no_grad():
            line = norm.line(m)
            over_time = native.affine(m, weight[..., 1, 1], bias, norm=line)
            q = m[:, 0].flatten(1, 2)
            results.append((
                *line, native.line(m, *line, True), native.convolve(m, weight, bias, norm=line), over_time,
                native.attend(q, q, q, 3), native.attend_over_time(*[m.flatten(2, 3)] * 3, 3, turns, apart),
            ))  # fmt: skip
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@there
def test_calls_at_the_same_time_do_not_disturb_each_other():
    torch.manual_seed(0)
    weight, bias = torch.randn(32, 48, 3, 3), torch.randn(32)
    clips = [torch.randn(1, 2, 20 + 4 * n, 30, 48) for n in range(4)]
    alone = [native.convolve(m, weight, bias) for m in clips]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            together = list(pool.map(lambda m: native.convolve(m, weight, bias), clips))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    native.unload()
    assert torch.equal(native.convolve(clips[0], weight, bias), alone[0])


LAYERS = {
    "frame": lambda: FrameConv(48, 32, 3, padding=1),
    "activated": lambda: Plain(48, 32),
    "volume": lambda: VolumeConv(32, 48, 3, padding=1),
    "time": lambda: TimeConv(48, 48, 3),
    "single pixels": lambda: FrameConv(48, 32, 1),
    "stride": lambda: FrameConv(48, 32, 3, stride=2, padding=1),
    "up": lambda: Up(48),
    "norm": lambda: JointNorm(4, 48, 1e-5),
    "block": lambda: ResBlock(48, 64, eps=1e-5, groups=4),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("frames", [1, 3])
def test_layers_give_the_same_without_it(kind, frames, monkeypatch):
    """Also where there is no code to compare: then it is the layers without it that training's way judges."""
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = clip_of(2, layer.conv.in_channels if kind == "up" else 32 if kind == "volume" else 48, frames, 32, 36)
    trained = lay_out(layer)(x)
    with torch.no_grad():
        results = [layer(x)]
        monkeypatch.setattr(native, "KIND", None)
        results.append(layer(x))
    for result in results:
        assert result.shape == trained.shape
        nearly(result, trained.detach())


@there
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("rows", [16, 2500])
def test_linear_layers_give_the_same_without_it(rows, added, monkeypatch):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 64).T.contiguous().T, torch.randn(96, 64) / 8, torch.randn(96)
    add, called, ours = torch.randn(rows, 96) if added else None, [], native.affine
    monkeypatch.setattr(native, "affine", lambda *given, **named: called.append(given) or ours(*given, **named))
    with torch.no_grad():
        results = [affine(x, weight, bias, add), gated(x, weight, bias)]
        assert len(called) == (2 if rows > 2048 else 0)
        monkeypatch.setattr(native, "KIND", None)
        for result, other in zip(results, [affine(x, weight, bias, add), gated(x, weight, bias)], strict=True):
            assert result.shape == other.shape
            nearly(result, other, 2e-6)


@there
@pytest.mark.parametrize(
    ("inputs", "outputs", "side", "dtype", "taken"),
    [
        (32, 48, 32, torch.float32, True), (32, 40, 32, torch.float32, False), (24, 32, 32, torch.float32, False),
        (16, 32, 32, torch.float32, False), (32, 5, 32, torch.float32, True), (256, 5, 32, torch.float32, False),
        (32, 48, 31, torch.float32, False), (32, 48, 32, torch.bfloat16, "amx" not in native.BFLOAT16),
        (32, 48, 32, torch.float64, False), (256, 32, 16, torch.float32, False),
        (256, 32, 16, torch.bfloat16, native.KIND == "avx512_bf16"),
    ],
)  # fmt: skip
def test_layers_take_it_where_it_pays(inputs, outputs, side, dtype, taken, monkeypatch):
    called = []
    convolve = native.convolve
    monkeypatch.setattr(native, "convolve", lambda *given, **named: called.append(given) or convolve(*given, **named))
    layer = FrameConv(inputs, outputs, 3, padding=1).to(dtype)
    x = clip_of(1, inputs, 2, side, side).to(dtype)
    with torch.no_grad():
        layer(x)
    assert bool(called) == taken
    if taken:
        called.clear()
        layer(x).sum().backward()
        assert not called


def test_the_law_holds_for_the_bundled_model_in_float32():
    """Blocks computed in order, and each alone from nothing, last first: the same bits, propagation and all."""
    models, chosen = choose({"device": "cpu", "dtype": "float32", "threads": 2}, 32, 24)
    torch.manual_seed(0)
    sources = dict(enumerate(torch.rand(30, 3, 24, 32) * 2 - 1))
    shots = Shots(len(sources))

    def engine():
        made = Engine(Networks(models, chosen), Store(1 << 30))
        return lambda block: made.run(block, shots, sources)

    linear = engine()
    inline = [linear(block) for block in range(5)]
    for block in reversed(range(5)):
        alone = engine()(block)
        assert alone.keys() == inline[block].keys()
        assert all(torch.equal(picture, inline[block][n]) for n, picture in alone.items())


def test_the_bundled_networks_give_the_same_with_it_and_without(monkeypatch):
    models = load(locate(None), torch.float32, torch.float32)
    torch.manual_seed(0)
    x, low = torch.randn(1, 5, 8, 48, 64), torch.rand(1, 3, 8, 48, 64) * 2 - 1
    with torch.inference_mode():
        text = models.text.encode("")[None]

        def results():
            v = models.unet(x, 500, low, text, 20)
            return v, models.video_vae.decode(x[:, :, :3], low[:, :, :3], torch.tensor([20]))

        with_it = results()
        monkeypatch.setattr(native, "KIND", None)
        for a, b in zip(with_it, results(), strict=True):
            assert (a - b).abs().max() < 1e-3 * b.abs().max()
            assert (a - b).square().mean() < 1e-9 * b.square().mean()
