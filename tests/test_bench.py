"""The benchmark: its plain networks against ours, what it counts against counts by hand, and the command itself."""

import pytest
import toy
import torch
from plain import PlainDecoder, PlainUNet

from vsuav.layers import lay_out
from vsuav.unet import UNetConfig, UNetVideo
from vsuav.vae import VAE, VAEConfig

LEVELS = {
    **toy.UNET, "block_out_channels": [32, 32, 64], "attention_head_dim": 2, "cross_attention_dim": 64,
    "down_block_types": ["DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D"], "down_temporal_idx": [2],
    "up_block_types": ["CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"], "attention_head_dim": 1,
    "only_cross_attention": [True, True, False], "layers_per_block": 2,
}  # fmt: skip
ATTENDING = {**toy.VAE_VIDEO, "mid_block_add_attention": True, "bicubic_skip": False}


def alive[M: torch.nn.Module](network: M) -> M:
    """The network as after training: no parameter is zero."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if not parameter.detach().any() else None
    return lay_out(network.requires_grad_(False))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=5e-5 * float(b.abs().max()))


@pytest.mark.parametrize("config", [toy.UNET, LEVELS], ids=["toy", "levels"])
@torch.inference_mode()
def test_the_plain_unet_is_ours(config):
    unet = alive(UNetVideo(UNetConfig.from_dict(config)))
    plain = PlainUNet(unet.config, unet.state_dict())
    sample, low_res = torch.randn(2, 4, 5, 10, 14), torch.randn(2, 3, 5, 10, 14)
    timestep, level, text = torch.tensor([700, 20]), torch.tensor([0, 350]), torch.randn(2, 6, unet.config.cross_attention_dim)
    close(unet(sample, timestep, low_res, text, level), plain(sample, timestep, low_res, text, level))


@pytest.mark.parametrize("config", [toy.VAE_IMAGE, toy.VAE_VIDEO, ATTENDING], ids=["image", "video", "attention"])
@torch.inference_mode()
def test_the_plain_decoder_is_ours(config):
    vae = alive(VAE(VAEConfig.from_dict(config)))
    plain = PlainDecoder(vae.config, vae.state_dict())
    z, low_res = torch.randn(2, 4, 3, 6, 5), torch.rand(2, 3, 3, 6, 5) * 2 - 1
    close(vae.decode(z, low_res), plain(z, low_res))
