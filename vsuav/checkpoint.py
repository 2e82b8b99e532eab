"""Which kind of model a folder holds, and the model in it.

Four kinds are known, told apart by file names and by the names of tensors:

    uav             the released Upscale-A-Video folder: unet/unet_video.bin, vae/vae_3d.bin, vae/vae_video.bin, …
    uav-diffusers   the same networks as unet/, vae/, vae_video/, each config.json + diffusion_pytorch_model.safetensors
    sd-x4           the Stable Diffusion x4 upscaler, an image model: gets temporal layers that pass frames through
    vsuav           this project's own models: as uav-diffusers, with defaults and presets in model_index.json

Every tensor must fit: missing, unexpected and misshapen ones are errors. Networks are built without memory (on the meta
device) and then given the tensors of the file, so that loading needs the weights about once.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vsuav import flow
from vsuav.attention import Rotary
from vsuav.folders import RAFT_FILES, SAFETENSORS, Part, find_parts, locate, read_json, text_files
from vsuav.schedule import Schedule
from vsuav.settings import resolve
from vsuav.text import CLIP, MiniLM, TextEncoder, read_prompts
from vsuav.tiny import TinyConfig, TinyVAE
from vsuav.unet import UNetConfig, UNetVideo, temporal_parameters
from vsuav.vae import VAE, VAEConfig
from vsuav.weights import ModelError, bare, digest_tensors, read_tensors

__all__ = ["ModelError", "Models", "convert", "load"]

UAV_DEFAULTS = {
    "prompt": "best quality, extremely detailed", "negative_prompt": "blur, worst quality", "noise_level": 120,
    "preset": "reference", "color_fix": "none",
}  # fmt: skip
IMAGE_DEFAULTS = {"prompt": "", "negative_prompt": "", "noise_level": 20, "preset": "reference", "color_fix": "none"}
VAE_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
"""Names of the VAEs' attention in newer diffusers -> in the released files, which are ours."""
FREQUENCIES = "temporal_rotary_emb.freqs"
STARTS_AT_ZERO = ("shift_conv.", "resblock_temporal.conv2.", "attn_temporal.to_out.0.", "relative_attention_bias.")
"""Temporal layers of an image model: what their branches end in is zero, so that they pass their input on."""


@dataclass
class Models:
    """Everything in a model folder, ready to be used; weights on the CPU."""

    kind: str
    path: Path
    unet: UNetVideo
    vae: VAE | None
    video_vae: VAE | None
    schedule: Schedule
    low_res_schedule: Schedule
    text: TextEncoder
    raft: Path | None
    defaults: dict[str, Any]
    presets: dict[str, dict[str, Any]]
    digest: str
    """Hexadecimal; the same for the same tensors and settings, in whichever layout they lie."""
    tiny_vae: TinyVAE | None = None

    def raft_network(self) -> nn.Module:
        """The optical flow network of the folder, read when it is first needed."""
        if self.raft is None:
            raise ModelError(f"{self.path} has no {RAFT_FILES[1]}: use flow='dis', which needs no weights")
        try:
            return flow.raft_network(read_tensors(self.raft))
        except ValueError as error:
            raise ModelError(str(error) if isinstance(error, ModelError) else f"{self.raft}: {error}") from None


def _kind(folder: Path, unet: Part, names: Mapping[str, Any]) -> str:
    """Which of the four kinds it is, from the names of files and tensors."""
    index = folder / "model_index.json"
    if os.path.lexists(index) and read_json(index).get("_class_name") == "VsuavPipeline":
        return "vsuav"
    if any(name.startswith(("down_temp_blocks.", "up_temp_blocks.", FREQUENCIES)) for name in names):
        return "uav" if unet.weights_path.name.startswith("unet_video.") else "uav-diffusers"
    channels = names["conv_in.weight"].shape[1:2] if "conv_in.weight" in names else ()
    channels = channels[0] if channels else None
    if channels != 7 or "class_embedding.weight" not in names:
        raise ModelError(
            f"{unet.weights_path} is neither a video U-Net (looked for {FREQUENCIES}) nor the U-Net of an x4 upscaler "
            f"(looked for class_embedding.weight and a conv_in.weight of 7 input channels, found {channels})"
        )
    return "sd-x4"


