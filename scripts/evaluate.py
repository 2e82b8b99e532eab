"""Measure the model against enlarging, other networks and itself with parts switched off.

    python scripts/evaluate.py                        every table, on clips taken from packages (below 25 minutes)
    python scripts/evaluate.py --clips DIR            on the clean videos and pictures of a folder, of any format
    python scripts/evaluate.py --clips DIR --draws 6  each of them degraded in six ways
    python scripts/evaluate.py --pairs DIR            on pairs NAME.lr.mkv, NAME.hr.mkv (4 times as large)
    python scripts/evaluate.py --tables text,noise    some of main, crops, natural, ablation, text, noise, calls
    python scripts/evaluate.py --rows "bicubic;default" --frames 4 --size 128x96           a quick look
    python scripts/evaluate.py --merge old.json       baseline rows that old.json has are not computed again

Tables, printed and written into --out as evaluation.md, evaluation.json and PNG files; --json FILE writes the JSON to
FILE, too (`summary`: kind -> row -> means; `clips`: the same for every clip; `targets`; the other tables' own keys):

    main      every row against the truth, on clean x4 and degraded x4 (scripts/degrade.py, seeded by the names)
    crops     Real-ESRGAN x4plus, too slow for whole clips, with a few others on the middle of single frames
    natural   old and generated clips that nobody knows the truth of (--low DIR: your own)
    ablation  parts switched off, over five seeds, and where that should move the numbers
    text      what prompts do to single frames
    noise     the noise level from fidelity to detail
    calls     what presets, solvers, guidance intervals and reused features cost, beside thirty plain steps

With --clips or --pairs only the main table is made unless --tables asks. What is needed of packages is taken from
--packages or downloaded into it; --offline never downloads. What cannot be had is left out with a line on stderr.

Columns: PSNR-Y and PSNR-C (dB, of luma and of the colours), SSIM of the luma, stLPIPS-vgg (lower is better),
SSIMULACRA2 (100 = identical), E_warp(DIS) (squared warping error x 1000 along the truth's flow), profile (mean absolute
error of a pixel column over time, of 255), NIQE and BRISQUE (lower is better), HF energy (what an input 4 times smaller
cannot hold), seconds a frame.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import cv2
import numpy as np
import torch
import vapoursynth as vs
from evaluate_calls import ways, ways_table
from evaluate_clips import (
    Clip,
    Refused,
    from_folder,
    from_packages,
    have,
    pair_files,
    pairs,
    reduced,
    say,
    without_truth,
)
from evaluate_effects import ablation, ablation_table, first_of, noise_levels, single_frames, text, text_table
from evaluate_rows import INTERPOLATORS, NETWORKS, OURS, VSZIP, Ours, Row, bicubic, others, plugin, ssimulacra2
from evaluate_tables import (
    RESTORED,
    Numbers,
    averages,
    curves,
    each,
    means,
    scatter,
    strip,
    target_table,
    targets,
    write_json,
)
from make_data import PACKAGES
from naturalness import BRISQUE, BRISQUE_PACKAGE, NIQE, NIQE_PACKAGE
from perceptual import STLPIPS
from torch import Tensor

from vsuav.checkpoint import ModelError
from vsuav.flow import DIS
from vsuav.metrics import high_frequency_energy, psnr_c, psnr_y, ssim_y, temporal_profile, warping_error
from vsuav.networks import auto_dtype

TABLES = ("main", "crops", "natural", "ablation", "text", "noise", "calls")
MAIN = (*INTERPOLATORS, "SPAN", "animevideov3", "frame by frame", "fidelity", "fidelity, one copy",
        "fidelity, two copies", "default", "1 step", "latents zeroed")  # fmt: skip
CROPS = ("bicubic", "SPAN", "animevideov3", "x4plus", "fidelity", "default")
NATURAL = ("bicubic", "SPAN", "animevideov3", "frame by frame", "fidelity", "default")
BORDER = 4
KEPT = 20
"""Degraded clips that the tables after the main one choose from."""


class Flow:
    """DIS flow that remembers the pairs it has seen: every row is measured along the same ones."""

    def __init__(self):
        self._dis, self._seen = DIS(), {}

    def __call__(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        key = blake2b(first.numpy().tobytes() + second.numpy().tobytes()).digest()
        if key not in self._seen:
            if len(self._seen) > 256:
                self._seen.clear()
            self._seen[key] = self._dis(first, second)
        return self._seen[key]


class Judge:
    """The numbers of a result, "t 3 h w" in [0, 1]; the columns whose packages cannot be had are not there."""

    def __init__(self, packages: Path, offline: bool, percept: bool = True, natural: bool = False):
        wheel = None
        if percept:
            wheel = have(next(p for p in PACKAGES if p.use == "loss"), packages, offline, "column stLPIPS-vgg")
        self.percept = STLPIPS(wheel, "vgg") if wheel else None
        self.ssimulacra2 = plugin(
            VSZIP, "vszip", "vszip/libvszip.so", packages, offline, "column SSIMULACRA2"
        )  # fmt: skip
        self.alone = {}
        for name, kind, package in (("niqe", NIQE, NIQE_PACKAGE), ("brisque", BRISQUE, BRISQUE_PACKAGE)):
            if natural and (wheel := have(package, packages, offline, f"column {name.upper()}")):
                self.alone[name] = kind(wheel)
        self.flow = Flow()
        self._wanted: tuple[Tensor | None, list] = (None, [])

    def timed(self, row: Row, clip: Clip) -> tuple[Numbers, Tensor]:
        """Run a row on a clip; its numbers, seconds a frame among them, and its result."""
        began = time.perf_counter()
        with torch.inference_mode():
            result = row(clip.low).clone()
        seconds = (time.perf_counter() - began) / len(clip.low)
        with torch.inference_mode():
            numbers = self.natural(result, clip.low) if clip.truth is None else self.close(result, clip.truth)
        return numbers | {"seconds": seconds}, result

    def close(self, result: Tensor, truth: Tensor) -> Numbers:
        column = truth.shape[-1] // 2
        profile = (temporal_profile(result, column) - temporal_profile(truth, column)).abs().mean().item()
        numbers = {
            "psnr_y": psnr_y(result, truth, BORDER),
            "psnr_c": psnr_c(result, truth, BORDER),
            "ssim": ssim_y(result, truth, BORDER),
            "e_warp_dis": warping_error(result, self.flow, reference=truth) if len(truth) > 1 else float("nan"),
            "profile": 255 * profile,
            "high_frequency": high_frequency_energy(result),
        }
        if self.percept is not None:
            numbers["stlpips_vgg"] = self._distance(result, truth)
        if self.ssimulacra2:
            numbers["ssimulacra2"] = ssimulacra2(result, truth)
        return numbers

    def _distance(self, result: Tensor, truth: Tensor) -> float:
        """Mean stLPIPS of the first, the middle and, of an odd number of frames, the last one."""
        every = max(1, len(truth) // 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=auto_dtype("auto", "cpu") == "bfloat16"):
            if self._wanted[0] is not truth:
                self._wanted = (truth, [self.percept.features(x[None] * 2 - 1) for x in truth[::every]])
            found = [self.percept.features(x[None] * 2 - 1) for x in result[::every]]
            pairs = zip(found, self._wanted[1], strict=True)
            return float(np.mean([self.percept.distance(a, b).float().item() for a, b in pairs]))

    def natural(self, result: Tensor, low: Tensor) -> Numbers:
        """Without a truth: the warping error runs along the flow of the enlarged input."""
        every = max(1, len(result) // 2)
        pictures = [x.permute(1, 2, 0).numpy() for x in result[::every]]
        numbers = {name: float(np.mean([score(x) for x in pictures])) for name, score in self.alone.items()}
        if len(result) > 1:
            numbers["e_warp_dis"] = warping_error(result, self.flow, reference=bicubic(low))
        return numbers


class Report:
    """Everything measured so far; written after every clip, so that a run that is stopped leaves what it has."""

    def __init__(self, args: argparse.Namespace):
        source = args.clips or args.pairs
        self.settings = {
            "source": str(source) if source else "packages", "frames": args.frames, "seed": args.seed,
            "size": "x".join(map(str, args.size)) if args.size else "whole", "strength": args.strength,
            "reduce": args.reduce, "draws": args.draws, "model": str(args.model or "bundled"),
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        self.clips: dict[str, dict[str, dict[str, Numbers]]] = {}
        self.digests: dict[str, dict[str, str]] = {}
        self.effects: dict = {}
        self.sections: dict[str, str] = {}
        self.out, self.json = args.out, args.json
        self.failed: list[str] = []
        self.earlier: dict[tuple[str, str, str | None], Numbers] = {}
        for path in args.merge:
            self._merge(path)

    def _merge(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text())
            theirs, clips, digests = found["settings"], found["clips"], found["digests"]
        except (OSError, ValueError, KeyError, TypeError):
            raise Refused(f"{path} is no report of this script") from None
        for name in ("source", "frames", "size", "strength", "reduce"):
            if theirs.get(name) != self.settings[name]:
                raise Refused(f"{path} was measured with {name} {theirs.get(name)}, not {self.settings[name]}")
        for kind, rows in clips.items():
            for row, numbers in rows.items():
                if row not in OURS:
                    for name, measured in numbers.items():
                        self.earlier[kind, row, digests.get(kind, {}).get(name)] = measured

    def known(self, clip: Clip, row: str) -> Numbers | None:
        """What an earlier report has of a row on this very clip, to the last pixel."""
        found = self.earlier.get((clip.kind, row, clip.digest()))
        return None if found is None else {k: float("nan") if v is None else v for k, v in found.items()}

    def add(self, clip: Clip, row: str, numbers: Numbers) -> None:
        self.clips.setdefault(clip.kind, {}).setdefault(row, {})[clip.name] = numbers
        self.digests.setdefault(clip.kind, {})[clip.name] = clip.digest()
        said = " ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        say(f"{clip.name} {clip.kind} {row}: {said}")

    def write(self) -> None:
        summary = {kind: averages(rows) for kind, rows in self.clips.items()}
        report = {
            "summary": summary, "targets": targets(summary), "settings": self.settings, "clips": self.clips,
            "digests": self.digests, **self.effects,
        }  # fmt: skip
        for path in (self.out / "evaluation.json", self.json):
            if path is not None:
                write_json(path, report)

    def markdown(self) -> str:
        summary = {kind: averages(rows) for kind, rows in self.clips.items()}
        parts = []
        names = {"clean": "clean x4", "degraded": "degraded x4", "crops": "crops of single frames, degraded x4"}
        for kind in ("clean", "degraded", "crops"):
            if kind in self.clips:
                clips = [set(clips) for clips in self.clips[kind].values()]
                all_of, count = len(set.union(*clips)), len(set.intersection(*clips))
                of = f"{count}" if count == all_of else f"{count} of {all_of}, which no row lacks"
                parts.append(f"### {names[kind]}, mean of {of}\n\n{means(self.clips[kind], RESTORED)}")
        if found := targets(summary):
            parts.append(f"### targets\n\n{target_table(found)}")
        if "no truth" in self.clips:
            columns = ("niqe", "brisque", "e_warp_dis", "seconds")
            parts.append(f"### old and generated clips, no truth known\n\n{means(self.clips['no truth'], columns)}")
            parts.append(each(self.clips["no truth"], columns))
        parts += [f"### {title}\n\n{table}" for title, table in self.sections.items()]
        for kind in ("clean", "degraded"):
            if kind in self.clips:
                parts.append(f"### {names[kind]}, every clip\n\n{each(self.clips[kind], RESTORED)}")
        return "\n\n".join(parts) + "\n"


def restored_clips(args: argparse.Namespace) -> Iterator[Clip]:
    """The clips with a truth."""
    count = args.frames or None
    if args.pairs:
        yield from pairs(args.pairs, count, args.size)
        return
    if args.clips:
        found = from_folder(args.clips, count)
    else:
        found = from_packages(args.packages, args.offline, args.frames or 24, args.size or (384, 256))
    if args.reduce > 1:
        found = ((name, np.stack([shrunk(f, args.reduce) for f in frames])) for name, frames in found)
    yield from reduced(found, args.kinds, args.size, args.strength, args.draws)


def shrunk(frame: np.ndarray, times: int) -> np.ndarray:
    size = tuple(max(1, side // times) for side in frame.shape[1::-1])
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


def run_rows(report: Report, judge: Judge, rows: dict[str, Row], clip: Clip) -> None:
    """Measure every row on a clip; write the middle frames, and the middle column over time, as pictures."""
    shown: dict[str, Tensor] = {}
    for name, row in rows.items():
        if (numbers := report.known(clip, name)) is None:
            try:
                numbers, result = judge.timed(row, clip)
            except (ValueError, RuntimeError, vs.Error) as error:
                say(f"{clip.name} {clip.kind} {name} left out: {error}")
                report.failed.append(f"{name} of {clip.name}")
                continue
            shown[name] = result
        report.add(clip, name, numbers)
        report.write()
    if not shown:
        return
    if clip.truth is not None:
        shown["truth"] = clip.truth
    stem = report.out / f"{clip.name}-{clip.kind.replace(' ', '-')}"
    strip({name: frames[len(frames) // 2] for name, frames in shown.items()}, stem.with_name(f"{stem.name}.png"))
    if len(clip.low) > 1:
        column = 4 * clip.low.shape[-1] // 2
        lines = {
            name: temporal_profile(frames, column).repeat_interleave(max(1, 96 // len(frames)), -1)
            for name, frames in shown.items()
        }
        strip(lines, stem.with_name(f"{stem.name}-profile.png"), across=12)


def size_of(text: str) -> tuple[int, int] | None:
    """ "384x256" -> (384, 256); "0" -> None, which is all there is."""
    if text == "0":
        return None
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or min(map(int, parts)) < 32:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT of at least 32x32, or 0 for all, got {text!r}")
    return int(parts[0]), int(parts[1])


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evaluate", description="Measure the model.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--clips", type=Path, help="folder of clean clips")
    source.add_argument("--pairs", type=Path, help="folder of NAME.lr.mkv and NAME.hr.mkv")
    parser.add_argument("--low", type=Path, help="folder of old or generated clips for the table without truth")
    parser.add_argument("--model", type=Path, help="default: the bundled model")
    parser.add_argument("--packages", type=Path, default=Path("data/packages"), help="where packages lie or go")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    parser.add_argument("--tables", help=f"of {','.join(TABLES)}; default: all, with --clips or --pairs main")
    known = (*INTERPOLATORS, *NETWORKS, *OURS)
    parser.add_argument("--rows", help=f"of the main table, separated by ; – of {'; '.join(known)}")
    parser.add_argument("--kinds", default="clean,degraded", help="of clean,degraded")
    parser.add_argument("--frames", type=int, default=8, help="at most so many frames of a clip; 0 = all")
    parser.add_argument("--size", type=size_of, default="", help="at most so many pixels of the truth: WxH, 0 = all; "
                        "default 256x192, of pairs 640x480")  # fmt: skip
    parser.add_argument("--reduce", type=int, default=1, help="make clean clips so many times smaller first")
    parser.add_argument("--strength", type=float, default=0.7, help="of the degradation, 0 … 1")
    parser.add_argument("--draws", type=int, default=1, help="degrade every clip so many times, each time differently")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5, help="of the ablation")
    parser.add_argument("--guidance", type=float, help="of the prompts in the text table; default: the model's own")
    parser.add_argument("--no-percept", action="store_true", help="leave stLPIPS out")
    parser.add_argument("--merge", type=Path, nargs="*", default=[], help="reports to take the baselines' rows from")
    parser.add_argument("--json", type=Path, help="write everything here, too")
    parser.add_argument("--out", type=Path, default=Path("out/evaluation"), help="folder for tables, plots, pictures")
    words = sys.argv[1:] if given is None else given
    if not any(word == "--size" or word.startswith("--size=") for word in words):
        words = [*words, "--size", "640x480" if any(w.startswith("--pairs") for w in words) else "256x192"]
    args = parser.parse_args(words)
    args.kinds = args.kinds.split(",")
    args.tables = args.tables.split(",") if args.tables else ["main"] if args.clips or args.pairs else list(TABLES)
    args.rows = args.rows.split(";") if args.rows else list(MAIN)
    for name, values, allowed in (
        ("kinds", args.kinds, ("clean", "degraded")),
        ("tables", args.tables, TABLES),
        ("rows", args.rows, known),
    ):
        if unknown := [value for value in values if value not in allowed]:
            parser.error(f"--{name} must be of {', '.join(allowed)}, got {', '.join(unknown)}")
    if not 0 <= args.strength <= 1:
        parser.error(f"--strength must be between 0 and 1, got {args.strength}")
    if not 0 <= args.seed < 2**64:
        parser.error(f"--seed must be between 0 and {2**64 - 1}, got {args.seed}")
    if args.frames < 0 or min(args.reduce, args.draws, args.seeds) < 1:
        parser.error("--frames must be at least 0, --reduce, --draws and --seeds at least 1")
    return args


def evaluate(args: argparse.Namespace) -> str:
    """Measure; returns the Markdown of all tables.

    Raises:
        Refused: nothing, or not everything, could be measured; the tables of what could are written by then.
    """
    if args.pairs:
        pair_files(args.pairs)
    args.packages.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for path in filter(None, (args.out / "evaluation.json", args.json)):  # better now than after an hour
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    args.packages = args.packages.resolve()
    ours = Ours(args.model, args.seed)
    judge = Judge(args.packages, args.offline, not args.no_percept, "natural" in args.tables)
    report = Report(args)

    def rows(names) -> dict[str, Row]:
        there = others([n for n in names if n not in OURS], args.packages, args.offline)
        return {n: ours.row(**OURS[n]) if n in OURS else there[n] for n in names if n in OURS or n in there}

    chosen: list[Clip] = []
    if set(args.tables) - {"natural"}:
        measured = rows(args.rows) if "main" in args.tables else {}
        for clip in restored_clips(args):
            if clip.kind == "degraded" and len(chosen) < KEPT:
                chosen.append(clip)
            run_rows(report, judge, measured, clip)
        for kind in report.clips:
            scatter(report.clips[kind], f"{kind} x4", args.out / f"{kind}.png")
    few = chosen[:: max(1, len(chosen) // 4)][:4]
    if "crops" in args.tables:
        measured = rows(CROPS)
        for clip in chosen[::2]:
            run_rows(report, judge, measured, first_of(clip, 192))
    if "natural" in args.tables:
        measured = rows(NATURAL)
        for clip in without_truth(args.low, args.packages, args.offline, args.frames or None):
            run_rows(report, judge, measured, clip)
    if few and "noise" in args.tables:
        levels = noise_levels(ours, few, judge)
        report.effects["noise_levels"] = levels
        shown = ("psnr_y", "stlpips_vgg", "high_frequency")
        known = averages(levels)
        table = means(levels, (*shown, "e_warp_dis"))
        report.sections["noise level, degraded x4"] = table.replace("| row ", "| level ", 1)
        curves(known, shown, "noise level", args.out / "noise-level.png")
        report.write()
    if few and "text" in args.tables:
        found, pictures = text(ours, single_frames(chosen), args.guidance)
        report.effects["text"] = found
        report.sections["prompts, single frames, colours not put right"] = text_table(found)
        if pictures:
            strip(pictures, args.out / "text.png")
        report.write()
    if few and "calls" in args.tables:
        found = ways(ours, few, judge)
        report.effects["calls"] = found
        report.sections[f"fewer and cheaper calls, degraded x4, {len(few)} clips"] = ways_table(found)
        report.write()
    if few and "ablation" in args.tables:
        found = ablation(ours, few, judge, args.seeds)
        report.effects["ablation"] = found
        title = f"parts switched off, degraded x4, {len(few)} clips, mean ± deviation over {args.seeds} seeds"
        report.sections[title] = ablation_table(found)
    report.write()
    markdown = report.markdown()
    (args.out / "evaluation.md").write_text(markdown)
    print(markdown)
    if report.failed:
        raise Refused(f"not measured: {', '.join(report.failed)}; the lines above say why")
    if not report.clips and not report.effects:
        raise Refused("nothing was measured")
    return markdown


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    cv2.setNumThreads(1)
    os.environ.setdefault("PIP_RETRIES", "1")
    os.environ.setdefault("PIP_TIMEOUT", "15")
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        evaluate(args)
    except (Refused, OSError, ModelError) as error:
        sys.exit(f"evaluate: {error}")


if __name__ == "__main__":
    main()
