"""Every kind of model folder comes back as what was written; every kind of damage is one clear line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import layouts
import pytest
import torch
import torch.nn.functional as F
import toy
from degrade import read_video
from safetensors.torch import load_file, save_file

from vsuav import checkpoint
from vsuav.checkpoint import ModelError, convert, load
from vsuav.folders import bundled
from vsuav.unet import UNetConfig, UNetVideo, set_temporal, temporal_parameters
from vsuav.vae import VAE, VAEConfig

MANIFESTS = Path(__file__).parent / "manifests"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder of each kind. Tests that spoil one work on a copy (`spoilt`)."""
    root = tmp_path_factory.mktemp("models")
    return {kind: write(root / kind) for kind, write in layouts.WRITERS.items()}


@pytest.fixture
def spoilt(folders, tmp_path):
    return lambda kind: Path(shutil.copytree(folders[kind], tmp_path / kind))


def refused(folder) -> str:
    """The message `load` refuses a folder with: always one line."""
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def inputs(config, t: int, h: int = 12, w: int = 10):
    return (
        torch.randn(1, 4, t, h, w), 301, torch.randn(1, 3, t, h, w), torch.randn(1, 5, config.cross_attention_dim),
        torch.tensor([40]),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["unet", "vae-3d", "vae-video"])
def test_released_sizes(name):
    """Every key and shape of the released files, in both directions, and their configurations, without the weights."""
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    build, settings = (UNetVideo, UNetConfig) if name == "unet" else (VAE, VAEConfig)
    with torch.device("meta"):
        network = build(settings.from_dict(manifest["config"]))
        tensors = {key: torch.empty(shape) for key, shape in manifest["tensors"].items()}
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == manifest["tensors"]
    if name == "unet":
        copies = [key for key in tensors if key.endswith("rotary_emb.freqs")]
        assert len(copies) == 17
        tensors |= {key: torch.arange(16.0) for key in copies}  # compared, so they need values
    fitted = checkpoint.canonical(tensors, network, Path("released"))
    assert fitted.keys() == {key for key, _ in network.named_parameters()}


@pytest.mark.parametrize("kind", ["uav", "uav-diffusers", "vsuav"])
def test_video_folders_come_back(folders, kind):
    models = load(folders[kind])
    assert models.kind == kind and models.path == folders[kind]
    for loaded, written in zip((models.unet, models.vae, models.video_vae), layouts.networks(), strict=True):
        ours, theirs = loaded.state_dict(), written.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert not any(value.is_meta for value in (*loaded.parameters(), *loaded.buffers()))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert len(list(loaded.parameters())) == len(list(written.parameters()))  # the frequencies stay one tensor
    args = inputs(models.unet.config, 3)
    with torch.no_grad():
        reference = layouts.networks()[0].requires_grad_(False)  # torch rounds otherwise where weights want gradients
        assert torch.equal(models.unet(*args), reference(*args))
    assert models.schedule.prediction_type == "v_prediction" and models.schedule.steps_offset == 1
    assert models.low_res_schedule.beta_schedule == "scaled_linear"
    assert models.text.encode(layouts.PROMPTS[0]).shape == (5, layouts.WIDTH)
    assert models.raft is None
    with pytest.raises(ModelError, match="flow='dis'"):
        models.raft_network()


def test_defaults_and_presets(folders):
    own = load(folders["vsuav"])
    assert own.defaults == layouts.DEFAULTS | {"video_vae": False} and own.presets == layouts.PRESETS
    released = load(folders["uav"])
    assert (released.defaults["noise_level"], released.defaults["preset"]) == (120, "reference")
    assert released.defaults["negative_prompt"] == "blur, worst quality"
    assert load(folders["sd-x4"]).defaults["noise_level"] == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(folders, dtype):
    models = load(folders["uav-diffusers"], dtype, vae_dtype=torch.float32)
    kinds = {name: parameter.dtype for name, parameter in models.unet.named_parameters()}
    assert kinds.pop(checkpoint.FREQUENCIES) == torch.float32  # angles
    assert set(kinds.values()) == {dtype}
    assert {p.dtype for p in models.vae.parameters()} == {torch.float32}
    assert models.digest == load(folders["uav-diffusers"]).digest


