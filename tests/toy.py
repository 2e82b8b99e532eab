"""A tiny model with random weights, written in the bundled layout: every class and every layer, a second of CPU."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vsuav.unet import UNetConfig, UNetVideo
from vsuav.vae import VAE, VAEConfig

UNET = {
    "in_channels": 7, "out_channels": 4, "block_out_channels": [32, 32], "layers_per_block": 1,
    "down_block_types": ["DownBlock3D", "CrossAttnDownBlock3D"], "up_block_types": ["CrossAttnUpBlock3D", "UpBlock3D"],
    "attention_head_dim": 1, "cross_attention_dim": 16, "only_cross_attention": [True, False], "norm_num_groups": 8,
    "temporal_norm_num_groups": 8, "num_class_embeds": 1000, "use_linear_projection": True,
    "down_temporal_idx": [0, 1], "mid_temporal": True, "up_temporal_idx": [0, 1],
    "temporal_module_config": {"attention_block_types": ["", ""]},
}  # fmt: skip
VAE_IMAGE = {
    "_class_name": "AutoencoderKL3D", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
    "block_out_channels": [8, 8, 16], "layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 0.08333,
    "down_block_types": ["DownEncoderBlock3D"] * 3, "up_block_types": ["UpDecoderBlock3D"] * 3,
    "mid_block_add_attention": False,
}  # fmt: skip
VAE_VIDEO = {
    **VAE_IMAGE, "up_block_types": ["UpDecoderBlock3D_plus", "UpDecoderBlock3D_plus", "UpDecoderBlock3D"],
    "condition_img": True, "condition_channels": 8, "bicubic_skip": True,
}  # fmt: skip
SCHEDULER = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction", "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing",
}  # fmt: skip
DEFAULTS = {"prompt": "", "negative_prompt": "blur", "noise_level": 20, "preset": "tiny", "color_fix": "none"}
PRESETS = {
    "tiny": {
        "steps": 3, "solver": "ddim", "guidance_scale": 1.0, "guidance_interval": [0.0, 1.0], "propagation_steps": [1]
    }
}  # fmt: skip


def write(folder: Path, seed: int = 0) -> Path:
    """Write the toy model into `folder` and return it."""
    torch.manual_seed(seed)
    parts = {
        "unet": (UNetVideo(UNetConfig.from_dict(UNET)), UNET),
        "vae": (VAE(VAEConfig.from_dict(VAE_IMAGE)), VAE_IMAGE),
        "vae_video": (VAE(VAEConfig.from_dict(VAE_VIDEO)), VAE_VIDEO),
    }
    for name, (network, config) in parts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    parameter.normal_(std=0.05)
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        weights = {key: value for key, value in weights.items() if not key.endswith("rotary_emb.freqs")} | {
            key: value for key, value in weights.items() if key == "temporal_rotary_emb.freqs"
        }
        save_file(weights, folder / name / "diffusion_pytorch_model.safetensors")
    for name in ("scheduler", "low_res_scheduler"):
        (folder / name).mkdir()
        (folder / name / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    states = torch.randn(3, 5, UNET["cross_attention_dim"])
    save_file(
        {str(i): state.clone() for i, state in enumerate(states)},
        folder / "prompts.safetensors",
        metadata={"prompts": json.dumps(["", "blur", "rain"])},
    )
    index = {"_class_name": "VsuavPipeline", "vsuav": {"defaults": DEFAULTS, "presets": PRESETS}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
