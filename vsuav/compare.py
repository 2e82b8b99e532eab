"""Input, the input enlarged by bicubic, and the result, to look at: a PNG, a page with a slider, or a video."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import vapoursynth as vs
from PIL import Image, ImageDraw

from vsuav.parts import MediaError, check_target, complete
from vsuav.video import Video, Writer, open_video, ten_bit

VIDEOS, PAGES = (".mkv", ".mp4", ".mov"), (".html", ".htm")
Crop = tuple[int, int, int, int]
NAMES = ("input", "bicubic", "restored")
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ background: #222; color: #ddd; font: 15px sans-serif; margin: 1em }}
.pair {{ position: relative; display: inline-block; line-height: 0; overflow: hidden }}
.fit .pair, .fit .pair img {{ max-width: 100% }}
.pair .over {{ position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--at, 50%)) 0 0) }}
.pair .line {{ position: absolute; top: 0; bottom: 0; left: var(--at, 50%); width: 2px; margin-left: -1px }}
.pair .line::after {{ content: "\\2194"; position: absolute; top: 50%; left: 1px; width: 28px; margin: -14px;
  border-radius: 50%; color: #222; font: 20px/28px sans-serif; text-align: center }}
.pair .line, .pair .line::after {{ background: #fff }}
.pair input {{ position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize;
  appearance: none }}
.pair input::-webkit-slider-thumb {{ appearance: none; width: 1px }}
.pair input::-moz-range-thumb {{ width: 1px; border: 0 }}
.pair:focus-within .line, .pair:focus-within .line::after {{ background: #fc3 }}
.name {{ position: absolute; top: 0; left: 0; padding: 4px 7px; background: #000a; line-height: normal }}
.name.right {{ left: auto; right: 0 }}
.pixels .over.bicubic, .over.pixel, .pixels .name.bicubic, .name.pixel {{ visibility: hidden }}
.pixels .over.pixel, .pixels .name.pixel {{ visibility: visible }}
</style>
<body class="fit"><h1>{title}</h1>
<p>Left of the line: <label><input type="radio" name="left" checked onchange="set('pixels', false)"> the input by
bicubic</label> <label><input type="radio" name="left" onchange="set('pixels', true)"> the input's pixels</label>.
Right of it: restored. <label><input type="checkbox" id="fit" checked onchange="set('fit', this.checked)"> as wide as
the window at most</label> (off: a pixel is a pixel). Move the line with the mouse or, after a click, the arrow keys.
</p>
{sections}
<script>
function set(name, on) {{ document.body.classList.toggle(name, on) }}
for (const slider of document.querySelectorAll(".pair input"))
  slider.addEventListener("input", () => slider.parentNode.style.setProperty("--at", slider.value + "%"))
</script></body></html>
"""
SECTION = """<h2>frame {n}, {time:.2f} s</h2>
<div class="pair"><img src="{restored}" alt="frame {n}, restored">
<img class="over bicubic" src="{bicubic}" alt="frame {n}, input by bicubic">
<img class="over pixel" src="{input}" alt="frame {n}, input">
<span class="name bicubic">input, bicubic</span><span class="name pixel">input</span>
<span class="name right">restored</span><div class="line"></div>
<input type="range" min="0" max="100" step="0.1" value="50" autocomplete="off"
 aria-label="where the line is in frame {n}"></div>
"""


@dataclass(frozen=True)
class Pair:
    """An input and its restored version, which begins at the input's frame `offset`."""

    source: Video
    result: Video
    offset: int

    def pictures(self, n: int, crop: Crop | None) -> tuple[np.ndarray, ...]:
        """Frame n of the result as input (its pixels), bicubic and restored: "h w 3", 8 bits."""
        width, height = self.result.clip.width, self.result.clip.height
        before, after = self.source.clip[n + self.offset], self.result.clip[n]
        clips = (
            before.resize.Bicubic(format=vs.RGB24).resize.Point(width, height),
            before.resize.Bicubic(width, height, format=vs.RGB24),
            after.resize.Bicubic(format=vs.RGB24),
        )
        pictures = (np.dstack([np.asarray(plane) for plane in clip.get_frame(0)]) for clip in clips)
        left, top, w, h = crop or (0, 0, width, height)
        return tuple(picture[top : top + h, left : left + w] for picture in pictures)

    def check_crop(self, crop: Crop | None) -> None:
        """Raise MediaError for a crop that leaves the frame."""
        width, height = self.result.clip.width, self.result.clip.height
        if crop is None:
            return
        left, top, w, h = crop
        if min(left, top) < 0 or min(w, h) < 1 or left + w > width or top + h > height:
            raise MediaError(f"--crop is left,top,width,height inside {width}x{height}, got {crop}")


