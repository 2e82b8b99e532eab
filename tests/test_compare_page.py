"""The page of `vsuav compare`, opened in a browser: the slider is moved and what is shown is looked at."""

import browser
import numpy as np
import pytest

pytest.importorskip("PIL")
from vsuav import compare  # noqa: E402

if browser.COMMAND is None:
    pytest.skip("no Chromium is installed (Debian: apt-get install chromium)", allow_module_level=True)

LEVELS = {"input": (200, 40, 40), "bicubic": (40, 160, 40), "restored": (60, 60, 220)}
WIDTH, HEIGHT = 640, 240


class Plain:
    """A pair whose three pictures are plain colours."""

    class result:  # noqa: N801
        path = type("Path", (), {"name": "new <1>.mkv"})
        time = staticmethod(lambda n: n / 25)

    @staticmethod
    def pictures(n, crop):
        return tuple(np.full((HEIGHT, WIDTH, 3), LEVELS[name], np.uint8) for name in compare.NAMES)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    target = folder / "page.html"
    compare.write_page(Plain(), target, [3, 40], None)
    with browser.opened(target, folder / "profile") as page:
        yield page


def box(page, selector):
    return page.script(f"(r => [r.left, r.top, r.width, r.height])(document.querySelector('{selector}')"
                       ".getBoundingClientRect())")  # fmt: skip


def shown(page, at):
    """The names of the pictures left and right of the line, which must be at this share of the first pair's width."""
    left, top, width, height = box(page, ".pair")
    row = page.picture()[round(top + 0.8 * height), round(left) : round(left + width)].astype(int)
    kinds = [min(LEVELS, key=lambda name: abs(pixel - LEVELS[name]).sum()) for pixel in row]
    line = round(at * width)
    assert len(set(kinds[: line - 3])) == 1 and len(set(kinds[line + 3 :])) == 1, "the line is elsewhere"
    return kinds[0], kinds[-1]


def test_the_line_follows_the_mouse_and_the_keys(page):
    assert page.script("document.title") == "new <1>.mkv"
    assert page.script("document.querySelectorAll('.pair').length") == 2
    left, top, width, height = box(page, ".pair")
    assert (width, height) == (WIDTH, HEIGHT)
    assert shown(page, 0.5) == ("bicubic", "restored")
    page.click(left + 0.2 * width, top + height / 2)
    assert shown(page, 0.2) == ("bicubic", "restored")
    page.click(left + 0.97 * width, top + height / 2)
    assert shown(page, 0.97) == ("bicubic", "restored")
    page.click(left + 0.4 * width, top + height / 2)
    for _ in range(50):
        page.press("ArrowRight", 39)
    assert shown(page, 0.45) == ("bicubic", "restored")
    assert page.script("getComputedStyle(document.querySelectorAll('.pair')[1]).getPropertyValue('--at')") == ""


def test_the_left_side_can_show_the_pixels(page):
    before = page.script("document.querySelector('.pair').style.getPropertyValue('--at')")
    at = float(before.rstrip("%") or 50) / 100
    left, top, width, height = box(page, "input[name=left]:not(:checked)")
    page.click(left + width / 2, top + height / 2)
    assert shown(page, at) == ("input", "restored")
    left, top, width, height = box(page, "input[name=left]:not(:checked)")
    page.click(left + width / 2, top + height / 2)
    assert shown(page, at) == ("bicubic", "restored")


def test_wide_pictures_fit_the_window_or_keep_their_pixels(page):
    page.do("Emulation.setDeviceMetricsOverride", width=400, height=600, deviceScaleFactor=1, mobile=False)
    assert box(page, ".pair")[2] < 400
    left, top, width, height = box(page, "#fit")
    page.click(left + width / 2, top + height / 2)
    assert box(page, ".pair")[2:] == [WIDTH, HEIGHT]
