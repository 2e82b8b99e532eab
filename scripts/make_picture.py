"""Makes what the README opens with, out of the sample clip: a picture of one frame and a short moving one.

    .venv/bin/python scripts/make_picture.py [FOLDER]       picture.png and clip.webp, into docs/ unless said otherwise

The picture shows a crop as it is, enlarged by bicubic, and restored. The clip has bicubic on the left, restored on the
right.
"""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import vapoursynth as vs
from PIL import Image, ImageDraw, ImageFont

from vsuav import upscale
from vsuav.video import open_video

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "sample" / "city.mp4"
FRAME = 24
CROP = (80, 16, 96, 72)
"""Left, top, width, height in input pixels."""
BAND = 28
"""Height of the captions, in pixels."""
LARGEST = 1_400_000
"""Bytes of the moving picture."""


def pictures(clip: vs.VideoNode, frames: Sequence[int], area: tuple[int, int, int, int]) -> list[Image.Image]:
    """An area (left, top, width, height) of some frames."""
    left, top, width, height = area
    shown = clip.resize.Bicubic(format=vs.RGB24).std.CropAbs(width, height, left, top)
    return [Image.fromarray(np.dstack([np.asarray(plane) for plane in shown.get_frame(n)])) for n in frames]


def sheet(panels: dict[str, Image.Image], columns: int | None = None, band: int = BAND) -> Image.Image:
    """Panels of one size under their captions, in rows of `columns` (None: one row)."""
    gap, columns = 8, columns or len(panels)
    width, height = next(iter(panels.values())).size
    rows = -(-len(panels) // columns)
    result = Image.new("RGB", ((width + gap) * columns - gap, (height + band + gap) * rows - gap), "white")
    draw, font = ImageDraw.Draw(result), ImageFont.load_default(size=round(0.6 * band))
    for i, (caption, panel) in enumerate(panels.items()):
        left, top = i % columns * (width + gap), i // columns * (height + band + gap)
        result.paste(panel, (left, top + band))
        draw.text((left + 4, top + band // 7), caption, fill="black", font=font)
    return result


def animation(frames: Sequence[Image.Image], milliseconds: int) -> bytes:
    """An endless WebP, of the best quality that stays below `LARGEST`."""
    for quality in (90, 80, 70, 60, 50, 40, 30):
        buffer = io.BytesIO()
        first, *others = frames
        kind = {"format": "WEBP", "save_all": True, "loop": 0, "method": 4}
        first.save(buffer, append_images=others, duration=milliseconds, quality=quality, **kind)
        if buffer.tell() <= LARGEST:
            break
    return buffer.getvalue()


def main(folder: Path) -> None:
    source = open_video(SAMPLE).clip
    restored = upscale(source)
    enlarged = source.resize.Bicubic(restored.width, restored.height)
    area = tuple(4 * side for side in CROP)
    every = range(source.num_frames)
    after, before = pictures(restored, every, area), pictures(enlarged, every, area)
    panels = {
        "input": pictures(source, [FRAME], CROP)[0].resize(area[2:], Image.Resampling.NEAREST),
        "bicubic": before[FRAME],
        "vsuav, bundled model on a CPU": after[FRAME],
    }
    sheet(panels).save(folder / "picture.png", optimize=True)
    captions = ("input, enlarged by bicubic", "vsuav, bundled model")
    moving = [sheet(dict(zip(captions, pair, strict=True))) for pair in zip(before, after, strict=True)]
    (folder / "clip.webp").write_bytes(animation(moving, round(1000 / source.fps)))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "docs")
