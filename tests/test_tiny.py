"""The tiny decoder: diffusers' numbers, in a model folder, through the networks."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import toy
from diffusers import AutoencoderTiny
from safetensors.torch import load_file

from vsuav.checkpoint import ModelError, convert, load
from vsuav.networks import Networks, choose, compiled
from vsuav.tiny import TinyConfig, TinyVAE

SIZES = {
    "encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8), "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (2, 1, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> AutoencoderTiny:
    torch.manual_seed(8)
    return AutoencoderTiny(**SIZES).requires_grad_(False)


@pytest.fixture(scope="module")
def model(theirs, tmp_path_factory):
    """A model folder with a tiny decoder as diffusers writes it."""
    folder = toy.write(tmp_path_factory.mktemp("model") / "toy")
    theirs.save_pretrained(folder / "vae_tiny")
    return folder


def networks(model, **changes) -> Networks:
    models, settings = choose({"model": model, "threads": 1, "device": "cpu", "dtype": "float32"}, 24, 20)
    return Networks(models, replace(settings, **changes))


@torch.inference_mode()
def test_it_gives_the_numbers_of_diffusers(theirs, model):
    ours = load(model).tiny_vae
    z = 3 * torch.randn(2, 4, 3, 6, 5)
    expected = torch.stack([theirs.decode(frame).sample for frame in z.unbind(2)], dim=2)
    assert expected.shape == (2, 3, 3, 24, 20) and expected.std() > 0.05
    torch.testing.assert_close(ours.decode(z), expected, rtol=0, atol=1e-5)


def test_it_decodes_in_the_place_of_the_others(theirs, model):
    latents, low_res = torch.randn(3, 4, 20, 24), torch.rand(3, 3, 20, 24) * 2 - 1
    pictures = []
    for tile in ((0, 0), (64, 64)):
        each = networks(model, tiny_vae=True, tile=tile)
        with each.arithmetic():
            pictures.append(each.decode((0, 1, 2), list(latents), list(low_res)))
    expected = (theirs.decode(latents).sample.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(pictures[0], expected, rtol=0, atol=1e-5)
    assert torch.equal(*pictures)


def test_latents_do_not_depend_on_it(model):
    assert networks(model, tiny_vae=True).digest == networks(model).digest


def test_converting_keeps_it(model, tmp_path):
    convert(model, tmp_path / "copy")
    assert load(tmp_path / "copy").digest == load(model).digest
    assert {name.split(".")[0] for name in load_file(tmp_path / "copy/vae_tiny/diffusion_pytorch_model.safetensors")} \
        == {"decoder"}  # fmt: skip


def test_a_model_without_one_says_so(tmp_path):
    with pytest.raises(ValueError, match="tiny_vae must be False for this model"):
        networks(toy.write(tmp_path / "toy"), tiny_vae=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"num_decoder_blocks": [3, 3, 3, 1], "decoder_block_out_channels": [8] * 4},
            "must enlarge 4 times .* 8 times",
        ),
        ({"decoder_block_out_channels": [8, 16, 8]}, "decoder_block_out_channels must be equal numbers"),
        ({"act_fn": "gelu"}, "act_fn must be 'relu'"),
        ({"latent_channels": 16}, "does not fit its configuration"),
    ],
)
def test_other_decoders_are_refused(model, tmp_path, changes, said):
    folder = tmp_path / "other"
    shutil.copytree(model, folder)
    config = folder / "vae_tiny" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ModelError, match=said):
        load(folder)


# -- compiled networks


compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled by another process is used: a killed one leaves torn files."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()


def tiny() -> TinyVAE:
    torch.manual_seed(9)
    return TinyVAE(TinyConfig((8, 8, 8), (1, 0, 0))).requires_grad_(False)


@compiler
@pytest.mark.long
def test_a_compiled_network_gives_the_same_whatever_shapes_it_saw_before(fresh):
    vae, sizes = tiny(), [(6, 8), (7, 9)]
    inputs = {size: torch.randn(1, 4, 1, *size) for size in sizes}
    results = []
    for order in (sizes, sizes[::-1]):
        torch._dynamo.reset()
        call = compiled(vae.decode, "kernels", torch.device("cpu"))
        with torch.inference_mode():
            results.append({size: call(inputs[size]) for size in order})
    for size in sizes:
        assert torch.equal(results[0][size], results[1][size])
        torch.testing.assert_close(results[0][size], vae.decode(inputs[size]), rtol=0, atol=1e-5)


@compiler
@pytest.mark.long
def test_a_compiled_model_restores_as_an_ordinary_one(model, fresh):
    low_res = list(torch.rand(3, 3, 20, 24) * 2 - 1)
    latents = list(torch.randn(3, 4, 20, 24))
    plain, other = (networks(model, compile=how, reuse_steps=(2,)) for how in ("none", "kernels"))
    assert plain.digest != other.digest
    for guidance in (1.0, 3.0):
        results = []
        for each in (plain, other):
            each.settings = replace(each.settings, guidance_scale=guidance)
            with each.arithmetic():
                inputs = (0, 1, 2), latents, low_res, "rain"
                v, deep = each.window_and_deep(1, *inputs)
                reused = each.window(2, *inputs, deep) if guidance == 1.0 else v
                results.append((v, each.window(1, *inputs), reused, each.decode((0, 1, 2), latents, low_res)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float(a.abs().max()))


def test_graphs_need_a_gpu(model):
    with pytest.raises(ValueError, match="compile must be 'none' or 'kernels' on a CPU, got 'graphs'"):
        networks(model, compile="graphs")
