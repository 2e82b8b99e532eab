"""Where the files of a model lie: a folder, the name of a bundled model, or a hub id; which files are looked for in it.

Nothing here reads weights.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vsuav.weights import ModelError

SAFETENSORS = "diffusion_pytorch_model.safetensors"
IN_DIFFUSERS = ("config.json", SAFETENSORS, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin")
PARTS = {
    "unet": (
        ("unet", "unet_video_config.json", "unet_video.bin", "unet_video.safetensors"),
        ("unet", *IN_DIFFUSERS),
    ),
    "vae": (
        ("vae", "vae_3d_config.json", "vae_3d.bin", "vae_3d.safetensors"),
        ("vae", *IN_DIFFUSERS),
    ),
    "video_vae": (
        ("vae", "vae_video_config.json", "vae_video.bin", "vae_video.safetensors"),
        ("vae_video", *IN_DIFFUSERS),
    ),
    "tiny_vae": (("vae_tiny", *IN_DIFFUSERS),),
}
"""Part -> the places it may lie in: folder, config, and names of the weights in order of preference."""
RAFT_FILES = ("propagator/raft-things.safetensors", "propagator/raft-things.pth")
HUB_FILES = (
    "model_index.json", "prompts.safetensors", "scheduler/*", "low_res_scheduler/*", "tokenizer/*",
    "text_encoder/config.json", "text_encoder/model.safetensors",
    *(f"{place[0]}/{name}" for places in PARTS.values() for place in places for name in place[1:3]), *RAFT_FILES,
)  # fmt: skip
"""What a hub id has to bring: not the single-file and half-precision copies that lie beside it."""


@dataclass
class Part:
    """One network's files."""

    config_path: Path
    weights_path: Path
    config: dict[str, Any]


def bundled(name: str = "mini") -> Path | None:
    """The folder of a model that came with the package (or lies in the checkout), None if there is none."""
    here = Path(__file__).resolve().parent
    return next((p for p in (here / "models" / name, here.parent / "models" / name) if p.is_dir()), None)


def locate(model: str | Path | None) -> Path:
    """The folder a `model` argument means: a folder, a bundled model's name, or a hub id.

    A local folder always wins. A hub id ("owner/name") is looked for in the hub's cache first, so what was fetched once
    works offline; only then is it fetched.
    """
    if model is None:
        if (folder := bundled()) is None:
            raise ModelError("the bundled model models/mini is not installed: give model= a folder or a hub id")
        return folder
    if not isinstance(model, str | Path) or not str(model).strip():
        raise ModelError(f"model must be a folder, a hub id or None, got {model!r}")
    name = str(model)
    try:
        path = Path(model).expanduser().absolute()  # vspipe changes folders behind a script
        if path.is_dir():
            return path
        there = path.exists()
    except RuntimeError as error:
        raise ModelError(f"model folder {name} does not exist ({str(error).rstrip('.')})") from None
    except OSError as error:
        raise ModelError(f"model folder {name} cannot be read ({error.strerror})") from error
    if there:
        raise ModelError(f"{name} is a file: a model is a folder ({_looked_for()})")
    if re.fullmatch(r"[\w-]+", name) and (folder := bundled(name)):
        return folder
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or Path(Path(name).parts[0]).exists():
        raise ModelError(f"model folder {name} does not exist; a model is a folder ({_looked_for()}) or a hub id")
    return fetch(name, cached=True)


def files(folder: Path) -> Iterator[Path]:
    """The files there are of all that `checkpoint.load` may read of a folder."""
    places = [place for part in PARTS.values() for place in part]
    names = [f"{inner}/{file}" for inner, *each in places for file in each]
    names += ["model_index.json", "prompts.safetensors", *RAFT_FILES]
    names += [f"{name}/scheduler_config.json" for name in ("scheduler", "low_res_scheduler")]
    yield from (folder / name for name in names if (folder / name).is_file())
    yield from text_files(folder)


def text_files(folder: Path) -> list[Path]:
    """The files of a folder's text encoder and tokenizer."""
    paths = (path for inner in ("text_encoder", "tokenizer") for path in (folder / inner).rglob("*"))
    return sorted(path for path in paths if path.is_file())


def fetch(name: str, cached: bool = False) -> Path:
    """The folder of a hub id in the hub's cache, completed from the network; with `cached` only if that is needed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(offline: bool, files: tuple[str, ...] = HUB_FILES) -> Path:
        return Path(snapshot_download(name, allow_patterns=list(files), local_files_only=offline))

    if cached:
        try:
            folder = snapshot(offline=True)
            find_parts(folder)
            return folder
        except (LocalEntryNotFoundError, ModelError):
            pass
    try:
        folder = snapshot(offline=False)
        text = folder / "text_encoder"
        if (text / "config.json").is_file() and not (text / "model.safetensors").is_file():
            snapshot(False, ("text_encoder/pytorch_model.bin",))
        return folder
    except Exception as error:  # network, authorisation, an id that does not exist: whatever the client raises
        said = " ".join(str(error).split())[:160]
        raise ModelError(f"{name} is no folder, not in the hub's cache, and cannot be fetched: {said}") from None


def _looked_for() -> str:
    return "; ".join(
        " or ".join(f"{place[0]}/{place[2]}" for place in places) for places in (PARTS["unet"], PARTS["vae"])
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError with the file's path and what is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return content


def find_parts(folder: Path) -> dict[str, Part]:
    """The networks' files in a folder, by part. Raises ModelError naming what is missing."""
    parts = {}
    for name, places in PARTS.items():
        for inner, config, *weights in places:
            found = next((folder / inner / file for file in weights if (folder / inner / file).is_file()), None)
            if found:
                parts[name] = Part(folder / inner / config, found, read_json(folder / inner / config))
                break
    for name in ("unet", "vae"):
        if name not in parts and not (name == "vae" and "video_vae" in parts):
            wanted = " or ".join(f"{place[0]}/{file}" for place in PARTS[name] for file in place[2:])
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise ModelError(f"{folder} is no model: looked for {wanted}; the folder holds {there}")
    return parts
