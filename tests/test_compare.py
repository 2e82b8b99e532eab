"""The files that `vsuav compare` writes: colours of both halves, and what it refuses to replace."""

import numpy as np
import pytest
from media import av, ffmpeg, look

vs = pytest.importorskip("vapoursynth")
pytest.importorskip("PIL")
if not hasattr(vs.core, "bs"):
    pytest.skip("BestSource is not installed", allow_module_level=True)

from vsuav.compare import compare  # noqa: E402
from vsuav.parts import MediaError  # noqa: E402

ORANGE = ["-f", "lavfi", "-i", "color=0xC86432:s=32x24:r=25:d=0.12"]
LARGE = "scale=128:96:out_color_matrix=bt709:out_range=tv,format=yuv420p,setparams=colorspace=bt709:range=tv"


def halves(path):
    """The mean samples of each plane, left and right, as 8 bits."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    for side in (0, 1):
        means = []
        for plane, part in zip(frame.planes, frame.format.components, strict=True):
            samples = np.frombuffer(plane, np.uint16).reshape(plane.height, -1)[:, : plane.width]
            means.append(np.hsplit(samples, 2)[side][:, 4:-4].mean() / 2 ** (part.bits - 8))
        yield means


@pytest.mark.parametrize(
    "picture",
    [
        ["-vf", "scale=out_color_matrix=smpte170m,format=yuv420p,setparams=colorspace=smpte170m:range=tv"],
        ["-vf", "scale=out_color_matrix=smpte170m:out_range=pc,format=yuv420p,setparams=colorspace=smpte170m:range=pc"],
        ["-vf", "scale=out_color_matrix=smpte170m,format=yuv411p,setparams=colorspace=smpte170m:range=tv"],
        ["-pix_fmt", "yuvj420p", "-c:v", "mjpeg", "-q:v", "1"],
        ["-pix_fmt", "gbrp"],
    ],
    ids=["601", "full", "411", "jpeg", "rgb"],
)
def test_both_halves_of_a_video_have_the_same_colours(picture, tmp_path):
    """The same orange, in the result's matrix and range whatever the input's are."""
    source, result, both = (tmp_path / name for name in ("in.mkv", "large.mkv", "both.mkv"))
    ffmpeg(*ORANGE, "-c:v", "ffv1", *picture, source)
    ffmpeg(*ORANGE, "-vf", LARGE, "-c:v", "ffv1", result)
    compare(source, result, both)
    left, right = halves(both)
    assert np.allclose(left, right, atol=2)
    assert np.allclose(right, (116, 95, 173), atol=2)  # BT.709
    assert look(both)["colour"][0] == 1


@pytest.mark.parametrize("suffix", [".png", ".html", ".mkv"])
def test_a_result_of_rare_subsampling(suffix, tmp_path):
    ffmpeg(*ORANGE, "-c:v", "ffv1", "-pix_fmt", "yuv411p", tmp_path / "in.mkv")
    ffmpeg(*ORANGE, "-vf", "scale=128:96", "-c:v", "ffv1", "-pix_fmt", "yuv440p", tmp_path / "large.mkv")
    compare(tmp_path / "in.mkv", tmp_path / "large.mkv", tmp_path / f"both{suffix}")


def test_pixels_have_the_shape_that_the_result_s_container_says(tmp_path):
    ffmpeg(*ORANGE, "-c:v", "libx264", "-pix_fmt", "yuv420p", tmp_path / "in.mkv")
    ffmpeg("-i", tmp_path / "in.mkv", "-c", "copy", "-aspect", "16:9", tmp_path / "wide.mkv")
    compare(tmp_path / "in.mkv", tmp_path / "wide.mkv", tmp_path / "both.mkv")
    assert look(tmp_path / "both.mkv")["shape"] == look(tmp_path / "wide.mkv")["shape"] != 1


@pytest.mark.parametrize("target", ["in.mkv", "large.mkv", "link.mkv", "own.mkv"])
def test_what_is_there_is_not_replaced(target, tmp_path):
    """Neither INPUT nor RESULT ever, another file only where that is asked for."""
    ffmpeg(*ORANGE, "-c:v", "ffv1", tmp_path / "in.mkv")
    ffmpeg(*ORANGE, "-vf", LARGE, "-c:v", "ffv1", tmp_path / "large.mkv")
    (tmp_path / "link.mkv").symlink_to("large.mkv")
    (tmp_path / "own.mkv").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    given = tmp_path / "in.mkv", tmp_path / "large.mkv", tmp_path / target
    for overwrite in (False,) if target == "own.mkv" else (False, True):
        with pytest.raises(MediaError, match="exists already; --overwrite" if target == "own.mkv" else "the same file"):
            compare(*given, overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    if target == "own.mkv":
        compare(*given, overwrite=True)
        assert look(tmp_path / target)["size"] == (256, 96)