def test_one_frame_of_an_inflated_model_equals_diffusers(folders):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = folders["sd-x4"]
    models = load(folder)
    assert models.kind == "sd-x4" and models.video_vae is None
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet")
    sample, timestep, low_res, context, level = inputs(models.unet.config, 1, 16, 24)
    with torch.no_grad():
        ours = models.unet(sample, timestep, low_res, context, level)[:, :, 0]
        joined = torch.cat([sample, low_res], 1)[:, :, 0]
        expected = theirs(joined, timestep, context, class_labels=level).sample
        torch.testing.assert_close(ours, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)

        vae = AutoencoderKL.from_pretrained(folder / "vae")
        z, frames = torch.randn(1, 4, 1, 9, 7), torch.rand(1, 3, 1, 36, 28) * 2 - 1
        expected = vae.decode(z[:, :, 0]).sample
        ours = models.vae.decode(z)[:, :, 0]
        torch.testing.assert_close(ours, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)
        posterior = vae.encode(frames[:, :, 0]).latent_dist
        mean, logvar = models.vae.encode(frames)
        torch.testing.assert_close(mean[:, :, 0], posterior.mean, atol=1e-4, rtol=0)
        torch.testing.assert_close(logvar[:, :, 0], posterior.logvar, atol=1e-4, rtol=0)


def test_temporal_layers_of_an_inflated_model_pass_on_and_can_be_trained(folders):
    unet = load(folders["sd-x4"]).unet
    args = inputs(unet.config, 5)
    with torch.no_grad():
        with_them = unet(*args)
        set_temporal(unet, False)
        assert torch.equal(unet(*args), with_them)
        set_temporal(unet, True)
    new = set(temporal_parameters(unet))
    parameters = dict(unet.named_parameters())
    for name in new:
        parameters[name].requires_grad_(True)
    unet(*args).square().mean().backward()
    reached = {name for name in new if parameters[name].grad is not None and parameters[name].grad.abs().max() > 0}
    ends = {name for name in new if any(part in name for part in checkpoint.STARTS_AT_ZERO[:3])}
    assert ends and ends <= reached  # the branches' last layers learn first, then everything before them


def test_inflating_gives_the_same_weights_every_time(folders):
    first, second = (load(folders["sd-x4"]) for _ in range(2))
    assert first.digest == second.digest
    assert all(torch.equal(a, b) for a, b in zip(first.unet.parameters(), second.unet.parameters(), strict=True))


def test_older_attention_names_and_shapes(spoilt):
    """query/key/value/proj_attn and to_q/to_k/to_v/to_out.0, linear or 1x1 convolutions, are the same attention."""
    folder = spoilt("sd-x4")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    reference, tensors = load(folder), load_file(path)
    assert any(".to_q." in name for name in tensors)
    for shape in ("linear", "1x1"):
        older = {}
        for name, value in tensors.items():
            for new, old in checkpoint.VAE_NAMES.items():
                if new in name and "attentions" in name:
                    name = name.replace(new, old)
                    value = value[..., None, None].contiguous() if shape == "1x1" and value.ndim == 2 else value
            older[name] = value
        save_file(older, path)
        assert load(folder).digest == reference.digest


def test_rotary_copies_must_be_equal(spoilt):
    folder = spoilt("uav")
    path = folder / "unet" / "unet_video.bin"
    tensors = torch.load(path, weights_only=True)
    copy = next(name for name in tensors if name.endswith("attn_temporal.rotary_emb.freqs"))
    tensors[copy] = tensors[copy] + 1e-3
    torch.save(tensors, path)
    assert "must be copies of one tensor" in refused(folder)
    del tensors[copy]
    torch.save(tensors, path)
    assert load(folder).digest  # a copy less is no loss


def test_strict_keys_and_shapes(spoilt):
    folder = spoilt("uav")
    path = folder / "unet" / "unet_video.bin"
    whole = torch.load(path, weights_only=True)

    torch.save({k: v for k, v in whole.items() if not k.startswith("conv_out.")}, path)
    assert "2 missing, first conv_out.bias, conv_out.weight" in refused(folder)
    torch.save(whole | {"extra.weight": torch.ones(1)}, path)
    assert "1 unexpected, first extra.weight" in refused(folder)
    torch.save(whole | {"conv_out.bias": torch.ones(5)}, path)
    assert "conv_out.bias is (5,), should be (4,)" in refused(folder)
    without = {k: v for k, v in whole.items() if not k.endswith("freqs")}
    torch.save(without, path)
    assert "1 missing, first temporal_rotary_emb.freqs" in refused(folder)


