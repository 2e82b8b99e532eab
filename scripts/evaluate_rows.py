"""Ways to enlarge a clip four times, each "t 3 h w" in [0, 1] -> "t 3 4h 4w": interpolators, networks, the model."""

import functools
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import vapoursynth as vs
from baselines import NETWORKS, baseline
from evaluate_clips import have, say
from make_data import Package
from torch import Tensor

from vsuav.checkpoint import load
from vsuav.engine import restore
from vsuav.networks import TORCH_DTYPES, Networks, auto_dtype
from vsuav.settings import Settings, resolve
from vsuav.shots import Record, Shots
from vsuav.unet import set_temporal

Row = Callable[[Tensor], Tensor]
ZNEDI3 = Package("vapoursynth-znedi3", "pip", "vapoursynth_znedi3-*.whl", "evaluation", "GPL-2.0", "3.3")
VSZIP = Package("vapoursynth-vszip", "pip", "vapoursynth_vszip-*.whl", "evaluation", "MIT", "23.1.0")
INTERPOLATORS = ("bicubic", "lanczos", "znedi3")
ALONE = {"temporal": False, "propagation_steps": [], "alone": True}
FIDELITY = {"noise_level": 0, "temperature": 0.0, "propagation_steps": []}

OURS = {
    "fidelity": FIDELITY | {"ensemble": 4},
    "fidelity, one copy": FIDELITY,
    "fidelity, two copies": FIDELITY | {"ensemble": 2},
    "default": {},
    "frame by frame": ALONE,
    "1 step": {"steps": 1},
    "latents zeroed": {"zero": True},
    "fidelity, 1 step": {"noise_level": 0, "steps": 1, "propagation_steps": []},
    "without temporal layers": {"temporal": False},
    "without propagation": {"propagation_steps": []},
    "without degrain": {"degrain": 0.0},
    "image VAE": {"video_vae": False},
    "guidance off": {"guidance_scale": 1.0},
    "guidance 3": {"guidance_scale": 3.0},
    "2 steps": {"steps": 2},
    "4 steps": {"steps": 4},
    "8 steps": {"steps": 8},
}
"""Row -> what differs from the model's defaults. "frame by frame" is the spatial model alone, as image pipelines run
it: no temporal layers, no propagation, every frame a shot of its own; noise and seed are those of the other rows."""


class Zeroed(Networks):
    """Decodes zeros instead of latents: what the decoder does alone."""

    def decode(self, frames, latents, low_res, beside=None):
        return super().decode(frames, [torch.zeros_like(z) for z in latents], low_res, beside)


class Ours:
    """Restores with a model (a folder, or the bundled one) under the settings of a row."""

    def __init__(self, model: Path | None = None, seed: int = 0):
        dtype = auto_dtype("auto", "cpu")
        self.models = load(model, TORCH_DTYPES[dtype], TORCH_DTYPES[dtype])
        self.fixed = {"dtype": dtype, "device": "cpu", "threads": torch.get_num_threads(), "tile": (0, 0)}
        self.seed = seed

    def settings(self, **given) -> Settings:
        named = {"seed": self.seed} | {k: v for k, v in given.items() if k not in ("temporal", "zero", "alone")}
        resolved = resolve(named, self.models.defaults, self.models.presets)
        return replace(resolved, flow="dis", **self.fixed)

    def row(self, **given) -> Row:
        """`given`: parameters of `upscale`, and temporal (False: no temporal layers), zero, alone."""

        def run(low: Tensor) -> Tensor:
            set_temporal(self.models.unet, given.get("temporal", True))
            kind = Zeroed if given.get("zero") else Networks
            settings = self.settings(**given)
            cut = Record(cut_before=True, cut_after=True)
            shots = Shots(len(low), lambda n: cut, settings.prompt_at) if given.get("alone") else None
            try:
                return restore(low * 2 - 1, kind(self.models, settings), shots).clone()
            finally:
                set_temporal(self.models.unet, True)

        return run


def bicubic(low: Tensor) -> Tensor:
    return F.interpolate(low, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)


