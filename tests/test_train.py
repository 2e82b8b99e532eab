"""Training at toy size: resuming is exact, frozen layers stay frozen, the data's order is a function of the step."""

import csv
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import toy
from export import export
from fakes import Fake
from fastnorm import speed_up
from hypothesis import given
from hypothesis import strategies as st
from perceptual import LAYOUTS, MEMBER
from safetensors.torch import save_file
from train import (
    LEVELS,
    PROMPTS,
    Batches,
    Learner,
    as_tensor,
    build,
    fill_levels,
    flicker,
    flows,
    holds,
    look,
    moving,
    seeded,
    shortfall,
    tinted,
    train,
    turned,
    view,
)

from vsuav.checkpoint import load
from vsuav.engine import restore
from vsuav.flow import DIS
from vsuav.layers import JointNorm, VolumeConv
from vsuav.metrics import psnr_y
from vsuav.schedule import Schedule
from vsuav.settings import Settings
from vsuav.text import read_prompts
from vsuav.unet import temporal_parameters


def config() -> dict:
    stage = {"steps": 4, "batch": 2, "size": 8, "warmup": 1, "sampler": {"steps": [2], "weights": [1]}, "ema": 0.5}
    code = {"latent_channels": 5, "scaling_factor": 1.0, "bicubic_skip": True, "fading": True}
    stills, clips = {**stage, "data": "stills.npy"}, {**stage, "data": "clips.npy", "frames": 4, "batch": 1}
    return {
        "seed": 3, "precision": "no", "stlpips": False, "unet": toy.UNET | {"in_channels": 8, "out_channels": 5},
        "vae": toy.VAE_IMAGE | code,
        "vae_video": {
            **toy.VAE_VIDEO, **code,
            "num_class_embeds": 300, "enlarger_channels": 8, "enlarger_layers": 2, "enlarger_meeting": 4,
            "enlarger_beside": True,
        },
        "scheduler": toy.SCHEDULER,
        "model": {"defaults": toy.DEFAULTS, "presets": toy.PRESETS},
        "stages": {
            "vae": {**stills, "rates": {"encoder": 1e-3, "decoder": 1e-3}},
            "unet": {**stills, "looks": 0.5, "rates": {"unet": 1e-3, "levels": 1e-3}},
            "fewstep": {
                **stills, "decode": 4, "after": ["unet"], "rates": {"unet": 1e-3, "levels": 1e-3, "decoder": 1e-3}
            },
            "temporal": {**clips, "decode": 4, "after": ["fewstep", "unet"], "rates": {"unet": 1e-3}},
            "vae_video": {**clips, "after": ["temporal", "unet"], "rates": {"decoder": 1e-3, "new": 1e-3}},
            "mixed": {
                **clips, "as": "vae_video", "parts": [{"data": "stills.npy", "batch": 2, "frames": 1}, {}],
                "rates": {"decoder": 1e-3, "new": 1e-3},
            },
            "again": {**clips, "as": "vae_video", "again": 3, "rates": {"decoder": 1e-3, "new": 1e-3}},
            "whole": {
                **clips, "as": "temporal", "decode": 4, "parts": [{}, {"data": "stills.npy", "batch": 2, "frames": 1}],
                "rates": dict.fromkeys(["unet", "image", "levels", "decoder", "enlarger"], 1e-3) | {"shares": 0.02},
            },
            "vae_image": {**stills, "after": ["unet"], "rates": {"decoder": 1e-3}},
            "enlarger": {**stills, "after": ["unet"], "rates": {"enlarger": 1e-3}},
            "beside": {
                **clips, "as": "enlarger", "frames": 3, "degrain": 0.5, "again": 2, "psnr": 0.02,
                "parts": [{"data": "stills.npy", "batch": 2, "drift": 2}, {}], "rates": {"enlarger": 1e-3},
            },
            "nearer": {
                **clips, "as": "vae_video", "frames": 3, "degrain": 0.5, "decode": 4,
                "parts": [{"data": "stills.npy", "batch": 2, "frames": 1}, {}],
                "rates": {"enlarger": 1e-3, "new": 1e-3},
            },
            "trust": {**clips, "as": "vae_video", "rates": {"enlarger": 1e-3, "shares": 0.02}},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    np.save(folder / "stills.npy", rng.integers(0, 256, (5, 40, 40, 3), dtype=np.uint8))
    np.save(folder / "clips.npy", rng.integers(0, 256, (3, 5, 40, 40, 3), dtype=np.uint8))
    np.save(folder / "basis.npy", rng.normal(size=(4, 48)).astype(np.float32))
    states = {str(i): torch.randn(3, toy.UNET["cross_attention_dim"]) for i in range(len(PROMPTS))}
    save_file(states, folder / "prompts.safetensors", metadata={"prompts": json.dumps(PROMPTS)})
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(path: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(path, weights_only=True)["weights"]
    return {f"{part}.{name}": value for part, state in saved.items() for name, value in state.items()}


@pytest.mark.parametrize("stage", ["unet", "fewstep", "mixed", "again", "beside", "nearer"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(data, tmp_path, stage):
    whole = weights(train(stage, config(), data, tmp_path / "whole"))
    train(stage, config(), data, tmp_path / "broken", stop=2)
    resumed = weights(train(stage, config(), data, tmp_path / "broken", resume=True))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_resumed_runs_log_goes_on_where_it_was(data, tmp_path):
    """Rows that the break falls into have all their batches; only the seconds begin again."""
    rows = {}
    for name, stops in (("whole", [None]), ("broken", [2, None])):
        for number, stop in enumerate(stops):
            train("unet", config(), data, tmp_path / name, stop=stop, log_every=3, resume=number > 0)
        lines = [line.split(",") for line in (tmp_path / name / "unet.csv").read_text().splitlines()]
        place = lines[0].index("seconds")
        rows[name] = [line[:place] + line[place + 1 :] for line in lines]
    assert rows["broken"] == rows["whole"] and len(rows["whole"]) > 1


@pytest.mark.parametrize("stage", [
        "vae", "unet", "temporal", "whole", "vae_video", "vae_image", "enlarger", "beside", "trust"
    ]
)  # fmt: skip
def test_only_what_a_stage_trains_moves(data, tmp_path, stage):
    settings = config()
    before = {f"{part}.{n}": v.clone() for part, net in build(settings).items() for n, v in net.state_dict().items()}
    after = weights(train(stage, settings, data, tmp_path, steps=2))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    unet = build(settings)["unet"]
    in_time = {f"unet.{name}" for name in temporal_parameters(unet)}
    allowed = {
        "vae": lambda n: n.startswith(("vae.encoder.", "vae.quant", "vae_video.")) and "_3d" not in n,
        "unet": lambda n: n.startswith("unet.") and n not in in_time,
        "temporal": lambda n: n in in_time or "rotary_emb" in n,
        "whole": lambda n: n.startswith(("unet.", "vae_video.decoder", "vae_video.post_quant", "vae_video.enlarger.")),
        "vae_video": lambda n: n.startswith(("vae_video.decoder", "vae_video.post_quant")),
        "vae_image": lambda n: n.startswith(("vae.decoder", "vae.post_quant")),
        "enlarger": lambda n: n.startswith("vae_video.enlarger.") and "class_embedding" not in n,
        "beside": lambda n: n.startswith("vae_video.enlarger.") and "class_embedding" not in n,
        "trust": lambda n: n.startswith("vae_video.enlarger."),
    }[stage]
    assert moved and all(allowed(name) for name in moved), sorted(n for n in moved if not allowed(n))
    if "shares" in settings["stages"][stage]["rates"]:
        assert "vae_video.enlarger.class_embedding.weight" in moved


def test_a_model_from_before_the_enlarger_goes_on_with_a_fresh_one(data, tmp_path):
    settings = config()
    path = train("unet", settings, data, tmp_path, steps=1)
    saved = torch.load(path, weights_only=True)
    older = {k: v for k, v in saved["weights"]["vae_video"].items() if not k.startswith("enlarger.")}
    torch.save({**saved, "weights": saved["weights"] | {"vae_video": older}}, path)
    after = weights(train("trust", settings, data, tmp_path / "on", init=path, steps=1))
    assert all(torch.equal(after[f"vae_video.{name}"], value) for name, value in older.items())
    shares = after["vae_video.enlarger.class_embedding.weight"]
    assert shares.shape == (300, 1) and (shares + 4).abs().max() < 0.1
    del saved["weights"]["vae_video"]["decoder.conv_in.weight"]
    torch.save(saved, path)
    with pytest.raises(RuntimeError, match="decoder.conv_in.weight"):
        train("trust", settings, data, tmp_path / "on", init=path, steps=1)


def test_the_decoder_is_frozen_at_first(data, tmp_path):
    settings = config()
    settings["stages"]["fewstep"]["decoder_frozen"] = 0.5
    settings["stages"]["fewstep"]["ema"] = 0.0
    start = build(settings)["vae_video"].state_dict()
    half = weights(train("fewstep", settings, data, tmp_path, stop=2))
    full = weights(train("fewstep", settings, data, tmp_path, resume=True))
    name = "decoder.conv_in.weight"
    assert torch.equal(half[f"vae_video.{name}"], start[name])
    assert not torch.equal(full[f"vae_video.{name}"], start[name])


def test_a_stage_may_have_a_name_of_its_own(data, tmp_path):
    settings = config()
    settings["stages"]["settle"] = {**settings["stages"]["fewstep"], "as": "fewstep"}
    named, plain = (weights(train(s, settings, data, tmp_path / s, steps=1)) for s in ("settle", "fewstep"))
    assert any(not torch.equal(named[name], plain[name]) for name in named)  # other batches, the same losses
    for name, kind in (("polish", None), ("settle", "polish")):
        settings["stages"]["settle"]["as"] = kind
        with pytest.raises(ValueError, match=f"train: stage must be one of vae, .*, settle, got '{name}'"):
            train(name, settings, data, tmp_path)


def test_the_quick_layers_are_the_same_functions():
    torch.manual_seed(0)
    for layer, x in (
        (JointNorm(2, 6, 1e-6), torch.randn(2, 6, 3, 5, 4) + 1),
        (VolumeConv(6, 4, 3, padding=1), torch.randn(2, 6, 3, 5, 4)),
        (VolumeConv(6, 4, 3, padding=1), torch.randn(2, 6, 1, 5, 4)),
    ):
        torch.nn.init.normal_(layer.bias)
        found = []
        for quick in (False, True):
            if quick:
                speed_up(layer)
            layer.zero_grad()
            source = x.clone().requires_grad_()
            y = layer(source, act=True) if isinstance(layer, JointNorm) else layer(source)
            (y * torch.arange(y.numel()).view(y.shape).sin()).sum().backward()
            found.append([y.detach(), source.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
        for expected, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


def test_batches_are_a_function_of_the_step(data):
    stage = config()["stages"]["unet"]
    one, two = (Batches(data, stage, 3, "unet") for _ in range(2))
    for key, value in one[7].items():
        assert torch.equal(value, two[7][key])
    assert not torch.equal(one[7]["hr"], one[8]["hr"])
    assert not torch.equal(one[7]["hr"], Batches(data, stage, 3, "unet", rank=1)[7]["hr"])
    assert one[0]["hr"].shape == (2, 3, 1, 32, 32) and one[0]["lr"].shape == (2, 3, 1, 8, 8)


def test_the_parts_of_a_step_have_batches_of_their_own(data):
    batches = Batches(data, config()["stages"]["mixed"], 3, "mixed")
    assert len(batches) == 8
    stills, clips = (2, 3, 1, 32, 32), (1, 3, 4, 32, 32)
    assert [tuple(batches[k]["hr"].shape) for k in range(3)] == [stills, clips, stills]
    assert not torch.equal(batches[0]["hr"], batches[2]["hr"])


def test_a_picture_that_drifts_is_seen_through_a_moving_window():
    """Every view is a part of the picture, and each as far from the last as the one before; all of it is reached."""
    rows, columns = np.mgrid[:40, :50]
    picture = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)
    steps, corners = [], []
    for seed in range(200):
        views = moving(picture, 5, 16, 7.0, np.random.default_rng(seed))
        place = views[:, 0, 0, :2].astype(int)
        for seen, (y, x) in zip(views, place, strict=True):
            assert np.array_equal(seen, picture[y : y + 16, x : x + 16])
        moves = np.diff(place, axis=0)
        assert np.ptp(moves, axis=0).max() <= 1 and abs(moves).max() <= 7
        steps.append(moves.mean(0))
        corners += [*place]
    assert np.min(corners, axis=0).tolist() == [0, 0] and np.max(corners, axis=0).tolist() == [24, 34]
    assert np.min(steps, axis=0).max() < -5 and np.max(steps, axis=0).min() > 5


def test_with_degrain_a_batch_has_what_the_decoder_sees(data, monkeypatch):
    """As the engine makes it of the same frames, on which it is asked for the middle ones of a shot."""
    monkeypatch.setattr("train.ALONE", 0.0)
    seen_by_engine = {}

    class Spy(Fake):
        def flow(self, first, second):
            return torch.cat(DIS()(first, second))

        def decode(self, frames, latents, low_res, beside):
            seen_by_engine.update({n: (low, told) for n, low, told in zip(frames, low_res, beside, strict=True)})
            return super().decode(frames, latents, low_res, beside)

    low = np.load(data / "stills.npy")[0]
    low = np.stack([cv2.GaussianBlur(low, (0, 0), 3)[k : k + 24, 2 * k : 2 * k + 24] for k in range(5)])
    seen, beside = view(low, slice(1, 4), 0.5, np.random.default_rng(0))
    restore(as_tensor(low).transpose(0, 1), Spy(Settings(steps=1, degrain=0.5)))
    assert (seen - as_tensor(low)[:, 1:4]).abs().max() > 1e-3 and (beside.abs().amax((1, 2, 3)) > 1e-3).all()
    for k in range(3):
        low_res, told = seen_by_engine[k + 1]
        torch.testing.assert_close(seen[:, k], low_res, rtol=0, atol=1e-3)  # the engine's flow is in half precision
        torch.testing.assert_close(beside[:, k], told, rtol=0, atol=1e-2)


def test_with_degrain_clips_and_pictures_have_the_frames_they_should(data):
    clips = Batches(data, config()["stages"]["beside"], 3, "beside")
    assert [tuple(clips[k]["hr"].shape) for k in range(2)] == [(2, 3, 3, 32, 32), (1, 3, 3, 32, 32)]
    for k in range(2):
        assert clips[k]["seen"].shape == clips[k]["lr"].shape and clips[k]["beside"].shape[1:] == (6, 3, 8, 8)
    pictures = Batches(data, config()["stages"]["nearer"], 3, "nearer")[0]
    assert torch.equal(pictures["seen"], pictures["lr"]) and not pictures["beside"].any()


@pytest.mark.parametrize("name", ["mixed", "whole"])
def test_a_step_takes_the_mean_gradient_of_its_parts(data, tmp_path, name):
    """The image model's layers of a stage of both clips and pictures take theirs from the pictures alone."""
    settings = config()
    stage = settings["stages"][name]
    train(name, settings, data, tmp_path, stop=1)
    learner = Learner(
        build(settings), Schedule.from_config(toy.SCHEDULER), stage, stage["as"],
        torch.stack([read_prompts(data / "prompts.safetensors")[p] for p in PROMPTS]),
        torch.from_numpy(np.load(data / "basis.npy")),
    )  # fmt: skip
    groups = learner.trainable()
    names = [n for group in groups.values() for n in group]
    parameters = [dict(learner.named_parameters())[n] for n in names]
    batches = Batches(data, stage, settings["seed"], name)
    for k in range(2):
        torch.manual_seed(seeded(settings["seed"], name, k, 0))
        learner(batches[k], 0)["loss"].backward()
        if "frames" not in stage["parts"][k]:
            for image in groups.get("image", ()):
                dict(learner.named_parameters())[image].grad = None
    torch.nn.utils.clip_grad_norm_(parameters, 2.0)  # the sum of two, so twice the limit
    saved = torch.load(tmp_path / f"{name}.state.pt", weights_only=True)["optimizer"]["state"]
    for i, parameter in enumerate(parameters):
        first = saved[i]["exp_avg"] / 0.1  # betas[0] is 0.9
        torch.testing.assert_close(first, parameter.grad / 2, rtol=0, atol=1e-4 * float(first.abs().max()) + 1e-7)


def test_pictures_come_last_where_the_image_model_is_trained(data, tmp_path):
    settings = config()
    settings["stages"]["whole"]["parts"].reverse()
    with pytest.raises(ValueError, match="train: whole trains the image model, so pictures must be its last part"):
        train("whole", settings, data, tmp_path)


def test_some_sampling_starts_without_noise(data):
    """As often as the stage says of the level: always at 0, one in four at 20, never at 60."""
    stage = {**config()["stages"]["fewstep"], "cold": [1, 0.25, 0, 0, 0]}
    learner = Learner(
        build(config()), Schedule.from_config(toy.SCHEDULER), stage, "fewstep", torch.zeros(9, 3, 16),
        torch.from_numpy(np.load(data / "basis.npy")),
    )  # fmt: skip
    torch.manual_seed(0)
    levels, like = torch.tensor([0, 20, 60]).repeat(400), torch.zeros(1200, 5, 1, 2, 2)
    start = learner.visit({}, None, 0, like, levels, like)
    cold = start.flatten(1).abs().amax(1) == 0
    assert cold[levels == 0].all() and not cold[levels == 60].any()
    assert 70 <= int(cold[levels == 20].sum()) <= 130
    assert start[~cold].std().item() == pytest.approx(1, abs=0.05)


def test_the_decoder_learns_from_what_propagation_hands_it(data):
    """At the last step, where the stage says so of the level: frames of a still clip become the two chains' means."""
    stage = {**config()["stages"]["vae_video"], "propagated": [0, 1, 0.25, 0, 0]}
    learner = Learner(
        build(config()), Schedule.from_config(toy.SCHEDULER), stage, "vae_video", torch.zeros(9, 3, 16),
        torch.from_numpy(np.load(data / "basis.npy")),
    )  # fmt: skip
    torch.manual_seed(0)
    frame = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    still = {"lr": frame.expand(3, 3, 4, 16, 16)}
    still["forward"], still["backward"] = flows(still["lr"])
    estimate = torch.randn(3, 5, 4, 16, 16, requires_grad=True)
    levels = torch.tensor([0, 20, 60])
    a, b, c, d = estimate[1].unbind(1)
    back = [a / 2 + b / 4 + c / 8 + d / 8, b / 2 + c / 4 + d / 4, c / 2 + d / 2, d]
    for i in range(1, 4):
        back[i] = (back[i] + back[i - 1]) / 2
    result = learner.propagated(estimate, still, levels, 1.0)
    torch.testing.assert_close(result[1], torch.stack(back, 1))
    torch.testing.assert_close(result[0], estimate[0])
    result[1].square().sum().backward()
    assert estimate.grad[1].abs().amin() > 0
    assert learner.propagated(estimate, still, levels, 0.5) is estimate
    assert learner.propagated(estimate[:, :, :1], still, levels, 1.0).shape[2] == 1
    last = {name: value[2:] for name, value in still.items()}
    often = sum(
        not torch.equal(learner.propagated(estimate[2:], last, levels[2:], 1.0), estimate[2:]) for _ in range(100)
    )
    assert 10 <= often <= 42


def test_several_perceptual_networks_count_alike(data, tmp_path):
    """With random weights: each network alone, then both, on the same batch from the same state."""
    rng, folder = torch.Generator().manual_seed(0), tmp_path / "weights"
    for name, layout in LAYOUTS.items():
        state, width = {}, 3
        words = [word.split(":") for word in layout.replace("|", "").split() if ":" in word]
        for i, (out, kernel, _) in enumerate(words):
            shape = (int(out), width, int(kernel), int(kernel))
            state[f"net.slice1.{i}.weight"] = torch.randn(shape, generator=rng) / np.prod(shape[1:]) ** 0.5
            state[f"net.slice1.{i}.bias"], width = torch.zeros(shape[0]), shape[0]
        last = (64, 192, 384, 256, 256) if name == "alex" else (64, 128, 256, 512, 512)
        state |= {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=rng) for i, c in enumerate(last)}
        path = folder / MEMBER.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
    seen = {}
    for nets in (["alex"], ["vgg"], ["alex", "vgg"]):
        given = config() | {"stlpips": str(folder)}
        given["stages"]["vae_image"]["nets"] = nets
        out = tmp_path / "-".join(nets)
        train("vae_image", given, data, out, stop=1, log_every=1)
        with (out / "vae_image.csv").open() as file:
            seen[tuple(nets)] = float(next(csv.DictReader(file))["percept"])
    alone = seen["alex",], seen["vgg",]
    assert min(alone) > 0 and abs(alone[0] - alone[1]) > 1e-3 * max(alone)
    assert seen["alex", "vgg"] == pytest.approx(sum(alone) / 2, rel=1e-4)
    given["stages"]["vae_image"]["nets"] = ["squeeze"]
    with pytest.raises(ValueError, match="STLPIPS: net must be one of alex, vgg, got 'squeeze'"):
        train("vae_image", given, data, tmp_path / "squeeze", stop=1)


def test_perception_can_be_left_to_brightness():
    truth = torch.rand(1, 3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    colour = torch.tensor([0.3, -0.2, -0.1]).view(1, 3, 1, 1, 1).expand_as(truth)
    bright = torch.rand(1, 1, 2, 5, 7).expand_as(truth)
    torch.testing.assert_close(tinted(truth + colour, truth), truth)
    torch.testing.assert_close(tinted(truth + bright + colour, truth), truth + bright)


def test_colours_have_a_loss_of_their_own(data):
    """Without stLPIPS: an error of colour alone costs (1 + "colours") times its L1, one of brightness alone its L1."""
    stage = config()["stages"]["vae_image"] | {"colours": 2, "pixels": [3, 3, 3, 3, 3]}
    learner = Learner(
        build(config()), Schedule.from_config(toy.SCHEDULER), stage, "vae_image", torch.zeros(9, 3, 16),
        torch.from_numpy(np.load(data / "basis.npy")),
    )  # fmt: skip
    batch, level = {"hr": torch.zeros(1, 3, 1, 8, 8)}, torch.tensor([20])
    for error, times in (((0.3, -0.2, -0.1), 3), ((0.2, 0.2, 0.2), 1)):
        result = torch.tensor(error).view(1, 3, 1, 1, 1).expand(1, 3, 1, 8, 8)
        assert learner.picture(result, batch, level)["loss"].item() == pytest.approx(3 * times * 0.2, rel=1e-5)


@given(st.integers(0, 1000), st.floats(0.2, 0.8))
def test_the_psnr_loss_counts_the_decibels_that_are_reported(seed, size):
    """For clips of one frame; beside the metric, which has another peak."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(3, 3, 1, 9, 7, generator=generator)
    noise = size * torch.randn(truth.shape, generator=generator)
    metric = [psnr_y(*(x[:, 0][None] / 2 + 0.5 for x in pair)) for pair in zip(truth + noise, truth, strict=True)]
    loss = shortfall(truth + noise, truth)
    assert (loss[0] - loss[1:]).tolist() == pytest.approx([m - metric[0] for m in metric[1:]], abs=0.05)


def test_the_psnr_loss_is_the_levels_own(data):
    stage = config()["stages"]["vae_image"] | {"pixels": [0, 0, 0, 0, 0], "psnr": [0.5, 0, 0, 0, 0]}
    learner = Learner(
        build(config()), Schedule.from_config(toy.SCHEDULER), stage, "vae_image", torch.zeros(9, 3, 16),
        torch.from_numpy(np.load(data / "basis.npy")),
    )  # fmt: skip
    batch, result = {"hr": torch.zeros(1, 3, 1, 8, 8)}, torch.full((1, 3, 1, 8, 8), 0.2)
    losses = [learner.picture(result, batch, torch.tensor([level]))["loss"].item() for level in (0, 20)]
    assert losses == pytest.approx([0.5 * 30, 0], abs=0.01)


def test_the_latents_of_any_other_model_are_its_own_encoders(data):
    """What --init of a released or inflated checkpoint needs; the bundled models' code is linear."""
    given = config()
    given |= {"unet": toy.UNET, "vae": toy.VAE_IMAGE, "vae_video": toy.VAE_VIDEO}
    networks = build(given)
    stage, basis = given["stages"]["temporal"], torch.from_numpy(np.load(data / "basis.npy"))
    batch = Batches(data, stage, 3, "temporal")[0]
    batch = {key: value[None] if value.ndim == 4 else value for key, value in batch.items()}
    learner = Learner(networks, Schedule.from_config(toy.SCHEDULER), stage, "temporal", torch.zeros(9, 3, 16), basis)
    with torch.no_grad():
        z = learner.code(batch)
        torch.testing.assert_close(z, networks["vae"].encode(batch["hr"])[0] * toy.VAE_IMAGE["scaling_factor"])
    assert z.shape == (1, 4, 4, 8, 8)


def seen(truth: torch.Tensor) -> dict[str, torch.Tensor]:
    there, back = flows(truth)
    return {"hr": truth, "flow": there, "steady": holds(there, back)}


def test_flicker_sees_change_over_time_only():
    still = torch.rand(1, 3, 1, 160, 160).expand(-1, -1, 3, -1, -1).contiguous()
    batch = seen(still)
    assert flicker(still, batch) < 1e-6
    assert flicker(still * 0.5 + 0.1, batch) < 1e-6
    assert flicker(still + 0.2 * torch.randn_like(still), batch) > 0.1
    assert flicker(still[:, :, :1], {"hr": still[:, :, :1]}) == 0


def test_flicker_follows_what_moves():
    """A picture that moves by two pixels a frame does not flicker; one that stands still while the truth moves does."""
    picture = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 170, 170), 9, 1) * 2 - 1
    moving = torch.stack([picture[..., :128, 2 * i : 2 * i + 128] for i in range(4)], 2)
    batch = seen(moving)
    assert 3 * flicker(moving, batch) < flicker(moving[:, :, :1].expand_as(moving), batch)


@pytest.mark.parametrize("way", range(8))
def test_a_turned_batch_is_one_of_turned_clips(way):
    """Pictures are mirrored and turned alike, and the flows of the result are the result's own."""
    picture = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 170, 170), 9, 1) * 2 - 1
    moving = torch.stack([picture[..., i : i + 128, 3 * i : 3 * i + 128] for i in range(3)], 2)
    batch = {**seen(moving), "lr": torch.nn.functional.avg_pool3d(moving, (1, 4, 4)), "prompt": torch.tensor([4])}
    result = turned(batch, way)
    torch.testing.assert_close(result["lr"], torch.nn.functional.avg_pool3d(result["hr"], (1, 4, 4)))
    assert torch.equal(result["hr"], moving) == (way == 0)
    assert result["prompt"] == 4
    error = (result["flow"] - seen(result["hr"])["flow"]).abs()[..., 16:-16, 16:-16]
    assert error.mean() < 0.1
    assert flicker(result["hr"], result) < 0.01


@pytest.mark.parametrize("again", [1, 3])
def test_a_batch_serves_as_many_steps_as_the_stage_says(data, tmp_path, monkeypatch, again):
    settings = config()
    settings["stages"]["mixed"] |= {"again": again, "steps": 5}
    given = []
    monkeypatch.setattr(Learner, "forward", lambda self, batch, step: given.append(batch) or self.nothing())
    monkeypatch.setattr(
        Learner, "nothing", lambda self: {"loss": sum(p.sum() for p in self.parameters() if p.requires_grad)},
        raising=False,
    )  # fmt: skip
    train("mixed", settings, data, tmp_path)
    made = Batches(data, settings["stages"]["mixed"], settings["seed"], "mixed")
    assert len(made) == 2 * -(-5 // again) and len(given) == 10
    for k, batch in enumerate(given):
        step, part = divmod(k, 2)
        expected = turned(made[step // again * 2 + part], step % again)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_a_stage_may_begin_with_parts_of_two(data, tmp_path):
    settings = config()
    unet, enlarger = (weights(train(stage, settings, data, tmp_path)) for stage in ("unet", "enlarger"))
    settings["stages"]["mixed"] |= {"after": ["unet"], "also": [["vae_video.enlarger.", "enlarger"]]}
    mixed = weights(train("mixed", settings, data, tmp_path))
    for name, value in mixed.items():
        if name.startswith("vae_video.enlarger."):
            assert torch.equal(value, enlarger[name]), name
        elif name.startswith("unet."):
            assert torch.equal(value, unet[name]), name
    assert any(not torch.equal(enlarger[n], unet[n]) for n in unet if n.startswith("vae_video.enlarger."))
    with pytest.raises(ValueError, match="also needs a weights file to start from, got None"):
        train("mixed", settings, data, tmp_path / "empty")


def test_a_loss_that_is_not_finite_stops_before_anything_is_written(data, tmp_path, monkeypatch):
    real = Learner.forward

    def broken(self, batch, step):
        losses = real(self, batch, step)
        return losses | {"loss": losses["loss"] * (math.nan if step == 3 else 1)}

    train("vae_image", config(), data, tmp_path, stop=2, save_every=2)
    kept = (tmp_path / "vae_image.pt").read_bytes()
    monkeypatch.setattr(Learner, "forward", broken)
    with pytest.raises(FloatingPointError, match="a loss before step 4 is nan; resume at a lower rate"):
        train("vae_image", config(), data, tmp_path, resume=True, stop=4, save_every=2)
    assert (tmp_path / "vae_image.pt").read_bytes() == kept


def test_untrained_noise_levels_lie_between_the_trained_ones():
    table = torch.full((1000, 2), torch.nan)
    known = LEVELS
    table[list(known)] = torch.tensor([[level, -level] for level in known], dtype=torch.float32)
    fill_levels(table)
    expected = torch.arange(1000.0).clamp(max=max(known))
    torch.testing.assert_close(table, torch.stack([expected, -expected], 1))


@pytest.mark.parametrize("name", PROMPTS[2:])
def test_every_look_changes_the_picture(name):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    changed = look(frames, name, rng)
    assert changed.shape == frames.shape and changed.dtype == np.uint8 and (changed != frames).mean() > 0.3


def test_what_was_trained_can_be_exported_and_loaded(data, tmp_path):
    path = train("unet", config(), data, tmp_path / "run", steps=1)
    export(path, tmp_path / "model", data / "prompts.safetensors")
    models = load(tmp_path / "model")
    assert models.kind == "vsuav" and models.defaults["preset"] == toy.DEFAULTS["preset"]
    name = "conv_in.weight"
    assert torch.allclose(models.unet.state_dict()[name], weights(path)[f"unet.{name}"], atol=1e-3)
    export(path, tmp_path / "model", tmp_path / "model" / "prompts.safetensors")  # new weights, the same prompts
    assert read_prompts(tmp_path / "model" / "prompts.safetensors").keys() == set(PROMPTS)


@pytest.mark.parametrize(
    "part, wanted",
    [
        ({"frames": 5}, "clips.npy must have 5 frames of 32x32 or more a clip, got 4 of 48x48"),
        ({"frames": 3, "degrain": 0.2}, "clips.npy must have 5 frames of 32x32 or more a clip, got 4 of 48x48"),
        ({"size": 13}, "clips.npy must have 4 frames of 52x52 or more a clip, got 4 of 48x48"),
        ({"data": "stills.npy", "frames": 2}, "stills.npy must have 2 frames of 32x32 or more a clip, got 1 of 48x48"),
    ],
)
def test_clips_that_are_too_short_or_too_small_are_refused_at_once(tmp_path, part, wanted):
    np.save(tmp_path / "clips.npy", np.zeros((2, 4, 48, 48, 3), np.uint8))
    np.save(tmp_path / "stills.npy", np.zeros((2, 48, 48, 3), np.uint8))
    stage = config()["stages"]["vae_video"] | part
    with pytest.raises(ValueError, match=f"train: {wanted}"):
        Batches(tmp_path, stage, 0, "vae_video")
    drifting = {"data": "stills.npy", "frames": 2, "size": 12, "drift": 3.0, "degrain": 0.2}
    Batches(tmp_path, stage | drifting, 0, "vae_video")
