"""The networks on a GPU: the law there, the same pictures as on the CPU, and what a full memory says."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import vapoursynth as vs
from bench_gpu import main
from clips import ask, clip_of, pixels

from vsuav import upscale
from vsuav.networks import choose, unload
from vsuav.settings import PRESETS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("threads_restored"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return toy.write(tmp_path_factory.mktemp("toy") / "model")


def whole(clip: vs.VideoNode) -> np.ndarray:
    return np.stack([np.stack([np.asarray(frame[plane]) for plane in range(3)]) for frame in clip.frames(close=False)])


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * np.log10(np.square(a.astype(np.float64) - b).mean() + 1e-20)


@pytest.mark.parametrize(("preset", "dtype"), list(itertools.product(PRESETS, ("float16", "float32", "bfloat16"))))
def test_the_law_on_a_gpu(preset, dtype):
    clip = clip_of(pixels(16, 24, 16))
    options = {"preset": preset, "dtype": dtype, "device": "cuda"}
    vs.core.num_threads = 1
    linear = ask(upscale(clip, **options), "linear")
    for threads, order, budget in ((8, "random", 0), (2, "reverse", 1024)):
        vs.core.num_threads = threads
        assert ask(upscale(clip, **options, cache_mib=budget), order) == linear


def test_another_engine_beside_it_changes_nothing():
    clip, other = clip_of(pixels(16, 24, 16)), clip_of(pixels(16, 40, 24, seed=1))
    alone = ask(upscale(clip, device="cuda"), "linear")
    made = upscale(clip, device="cuda")
    busy = [upscale(other, device="cuda").get_frame_async(n) for n in range(16)]
    assert ask(made, "random") == alone
    for future in busy:
        future.result().close()


@pytest.mark.parametrize("preset", PRESETS)
def test_float32_is_the_cpus(preset):
    clip = clip_of(pixels(12, 48, 32), cuts=None)
    on = {device: whole(upscale(clip, preset=preset, device=device, dtype="float32")) for device in ("cpu", "cuda")}
    assert decibels(on["cuda"], on["cpu"]) > 80


def test_float16_is_near_float32():
    clip = clip_of(pixels(12, 48, 32), cuts=None)
    half, full = (whole(upscale(clip, device="cuda", dtype=dtype)) for dtype in ("float16", "float32"))
    assert decibels(half, full) > 42


def test_float16_is_what_auto_means():
    _, settings = choose({}, 24, 16)
    assert (settings.device, settings.dtype) == ("cuda:0", "float16")


def test_tiles_are_near_the_whole():
    clip = clip_of(pixels(9, 160, 96), cuts=None)
    tiled, flat = (whole(upscale(clip, device="cuda", tile=tile)) for tile in (64, 0))
    assert decibels(tiled, flat) > 40


@pytest.mark.parametrize("how", ["kernels", "graphs"])
def test_compiled_networks_keep_the_law(tiny, how):
    clip = clip_of(pixels(12, 24, 16), cuts=None)
    plain = whole(upscale(clip, tiny, device="cuda", dtype="float32"))
    made = [upscale(clip, tiny, device="cuda", dtype="float32", compile=how) for _ in range(2)]
    assert decibels(whole(made[0]), plain) > 70
    assert ask(made[1], "random") == ask(made[0], "linear")


def test_a_full_memory_names_a_smaller_tile():
    clip = clip_of(pixels(9, 256, 256), cuts=None)
    made = upscale(clip, device="cuda", tile=0)
    unload()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (300 << 20)) / total)
    try:
        with pytest.raises(vs.Error, match=r"too little memory for frames 0 to .* at 256x256; try tile=128"):
            made.get_frame(0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_bench_measures_every_part(tmp_path, capsys):
    main(["--quick", "--size", "48x32", "--repeat", "1", "--length", "9", "--json", str(tmp_path / "b.json")])
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert len(rows) == len(PRESETS) + 5
    for row in rows:
        if "predicted" in row:
            assert 0.5 < row["MiB"] / row["predicted"] < 1.5
