"""Decoding in bands: the whole frame's decoder, in less memory, through the networks too."""

import math
from dataclasses import replace

import pytest
import torch
import toy
from bench_networks import largest

from vsuav.bands import BandedDecoder
from vsuav.layers import LARGE, JointNorm
from vsuav.networks import NetworkError, Networks, choose
from vsuav.tiling import band_rows
from vsuav.vae import VAE, VAEConfig

CONFIGS = {
    "image": toy.VAE_IMAGE,
    "video": toy.VAE_VIDEO,
    "attention": {**toy.VAE_VIDEO, "mid_block_add_attention": True, "bicubic_skip": False},
    "level": {**toy.VAE_VIDEO, "num_class_embeds": 30, "mid_block_layers": 3},
    "enlarger": {
        **toy.VAE_VIDEO, "num_class_embeds": 30, "enlarger_channels": 6, "enlarger_layers": 2, "enlarger_meeting": 4,
        "enlarger_beside": True,
    },
    "unshuffled": {
        **toy.VAE_VIDEO, "block_out_channels": [8, 16], "unshuffle": 2, "down_block_types": ["DownEncoderBlock3D"] * 2,
        "up_block_types": ["UpDecoderBlock3D_plus", "UpDecoderBlock3D"],
    },
}  # fmt: skip


def build(config: dict) -> VAE:
    """A VAE as after training: no parameter is zero."""
    torch.manual_seed(5)
    vae = VAE(VAEConfig.from_dict(config))
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if not parameter.detach().any() else None
    return vae.requires_grad_(False)


