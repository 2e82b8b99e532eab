"""What `upscale` accepts and refuses, formats and colours, frame properties, and the life of a script."""

import gc
import json
import os
import pickle
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import vapoursynth as vs
from clips import ask, clip_of, digest, pixels, restored
from fakes import Fake, NoOp

from vsuav import frames, unload, upscale
from vsuav.settings import Settings

ROOT = Path(__file__).parents[1]
QUICK = Settings(steps=1)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return toy.write(tmp_path_factory.mktemp("toy") / "model")


def blank(format=vs.RGBS, length=3, width=32, height=16, **props):
    clip = vs.core.std.BlankClip(format=format, width=width, height=height, length=length)
    return clip.std.SetFrameProps(**props) if props else clip


def noop(clip: vs.VideoNode) -> vs.VideoNode:
    return restored(clip, NoOp(QUICK))[0]


def planes(frame: vs.VideoFrame) -> list[np.ndarray]:
    return [np.asarray(frame[plane]) for plane in range(frame.format.num_planes)]


def variable_format():
    return vs.core.std.Splice([blank(), blank(vs.RGB24)], mismatch=True)


def variable_size():
    return vs.core.std.Splice([blank(), blank(width=64)], mismatch=True)


BAD_CLIPS = {
    "variable format": (variable_format, "constant format"),
    "variable size": (variable_size, "constant size"),
    "not a clip": (lambda: "clip.mkv", "must be a VapourSynth video clip"),
    "no clip": (lambda: None, "must be a VapourSynth video clip"),
    "interlaced": (lambda: blank(_FieldBased=2), "deinterlace"),
    "no matrix": (lambda: blank(vs.YUV420P8).std.RemoveFrameProps("_Matrix"), "_Matrix=1"),
    "unspecified matrix": (lambda: blank(vs.YUV420P8, _Matrix=2), "SetFrameProps"),
    "PQ": (lambda: blank(vs.YUV420P10, _Matrix=9, _Transfer=16), "PQ"),
    "HLG": (lambda: blank(vs.YUV420P10, _Matrix=9, _Transfer=18), "tone-map"),
    "an endless one": (lambda: blank().std.Loop(), "at most 2147483646 frames, got 2147483647; std.Trim"),
    "no matrix of RGB": (lambda: blank(_Matrix=1), "got RGBS: Resize error"),
    "a matrix nobody knows": (lambda: blank(vs.YUV420P8, _Matrix=99), "got YUV420P8: Resize error"),
    "a format nobody reads": (
        lambda: blank(vs.core.query_video_format(vs.GRAY, vs.INTEGER, 32).id), "got Gray32: Resize error"
    ),
    "a transfer nobody knows": (lambda: blank(_Transfer=3), "got RGBS: Resize error"),
    "primaries nobody knows": (lambda: blank(vs.RGB24, _Primaries=3), "got RGB24: Resize error"),
    "a matrix in words": (lambda: blank(vs.YUV420P8, _Matrix="709"), "_Matrix must be one whole number, got '709'"),
    "two transfers": (lambda: blank(_Transfer=[1, 1]), "_Transfer must be one whole number, got [1, 1]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CLIPS)
def test_a_clip_that_cannot_be_restored_is_one_clear_line(name, model):
    make, wanted = BAD_CLIPS[name]
    gc.collect()  # beside a clip of another test that is still there, it would be said by the frames
    with pytest.raises(vs.Error) as caught:
        upscale(make(), model=model)
    line = str(caught.value)
    assert line.startswith("upscale: ")
    assert wanted in line
    assert "\n" not in line


BAD_ARGUMENTS = {
    "noise level": ({"noise_level": 400}, "noise_level must be between 0 and 350, got 400"),
    "propagation step": ({"steps": 4, "propagation_steps": [4]}, "propagation_steps must be between 0 and 3, got 4"),
    "prompt": ({"prompt": 5}, "prompt must be a string"),
    "device": ({"device": "cuda:99"}, "device must be one of auto, cpu"),
    "device name": ({"device": "abacus"}, "abacus"),
    "scale": ({"scale": 5}, "scale must be between 1 and 4, got 5"),
    "width": ({"width": 1000}, "width must be a whole number between 1 and 128 (4x the input), got 1000"),
    "width that is no number": ({"width": True}, "width must be a whole number between 1 and 128"),
    "scale in words": ({"scale": "2"}, "scale must be between 1 and 4, got '2'"),
    "endless steps": ({"steps": 10**400}, "steps must be between 1 and 1000, got 1000"),
    "half a step": ({"steps": 2.5}, "steps must be a whole number between 1 and 1000, got 2.5"),
    "temperature in words": ({"temperature": "1"}, "temperature must be a number between 0 and 1, got '1'"),
    "list of presets": ({"preset": ["fast"]}, "preset must be one of reference, balanced, fast, preview, tiny, got ["),
    "no preset": ({"preset": ""}, "preset must be one of reference, balanced, fast, preview, tiny, got ''"),
    "list of types": ({"dtype": ["float32"]}, "dtype must be one of auto, float32, bfloat16, float16, got ['float32']"),
    "prompt from frame True": ({"prompt": [(True, "rain")]}, "prompt must be a string or a list"),
    "half a letter": ({"prompt": "\ud800"}, "prompt must be a string or a list"),
    "half a letter not to show": ({"negative_prompt": "\ud800"}, "negative_prompt must be a string"),
    "tile": ({"tile": (False, 64)}, "tile must be 'auto', 0, or (width, height)"),
    "model number": ({"model": 5}, "model must be a folder, a hub id or None, got 5"),
    "model without a name": ({"model": " "}, "model must be a folder, a hub id or None, got ' '"),
    "model with a long name": ({"model": "x" * 300}, "cannot be read (File name too long)"),
    "store with an odd name": ({"cache_dir": "a\0b"}, "cache_dir must be a folder that can be made"),
    "budget": ({"cache_mib": -1}, "cache_mib"),
    "max shot": ({"max_shot": 10}, "max_shot"),
    "preset": ({"preset": "slow"}, "preset must be one of"),
    "folder": ({"model": "/no/such/folder"}, "/no/such/folder"),
    "threads": ({"threads": 0}, "threads"),
    "raft": ({"flow": "raft"}, "flow"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_a_bad_argument_is_one_clear_line(name, model):
    arguments, wanted = BAD_ARGUMENTS[name]
    with pytest.raises(vs.Error) as caught:
        upscale(blank(), **{"model": model, **arguments})
    line = str(caught.value)
    assert line.startswith("upscale: ")
    assert wanted in line
    assert "\n" not in line


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(vs.Error, match="upscale: .*looked for .*unet/.*holds nothing"):
        upscale(blank(), model=tmp_path)


def test_truncated_weights_are_one_clear_line(tmp_path):
    folder = toy.write(tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(vs.Error, match="upscale: .*diffusion_pytorch_model") as caught:
        upscale(blank(), model=folder)
    assert "\n" not in str(caught.value)


NOISE = "scheduler/scheduler_config"


@pytest.mark.parametrize(
    ("part", "change", "arguments", "says"),
    [
        ("unet/config", {"max_noise_level": 100}, {"noise_level": 101}, "between 0 and 100"),
        ("low_res_scheduler/scheduler_config", {"num_train_timesteps": 10}, {}, "noise_level must be between 0 and 9"),
        (NOISE, {"beta_start": 0, "timestep_spacing": "leading", "steps_offset": 0}, {"solver": "unipc"}, "unipc"),
        (NOISE, {"steps_offset": -600}, {}, "steps_offset must be a whole number between 0"),
        (NOISE, {"num_train_timesteps": 10**13}, {}, "num_train_timesteps must be a whole"),
        (NOISE, {"snr_shift_scale": 3}, {}, "snr_shift_scale is not supported, got 3"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_do_is_said_at_the_call(tmp_path, part, change, arguments, says):
    path = toy.write(tmp_path / "model") / f"{part}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(vs.Error, match="upscale: ") as caught:
        upscale(blank(), model=tmp_path / "model", **arguments)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_prompts_of_unlike_lengths_are_refused_where_they_meet(tmp_path):
    from safetensors.torch import save_file

    folder = toy.write(tmp_path / "model")
    states = {"0": torch.ones(5, 16), "1": torch.ones(7, 16)}
    save_file(states, folder / "prompts.safetensors", metadata={"prompts": json.dumps(["", "blur"])})
    upscale(blank(), model=folder)
    with pytest.raises(vs.Error, match=r"states of '' are \(5, 16\), they must be \(7, 16\)"):
        upscale(blank(), model=folder, guidance_scale=3)
    clip = upscale(blank().std.SetFrameProps(_UAVPrompt="rain"), model=folder)
    with pytest.raises(vs.Error, match="upscale: the model has no text encoder, only stored prompts"):
        clip.get_frame(0)


def test_a_prompt_on_a_frame_that_is_no_text(model):
    for wrong in (5, [b"rain", b"snow"]):
        clip = upscale(blank().std.SetFrameProps(_UAVPrompt=wrong), model=model)
        with pytest.raises(vs.Error, match=r"upscale: frame \d+: frame property _UAVPrompt must be one text, got"):
            clip.get_frame(0)


def test_a_relative_folder_stays_where_it_was_at_the_call(tmp_path, monkeypatch):
    """vspipe goes into the script's folder to run it, and back before frames are made."""
    toy.write(tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    clip = upscale(blank(), model="model", cache_dir="latents")
    monkeypatch.chdir(tmp_path)
    clip.get_frame(0)
    assert (tmp_path / "here" / "latents" / "latents.sqlite3").exists() and not (tmp_path / "latents").exists()


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["VSUAV_TEST_BOMB"],))


def test_a_pickle_that_wants_to_run_code_does_not(tmp_path, monkeypatch):
    import layouts

    folder = layouts.write_released(tmp_path / "model")
    monkeypatch.setenv("VSUAV_TEST_BOMB", str(tmp_path / "exploded"))
    (folder / "unet" / "unet_video.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(vs.Error, match="upscale: ") as caught:
        upscale(blank(), model=folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_a_network_that_gives_no_picture_is_an_error_that_says_what_to_try(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = toy.write(tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_out.bias"] += 1e30
    save_file(state, weights)
    clip = upscale(blank(length=8), model=folder, dtype="float32", threads=1)
    with pytest.raises(vs.Error, match=r"upscale: frames \d+ to \d+ .*float32.*try"):
        clip.get_frame(3)


FORMATS = [
    vs.RGBS, vs.RGBH, vs.RGB24, vs.RGB30, vs.RGB48, vs.YUV420P8, vs.YUV420P10, vs.YUV422P16, vs.YUV444P12, vs.YUV444PS,
    vs.YUV444PH, vs.GRAY8, vs.GRAY16, vs.GRAYS, vs.GRAYH,
]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: vs.PresetVideoFormat(format).name)
def test_every_format_comes_back_four_times_as_large(format):
    matrix = {"matrix": 6} if "YUV" in vs.PresetVideoFormat(format).name else {}
    source = vs.core.resize.Bicubic(clip_of(pixels(3, 34, 18), None), format=format, **matrix) if (
        "GRAY" not in vs.PresetVideoFormat(format).name
    ) else blank(format, width=34, height=18)  # fmt: skip
    result = noop(source)
    assert (result.width, result.height, result.num_frames) == (136, 72, 3)
    assert result.format.id == source.format.id
    assert result.fps == source.fps
    frame, before = result.get_frame(1), source.get_frame(1)
    for got, wanted in zip(planes(frame), planes(before), strict=True):
        assert got.shape == (4 * wanted.shape[0], 4 * wanted.shape[1])
        scale = 1 << before.format.bits_per_sample if before.format.sample_type == vs.INTEGER else 1
        assert abs(float(got.mean()) - float(wanted.mean())) <= 0.012 * scale


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 5), (17, 9), (200, 2), (33, 131)])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_odd_sizes_and_short_clips(width, height, length):
    data = pixels(length, width, height)
    result, _ = restored(clip_of(data, None), Fake(Settings(steps=2, propagation_steps=(1,))))
    last = result.get_frame(length - 1)
    assert (last.width, last.height) == (4 * width, 4 * height)
    exact = noop(clip_of(data, None)).get_frame(length - 1)
    enlarged = data[length - 1].repeat(4, -1).repeat(4, -2)
    assert max(np.abs(p - e).max() for p, e in zip(planes(exact), enlarged, strict=True)) < 1e-6


BARS = [(1, 1, 1), (1, 1, 0), (0, 1, 1), (0, 1, 0), (1, 0, 1), (1, 0, 0), (0, 0, 1), (0, 0, 0)]


def bars(level: float) -> vs.VideoNode:
    """Eight colour bars of 16 pixels, as RGBS."""
    data = np.repeat(np.array(BARS, np.float32) * level, 16, axis=0).T[None, :, None, :].repeat(32, 2)
    return clip_of(np.ascontiguousarray(data), None)


@pytest.mark.parametrize("level", [1.0, 0.75])
@pytest.mark.parametrize("matrix", [1, 6, 9])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("format", [vs.YUV444P8, vs.YUV420P8, vs.YUV444P10, vs.RGB24])
def test_colour_bars_come_back(level, matrix, full, format):
    """Through the filter and back: at most one 8-bit step inside the bars (two where chroma is subsampled)."""
    range_ = vs.RANGE_FULL if full or format == vs.RGB24 else vs.RANGE_LIMITED
    options = {} if format == vs.RGB24 else {"matrix": matrix}
    source = bars(level).resize.Point(format=format, range=range_, **options)
    result = noop(source)
    step = 1 << (source.format.bits_per_sample - 8)
    for plane in range(3):
        wanted = np.asarray(source.get_frame(0)[plane]).astype(int)
        got = np.asarray(result.get_frame(0)[plane]).astype(int)
        centres = range(8 >> (plane > 0 and source.format.subsampling_w), wanted.shape[1],
                        16 >> (plane > 0 and source.format.subsampling_w))  # fmt: skip
        for x in centres:
            patch = got[got.shape[0] // 2 - 4 : got.shape[0] // 2 + 4, 4 * x - 4 : 4 * x + 4]
            most = 2 if source.format.subsampling_w else 1
            assert np.abs(patch - wanted[wanted.shape[0] // 2, x]).max() <= most * step
    assert int(result.get_frame(0).props.get("_Matrix", 0)) == (0 if format == vs.RGB24 else matrix)


def test_properties_are_carried_over():
    clip = clip_of(pixels(4, 16, 16), ()).std.SetFrameProps(_Transfer=6, mine=b"text", _DurationNum=1001)
    frame = noop(clip).get_frame(3)
    assert frame.props["number"] == 3
    assert frame.props["mine"] in ("text", b"text")
    assert frame.props["_Transfer"] == 6
    assert frame.props["_Primaries"] == 1
    assert frame.props["_FieldBased"] == 0
    assert frame.props["_DurationNum"] == 1001
    assert not [name for name in frame.props if name.startswith("uav")]


def as_rgb(clip: vs.VideoNode, n: int) -> list[float]:
    """The mean colour of a frame, read as the frame says."""
    return [float(plane.mean()) for plane in planes(clip.resize.Bicubic(format=vs.RGBS).get_frame(n))]


def test_a_clip_whose_parts_have_other_matrices_and_ranges_keeps_its_colours():
    """All of the result is written like the first frame, and says so."""
    colour = vs.core.std.BlankClip(format=vs.RGBS, width=32, height=16, length=3, color=[0.8, 0.2, 0.1])
    parts = [colour.resize.Bicubic(format=vs.YUV444P8, matrix=m, range=r) for m, r in ((1, 0), (6, 0), (1, 1), (6, 1))]
    for first in parts:
        clip = vs.core.std.Splice([first, *parts])
        result = noop(clip)
        for n in (1, 4, 7, 10, 13):
            assert as_rgb(result, n) == pytest.approx(as_rgb(clip, n), abs=0.006)
            for name in ("_Matrix", "_Range"):
                assert result.get_frame(n).props[name] == first.get_frame(0).props[name]


def test_what_the_first_frame_leaves_open_a_later_one_may_say():
    clip = blank(length=2) + blank(length=2).std.SetFrameProps(_Transfer=6, _Primaries=5) + blank(_Transfer=2)
    said = [(frame.props["_Transfer"], frame.props["_Primaries"]) for frame in noop(clip).frames()]
    assert said == [(1, 1)] * 2 + [(6, 5)] * 2 + [(1, 1)] * 3


@pytest.mark.parametrize("place", range(6))
def test_chroma_lies_where_the_frames_say(place):
    """The same clip without subsampling gives the truth: subsampled at that place it is the result, elsewhere not."""
    ramp = np.stack(np.meshgrid(np.linspace(0, 1, 64), np.linspace(0, 1, 48)), 0).astype(np.float32)
    picture = clip_of(np.stack([ramp[0], ramp[1], (ramp[0] + 1 - ramp[1]) / 2])[None] * 0.8 + 0.1, None)
    source = picture.resize.Bicubic(format=vs.YUV420P8, matrix=1, chromaloc=place)
    result = noop(source)
    whole = noop(source.resize.Bicubic(format=vs.YUV444P16))
    assert result.get_frame(0).props["_ChromaLocation"] == place

    def off(somewhere):
        truth = whole.resize.Bicubic(format=vs.YUV420P16, chromaloc=somewhere).get_frame(0)
        pairs = zip(planes(result.get_frame(0))[1:], planes(truth)[1:], strict=True)
        return max(abs(float((got - wanted / 256.0)[8:-8, 8:-8].mean())) for got, wanted in pairs)

    assert off(place) < 0.02
    assert min(off(other) for other in range(6) if other != place) > 0.04


def test_what_a_clip_in_rgb_says_of_range_and_chroma_is_how_it_is_written():
    clip = blank(length=2) + blank(length=2).std.SetFrameProps(_Range=0, _ChromaLocation=2)
    for frame in noop(clip).frames():
        assert frame.props["_Range"] == vs.RANGE_FULL and "_ChromaLocation" not in frame.props


@pytest.mark.parametrize(
    ("size", "asked", "before", "after"),
    [
        ((36, 28), {"width": 64, "height": 28}, (16, 15), (3, 5)), ((36, 28), {"scale": 3}, (16, 15), (16, 15)),
        ((720, 576), {"width": 1024, "height": 576}, (16, 15), (3, 4)), ((30, 22), {"scale": 1.3}, (1, 1), (1, 1)),
        ((30, 22), {"width": 60}, (4, 3), (4, 3)), ((36, 28), {"width": 64, "height": 28}, (0, 1), (0, 1)),
    ],
)  # fmt: skip
def test_pixels_change_their_shape_where_the_picture_does(model, size, asked, before, after):
    """As VapourSynth's own resizers have it."""
    source = blank(width=size[0], height=size[1], length=1, _SARNum=before[0], _SARDen=before[1])
    result = upscale(source, model=model, steps=1, **asked)
    rgb = source.resize.Point(4 * size[0], 4 * size[1])
    props = frames.give_back(rgb, source, frames.look_of(source), result.width, result.height).get_frame(0).props
    assert (props["_SARNum"], props["_SARDen"]) == after
    if after[0] and after != before:
        theirs = source.resize.Bicubic(result.width, result.height).get_frame(0).props
        assert (theirs["_SARNum"], theirs["_SARDen"]) == after


def test_a_later_frame_that_should_not_be_restored_is_said_once():
    lines = []
    handle = vs.core.add_log_handler(lambda kind, line: lines.append((kind, line)))
    try:
        clip = blank(length=8) + blank(length=3, _FieldBased=2) + blank(length=3, _Transfer=16)
        said = [frame.props["_FieldBased"] for frame in noop(clip).frames()]
    finally:
        vs.core.remove_log_handler(handle)
    assert said == [0] * 14
    warnings = [line for kind, line in lines if kind == vs.MESSAGE_TYPE_WARNING and "says" in line]
    assert len(warnings) == 2
    assert re.match(r"upscale: frame (8|9|10) says _FieldBased=2 \(top field first\), unlike the first;", warnings[0])
    assert re.match(r"upscale: frame 1[123] says _Transfer=16 \(PQ\), unlike the first;", warnings[1])


def test_a_format_nobody_reads_is_refused_beside_another_clip_too(model):
    first = upscale(blank(), model=model)
    unread = blank(vs.core.query_video_format(vs.GRAY, vs.INTEGER, 32).id)
    with pytest.raises(vs.Error, match="upscale: clip must be what resize can read and write, got Gray32: Resize"):
        upscale(unread, model=model)
    assert first.num_frames == 3


AT_EXIT = """
import sys, time
import vapoursynth as vs
sys.path[:0] = sys.argv[1:2]
from clips import clip_of, pixels, restored
from fakes import Fake
from vsuav.settings import Settings

class Slow(Fake):
    def window(self, step, frames, *inputs):
        print("window", flush=True)
        time.sleep(0.3)
        return super().window(step, frames, *inputs)

clip, _ = restored(clip_of(pixels(30, 8, 6), ()), Slow(Settings(steps=30)))
waiting = clip.get_frame_async(15)
time.sleep(1)
"""


def test_the_end_of_the_program_waits_for_one_task_and_not_for_a_block():
    words = [sys.executable, "-c", AT_EXIT, str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.stdout.count("window") in range(2, 9), done.stderr


def test_a_gray_clip_stays_gray_and_bits_do_not_get_lost():
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None, None, None].repeat(3, 1).repeat(16, 2)
    source = clip_of(np.ascontiguousarray(ramp), None).resize.Point(format=vs.GRAY16, matrix=1, range=vs.RANGE_FULL)
    source = source.std.SetFrameProps(_Range=int(vs.RANGE_FULL))
    got = np.asarray(noop(source).get_frame(0)[0]).astype(int)[::4, ::4]
    assert np.abs(got - np.asarray(source.get_frame(0)[0])).max() <= 4


@pytest.mark.parametrize(
    ("arguments", "size"),
    [({"scale": 1}, (34, 18)), ({"scale": 2}, (68, 36)), ({"scale": 3}, (102, 54)), ({"width": 68}, (68, 36)),
     ({"height": 54}, (102, 54)), ({"width": 50, "height": 40}, (50, 40)), ({"scale": 1.5}, (50, 26))],
)  # fmt: skip
def test_sizes(model, arguments, size):
    source = blank(vs.YUV420P8, width=34, height=18, _Matrix=6)
    result = upscale(source, model=model, **arguments)
    assert (result.width, result.height) == size
    with pytest.raises(vs.Error, match="upscale: width must be a multiple of 2"):
        upscale(source, model=model, width=51, height=40)


def test_a_clip_changed_after_the_filter_was_made_keeps_its_frames(model):
    """Nodes do not change: a filter made before another is not touched by it."""
    clip = clip_of(pixels(8, 16, 16), ())
    options = {"model": model, "steps": 1, "dtype": "float32", "threads": 1}
    alone = ask(upscale(clip, **options), "linear")
    first = upscale(clip, **options)
    upscale(clip.std.Invert(), **options).get_frame(0)
    assert ask(first, "random") == alone


def test_after_another_filter_and_before_one(model):
    clip = clip_of(pixels(8, 16, 16), ())
    options = {"model": model, "steps": 1, "dtype": "float32", "threads": 1}
    chained = upscale(clip.std.FlipVertical(), **options).std.Invert().std.Crop(left=2)
    plain = upscale(clip.std.FlipVertical(), **options)
    wanted = 1 - np.asarray(plain.get_frame(5)[1])[:, 2:]
    np.testing.assert_array_equal(np.asarray(chained.get_frame(5)[1]), wanted)


def test_upscale_of_upscale(model):
    options = {"model": model, "steps": 1, "dtype": "float32", "threads": 1}
    clip = clip_of(pixels(7, 8, 6), ())
    inner = upscale(clip, **options)
    stored = [np.stack(planes(inner.get_frame(n))) for n in range(7)]
    wanted = ask(upscale(clip_of(np.stack(stored), ()), **options), "linear")
    assert ask(upscale(upscale(clip, **options), **options), "random") == wanted


def test_loading_a_script_of_nested_filters_computes_nothing():
    """Not until a frame is asked for; then it is the frame that the clips give one after the other."""
    networks = [Fake(QUICK) for _ in range(3)]
    stores = networks_and_stores()[1]
    clip = clip_of(pixels(9, 8, 6), ())
    inner, _ = restored(clip, networks[0])
    outer, _ = restored(inner.std.FlipVertical().std.Crop(left=8, right=8), networks[1])
    last, _ = restored(outer.resize.Bicubic(16, 8), networks[2])
    assert (last.width, last.height, last.num_frames, last.format.id) == (64, 32, 9, vs.RGBS)
    assert [each.windows for each in networks] == [[], [], []]
    got = ask(last, "random")
    assert all(each.windows for each in networks)
    del inner, outer, last, _
    assert left(("Restorer", "Engine", "Records")) == {} and networks_and_stores()[1] <= stores
    for prepare in (lambda c: c.std.FlipVertical().std.Crop(left=8, right=8), lambda c: c.resize.Bicubic(16, 8)):
        stored = np.stack([np.stack(planes(frame)) for frame in restored(clip, Fake(QUICK))[0].frames()])
        clip = prepare(clip_of(stored, ()))
    assert ask(restored(clip, Fake(QUICK))[0], "linear") == got


@pytest.mark.parametrize("props", [{"_FieldBased": 1}, {"_Transfer": 16}, {"_Matrix": 2}])
def test_what_is_wrong_with_a_nested_clip_is_said_by_its_frames(model, props):
    options = {"model": model, "steps": 1, "dtype": "float32", "threads": 1}
    inner = upscale(clip_of(pixels(3, 8, 6), ()), **options)
    wrong = inner.resize.Bicubic(format=vs.YUV420P8, matrix=1).std.SetFrameProps(**props)
    with pytest.raises(vs.Error, match="upscale: (a YUV )?clip .*got _") as late:
        upscale(wrong, **options).get_frame(1)
    del inner
    alone = clip_of(pixels(3, 32, 24), ()).resize.Bicubic(format=vs.YUV420P8, matrix=1).std.SetFrameProps(**props)
    del wrong
    gc.collect()
    with pytest.raises(vs.Error) as early:
        upscale(alone, **options)
    assert str(early.value) in str(late.value)


def test_the_scripts_default_device_is_left_alone(model):
    """What is loaded must not end up on the device that the script has made torch's default."""
    unload()
    clip = clip_of(pixels(2, 16, 16), ())
    options = {"model": model, "steps": 1, "dtype": "float32", "threads": 1}
    torch.set_default_device("meta")
    try:
        moved = upscale(clip, **options)
        assert torch.empty(1).device.type == "meta"
    finally:
        torch.set_default_device(None)
    assert digest(moved.get_frame(0)) == digest(upscale(clip, **options).get_frame(0))


def test_a_failed_frame_fails_alone(model):
    """An error upstream reaches the frames that need it; the others come, and later it may work."""
    data, broken = pixels(130, 16, 16), [True]

    def source(n, f):
        if n == 100 and broken[0]:
            raise ValueError("frame 100 cannot be read")
        return f

    clip = clip_of(data, ())
    result, _ = restored(clip.std.ModifyFrame(clip, source), Fake(QUICK))
    with pytest.raises(vs.Error, match="frame 100 cannot be read"):
        result.get_frame(100)
    plain, _ = restored(clip_of(data, ()), Fake(QUICK))
    assert digest(result.get_frame(0)) == digest(plain.get_frame(0))
    broken[0] = False
    assert digest(result.get_frame(100)) == digest(plain.get_frame(100))


def test_everything_is_freed_but_the_weights_and_unload_frees_those(model):
    """After the clip is gone: no restorer, engine, store or latent is left; the weights only until `unload`."""
    from vsuav import networks

    kinds = ("Restorer", "Engine", "Records")
    unload()
    assert left(kinds) == {}
    others = networks_and_stores()
    clip = clip_of(pixels(8, 16, 16), ())
    result = upscale(clip, model=model, steps=2, dtype="float32", threads=1)
    ask(result, "linear")
    [(_, models)] = networks._models.values()
    shared = weakref.ref(models)
    del models
    assert living(kinds) == dict.fromkeys(kinds, 1)
    assert networks_and_stores() == (others[0] + 1, others[1] + 2)  # a store of latents and one of noise
    del result, clip
    assert left(kinds) == {} and networks_and_stores() == others
    assert shared() is not None
    unload()
    gc.collect()
    assert shared() is None


def networks_and_stores() -> tuple[int, int]:
    """How many networks and stores are living; other tests may hold some."""
    found = living(("Networks", "Store"))
    return found.get("Networks", 0), found.get("Store", 0)


def left(kinds) -> dict[str, int]:
    """What is still living of `kinds` when VapourSynth, which frees on threads of its own, has had its time."""
    deadline = time.monotonic() + 60
    while living(kinds) and time.monotonic() < deadline:
        time.sleep(0.05)
    return living(kinds)


def living(kinds) -> dict[str, int]:
    gc.collect()
    names = [type(thing).__name__ for thing in gc.get_objects() if str(type(thing).__module__).startswith("vsuav.")]
    return {kind: names.count(kind) for kind in kinds if kind in names}


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import vapoursynth as vs
from clips import clip_of, pixels
from vsuav import upscale
clip = clip_of(pixels(20, 24, 16), (13,))
upscale(clip, model={model!r}, steps=2, dtype="float32", threads=1).resize.Bicubic(
    format=vs.YUV420P8, matrix=1).set_output()
"""


@pytest.fixture
def script(tmp_path, model) -> Path:
    path = tmp_path / "script.vpy"
    path.write_text(SCRIPT.format(tests=str(ROOT / "tests"), model=str(model)))
    return path


def vspipe(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name("vspipe")
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run([program, *arguments, str(script), "-"], check=True, capture_output=True, env=environment)


def test_ranges_of_vspipe_are_parts_of_the_whole(script):
    """Raw frames on stdout and nothing else; `-s` and `-e` cut without changing a byte."""
    size = 96 * 64 * 3 // 2
    whole = vspipe(script).stdout
    assert len(whole) == 20 * size
    part = vspipe(script, "-c", "y4m", "-s", "8", "-e", "14").stdout
    head, *frames = part.split(b"FRAME\n")
    assert head.startswith(b"YUV4MPEG2")
    assert b"".join(frames) == whole[8 * size : 15 * size]


def test_reading_settings_from_json_lists_works(model):
    """Scripts often read their arguments from JSON, where tuples are lists."""
    arguments = json.loads('{"guidance_interval": [0.1, 1.0], "tile": [64, 0], "prompt": [[0, "rain"]]}')
    assert upscale(blank(), model=model, **arguments).num_frames == 3
