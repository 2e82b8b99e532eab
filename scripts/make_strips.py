"""Makes the picture strips of docs/knobs.md and the numbers below them.

    .venv/bin/python scripts/make_strips.py [NAME …]       into docs/pictures/, all strips or the named ones

A strip shows what one knob does to a crop of the sample clip; everything else is the bundled model's default.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import vapoursynth as vs
from make_picture import FRAME, HERE, SAMPLE, pictures, sheet
from PIL import Image

from vsuav import upscale
from vsuav.flow import DIS
from vsuav.metrics import color_drift, high_frequency_energy, temporal_profile, warping_error
from vsuav.video import open_video

PAGE = HERE.parent / "docs" / "knobs.md"
AROUND = 7
"""Frames on each side of `FRAME` that strips of one frame restore with it."""
CROP = (96, 28, 64, 48)
"""What the strips restore and show of the clip: left, top, width, height in input pixels."""
PROMPT, LOOKS = "glass towers at night, sharp windows", ("", "blur", "film grain", "black and white")


@dataclass(frozen=True)
class Strip:
    """Panels under captions, and a table of numbers: one row a panel, its values under `columns`."""

    panels: dict[str, Image.Image]
    columns: tuple[str, ...]
    rows: dict[str, tuple[float, ...]]

    def table(self) -> str:
        lines = [("", *self.columns), ("---",) * (len(self.columns) + 1)]
        lines += [(name, *(f"{value:.2f}" for value in values)) for name, values in self.rows.items()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tensor(picture: Image.Image) -> torch.Tensor:
    """A picture as "3 h w" in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def frames_of(clip: vs.VideoNode) -> torch.Tensor:
    """All frames of a clip as "t 3 h w" in [0, 1]."""
    every = pictures(clip, range(clip.num_frames), (0, 0, clip.width, clip.height))
    return torch.stack([tensor(picture) for picture in every])


def variants(settings: dict[str, dict]) -> Callable[[vs.VideoNode], Strip]:
    """A strip of one frame: bicubic, then the restored frame with each of the named settings."""

    def make(source: vs.VideoNode) -> Strip:
        source = source[FRAME - AROUND : FRAME + AROUND]
        low = tensor(pictures(source, [AROUND], (0, 0, source.width, source.height))[0])
        enlarged = source.resize.Bicubic(4 * source.width, 4 * source.height)
        clips = {"bicubic": enlarged} | {name: upscale(source, **given) for name, given in settings.items()}
        area = (0, 0, enlarged.width, enlarged.height)
        panels = {name: pictures(clip, [AROUND], area)[0] for name, clip in clips.items()}
        plain = tensor(panels["bicubic"])
        rows = {}
        for name, panel in panels.items():
            shown = tensor(panel)
            rows[name] = (
                255 * (shown - plain).abs().mean().item(),
                high_frequency_energy(shown) / high_frequency_energy(plain),
                color_drift(shown, low),
            )
        return Strip(panels, ("difference from bicubic", "fine detail, bicubic = 1", "colour drift"), rows)

    return make


def over_time(settings: dict[str, dict], grain: float = 0.0) -> Callable[[vs.VideoNode], Strip]:
    """A strip of one column of pixels over time: bicubic, then the clip restored with each of the named settings.

    Args:
        grain: standard deviation of the noise that is added to the clip first, of 1. Flicker is measured along the flow
            of the clip without it.
    """

    def make(source: vs.VideoNode) -> Strip:
        size = 4 * source.width, 4 * source.height
        low = grainy(source, grain) if grain else source
        clips = {"bicubic": low.resize.Bicubic(*size)}
        clips |= {name: upscale(low, **given) for name, given in settings.items()}
        truth = frames_of(source.resize.Bicubic(*size))
        shown = {name: frames_of(clip) for name, clip in clips.items()}
        panels, rows = {}, {}
        for name, moving in shown.items():
            profile = (255 * temporal_profile(moving, moving.shape[-1] // 2)).round().byte().permute(1, 2, 0).numpy()
            picture = Image.fromarray(profile)
            panels[name] = picture.resize((5 * picture.width, picture.height), Image.Resampling.NEAREST)
            flicker = warping_error(moving, DIS(), truth)
            rows[name] = (flicker, high_frequency_energy(moving) / high_frequency_energy(shown["bicubic"]))
        return Strip(panels, ("flicker (warping error)", "fine detail, bicubic = 1"), rows)

    return make


def grainy(source: vs.VideoNode, grain: float) -> vs.VideoNode:
    """The clip as RGBS with Gaussian noise, the same at every call, each frame's its own."""
    clean = source.resize.Bicubic(format=vs.RGBS)

    def add(n: int, f: vs.VideoFrame) -> vs.VideoFrame:
        frame, noise = f.copy(), np.random.default_rng(n).normal(0, grain, (3, f.height, f.width))
        for plane in range(3):
            np.asarray(frame[plane])[:] += noise[plane]
        return frame

    return clean.std.ModifyFrame(clean, add)


STRIPS: dict[str, Callable[[vs.VideoNode], Strip]] = {
    "noise-level": variants({f"noise_level={n}": {"noise_level": n} for n in (0, 30, 60, 120, 200)}),
    "temperature": variants({f"temperature={t}": {"temperature": t} for t in (1.0, 0.5, 0.0)}),
    "steps": variants({f"steps={n}": {"steps": n, "propagation_steps": []} for n in (1, 2, 3, 5, 8)}),
    "guidance": variants(
        {f"guidance_scale={g}": {"guidance_scale": g, "prompt": PROMPT} for g in (1.0, 1.5, 2.0, 4.0, 8.0)}
    ),
    "prompts": variants({f'"{text}"': {"prompt": text, "color_fix": "none"} for text in LOOKS}),
    "color-fix": variants({f'color_fix="{name}"': {"color_fix": name} for name in ("none", "adain", "wavelet")}),
    "ensemble": variants({f"ensemble={n}": {"ensemble": n} for n in (1, 2, 4)}),
    "propagation": over_time(
        {"no propagation": {"steps": 2, "propagation_steps": []}}
        | {f"propagation_steps={steps}": {"steps": 2, "propagation_steps": steps} for steps in ([0], [1])}
    ),
    "degrain": over_time({f"degrain={weight}": {"degrain": weight} for weight in (0.0, 0.2, 1.0)}, grain=0.02),
}
COLUMNS = {"temperature": 2, "color-fix": 2, "ensemble": 2, "propagation": 4, "degrain": 4}
"""Panels in a row, 3 unless said otherwise."""


def filled(page: str, name: str, table: str) -> str:
    """The page with the table of the strip `name` between its marks. Raises ValueError if it has no such marks."""
    marks = rf"(<!-- numbers: {name} -->\n).*?(<!-- end -->)"
    page, count = re.subn(marks, lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{PAGE.name} must mark one place for the numbers of {name}, found {count}")
    return page


def main(names: list[str], page: Path = PAGE) -> None:
    folder = page.parent / "pictures"
    folder.mkdir(exist_ok=True)
    left, top, width, height = CROP
    source = open_video(SAMPLE).clip.std.CropAbs(width, height, left, top)
    for name in names or STRIPS:
        print(f"{name} (frame {FRAME})", file=sys.stderr, flush=True)
        strip = STRIPS[name](source)
        sheet(strip.panels, COLUMNS.get(name, 3), band=22).save(folder / f"{name}.png", optimize=True)
        page.write_text(filled(page.read_text(), name, strip.table()))


if __name__ == "__main__":
    main(sys.argv[1:])
