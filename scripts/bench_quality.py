"""What speed costs: how far bfloat16 and tiles move a result, and what presets, solvers and guidance make of a clip.

The truth is the bundled sample clip; the input is the same clip, four times smaller. Numbers of so small a clip are
good for comparing ways with each other, and for nothing else (scripts/evaluate.py measures the model).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from bench_clips import psnr, sample, seam
from calls import counted, one_of
from perceptual import STLPIPS
from torch import Tensor

from vsuav.checkpoint import Models
from vsuav.engine import Engine, restore
from vsuav.flow import DIS
from vsuav.metrics import psnr_y, warping_error
from vsuav.networks import Networks, choose
from vsuav.settings import PRESETS, SOLVERS, Settings, check
from vsuav.shots import Shots
from vsuav.store import Store
from vsuav.tiling import CHUNK

SMALLEST = 32
"""Pixels a side below which stLPIPS says nothing."""


def pair(length: int) -> tuple[Tensor, Tensor]:
    """The truth "t 3 4h 4w" in [0, 1] and the input "t 3 h w" in [-1, 1]."""
    truth = sample(length)
    truth = truth[..., : truth.shape[-2] // 4 * 4, : truth.shape[-1] // 4 * 4]
    size = truth.shape[-2] // 4, truth.shape[-1] // 4
    low = F.interpolate(truth, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
    return truth / 2 + 0.5, low


class Judge:
    """Distances of a result "t 3 h w" in [0, 1] from the truth."""

    def __init__(self, truth: Tensor, packages: Path | None):
        self.truth = truth
        try:
            self.percept = STLPIPS(packages, "vgg") if packages else None
        except FileNotFoundError:
            self.percept = None

    def psnr_y(self, result: Tensor) -> float:
        return psnr_y(result, self.truth, border=4)

    def stlpips(self, result: Tensor) -> float:
        """nan without the weights of the metric."""
        if self.percept is None or min(result.shape[-2:]) < SMALLEST:
            return float("nan")
        pairs = zip(result.split(1), self.truth.split(1), strict=True)
        return torch.cat([self.percept(a * 2 - 1, b * 2 - 1) for a, b in pairs]).mean().item()

    def flicker(self, result: Tensor) -> float:
        return warping_error(result, DIS(), self.truth) if len(result) > 1 else float("nan")


def differences(model: Path, threads: int, length: int, packages: Path | None) -> Iterator[tuple[str, float]]:
    """How far results lie apart: bfloat16 from float32, by their distances to the truth too; tiled from whole."""
    truth, low = pair(2 * length)
    judge, given = Judge(truth, packages), {"model": model, "dtype": "float32", "threads": threads, "tile": 0}
    exact, coarse = (
        restore(low, Networks(*choose({**given, "dtype": dtype}, *low.shape[:1:-1])))
        for dtype in ("float32", "bfloat16")
    )
    yield "PSNR of bfloat16 against float32, dB", psnr(coarse, exact)
    yield "PSNR-Y against the truth, bfloat16 minus float32, dB", judge.psnr_y(coarse) - judge.psnr_y(exact)
    yield (
        "stLPIPS to the truth, bfloat16 over float32, less 1, %",
        100 * (judge.stlpips(coarse) / judge.stlpips(exact) - 1),
    )
    clip = sample(length)
    size = clip.shape[-1], clip.shape[-2]
    models, settings = choose(given, *size)
    networks = Networks(models, settings)
    tile = tuple(side * 5 // 8 // 8 * 8 for side in size)
    tiled = Networks(models, replace(settings, tile=tile))
    whole, cut = restore(clip, networks), restore(clip, tiled)
    yield f"PSNR of tiles of {tile[0]}x{tile[1]} against whole frames, dB", psnr(cut, whole)
    latents = Engine(networks, Store(1 << 40)).latents(range(CHUNK), Shots(length), dict(enumerate(clip)))
    with networks.arithmetic():
        first = [n.decode(range(CHUNK), latents, list(clip[:CHUNK])) for n in (tiled, networks)]
    yield "the same, only the decoder tiled, dB", psnr(*first)
    ratios = [seam(pictures, size, tile, settings.tile_overlap) for pictures in (cut, whole)]
    yield "gradient across tile borders over elsewhere, tiled / whole", ratios[0] / ratios[1]


def ways(models: Models, usual: Settings, most: int) -> Iterator[tuple[str, Settings]]:
    """What is compared: presets, then solvers, guidance and reuse in `most` / 4 steps or so, all named."""
    full, presets = replace(usual, reuse_steps=()), {**PRESETS, **models.presets}
    for name in ("reference", "balanced", "fast", "preview"):
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in presets[name].items()}
        yield f"preset {name}", replace(full, **values)
    steps = max(2, most // 4)
    bare = replace(full, steps=steps, spacing="trailing", guidance_scale=1.0, propagation_steps=())
    for solver in SOLVERS:
        yield f"{solver}, {steps} steps", replace(bare, solver=solver)
    for low, high in ((0.0, 1.0), (0.3, 1.0)):
        guided = replace(bare, guidance_scale=3.0, guidance_interval=(low, high))
        yield f"ddim, {steps} steps, guidance 3 from {low:g} to {high:g}", guided
    for count, every in ((steps, 2), (most, 2), (most, 3)):
        reused = replace(bare, steps=count, reuse_steps=one_of(every, count))
        yield f"ddim, {count} steps, 1 of {every} in full", reused


def quality(model: Path, threads: int, length: int, most: int, packages: Path | None) -> Iterator[dict]:
    """Rows: every way of `ways` against the truth, and its distance from 4 and from `most` DDIM steps."""
    truth, low = pair(length)
    judge = Judge(truth, packages)
    models, usual = choose({"model": model, "threads": threads, "device": "cpu"}, *low.shape[:1:-1])
    least = {"guidance_scale": 1.0, "propagation_steps": (), "reuse_steps": ()}
    bare = replace(usual, steps=most, solver="ddim", spacing="trailing", **least)
    anchors = {n: restore(low, Networks(models, replace(bare, steps=n))) for n in (4, most)}
    named = [(f"ddim, {n} steps", replace(bare, steps=n)) for n in anchors]
    for what, settings in [*ways(models, usual, most), *named]:
        networks, began = Networks(models, check(settings)), perf_counter()
        result = restore(low, networks)
        taken = perf_counter() - began
        calls, rings = counted(models.schedule, settings)
        yield {
            "what": what, "calls": calls, "rings": rings,
            "ms": 1e3 * taken / length, "psnr_y": judge.psnr_y(result), "stlpips": judge.stlpips(result),
            "flicker": judge.flicker(result), "few": psnr(result, anchors[4]), "many": psnr(result, anchors[most]),
            "most": most,
        }  # fmt: skip
