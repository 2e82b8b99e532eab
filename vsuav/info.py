"""What there is on this machine, and what a clip will cost on it."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import imageio_ffmpeg
import torch
import vapoursynth as vs
from torch import Tensor

from vsuav import native
from vsuav.commands import found_models
from vsuav.engine import Engine
from vsuav.frames import check
from vsuav.networks import Networks, auto_dtype, choose
from vsuav.plugin import KEPT_BLOCKS
from vsuav.settings import Settings, auto_threads
from vsuav.store import Store
from vsuav.tiling import BLOCK, CHUNK, STRIDE, WINDOW, band_rows, tiles, window
from vsuav.video import Video

PACKAGES = (
    "torch", "torchvision", "diffusers", "transformers", "vapoursynth-bestsource", "av", "opencv-python-headless",
)  # fmt: skip
Size = tuple[int, int]
"""Height and width in input pixels."""
Kind = tuple[bool, bool, bool]
SMALL, LARGEST = (160, 160), (320, 320)
"""Sizes that are timed on a CPU where frames, or the tiles they are cut into, are larger than the second."""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine() -> list[tuple[str, str]]:
    """Versions, devices and models, as rows of a name and a value."""
    rows = [
        ("vsuav", _version("vsuav")),
        ("Python", platform.python_version()),
        ("VapourSynth", f"R{vs.core.core_version.release_major}"),
    ]
    rows += [(package, _version(package)) for package in PACKAGES]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-version"]
    said = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout.split()
    rows.append(("ffmpeg", f"{said[2]} ({command[0]})" if len(said) > 2 else command[0]))
    rows.append(("plugins", ", ".join(sorted(plugin.namespace for plugin in vs.core.plugins()))))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = f"machine code for {native.KIND}" if native.KIND else "no machine code of vsuav's own"
    rows.append(("cpu", f"{auto_threads('auto')} threads, {_gib(memory)}, {auto_dtype('auto', 'cpu')}, {own}"))
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name, memory = torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory
        rows.append((f"cuda:{i}", f"{name}, {_gib(memory)}, {auto_dtype('auto', f'cuda:{i}')}"))
    rows += [("model", f"{name} ({folder})") for name, folder in found_models()]
    return rows


@dataclass(frozen=True)
class Price:
    """What restoring frames costs. `seconds` leave out the encoder; `memory` is the process's peak, or the GPU's."""

    frames: int
    size: tuple[int, int]
    settings: Settings
    calls: int
    tiles: int
    seconds: float
    memory: int
    kept: int

    def rows(self) -> list[tuple[str, str]]:
        s = self.settings
        every = [f"{name}={value!r}" for name, value in (
            ("steps", s.steps), ("solver", s.solver), ("guidance_scale", s.guidance_scale),
            ("propagation_steps", s.propagation_steps), ("reuse_steps", s.reuse_steps), ("flow", s.flow),
            ("degrain", s.degrain), ("ensemble", s.ensemble), ("tile", s.tile),
        )]  # fmt: skip
        pieces = f" of {self.tiles} tiles each" if self.tiles > 1 else ""
        return [
            ("clip", f"{self.frames} frames, {self.size[0]}x{self.size[1]} -> {4 * self.size[0]}x{4 * self.size[1]}"),
            ("settings", ", ".join(every)),
            ("device", f"{s.device}, {s.dtype}, {s.threads} threads"),
            ("U-Net windows", f"{self.calls}{pieces} (one shot; every cut adds at most {2 * s.steps * s.ensemble})"),
            ("time", f"about {_clock(self.seconds)}, {self.seconds / self.frames:.2f} s a frame, encoding not counted"),
            ("memory", f"about {_gib(self.memory)}, {_gib(self.kept)} of it latents"),
        ]


def price(video: Video, span: range, given: Mapping[str, Any]) -> Price:
    """Time the networks on noise and count what a linear pass over `span` calls them for.

    Args:
        given: arguments of `upscale`.
    """
    check(video.clip)
    width, height = video.clip.width, video.clip.height
    models, settings = choose(given, width, height)
    cover = tiles(height, width, settings.tile, settings.tile_overlap)
    rows, columns = cover[0].crop
    tile = rows.stop - rows.start, columns.stop - columns.start
    networks = Networks(models, settings)
    began, count = _peak(settings.device), len(span)
    piece, chunk, between = networks.worker.run(lambda: _measured(networks, count, tile, (height, width)))
    windows = len({window(i, 0, count) for i in range((count - 1) // STRIDE + 1)})
    total = windows * len(cover) * sum(piece[_kind(networks, step)] for step in range(settings.steps))
    total += count / min(count, CHUNK) * chunk + (count - 1) * between
    kept = Engine(networks, Store(0)).working_set(height, width) * settings.ensemble
    memory = _peak(settings.device)
    if settings.device == "cpu":
        measured = min(tile[0] * tile[1], LARGEST[0] * LARGEST[1])
        results = settings.ensemble * KEPT_BLOCKS * BLOCK * 16 * height * width * 3 * 4
        memory = round(began + (memory - began) * tile[0] * tile[1] / measured + kept + results)
    calls = windows * settings.steps * settings.ensemble
    return Price(count, (width, height), settings, calls, len(cover), total * settings.ensemble, memory, kept)


def _peak(device: str) -> int:
    """Most bytes used so far."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated(device)


