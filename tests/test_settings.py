"""Settings: what is given, what a preset and a model add, every error one line, a digest that never drifts."""

import subprocess
import sys
from dataclasses import fields, replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from vsuav.settings import NOT_IN_DIGEST, PRESETS, Settings, auto_threads, auto_tile, check, resolve


def test_every_preset_resolves():
    for preset in PRESETS:
        settings = resolve({"preset": preset}, {}, {})
        assert settings.steps == PRESETS[preset]["steps"]
        assert all(0 <= index < settings.steps for index in settings.propagation_steps)


def test_the_caller_wins_over_the_preset_and_that_over_the_model():
    given_, defaults = {"steps": 12, "solver": None}, {"steps": 3, "noise_level": 40, "preset": "own"}
    settings = resolve(given_, defaults, {"own": {"steps": 7, "solver": "unipc"}})
    assert (settings.steps, settings.solver, settings.noise_level) == (12, "unipc", 40)
    assert resolve({}, {"preset": "fast"}, {"fast": {"steps": 2}}).steps == 2
    assert resolve({"preset": "preview"}, {"preset": "fast"}, {}).steps == PRESETS["preview"]["steps"]


def test_other_steps_move_a_presets_propagation_steps():
    def indices(steps, **more):
        return resolve({"preset": "reference", "steps": steps, **more}, {}, {}).propagation_steps

    assert indices(30) == (24, 26, 28)
    assert indices(20) == (16, 17, 18)
    assert indices(4) == (3,)
    assert indices(1) == (0,)
    assert indices(1000) == (800, 866, 933)
    assert indices(30, propagation_steps=[2]) == (2,)


def test_other_steps_or_guidance_drop_a_presets_reuse():
    own = {"own": {"steps": 2, "reuse_steps": [1]}}

    def reused(**given):
        return resolve({"preset": "own", **given}, {}, own).reuse_steps

    assert reused() == reused(guidance_scale=3.0) == (1,)
    assert reused(steps=4) == reused(steps=2) == reused(guidance_interval=(0, 0.5)) == reused(reuse_steps=[]) == ()
    assert reused(steps=4, reuse_steps=[3, 1]) == (1, 3)


def test_one_step_has_nothing_to_reuse():
    with pytest.raises(ValueError, match=r"reuse_steps must be empty for steps=1, got \(1,\)"):
        resolve({"steps": 1, "reuse_steps": [1]}, {}, {})


def test_numbers_of_numpy_are_numbers():
    tile = auto_tile(np.int32(64), 100, 100, "cpu")
    own = {"steps": np.int64(4), "temperature": np.float32(0.5), "tile": tile, "ensemble": np.int8(2)}
    settings = resolve({**own, "prompt": [(0, ""), (np.int64(3), "rain")]}, {}, {})
    assert settings == replace(settings, steps=4, temperature=0.5, tile=(64, 64), prompts=((0, ""), (3, "rain")))
    numbers = (settings.steps, settings.temperature, *settings.tile, settings.ensemble, settings.prompts[1][0])
    assert [type(number) for number in numbers] == [int, float, int, int, int, int]
    assert settings.digest() == replace(settings, steps=4).digest()


@pytest.mark.parametrize("level", [0, 350])
def test_noise_level_reaches_its_ends(level):
    assert resolve({"noise_level": level}, {}, {}).noise_level == level


