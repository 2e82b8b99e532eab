"""Makes the picture at the top of the README: a crop of the sample clip, as it is, by bicubic, and restored.

    .venv/bin/python scripts/make_picture.py [docs/picture.png]
"""

import sys
from pathlib import Path

import numpy as np
import vapoursynth as vs
from PIL import Image, ImageDraw, ImageFont

from vsuav import upscale
from vsuav.video import open_video

HERE = Path(__file__).resolve().parent
FRAME = 24
CROP = (80, 16, 96, 72)
"""Left, top, width, height in input pixels."""
BAND = 28
"""Height of the captions, in pixels."""


def rgb(clip: vs.VideoNode, crop: tuple[int, int, int, int]) -> Image.Image:
    """The crop of the frame as a picture."""
    left, top, width, height = crop
    frame = vs.core.resize.Bicubic(clip, format=vs.RGB24).get_frame(FRAME)
    planes = [np.asarray(frame[plane])[top : top + height, left : left + width] for plane in range(3)]
    return Image.fromarray(np.dstack(planes))


def main(target: Path) -> None:
    source = open_video(HERE / "sample" / "city.mp4").clip
    restored = upscale(source)
    four = tuple(4 * side for side in CROP)
    panels = {
        "input": rgb(source, CROP).resize((4 * CROP[2], 4 * CROP[3]), Image.Resampling.NEAREST),
        "bicubic": rgb(vs.core.resize.Bicubic(source, restored.width, restored.height), four),
        "vsuav, bundled model on a CPU": rgb(restored, four),
    }
    width, height = four[2], four[3]
    sheet = Image.new("RGB", (width * len(panels) + 8 * (len(panels) - 1), height + BAND), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, panel) in enumerate(panels.items()):
        sheet.paste(panel, (i * (width + 8), BAND))
        draw.text((i * (width + 8) + 4, 4), caption, fill="black", font=ImageFont.load_default(size=17))
    sheet.save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "docs" / "picture.png")