def open_pair(source: Path, result: Path, start: float | None) -> Pair:
    """Open both files; `start` is the time of the input at which the result begins."""
    before, after = open_video(source), open_video(result)
    offset = before.between(start, None).start
    frames = before.clip.num_frames - offset
    if after.clip.num_frames > frames:
        raise MediaError(f"{result} has {after.clip.num_frames} frames, but {source} only {frames} from there")
    return Pair(before, after, offset)


def spread(count: int, frames: int) -> list[int]:
    """`count` frame numbers spread evenly over a clip, not at its ends."""
    count = min(count, frames)
    return [frames * (2 * i + 1) // (2 * count) for i in range(count)]


def write_png(pair: Pair, target: Path, numbers: Sequence[int], crop: Crop | None) -> None:
    """One row a frame: input, bicubic, restored, each under its name."""
    rows = []
    for n in numbers:
        named = zip(pair.pictures(n, crop), NAMES, strict=True)
        rows.append(np.hstack([_named(picture, name) for picture, name in named]))
    with complete(target) as part:
        Image.fromarray(np.vstack(rows)).save(part, format="PNG")


def write_page(pair: Pair, target: Path, numbers: Sequence[int], crop: Crop | None) -> None:
    """A page of its own, one slider a frame, with the pictures inside it."""
    sections = []
    for n in numbers:
        pictures = {name: _inline(picture) for name, picture in zip(NAMES, pair.pictures(n, crop), strict=True)}
        sections.append(SECTION.format(n=n, time=float(pair.result.time(n)), **pictures))
    page = PAGE.format(title=html.escape(pair.result.path.name), sections="\n".join(sections))
    with complete(target) as part:
        part.write_text(page, encoding="utf-8")


def write_video(pair: Pair, target: Path, progress: Callable[[int, int], None]) -> None:
    """The input by bicubic on the left, the result on the right, with the result's sound."""
    after = ten_bit(pair.result.clip)
    said = after.get_frame(0).props
    written = {"matrix": "_Matrix", "range": "_Range", "chromaloc": "_ChromaLocation"}
    before = ten_bit(pair.source.clip)[pair.offset :][: after.num_frames]
    before = before.resize.Bicubic(
        after.width, after.height, format=after.format.id,
        **{name: said[key] for name, key in written.items() if key in said},
    )  # fmt: skip
    both = vs.core.std.StackHorizontal([before, after]).std.CopyFrameProps(after)
    writer = Writer(both, pair.result, range(both.num_frames), target, shape=pair.result.pixel_shape)
    with writer:
        for n, frame in enumerate(both.frames(close=True)):
            writer.write(n, frame)
            progress(n + 1, both.num_frames)


def compare(
    source: Path,
    result: Path,
    target: Path,
    start: float | None = None,
    numbers: Sequence[int] = (),
    crop: Crop | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a comparison; the suffix of `target` decides which: .png, .html, or a container of video.

    Args:
        start: time of the input at which the result begins, in seconds.
        numbers: frames of the result; () is the middle one for a PNG and five for a page.
        crop: (left, top, width, height) in pixels of the result.
        overwrite: replace `target` if it exists.

    Raises:
        MediaError: one line that says what is wrong and what would work.
    """
    source, result, target = source.resolve(), result.resolve(), target.resolve()
    check_target(target, {"INPUT": source, "RESULT": result}, (".png", *PAGES, *VIDEOS), overwrite)
    pair = open_pair(source, result, start)
    pair.check_crop(crop)
    frames = pair.result.clip.num_frames
    for n in numbers:
        if not 0 <= n < frames:
            raise MediaError(f"--frame must be between 0 and {frames - 1}, got {n}")
    suffix = target.suffix.lower()
    if suffix == ".png":
        write_png(pair, target, numbers or spread(1, frames), crop)
    elif suffix in PAGES:
        write_page(pair, target, numbers or spread(5, frames), crop)
    elif numbers or crop:
        raise MediaError("--frame and --crop are for .png and .html")
    else:
        write_video(pair, target, progress)


def _named(picture: np.ndarray, name: str) -> np.ndarray:
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, draw.textlength(name) + 7, 15), fill=(0, 0, 0))
    draw.text((4, 2), name, fill=(255, 255, 255))
    return np.asarray(image)


def _inline(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=96, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
