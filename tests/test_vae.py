"""The VAEs: what joins frames and what does not, what the condition does, inference against training.

Numbers of the reference, every key and shape, and the image VAE of the same weights are tested with the parity files
and the checkpoints.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vsuav.layers import ResBlock, lay_out
from vsuav.vae import VAE, PixelAttention, VAEConfig

SMALL = {
    "block_out_channels": [8, 16, 24],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock3D"] * 3,
    "up_block_types": ["UpDecoderBlock3D"] * 3,
}
VIDEO = SMALL | {
    "up_block_types": ["UpDecoderBlock3D_plus", "UpDecoderBlock3D_plus", "UpDecoderBlock3D"],
    "condition_img": True,
    "condition_channels": 8,
}


def build(config: dict, alive: bool = True) -> VAE:
    """A VAE with random weights; `alive`: none of them zero, as after training."""
    torch.manual_seed(2)
    vae = VAE(VAEConfig.from_dict(config))
    for p in vae.parameters():
        if alive and not p.detach().any():
            nn.init.normal_(p, std=0.1)
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def image() -> VAE:
    return build(SMALL)


@pytest.fixture(scope="module")
def video() -> VAE:
    return build(VIDEO)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def close(a, b, rtol=2e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=rtol * float(b.abs().max()))


def differs(a, b):
    return not torch.allclose(a, b, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("n", [20, 21])
def test_pixel_attention(n):
    layer = PixelAttention(12, 3).requires_grad_(False)
    x = torch.randn(2, 12, 4, n // 4)
    got = layer(x)
    for i in range(2):
        z = F.group_norm(x[i : i + 1], 3, layer.group_norm.weight, layer.group_norm.bias, 1e-6)[0].flatten(1).T
        q, k, v = (z @ m.weight.T + m.bias for m in (layer.query, layer.key, layer.value))
        weights = torch.softmax(q @ k.T / math.sqrt(12), dim=1)
        close(got[i], x[i] + (weights @ v @ layer.proj_attn.weight.T + layer.proj_attn.bias).T.reshape(x[i].shape))


def test_frames_of_a_chunk_meet_in_the_norms_only(image):
    """The image VAE tells frames of a chunk apart by nothing, but decodes them otherwise than one by one."""
    z = torch.randn(1, 4, 3, 5, 6)
    together = image.decode(z)
    close(image.decode(z[:, :, [2, 0, 1]]), together[:, :, [2, 0, 1]])
    assert differs(image.decode(z[:, :, 1:2]), together[:, :, 1:2])
    twice = image.decode(z[:, :, [0, 0]])
    close(twice, image.decode(z[:, :, :1]).expand_as(twice))


def test_the_video_decoder_sees_time(video):
    z, low = torch.randn(1, 4, 3, 5, 6), torch.randn(1, 3, 3, 5, 6)
    backward = video.decode(z.flip(2), low.flip(2)).flip(2)
    assert differs(backward, video.decode(z, low))


def test_clips_of_a_batch_do_not_meet(image, video):
    z, low = torch.randn(2, 4, 2, 5, 4), torch.randn(2, 3, 2, 5, 4)
    for vae in (image, video):
        together = vae.decode(z, low)
        for i in range(2):
            close(together[i : i + 1], vae.decode(z[i : i + 1], low[i : i + 1]))
    x = torch.randn(2, 3, 2, 12, 16)
    means, logvars = image.encode(x)
    mean, logvar = image.encode(x[1:])
    close(means[1:], mean)
    close(logvars[1:], logvar)


def test_a_fresh_video_decoder_is_the_image_decoder(image):
    """3-D layers and condition pass on until they are trained."""
    fresh = build(VIDEO, alive=False)
    state = image.state_dict()
    missing = fresh.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all("3d" in k or "condition" in k for k in missing.missing_keys)
    z, low = torch.randn(1, 4, 3, 5, 6), torch.randn(1, 3, 3, 5, 6)
    close(fresh.decode(z, low), image.decode(z))


def test_the_condition_counts_as_much_as_told(video):
    """Between w = 0 and w = 1 the features move along a line; the low-resolution clip is not seen at w = 0."""
    z, low, other = torch.randn(1, 4, 2, 5, 6), torch.randn(1, 3, 2, 5, 6), torch.randn(1, 3, 2, 5, 6)
    assert torch.equal(video.decode(z, low, w=0.0), video.decode(z, other, w=0.0))
    assert differs(video.decode(z, low), video.decode(z, other))
    fuse, c, x = video.decoder.condition_fuse, torch.randn(1, 8, 2, 5, 6), torch.randn(1, 24, 2, 5, 6)
    close(fuse(c, x, 0.35), x + 0.35 * (fuse(c, x, 1.0) - x))


def test_bicubic_skip_is_added(video):
    skip = build(VIDEO | {"bicubic_skip": True})
    z, low = torch.randn(2, 4, 2, 5, 6), torch.randn(2, 3, 2, 5, 6)
    large = [F.interpolate(low[:, :, i], scale_factor=4, mode="bicubic") for i in range(2)]
    close(skip.decode(z, low), video.decode(z, low) + torch.stack(large, dim=2))


def test_the_last_channel_takes_colour_away():
    plain, grey = (build(VIDEO | {"bicubic_skip": True, "fading": on}) for on in (False, True))
    z, low = torch.randn(2, 4, 2, 5, 6), torch.rand(2, 3, 2, 5, 6)
    for g, kept in ((-1.0, 1.0), (0.5, 1.0), (0.6, 0.5), (0.7, 0.0), (3.0, 0.0)):
        z[:, 3] = g
        before, after = plain.decode(z, low), grey.decode(z, low)
        luma = (before * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)).sum(1, keepdim=True)
        close(after, luma + kept * (before - luma))
    z, low = torch.randn(2, 4, 2, 5, 16), torch.rand(2, 3, 2, 5, 16)
    z[:, 3, :, :, :8], z[:, 3, :, :, 8:] = 1.0, 0.0
    chroma = (grey.decode(z, low).amax(1) - grey.decode(z, low).amin(1)).mean((0, 1, 2))
    assert chroma[:16].max() < 1e-5 and chroma[40:].min() > 0.1
    z[:, 3], z[:, 3, :, 2, 2] = 1.0, -2.0
    close(grey.decode(z, low).amax(1), grey.decode(z, low).amin(1))


def test_unshuffled_pixels_are_channels_of_the_finest_level():
    """The same weights without the shuffle, on pixels put into channels by hand."""
    half = {"block_out_channels": [16, 24], "up_block_types": ["UpDecoderBlock3D_plus", "UpDecoderBlock3D"]}
    vae = build(VIDEO | half | {"unshuffle": 2, "bicubic_skip": True})
    plain = build(VIDEO | half | {"in_channels": 12, "out_channels": 12})
    x, z, low = torch.randn(1, 3, 2, 20, 24), torch.randn(1, 4, 2, 5, 6), torch.randn(1, 3, 2, 5, 6)
    state = {k: v for k, v in vae.state_dict().items() if "condition_in" not in k}
    state |= {k: v for k, v in plain.state_dict().items() if "condition_in" in k}
    plain.load_state_dict(state)
    blocks = torch.stack([F.pixel_unshuffle(x[:, :, i], 2) for i in range(2)], dim=2)
    for ours, theirs in zip(vae.encode(x), plain.encode(blocks), strict=True):
        close(ours, theirs)
    assert vae.config.factor == 4 and vae.decode(z, low).shape == x.shape
    large = torch.stack([F.interpolate(low[:, :, i], scale_factor=4, mode="bicubic") for i in range(2)], dim=2)
    small = plain.decode(z, torch.zeros(1, 12, 2, 5, 6), w=0.0)
    close(vae.decode(z, low, w=0.0), torch.stack([F.pixel_shuffle(small[:, :, i], 2) for i in range(2)], 2) + large)
    assert vae.encode(torch.randn(1, 3, 1, 23, 21))[0].shape == (1, 4, 1, 5, 5)


def test_a_decoder_may_know_the_noise_level(video):
    """What the level adds to every block's first convolution is as if it were part of that convolution's bias."""
    knowing = build(VIDEO | {"num_class_embeds": 300})
    missing = knowing.load_state_dict(video.state_dict(), strict=False)
    assert not missing.unexpected_keys and len(missing.missing_keys) == 1 + 2 * len(blocks(knowing))
    z, low, levels = torch.randn(3, 4, 2, 5, 6), torch.randn(3, 3, 2, 5, 6), torch.tensor([0, 299, 20])
    together = knowing.decode(z, low, levels)
    for i, level in enumerate(levels):
        told = build(VIDEO)
        told.load_state_dict(video.state_dict())
        row = F.silu(knowing.decoder.class_embedding.weight[level])
        for name, block in blocks(knowing).items():
            told.decoder.get_submodule(name).conv1.bias += block.time_emb_proj(row)
        close(together[i : i + 1], told.decode(z[i : i + 1], low[i : i + 1]))
    assert differs(together[:1], knowing.decode(z[:1], low[:1], levels[1:2]))
    with pytest.raises(ValueError, match="VAE.decode: this decoder needs level"):
        knowing.decode(z, low)


def blocks(vae):
    """The residual blocks on the decoder's way from the middle up, by name."""
    start = ("mid_block.resnets.", "up_blocks.")
    found = vae.decoder.named_modules()
    return {name: m for name, m in found if isinstance(m, ResBlock) and name.startswith(start)}