def test_digest_is_of_contents_not_of_layout(folders, spoilt):
    assert load(folders["uav"]).digest == load(folders["uav-diffusers"]).digest
    folder = spoilt("uav-diffusers")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = "decoder.conv_out.bias"
    tensors[name] = torch.nextafter(tensors[name], torch.tensor(9.0))
    save_file(tensors, path)
    assert load(folder).digest != load(folders["uav"]).digest
    folder = spoilt("vsuav")
    layouts.write_json(folder / "scheduler" / "scheduler_config.json", layouts.SCHEDULER | {"beta_end": 0.0200001})
    assert load(folder).digest != load(folders["vsuav"]).digest


def test_convert_keeps_everything(folders, tmp_path):
    convert(folders["uav"], tmp_path / "safe")
    models = load(tmp_path / "safe")
    assert models.kind == "uav-diffusers" and models.digest == load(folders["uav"]).digest
    assert {p.suffix for p in (tmp_path / "safe").rglob("*") if p.is_file()} == {".json", ".safetensors"}
    with pytest.raises(ModelError, match="exists already"):
        convert(folders["uav"], tmp_path / "safe")
    convert(folders["uav"], tmp_path / "half", torch.float16)
    size = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "half" / size).stat().st_size < 0.6 * (tmp_path / "safe" / size).stat().st_size
    assert load(tmp_path / "half").digest != models.digest


def test_raft(spoilt, tmp_path):
    from torchvision.models.optical_flow import raft_large

    from vsuav import flow

    folder = spoilt("uav")
    network = raft_large(weights=None).eval()
    manifest_names = flow_names(flow, network)
    (folder / "propagator").mkdir()
    path = folder / "propagator" / "raft-things.pth"
    torch.save(manifest_names, path, _use_new_zipfile_serialization=False)
    models = load(folder)
    assert models.raft == path
    loaded = models.raft_network()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
    convert(folder, tmp_path / "safe")
    assert load(tmp_path / "safe").digest == models.digest
    manifest_names.popitem()
    torch.save(manifest_names, path)
    with pytest.raises(ModelError, match="1 tensors of RAFT large are missing"):
        load(folder).raft_network()


def flow_names(flow, network) -> dict[str, torch.Tensor]:
    """torchvision's tensors under the names of the released file."""
    known = json.loads((MANIFESTS / "raft.json").read_text())
    state = network.state_dict()
    names = {old: new or known[old.replace(".norm3.", ".downsample.1.")][0] for old, (new, _) in known.items()}
    return {old: state[new].clone() for old, new in names.items()}


def test_unknown_folders(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    said = refused(tmp_path / "photos")
    assert "unet/unet_video.bin" in said and "unet/diffusion_pytorch_model.safetensors" in said and "cat.png" in said
    said = refused(tmp_path / "nowhere")
    assert "does not exist" in said and "unet/unet_video.bin" in said
    assert "is a file" in refused(tmp_path / "photos" / "cat.png")


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("unet/unet_video_config.json", "unet_video_config.json does not exist"),
        ("unet/unet_video.bin", "looked for unet/unet_video.bin"),
        ("scheduler", "scheduler_config.json does not exist"),
        ("low_res_scheduler", "scheduler_config.json does not exist"),
        ("prompts.safetensors", "looked for text_encoder/config.json and prompts.safetensors"),
        ("vae", "looked for vae/vae_3d.bin"),
    ],
)
def test_incomplete_folders(spoilt, gone, says):
    folder = spoilt("uav")
    (folder / gone).rename(folder / "elsewhere")
    assert says in refused(folder)


