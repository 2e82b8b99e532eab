"""Deep features reused from step to step: the U-Net against itself with a tensor put in its place, tiles, the law."""

from dataclasses import replace

import pytest
import torch
import toy
import vapoursynth as vs
from clips import ask, clip_of, pixels

from vsuav import upscale
from vsuav.layers import lay_out
from vsuav.networks import Networks, choose, recipe_of
from vsuav.schedule import Sampler, Schedule
from vsuav.settings import Settings
from vsuav.tiling import blend_weights, tiles
from vsuav.unet import UNetConfig, UNetVideo

LEVELS = {
    2: toy.UNET,
    3: {
        **toy.UNET, "block_out_channels": [32, 64, 32], "layers_per_block": 2,
        "only_cross_attention": [True, True, False],
        "down_block_types": ["DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D"],
        "up_block_types": ["CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"],
    },
}  # fmt: skip
"""Networks of two and of three levels."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("model") / "toy")


def network(levels: int, layout: bool) -> UNetVideo:
    unet = UNetVideo(UNetConfig.from_dict(LEVELS[levels]))
    for parameter in unet.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.05)
    return (lay_out(unet) if layout else unet).requires_grad_(False)


def inputs(t: int = 3, h: int = 9, w: int = 14):
    return torch.randn(2, 4, t, h, w), torch.tensor([700]), torch.randn(2, 3, t, h, w), torch.randn(2, 5, 16), 20


@pytest.mark.parametrize("layout", [False, True])
@pytest.mark.parametrize("levels", LEVELS)
def test_a_reused_tensor_takes_the_place_of_what_enters_the_last_up_block(levels, layout):
    unet = network(levels, layout)
    one, other = inputs(), inputs()
    entering = []
    handle = unet.up_blocks[-1].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    full, deep = unet(*one, keep=True)
    assert torch.equal(full, unet(*one))
    handle.remove()
    assert torch.equal(deep, entering[0]) and deep.shape[1] == unet.config.deep_channels
    handle = unet.up_blocks[-1].register_forward_pre_hook(lambda module, args: (entering[0], *args[1:]))
    expected = unet(*other)
    handle.remove()
    torch.testing.assert_close(unet(*other, deep), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(unet(*one, deep), full, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, unet(*other), atol=1e-3)


def test_the_deeper_layers_are_not_run():
    unet = network(3, True)
    _, deep = unet(*inputs(), keep=True)
    inner = (unet.mid_block, unet.down_blocks[0].downsamplers, *unet.down_blocks[1:], *unet.up_blocks[:-1])
    for module in inner:
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    assert unet(*inputs(), deep).isfinite().all()
    assert not unet(*inputs()).isfinite().any()


def networks(model, **changes) -> Networks:
    models, settings = choose({"model": model, "threads": 1, "device": "cpu", "dtype": "float32"}, 72, 80)
    return Networks(models, replace(settings, **changes))


def window(length: int = 3, size: tuple[int, int] = (48, 56)):
    return range(length), list(torch.randn(length, 4, *size)), list(torch.rand(length, 3, *size)), "rain"


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["", "guided"])
@pytest.mark.parametrize("tile", [(0, 0), (40, 40)], ids=["whole", "tiles"])
def test_a_step_with_its_own_features_is_the_full_step(model, tile, scale):
    each, given = networks(model, tile=tile, guidance_scale=scale, tile_overlap=8, reuse_steps=(2,)), window()
    with each.arithmetic():
        v, deep = each.window_and_deep(1, *given)
        assert torch.equal(v, each.window(1, *given))
        torch.testing.assert_close(each.window(1, *given, deep), v, rtol=0, atol=1e-5)
        assert not torch.allclose(each.window(1, *given, 1.1 * deep), v, atol=1e-3)
    assert deep.nbytes == 3 * each.deep_bytes(48, 56)


def test_each_tile_reuses_its_own_features(model):
    """A tiled step against tiles that reuse theirs one by one, merged by hand."""
    each, (frames, latents, low_res, prompt) = networks(model, tile=(40, 40), tile_overlap=8), window()
    cover = tiles(48, 56, (40, 40), 8)
    assert len(cover) == 4
    with each.arithmetic():
        deep = each.window_and_deep(0, frames, latents, low_res, prompt)[1]
        moved = [x.roll(3, -1) for x in latents]
        got = each.window(1, frames, moved, low_res, prompt, deep)
        expected = torch.zeros_like(got)
        noise = torch.stack([each.noise("lr", n, (3, 48, 56)) for n in frames])
        a = each._schedule.alphas_cumprod[each.settings.noise_level]
        noised = (a.sqrt() * torch.stack(low_res) + (1 - a).sqrt() * noise).transpose(0, 1)[None]
        x, context = torch.stack(moved, 1)[None], each._context(prompt, False)
        for i, (tile, weight) in enumerate(zip(cover, blend_weights(cover, 48, 56), strict=True)):
            rows, columns = tile.crop
            part = each._unet(
                x[..., rows, columns], each.sampler.timesteps[1], noised[..., rows, columns], context,
                each.settings.noise_level, deep[i].movedim(-1, 1),
            )  # fmt: skip
            expected[..., rows, columns] += weight * part[0].transpose(0, 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-5)


def test_a_step_without_guidance_reuses_the_features_of_the_positive_prompt(model):
    """Guidance may end before a step that reuses features of a guided one. If all do, only these are kept."""
    guidance = {"guidance_scale": 3.0, "guidance_interval": (0.5, 1.0)}
    both, one = (networks(model, reuse_steps=steps, **guidance) for steps in ((1, 2), (2,)))
    assert [both.settings.guided(t) for t in both.sampler.timesteps] == [True, True, False]
    given = window()
    with both.arithmetic():
        _, deep = both.window_and_deep(1, *given)
        _, positive = one.window_and_deep(1, *given)
        assert deep.shape[1] == 2 and positive.shape[1] == 1 and torch.equal(positive, deep[:, 1:])
        assert both.deep_bytes(48, 56) == 2 * one.deep_bytes(48, 56)
        got = both.window(2, *given, deep)
        assert torch.equal(got, one.window(2, *given, positive))
        assert not torch.allclose(got, both.window(2, *given, deep[:, :1]), atol=1e-4)


def test_guidance_must_not_begin_at_a_step_that_reuses():
    schedule = Schedule(prediction_type="v_prediction")
    late = Settings(steps=4, spacing="trailing", guidance_scale=3.0, guidance_interval=(0.0, 0.6), reuse_steps=(1, 2))
    sampler = Sampler(schedule, 4, "ddim", "trailing")
    with pytest.raises(ValueError, match="reuse_steps must leave out the first guided step.*after step 0.*got \\(1, 2"):
        recipe_of(late, sampler)
    assert recipe_of(replace(late, reuse_steps=(1, 3)), sampler).reuse == {1, 3}


def test_the_error_reaches_the_script(model):
    clip = clip_of(pixels(3, 24, 16), ())
    options = {"model": model, "steps": 4, "guidance_scale": 3.0, "guidance_interval": (0.0, 0.6)}
    with pytest.raises(vs.Error, match="upscale: reuse_steps must leave out the first guided step"):
        upscale(clip, **options, reuse_steps=[1, 2])


@pytest.mark.parametrize(
    "options", [{}, {"tile": (32, 32), "tile_overlap": 8}, {"dtype": "bfloat16"}, {"solver": "unipc"}]
)
def test_the_law_with_reuse(model, options):
    clip = clip_of(pixels(20, 40, 36), ())
    given = {
        "model": model, "steps": 4, "propagation_steps": [2], "propagation_radius": 3, "reuse_steps": [1, 2],
        "guidance_scale": 2.0, "guidance_interval": (0.4, 1.0), "dtype": "float32", "threads": 1, **options,
    }  # fmt: skip
    linear = ask(upscale(clip, **given), "linear")
    assert ask(upscale(clip, **given, cache_mib=0), "random") == linear
    assert ask(upscale(clip, **{**given, "reuse_steps": []}), "linear") != linear
