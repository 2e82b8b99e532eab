"""The scripts that people copy and scripts/run, each on a small clip with a toy model."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pipe
import pytest
import restore
import toy
import vapoursynth as vs
from PIL import Image
from safetensors.torch import load_file, save_file

SCRIPTS = Path(restore.__file__).parent
FRAMES, WIDTH, HEIGHT = 10, 40, 32
ANIME = ("clean anime drawing, sharp lines, flat colors", "photo, film grain, blur, compression artifacts")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The toy model, with the states of every prompt that a script writes down."""
    folder = toy.write(tmp_path_factory.mktemp("model") / "toy")
    states = load_file(folder / "prompts.safetensors")
    for i, _ in enumerate(ANIME, 3):
        states[str(i)] = states["2"] + i
    prompts = json.dumps(["", "blur", "rain", *ANIME])
    save_file(states, folder / "prompts.safetensors", metadata={"prompts": prompts})
    return folder


def film(target: Path, *options: str) -> Path:
    """A moving test pattern with a tone, written by ffmpeg."""
    pattern = ["-f", "lavfi", "-i", f"testsrc2=size={WIDTH}x{HEIGHT}:rate=25", "-f", "lavfi", "-i", "sine=440"]
    length = ["-frames:v", str(FRAMES), "-t", str(FRAMES / 25)]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *pattern, *length, *options, str(target)]
    subprocess.run(command, check=True)
    return target


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A tagged clip with sound: BT.709 although it is small, so that a rule of thumb would be wrong."""
    tags = ["-vf", "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=limited"]
    folder = tmp_path_factory.mktemp("clip")
    return film(folder / "in.mp4", "-pix_fmt", "yuv420p", *tags, "-c:v", "libx264", "-crf", "10", "-c:a", "aac")


def evaluate(script: str, **given: str) -> vs.VideoNode:
    """The first output of a script, run in this process as vspipe would run it."""
    vs.clear_outputs()
    runpy.run_path(str(SCRIPTS / script), init_globals=given, run_name="__vapoursynth__")
    try:
        return vs.get_output(0).clip
    finally:
        vs.clear_outputs()


@pytest.mark.parametrize(
    "script, given, frames, size",
    [
        ("old-film.vpy", {}, FRAMES, (4, 4)),
        ("old-film.vpy", {"field": "tff"}, FRAMES, (4, 4)),
        ("anime.vpy", {}, FRAMES, (4, 4)),
        ("anime.vpy", {"height": "80"}, FRAMES, (2.5, 2.5)),
        ("ai-video.vpy", {"prompt": "rain", "propagation_steps": "1,2"}, FRAMES, (4, 4)),
        ("preview.vpy", {"frame": "4"}, FRAMES - 4, (4, 4)),
        ("compare.vpy", {}, 2 * FRAMES, (4, 4)),
        ("compare.vpy", {"how": "side"}, FRAMES, (8, 4)),
        ("compare.vpy", {"how": "split"}, FRAMES, (4, 4)),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) if isinstance(value, dict) else "",
)
def test_examples_run(script, given, frames, size, clip, model):
    result = evaluate(script, input=str(clip), model=str(model), **given)
    assert result.num_frames == frames
    assert (result.width, result.height) == (WIDTH * size[0], HEIGHT * size[1])
    planes = [np.asarray(result.get_frame(frames // 2)[plane]) for plane in range(3)]
    assert all(plane.std() > 0 for plane in planes[:1])


@pytest.mark.skipif(hasattr(vs.core, "vivtc"), reason="vapoursynth-vivtc is installed")
def test_telecined_film_names_the_plugin_it_needs(clip, model):
    with pytest.raises(AttributeError, match="No attribute with the name vivtc exists"):
        evaluate("old-film.vpy", input=str(clip), model=str(model), field="telecine")


@pytest.mark.skipif(not hasattr(vs.core, "vivtc"), reason="vapoursynth-vivtc is not installed")
def test_telecined_film_gets_its_frames_back(model, tmp_path):
    telecined = ["-vf", "telecine=pattern=23", "-c:v", "libx264", "-flags", "+ilme+ildct", "-crf", "5"]
    source = film(tmp_path / "film.mkv", "-r", "30000/1001", *telecined, "-pix_fmt", "yuv420p", "-frames:v", "20")
    result = evaluate("old-film.vpy", input=str(source), model=str(model), field="telecine")
    told = vs.core.bs.VideoSource(str(source)).num_frames
    assert result.num_frames == -(-4 * told // 5)
    assert result.get_frame(3).props["_FieldBased"] == 0


def test_grain_depends_on_the_frame_alone(clip, model):
    def shown(order):
        result = evaluate("old-film.vpy", input=str(clip), model=str(model))
        return {n: np.asarray(result.get_frame(n)[0]).copy() for n in order}

    forwards, backwards = shown([2, 3]), shown([3, 2])
    assert all(np.array_equal(forwards[n], backwards[n]) for n in (2, 3))
    plain = evaluate("old-film.vpy", input=str(clip), model=str(model), grain="0").get_frame(2)
    difference = forwards[2].astype(int) - np.asarray(plain[0]).astype(int)
    assert 1 < difference.std() < 3


def test_preview_shows_frames_of_the_whole_clip(clip, model):
    part = evaluate("preview.vpy", input=str(clip), model=str(model), frame="7")
    whole = evaluate("preview.vpy", input=str(clip), model=str(model))
    assert np.array_equal(np.asarray(part.get_frame(1)[0]), np.asarray(whole.get_frame(8)[0]))


def test_compare_refuses_an_unknown_way(clip, model):
    with pytest.raises(vs.Error, match="compare.vpy: how must be interleave, side or split, got diagonal"):
        evaluate("compare.vpy", input=str(clip), model=str(model), how="diagonal")


def test_restore_takes_every_kind_of_parameter(clip, model):
    given = {"steps": "2", "propagation_steps": "[1]", "scale": "1.5", "tile": "(32,32)", "scene_detect": "False"}
    result = evaluate("restore.vpy", input=str(clip), model=str(model), tile_overlap="4", **given)
    assert (result.width, result.height) == (60, 48)
    with pytest.raises(vs.Error, match="restore.vpy: unknown argument noise; known are input, model"):
        evaluate("restore.vpy", input=str(clip), noise="3")


def test_restore_takes_what_upscale_takes(clip, model):
    """The documented defaults, and a list of prompts."""
    automatic = dict.fromkeys(("tile", "threads", "device", "dtype", "flow"), "auto")
    prompts = evaluate("restore.vpy", input=str(clip), model=str(model), prompt="[(0, 'rain'), (4, '')]", **automatic)
    plain = evaluate("restore.vpy", input=str(clip), model=str(model))
    assert not np.array_equal(*(np.asarray(each.get_frame(1)[0]) for each in (prompts, plain)))
    with pytest.raises(vs.Error, match="the model has no text encoder, only stored prompts"):
        evaluate("restore.vpy", input=str(clip), model=str(model), prompt="[a broken list")


def test_restore_turns_rgb_into_what_y4m_can_carry(model, tmp_path):
    source = film(tmp_path / "rgb.mkv", "-c:v", "ffv1", "-pix_fmt", "gbrp")
    result = evaluate("restore.vpy", input=str(source), model=str(model))
    assert result.format.color_family == vs.YUV
    assert result.get_frame(0).props["_Matrix"] == vs.MATRIX_BT709


def streams(path: Path) -> dict[str, object]:
    """What a player sees of a file."""
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        codec = video.codec_context
        seen = {
            "size": (codec.width, codec.height), "rate": video.average_rate,
            "tags": (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range),
            "sound": [stream.codec_context.name for stream in container.streams.audio],
        }  # fmt: skip
        sound = [packet for packet in container.demux(audio=0) if packet.dts is not None]
        seen["sound packets"] = [bytes(packet) for packet in sound]
    with av.open(str(path)) as container:
        return seen | {"frames": sum(1 for _ in container.decode(video=0))}


def test_run_restores_a_file_with_sound_and_tags(clip, model, tmp_path, capfd):
    target = tmp_path / "deep" / "out.mkv"
    assert restore.main([str(clip), str(target), f"model={model}", "prompt=rain"]) == 0
    captured = capfd.readouterr()
    before, after = streams(clip), streams(target)
    assert after["size"] == (4 * WIDTH, 4 * HEIGHT)
    assert {name: after[name] for name in before if name != "size"} == {k: v for k, v in before.items() if k != "size"}
    picture = target.with_suffix(".png")
    assert Image.open(picture).size == (8 * WIDTH, 4 * HEIGHT)
    assert [Path(line.split(":")[1].strip()) for line in captured.out.splitlines()] == [target, picture]
    assert f"{FRAMES}/{FRAMES} frames" in captured.err and "Information" not in captured.err
    assert sorted(path.name for path in target.parent.iterdir()) == ["out.mkv", "out.png"]


def test_run_refuses_a_variable_frame_rate(tmp_path, capfd):
    source = film(tmp_path / "vfr.mkv", "-vf", "setpts=N*N/(25*TB)", "-fps_mode", "vfr", "-c:v", "ffv1")
    assert restore.main([str(source), str(tmp_path / "out.mkv")]) == 1
    assert "a variable frame rate, which y4m has no place for; use .venv/bin/vsuav restore" in capfd.readouterr().err


def test_vspipe_and_its_stand_in_write_the_same_bytes(clip, model, tmp_path):
    arguments = ["-a", f"input={clip}", "-a", f"model={model}", str(SCRIPTS / "restore.vpy"), "-"]
    commands = [restore.vspipe(), [sys.executable, pipe.__file__]]
    assert commands[0] != commands[1]
    frames = []
    for command in (*commands, [*commands[0], "--start", "5", "--end", "7"]):
        done = subprocess.run([*command, *arguments], capture_output=True, env=restore.environment())
        assert done.returncode == 0, done.stderr.decode()
        frames.append(done.stdout.split(b"FRAME\n", 1)[1])
    size = WIDTH * HEIGHT * 16 * 3 // 2 + len(b"FRAME\n")
    assert len(frames[0]) == FRAMES * size - len(b"FRAME\n")
    assert frames[0] == frames[1]
    assert frames[2] == frames[0][5 * size : 8 * size - len(b"FRAME\n")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent.mkv", "out.mkv"], "no such file"),
        (["one.mkv"], "takes no file .* or two"),
        (["CLIP", "CLIP"], "are the same file"),
        (["CLIP", "OUT", "noise_level=400"], "was not restored, see above"),
    ],
)
def test_run_says_what_is_wrong(arguments, message, clip, tmp_path, capfd):
    target = tmp_path / "out.mkv"
    arguments = [{"CLIP": str(clip), "OUT": str(target)}.get(word, word) for word in arguments]
    assert restore.main(arguments) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("vsuav: ")
    assert re.search(message, last)
    if "noise_level=400" in arguments:
        assert "upscale: noise_level must be between 0 and 350, got 400" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_an_encode_in_pieces_can_be_interrupted(clip, tmp_path):
    script = tmp_path / "enlarge.vpy"
    script.write_text(
        "import vapoursynth as vs\n"
        "clip = vs.core.bs.VideoSource(globals()['input'])\n"
        "clip.resize.Point(4 * clip.width, 4 * clip.height).set_output()\n"
    )
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    target = tmp_path / "whole.mkv"
    pieces = tmp_path / "whole.mkv.pieces"
    command = [str(SCRIPTS / "chunks.sh"), str(script), str(target), "6", f"input={clip}"]

    def run():
        return subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True)

    run()
    assert streams_of_video(target) == ((4 * WIDTH, 4 * HEIGHT), FRAMES)
    kept = (pieces / "00000000.mkv").stat().st_mtime_ns
    (pieces / "00000006.mkv").unlink()
    done = run()
    assert "frames 6 to 9 of 10" in done.stderr
    assert "frames 0 to" not in done.stderr
    assert (pieces / "00000000.mkv").stat().st_mtime_ns == kept
    assert streams_of_video(target) == ((4 * WIDTH, 4 * HEIGHT), FRAMES)


def streams_of_video(path: Path) -> tuple[tuple[int, int], int]:
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        return (codec.width, codec.height), sum(1 for _ in container.decode(video=0))
