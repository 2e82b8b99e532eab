"""The degradation: seeded, the right size, never better than the clean reduction, real codecs inside."""

import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import vapoursynth as vs
from degrade import EXACT, Drift, Recipe, Round, as_rgb, degrade, draw, encode, read_video, reduce, write_video
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
    gray = clip.astype(float).mean(-1)  # half of the colour is lost at any rate
    errors = [np.square(encode(clip, codec, rate).mean(-1) - gray).mean() for rate in (good, bad)]
    assert 0 < errors[0] < errors[1] / 1.5


@pytest.mark.parametrize("codec, rate", [("libx264", 18), ("mpeg4", 2)])
def test_a_codec_darkens_nothing(clip, codec, rate):
    """FFmpeg's fast way to RGB rounds down: a level of luma on the way of every clip."""
    for channel, change in enumerate((encode(clip, codec, rate).astype(float) - clip).mean(axis=(0, 1, 2))):
        assert abs(change) < 0.35, channel


def test_h264_is_what_its_plain_code_makes_of_a_clip(clip):
    """x264's machine code has shortcuts that give other pixels on other CPUs; its plain code has none."""
    frames, buffer = clip.repeat(3, axis=0), io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=25, options={
            "crf": "24", "preset": "veryfast", "x264-params": "log-level=none:asm=0:threads=1"
        })  # fmt: skip
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for image in frames:
            picture = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p", interpolation=EXACT)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer) as container:
        plainly = [as_rgb(image) for image in container.decode(video=0)]
    np.testing.assert_array_equal(encode(frames, "libx264", 24), plainly)


FORMATS = {
    "yuv420p": vs.YUV420P8, "yuv422p": vs.YUV422P8, "yuv444p": vs.YUV444P8, "yuv420p10le": vs.YUV420P10,
    "yuv422p12le": vs.YUV422P12, "gbrp": vs.RGB24, "gbrp10le": vs.RGB30, "gbrp16le": vs.RGB48,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_decoded_frame_is_what_vapoursynth_makes_of_it(name):
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3)).astype(np.float32)
    soft = cv2.resize(noise, (128, 96), interpolation=cv2.INTER_CUBIC).clip(0, 255).round().astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(soft, format="rgb24").reformat(format=name)
    format = vs.core.get_video_format(FORMATS[name])

    def fill(n, f):
        filled = f.copy()
        order = (2, 0, 1) if format.color_family == vs.RGB else (0, 1, 2)
        for place, number in enumerate(order):
            plane = frame.planes[number]
            data = np.frombuffer(plane, np.uint8 if format.bytes_per_sample == 1 else np.uint16)
            np.copyto(np.asarray(filled[place]), data.reshape(plane.height, -1)[:, : plane.width])
        return filled

    blank = vs.core.std.BlankClip(format=format.id, width=128, height=96, length=1)
    options = {} if format.color_family == vs.RGB else {"matrix_in": 6, "range_in": 0}
    wanted = blank.std.ModifyFrame(blank, fill).resize.Bicubic(format=vs.RGB24, **options).get_frame(0)
    error = as_rgb(frame).astype(float) - np.stack([np.asarray(wanted[plane]) for plane in range(3)], -1)
    assert np.abs(error.mean(axis=(0, 1))).max() < 0.2
    assert np.sqrt(np.square(error @ [0.299, 0.587, 0.114]).mean()) < 0.5  # colours may differ a little more


def command(tmp_path, *words) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[1] / "scripts" / "degrade.py"
    return subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True, check=False)


def test_the_command_makes_a_quarter_that_fits(tmp_path, clip):
    write_video(tmp_path / "in.mkv", clip[:2, :60, :92], Fraction(25))
    done = command(tmp_path, "in.mkv", "out.mkv")
    assert done.returncode == 0, done.stderr
    assert read_video(tmp_path / "out.mkv")[0].shape == (2, 15, 23, 3) and "is taken" not in done.stderr
    done = command(tmp_path, "in.mkv", "out.mkv", "--scale", "7")
    assert "degrade: the upper left 91x56 of 92x60 is taken" in done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["absent.mkv", "out.mkv"], "absent.mkv cannot be read as a video"),
        (["text.mkv", "out.mkv"], "text.mkv cannot be read as a video"),
        (["text.mkv", "no/out.mkv"], "the folder of no/out.mkv does not exist"),
        (["text.mkv", "out.mkv", "--seed", "-1"], "--scale must be at least 1 and --seed at least 0, got 4 and -1"),
        (["text.mkv", "out.mkv", "--scale", "0"], "--scale must be at least 1 and --seed at least 0, got 0 and 0"),
    ],
)
def test_what_cannot_be_degraded_is_one_line(tmp_path, words, line):
    (tmp_path / "text.mkv").write_text("no video")
    done = command(tmp_path, *words)
    assert done.returncode == 2 and line in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


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
