"""Self-ensemble, by engine and plugin, beside means of turned clips made with VapourSynth's own filters."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import vapoursynth as vs
from clips import ask, clip_of, pixels
from fakes import Fake
from hypothesis import given
from hypothesis import strategies as st

from vsuav import upscale
from vsuav.engine import restore
from vsuav.ensemble import ORIENTATIONS
from vsuav.networks import Networks, choose
from vsuav.settings import Settings

OPTIONS = {"steps": 1, "dtype": "float32", "threads": 1}
WAYS = {
    2: (lambda c: c, lambda c: c.std.Transpose()),
    4: (lambda c: c, lambda c: c.std.Transpose(), lambda c: c.std.Turn180(), lambda c: c.std.Transpose().std.Turn180()),
}
"""All of them undo themselves."""


SYMMETRIES = (lambda x: x.flip(-2, -1), lambda x: x.mT, lambda x: x.flip(-2, -1).mT)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return toy.write(tmp_path_factory.mktemp("toy") / "model")


def picture(clip: vs.VideoNode, n: int) -> np.ndarray:
    frame = clip.get_frame(n)
    return np.stack([np.asarray(frame[plane]) for plane in range(3)])


@pytest.mark.parametrize("copies", WAYS)
def test_it_is_the_mean_of_turned_restorations(model, copies):
    source = clip_of(pixels(8, 18, 14))
    result = upscale(source, model, ensemble=copies, **OPTIONS)
    alone = [turn(upscale(turn(source), model, **OPTIONS)) for turn in WAYS[copies]]
    for n in (0, 5, 7):
        np.testing.assert_allclose(picture(result, n), np.mean([picture(c, n) for c in alone], axis=0), atol=2e-7)
    assert np.abs(picture(result, 5) - picture(alone[0], 5)).max() > 1e-4
    assert result.get_frame(5).props["number"] == 5


def test_frames_are_the_same_in_any_order(model):
    clip = clip_of(pixels(20, 10, 8))
    frames = [ask(upscale(clip, model, ensemble=4, **OPTIONS), order) for order in ("linear", "random", "reverse")]
    assert frames[0] == frames[1] == frames[2]


def test_latents_kept_on_disk_change_nothing(model, tmp_path):
    clip = clip_of(pixels(8, 10, 8))
    wanted = ask(upscale(clip, model, ensemble=2, **OPTIONS), "linear")
    kept = [ask(upscale(clip, model, ensemble=2, cache_dir=tmp_path, **OPTIONS), "random") for _ in range(2)]
    assert kept == [wanted, wanted]
    alone = ask(upscale(clip, model, cache_dir=tmp_path, **OPTIONS), "linear")
    assert alone == ask(upscale(clip, model, **OPTIONS), "linear") != wanted


def test_engine_and_plugin_agree(model):
    data = pixels(7, 12, 10)
    models, settings = choose({"model": model, "ensemble": 4, "scene_detect": False, **OPTIONS}, 12, 10)
    wanted = restore(torch.from_numpy(data) * 2 - 1, Networks(models, settings))
    result = upscale(clip_of(data, None), model, ensemble=4, scene_detect=False, **OPTIONS)
    for n in range(7):
        np.testing.assert_allclose(picture(result, n), wanted[n].numpy(), atol=1e-6)


@pytest.mark.parametrize("format", [vs.YUV420P8, vs.GRAY16, vs.RGB24])
def test_other_formats(model, format):
    source = vs.core.std.BlankClip(format=format, width=16, height=12, length=2)
    source = source.std.SetFrameProps(_Matrix=6) if format == vs.YUV420P8 else source
    frame = upscale(source, model, ensemble=2, **OPTIONS).get_frame(1)
    assert (frame.format.id, frame.width, frame.height) == (format, 64, 48)


@given(st.integers(0, 1000), st.sampled_from(SYMMETRIES))
def test_the_mean_of_four_lies_as_its_input_does(seed, turn):
    """Whatever the networks do: all four copies are there, and each comes back the way it went."""
    networks = Fake(replace(Settings(steps=1), ensemble=4))
    frames = torch.from_numpy(pixels(3, 6, 5, seed)) * 2 - 1
    torch.testing.assert_close(restore(turn(frames), networks), turn(restore(frames, networks)))


@given(st.sampled_from(ORIENTATIONS[4]), st.integers(1, 4), st.integers(1, 4))
def test_texture_of_every_second_pixel_stays_in_step(orientation, rows, columns):
    """A chequerboard of four pixels a pixel of the input lies the same way in every copy."""
    y, x = torch.meshgrid(torch.arange(4 * rows), torch.arange(4 * columns), indexing="ij")
    board = (y + x) % 2
    there = orientation(board)
    y, x = torch.meshgrid(*map(torch.arange, there.shape), indexing="ij")
    assert torch.equal(there, (y + x) % 2)
    assert torch.equal(orientation(there), board)


def test_tiles_turn_with_the_frames(model):
    """Each copy is restored as a clip that lies that way is, by tiles that lie that way, too."""
    source = clip_of(pixels(2, 72, 40))
    result = upscale(source, model, ensemble=4, tile=(36, 48), tile_overlap=8, **OPTIONS)
    tiles = ((36, 48), (48, 36), (36, 48), (48, 36))
    alone = [
        turn(upscale(turn(source), model, tile=tile, tile_overlap=8, **OPTIONS))
        for turn, tile in zip(WAYS[4], tiles, strict=True)
    ]
    np.testing.assert_allclose(picture(result, 1), np.mean([picture(c, 1) for c in alone], axis=0), atol=2e-7)


def test_frames_that_hold_the_same_bytes_but_lie_otherwise_are_told_apart_on_disk(model, tmp_path):
    blank = vs.core.std.BlankClip(format=vs.RGBS, width=16, height=12, length=2, color=[0.2, 0.4, 0.6])
    wanted = ask(upscale(blank, model, ensemble=4, **OPTIONS), "linear")
    assert [ask(upscale(blank, model, ensemble=4, cache_dir=tmp_path, **OPTIONS), "linear") for _ in range(2)] == [
        wanted, wanted,
    ]  # fmt: skip


def test_another_number_of_copies_is_one_clear_line(model):
    with pytest.raises(vs.Error, match="^upscale: ensemble must be one of 1, 2, 4, got 3$"):
        upscale(clip_of(pixels(2, 8, 8)), model, ensemble=3)
