"""Model folders at toy size, one writer for each kind `checkpoint.load` knows. Weights are random and nowhere zero."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vsuav.text import TextEncoder, write_prompts
from vsuav.unet import UNetConfig, UNetVideo
from vsuav.vae import VAE, VAEConfig

WIDTH = 32  # of the text states

UNET = {
    "_class_name": "UNetVideoModel",
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
    "down_block_types": ["DownBlock3D", "CrossAttnDownBlock3D"],
    "up_block_types": ["CrossAttnUpBlock3D", "UpBlock3D"],
    "only_cross_attention": [True, False],
    "norm_num_groups": 8,
    "temporal_norm_num_groups": 8,
    "num_class_embeds": 1000,
    "use_linear_projection": True,
    "down_temporal_idx": [0, 1],
    "mid_temporal": True,
    "up_temporal_idx": [0, 1],
    "temporal_module_config": {"attention_block_types": ["", ""]},
}
VAE_IMAGE = {
    "_class_name": "AutoencoderKL3D",
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock3D"] * 3,
    "up_block_types": ["UpDecoderBlock3D"] * 3,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.08333,
}
VAE_VIDEO = VAE_IMAGE | {
    "_class_name": "AutoencoderKLVideo",
    "up_block_types": ["UpDecoderBlock3D_plus"] * 3,
    "condition_img": True,
    "condition_channels": 8,
    "use_temporal_block": True,
}
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULER = BETAS | {
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
LOW_RES_SCHEDULER = BETAS | {"_class_name": "DDPMScheduler", "clip_sample": True, "prediction_type": "epsilon"}
PROMPTS = ["best quality, extremely detailed", "blur, worst quality", ""]


def filled(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The network with weights that are small, random and nowhere zero, so that every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = max(parameter[0].numel(), 1) ** -0.5 if parameter.ndim > 1 else 0.1
        is_gain = parameter.ndim == 1 and name.endswith("weight")
        with torch.no_grad():
            parameter.copy_(noise * scale + is_gain) if not name.endswith("freqs") else parameter.mul_(1 + 0.01 * noise)
    return network.eval()


def networks() -> tuple[UNetVideo, VAE, VAE]:
    return (
        filled(UNetVideo(UNetConfig.from_dict(UNET)), 1),
        filled(VAE(VAEConfig.from_dict(VAE_IMAGE)), 2),
        filled(VAE(VAEConfig.from_dict(VAE_VIDEO)), 3),
    )


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def write_common(folder: Path) -> None:
    """Schedulers and stored prompts (so that no text encoder is needed)."""
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "low_res_scheduler" / "scheduler_config.json", LOW_RES_SCHEDULER)

    def states(prompt: str) -> torch.Tensor:
        return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(len(prompt)))

    write_prompts(folder / "prompts.safetensors", TextEncoder(states), PROMPTS)


def write_released(folder: Path) -> Path:
    """The layout of the released folder: pickled state dicts, one copy of the frequencies per temporal attention."""
    write_common(folder)
    write_json(folder / "model_index.json", {"_class_name": "VideoUpscalePipeline", "max_noise_level": 350})
    unet, vae, video_vae = networks()
    for name, network, config in (("unet/unet_video", unet, UNET), ("vae/vae_3d", vae, VAE_IMAGE),
                                  ("vae/vae_video", video_vae, VAE_VIDEO)):  # fmt: skip
        write_json(folder / f"{name}_config.json", config)
        torch.save({key: value.clone() for key, value in network.state_dict().items()}, folder / f"{name}.bin")
    return folder


def unique(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state with each shared tensor once, as safetensors want it."""
    return {name: parameter.detach().contiguous() for name, parameter in network.named_parameters()}


def write_diffusers(folder: Path, index: dict | None = None) -> Path:
    """The same networks as diffusers would lay them out, with safetensors."""
    write_common(folder)
    write_json(folder / "model_index.json", index or {"_class_name": "VideoUpscalePipeline"})
    for name, network, config in zip(
        ("unet", "vae", "vae_video"), networks(), (UNET, VAE_IMAGE, VAE_VIDEO), strict=True
    ):
        write_json(folder / name / "config.json", config)
        save_file(unique(network), folder / name / "diffusion_pytorch_model.safetensors")
    return folder


DEFAULTS = {"prompt": PROMPTS[0], "negative_prompt": PROMPTS[1], "noise_level": 40, "preset": "tiny"}
PRESETS = {"tiny": {"steps": 2, "solver": "ddim", "guidance_scale": 1.0, "propagation_steps": []}}


def write_bundled(folder: Path) -> Path:
    """The layout of this project's own models."""
    index = {"_class_name": "VsuavPipeline", "vsuav": {"defaults": DEFAULTS, "presets": PRESETS}}
    return write_diffusers(folder, index)


def write_image(folder: Path):
    """An x4 upscaler written by diffusers' own save_pretrained; returns its U-Net and VAE."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    write_common(folder)
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionUpscalePipeline"})
    unet = UNet2DConditionModel(
        in_channels=7, out_channels=4, block_out_channels=(32, 64, 64), layers_per_block=2, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        only_cross_attention=[True, True, False], cross_attention_dim=WIDTH, use_linear_projection=True,
        num_class_embeds=1000, norm_num_groups=16,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8, scaling_factor=0.08333,
        latent_channels=4,
    )  # fmt: skip
    filled(unet, 4).save_pretrained(folder / "unet")
    filled(vae, 5).save_pretrained(folder / "vae")
    return unet, vae


WRITERS = {
    "uav": write_released,
    "uav-diffusers": write_diffusers,
    "vsuav": write_bundled,
    "sd-x4": lambda folder: (write_image(folder), folder)[1],
}