def test_either_vae_is_enough(spoilt):
    folder = spoilt("uav")
    (folder / "vae" / "vae_3d.bin").unlink()
    models = load(folder)
    assert models.vae is None and models.video_vae is not None and models.defaults["video_vae"] is True


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_broken_json(spoilt, name):
    folder = spoilt("vsuav")
    for content in ("{", "[1]"):
        (folder / name).write_text(content)
        assert name in refused(folder).replace(os.sep, "/")


def test_settings_the_networks_do_not_have(spoilt):
    folder = spoilt("uav-diffusers")
    layouts.write_json(folder / "unet" / "config.json", layouts.UNET | {"act_fn": "gelu"})
    assert "act_fn must be 'silu', got 'gelu'" in refused(folder)
    layouts.write_json(folder / "unet" / "config.json", layouts.UNET)
    layouts.write_json(folder / "scheduler" / "scheduler_config.json", layouts.SCHEDULER | {"beta_schedule": "cosine"})
    assert "cosine" in refused(folder)


def test_other_diffusion_models_are_named_for_what_they_lack(spoilt):
    folder = spoilt("sd-x4")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight"] = torch.zeros(32, 4, 3, 3)
    save_file(tensors, path)
    assert "7 input channels, found 4" in refused(folder)


def test_truncated_and_malicious_weights(spoilt, tmp_path):
    folder = spoilt("vsuav")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "is cut off" in refused(folder)

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = spoilt("uav")
    torch.save({"conv_in.weight": Trap()}, folder / "unet" / "unet_video.bin")
    assert "wants to run code" in refused(folder)
    assert not (tmp_path / "ran").exists()


def test_stored_states_must_fit_the_network(spoilt):
    folder = spoilt("vsuav")
    save_file({"0": torch.zeros(5, 7)}, folder / "prompts.safetensors", metadata={"prompts": '["x"]'})
    assert f"(5, 7), the U-Net takes (l, {layouts.WIDTH})" in refused(folder)


PEAK = """
import os, resource, sys, torch
import vsuav.checkpoint as checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.nn.Linear(2, 2)(torch.ones(2))
small, *big = sys.argv[1:]
checkpoint.load(small)
for folder in big:
    if os.fork() == 0:
        before = peak()
        models = checkpoint.load(folder)
        weights = sum(p.numel() * p.element_size() for n in (models.unet, models.video_vae) for p in n.parameters())
        print(peak() - before, weights, flush=True)
        os._exit(0)
    os.wait()
"""


def test_loading_needs_the_weights_about_once(folders, tmp_path):
    """A U-Net of 130 MB, as pickle and as safetensors: the process grows by much less than twice that."""
    config = layouts.UNET | {"block_out_channels": [64, 512], "norm_num_groups": 32, "temporal_norm_num_groups": 32}
    with torch.device("meta"):
        network = UNetVideo(UNetConfig.from_dict(config))
    tensors = {n: torch.full(p.shape, 0.01) for n, p in network.named_parameters()}
    for kind, vae, unet in (("uav", "vae_3d.bin", "unet_video_config.json"),
                            ("uav-diffusers", "diffusion_pytorch_model.safetensors", "config.json")):  # fmt: skip
        folder = Path(shutil.copytree(folders[kind], tmp_path / kind))
        (folder / "vae" / vae).unlink()
        layouts.write_json(folder / "unet" / unet, config)
    torch.save(tensors, tmp_path / "uav" / "unet" / "unet_video.bin")
    save_file(tensors, tmp_path / "uav-diffusers" / "unet" / "diffusion_pytorch_model.safetensors")
    del tensors
    command = [sys.executable, "-c", PEAK, folders["uav"], tmp_path / "uav", tmp_path / "uav-diffusers"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(rows) == 2
    for rise, weights in rows:
        assert weights > 100e6
        assert rise < 1.3 * weights, (rise / weights, weights)


def test_loading_writes_nothing(folders):
    def state():
        return {p: p.stat().st_mtime_ns for p in folders["uav"].rglob("*")}

    before = state()
    load(folders["uav"])
    assert state() == before


def test_latents_of_unlike_width_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "UNET", toy.UNET | {"in_channels": 9, "out_channels": 6})
    folder = toy.write(tmp_path / "model")
    assert "latents of 4 channels, the U-Net's have 6" in refused(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block_out_channels": [8, 16]}, "must enlarge 4 times and give 3 colours, this one enlarges 2 times"),
        ({"block_out_channels": [8, 8, 8, 16]}, "this one enlarges 8 times"),
        ({"out_channels": 4}, "this one enlarges 4 times and gives 4"),
        ({"scaling_factor": 0}, "scaling_factor must be a finite number above 0, got 0"),
        ({"scaling_factor": None}, "scaling_factor must be a finite number above 0, got None"),
    ],
)
def test_decoders_that_give_no_picture_of_the_right_size(spoilt, change, says):
    path = spoilt("vsuav") / "vae" / "config.json"
    config = json.loads(path.read_text()) | change
    for name in ("down_block_types", "up_block_types"):
        if "block_out_channels" in change:
            config[name] = config[name][:1] * len(change["block_out_channels"])
    path.write_text(json.dumps(config))
    assert says in refused(path.parents[1])