BAD = {
    "noise_level": [400, -1, "high", 1.5, True], "steps": [0, 1001, 2.0, "4"], "solver": ["euler", 3],
    "spacing": ["even"], "guidance_scale": [-1, float("nan"), float("inf"), "6", True],
    "guidance_interval": [(0.5, 0.2), (0, 2), (0.1,), "all", 0.5, (float("nan"), 1)],
    "propagation_steps": [[5], [-1], ["a"], 2, [1.0], [True]], "propagation_radius": [0, -3, 1.5],
    "reuse_steps": [[4], [0], [-1], ["a"], 2, [1.0]],
    "degrain": [-0.1, 1.1, float("nan"), "1", True], "flow": ["farneback"],
    "color_fix": ["hist", 1], "scene_threshold": [-0.1, 1.1, "x"],
    "max_shot": [23, 25, 12, 0, "30", True], "tile": [(8, 64), (64,), "big", (64, 64, 64), (33.5, 64), (20, 20)],
    "tile_overlap": [-1, 2.5], "seed": [-1, 2**64, 0.5, "x"], "dtype": ["float64", 16], "threads": [0, -1, 1.5, "all"],
    "prompt": [3, [], [(0, 1)], [(1, "a"), (0, "b")], [(0, "a"), (0, "b")], [("0", "a")], b"rain", [(-1, "a")]],
    "temperature": [-0.1, 1.1, float("nan"), "0", True],
    "tiny_vae": [1, "yes"], "ensemble": [0, 3, 8, True, 2.0, "4"], "compile": [True, "fast"],
    "negative_prompt": [3, ["a"]], "preset": ["slow", 7], "video_vae": [1, "yes"], "scene_detect": ["no", 0],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_every_bad_value_is_one_line_that_names_it(name, value):
    with pytest.raises(ValueError) as caught:
        resolve({"steps": 4, name: value}, {}, {})
    line = str(caught.value)
    assert name in line
    assert ", got " in line
    assert "\n" not in line
    assert len(line) < 200


def test_numbers_come_out_in_their_types():
    settings = resolve({"guidance_scale": 3, "guidance_interval": [0, 1], "propagation_steps": [2, 1, 2]}, {}, {})
    assert isinstance(settings.guidance_scale, float)
    assert settings.guidance_interval == (0.0, 1.0)
    assert settings.propagation_steps == (1, 2)
    assert hash(settings) == hash(replace(settings))


def test_prompts_by_first_frame():
    settings = resolve({"prompt": [(3, "a"), (9, "b")]}, {}, {})
    assert [settings.prompt_at(n) for n in (0, 2, 3, 8, 9, 100)] == ["a", "a", "a", "a", "b", "b"]
    assert resolve({"prompt": "x"}, {"prompt": "y"}, {}).prompt_at(5) == "x"


@given(st.integers(0, 1000))
def test_guidance_acts_inside_its_interval_only(timestep):
    settings = Settings(guidance_scale=5.0, guidance_interval=(0.2, 0.8))
    assert settings.guided(timestep) == (200 <= timestep <= 800)
    assert not Settings(guidance_scale=1.0).guided(timestep)


OTHER = {
    "negative_prompt": "x", "steps": 31, "solver": "unipc", "spacing": "leading", "guidance_scale": 7.0,
    "guidance_interval": (0.1, 1.0), "noise_level": 121, "propagation_steps": (3,), "propagation_radius": 17,
    "flow": "raft", "video_vae": False, "color_fix": "adain", "scene_detect": False, "scene_threshold": 0.2,
    "max_shot": 24, "tile": (64, 64), "tile_overlap": 17, "seed": 1, "dtype": "float16", "prompts": ((0, "x"),),
    "device": "cuda:0", "threads": 2, "tiny_vae": True, "compile": "kernels", "ensemble": 4,
    "reuse_steps": (1,), "temperature": 0.5, "degrain": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_the_digest_changes_with_what_decides_a_latent_and_with_nothing_else(name):
    assert OTHER[name] != getattr(Settings(), name)
    changed = replace(Settings(), **{name: OTHER[name]}).digest() != Settings().digest()
    assert changed == (name not in NOT_IN_DIGEST)


def test_the_digest_is_the_same_in_every_process():
    """Another hash seed, another process: one digest; and the one that was written down here."""
    code = "from vsuav.settings import Settings; print(Settings(prompts=((0, 'ä'),), steps=7).digest())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {Settings(prompts=((0, "ä"),), steps=7).digest()}


def test_defaults_pass_their_own_check():
    assert check(Settings()) == Settings()


def test_auto_tile_is_a_table_of_size_device_and_its_memory():
    assert auto_tile("auto", 480, 360, "cpu") == (0, 0)
    assert auto_tile("auto", 640, 480, "cpu") == (256, 256)
    assert auto_tile("auto", 4000, 100, "cpu") == (256, 100)
    assert auto_tile("auto", 640, 480, "cuda:0", 48 << 30) == (480, 480)
    assert auto_tile("auto", 640, 480, "cuda:0", 24 << 30) == (352, 352)
    assert auto_tile("auto", 640, 480, "cuda:0", 80 << 30) == (0, 0)
    assert auto_tile("auto", 640, 100, "cuda:0", 4 << 30) == (128, 100)
    assert auto_tile(64, 640, 480, "cpu") == (64, 64)
    assert auto_tile([64, 0], 640, 480, "cpu") == (64, 0)


def test_auto_threads():
    assert auto_threads(3) == 3
    assert auto_threads("auto") >= 1
