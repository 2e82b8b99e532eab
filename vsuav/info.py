"""What there is on this machine, and what a clip will cost on it."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import imageio_ffmpeg
import torch
import vapoursynth as vs

from vsuav.commands import found_models
from vsuav.engine import Engine
from vsuav.networks import Networks, auto_dtype, choose
from vsuav.settings import Settings, auto_threads
from vsuav.store import Store
from vsuav.tiling import CHUNK, STRIDE, WINDOW, tiles, window
from vsuav.video import Video

PACKAGES = (
    "torch", "torchvision", "diffusers", "transformers", "vapoursynth-bestsource", "av", "opencv-python-headless",
)  # fmt: skip


def machine() -> list[tuple[str, str]]:
    """Versions, devices and models, as rows of a name and a value."""
    rows = [
        ("vsuav", importlib.metadata.version("vsuav")),
        ("Python", platform.python_version()),
        ("VapourSynth", f"R{vs.core.core_version.release_major}"),
    ]
    for package in PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-version"]
    said = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout.split()
    rows.append(("ffmpeg", f"{said[2]} ({command[0]})" if len(said) > 2 else command[0]))
    rows.append(("plugins", ", ".join(sorted(plugin.namespace for plugin in vs.core.plugins()))))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows.append(("cpu", f"{auto_threads('auto')} threads, {_gib(memory)}, {auto_dtype('auto', 'cpu')}"))
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name, memory = torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory
        rows.append((f"cuda:{i}", f"{name}, {_gib(memory)}, {auto_dtype('auto', f'cuda:{i}')}"))
    rows += [("model", f"{name} ({folder})") for name, folder in found_models()]
    return rows


@dataclass(frozen=True)
class Price:
    """What restoring frames costs. `seconds` leave out the encoder; `memory` is this process's peak (or the GPU's)."""

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
            ("propagation_steps", s.propagation_steps), ("flow", s.flow), ("tile", s.tile),
        )]  # fmt: skip
        pieces = f" of {self.tiles} tiles each" if self.tiles > 1 else ""
        return [
            ("clip", f"{self.frames} frames, {self.size[0]}x{self.size[1]} -> {4 * self.size[0]}x{4 * self.size[1]}"),
            ("settings", ", ".join(every)),
            ("device", f"{s.device}, {s.dtype}, {s.threads} threads"),
            ("U-Net windows", f"{self.calls}{pieces} (one shot; every cut adds at most {2 * s.steps})"),
            ("time", f"about {_clock(self.seconds)}, {self.seconds / self.frames:.2f} s a frame, encoding not counted"),
            ("memory", f"about {_gib(self.memory)}, {_gib(self.kept)} of it latents"),
        ]


def price(video: Video, span: range, given: Mapping[str, Any]) -> Price:
    """Time the networks on noise of the clip's size and count what a linear pass over `span` calls them for.

    Args:
        given: arguments of `upscale`.
    """
    width, height = video.clip.width, video.clip.height
    models, settings = choose(given, width, height)
    cover = tiles(height, width, settings.tile, settings.tile_overlap)
    rows, columns = cover[0].crop
    h, w = rows.stop - rows.start, columns.stop - columns.start
    networks = Networks(models, replace(settings, tile=(0, 0)))
    seconds = networks.worker.run(lambda: _timed(networks, h, w, (height, width)))
    count = len(span)
    windows = len({window(i, 0, count) for i in range((count - 1) // STRIDE + 1)})
    guided = sum(settings.guided(timestep) for timestep in networks.sampler.timesteps)
    total = windows * len(cover) * (guided * seconds["guided"] + (settings.steps - guided) * seconds["plain"])
    total += -(-count // CHUNK) * len(cover) * seconds["decode"]
    if settings.propagation_steps:
        total += (count - 1) * seconds["flow"]
    if settings.device == "cpu":
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        memory = torch.cuda.max_memory_allocated(settings.device)
    kept = Engine(networks, Store(0)).working_set(height, width)
    return Price(count, (width, height), settings, windows * settings.steps, len(cover), total, memory + kept, kept)


def _timed(networks: Networks, h: int, w: int, size: tuple[int, int]) -> dict[str, float]:
    """Seconds of a window with and without guidance, of a decoded chunk and of a flow pair, each after a warm-up."""
    settings, noise = networks.settings, torch.Generator().manual_seed(0)
    latents = [torch.randn(4, h, w, generator=noise).to(networks.latent_dtype) for _ in range(WINDOW)]
    frames = [torch.rand(3, h, w, generator=noise) * 2 - 1 for _ in range(WINDOW)]
    pair = [torch.rand(3, *size, generator=noise) * 2 - 1 for _ in range(2)]
    prompt = settings.prompt_at(0)
    steps: dict[str, int] = {}
    for step, timestep in enumerate(networks.sampler.timesteps):
        steps.setdefault("guided" if settings.guided(timestep) else "plain", step)
    work = {
        name: lambda step=step: networks.window(step, range(WINDOW), latents, frames, prompt)
        for name, step in steps.items()
    }
    work["decode"] = lambda: networks.decode(range(CHUNK), latents[:CHUNK], frames[:CHUNK])
    if settings.propagation_steps:
        work["flow"] = lambda: networks.flow(*pair)
    seconds = {"guided": 0.0, "plain": 0.0}
    with networks.arithmetic():
        for name, call in work.items():
            call()
            begin = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - begin
    return seconds


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
