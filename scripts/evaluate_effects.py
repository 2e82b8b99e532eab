"""What single knobs of the model do: parts switched off over several seeds, prompts, the noise level."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from evaluate_clips import Clip, say
from evaluate_rows import OURS, Ours
from evaluate_tables import COLUMNS, Clips, Numbers, average, grid
from torch import Tensor

from vsuav.metrics import high_frequency_energy, luma
from vsuav.weights import ModelError

ABLATION = {
    "default": None,
    "without temporal layers": ("default", "e_warp_dis", 1),
    "without propagation": ("default", "e_warp_dis", 1),
    "without degrain": ("default", "e_warp_dis", 1),
    "image VAE": ("default", "stlpips_vgg", 1),
    "guidance off": None,
    "guidance 3": ("guidance off", "high_frequency", 1),
    "latents zeroed": ("default", "stlpips_vgg", 1),
    "1 step": ("default", "stlpips_vgg", 1),
    "2 steps": ("1 step", "stlpips_vgg", -1),
    "4 steps": ("2 steps", "stlpips_vgg", -1),
    "8 steps": ("4 steps", "stlpips_vgg", -1),
}
"""Row -> what it is held against, the number that moves, and where to: 1 is up."""

LEVELS = (0, 20, 60, 120, 200)
NEGATIVE = "blur, worst quality"


def sharpness(images: Tensor) -> float:
    """Mean absolute difference of neighbouring luma values of "n 3 h w", in 8-bit levels."""
    y = luma(images)
    return ((y.diff(dim=-1).abs().mean() + y.diff(dim=-2).abs().mean()) / 2).item()


def chroma(images: Tensor) -> float:
    """Mean distance from grey of "n 3 h w" in the plane of (Cb, Cr), in 8-bit levels."""
    red, green, blue = images.double().unbind(1)
    cb = -0.168736 * red - 0.331264 * green + 0.5 * blue
    cr = 0.5 * red - 0.418688 * green - 0.081312 * blue
    return 255 * (cb.square() + cr.square()).sqrt().mean().item()


TEXT = {
    "film grain": ({"prompt": "film grain"}, "high-frequency energy", high_frequency_energy, 1),
    "film grain, guidance 2": (
        {"prompt": "film grain", "negative_prompt": "", "guidance_scale": 2.0}, "high-frequency energy",
        high_frequency_energy, 1
    ),
    "black and white": ({"prompt": "black and white"}, "chroma", chroma, -1),
    "blur": ({"prompt": "blur"}, "sharpness", sharpness, -1),
} | {
    f"negative {NEGATIVE!r}, guidance {scale}": (
        {"prompt": "", "negative_prompt": NEGATIVE, "guidance_scale": float(scale)}, "sharpness", sharpness, 1
    )
    for scale in (2, 4, 6)
}  # fmt: skip
"""Row -> parameters, what is measured, how, and where it is to move. The others' prompt is "" without guidance."""


def ablation(ours: Ours, clips: Sequence[Clip], judge: Callable, seeds: int) -> dict[str, dict[str, Clips]]:
    """Row -> seed -> clip -> numbers. Rows that come to the same settings are computed once."""
    memo: dict[tuple, tuple[Numbers, ...]] = {}
    results: dict[str, dict[str, Clips]] = {}
    for seed in range(seeds):
        for row in ABLATION:
            given = OURS[row] | {"seed": seed}
            switches = tuple(given.get(name) for name in ("temporal", "zero", "alone"))
            try:
                key = (ours.settings(**given), switches)
                if key not in memo:
                    memo[key] = tuple(judge.timed(ours.row(**given), clip)[0] for clip in clips)
            except ValueError as error:
                if not seed:
                    say(f"row {row} left out: {error}")
                continue
            results.setdefault(row, {})[str(seed)] = {c.name: n for c, n in zip(clips, memo[key], strict=True)}
            say(f"ablation, seed {seed}: {row}")
    return results


