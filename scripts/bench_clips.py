"""What surrounds the networks, and whole clips: parts, overhead, frames a second, memory."""

import contextlib
import functools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from math import log10
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import vapoursynth as vs
from bench_networks import Call, Timing, race
from degrade import read_video
from plain import PlainDecoder, PlainUNet
from torch import Tensor

from vsuav import color, frames, upscale
from vsuav.arithmetic import exact_arithmetic
from vsuav.checkpoint import Models
from vsuav.degrain import beside, degrained
from vsuav.engine import Engine, restore
from vsuav.flow import DIS, origins
from vsuav.networks import Networks, choose, recipe_of
from vsuav.noise import Noise, frame_noise
from vsuav.plan import BLOCK, Recipe, plan_block
from vsuav.plugin import Restorer
from vsuav.propagation import blend
from vsuav.schedule import Sampler, Schedule
from vsuav.settings import PRESETS, Settings
from vsuav.shots import Shots
from vsuav.store import Store
from vsuav.tiling import CHUNK, axis_tiles
from vsuav.turns import worker

SAMPLE = Path(__file__).resolve().parent / "sample" / "city.mp4"
CHAIN = 24
SCHEDULE = Schedule(prediction_type="v_prediction")

Size = tuple[int, int]
"""Width and height of the input, in pixels."""


class Nothing:
    """What the engine asks of networks, at no cost: every result is there already."""

    def __init__(self, settings: Settings, size: Size):
        width, height = size
        self.settings, self.latent_dtype, self.digest = settings, torch.float32, "nothing"
        self.sampler = Sampler(SCHEDULE, settings.steps, settings.solver, settings.spacing)
        self.recipe = recipe_of(settings, self.sampler)
        self.noise = Noise(settings.seed)
        self.worker = worker("cpu")
        self.latent_channels = 4
        self._predictions = torch.zeros(8, self.latent_channels, height, width)
        self._deep = torch.zeros(1, 1, 8, height, width, self.latent_channels)
        self._pictures = torch.full((CHUNK, 3, 4 * height, 4 * width), 0.5)
        self._flows = torch.zeros(4, height, width)

    def arithmetic(self) -> contextlib.AbstractContextManager[None]:
        return exact_arithmetic()

    def window(self, step: int, frames: Sequence[int], latents, low_res, prompt: str, deep=None) -> Tensor:
        return self._predictions[: len(frames)]

    def window_and_deep(self, step: int, frames: Sequence[int], *inputs) -> tuple[Tensor, Tensor]:
        return self._predictions[: len(frames)], self._deep[:, :, : len(frames)]

    def deep_bytes(self, height: int, width: int) -> int:
        return self._deep[:, :, :1].nbytes

    def decode(self, frames: Sequence[int], latents, low_res, beside=None) -> Tensor:
        return self._pictures[: len(frames)]

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        return self._flows


