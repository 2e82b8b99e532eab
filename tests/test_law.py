"""The law: a frame has one value, whatever was asked before, by any threads, with any memory, in any process."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import toy
import vapoursynth as vs
from clips import BUDGETS, CUTS, ORDERS, ask, case, clip_of, digest, pixels, restored
from fakes import Fake
from fresh import FRESH

from vsuav import upscale
from vsuav.settings import DTYPES, PRESETS, Settings

pytestmark = pytest.mark.usefixtures("threads_restored")

THREADS = (1, 2, 8)
PROCESSES = ("same", "fresh")
MATRIX = list(itertools.product(ORDERS, THREADS, BUDGETS, PROCESSES))


def pairwise(rows: list[tuple]) -> list[tuple]:
    """A part of `rows` in which every pair of values of two columns occurs, chosen greedily."""

    def pairs(row):
        return set(itertools.combinations(enumerate(row), 2))

    left, chosen = set().union(*map(pairs, rows)), []
    while left:
        best = max(rows, key=lambda row: len(pairs(row) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def test_pairwise_covers_every_pair():
    chosen = pairwise(MATRIX)
    assert len(chosen) < 20
    for a, b in itertools.combinations(range(4), 2):
        assert {(row[a], row[b]) for row in chosen} == {(row[a], row[b]) for row in MATRIX}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return toy.write(tmp_path_factory.mktemp("toy") / "model")


def in_fresh_process(*arguments) -> dict[int, str]:
    with FRESH.Pool(1) as pool:
        return pool.apply(case, arguments)


EXPECTED: dict[tuple, dict[int, str]] = {}


def expected(kind: str, model: str, length: int) -> dict[int, str]:
    if (kind, length) not in EXPECTED:
        EXPECTED[kind, length] = case(kind, "linear", 1, "default", model, length)
    return EXPECTED[kind, length]


def holds(kind, model, length, order, threads, budget, process) -> None:
    arguments = (kind, order, threads, budget, model, length)
    got = case(*arguments) if process == "same" else in_fresh_process(*arguments)
    assert got.keys() == set(range(length)) or order == "single"
    assert {n: expected(kind, model, length)[n] for n in got} == got


@pytest.mark.parametrize(("order", "threads", "budget", "process"), pairwise(MATRIX))
def test_the_law_on_a_fake_network(order, threads, budget, process):
    holds("fake", "", 36, order, threads, budget, process)


@pytest.mark.parametrize(
    ("order", "threads", "budget", "process"),
    [("random", 8, "tiny", "same"), ("reverse", 2, "default", "fresh"), ("single", 1, "tiny", "fresh")],
)
def test_the_law_on_a_real_network(model, order, threads, budget, process):
    holds("model", str(model), 20, order, threads, budget, process)


@pytest.mark.long
@pytest.mark.parametrize(("order", "threads", "budget", "process"), MATRIX)
@pytest.mark.parametrize("kind", ["fake", "bundled"])
def test_the_whole_matrix(kind, order, threads, budget, process):
    """As above, all of it, longer clips, and on the bundled model."""
    holds(*(("fake", "", 90) if kind == "fake" else ("model", "", 24)), order, threads, budget, process)


USUAL = ("balanced", "bfloat16")
WAYS = [
    pytest.param(*way, marks=() if way == USUAL else pytest.mark.long) for way in itertools.product(PRESETS, DTYPES[1:])
]


@pytest.mark.parametrize(("preset", "dtype"), WAYS)
def test_the_law_in_every_preset_and_dtype(preset, dtype):
    """The bundled model, with the values that its presets have."""
    clip = clip_of(pixels(16, 24, 16))
    options = {"preset": preset, "dtype": dtype, "threads": 2}
    vs.core.num_threads = 1
    linear = ask(upscale(clip, **options), "linear")
    for threads, order, budget in ((8, "random", 0), (2, "reverse", 1024)):
        vs.core.num_threads = threads
        assert ask(upscale(clip, **options, cache_mib=budget), order) == linear


@pytest.mark.long
@pytest.mark.parametrize(("kind", "length"), [("fake", 90), ("model", 24)])
def test_a_process_started_from_nothing(kind, length):
    arguments = [kind, "random", "8", "tiny", "", str(length)]
    command = [sys.executable, str(Path(__file__).with_name("clips.py")), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert {int(n): value for n, value in json.loads(output).items()} == expected(kind, "", length)


def fake_clip(length: int = 36, budget: int = 1 << 30, settings: Settings | None = None, **options):
    networks = Fake(settings or Settings(steps=3, propagation_steps=(1,), propagation_radius=4))
    result, restorer = restored(clip_of(pixels(length, 24, 16)), networks, budget, **options)
    return result, restorer, networks


def one_by_one(clip) -> None:
    """A linear pass whose blocks are made in order, however busy the machine is."""
    for n in range(clip.num_frames):
        clip.get_frame(n).close()


def test_a_linear_pass_makes_each_window_once():
    for threads in THREADS:
        vs.core.num_threads = threads
        result, _, networks = fake_clip(60)
        ask(result, "linear")
        assert len(networks.windows) == len(set(networks.windows))


def test_a_small_budget_is_raised_once_and_costs_little():
    lines = []
    handle = vs.core.add_log_handler(lambda kind, line: lines.append(line))
    try:
        result, restorer, networks = fake_clip(90, budget=1)
        ask(result, "linear")
        ask(result, "reverse")
    finally:
        vs.core.remove_log_handler(handle)
    assert [line for line in lines if "cache_mib" in line] == [line for line in lines if "upscale" in line][:1]
    assert len([line for line in lines if "cache_mib" in line]) == 1
    assert restorer.engine.store.budget == restorer.engine.working_set(16, 24)
    result, _, small = fake_clip(90, budget=1)
    one_by_one(result)
    result, _, unlimited = fake_clip(90)
    one_by_one(result)
    assert len(small.windows) <= 1.5 * len(unlimited.windows)


def test_a_restarted_encode_makes_no_stored_latent_again(tmp_path):
    result, _, first = fake_clip(cache_dir=tmp_path)
    whole = ask(result, "linear")
    result, _, again = fake_clip(cache_dir=tmp_path)
    assert ask(result, "random") == whole
    assert first.windows
    assert again.windows == []


def test_a_clip_that_changes_upstream_is_never_served_stale(tmp_path):
    data = pixels(36, 24, 16)
    settings = Settings(steps=2)
    result, _ = restored(clip_of(data), Fake(settings), cache_dir=tmp_path)
    ask(result, "linear")
    data = data.copy()
    data[20, 1, 3, 4] += 0.01
    networks = Fake(settings)
    result, _ = restored(clip_of(data), networks, cache_dir=tmp_path)
    got = ask(result, "linear")
    fresh, _ = restored(clip_of(data), Fake(settings))
    assert got == ask(fresh, "linear")
    touched = {n for _, first, last in networks.windows for n in range(first, last)}
    assert 20 in touched
    assert touched <= set(range(13, 36))


def test_trimming_after_changes_nothing():
    result, _, _ = fake_clip()
    whole = ask(result, "linear")
    again, _, _ = fake_clip()
    assert ask(again[10:20], "reverse") == {n: whole[n + 10] for n in range(10)}


def test_the_first_frame_after_a_cut_does_not_depend_on_what_was_before():
    one, other = pixels(30, 24, 16, seed=0), pixels(30, 24, 16, seed=9)
    settings = Settings(steps=3, propagation_steps=(1,), propagation_radius=4)
    for cut in CUTS:
        hashes = []
        for before in (one, other):
            data = one.copy()
            data[:cut] = before[:cut]
            result, _ = restored(clip_of(data), Fake(settings))
            hashes.append([digest(result.get_frame(n)) for n in (cut, 29)])
        assert hashes[0] == hashes[1]


def test_the_built_in_detector_finds_a_cut_and_no_window_crosses_it():
    data = pixels(30, 24, 16) * 0.2
    data[17:] += 0.7
    networks = Fake(Settings(steps=2))
    result, _ = restored(clip_of(data, None), networks)
    ask(result, "linear")
    assert not any(first < 17 < last for _, first, last in networks.windows)
    networks = Fake(Settings(steps=2, scene_detect=False))
    result, _ = restored(clip_of(data, None), networks)
    ask(result, "linear")
    assert any(first < 17 < last for _, first, last in networks.windows)


def test_prompts_from_properties_cut_and_reach_the_network():
    clip = clip_of(pixels(20, 24, 16), ())
    rain = clip.std.SetFrameProps(_UAVPrompt="rain")
    plain, _ = restored(clip[:8] + clip[8:], Fake(Settings(steps=2)))
    networks = Fake(Settings(steps=2))
    mixed, _ = restored(clip[:8] + rain[8:], networks)
    a, b = ask(plain, "linear"), ask(mixed, "random")
    assert not any(first < 8 < last for _, first, last in networks.windows)
    assert all(a[n] != b[n] for n in range(8, 20))


def test_another_threads_number_of_threads_changes_no_bit():
    """Rounding depends on torch's thread count; ours is a setting, whatever anyone else sets."""
    clip = clip_of(pixels(14, 24, 16), ())
    options = {"steps": 2, "propagation_steps": [1], "dtype": "float32", "threads": 2}
    quiet = ask(upscale(clip, **options), "linear")
    stop = threading.Event()

    def disturb():
        count = 0
        while not stop.is_set():
            torch.set_num_threads(1 + count % 4)
            count += 1
            time.sleep(0.0005)

    before = torch.get_num_threads()
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        assert ask(upscale(clip, **options), "linear") == quiet
    finally:
        stop.set()
        thread.join()
        torch.set_num_threads(before)
    assert ask(upscale(clip, **options), "reverse") == quiet


def test_two_instances_share_the_weights_and_nothing_else(model):
    clip = clip_of(pixels(12, 24, 16), ())
    options = {"model": model, "steps": 2, "dtype": "float32", "threads": 1}
    alone = [ask(upscale(clip, seed=seed, **options), "linear") for seed in (0, 1)]
    both = vs.core.std.Interleave([upscale(clip, seed=seed, **options) for seed in (0, 1)])
    mixed = ask(both, "random")
    assert [mixed[2 * n] for n in range(12)] == list(alone[0].values())
    assert [mixed[2 * n + 1] for n in range(12)] == list(alone[1].values())
    assert alone[0] != alone[1]


def test_few_records_are_kept_and_every_frame_still_comes():
    """Evidence that was forgotten is read again."""
    result, restorer, _ = fake_clip(400, settings=Settings(steps=1))
    whole = ask(result, "linear")
    again, restorer, _ = fake_clip(400, settings=Settings(steps=1))
    restorer._records._limit = 100
    for n in (3, 390, 200, 3, 60, 3, 90, 60, 390):
        assert digest(again.get_frame(n)) == whole[n]
