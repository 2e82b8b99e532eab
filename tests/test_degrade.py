"""The degradation: seeded, the right size, never better than the clean reduction, real codecs inside."""

import av
import cv2
import numpy as np
import pytest
from degrade import Drift, Recipe, Round, degrade, draw, encode, read_video, reduce, write_video
from PIL import Image

NONE = Drift(0, 0)


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """A textured square over a gradient, moving one pixel a frame: "5 64 96 3"."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    frames = np.tile(np.linspace(40, 200, 96)[None, None, :, None], (5, 64, 1, 3)).astype(np.uint8)
    for i, frame in enumerate(frames):
        frame[20:44, 30 + i : 54 + i] = texture
    return frames


def plain(**changes) -> Recipe:
    values = {
        "blur_x": NONE, "blur_y": NONE, "angle": 0.0, "size": Drift(1, 1), "filter": cv2.INTER_AREA, "noise": NONE,
        "poisson": False, "gray": False, "jpeg": None,
    }  # fmt: skip
    return Recipe([Round(**{**values, **changes})])


@pytest.mark.parametrize("seed", range(12))
def test_the_same_seed_gives_the_same_pixels(clip, seed):
    first, again = (degrade(clip, np.random.default_rng(seed)) for _ in range(2))
    assert first.shape == (5, 16, 24, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)


def test_seeds_differ(clip):
    results = {degrade(clip, np.random.default_rng(seed)).tobytes() for seed in range(8)}
    assert len(results) == 8


def test_a_single_frame_is_a_clip_of_one(clip):
    assert degrade(clip[:1], np.random.default_rng(3)).shape == (1, 16, 24, 3)


def test_area_reduction_is_the_mean_of_every_block(clip):
    low = degrade(clip, np.random.default_rng(0), recipe=plain())
    means = clip.reshape(5, 16, 4, 24, 4, 3).astype(float).mean(axis=(2, 4))
    assert np.abs(low - means).max() <= 0.51


def test_bicubic_reduction_is_pillows(clip):
    ours = reduce(clip[0].astype(np.float32), (24, 16), cv2.INTER_CUBIC)
    pillow = np.asarray(Image.fromarray(clip[0]).resize((24, 16), Image.Resampling.BICUBIC))
    assert np.abs(np.clip(ours, 0, 255) - pillow).max() <= 1.01


def test_noise_has_the_level_asked_for():
    gray = np.full((1, 256, 256, 3), 128, np.uint8)
    for poisson in (False, True):
        low = degrade(gray, np.random.default_rng(1), recipe=plain(noise=Drift(8, 8), poisson=poisson))
        assert low.std() == pytest.approx(8, rel=0.05)


def test_a_parameter_drifts_over_the_clip():
    gray = np.full((5, 128, 128, 3), 128, np.uint8)
    low = degrade(gray, np.random.default_rng(1), recipe=plain(noise=Drift(2, 10)))
    assert low[0].std() == pytest.approx(2, rel=0.15) and low[-1].std() == pytest.approx(10, rel=0.15)
    assert low[0].std() < low[2].std() < low[-1].std()


@pytest.mark.parametrize("codec, good, bad", [("libx264", 18, 45), ("mpeg4", 2, 28)])
def test_a_worse_rate_is_worse(clip, codec, good, bad):
    errors = [np.square(encode(clip, codec, rate).astype(float) - clip).mean() for rate in (good, bad)]
    assert 0 < errors[0] < errors[1] / 1.5


def test_strength_zero_only_reduces():
    for seed in range(5):
        recipe = draw(np.random.default_rng(seed), 0.0)
        assert recipe.codec is None and len(recipe.rounds) == 1
        assert recipe.rounds[0].noise.start == 0 and recipe.rounds[0].jpeg is None


def test_sizes_that_do_not_divide_are_refused(clip):
    with pytest.raises(ValueError, match="multiples of 4, got 95x64"):
        degrade(clip[:, :, :95], np.random.default_rng(0))


def test_what_is_written_comes_back(clip, tmp_path):
    write_video(tmp_path / "clip.mkv", clip, 24)
    frames, rate = read_video(tmp_path / "clip.mkv")
    np.testing.assert_array_equal(frames, clip)
    assert rate == 24
    with av.open(str(tmp_path / "clip.mkv")) as container:
        assert container.streams.video[0].codec_context.name == "ffv1"
