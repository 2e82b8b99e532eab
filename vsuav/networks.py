"""The networks on their device, called the way the engine needs them: one window, one decode chunk, one flow pair.

Latents, noise, flows and all arithmetic between network calls live on the CPU in float32 (latents in float16 when the
networks run in float16), so they are the same whatever the device. Only what networks get and give crosses over.
"""

import contextlib
import functools
import gc
import math
import platform
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsuav import native
from vsuav.arithmetic import exact_arithmetic
from vsuav.bands import BandedDecoder
from vsuav.checkpoint import Models, load
from vsuav.color import adain, bicubic, wavelet
from vsuav.flow import DIS, LIBRARY, RAFT
from vsuav.folders import files, locate
from vsuav.layers import lay_out
from vsuav.noise import Noise
from vsuav.plan import Recipe
from vsuav.schedule import Sampler, add_noise
from vsuav.settings import Settings, auto_threads, auto_tile, resolve
from vsuav.tiling import band_rows, blend_weights, tiles
from vsuav.turns import worker, working_threads

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NetworkError(RuntimeError):
    """The networks gave something that is no picture, or the device could not hold them."""


def auto_device(device: str) -> str:
    """``"auto"`` is the first CUDA device or the CPU; anything else is checked and returned.

    Raises:
        ValueError: no such device, with those there are.
    """
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    if device == "auto":
        return there[1] if len(there) > 1 else "cpu"
    name = "cuda:0" if device == "cuda" else device
    if name not in there:
        raise ValueError(f"device must be one of auto, {', '.join(there)}, got {device!r}")
    return name


def auto_dtype(dtype: str, device: str) -> str:
    """``"auto"`` is float16 on CUDA, bfloat16 on a CPU that multiplies in it, else float32."""
    if dtype != "auto":
        return dtype
    if device != "cpu":
        return "float16"
    return "bfloat16" if native.BFLOAT16 else "float32"


def decoder_dtype(dtype: str) -> torch.dtype:
    """What the VAE runs in: float32 where the U-Net runs in float16, whose range the released VAEs leave."""
    return torch.float32 if dtype == "float16" else TORCH_DTYPES[dtype]


def device_memory(device: str) -> int:
    """Bytes of memory a device has in all, used or not; for the CPU 0, which stands for any amount."""
    return 0 if device == "cpu" else torch.cuda.get_device_properties(device).total_memory


def device_kind(device: str) -> str:
    """The kind of device and the versions of the libraries, as far as they decide the last bit of a result."""
    if device == "cpu":
        own = [f"native {native.KIND}"] if native.KIND else []
        kind = " ".join(("cpu", platform.machine(), torch.backends.cpu.get_cpu_capability(), *native.BFLOAT16, *own))
    else:
        kind = f"cuda {torch.cuda.get_device_name(device)} {torch.version.cuda}"
    return f"{kind} torch {torch.__version__} {LIBRARY}"


stream_of = functools.cache(torch.cuda.Stream)
"""The stream of all clips of a GPU: they take turns, and each stream more costs 66 MiB of cuBLAS's memory."""


def compiled(network: Callable[..., Tensor], how: str, device: torch.device) -> Callable[..., Tensor]:
    """`network` compiled by torch for every shape by itself, which its first call with that shape takes minutes for.

    What is compiled for a shape does not depend on the shapes seen before, and no choice is made by measuring. That a
    call falls back to the network as it is, which would give other bits, is an error.

    Args:
        how: "kernels", or "graphs", which also records each shape as a CUDA graph.

    Raises:
        ValueError: graphs are asked for without a GPU.
    """
    if how == "graphs" and device.type == "cpu":
        raise ValueError("compile must be 'none' or 'kernels' on a CPU, got 'graphs'")
    options = {"deterministic": True, **({"triton.cudagraphs": True} if how == "graphs" else {})}
    made = torch.compile(network, dynamic=False, options=options)

    def call(*inputs) -> Tensor:
        limits = {"recompile_limit": 10**6, "accumulated_recompile_limit": 10**6, "fail_on_recompile_limit_hit": True}
        with torch._dynamo.config.patch(**limits):
            return made(*inputs)

    return call