def ablation_table(results: dict[str, dict[str, Clips]]) -> str:
    """Mean and standard deviation over seeds of the means over clips, and whether each moves where it should."""
    columns = ("psnr_y", "ssim", "stlpips_vgg", "e_warp_dis", "high_frequency")
    means = {row: {seed: average(clips) for seed, clips in seeds.items()} for row, seeds in results.items()}
    lines = []
    for row, seeds in means.items():
        line = [row]
        for column in columns:
            values = [numbers[column] for numbers in seeds.values() if column in numbers]
            digits = COLUMNS[column][1]
            line.append(f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}" if values else "–")
        wanted = ABLATION[row]
        if wanted and wanted[0] in means:
            base, column, sign = wanted
            changes = [
                numbers[column] - means[base][seed][column]
                for seed, numbers in seeds.items() if column in numbers and column in means[base].get(seed, {})
            ]  # fmt: skip
            right = sum(change * sign > 0 for change in changes)
            way = "up" if sign > 0 else "down"
            digits = COLUMNS[column][1] + 1
            line += [f"{COLUMNS[column][0]} {way} from {base}"]
            line += [f"{np.mean(changes):+.{digits}f}, {right} of {len(changes)} seeds" if changes else "–"]
        else:
            line += ["", ""]
        lines.append(line)
    return grid(["row", *(COLUMNS[c][0] for c in columns), "expected", "seen"], lines)


def single_frames(clips: Sequence[Clip], count: int = 20) -> list[Tensor]:
    """`count` input frames "1 3 h w", as many as can be of each clip, evenly spread."""
    clips = clips[:count]
    share = [count // len(clips) + (i < count % len(clips)) for i in range(len(clips))]
    return [
        clip.low[i][None] for clip, n in zip(clips, share, strict=True)
        for i in np.unique(np.linspace(0, len(clip.low) - 1, n + 1).round().astype(int)[:n])
    ]  # fmt: skip


def text(
    ours: Ours, frames: Sequence[Tensor], guidance: float | None
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Every prompt's effect on single frames, colours not put right; and its picture of the first frame.

    Args:
        guidance: for the prompts, against the prompt "" at the same; None = the model's own.
    """
    alone = {"alone": True, "color_fix": "none"}

    @functools.cache
    def restored(index: int, **given) -> Tensor:
        return ours.row(**given, **alone)(frames[index])

    results, pictures = [], {}
    own = {"guidance_scale": guidance, "negative_prompt": ""} if guidance else {}
    for name, (given, what, measure, sign) in TEXT.items():
        plain = {"prompt": "", "guidance_scale": 1.0} if "guidance_scale" in given else {"prompt": ""} | own
        given = given if "guidance_scale" in given else given | own
        try:
            ours.models.text.encode(given["prompt"])
            ours.models.text.encode(given.get("negative_prompt", ""))
        except ModelError as error:
            say(f"text row {name} left out: {error}")
            continue
        effects = []
        for i in range(len(frames)):
            before, after = measure(restored(i, **plain)), measure(restored(i, **given))
            effects.append((after - before) / before if before else 0.0)
        pictures |= {"prompt ''": restored(0, **plain)[0]} if not pictures else {}
        pictures[name] = restored(0, **given)[0]
        signed = [effect * sign for effect in effects]
        results.append({
            "prompt": name, "measure": what, "sign": sign, "frames": len(frames), "mean": float(np.mean(effects)),
            "right": sum(e > 0 for e in signed), "large": sum(e >= 0.1 for e in signed), "effects": effects,
            "met": sum(e >= 0.1 for e in signed) >= 0.8 * len(frames),
        })  # fmt: skip
        say(f"text: {name}")
    return results, pictures


def text_table(results: list[dict[str, Any]]) -> str:
    lines = [
        [
            r["prompt"], f"{r['measure']} {'up' if r['sign'] > 0 else 'down'}", f"{100 * r['mean']:+.1f} %",
            f"{r['right']} of {r['frames']}", f"{r['large']} of {r['frames']}", "yes" if r["met"] else "no",
        ]
        for r in results
    ]  # fmt: skip
    head = ["prompt", "expected", "mean effect", "right sign", "right and at least 10 %", "at least 80 % of them"]
    return grid(head, lines)


def noise_levels(ours: Ours, clips: Sequence[Clip], judge: Callable) -> dict[str, Clips]:
    """Level -> clip -> numbers."""
    results: dict[str, Clips] = {}
    for level in LEVELS:
        row = ours.row(noise_level=level)
        results[str(level)] = {clip.name: judge.timed(row, clip)[0] for clip in clips}
        say(f"noise level {level}")
    return results


def first_of(clip: Clip, side: int) -> Clip:
    """The middle of a clip's first frame, `side` pixels of the truth, for what is too slow for more."""
    low, truth = clip.low[:1], clip.truth[:1]
    height, width = (min(side // 4, length) for length in low.shape[-2:])
    y, x = (low.shape[-2] - height) // 2, (low.shape[-1] - width) // 2
    area = slice(y, y + height), slice(x, x + width)
    large = slice(4 * y, 4 * (y + height)), slice(4 * x, 4 * (x + width))
    return Clip(clip.name, "crops", low[(..., *area)].contiguous(), truth[(..., *large)].contiguous())
