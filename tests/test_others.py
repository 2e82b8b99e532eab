"""`upscale` between other people's functions: a function of a clip like any other."""

import functools

import numpy as np
import pytest
import toy
import vapoursynth as vs
import vsutil

from vsuav import upscale


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """`upscale` by the toy model, as a function of a clip alone."""
    return functools.partial(upscale, model=toy.write(tmp_path_factory.mktemp("model") / "toy"))


@pytest.fixture
def clip():
    ramp = vs.core.std.BlankClip(format=vs.YUV420P8, width=36, height=28, length=7, color=[90, 120, 140])
    return ramp.std.SetFrameProps(_Matrix=6, _Range=vs.RANGE_LIMITED).std.Expr(["x 7 +", "x 3 +", ""])


def planes(clip, n=3):
    return [np.asarray(plane) for plane in clip.get_frame(n)]


def test_luma_before_and_after(restored, clip):
    before, after = restored(vsutil.get_y(clip)), vsutil.get_y(restored(clip))
    assert before.format.id == after.format.id == vs.GRAY8
    assert (before.width, before.height) == (after.width, after.height) == (144, 112)
    assert before.get_frame(3).props["_Range"] == vs.RANGE_LIMITED
    assert np.array_equal(planes(after)[0], planes(restored(clip))[0])


def test_depth_around_it(restored, clip):
    deep = restored(vsutil.depth(clip, 16))
    assert deep.format.id == vs.YUV420P16 and vsutil.depth(deep, 8).format.id == vs.YUV420P8
    floating = restored(vsutil.depth(clip, 32))
    assert floating.format.sample_type == vs.FLOAT
    wanted = planes(floating)[0]  # no rounding, so the truth for both; limited range: 219 levels of luma
    assert np.abs((planes(deep)[0] / 256.0 - 16) / 219 - wanted).max() < 1 / 219
    assert np.abs((planes(restored(clip))[0] - 16.0) / 219 - wanted).max() < 3 / 219  # error diffusion


def test_iterated_and_piped(restored, clip):
    twice = vsutil.iterate(clip, functools.partial(restored, scale=2), 2)
    assert (twice.width, twice.height) == (4 * clip.width, 4 * clip.height)
    assert planes(twice)[0].shape == (112, 144)
    same = clip
    for function in (vs.core.std.FlipVertical, functools.partial(restored, scale=1), vs.core.std.FlipVertical):
        same = function(same)
    assert (same.width, same.height, same.format.id) == (clip.width, clip.height, clip.format.id)


def test_bound_methods_follow(restored, clip):
    result = restored(clip.std.Crop(left=4)).std.Crop(right=16).resize.Spline36(format=vs.RGB24, matrix_in=6)
    assert (result.width, result.height) == (4 * 32 - 16, 112)
    assert len(planes(result)) == 3


def test_planes_taken_apart_and_joined(restored, clip):
    parts = [restored(plane) for plane in vsutil.split(clip)]
    joined = vsutil.join(parts)
    assert joined.format.id == clip.format.id and planes(joined)[1].shape == (56, 72)


def test_a_frame_as_a_clip(restored, clip):
    """`frame2clip` makes its own frames: nothing but pixels and properties connects it with the source."""
    one = restored(vsutil.frame2clip(clip.get_frame(2)))
    assert one.num_frames == 1
    assert np.array_equal(planes(one, 0)[0], planes(restored(clip[2]), 0)[0])


def test_with_vs_jetpack(restored, clip):
    """Where vs-jetpack is installed: its helpers around `upscale`, and `upscale` as one of its scalers."""
    vstools = pytest.importorskip("vstools", reason="vs-jetpack is not installed")
    vsscale = pytest.importorskip("vsscale", reason="vs-jetpack is not installed")
    work = vstools.initialize_clip(clip, 16)
    result = restored(work)
    assert result.format.id == vs.YUV420P16
    assert vstools.finalize_clip(result).format.id == vs.YUV420P10
    assert restored(vstools.get_y(work)).format.id == vs.GRAY16
    assert vstools.iterate(work, functools.partial(restored, scale=2), 2).width == 4 * work.width
    scaler = vsscale.GenericScaler(lambda c, width, height, **_: restored(c, width=width, height=height))
    scaled = scaler.scale(work, 100, 80)
    assert (scaled.width, scaled.height) == (100, 80) and len(planes(scaled)) == 3