def _kind(networks: Networks, step: int) -> Kind:
    """What a window of `step` costs depends on: whether it is guided, reuses deep features, keeps its own."""
    recipe = networks.recipe
    return networks.settings.guided(networks.sampler.timesteps[step]), step in recipe.reuse, recipe.keeps(step)


def _measured(networks: Networks, count: int, tile: Size, size: Size) -> tuple[dict[Kind, float], float, float]:
    """Seconds of a window of a tile by its kind, of a decoded chunk, and of the flow of a pair.

    In a clip of `count` frames; windows and chunks have no more.
    """
    settings, pieces = networks.settings, {}
    with networks.arithmetic():
        for step in range(settings.steps):
            kind = _kind(networks, step)
            if kind not in pieces:
                pieces[kind] = _seconds(partial(_window, networks, step, count), tile, settings.device)
        decode, banded = partial(_decode, networks, count), band_rows(*size, settings.tile) < size[0]
        if settings.device == "cpu" and banded and size[0] * size[1] > LARGEST[0] * LARGEST[1]:
            decoding = _shortest(decode(LARGEST)) * size[0] * size[1] / (LARGEST[0] * LARGEST[1])
        else:
            decoding = _seconds(decode, size, settings.device)
        moving = settings.propagation_steps or settings.degrain
        flow = _shortest(partial(networks.flow, *_noise(2, 3, size))) if moving else 0.0
    return pieces, decoding, flow


def _window(networks: Networks, step: int, count: int, size: Size) -> Callable[[], object]:
    frames = range(min(WINDOW, count))
    latents = list(_noise(len(frames), networks.latent_channels, size).to(networks.latent_dtype))
    inputs = frames, latents, list(_noise(len(frames), 3, size)), networks.settings.prompt_at(0)
    origin = networks.recipe.origin(step)
    if networks.recipe.keeps(step):
        return partial(networks.window_and_deep, step, *inputs)
    deep = () if origin == step else networks.window_and_deep(origin, *inputs)[1:]
    return partial(networks.window, step, *inputs, *deep)


def _decode(networks: Networks, count: int, size: Size) -> Callable[[], object]:
    frames = range(min(CHUNK, count))
    latents = list(_noise(len(frames), networks.latent_channels, size).to(networks.latent_dtype))
    return partial(networks.decode, frames, latents, list(_noise(len(frames), 3, size)))


def _noise(count: int, channels: int, size: Size) -> Tensor:
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _seconds(work: Callable[[Size], Callable[[], object]], size: Size, device: str) -> float:
    """Seconds of the work on frames of `size`; on a CPU that of large ones is extended from two smaller sizes.

    What convolutions take grows with the number of pixels, what attention takes with its square.
    """
    pixels = size[0] * size[1]
    if device != "cpu" or pixels <= LARGEST[0] * LARGEST[1]:
        return _shortest(work(size))
    return extended({h * w: _shortest(work((h, w))) for h, w in (SMALL, LARGEST)}, pixels)


def extended(seconds: Mapping[int, float], pixels: int) -> float:
    """Seconds for `pixels` from those of two smaller numbers: a linear and a quadratic part, neither negative."""
    (small, quick), (large, slow) = sorted(seconds.items())
    square = min(max((slow / large - quick / small) / (large - small), 0.0), slow / large**2)
    return (slow / large - square * large) * pixels + square * pixels**2


def _shortest(call: Callable[[], object]) -> float:
    """Seconds of the call: the shorter of two, after one to warm up."""
    call()
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
