"""What can be set: one frozen dataclass, the check of every value, presets, and the digest that keys stored latents."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any

from vsuav import openmp
from vsuav.ensemble import ORIENTATIONS

MAX_NOISE_LEVEL = 350
SOLVERS = ("ddim", "dpm++2m", "unipc")
SPACINGS = ("leading", "trailing")
FLOWS = ("auto", "dis", "raft")
COLOR_FIXES = ("none", "adain", "wavelet")
COMPILE = ("none", "kernels", "graphs")
DTYPES = ("auto", "float32", "bfloat16", "float16")

PRESETS: dict[str, dict[str, Any]] = {
    "reference": {
        "steps": 30, "solver": "ddim", "spacing": "leading", "guidance_scale": 6.0, "guidance_interval": (0.0, 1.0),
        "propagation_steps": (24, 26, 28), "color_fix": "none",
    },
    "balanced": {
        "steps": 15, "solver": "dpm++2m", "spacing": "trailing", "guidance_scale": 6.0,
        "guidance_interval": (0.2, 1.0), "propagation_steps": (11, 13),
    },
    "fast": {
        "steps": 8, "solver": "dpm++2m", "spacing": "trailing", "guidance_scale": 5.0,
        "guidance_interval": (0.3, 1.0), "propagation_steps": (6,),
    },
    "preview": {
        "steps": 4, "solver": "dpm++2m", "spacing": "trailing", "guidance_scale": 1.0,
        "guidance_interval": (0.0, 1.0), "propagation_steps": (),
    },
}  # fmt: skip
"""Values a preset gives to what the caller left at None. A model may bring presets of its own under the same names."""

FALLBACK: dict[str, Any] = {
    "prompt": "", "negative_prompt": "", "preset": "balanced", "noise_level": 120, "video_vae": True,
    "color_fix": "wavelet", "spacing": None, "guidance_interval": (0.0, 1.0), "solver": "ddim",
    "guidance_scale": 1.0, "propagation_steps": (), "reuse_steps": (), "degrain": 0.0,
}  # fmt: skip

NOT_IN_DIGEST = frozenset(
    {
        "prompts",
        "device",
        "threads",
        "video_vae",
        "tiny_vae",
        "degrain",
        "color_fix",
        "ensemble",
        "scene_detect",
        "scene_threshold",
        "max_shot",
    }
)
"""Prompts, cuts and turned frames are keyed frame by frame, device and threads with the networks; the decoder comes
after latents."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a pixel besides the clip and the weights, with nothing left open.

    `prompts` are (first frame, prompt) in rising order from frame 0; `propagation_steps` and `reuse_steps` are indices
    into the steps; `guidance_interval` bounds timestep/1000; `tile` is (width, height) in input pixels, 0 for the whole
    axis.
    """

    prompts: tuple[tuple[int, str], ...] = ((0, ""),)
    negative_prompt: str = ""
    steps: int = 30
    solver: str = "ddim"
    spacing: str | None = None
    guidance_scale: float = 6.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    noise_level: int = 120
    temperature: float = 1.0
    propagation_steps: tuple[int, ...] = ()
    propagation_radius: int = 16
    reuse_steps: tuple[int, ...] = ()
    flow: str = "dis"
    degrain: float = 0.0
    video_vae: bool = True
    tiny_vae: bool = False
    color_fix: str = "none"
    ensemble: int = 1
    scene_detect: bool = True
    scene_threshold: float = 0.1
    max_shot: int | None = None
    tile: tuple[int, int] = (0, 0)
    tile_overlap: int = 16
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    compile: str = "none"

    def digest(self) -> str:
        """Hexadecimal digest of the fields that decide a latent, the same in every process."""
        values = {name: value for name, value in asdict(self).items() if name not in NOT_IN_DIGEST}
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()

    def prompt_at(self, frame: int) -> str:
        """The prompt given for `frame` (a frame property may override it)."""
        return next(prompt for first, prompt in reversed(self.prompts) if first <= frame)

    def guided(self, timestep: int) -> bool:
        """Whether classifier-free guidance acts at `timestep` of 1000."""
        low, high = self.guidance_interval
        return self.guidance_scale > 1 and low <= timestep / 1000 <= high


def resolve(
    given: Mapping[str, Any], defaults: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]]
) -> Settings:
    """Fill what `given` leaves at None from the preset, then the model's defaults, then `FALLBACK`; check every value.

    Where the caller gives the steps alone, the preset's propagation steps keep their place in proportion. Its reuse
    steps belong to its own steps and guidance interval: a caller who gives one of these has none but those he gives.

    Args:
        given: the caller's values by the names of `upscale`'s parameters; None = not given.
        defaults: of the model, by the same names (may name its `preset`).
        presets: of the model; they replace those of `PRESETS` with the same name.

    Raises:
        ValueError: one line that names the parameter, the value, and what would work.
    """
    known = {**PRESETS, **presets}
    named = (source.get("preset") for source in (given, defaults, FALLBACK))
    preset = _choice("preset", next(name for name in named if name is not None), tuple(known))
    values = {**FALLBACK, **defaults, **known[preset]}
    if is_real(given.get("steps")) and given.get("propagation_steps") is None:
        parts = given["steps"] / values.get("steps", Settings.steps)
        values["propagation_steps"] = [math.floor(index * parts) for index in values["propagation_steps"]]
    if any(given.get(name) is not None for name in ("steps", "guidance_interval")):
        values["reuse_steps"] = ()
    values.update({name: value for name, value in given.items() if value is not None})
    values["prompts"] = _prompts(values.pop("prompt"))
    allowed = {field.name for field in fields(Settings)}
    return check(Settings(**{name: _plain(value) for name, value in values.items() if name in allowed}))


def check(settings: Settings) -> Settings:
    """Return `settings` with numbers in their proper types, or raise ValueError naming the first bad value."""
    s = settings
    _require(_is_text(s.negative_prompt), "negative_prompt must be a string", s.negative_prompt)
    values: dict[str, Any] = {
        "steps": _integer("steps", s.steps, 1, 1000),
        "solver": _choice("solver", s.solver, SOLVERS),
        "spacing": None if s.spacing is None else _choice("spacing", s.spacing, SPACINGS),
        "guidance_scale": _real("guidance_scale", s.guidance_scale, 0, 100),
        "noise_level": _integer("noise_level", s.noise_level, 0, MAX_NOISE_LEVEL),
        "temperature": _real("temperature", s.temperature, 0, 1),
        "propagation_radius": _integer("propagation_radius", s.propagation_radius, 1, 1000),
        "flow": _choice("flow", s.flow, FLOWS),
        "degrain": _real("degrain", s.degrain, 0, 1),
        "color_fix": _choice("color_fix", s.color_fix, COLOR_FIXES),
        "scene_threshold": _real("scene_threshold", s.scene_threshold, 0, 1),
        "tile_overlap": _integer("tile_overlap", s.tile_overlap, 0, 4096),
        "seed": _integer("seed", s.seed, 0, 2**64 - 1),
        "dtype": _choice("dtype", s.dtype, DTYPES),
        "threads": _integer("threads", s.threads, 1, 1024),
        "video_vae": _boolean("video_vae", s.video_vae),
        "tiny_vae": _boolean("tiny_vae", s.tiny_vae),
        "compile": _choice("compile", s.compile, COMPILE),
        "scene_detect": _boolean("scene_detect", s.scene_detect),
    }
    interval = s.guidance_interval
    _require(
        isinstance(interval, tuple) and len(interval) == 2 and all(is_real(v) for v in interval)
        and 0 <= interval[0] <= interval[1] <= 1,
        "guidance_interval must be (low, high) with 0 <= low <= high <= 1", interval,
    )  # fmt: skip
    values["guidance_interval"] = (float(interval[0]), float(interval[1]))
    for name, first in (("propagation_steps", 0), ("reuse_steps", 1)):
        indices, last = getattr(s, name), values["steps"] - 1
        _require(isinstance(indices, tuple), f"{name} must be a list of step indices", indices)
        _require(last >= first or not indices, f"{name} must be empty for steps={values['steps']}", indices)
        values[name] = tuple(sorted({_integer(name, index, first, last, "each of ") for index in indices}))
    copies = is_whole(s.ensemble) and s.ensemble in ORIENTATIONS
    _require(copies, f"ensemble must be one of {', '.join(map(str, ORIENTATIONS))}", s.ensemble)
    values["ensemble"] = int(s.ensemble)
    if s.max_shot is not None:
        fits = is_whole(s.max_shot) and s.max_shot >= 24 and s.max_shot % 6 == 0
        _require(fits, "max_shot must be a multiple of 6, at least 24", s.max_shot)
        values["max_shot"] = int(s.max_shot)
    _require(
        isinstance(s.tile, tuple) and len(s.tile) == 2
        and all(is_whole(v) and (v == 0 or v >= 32) for v in s.tile),
        "tile must be 'auto', 0, or (width, height) in input pixels of at least 32", s.tile,
    )  # fmt: skip
    values["tile"] = (int(s.tile[0]), int(s.tile[1]))
    _require(
        all(v == 0 or v > 2 * s.tile_overlap for v in s.tile),
        f"tile must be larger than twice tile_overlap={s.tile_overlap}", s.tile,
    )  # fmt: skip
    return Settings(**{**{field.name: getattr(s, field.name) for field in fields(Settings)}, **values})


def auto_threads(threads: int | str) -> int:
    """The thread count: as given, or for ``"auto"`` the number of CPU cores this process may run on.

    Raises:
        ValueError: OpenMP would give fewer.
    """
    most = openmp.most_threads()
    if isinstance(threads, str) and threads == "auto":
        return min(openmp.cores(), most)
    enough = not is_whole(threads) or threads <= most
    _require(enough, f"threads must be at most {most}, which OMP_THREAD_LIMIT or OMP_MAX_ACTIVE_LEVELS allows", threads)
    return threads


GPU_TILES = ((75, 704), (38, 480), (22, 352), (15, 288), (11, 224), (7, 160), (0, 128))
"""GiB a GPU has at least -> side of a tile whose activations in the released U-Net, guided, fit beside its weights."""


CPU_WHOLE, CPU_TILE = 416 * 416, 256
"""Pixels of a frame that a CPU still does whole, and side of the tiles of larger ones: the U-Net's attention costs the
square of a tile's pixels, and at 256 it is a third of the bundled model's time."""


def auto_tile(tile: Any, width: int, height: int, device: str, memory: int = 0) -> tuple[int, int]:
    """Tile size in input pixels: as given, or from a fixed table of the device, its memory and the frame size.

    On a GPU frames of more pixels than a tile of `GPU_TILES` are cut, on a CPU frames of more than `CPU_WHOLE`.

    Args:
        memory: bytes that the device has in all.
    """
    if isinstance(tile, str) and tile == "auto":
        side = CPU_TILE if device == "cpu" else next(side for least, side in GPU_TILES if memory >= least << 30)
        whole = CPU_WHOLE if device == "cpu" else side * side
        return (0, 0) if width * height <= whole else (min(side, width), min(side, height))
    if is_whole(tile):
        return tile, tile
    return _plain(tile)


def _prompts(prompt: Any) -> tuple[tuple[int, str], ...]:
    if _is_text(prompt):
        return ((0, prompt),)
    wanted = "prompt must be a string or a list of (first frame, prompt)"
    _require(isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes) and len(prompt) > 0, wanted, prompt)
    for item in prompt:
        _require(
            isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2
            and is_whole(item[0]) and item[0] >= 0 and _is_text(item[1]),
            wanted, item,
        )  # fmt: skip
    firsts = [item[0] for item in prompt]
    _require(firsts == sorted(set(firsts)), "prompt must list rising first frames", firsts)
    rows = tuple((int(first), text) for first, text in prompt)
    return rows if firsts[0] == 0 else ((0, rows[0][1]), *rows[1:])


def _plain(value: Any) -> Any:
    """Lists become tuples, so that the settings are hashable."""
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple | range | set) else value


def is_whole(value: Any) -> bool:
    """Is it a whole number, Python's or NumPy's? (Python counts True as 1; here it is none.)"""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Is it a finite number that a float can hold?"""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_text(value: Any) -> bool:
    """Is it a string that can be written? (One with half of a surrogate pair cannot.)"""
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def _require(condition: bool, wanted: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{wanted}, got {got!r}")


def _integer(name: str, value: Any, low: int, high: int, prefix: str = "") -> int:
    kind = "" if is_whole(value) else "a whole number "
    _require(not kind and low <= value <= high, f"{prefix}{name} must be {kind}between {low} and {high}", value)
    return int(value)


def _real(name: str, value: Any, low: float, high: float) -> float:
    kind = "" if is_real(value) else "a number "
    _require(not kind and low <= value <= high, f"{name} must be {kind}between {low} and {high}", value)
    return float(value)


def _choice(name: str, value: Any, choices: Sequence[str]) -> str:
    _require(isinstance(value, str) and value in choices, f"{name} must be one of {', '.join(choices)}", value)
    return value


def _boolean(name: str, value: Any) -> bool:
    _require(isinstance(value, bool), f"{name} must be True or False", value)
    return value
