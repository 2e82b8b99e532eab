"""What was measured, as Markdown, as plots, as JSON, and held against what the model is meant to reach."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

Numbers = dict[str, float]
Clips = dict[str, Numbers]
COLUMNS = {
    "psnr_y": ("PSNR-Y", 2), "psnr_c": ("PSNR-C", 2), "ssim": ("SSIM", 4), "stlpips_vgg": ("stLPIPS-vgg", 4),
    "ssimulacra2": ("SSIMULACRA2", 1), "e_warp_dis": ("E_warp(DIS)", 3), "profile": ("profile", 2),
    "niqe": ("NIQE", 2), "brisque": ("BRISQUE", 1), "high_frequency": ("HF energy", 2), "seconds": ("s/frame", 2),
}  # fmt: skip
"""Key in the JSON -> heading and digits."""
RESTORED = ("psnr_y", "psnr_c", "ssim", "stlpips_vgg", "ssimulacra2", "e_warp_dis", "profile", "seconds")
BLURRY = ("bicubic", "lanczos", "znedi3")
OTHERS = (*BLURRY, "SPAN", "animevideov3")


def average(clips: Clips) -> Numbers:
    """Means over the clips, of what was measured on any of them."""
    means = {}
    for column in COLUMNS:
        values = [numbers[column] for numbers in clips.values() if math.isfinite(numbers.get(column, math.nan))]
        if values:
            means[column] = float(np.mean(values))
    return means


def averages(rows: Mapping[str, Clips]) -> dict[str, Numbers]:
    """Means of every row, each column over the clips that no row lacks: rows are there to be compared."""
    found: dict[str, Numbers] = {row: {} for row in rows}
    for column in COLUMNS:
        values = {
            row: {name: n[column] for name, n in clips.items() if math.isfinite(n.get(column, math.nan))}
            for row, clips in rows.items()
        }
        measured = [set(there) for there in values.values() if there]
        shared = set.intersection(*measured) if measured else set()
        for row, there in values.items():
            if there and shared:
                found[row][column] = float(np.mean([value for name, value in there.items() if name in shared]))
    return found


def cell(numbers: Mapping[str, float], column: str) -> str:
    return f"{numbers[column]:.{COLUMNS[column][1]}f}" if math.isfinite(numbers.get(column, math.nan)) else "–"


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*text, *("| " + " | ".join(part.replace("|", "\\|") for part in line) + " |" for line in lines)])


def means(rows: dict[str, Clips], columns: Sequence[str]) -> str:
    """Row for row the means over the clips that no row lacks."""
    lines = [[row, *(cell(mean, c) for c in columns)] for row, mean in averages(rows).items()]
    return grid(["row", *(COLUMNS[c][0] for c in columns)], lines)


def each(rows: dict[str, Clips], columns: Sequence[str]) -> str:
    """The same for every clip."""
    names = list(dict.fromkeys(name for clips in rows.values() for name in clips))
    lines = [
        [name, row, *(cell(clips[name], c) for c in columns)]
        for name in names for row, clips in rows.items() if name in clips
    ]  # fmt: skip
    return grid(["clip", "row", *(COLUMNS[c][0] for c in columns)], lines)


def targets(summary: dict[str, dict[str, Numbers]]) -> list[dict[str, Any]]:
    """What the model is meant to reach: name, value, relation, bound, met; only where both sides were measured."""
    found = []

    def add(name: str, value: float, relation: str, bound: float) -> None:
        met = value >= bound if relation == ">=" else value <= bound
        found.append({"name": name, "value": value, "relation": relation, "bound": bound, "met": bool(met)})

    def get(row: str, column: str, kind: str = "degraded") -> float:
        return summary.get(kind, {}).get(row, {}).get(column, math.nan)

    psnr = {row: get(row, "psnr_y") for row in (*OTHERS, "fidelity", "default", "latents zeroed")}
    seen = {row: get(row, "stlpips_vgg") for row in (*OTHERS, "fidelity", "default", "frame by frame", "1 step")}
    warp = {row: get(row, "e_warp_dis") for row in (*OTHERS, "default", "frame by frame")}
    add("degraded: fidelity above bicubic, dB PSNR-Y", psnr["fidelity"] - psnr["bicubic"], ">=", 0.6)
    best = max((psnr[row] for row in OTHERS if math.isfinite(psnr[row])), default=math.nan)
    add("degraded: fidelity above every baseline, dB PSNR-Y", psnr["fidelity"] - best, ">=", 0.0)
    for other in ("SPAN", "animevideov3"):
        add(f"degraded: stLPIPS, fidelity over {other}", seen["fidelity"] / seen[other], "<=", 1.0)
    add("degraded: stLPIPS, default over bicubic", seen["default"] / seen["bicubic"], "<=", 0.75)
    add("degraded: default above bicubic, dB PSNR-Y", psnr["default"] - psnr["bicubic"], ">=", -0.3)
    zeroed = get("latents zeroed", "stlpips_vgg")
    lost = max(psnr["default"] - psnr["latents zeroed"], (zeroed / seen["default"] - 1) / 0.15)
    add("degraded: zeroed latents lose, in units of 1 dB or 15 % stLPIPS", lost, ">=", 1.0)
    add("degraded: stLPIPS, default over one step", seen["default"] / seen["1 step"], "<=", 1.0)
    add("degraded: E_warp, default over frame by frame", warp["default"] / warp["frame by frame"], "<=", 0.8)
    add("degraded: stLPIPS, default over frame by frame", seen["default"] / seen["frame by frame"], "<=", 1.02)
    sharp = [warp[row] for row in ("SPAN", "animevideov3", "frame by frame") if math.isfinite(warp[row])]
    lowest = min(sharp, default=math.nan)
    add("degraded: E_warp, default over the lowest sharp row", warp["default"] / lowest, "<=", 1.0)
    clean = get("fidelity", "psnr_y", "clean") - get("bicubic", "psnr_y", "clean")
    add("clean: fidelity above bicubic, dB PSNR-Y", clean, ">=", 0.8)
    return [target for target in found if math.isfinite(target["value"])]


def target_table(found: list[dict[str, Any]]) -> str:
    lines = [
        [t["name"], f"{t['value']:.3f}", f"{t['relation']} {t['bound']:g}", "yes" if t["met"] else "no"] for t in found
    ]
    return grid(["target", "measured", "wanted", "met"], lines)


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no words for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, report: dict[str, Any]) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(finite(report), indent=1) + "\n")
    part.replace(path)


def _figure():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def scatter(rows: dict[str, Clips], title: str, path: Path) -> None:
    """PSNR-Y against stLPIPS of every row: the lower right corner is best."""
    pyplot = _figure()
    figure, axis = pyplot.subplots(figsize=(8, 5.5))
    for row, mean in averages(rows).items():
        if "stlpips_vgg" in mean and "psnr_y" in mean:
            axis.scatter(mean["psnr_y"], mean["stlpips_vgg"])
            axis.annotate(row, (mean["psnr_y"], mean["stlpips_vgg"]), xytext=(4, 3), textcoords="offset points")
    axis.set(xlabel="PSNR-Y, dB (higher is better)", ylabel="stLPIPS-vgg (lower is better)", title=title)
    axis.margins(0.15)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def curves(rows: dict[str, Numbers], columns: Sequence[str], label: str, path: Path) -> None:
    """One small plot a column over the numbers that the rows are named by."""
    pyplot = _figure()
    figure, axes = pyplot.subplots(1, len(columns), figsize=(4 * len(columns), 3.4), squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.plot([float(row) for row in rows], [numbers.get(column, math.nan) for numbers in rows.values()], "o-")
        axis.set(xlabel=label, title=COLUMNS[column][0])
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def strip(images: dict[str, Tensor], path: Path, across: int = 4) -> None:
    """Pictures "3 h w" of one size in [0, 1] beside and below each other, each under its name."""
    named = []
    for name, image in images.items():
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        canvas = Image.new("RGB", (pixels.shape[1] + 4, pixels.shape[0] + 18), "white")
        canvas.paste(Image.fromarray(pixels), (0, 16))
        ImageDraw.Draw(canvas).text((2, 2), name, fill="black")
        named.append(canvas)
    width, height = named[0].size
    across = min(across, len(named))
    sheet = Image.new("RGB", (across * width, -(-len(named) // across) * height), "white")
    for i, canvas in enumerate(named):
        sheet.paste(canvas, (i % across * width, i // across * height))
    sheet.save(path)