def sample(length: int, size: Size | None = None) -> Tensor:
    """The first frames of the bundled sample clip, over and over if it is too short, "t 3 h w" in [-1, 1]."""
    clip = torch.from_numpy(read_video(SAMPLE, length)[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
    clip = clip[torch.arange(length) % len(clip)]
    if size is None:
        return clip
    enlarged = torch.nn.functional.interpolate(clip, size=size[::-1], mode="bicubic", align_corners=False)
    return enlarged.clamp(-1, 1)


def node(clip: Tensor, format: int) -> vs.VideoNode:
    """A clip "t 3 h w" in [-1, 1] as VapourSynth frames of a format."""
    length, _, height, width = clip.shape
    pixels = ((clip + 1) * 127.5).round().to(torch.uint8).numpy()
    blank = vs.core.std.BlankClip(format=vs.RGB24, width=width, height=height, length=length, keep=True)
    matrix = {"matrix": 1} if format not in (vs.RGB24, vs.RGBS) else {}
    return blank.std.ModifyFrame(blank, functools.partial(_fill, pixels)).resize.Bicubic(format=format, **matrix)


def _fill(pixels: np.ndarray, n: int, f: vs.VideoFrame) -> vs.VideoFrame:
    frame = f.copy()
    for plane in range(3):
        np.copyto(np.asarray(frame[plane]), pixels[n, plane])
    return frame


def drain(clip: vs.VideoNode) -> None:
    """Ask for every frame once, in order and ahead, as an encoder does.

    VapourSynth's own iterator may end with a search for garbage that takes longer than many small frames.
    """
    waiting: deque[Future[vs.VideoFrame]] = deque()
    for n in range(clip.num_frames):
        waiting.append(clip.get_frame_async(n))
        if len(waiting) > vs.core.num_threads:
            waiting.popleft().result().close()
    for frame in waiting:
        frame.result().close()


@contextlib.contextmanager
def vapoursynth_threads(threads: int) -> Iterator[None]:
    before, vs.core.num_threads = vs.core.num_threads, threads
    try:
        yield
    finally:
        vs.core.num_threads = before


def parts(size: Size, settings: Settings) -> dict[str, Call]:
    """Everything around the networks that costs time, one call each, for input of `size`."""
    width, height = size
    clip = sample(CHAIN, size)
    dis = DIS()
    forward, backward = dis(clip[0], clip[1])
    latents, origin = torch.randn(CHAIN, 4, height, width), origins(forward, backward)
    content, low = torch.rand(CHUNK, 3, 4 * height, 4 * width) * 2 - 1, clip[:CHUNK].contiguous()
    matches = [(low[1], forward, backward), (low[2], forward, backward)]
    recipe = Nothing(settings, size).recipe
    released = PRESETS["reference"]
    longest = Recipe(released["steps"], 0, frozenset(released["propagation_steps"]))
    shots = Shots(10_000)
    store, latent = Store(1 << 40), latents[0].clone()

    def keep() -> None:
        for n in range(1000):
            store.put(("latent", 1, n), latent)
            store.get(("latent", 1, n))

    def chains() -> None:
        values = list(latents)
        for n in reversed(range(CHAIN - 1)):
            values[n] = blend(values[n], values[n + 1], origin)
        for n in range(1, CHAIN):
            values[n] = blend(values[n], values[n - 1], origin)

    return {
        "flow, one pair, both ways": lambda: dis(clip[0], clip[1]),
        "propagation, origins of a pair, both ways": lambda: (origins(forward, backward), origins(backward, forward)),
        "propagation, one link": lambda: blend(latents[0], latents[1], origin),
        f"propagation, links of {CHAIN} frames, both ways": chains,
        "degrain, one frame": lambda: degrained(low[0], *beside(low[0], *matches), 0.2),
        "noise of one frame": lambda: frame_noise(0, "latent", 1, (4, height, width)),
        f"colour, wavelet, {CHUNK} frames": lambda: color.wavelet(content, color.bicubic(low, 4)),
        f"colour, AdaIN, {CHUNK} frames": lambda: color.adain(content, color.bicubic(low, 4)),
        "store, 1000 times in and out": keep,
        "planner, cold block, this model": lambda: plan_block(500, recipe, shots, lambda key: False),
        "planner, cold block, 30 steps": lambda: plan_block(500, longest, shots, lambda key: False),
    }


def overhead(size: Size, settings: Settings, length: int, repeat: int, budget: float) -> dict[str, Timing]:
    """Seconds a frame of engine and plugin without networks, and of a plain resize, measured in turns."""
    clip = sample(length, size)
    nothing = Nothing(settings, size)
    calls: dict[str, Call] = {"engine": lambda: _computed(clip, nothing)}
    for name, format in (("RGBS", vs.RGBS), ("YUV420P8", vs.YUV420P8)):
        source = node(clip, format)
        source.std.SetVideoCache(mode=1, fixedsize=1, maxsize=length)
        calls[f"plugin, {name}"] = lambda source=source: drain(_restored(source, nothing))
        calls[f"resize.Bicubic, {name}"] = lambda source=source: drain(
            source.resize.Bicubic(4 * source.width, 4 * source.height)
        )
    with vapoursynth_threads(settings.threads):
        times = race(calls, repeat, budget)
    return {name: taken.of(length) for name, taken in times.items()}


def _computed(clip: Tensor, networks: Nothing) -> None:
    """All frames of a clip, each let go once it is there."""
    engine, sources, shots = Engine(networks, Store(1 << 30)), dict(enumerate(clip)), Shots(len(clip))
    for block in range(-(-len(clip) // BLOCK)):
        engine.run(block, shots, sources)


def _restored(source: vs.VideoNode, networks: Nothing) -> vs.VideoNode:
    look = frames.inspect(source)
    restorer = Restorer(source, networks, 1 << 30, None, 0)
    return frames.give_back(restorer.clip(look), source, look, 4 * source.width, 4 * source.height)


def whole(
    model: Path, size: Size, dtypes: Sequence[str], threads: int, length: int, repeat: int, budget: float
) -> dict[str, Timing]:
    """Seconds a frame of `upscale` with the model's default preset, by dtype; loading is left out."""
    source = node(sample(length, size), vs.YUV420P8)
    build = {dtype: functools.partial(upscale, source, model, dtype=dtype, threads=threads) for dtype in dtypes}
    for dtype in dtypes:
        upscale(source[:BLOCK], model, dtype=dtype, threads=threads).get_frame(0)
    with vapoursynth_threads(threads):
        times = race({dtype: lambda made=made: drain(made()) for dtype, made in build.items()}, repeat, budget, least=1)
    return {dtype: taken.of(length) for dtype, taken in times.items()}


def before(model: Path, size: Size, threads: int, length: int) -> Timing:
    """Seconds a frame of the engine with the same networks written the plain way (scripts/plain.py), in float32.

    Every step is computed in full.
    """
    models, settings = choose({"model": model, "dtype": "float32", "threads": threads, "device": "cpu"}, *size)
    vae = models.video_vae if settings.video_vae else models.vae
    networks = Plain(models, replace(settings, reuse_steps=()), PlainUNet(models.unet.config, models.unet.state_dict()),
                     PlainDecoder(vae.config, vae.state_dict()))  # fmt: skip
    clip = sample(length, size)
    return race({"plain": lambda: restore(clip, networks)}, 1, 0.0, least=1)["plain"].of(length)


class Plain(Networks):
    """Networks that are called the plain way; the text's keys are computed in every call."""

    def __init__(self, models: Models, settings: Settings, unet: PlainUNet, decoder: PlainDecoder):
        super().__init__(models, settings)
        self._unet = SimpleNamespace(prepare=lambda states: states)
        self._call = lambda *inputs: unet(*inputs[:5])  # without the two about reused features
        self._decoder = decoder


def peak(model: Path, size: Size, dtype: str, threads: int, length: int) -> dict[str, int]:
    """Bytes of memory a process needs at most for `upscale`, and before it does anything, measured in a fresh one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, model, size, dtype, threads, length).result()


def _peak(model: Path, size: Size, dtype: str, threads: int, length: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    source = node(sample(length, size), vs.YUV420P8)
    before = _most_memory()
    drain(upscale(source, model, dtype=dtype, threads=threads))
    return {"peak": _most_memory(), "before": before}


def _most_memory() -> int:
    """The high-water mark of this process's memory, in bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def psnr(a: Tensor, b: Tensor) -> float:
    """Of all channels, peak 1, in dB."""
    error = (a.double() - b.double()).square().mean().item()
    return -10 * log10(error) if error else float("inf")


def seam(pictures: Tensor, size: Size, tile: Size, overlap: int) -> float:
    """Mean gradient across borders of tiles over that elsewhere, of pictures "t 3 4h 4w"; sizes are the input's."""
    across, elsewhere = [], []
    for axis, length, side in ((-1, size[0], tile[0]), (-2, size[1], tile[1])):
        ends = {4 * end for span in axis_tiles(length, side, overlap) for end in span} - {0, 4 * length}
        steps = pictures.diff(dim=axis).abs().double().movedim(axis, 0).flatten(1).mean(1)
        for place, step in enumerate(steps.tolist(), 1):
            (across if place in ends else elsewhere).append(step)
    return (sum(across) / len(across)) / (sum(elsewhere) / len(elsewhere))