@pytest.mark.parametrize("kind", ["image", "video"])
def test_low_res_where_it_is_needed(kind, request):
    vae, z = request.getfixturevalue(kind), torch.randn(1, 4, 2, 5, 6)
    if kind == "image":
        assert torch.equal(vae.decode(z), vae.decode(z, torch.randn(1, 3, 2, 5, 6), w=0.5))
        return
    with pytest.raises(ValueError, match="VAE.decode: this decoder needs low_res"):
        vae.decode(z)
    with pytest.raises(ValueError, match=r"low_res must have the frames and size of z \(2, 5, 6\), got \(2, 5, 5\)"):
        vae.decode(z, torch.randn(1, 3, 2, 5, 5))


@settings(max_examples=20)
@given(t=st.integers(1, 5), h=st.integers(1, 11), w=st.integers(1, 11))
def test_any_size(image, video, t, h, w):
    z, low = torch.randn(1, 4, t, h, w), torch.randn(1, 3, t, h, w)
    for vae in (image, video):
        x = vae.decode(z, low)
        assert x.shape == (1, 3, t, 4 * h, 4 * w) and x.isfinite().all()
        ragged = F.pad(x, (0, 3, 0, 2))
        mean, logvar = vae.encode(ragged)
        assert mean.shape == logvar.shape == (1, 4, t, h, w)
        assert logvar.min() >= -30 and logvar.max() <= 20


