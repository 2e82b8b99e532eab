"""Makes the picture strips of docs/knobs.md: what each knob does to a crop of the sample clip.

    .venv/bin/python scripts/make_strips.py [NAME …]       into docs/pictures/, all strips or the named ones
"""

import sys
from collections.abc import Callable

import numpy as np
import vapoursynth as vs
from make_picture import CROP, FRAME, HERE, rgb
from PIL import Image, ImageDraw, ImageFont

from vsuav import upscale
from vsuav.video import open_video

FOLDER = HERE.parent / "docs" / "pictures"
PROMPTS = ["glass towers at night, sharp windows", "an oil painting", "fog"]


def sheet(panels: dict[str, Image.Image]) -> Image.Image:
    """Panels of one size side by side under their captions."""
    width, height = next(iter(panels.values())).size
    result = Image.new("RGB", ((width + 6) * len(panels) - 6, height + 24), "white")
    draw = ImageDraw.Draw(result)
    for i, (caption, panel) in enumerate(panels.items()):
        result.paste(panel, (i * (width + 6), 24))
        draw.text((i * (width + 6) + 3, 3), caption, fill="black", font=ImageFont.load_default(size=15))
    return result


def crop_of(source: vs.VideoNode, **settings) -> Image.Image:
    """The middle of the README's crop, restored with these settings."""
    left, top, width, height = CROP
    area = (left + width // 4, top + height // 4, width // 2, height // 2)
    return rgb(upscale(source, **settings), tuple(4 * side for side in area))


def profile_of(clip: vs.VideoNode) -> Image.Image:
    """One column of pixels over time, twice as wide: steady detail gives smooth lines, flicker gives noise."""
    clip = vs.core.resize.Bicubic(clip, format=vs.RGB24)
    column = 4 * (CROP[0] + CROP[2] // 2)
    frames = [
        np.dstack([np.asarray(frame[plane])[:, column] for plane in range(3)])[0] for frame in clip.frames(close=True)
    ]
    picture = Image.fromarray(np.stack(frames, 1))
    return picture.resize((4 * picture.width, picture.height), Image.Resampling.NEAREST)


def propagation(source: vs.VideoNode) -> dict[str, Image.Image]:
    """The column over time: bicubic, without and with propagation."""
    off, on = upscale(source, propagation_steps=[]), upscale(source, propagation_steps=[1])
    enlarged = vs.core.resize.Bicubic(source, off.width, off.height)
    return {
        "bicubic": profile_of(enlarged), "no propagation": profile_of(off), "propagation_steps=[1]": profile_of(on)
    }  # fmt: skip


STRIPS: dict[str, Callable[[vs.VideoNode], dict[str, Image.Image]]] = {
    "noise-level": lambda c: {f"noise_level={n}": crop_of(c, noise_level=n) for n in (0, 30, 60, 120, 200)},
    "steps": lambda c: {
        f"steps={n}": crop_of(c, steps=n, solver="ddim", propagation_steps=[]) for n in (1, 2, 3, 6, 12)
    },
    "guidance": lambda c: {
        f"guidance_scale={g}": crop_of(c, guidance_scale=g, prompt=PROMPTS[0]) for g in (1.0, 2.0, 4.0, 8.0)
    },
    "prompts": lambda c: {text: crop_of(c, prompt=text, guidance_scale=4.0) for text in ("", *PROMPTS)},
    "color-fix": lambda c: {name: crop_of(c, color_fix=name) for name in ("none", "adain", "wavelet")},
    "propagation": propagation,
}


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    source = open_video(HERE / "sample" / "city.mp4").clip
    for name in names or STRIPS:
        print(f"{name} (frame {FRAME})", file=sys.stderr, flush=True)
        sheet(STRIPS[name](source)).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
