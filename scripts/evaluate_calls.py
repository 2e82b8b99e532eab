"""What fewer or cheaper U-Net calls cost in quality: against the truth, and against thirty plain steps."""

from collections.abc import Callable, Sequence
from typing import Any

from calls import counted, one_of
from evaluate_clips import Clip, say
from evaluate_rows import Ours
from evaluate_tables import COLUMNS, Clips, average, cell, grid

from vsuav.metrics import psnr_y

PLAIN = {
    "solver": "ddim", "spacing": "trailing", "guidance_scale": 1.0, "guidance_interval": (0.0, 1.0),
    "propagation_steps": [], "reuse_steps": [],
}  # fmt: skip
GUIDED = {**PLAIN, "guidance_scale": 3.0}
MOST, FEW = 30, 8


WAYS = {
    f"{MOST} steps": (PLAIN | {"steps": MOST}, None),
    f"{MOST} steps, 1 of 2 in full": (PLAIN | {"steps": MOST, "reuse_steps": one_of(2, MOST)}, f"{MOST} steps"),
    f"{MOST} steps, 1 of 3 in full": (PLAIN | {"steps": MOST, "reuse_steps": one_of(3, MOST)}, f"{MOST} steps"),
    f"{FEW} steps": (PLAIN | {"steps": FEW}, f"{MOST} steps"),
    f"{FEW} steps, 1 of 2 in full": (PLAIN | {"steps": FEW, "reuse_steps": one_of(2, FEW)}, f"{MOST} steps"),
    f"{FEW} steps, dpm++2m": (PLAIN | {"steps": FEW, "solver": "dpm++2m"}, f"{MOST} steps"),
    f"{FEW} steps, unipc": (PLAIN | {"steps": FEW, "solver": "unipc"}, f"{MOST} steps"),
    "2 steps": (PLAIN | {"steps": 2}, f"{MOST} steps"),
    "2 steps, 1 in full": (PLAIN | {"steps": 2, "reuse_steps": [1]}, f"{MOST} steps"),
    f"{MOST} steps, guidance 3": (GUIDED | {"steps": MOST}, None),
    f"{FEW} steps, guidance 3": (GUIDED | {"steps": FEW}, f"{MOST} steps, guidance 3"),
    f"{FEW} steps, guidance 3 from 0.3 to 1": (
        GUIDED | {"steps": FEW, "guidance_interval": (0.3, 1.0)}, f"{MOST} steps, guidance 3"
    ),
    **{f"preset {name}": ({"preset": name}, f"{MOST} steps") for name in ("reference", "balanced", "fast", "preview")},
}  # fmt: skip
"""Row -> parameters, and the row its result is held against beside the truth."""


def ways(ours: Ours, clips: Sequence[Clip], judge: Callable) -> dict[str, dict[str, Any]]:
    """Row -> its calls, those of the outer ring only, and clip -> numbers, "to_most" (dB) among them."""
    found: dict[str, dict[str, Any]] = {}
    results: dict[tuple[str, str], Any] = {}
    for row, (given, base) in WAYS.items():
        numbers: Clips = {}
        try:
            calls, rings = counted(ours.models.schedule, ours.settings(**given))
            measured = [(clip, *judge.timed(ours.row(**given), clip)) for clip in clips]
        except ValueError as error:
            say(f"row {row} left out: {error}")
            continue
        for clip, seen, result in measured:
            numbers[clip.name] = seen
            if base is None:
                results[row, clip.name] = result
            elif (base, clip.name) in results:
                numbers[clip.name]["to_most"] = psnr_y(result, results[base, clip.name])
        found[row] = {"calls": calls, "rings": rings, "clips": numbers}
        say(f"calls: {row}")
    return found


def ways_table(found: dict[str, dict[str, Any]]) -> str:
    columns = ("psnr_y", "stlpips_vgg", "e_warp_dis", "seconds")
    lines = []
    for row, way in found.items():
        mean = average(way["clips"])
        near = [numbers["to_most"] for numbers in way["clips"].values() if "to_most" in numbers]
        nearest = f"{sum(near) / len(near):.1f}" if near else "–"
        lines.append([row, str(way["calls"]), str(way["rings"]), *(cell(mean, c) for c in columns), nearest])
    names = [COLUMNS[c][0] for c in columns]
    return grid(["row", "U-Net calls a window", "outer ring only", *names, f"PSNR-Y to {MOST} steps"], lines)