def test_inference_equals_training(video):
    z, low = torch.randn(1, 4, 3, 5, 6), torch.randn(1, 3, 3, 5, 6)
    fast = video.decode(z, low)
    with torch.enable_grad():
        close(fast, video.decode(z, low))


def test_it_can_be_trained():
    for config in (SMALL, VIDEO | {"bicubic_skip": True, "mid_block_add_attention": False, "num_class_embeds": 2}):
        vae = build(config).requires_grad_(True)
        with torch.enable_grad():
            mean, logvar = vae.encode(torch.randn(1, 3, 2, 16, 12))
            x = vae.decode(mean, torch.randn(1, 3, 2, 4, 3), torch.tensor([1]))
            (x.square().mean() + logvar.square().mean()).backward()
        assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("dtype", "decibel"), [(torch.bfloat16, 30), (torch.float16, 45)])
def test_half_precision_is_near(video, dtype, decibel):
    z, low = torch.randn(1, 4, 3, 8, 6), torch.rand(1, 3, 3, 8, 6)
    half = build(VIDEO).to(dtype)
    half.load_state_dict(video.state_dict())
    exact, near = video.decode(z, low), lay_out(half).decode(z, low)
    assert near.dtype == dtype
    assert 10 * torch.log10(exact.square().mean() / (near - exact).square().mean()) > decibel


def test_no_attention_where_it_is_left_out():
    plain = {name for name, _ in build(SMALL | {"mid_block_add_attention": False}).named_parameters()}
    full = {name for name, _ in build(SMALL).named_parameters()}
    assert plain < full and all(".mid_block.attentions.0." in name for name in full - plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn must be 'silu', got 'gelu'"),
        ({"use_quant_conv": False}, "use_quant_conv must be True, got False"),
        ({"shift_factor": 0.1}, "unknown setting shift_factor = 0.1"),
        ({"up_block_types": ["UpDecoderBlock3D"] * 2}, "one entry for each of the 3"),
        ({"mid_block_layers": 0}, "mid_block_layers must be a whole number between 1 and 64, got 0"),
        (
            {"enlarger_channels": 8},
            "enlarger_channels needs bicubic_skip and num_class_embeds, got 8 with False and None",
        ),
        ({"enlarger_meeting": 4}, "enlarger_meeting 4 needs enlarger_channels, got None"),
        ({"enlarger_beside": True}, "enlarger_beside True needs enlarger_channels, got None"),
        ({"up_block_types": ["UpDecoderBlock4D"] * 3}, "unknown block type 'UpDecoderBlock4D'; known: UpDec"),
    ],
)
def test_configurations_it_would_not_compute_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict(SMALL | change)


def test_a_deeper_middle_changes_nothing_until_it_is_trained(video):
    deep, fresh = VAE(VAEConfig.from_dict(VIDEO | {"mid_block_layers": 4})), video.state_dict()
    grown = deep.load_state_dict(fresh, strict=False)
    assert {name.split(".")[3] for name in grown.missing_keys} == {"2", "3", "4"} and not grown.unexpected_keys
    z, low = torch.randn(1, 4, 3, 5, 6), torch.randn(1, 3, 3, 5, 6)
    close(deep.requires_grad_(False).decode(z, low), video.decode(z, low))
    torch.nn.init.normal_(deep.decoder.mid_block.resnets[4].conv2.weight, std=0.1)
    assert differs(deep.decode(z, low), video.decode(z, low))
    same = VAE(VAEConfig.from_dict(VIDEO | {"mid_block_layers": 4})).encoder.state_dict()
    assert same.keys() == video.encoder.state_dict().keys()


def test_block_types_may_be_left_out():
    config = {k: v for k, v in SMALL.items() if "types" not in k}
    assert VAEConfig.from_dict(config) == VAEConfig.from_dict(SMALL)