@pytest.mark.parametrize("kind", ["vsuav", "uav"])
def test_weights_must_be_finite_floating_point(spoilt, kind):
    folder = spoilt(kind)
    path = folder / ("unet/unet_video.bin" if kind == "uav" else "unet/diffusion_pytorch_model.safetensors")
    tensors, write = (torch.load(path), torch.save) if kind == "uav" else (load_file(path), save_file)
    write(tensors | {"conv_in.bias": tensors["conv_in.bias"].fill_(float("nan"))}, path)
    assert "conv_in.bias holds values that are not finite in float32" in refused(folder)
    write(tensors | {"conv_in.bias": torch.full_like(tensors["conv_in.bias"], 70000)}, path)
    with pytest.raises(ModelError, match="not finite in float16"):
        load(folder, torch.float16)
    write(tensors | {"conv_in.bias": torch.ones(len(tensors["conv_in.bias"]), dtype=torch.int8)}, path)
    assert "conv_in.bias is of type int8: weights must be floating point" in refused(folder)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (None, "NoneType"),
        ("text", "'str' object is not a mapping"),
        ({"defaults": None}, "NoneType"),
        ({"presets": {"quick": {"steps": 0}}, "defaults": {}}, "steps must be between 1 and 1000, got 0"),
        ({"presets": {"quick": ["steps"]}, "defaults": {}}, "list"),
        ({"defaults": {"noise_level": "high"}}, "noise_level must be a whole number between 0 and 350, got 'high'"),
        ({"defaults": {"preset": "slow"}}, "preset must be one of"),
    ],
)
def test_settings_of_a_model_that_cannot_be_used(spoilt, own, says):
    path = spoilt("vsuav") / "model_index.json"
    path.write_text(json.dumps({"_class_name": "VsuavPipeline", "vsuav": own}))
    said = refused(path.parent)
    assert 'model_index.json: "vsuav" must hold defaults and presets' in said and says in said


@pytest.mark.skipif(bundled() is None, reason="models/mini is not here")
def test_the_bundled_model_loads():
    models = load()
    assert models.kind == "vsuav" and models.path.name == "mini" and load("mini").digest == models.digest
    assert models.text.encode(models.defaults["prompt"]).shape[1] == models.unet.config.cross_attention_dim


@pytest.mark.skipif(bundled() is None, reason="models/mini is not here")
def test_the_bundled_vaes_code_pictures():
    """Either encoder and decoder bring back some of what the reduced frame lost."""
    models = load()
    sample = Path(checkpoint.__file__).parents[1] / "scripts" / "sample" / "city.mp4"
    truth = torch.from_numpy(read_video(sample, 1)[0]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    truth = truth[..., : truth.shape[3] // 4 * 4, : truth.shape[4] // 4 * 4]
    small = F.interpolate(truth[:, :, 0], scale_factor=0.25, mode="bicubic", antialias=True).clamp(-1, 1)
    enlarged = F.interpolate(small, scale_factor=4, mode="bicubic")
    error = lambda picture: (picture - truth[:, :, 0]).square().mean()  # noqa: E731
    with torch.inference_mode():
        for vae in (models.vae, models.video_vae):
            z = vae.encode(truth)[0]
            decoded = vae.decode(z, small[:, :, None], torch.tensor([20]))[:, :, 0]
            assert error(decoded) < 0.95 * error(enlarged)
