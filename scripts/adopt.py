"""A model folder as the start of a training: its networks, schedules and text encoder, whatever a configuration says.

Any folder `vsuav` can load: an image upscaler (its U-Net gets temporal layers, its decoder 3-D layers and the
condition, all of which change nothing at first), a released Upscale-A-Video, or a model of this project.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vsuav.checkpoint import Models, load
from vsuav.folders import find_parts
from vsuav.text import TextEncoder
from vsuav.vae import VAE, VAEConfig

DESCRIBED = ("unet", "vae", "vae_video", "scheduler", "low_res_scheduler", "model", "folder")
"""What a configuration says of the model itself; the rest is about training it."""


def adopt(folder: Path) -> tuple[dict[str, Any], dict[str, nn.Module], TextEncoder]:
    """What a configuration has to say of the model in `folder`, its networks in float32, and its text encoder."""
    models, parts = load(folder), find_parts(folder)
    image, video = (parts[name].config if name in parts else None for name in ("vae", "video_vae"))
    networks = {"unet": models.unet, "vae": models.vae, "vae_video": models.video_vae}
    if models.video_vae is None:
        video = image | {
            "up_block_types": ["UpDecoderBlock3D_plus"] * len(models.vae.config.block_out_channels),
            "condition_img": True,
        }
        networks["vae_video"] = grown(models, VAEConfig.from_dict(video))
    elif models.vae is None:
        image = video
        networks["vae"] = copy.deepcopy(models.video_vae)
    unet = parts["unet"].config
    if models.kind == "sd-x4":
        unet = {"temporal_norm_num_groups": models.unet.config.temporal_norm_num_groups} | unet
    described = {"unet": unet, "vae": image, "vae_video": video, "folder": str(folder.resolve())}
    for name in ("scheduler", "low_res_scheduler"):
        described[name] = json.loads((folder / name / "scheduler_config.json").read_text())
    described["model"] = {"defaults": models.defaults | {"video_vae": True}, "presets": models.presets}
    return described, networks, models.text


def grown(models: Models, config: VAEConfig) -> VAE:
    """The image VAE with the video decoder's layers, which change nothing yet and are the same in every process."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        vae = VAE(config)
    fresh = vae.load_state_dict(models.vae.state_dict(), strict=False)
    strange = [name for name in fresh.missing_keys if "_3d." not in name and ".condition_" not in name]
    if strange or fresh.unexpected_keys:
        raise ValueError(f"adopt: the decoder cannot grow from {models.path}: {(strange + fresh.unexpected_keys)[:2]}")
    return vae