def recipe_of(settings: Settings, sampler: Sampler) -> Recipe:
    """What the planner knows of `settings`.

    Raises:
        ValueError: a guided step is to reuse the features of one without guidance.
    """
    recipe = Recipe(
        settings.steps, sampler.history, frozenset(settings.propagation_steps), settings.propagation_radius,
        frozenset(settings.reuse_steps), settings.degrain > 0,
    )  # fmt: skip
    guided = [settings.guided(timestep) for timestep in sampler.timesteps]
    for step in sorted(recipe.reuse):
        if guided[step] and not guided[recipe.origin(step)]:
            raise ValueError(
                f"reuse_steps must leave out the first guided step (guidance_interval={settings.guidance_interval} "
                f"begins after step {recipe.origin(step)}), got {settings.reuse_steps}"
            )
    return recipe


class Networks:
    """`models` on the device and in the dtype of `settings`, for one clip.

    Args:
        models: from `shared_models` for the device and dtype of `settings`; moved to the device.
        settings: with device and dtype resolved.

    Raises:
        ValueError: the model has not the kind of VAE the settings ask for.
        ModelError: the model has no flow weights although the settings ask for them.
    """

    def __init__(self, models: Models, settings: Settings):
        self.models, self.settings = models, settings
        self.device = torch.device(settings.device)
        self.dtype = TORCH_DTYPES[settings.dtype]
        self.latent_channels = models.unet.config.out_channels
        self.latent_dtype = torch.float16 if self.dtype is torch.float16 else torch.float32
        self.sampler = Sampler(models.schedule, settings.steps, settings.solver, settings.spacing)
        self.recipe = recipe_of(settings, self.sampler)
        self._kept = 1 + any(settings.guided(self.sampler.timesteps[step]) for step in self.recipe.reuse)
        self._noise = Noise(settings.seed)
        self.worker = worker(settings.device)
        self._schedule = models.low_res_schedule
        self._text = models.text
        self._unet = models.unet
        self._vae = models.tiny_vae if settings.tiny_vae else models.video_vae if settings.video_vae else models.vae
        if self._vae is None and settings.tiny_vae:
            raise ValueError("tiny_vae must be False for this model: it has no folder vae_tiny")
        if self._vae is None:
            has = "video" if models.video_vae is not None else "image"
            raise ValueError(f"video_vae must be {not settings.video_vae} for this model: it has only the {has} VAE")
        self._check_noise_level()
        self._decoder_dtype = decoder_dtype(settings.dtype)
        self._unet.to(self.device)
        self._vae.to(self.device)
        self._stream = None if self.device.type == "cpu" else stream_of(settings.device)
        self._call, self._decoder = self._unet, self._vae.decode
        if settings.compile != "none":
            self._call, self._decoder = (
                compiled(network, settings.compile, self.device) for network in (self._call, self._decoder)
            )
        self._flow = RAFT(models.raft_network().to(self.device)) if settings.flow == "raft" else DIS()
        self._contexts: OrderedDict[tuple[str, bool], object] = OrderedDict()
        self.digest = "|".join(
            (models.digest, settings.digest(), device_kind(settings.device), f"{settings.threads} threads")
        )

    def transposed(self) -> "Networks":
        """The same for frames whose rows and columns are swapped: then those of tiles are, too."""
        tile = self.settings.tile[::-1]
        return self if tile == self.settings.tile else type(self)(self.models, replace(self.settings, tile=tile))

    def _check_noise_level(self) -> None:
        unet, decoder = self._unet.config, self._vae.config
        known = [self._schedule.num_train_timesteps, unet.num_class_embeds, unet.max_noise_level + 1]
        known += [getattr(decoder, "num_class_embeds", None) or math.inf]
        if self.settings.noise_level >= (levels := min(known)):
            raise ValueError(
                f"noise_level must be between 0 and {levels - 1} for this model, got {self.settings.noise_level}"
            )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Encode the prompts and the negative prompt, so that one that cannot be used is an error now."""
        guided = any(map(self.settings.guided, self.sampler.timesteps))
        for prompt in (*prompts, self.settings.negative_prompt):
            self.worker.run(functools.partial(self._states, prompt, guided))

    def _states(self, prompt: str, guided: bool) -> Tensor:
        texts = (self.settings.negative_prompt, prompt) if guided else (prompt,)
        return self._text.encode_all(texts, self.models.unet.config.cross_attention_dim)

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The context in which everything of this class, and of the engine, is to run: on a GPU vsuav's stream."""
        with exact_arithmetic(self.device), torch.cuda.stream(self._stream):
            yield

    def noise(self, stream: str, frame: int, shape: tuple[int, ...]) -> Tensor:
        """Noise of a frame, float32 `shape`, to be read only; `stream` as in `noise.STREAMS`."""
        return self._noise(stream, frame, shape)

    def window(
        self, step: int, frames: Sequence[int], latents: Sequence[Tensor], low_res: Sequence[Tensor], prompt: str,
        deep: Tensor | None = None,
    ) -> Tensor:
        """The guided prediction of one window, one U-Net call of one shape.

        Args:
            step: index into the steps.
            frames: absolute numbers of the window's frames.
            latents: "c h w" of each frame before `step`.
            low_res: "3 h w" of each frame, in [-1, 1].
            prompt: of the shot.
            deep: the window's deep features at the step whose features this one reuses, from `window_and_deep`; then
                only the U-Net's outer ring is computed.

        Returns:
            v "t c h w", float32 on the CPU.

        Raises:
            NetworkError: the result is not finite, or the device ran out of memory.
        """
        return self._window(step, frames, latents, low_res, prompt, deep, keep=False)[0]

    def window_and_deep(
        self, step: int, frames: Sequence[int], latents: Sequence[Tensor], low_res: Sequence[Tensor], prompt: str
    ) -> tuple[Tensor, Tensor]:
        """The same, and the deep features "tiles b t h w c" of the window, in the networks' dtype on the CPU.

        b is 2 where the features are reused with guidance, the negative prompt's first.
        """
        v, deep = self._window(step, frames, latents, low_res, prompt, None, keep=True)
        return v, deep[0][None] if len(deep) == 1 else torch.stack(deep)

    def _window(
        self, step: int, frames: Sequence[int], latents: Sequence[Tensor], low_res: Sequence[Tensor], prompt: str,
        deep: Tensor | None, keep: bool,
    ) -> tuple[Tensor, list[Tensor | None]]:
        timestep, level = self.sampler.timesteps[step], self.settings.noise_level
        sample = torch.stack(list(latents), 1)[None]
        clean = torch.stack(list(low_res), 1)[None]
        noise = torch.stack([self.noise("lr", n, tuple(low_res[0].shape)) for n in frames], 1)[None]
        noised = add_noise(self._schedule, clean, noise, level)
        guided = self.settings.guided(timestep)
        context = self._context(prompt, guided)
        height, width = sample.shape[-2:]
        cover = tiles(height, width, self.settings.tile, self.settings.tile_overlap)
        merged, kept = torch.zeros_like(sample, dtype=torch.float32), []
        for i, (tile, weight) in enumerate(zip(cover, blend_weights(cover, height, width), strict=True)):
            area, reused = (..., *tile.crop), None if deep is None else deep[i]
            v, features = self._predict(sample[area], noised[area], timestep, context, guided, frames, reused, keep)
            merged[area] += weight * v
            kept.append(features)
        return merged[0].transpose(0, 1).contiguous(), kept

    def _predict(
        self, sample: Tensor, low_res: Tensor, timestep: int, context: object, guided: bool, frames: Sequence[int],
        deep: Tensor | None, keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The guided prediction of a tile, and its deep features where they are to be kept."""
        batch = 2 if guided else 1
        pair = [self._sent(x, self.dtype).expand(batch, -1, -1, -1, -1) for x in (sample, low_res)]
        time, label = (torch.full((1,), n, device=self.device) for n in (timestep, self.settings.noise_level))
        reused = None if deep is None else deep[-batch:]
        v, kept = self._run(self._reusing, pair[0], time, pair[1], context, label, reused, keep, frames=frames)
        v = v.float().cpu()
        if guided:
            negative, positive = v.split(1)
            v = negative + self.settings.guidance_scale * (positive - negative)
            if getattr(self._vae.config, "fading", False):
                v[:, -1] = positive[0, -1]  # what is to lose its colour is no matter of degree
        return v, kept

    def _reusing(
        self, x: Tensor, time: Tensor, low_res: Tensor, context: object, label: Tensor, deep: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Call the U-Net with features that lie on the CPU, "b t h w c", and bring those to be kept there."""
        deep = None if deep is None else self._sent(deep).movedim(-1, 1)
        result = self._call(x, time, low_res, context, label, deep, keep)
        return (result[0], result[1][-self._kept :].movedim(1, -1).cpu()) if keep else (result, None)

    def deep_bytes(self, height: int, width: int) -> int:
        """Bytes of a frame's part of a window's deep features, for input frames of this size."""
        cover = tiles(height, width, self.settings.tile, self.settings.tile_overlap)
        pixels = sum((t.bottom - t.top) * (t.right - t.left) for t in cover)
        return self._kept * pixels * self._unet.config.deep_channels * self.dtype.itemsize

    def decode(
        self, frames: Sequence[int], latents: Sequence[Tensor], low_res: Sequence[Tensor],
        beside: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Decode one chunk: "t 3 4h 4w", float32 on the CPU in [0, 1], with the colour fix.

        Args:
            frames: absolute numbers of the chunk's frames.
            latents: "c h w" of each frame after the last step.
            low_res: "3 h w" of each frame, in [-1, 1].
            beside: "6 h w" of each frame, what those before and after would change in it; None: nothing.
        """
        z = torch.stack(list(latents), 1)[None].float() / self._vae.config.scaling_factor
        clean = torch.stack(list(low_res), 1)[None]
        told = beside is not None and getattr(self._vae.config, "enlarger_beside", False)
        picture = self._decode(z, clean, torch.stack(list(beside), 1)[None] if told else None, frames)
        with self._at_work(frames, *z.shape[-2:]):
            picture = picture.clamp_(-1, 1)
            if self.settings.color_fix != "none":
                style = bicubic(clean[0].transpose(0, 1).to(picture.device), 4)
                picture = (adain if self.settings.color_fix == "adain" else wavelet)(picture, style)
            return picture.div_(2).add_(0.5).clamp_(0, 1).cpu()

    def _decode(self, z: Tensor, low_res: Tensor, beside: Tensor | None, frames: Sequence[int]) -> Tensor:
        height, width = z.shape[-2:]
        rows = band_rows(height, width, self.settings.tile)
        decode = self._decoder
        if rows < height and not self.settings.tiny_vae:  # the tiny one sees frame by frame, which is little
            banded = BandedDecoder(self._vae.decoder, rows, self._home(len(frames), height, width))
            decode = functools.partial(self._vae.decode, decoder=banded)
        level = torch.full((1,), self.settings.noise_level, device=self.device)
        seen = [self._sent(x) for x in (low_res, beside) if x is not None]
        decoded = self._run(decode, self._sent(z, self._decoder_dtype), seen[0], level, *seen[1:], frames=frames)
        return decoded[0].transpose(0, 1).float()

    def _home(self, count: int, height: int, width: int) -> torch.device:
        """Where a chunk's activations lie while it is decoded in bands: on a device that holds four of the largest."""
        if self.device.type == "cpu":
            return self.device
        config = self._vae.config
        channels = max(config.block_out_channels[:2])
        largest = 16 * height * width // config.unshuffle**2 * count * channels * self._decoder_dtype.itemsize
        return self.device if 8 * largest <= device_memory(self.settings.device) else torch.device("cpu")

    def _sent(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x on the device, through pinned memory where that is another one."""
        x = x if dtype is None else x.to(dtype)
        return x if self.device.type == "cpu" else x.pin_memory().to(self.device, non_blocking=True)

    def _run(self, network, *inputs, frames: Sequence[int]):
        """Call `network` and refuse what is not finite; of several results the first is looked at."""
        with self._at_work(frames, *inputs[0].shape[-2:]):
            result = network(*inputs)
        first = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(first.sum(dtype=torch.float32)):  # one pass; asking every value takes three
            name = str(first.dtype).removeprefix("torch.")
            advice = "another model, or a clip without NaN" if name == "float32" else "dtype='float32'"
            raise NetworkError(f"frames {frames[0]} to {frames[-1]} came out not finite in {name}; try {advice}")
        return result

    @contextlib.contextmanager
    def _at_work(self, frames: Sequence[int], height: int, width: int) -> Iterator[None]:
        """Compute with the settings' threads; a memory that is full is an error that names a smaller tile."""
        try:
            with working_threads(self.settings.threads):
                yield
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            smaller = max(64, min(side for side in (height, width, *self.settings.tile) if side) // 2 // 32 * 32)
            where = f"frames {frames[0]} to {frames[-1]} at {width}x{height}"
            raise NetworkError(f"{self.device} has too little memory for {where}; try tile={smaller}") from error

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        """Flows between two frames "3 h w" in [-1, 1]: "4 h w", first forward then backward (x, y), in pixels."""
        with working_threads(self.settings.threads):
            return torch.cat([flow.float().cpu() for flow in self._flow(first, second)])

    def _context(self, prompt: str, guided: bool) -> object:
        key = (prompt, guided)
        if key not in self._contexts:
            states = self._states(prompt, guided).to(self.device, self.dtype)
            with working_threads(self.settings.threads):
                self._contexts[key] = self._unet.prepare(states)
            while len(self._contexts) > 32:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(key)
        return self._contexts[key]


def choose(given: Mapping[str, Any], width: int, height: int) -> tuple[Models, Settings]:
    """The models and the settings that the arguments of `upscale` mean for a clip of `width` x `height` pixels.

    Args:
        given: values by the names of `upscale`'s parameters; what is missing or None is left to preset and model.

    Raises:
        ValueError: one line that names the parameter, the value, and what would work. ModelError is one.
    """
    automatic = dict.fromkeys(("device", "dtype", "threads", "tile", "flow"), "auto")
    wanted = automatic | {name: value for name, value in given.items() if value is not None}
    device = auto_device(wanted["device"])
    dtype = auto_dtype(wanted["dtype"], device)
    fixed = {
        "device": device, "dtype": dtype, "threads": auto_threads(wanted["threads"]),
        "tile": auto_tile(wanted["tile"], width, height, device, device_memory(device)),
    }  # fmt: skip
    models = shared_models(given.get("model"), device, dtype)
    if wanted["flow"] == "auto":
        fixed["flow"] = "raft" if models.raft is not None and device != "cpu" else "dis"
    return models, resolve({**wanted, **fixed}, models.defaults, models.presets)


_models: dict[tuple[str, str, str], tuple[object, Models]] = {}
_models_lock = threading.Lock()


def shared_models(model: str | Path | None, device: str, dtype: str) -> Models:
    """The models of a folder, loaded once in this process for each device and dtype, and shared by all clips.

    A folder whose files changed is loaded again.
    """
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(TORCH_DTYPES)}, got {dtype!r}")
    folder = locate(model)
    stats = [(path, path.stat()) for path in files(folder)]
    stamp = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    key = (str(folder.resolve()), device, dtype)
    with _models_lock:
        if key not in _models or _models[key][0] != stamp:
            models = load(folder, TORCH_DTYPES[dtype], decoder_dtype(dtype))
            for network in (models.unet, models.vae, models.video_vae, models.tiny_vae):
                if network is not None:
                    lay_out(network)
            _models[key] = (stamp, models)
        return _models[key][1]


def unload() -> None:
    """Let go of all weights that are shared between clips; clips in use keep theirs until they are freed."""
    with _models_lock:
        _models.clear()
    native.unload()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