def lanczos(low: Tensor) -> Tensor:
    size = (4 * low.shape[-1], 4 * low.shape[-2])
    images = [cv2.resize(x.permute(1, 2, 0).numpy(), size, interpolation=cv2.INTER_LANCZOS4) for x in low]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).clamp(0, 1)


def plugin(package: Package, namespace: str, library: str, folder: Path, offline: bool, what: str) -> bool:
    """Make sure that VapourSynth has `namespace`: installed already, or out of a wheel in `folder`."""
    if hasattr(vs.core, namespace):
        return True
    if (wheel := have(package, folder, offline, what)) is None:
        return False
    target = folder / "plugins" / wheel.stem
    if not target.is_dir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target, [n for n in archive.namelist() if n.startswith("vapoursynth/plugins/")])
    try:
        vs.core.std.LoadPlugin(str(target.resolve() / "vapoursynth" / "plugins" / library))
    except vs.Error as error:
        say(f"{what} left out: {error}")
        return False
    return True


def clip_of(frames: Tensor, format: int = vs.RGBS) -> vs.VideoNode:
    """A VapourSynth clip of "t 3 h w" in [0, 1]."""
    length, _, height, width = frames.shape
    blank = vs.core.std.BlankClip(format=vs.RGBS, width=width, height=height, length=length, keep=True)

    def fill(n: int, f: vs.VideoFrame) -> vs.VideoFrame:
        frame = f.copy()
        for plane in range(3):
            np.copyto(np.asarray(frame[plane]), frames[n, plane].numpy())
        frame.props.update({"_Matrix": 0, "_Transfer": 13, "_Primaries": 1})
        return frame

    clip = blank.std.ModifyFrame(blank, fill)
    return clip if format == vs.RGBS else clip.resize.Point(format=format)


def frames_of(clip: vs.VideoNode) -> Tensor:
    """The other way."""
    return torch.stack([torch.from_numpy(np.stack([np.asarray(p) for p in f])) for f in clip.frames(close=True)])


def znedi3(low: Tensor) -> Tensor:
    """Twice doubled. Doubling keeps the lines where they are, so the whole is then moved to the others' place."""
    clip = clip_of(low)
    for field in (1, 0):
        for _ in range(2):
            clip = clip.znedi3.nnedi3(field=field, dh=True).std.Transpose()
    # line n lies at 4 n + 1 after both, its place is 4 n + 1.5
    return frames_of(clip.resize.Bicubic(src_left=-0.5, src_top=-0.5)).clamp(0, 1)


def ssimulacra2(result: Tensor, truth: Tensor) -> float:
    """Mean SSIMULACRA2 score of "t 3 h w" in [0, 1], by the plugin vszip: 100 is identical."""
    scores = clip_of(truth).vszip.SSIMULACRA2(clip_of(result))
    props = [dict(frame.props) for frame in scores.frames(close=True)]
    return float(np.mean([next(v for k, v in p.items() if "SSIMULACRA2" in k.upper()) for p in props]))


@functools.cache
def network(name: str, packages: Path, offline: bool) -> Row | None:
    """Another network of NETWORKS, None with a line on stderr where its package cannot be had."""
    if have(NETWORKS[name][0], packages, offline, f"row {name}") is None:
        return None
    run = baseline(name, packages)
    return lambda low: torch.cat([run(frame[None]) for frame in low])


def others(names: list[str], packages: Path, offline: bool) -> dict[str, Row]:
    """The rows of `names` that are not ours and can be had."""
    rows: dict[str, Row | None] = {}
    for name in names:
        if name in NETWORKS:
            rows[name] = network(name, packages, offline)
        elif name == "znedi3":
            there = plugin(ZNEDI3, "znedi3", "znedi3.so", packages, offline, "row znedi3")
            rows[name] = znedi3 if there else None
        elif name in INTERPOLATORS:
            rows[name] = {"bicubic": bicubic, "lanczos": lanczos}[name]
    return {name: row for name, row in rows.items() if row is not None}
