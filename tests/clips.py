"""Clips for the tests of the plugin, and ways to ask for their frames. As a program: hashes of frames, as JSON."""

import functools
import json
import random
import sys
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import vapoursynth as vs

CUTS = (5, 6, 7, 13)
"""A shot of five frames, two of one frame, one of six, and the rest."""


def pixels(length: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Frames "t 3 h w" in [0, 1], float32, each a step from the one before."""
    noise = np.random.default_rng(seed).standard_normal((length, 3, height, width), np.float32)
    return (np.tanh(noise.cumsum(0) * 0.3) / 2 + 0.5).astype(np.float32)


def clip_of(data: np.ndarray, cuts: Sequence[int] | None = CUTS, **props) -> vs.VideoNode:
    """An RGBS clip of the frames `data`; `cuts` are said in the frame properties, None says nothing."""
    length, _, height, width = data.shape
    blank = vs.core.std.BlankClip(format=vs.RGBS, width=width, height=height, length=length, keep=True)
    clip = blank.std.ModifyFrame(blank, functools.partial(_fill, data, cuts))
    return clip.std.SetFrameProps(**props) if props else clip


def _fill(data, cuts, n, f):
    frame = f.copy()
    for plane in range(3):
        np.copyto(np.asarray(frame[plane]), data[n, plane])
    if cuts is not None:
        frame.props["_SceneChangePrev"] = int(n in cuts)
    frame.props["number"] = n
    return frame


def restored(clip: vs.VideoNode, networks, budget: int = 1 << 30, cache_dir: Path | None = None):
    """`clip` restored by `networks` of any kind, in its own format, and the restorer behind it."""
    from vsuav.plugin import Restorer, finished, look_now

    look = look_now(clip)
    restorer = Restorer(clip, networks, budget, cache_dir, 1 << 40)
    return finished(restorer.clip, clip, look, (4 * clip.width, 4 * clip.height)), restorer


def digest(frame: vs.VideoFrame) -> str:
    """Hash of a frame's pixels."""
    made = blake2b(digest_size=8)
    for plane in range(frame.format.num_planes):
        made.update(np.ascontiguousarray(np.asarray(frame[plane])).tobytes())
    return made.hexdigest()


ORDERS = ("linear", "reverse", "random", "strided", "single")


def ask(clip: vs.VideoNode, order: str) -> dict[int, str]:
    """Hashes of frames asked for in an order.

    linear: ahead of time, as an encoder does; reverse: one at a time; random and strided: all at once, not waiting;
    single: one cold frame.
    """
    numbers = list(range(clip.num_frames))
    match order:
        case "linear":
            return {n: digest(frame) for n, frame in enumerate(clip.frames(prefetch=8))}
        case "reverse":
            return {n: digest(clip.get_frame(n)) for n in reversed(numbers)}
        case "single":
            return {n: digest(clip.get_frame(n)) for n in [random.Random(len(numbers)).choice(numbers)]}
        case "random":
            random.Random(1).shuffle(numbers)
        case "strided":
            numbers = [n for i in range(5) for n in numbers[i::5]]
    futures = [(n, clip.get_frame_async(n)) for n in numbers]
    return {n: digest(future.result()) for n, future in futures}


BUDGETS = {"tiny": 0, "default": 1 << 30}


def case(kind: str, order: str, threads: int, budget: str, model: str = "", length: int = 36) -> dict[int, str]:
    """Hashes of a clip with cuts and propagation, by fake networks (`kind` fake) or those of the folder `model`."""
    vs.core.num_threads = threads
    clip = clip_of(pixels(length, 24, 16))
    if kind == "fake":
        from fakes import Fake

        from vsuav.settings import Settings

        settings = Settings(
            steps=4, solver="dpm++2m", propagation_steps=(1, 2), propagation_radius=4, reuse_steps=(2,), degrain=0.5
        )  # fmt: skip
        result, _ = restored(clip, Fake(settings), BUDGETS[budget])
    else:
        from vsuav import upscale

        result = upscale(
            clip, model=model or None, steps=2, propagation_steps=[1], propagation_radius=3, dtype="float32",
            degrain=0.5, threads=2, cache_mib=BUDGETS[budget] >> 20,
        )  # fmt: skip
    return ask(result, order)


if __name__ == "__main__":
    kind, order, threads, budget, model, length = sys.argv[1:]
    json.dump(case(kind, order, int(threads), budget, model, int(length)), sys.stdout)