def chunk(height: int, width: int, t: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and input frames whose upper half is unlike the lower: a band's statistics are not the frame's."""
    torch.manual_seed(6)
    slope = torch.linspace(-2, 2, height)[:, None]
    return torch.randn(1, 4, t, height, width) + slope, (torch.rand(1, 3, t, height, width) - 0.5 + 0.2 * slope)


@pytest.mark.parametrize("rows", [1, 4, 5, 13, 40])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_bands_are_the_whole_frame(name, rows):
    vae = build(CONFIGS[name])
    z, low_res, level = *chunk(13, 9, t=2), torch.tensor([20])
    whole = vae.decode(z, low_res, level)
    banded = vae.decode(z, low_res, level, decoder=BandedDecoder(vae.decoder, rows))
    torch.testing.assert_close(banded, whole, rtol=0, atol=2e-5 * float(whole.abs().max()))


@torch.inference_mode()
def test_what_is_given_stays_as_it_was():
    vae = build(CONFIGS["video"])
    z, low_res = chunk(8, 8)
    before = z.clone(), low_res.clone()
    vae.decode(z, low_res, decoder=BandedDecoder(vae.decoder, 3))
    assert torch.equal(z, before[0]) and torch.equal(low_res, before[1])


@torch.inference_mode()
def test_bands_need_less_memory():
    """Whole frames hold several activations of the finest level at a time, bands the input and output of a layer."""
    vae = build({**CONFIGS["unshuffled"], "block_out_channels": [16, 32], "norm_num_groups": 8})
    z, low_res = chunk(64, 24)
    whole = largest(lambda: vae.decode(z, low_res))
    banded = largest(lambda: vae.decode(z, low_res, decoder=BandedDecoder(vae.decoder, 4)))
    assert banded < 0.65 * whole


@pytest.mark.parametrize("shape", [(1, 2, 300, 300), (1, 3, 5, 7)])
@torch.inference_mode()
def test_moments_are_those_of_float64(shape):
    assert (math.prod(shape) > LARGE) == (shape[-1] == 300)
    norm = JointNorm(2, 6, 1e-6)
    m = torch.randn(*shape, 6, generator=torch.Generator().manual_seed(1)) * 3 + 10
    mean, variance = norm.moments(m)
    groups = m.double().unflatten(-1, (2, 3))
    torch.testing.assert_close(mean, groups.mean((0, 1, 2, 3, 5)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, groups.var((0, 1, 2, 3, 5), correction=0), rtol=5e-5, atol=0)


def test_rows_of_a_band():
    assert band_rows(100, 200, (0, 0)) == 100
    assert band_rows(100, 200, (400, 400)) == 100
    assert band_rows(100, 200, (50, 40)) == 10
    assert band_rows(100, 200, (0, 40)) == 40
    assert band_rows(40, 5000, (64, 40)) == 1


def test_rows_must_be_some():
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        BandedDecoder(build(CONFIGS["image"]).decoder, 0)


# -- through the networks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("model") / "toy")


def networks(model, **changes) -> Networks:
    models, settings = choose({"model": model, "threads": 1, "device": "cpu", "dtype": "float32"}, 72, 80)
    return Networks(models, replace(settings, **changes))


@pytest.mark.parametrize("video_vae", [True, False])
def test_tiles_decode_to_the_same_picture(model, video_vae):
    whole, tiled = (networks(model, video_vae=video_vae, tile=tile) for tile in ((0, 0), (40, 40)))
    latents = list(chunk(80, 72)[0][0].transpose(0, 1) * 0.08)
    low_res = list(chunk(80, 72)[1][0].transpose(0, 1))
    with whole.arithmetic():
        pictures = [each.decode((0, 1, 2), latents, low_res) for each in (whole, tiled)]
    assert pictures[0].std() > 0.05
    error = (pictures[0] - pictures[1]).square().mean().item()
    assert -10 * math.log10(error) > 80


@pytest.mark.parametrize("tile", [(0, 0), (40, 40)], ids=["whole", "bands"])
def test_the_decoder_is_told_the_noise_level(model, tile):
    """Of the settings, whole and in bands: the picture is that of `VAE.decode` at that level and at no other."""
    models, settings = choose({"model": model, "threads": 1, "device": "cpu", "dtype": "float32"}, 72, 80)
    vae = build({**toy.VAE_VIDEO, "num_class_embeds": 351})
    z, low_res = chunk(80, 72)
    frames = list((z * vae.config.scaling_factor)[0].transpose(0, 1)), list(low_res[0].transpose(0, 1))
    settings = replace(settings, tile=tile, video_vae=True, color_fix="none")
    errors = {}
    for told in (0, 350):
        each = Networks(replace(models, video_vae=vae), replace(settings, noise_level=told))
        with each.arithmetic():
            picture = each.decode((0, 1, 2), *frames)
            for level in (0, 350):
                exact = vae.decode(z, low_res, torch.tensor([level]))[0].transpose(0, 1)
                errors[told, level] = (picture - (exact.clamp(-1, 1) / 2 + 0.5)).abs().max().item()
    assert max(errors[0, 0], errors[350, 350]) < 1e-4 and min(errors[0, 350], errors[350, 0]) > 1e-2


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_names_a_smaller_tile(model, monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    for tile, smaller in (((0, 0), 64), ((320, 256), 128)):
        tiled = networks(model, tile=tile)
        monkeypatch.setattr(tiled, "_call", refuse)
        x, low = torch.zeros(1, 4, 2, 300, 400), torch.zeros(1, 3, 2, 300, 400)
        expected = f"frames 6 to 7 at 400x300; try tile={smaller if tile[0] else 128}"
        with pytest.raises(NetworkError, match=expected):
            tiled._predict(x, low, 1, None, False, (6, 7), None, False)


def test_other_errors_are_not_called_memory(model, monkeypatch):
    broken = networks(model)
    monkeypatch.setattr(broken, "_call", lambda *args: [][0])
    with pytest.raises(IndexError):
        broken._predict(torch.zeros(1, 4, 2, 8, 8), torch.zeros(1, 3, 2, 8, 8), 1, None, False, (6, 7), None, False)


def test_guidance_leaves_the_channel_of_colour_as_the_prompt_gives_it(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "VAE_VIDEO", toy.VAE_VIDEO | {"fading": True})
    given = {"model": toy.write(tmp_path), "threads": 1, "device": "cpu", "dtype": "float32", "video_vae": True}
    torch.manual_seed(2)
    latents, low = list(torch.randn(8, 4, 8, 8)), list(torch.rand(8, 3, 8, 8) * 2 - 1)
    made = []
    for scale in (1.0, 3.0):
        models, settings = choose(given | {"guidance_scale": scale}, 8, 8)
        made.append(Networks(models, settings).window(0, range(8), latents, low, ""))
    torch.testing.assert_close(made[0][:, 3], made[1][:, 3], atol=1e-5, rtol=0)
    assert all((made[0][:, c] - made[1][:, c]).abs().max() > 1e-3 for c in range(3))


@pytest.mark.parametrize("tile", [(0, 0), (40, 40)], ids=["whole", "bands"])
def test_the_decoder_is_told_of_the_frames_beside(model, tile):
    """One that wants to know, whole and in bands; one that does not is left alone."""
    models, settings = choose({"model": model, "threads": 1, "device": "cpu", "dtype": "float32"}, 72, 80)
    settings = replace(settings, tile=tile, video_vae=True, color_fix="none")
    (z, low_res), beside = chunk(80, 72), torch.randn(1, 6, 3, 80, 72)
    for config in (CONFIGS["enlarger"], {**CONFIGS["enlarger"], "enlarger_beside": False}):
        vae = build(config)
        frames = [list(x[0].transpose(0, 1)) for x in (z * vae.config.scaling_factor, low_res, beside)]
        each = Networks(replace(models, video_vae=vae), replace(settings, noise_level=20))
        with each.arithmetic():
            told, alone = each.decode((0, 1, 2), *frames), each.decode((0, 1, 2), *frames[:2])
        exact = vae.decode(z, low_res, torch.tensor([20]), beside)[0].transpose(0, 1).clamp(-1, 1) / 2 + 0.5
        assert (told - exact).abs().max() < 1e-4
        assert ((told - alone).abs().max() > 1e-2) == config["enlarger_beside"]
