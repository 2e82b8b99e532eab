"""Training that begins with a model folder: an image upscaler, the released layout, the bundled one, at toy size."""

import json
import shutil
from pathlib import Path

import layouts
import numpy as np
import pytest
import torch
from adopt import adopt
from export import export
from test_text import write_clip
from test_train import weights
from train import PROMPTS, train

from vsuav.checkpoint import load
from vsuav.text import TextEncoder, write_prompts
from vsuav.unet import temporal_parameters

STAGE = {"steps": 2, "batch": 1, "frames": 3, "size": 8, "warmup": 1, "ema": 0.0, "data": "clips.npy"}
CONFIG = {
    "seed": 3, "precision": "no", "stlpips": False,
    "stages": {
        "temporal": {**STAGE, "rates": {"unet": 1e-2}},
        "vae_video": {**STAGE, "after": ["temporal"], "rates": {"new": 1e-2}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    np.save(folder / "clips.npy", rng.integers(0, 256, (3, 5, 40, 40, 3), dtype=np.uint8))
    np.save(folder / "basis.npy", rng.normal(size=(4, 48)).astype(np.float32))
    return folder


@pytest.fixture(scope="module", params=layouts.WRITERS)
def model(request, tmp_path_factory) -> Path:
    folder = layouts.WRITERS[request.param](tmp_path_factory.mktemp("model") / "folder")
    if request.param == "sd-x4":
        write_clip(folder)
        (folder / "prompts.safetensors").unlink()
    else:
        states = TextEncoder(lambda text: torch.full((5, layouts.WIDTH), float(len(text))))
        write_prompts(folder / "prompts.safetensors", states, list(PROMPTS))
    return folder


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_folder_is_trained_on_and_comes_out_as_a_folder(model, data, tmp_path):
    _, networks, _ = adopt(model)
    start = {f"{part}.{n}": v.clone() for part, net in networks.items() for n, v in net.state_dict().items()}
    in_time = {f"unet.{name}" for name in temporal_parameters(networks["unet"])}

    first = weights(train("temporal", CONFIG, data, tmp_path, init=model))
    changed = {name for name in moved(start, first) if "rotary_emb" not in name}
    assert changed and changed <= in_time
    second = weights(train("vae_video", CONFIG, data, tmp_path))
    changed = moved(first, second)
    assert changed and all(name.startswith("vae_video.decoder.") and "_3d." in name for name in changed)

    export(tmp_path / "vae_video.pt", tmp_path / "new", tmp_path / "prompts.safetensors")
    old, new = load(model), load(tmp_path / "new")
    name = "up_blocks.0.resnets.0.conv1.weight"
    assert torch.allclose(new.unet.state_dict()[name], old.unet.state_dict()[name], atol=2e-3)
    assert new.schedule == old.schedule and new.low_res_schedule == old.low_res_schedule
    assert new.video_vae.config.condition_img and new.defaults["video_vae"]
    assert torch.equal(new.text.encode(PROMPTS[3]), old.text.encode(PROMPTS[3]))
    assert (tmp_path / "new" / "text_encoder").is_dir() == (model / "text_encoder").is_dir()


def test_an_image_decoder_grows_without_changing(tmp_path):
    layouts.write_image(tmp_path)
    _, networks, _ = adopt(tmp_path)
    z, low = torch.randn(1, 4, 3, 5, 6), torch.randn(1, 3, 3, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(networks["vae_video"].decode(z, low), networks["vae"].decode(z))


def test_a_folder_with_the_video_decoder_alone(tmp_path):
    folder = layouts.write_diffusers(tmp_path / "model")
    shutil.rmtree(folder / "vae")
    described, networks, _ = adopt(folder)
    assert described["vae"] == described["vae_video"] and networks["vae"] is not networks["vae_video"]
    same = networks["vae_video"].state_dict()
    assert all(torch.equal(value, same[name]) for name, value in networks["vae"].state_dict().items())


def test_noise_prediction_is_refused(data, tmp_path):
    folder = layouts.write_bundled(tmp_path / "model")
    states = TextEncoder(lambda text: torch.zeros(5, layouts.WIDTH))
    write_prompts(folder / "prompts.safetensors", states, list(PROMPTS))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="train: temporal needs a model of v_prediction, got epsilon"):
        train("temporal", CONFIG, data, tmp_path / "out", init=folder)