def canonical(tensors: dict[str, Tensor], network: nn.Module, path: Path, optional: set[str] = frozenset()) -> dict:
    """The tensors of a file under our names and in our shapes, taken out of `tensors`, which is empty afterwards.

    Attention of older and newer diffusers is one thing under two names, as linear layer or as 1x1 convolution. The
    rotary frequencies may be stored for every temporal attention: all copies must be equal, one is kept. Names in
    `optional` may be missing; anything else that does not fit is an error.
    """
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    copies = [name for name in wanted if name.endswith("rotary_emb.freqs")]
    fitted, unexpected, misshapen = {}, [], []
    for name in list(tensors):
        value, ours = tensors.pop(name), name
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise ModelError(f"{path}: {name} is of type {kind}: weights must be floating point, not quantised")
        if name not in wanted:
            for theirs, mine in VAE_NAMES.items():
                if name.replace(theirs, mine) in wanted:
                    ours = name.replace(theirs, mine)
        if ours not in wanted or ours in fitted:
            unexpected.append(name)
            continue
        shape, given = wanted[ours], tuple(value.shape)
        if given != shape and (given == (*shape, 1, 1) or (*given, 1, 1) == shape):
            value = value.reshape(shape)
        if tuple(value.shape) != shape:
            misshapen.append(f"{name} is {given}, should be {shape}")
        fitted[ours] = value
    stored = [name for name in copies if name in fitted]
    for name in stored[1:]:
        if not torch.equal(fitted[name], fitted[stored[0]]):
            raise ModelError(f"{path}: {name} differs from {stored[0]}, but they must be copies of one tensor")
    if stored:
        frequencies = fitted[stored[0]]
        fitted = {name: value for name, value in fitted.items() if name not in copies}
        fitted[FREQUENCIES] = frequencies
    missing = sorted(wanted.keys() - fitted.keys() - optional - (set(copies) - {FREQUENCIES}))
    problems = [
        f"{len(names)} {what}, first {', '.join(sorted(names)[:3])}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise ModelError(f"{path} does not fit its configuration: tensors {'; '.join(problems)}")
    return fitted


def passing_on(names: set[str], network: nn.Module) -> dict[str, Tensor]:
    """Values for temporal layers that an image model lacks: they pass frames through, and can be trained from there."""
    generator, values = torch.Generator().manual_seed(0), {}
    for name, parameter in network.named_parameters():
        shape, layer = parameter.shape, name.rsplit(".", 2)[-2]
        if name not in names:
            continue
        if name == FREQUENCIES:
            with torch.device("cpu"):
                values[name] = Rotary().freqs.detach()
        elif "norm" in layer:
            values[name] = torch.full(shape, float(name.endswith("weight")))
        elif name.endswith("bias") or any(part in name for part in STARTS_AT_ZERO):
            values[name] = torch.zeros(shape)
        else:
            bound = shape[1:].numel() ** -0.5
            values[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return values


def _assign(network: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, path: Path) -> nn.Module:
    """Give a network built on the meta device its tensors, one by one, cast to `dtype`; `tensors` is empty afterwards.

    The rotary frequencies stay float32 whatever the dtype: eight bits are too few for an angle.
    """
    cast = {}
    for name in list(tensors):
        cast[name] = tensors.pop(name).to(torch.float32 if name == FREQUENCIES else dtype).contiguous()
        if not torch.isfinite(cast[name].sum(dtype=torch.float32)):  # one pass; asking every value takes three
            kind = str(cast[name].dtype).removeprefix("torch.")
            raise ModelError(f"{path}: {name} holds values that are not finite in {kind}")
    for name in network.state_dict():
        if name.endswith("rotary_emb.freqs"):
            cast[name] = cast[FREQUENCIES]
    network.load_state_dict(cast, assign=True)
    return network.eval().requires_grad_(False)


def read_part(name: str, part: Part, folder: Path, kind: str = "") -> tuple[str, nn.Module, dict[str, Tensor]]:
    """Kind of the folder, a network of the part's configuration on the meta device, and the tensors of its file.

    The kind is found with the U-Net and given for the other parts. An image model's U-Net lacks the temporal tensors.
    """
    tensors, config, absent = read_tensors(part.weights_path), part.config, set()
    if name == "unet":
        kind = _kind(folder, part, tensors)
        if kind == "sd-x4":
            config = {"temporal_norm_num_groups": config.get("norm_num_groups", 32)} | config
    build, settings = {"unet": (UNetVideo, UNetConfig), "tiny_vae": (TinyVAE, TinyConfig)}.get(name, (VAE, VAEConfig))
    if name == "tiny_vae":
        tensors = {key: value for key, value in tensors.items() if not key.startswith("encoder.")}
    try:
        with bare():
            network = build(settings.from_dict(config))
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ModelError(f"{part.config_path}: {' '.join(str(error).split())}") from None
    if name != "unet" and (network.config.factor, network.config.out_channels) != (4, 3):
        raise ModelError(
            f"{part.config_path}: the decoder must enlarge 4 times and give 3 colours, this one enlarges "
            f"{network.config.factor} times and gives {network.config.out_channels}"
        )
    if name == "unet" and kind == "sd-x4":
        absent = set(temporal_parameters(network))
    return kind, network, canonical(tensors, network, part.weights_path, absent)


def _text(folder: Path, kind: str, width: int, digest: "hashlib.blake2b") -> TextEncoder:
    """The folder's way from prompts to states; what it is made of goes into the digest."""
    stored, compute = {}, None
    if (prompts := folder / "prompts.safetensors").is_file():
        stored = read_prompts(prompts)
        digest_tensors(stored, digest)
    if (folder / "text_encoder" / "config.json").is_file():
        compute = CLIP(folder)
        for path in text_files(folder):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    elif kind == "vsuav" and width == MiniLM.width:
        compute = MiniLM()
        digest.update(b"all-minilm-l6-v2")
    elif not stored:
        raise ModelError(f"{folder} has no text encoder: looked for text_encoder/config.json and prompts.safetensors")
    for prompt, states in stored.items():
        if states.ndim != 2 or states.shape[1] != width:
            raise ModelError(f"{prompts}: states of {prompt!r} are {tuple(states.shape)}, the U-Net takes (l, {width})")
    return TextEncoder(compute, stored)


def _schedule(folder: Path, name: str) -> Schedule:
    path = folder / name / "scheduler_config.json"
    try:
        return Schedule.from_config(read_json(path))
    except (ValueError, TypeError) as error:
        raise error if isinstance(error, ModelError) else ModelError(f"{path}: {error}") from None


def _own_settings(index: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Defaults and presets of one of this project's own models, such that every preset can be used."""
    given = read_json(index).get("vsuav", {})
    try:
        own = {**given}
        defaults, presets = ({**own[name]} if name in own else {} for name in ("defaults", "presets"))
        presets = {name: {**preset} for name, preset in presets.items()}
        for chosen in ({}, *({"preset": name} for name in presets)):
            resolve(chosen, defaults, presets)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f'{index}: "vsuav" must hold defaults and presets by the names of settings: {error}') from None
    return defaults, presets


def latent_channels(network: UNetVideo | VAE | TinyVAE) -> int:
    config = network.config
    return config.out_channels if isinstance(network, UNetVideo) else config.latent_channels


def load(
    model: str | Path | None = None, dtype: torch.dtype = torch.float32, vae_dtype: torch.dtype | None = None
) -> Models:
    """The model in a folder, of a bundled name, or of a hub id; None is the bundled model.

    Args:
        dtype: of the U-Net's weights.
        vae_dtype: of the VAEs' weights, None = the same. (Released VAEs leave the range of float16.)

    Raises:
        ModelError: one line that says what was looked for and what was found.
    """
    folder = locate(model)
    digest, networks, kind = hashlib.blake2b(digest_size=16), {}, ""
    for name, part in find_parts(folder).items():
        kind, network, tensors = read_part(name, part, folder, kind)
        digest.update(f"{name} {network.config}\n".encode())
        digest_tensors(tensors, digest)
        if name == "unet":
            tensors |= passing_on(set(temporal_parameters(network)) - tensors.keys(), network)
        networks[name] = _assign(network, tensors, dtype if name == "unet" else vae_dtype or dtype, part.weights_path)
        channels, wanted = latent_channels(networks[name]), latent_channels(networks["unet"])
        if channels != wanted:
            raise ModelError(f"{part.weights_path}: latents of {channels} channels, the U-Net's have {wanted}")
    schedules = [_schedule(folder, name) for name in ("scheduler", "low_res_scheduler")]
    digest.update(repr(schedules).encode())
    text = _text(folder, kind, networks["unet"].config.cross_attention_dim, digest)
    raft = next((folder / name for name in RAFT_FILES if (folder / name).is_file()), None)
    if raft:
        digest_tensors(read_tensors(raft), digest)
    own, presets = _own_settings(folder / "model_index.json") if kind == "vsuav" else ({}, {})
    defaults = IMAGE_DEFAULTS if kind == "sd-x4" else {} if kind == "vsuav" else UAV_DEFAULTS
    defaults = {**defaults, "video_vae": "vae" not in networks, **own}
    return Models(
        kind=kind,
        path=folder,
        unet=networks["unet"],
        vae=networks.get("vae"),
        video_vae=networks.get("video_vae"),
        schedule=schedules[0],
        low_res_schedule=schedules[1],
        text=text,
        raft=raft,
        defaults=defaults,
        presets=presets,
        digest=digest.hexdigest(),
        tiny_vae=networks.get("tiny_vae"),
    )


def convert(source: str | Path, target: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a model folder again with safetensors only, in diffusers layout, optionally in another dtype.

    The target appears when it is complete; it must not exist before. Without `dtype` its digest stays the same.
    """
    folder, target = locate(source), Path(target)
    if target.exists():
        raise ModelError(f"{target} exists already: give a new folder")
    unfinished = target.with_name(f"{target.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    kind = ""
    for name, part in find_parts(folder).items():
        inner = unfinished / {"video_vae": "vae_video", "tiny_vae": "vae_tiny"}.get(name, name)
        inner.mkdir(parents=True)
        kind, _, tensors = read_part(name, part, folder, kind)
        for key in [key for key in tensors if dtype and key != FREQUENCIES]:
            tensors[key] = tensors[key].to(dtype)
        save_file({key: value.contiguous() for key, value in tensors.items()}, inner / SAFETENSORS)
        (inner / "config.json").write_text(json.dumps(part.config, indent=2) + "\n", encoding="utf-8")
    for name in ("scheduler", "low_res_scheduler", "tokenizer", "text_encoder"):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, unfinished / name)
    for name in ("model_index.json", "prompts.safetensors"):
        if (folder / name).is_file():
            shutil.copy(folder / name, unfinished / name)
    if raft := next((folder / name for name in RAFT_FILES if (folder / name).is_file()), None):
        (unfinished / "propagator").mkdir()
        save_file({key: value.clone() for key, value in read_tensors(raft).items()}, unfinished / RAFT_FILES[0])
    unfinished.rename(target)
