"""The scripts that make the pictures of the documentation, apart from the restoring itself."""

import io
import re

import make_picture
import make_strips
import numpy as np
import pytest
import vapoursynth as vs
from PIL import Image


def plain(level: int, size=(20, 10)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def test_panels_lie_in_rows_under_their_captions():
    panels = {name: plain(level) for name, level in (("a", 40), ("b", 80), ("c", 120))}
    shown = np.asarray(make_picture.sheet(panels, columns=2, band=20))
    assert shown.shape == (2 * (20 + 10) + 8, 2 * 20 + 8, 3)
    for top, left, level in ((20, 0, 40), (20, 28, 80), (58, 0, 120)):
        assert (shown[top : top + 10, left : left + 20] == level).all()
    assert (shown[58:, 28:] == 255).all()
    assert shown[:20, :20].min() < 128  # the caption


def test_the_moving_picture_moves_and_stays_small(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    frames = [Image.fromarray(frame) for frame in noise]
    whole = make_picture.animation(frames, 40)
    shown = Image.open(io.BytesIO(whole))
    assert shown.format == "WEBP" and shown.n_frames == 6 and shown.info["loop"] == 0
    monkeypatch.setattr(make_picture, "LARGEST", len(whole) * 2 // 3)
    assert len(make_picture.animation(frames, 40)) <= len(whole) * 2 // 3


def test_an_area_of_a_frame():
    clip = vs.core.std.BlankClip(format=vs.RGB24, width=16, height=8, length=3, color=[10, 20, 30])
    clip = clip.std.AddBorders(left=4, color=[200, 0, 0])
    first, second = make_picture.pictures(clip, [0, 2], (2, 1, 6, 4))
    assert first.size == second.size == (6, 4)
    assert first.getpixel((0, 0)) == (200, 0, 0) and second.getpixel((5, 3)) == (10, 20, 30)


def test_the_page_has_a_picture_and_a_place_for_the_numbers_of_every_strip():
    page = make_strips.PAGE.read_text()
    assert set(re.findall(r"<!-- numbers: (.*?) -->", page)) == make_strips.STRIPS.keys()
    assert set(re.findall(r"\]\(pictures/(.*?)\.png\)", page)) == make_strips.STRIPS.keys()


def test_numbers_are_filled_in_where_they_belong():
    strip = make_strips.Strip({}, ("one", "two"), {"a": (1.0, 2.345), "b": (0.0, 10.0)})
    page = "x\n<!-- numbers: a -->\nold\n<!-- end -->\ny\n<!-- numbers: b -->\n<!-- end -->\n"
    once = make_strips.filled(page, "a", strip.table())
    assert "old" not in once and once.startswith("x\n") and once.endswith("y\n<!-- numbers: b -->\n<!-- end -->\n")
    assert "|  | one | two |\n| --- | --- | --- |\n| a | 1.00 | 2.35 |\n| b | 0.00 | 10.00 |" in once
    assert make_strips.filled(once, "a", strip.table()) == once
    with pytest.raises(ValueError, match="must mark one place for the numbers of c, found 0"):
        make_strips.filled(page, "c", "")


def test_a_strip_measures_its_panels(monkeypatch):
    """With a filter that enlarges and brightens, bicubic is the zero of all columns and the rest is known."""

    def brighter(clip, by):
        return clip.resize.Bicubic(4 * clip.width, 4 * clip.height).std.Expr(f"x {by} +")

    monkeypatch.setattr(make_strips, "upscale", brighter)
    source = vs.core.std.BlankClip(format=vs.RGB24, width=32, height=24, length=48, color=[90, 60, 30])
    strip = make_strips.variants({"by 5": {"by": 5}})(source.std.AddBorders(left=32, color=[40, 90, 90]))
    assert list(strip.panels) == ["bicubic", "by 5"] and strip.panels["by 5"].size == (256, 96)
    assert strip.rows["bicubic"][:2] == pytest.approx((0, 1))
    assert strip.rows["by 5"][0] == pytest.approx(5, abs=0.01)
    assert strip.rows["by 5"][2] == pytest.approx(5, abs=0.5)
