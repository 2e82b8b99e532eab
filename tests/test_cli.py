"""The command line on tiny clips: what comes out, what is carried over, how it stops and how it fails."""

import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import toy
from media import close, ffmpeg, look, pictures
from safetensors.torch import load_file, save_file

av = pytest.importorskip("av")
typer_testing = pytest.importorskip("typer.testing")
vs = pytest.importorskip("vapoursynth")
if not hasattr(vs.core, "bs"):
    pytest.skip("BestSource is not installed", allow_module_level=True)

from vsuav import native, video  # noqa: E402
from vsuav.__main__ import app  # noqa: E402

LOSSLESS = ["--", "-c:v", "ffv1"]
SUBTITLES = "1\n00:00:00,100 --> 00:00:00,300\nHallo\n\n2\n00:00:00,400 --> 00:00:00,700\nWelt\n"
METADATA = """;FFMETADATA1
title=Ein Film
[CHAPTER]
TIMEBASE=1/1000
START=0
END=400
title=eins
[CHAPTER]
TIMEBASE=1/1000
START=400
END=1000
title=zwei
"""
TAGS = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv,setsar=4/3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`vfr.mkv` with sound, subtitles, chapters and tags, and a jump in time; `cfr.mp4`; `late.ts`; a toy model."""
    folder = tmp_path_factory.mktemp("clips")
    toy.write(folder / "model")
    (folder / "sub.srt").write_text(SUBTITLES)
    (folder / "meta.txt").write_text(METADATA)
    (folder / "noise.bin").write_bytes(bytes(range(256)) * 9)
    picture = ["-f", "lavfi", "-i", "testsrc2=s=32x24:r=24:d=0.8", "-f", "lavfi", "-i", "sine=d=0.8"]
    coded = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac"]
    jump = f"setpts='if(gte(N,10),PTS+0.1/TB,PTS)',{TAGS}"
    ffmpeg(*picture, "-i", folder / "sub.srt", "-i", folder / "meta.txt", "-map", 0, "-map", 1, "-map", 2,
           "-map_metadata", 3, "-map_chapters", 3, "-vf", jump, "-fps_mode", "vfr", *coded, "-c:s", "srt",
           "-metadata:s:a:0", "language=deu", "-disposition:v:0", "original", "-disposition:a:0", "0",
           "-disposition:s:0", "default+forced", folder / "vfr.mkv")  # fmt: skip
    ntsc = ["-f", "lavfi", "-i", "testsrc2=s=32x24:r=24000/1001:d=0.8", *picture[4:]]
    ffmpeg(*ntsc, "-i", folder / "sub.srt", *coded, "-c:s", "mov_text", folder / "cfr.mp4")
    ffmpeg(*ntsc, *coded, "-output_ts_offset", "1.4", folder / "late.ts")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Run a command inside this process: its exit code and what it wrote to stderr."""
    monkeypatch.setenv("COLUMNS", "400")

    def call(*arguments):
        result = typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stderr, result.stdout

    return call


@pytest.fixture(scope="module")
def restored(folder):
    """`vfr.mkv` restored once, losslessly, by the toy model."""
    target = folder / "restored.mkv"
    arguments = ["restore", folder / "vfr.mkv", target, "--model", folder / "model", *LOSSLESS]
    result = typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "" and "wrote" in result.stderr
    return target


def test_everything_but_the_picture_is_carried_over(folder, restored):
    before, after = look(folder / "vfr.mkv"), look(restored)
    assert after["size"] == (128, 96) and after["format"] == "yuv420p10le"
    assert after["kinds"] == ["video", "audio", "subtitle"] and after["languages"][1] == "deu"
    assert before["marks"] == after["marks"] and len(set(after["marks"])) == 3
    assert close(after["times"]["video"][0], before["times"]["video"][0])  # with the jump
    assert after["payload"]["audio"] == before["payload"]["audio"]
    assert close(after["times"]["audio"][0], before["times"]["audio"][0])
    assert after["payload"]["subtitle"] == before["payload"]["subtitle"]
    for key in ("colour", "shape", "title", "chapters"):
        assert after[key] == before[key], key
    assert after["colour"] == (1, 1, 1) and after["shape"] == Fraction(4, 3)


def test_the_picture_is_what_upscale_gives(folder, restored):
    from vsuav import upscale

    clip = video.ten_bit(vs.core.bs.VideoSource(str(folder / "vfr.mkv")))
    result = upscale(clip, model=str(folder / "model"))
    with av.open(str(restored)) as container:
        for n, frame in enumerate(container.decode(video=0)):
            if n in (0, 7, 18):
                assert np.array_equal(frame.to_ndarray()[:96], np.asarray(result.get_frame(n)[0]))
    assert n == clip.num_frames - 1


@pytest.mark.long
@pytest.mark.parametrize("choice", [[], ["-vf", "select='mod(n,7)-3'", "-fps_mode", "vfr"]], ids=["cfr", "vfr"])
def test_ten_seconds_with_everything_in_them(choice, run, tmp_path):
    """A real clip through the bundled model: same duration, streams, tags, chapters and timestamps."""
    source, target = tmp_path / "in.mkv", tmp_path / "out.mkv"
    (tmp_path / "sub.srt").write_text(SUBTITLES.replace("00:00:00,700", "00:00:09,700"))
    (tmp_path / "meta.txt").write_text(METADATA.replace("END=1000", "END=10000"))
    sample = Path(__file__).parents[1] / "scripts" / "sample" / "city.mp4"
    ffmpeg("-stream_loop", 6, "-i", sample, "-f", "lavfi", "-i", "sine=440:d=10", "-f", "lavfi", "-i", "sine=660:d=10",
           "-i", tmp_path / "sub.srt", "-i", tmp_path / "meta.txt", "-map", "0:v", "-map", "1:a", "-map", "2:a",
           "-map", 3, "-map_metadata", 4, "-map_chapters", 4, "-t", 10, "-vf", f"crop=64:40:80:16,{TAGS}",
           "-c:v", "libx264", "-crf", 12, "-c:a:0", "aac", "-c:a:1", "libopus", "-c:s", "srt",
           "-metadata:s:a:0", "language=eng", "-metadata:s:a:1", "language=deu", "-metadata:s:a:1", "title=Zweiter",
           tmp_path / "whole.mkv")  # fmt: skip
    coded = ["-c:v", "libx264", "-crf", 12] if choice else ["-c:v", "copy"]
    ffmpeg("-i", tmp_path / "whole.mkv", "-map", 0, *choice, *coded, "-c:a", "copy", "-c:s", "copy", source)
    code, said, _ = run("restore", source, target)
    assert code == 0, said
    before, after = look(source), look(target)
    assert after["size"] == (256, 160) and after["format"] == "yuv420p10le"
    assert len(before["times"]["video"][0]) == (214 if choice else 250)
    assert close(before["times"]["video"][0], after["times"]["video"][0])
    for same in ("kinds", "colour", "shape", "languages", "marks", "title", "chapters"):
        assert before[same] == after[same], same
    assert before["codecs"][1:] == after["codecs"][1:] and after["codecs"][0] == "hevc"
    for kind in ("audio", "subtitle"):
        assert before["payload"][kind] == after["payload"][kind]
        assert all(map(close, before["times"][kind], after["times"][kind]))


def test_a_part_has_the_same_pixels_and_stays_in_sync(folder, restored, run, tmp_path):
    target = tmp_path / "part.mkv"
    code, said, _ = run("restore", folder / "vfr.mkv", target, "--model", folder / "model", "--start", "0.25", "--end",
                        "0:00:00.6", *LOSSLESS)  # fmt: skip
    assert code == 0, said
    whole, part = look(restored), look(target)
    times = whole["times"]["video"][0]
    inside = [n for n, t in enumerate(times) if Fraction("0.2495") <= t < Fraction("0.5995")]
    assert pictures(target) == [pictures(restored)[n] for n in inside]
    assert close(part["times"]["video"][0], [times[n] - times[inside[0]] for n in inside])
    first = whole["payload"]["audio"][0].index(part["payload"]["audio"][0][0])  # the sound is as late as it was
    late = whole["times"]["audio"][0][first] - times[inside[0]]
    assert abs(part["times"]["audio"][0][0] - part["times"]["video"][0][0] - late) <= Fraction(2, 1000)
    assert [title for title, *_ in part["chapters"]] == ["eins", "zwei"]


def test_mp4_to_mkv_and_a_late_beginning(folder, run, tmp_path):
    """Time codes of 24000/1001 stay exact; text subtitles change their format with the container; offsets stay."""
    for name, kinds in (("cfr.mp4", ["video", "audio", "subtitle"]), ("late.ts", ["video", "audio"])):
        target = tmp_path / f"{name}.mkv"
        code, said, _ = run("restore", folder / name, target, "--model", folder / "model", "--scale", "2",
                            "--", "-c:v", "libx264", "-crf", "20")  # fmt: skip
        assert code == 0, said
        before, after = look(folder / name), look(target)
        assert after["kinds"] == kinds and after["size"] == (64, 48) and "h264" in after["codecs"]
        for kind in ("video", "audio"):
            start = min(before["times"]["video"][0][0], before["times"]["audio"][0][0])
            expected = [t - start for t in before["times"][kind][0]]
            begins = min(after["times"]["video"][0][0], after["times"]["audio"][0][0])
            assert close([t - begins for t in after["times"][kind][0]], expected), (name, kind)
        assert after["colour"][0] == 6  # assumed for SD, so it is said
    assert b"Hallo" in b"".join(look(tmp_path / "cfr.mp4.mkv")["payload"]["subtitle"][0])
    back = tmp_path / "back.mp4"
    code, said, _ = run("restore", folder / "vfr.mkv", back, "--model", folder / "model", "--scale", "1",
                        "--", "-c:v", "libx264")  # fmt: skip
    assert code == 0, said
    assert "mov_text" in look(back)["codecs"] and len(look(back)["chapters"]) == 2


def test_ctrl_c_leaves_a_state_that_the_same_command_goes_on_from(folder, restored, tmp_path):
    target = tmp_path / "stopped.mkv"
    command = [sys.executable, "-m", "vsuav", "restore", folder / "vfr.mkv", target, "--model", folder / "model"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*map(str, command), *LOSSLESS], stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores Ctrl-C
    )  # fmt: skip
    for line in process.stderr:
        if line.split("/")[0].isdigit() and 6 <= int(line.split("/")[0]) < 15:
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(120) == 130, said
    assert "goes on from here" in said and "Traceback" not in said
    kept = tmp_path / "stopped.mkv.vsuav"
    assert sorted(p.name for p in tmp_path.iterdir()) == [kept.name] and any(kept.iterdir())
    done = subprocess.run([*map(str, command), *LOSSLESS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["stopped.mkv"]
    assert pictures(target) == pictures(restored)


def test_a_run_under_nohup_goes_on_after_the_logout(folder, restored, tmp_path):
    target = tmp_path / "overnight.mkv"
    command = [sys.executable, "-m", "vsuav", "restore", folder / "vfr.mkv", target, "--model", folder / "model"]
    process = subprocess.Popen(
        [*map(str, command), *LOSSLESS], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # which is what nohup does
    )  # fmt: skip
    for line in process.stderr:
        if line.split("/")[0].isdigit():
            break
    process.send_signal(signal.SIGHUP)
    said = process.stderr.read()
    assert process.wait(120) == 0, said
    assert pictures(target) == pictures(restored)


def test_an_error_in_a_frame_is_one_clear_line(folder, run, tmp_path):
    broken = toy.write(tmp_path / "model")
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file(state | {"conv_out.bias": state["conv_out.bias"] + 1e30}, path)
    code, said, _ = run("restore", folder / "cfr.mp4", tmp_path / "x.mkv", "--model", broken, "--set", "dtype=float32")
    assert code == 1
    assert said.splitlines()[-1].startswith("vsuav: upscale: frames 0 to 7 came out not finite in float32; try ")


def test_inputs_that_are_no_files(run, tmp_path):
    os.mkfifo(tmp_path / "pipe.mkv")
    for name, says in (("", "is no file"), ("pipe.mkv", "pipe.mkv is no file"), ("absent.mkv", "no such file: ")):
        code, said, _ = run("restore", tmp_path / name, tmp_path / "out.mkv")
        assert code == 1 and says in said


def test_files_of_others_stay(folder, run, tmp_path):
    """An INPUT that is named like a part of OUTPUT, and files in the folder that latents are kept in."""
    source, target = tmp_path / "m.part.mkv", tmp_path / "m.mkv"
    source.write_bytes((folder / "cfr.mp4").read_bytes())
    (tmp_path / "m.mkv.vsuav").mkdir()
    (tmp_path / "m.mkv.vsuav" / "own.txt").write_text("mine")
    arguments = ["restore", source, target, "--model", folder / "model", "--end", "0.1"]
    assert run(*arguments, "--", "-c:v", "absent")[0] == 1
    for more in ([], ["-y", "--cache-dir", tmp_path / "keep"]):
        code, said, _ = run(*arguments, *more, *LOSSLESS)
        assert code == 0, said
        assert source.read_bytes() == (folder / "cfr.mp4").read_bytes() and look(target)["size"] == (128, 96)
        assert [path.name for path in (tmp_path / "m.mkv.vsuav").iterdir()] == ["own.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"m.part.mkv", "m.mkv", "m.mkv.vsuav", "keep"}


def test_a_second_run_to_the_same_output_is_refused(folder, run, tmp_path):
    from vsuav.commands import kept_latents
    from vsuav.parts import alone

    target = tmp_path / "new.mkv"
    arguments = ["restore", folder / "cfr.mp4", target, "--model", folder / "model", "--end", "0.1", *LOSSLESS]
    with alone(target, kept_latents(target)):
        code, said, _ = run(*arguments)
        assert code == 1 and said.count("\n") == 1 and "is being written by another run" in said
        assert run(*arguments[:4], "--cache-dir", tmp_path / "keep", *arguments[4:])[0] == 1
    assert run(*arguments)[0] == 0
    assert list(tmp_path.iterdir()) == [target]


def test_what_changes_its_size_or_has_an_odd_one(folder, run, tmp_path):
    for n, size in enumerate(("32x24", "48x32")):
        ffmpeg("-f", "lavfi", "-i", f"testsrc2=s={size}:d=0.2", "-c:v", "mpeg2video", "-output_ts_offset", 0.2 * n,
               tmp_path / f"{n}.ts")  # fmt: skip
    source = tmp_path / "both.ts"
    source.write_bytes((tmp_path / "0.ts").read_bytes() + (tmp_path / "1.ts").read_bytes())
    code, said, _ = run("info", source)
    assert code == 1 and said.count("\n") == 1 and "clip must have one constant size" in said
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=48x48:d=0.04", "-vf", "scale=33:25", "-c:v", "ffv1", "-pix_fmt", "yuv420p",
           tmp_path / "odd.mkv")  # fmt: skip
    code, said, _ = run("restore", tmp_path / "odd.mkv", tmp_path / "o.mkv", "--model", folder / "model", *LOSSLESS)
    assert code == 0 and "left out: the edge of the picture: 33x25 is cut to 32x24" in said


@pytest.mark.parametrize("text", ["\ufeff0 a street\n9 a cat", "0\ta street\n9 \t a cat\n", "0 a street\n  9 a cat  "])
def test_prompts_as_editors_write_them(text, tmp_path):
    from vsuav.commands import read_prompts

    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == [(0, "a street"), (9, "a cat")]
    (tmp_path / "prompts.txt").write_text("\u00b2 blur", encoding="utf-8")
    with pytest.raises(video.MediaError, match="line 1: a line is a frame number and a text, got '\u00b2 blur'"):
        read_prompts(tmp_path / "prompts.txt")


def test_settings_and_prompts_reach_upscale(folder, run, tmp_path, monkeypatch):
    from vsuav import commands

    seen = {}

    def spy(clip, **settings):
        seen.update(settings)
        raise ValueError("enough")

    monkeypatch.setattr(commands, "upscale", spy)
    monkeypatch.setattr(commands, "parse_settings", lambda pairs: {"seed": 3, "tile": (64, 64)} if pairs else {})
    (tmp_path / "prompts.txt").write_text("# shots\n0 a street\n\n240 a cat, asleep\n")
    code, said, _ = run("restore", folder / "vfr.mkv", tmp_path / "x.mkv", "--prompts", tmp_path / "prompts.txt",
                        "--noise-level", 60, "--set", "seed=3", "--cache-dir", tmp_path / "keep")  # fmt: skip
    assert (code, said) == (1, "vsuav: enough\n")
    assert seen == {
        "prompt": [(0, "a street"), (240, "a cat, asleep")], "noise_level": 60, "seed": 3, "tile": (64, 64),
        "cache_dir": str(tmp_path / "keep"),
    }  # fmt: skip


def test_settings_are_literals():
    from vsuav.commands import parse_settings

    given = ["seed=3", "tile=(64, 64)", "solver=ddim", "propagation_steps=[1]", "scene_detect=False"]
    assert parse_settings(given) == {
        "seed": 3, "tile": (64, 64), "solver": "ddim", "propagation_steps": [1], "scene_detect": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"), [("90", 90), ("1:30", 90), ("1:30.5", 90.5), ("0:01:30", 90), ("1:00:00", 3600), ("7.", 7)]
)
def test_times(text, value):
    assert video.seconds(text) == value


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing.mkv", "out.mkv"], "no such file"),
        (["meta.txt", "out.mkv"], "holds no video"),
        (["noise.bin", "out.mkv"], "no file ffmpeg can read"),
        (["vfr.mkv", "vfr.mkv"], "the same file"),
        (["vfr.mkv", "cfr.mp4"], "exists already; --overwrite"),
        (["vfr.mkv", "out"], "OUTPUT must end in .mkv, .mp4, .mov or .webm, got out"),
        (["vfr.mkv", "out.avi"], "OUTPUT must end in .mkv, .mp4, .mov or .webm, got out.avi"),
        (["one.mkv", "one.png"], "OUTPUT must end in"),
        (["vfr.mkv", "none/out.mkv"], "no such folder"),
        (["vfr.mkv", "out.mkv", "--start", "soon"], "a time is written 90"),
        (["vfr.mkv", "out.mkv", "--start", "1:00:00"], "no frame of"),
        (["vfr.mkv", "out.mkv", "--set", "sead=1"], "--set takes NAME=VALUE"),
        (["vfr.mkv", "out.mkv", "--noise-level", "400"], "upscale: noise_level must be between 0 and 350, got 400"),
        (["vfr.mkv", "out.mkv", "--model", "absent"], "model folder absent does not exist"),
        (["vfr.mkv", "out.mkv", "--prompts", "absent.txt"], "cannot read the prompts"),
        (["vfr.mkv", "out.mkv", "--model", "model", "--", "-c:v", "absent"], "ffmpeg could not write"),
        (["vfr.mkv", "out.webm", "--model", "model"], "ffmpeg could not write"),
        ([os.fsdecode(b"\xff.mkv"), "out.mkv"], "no such file"),
    ],
)
def test_errors_are_one_line(folder, run, monkeypatch, arguments, says):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    code, said, _ = run("restore", *arguments)
    lines = [line for line in said.splitlines() if "frames" not in line or "vsuav" in line]
    assert code == 1 and len(lines) == 1 and says in said and lines[0].startswith("vsuav: "), said
    assert sorted(folder.iterdir()) == before
    code, said, _ = run("restore", "-v", *arguments)
    assert code == 1 and "Traceback" in said


def test_wrong_usage_is_exit_code_2(run):
    assert run("restore", "one")[0] == 2
    assert run("restore", "one", "two", "--noise-level", "much")[0] == 2
    assert run("unheard-of")[0] == 2


def test_models_commands(folder, run, tmp_path):
    code, _, out = run("models", "verify", folder / "model")
    assert code == 0 and "kind           vsuav" in out and "all fit" in out
    code, _, _ = run("models", "convert", folder / "model", tmp_path / "half", "--dtype", "float16")
    assert code == 0
    assert run("models", "verify", tmp_path / "half")[0] == 0
    code, said, _ = run("models", "convert", folder / "model", tmp_path / "other", "--dtype", "int8")
    assert code == 1 and "float16" in said
    (tmp_path / "half" / "unet" / "config.json").unlink()
    code, said, _ = run("models", "verify", tmp_path / "half")
    assert code == 1 and "config.json does not exist" in said
    assert run("models", "list")[0] == 0


def test_compare_shows_input_bicubic_and_result(folder, restored, run, tmp_path):
    from PIL import Image

    picture = tmp_path / "c.png"
    code, said, _ = run("compare", folder / "vfr.mkv", restored, picture, "--frame", 3, "--crop", "16,40,64,48")
    assert code == 0, said
    shown = np.asarray(Image.open(picture)).astype(int)
    assert shown.shape == (48, 3 * 64, 3)
    expected = vs.core.bs.VideoSource(str(restored))[3].resize.Bicubic(format=vs.RGB24).get_frame(0)
    expected = np.dstack([np.asarray(plane) for plane in expected])[40:88, 16:80]
    assert np.array_equal(shown[16:, 128:], expected[16:])  # below the name
    pixels = shown[16:, :64].reshape(8, 4, 16, 4, 3)
    assert (pixels == pixels[:, :1, :, :1]).all()  # the input's pixels are 4x4 blocks
    assert np.abs(shown[16:, 64:128] - shown[16:, :64]).mean() < 40  # bicubic is the same picture, smoother

    page = tmp_path / "c.html"
    code, said, _ = run("compare", folder / "vfr.mkv", restored, page)
    assert code == 0, said
    text = page.read_text()
    assert text.count("data:image/jpeg") == 15 and text.count('type="range"') == 5 and "http" not in text

    both = tmp_path / "c.mkv"
    code, said, _ = run("compare", folder / "vfr.mkv", restored, both)
    assert code == 0, said
    seen = look(both)
    assert seen["size"] == (256, 96) and seen["shape"] == Fraction(4, 3) and len(seen["times"]["audio"]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.html", "c.mkv", "c.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["c.gif"], "must end in .png"),
        (["c.png", "--frame", "99"], "--frame must be between 0 and 19, got 99"),
        (["c.png", "--crop", "100,0,64,64"], "inside 128x96"),
        (["c.png", "--crop", "wide"], "--crop is left,top,width,height"),
        (["c.png", "--start", "0.5"], "has 20 frames, but"),
    ],
)
def test_compare_errors(folder, restored, run, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, said, _ = run("compare", folder / "vfr.mkv", restored, *arguments)
    assert code == 1 and says in said and said.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_info_names_what_is_here(run):
    code, said, out = run("info")
    assert code == 0 and said == ""
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert rows["VapourSynth"].startswith("R") and "bs" in rows["plugins"] and "GiB" in rows["cpu"]
    assert f"machine code for {native.KIND}" in rows["cpu"] or "no machine code" in rows["cpu"] and not native.KIND


def test_info_counts_the_calls_a_linear_pass_makes(folder, run):
    from vsuav.plan import Recipe, plan_block
    from vsuav.shots import Shots

    code, said, out = run("info", folder / "vfr.mkv", "--model", folder / "model", "--set", "dtype=float32")
    assert code == 0, said
    rows = dict(line.split(maxsplit=1) for line in out.replace("U-Net windows", "calls").splitlines())
    made, calls = set(), 0
    for block in range(4):  # 20 frames
        plan = plan_block(block, Recipe(3, 0, frozenset([1]), 16), Shots(20), made.__contains__)
        calls += plan.calls
        made |= {key for task in plan.tasks for key in task.makes}
    assert rows["calls"].split()[0] == str(calls)
    assert "32x24 -> 128x96" in rows["clip"] and rows["time"].startswith("about") and "steps=3" in rows["settings"]


@pytest.mark.parametrize(("linear", "square"), [(3e-6, 0.0), (2e-6, 5e-12), (0.0, 4e-12)])
def test_times_are_extended_from_two_sizes(linear, square):
    from vsuav.info import extended

    def take(pixels):
        return linear * pixels + square * pixels**2

    assert extended({102400: take(102400), 25600: take(25600)}, 2073600) == pytest.approx(take(2073600))


def test_noise_in_a_measurement_makes_no_negative_times():
    from vsuav.info import extended

    assert extended({25600: 1.0, 102400: 3.0}, 1024000) == pytest.approx(30)  # the larger is cheaper: no square part
    assert extended({25600: 0.0, 102400: 3.0}, 1024000) == pytest.approx(300)  # nothing but a square part


@pytest.mark.parametrize(("size", "tile"), [((1920, 1080), 512), ((852, 480), 0), ((320, 240), 0)])
def test_the_price_is_what_the_pieces_take(folder, monkeypatch, size, tile):
    """With a clock that follows the pixels, large frames are priced as if they had been timed whole, or in bands."""
    from vsuav import info, tiling

    def take(pixels):
        return 1e-6 * pixels + 3e-12 * pixels**2

    monkeypatch.setattr(info, "_window", lambda networks, step, count, size: size[0] * size[1])
    monkeypatch.setattr(info, "_decode", lambda networks, count, size: 2 * size[0] * size[1])
    monkeypatch.setattr(info, "_shortest", lambda work: take(work) if isinstance(work, int) else 0.25)
    clip = vs.core.std.BlankClip(width=size[0], height=size[1], format=vs.YUV420P8, length=20)
    opened = video.Video(folder / "vfr.mkv", clip, range(20), Fraction(1, 25), Fraction(0))
    price = info.price(opened, range(20), {"model": str(folder / "model"), "tile": tile})
    cover = tiling.tiles(size[1], size[0], (tile, tile), 16)
    piece = take(tile**2 if tile else size[0] * size[1])
    timed = info.LARGEST[0] * info.LARGEST[1] if tile else size[0] * size[1]
    decoded = take(2 * timed) * size[0] * size[1] / timed  # bands take as long as they are large
    assert price.calls == 3 * 3 and price.tiles == len(cover)  # frames 0-7, 6-13, 12-19; three steps
    assert price.seconds == pytest.approx(3 * 3 * len(cover) * piece + 20 / 3 * decoded + 19 * 0.25)
    assert price.memory > price.kept + 18 * 16 * size[0] * size[1] * 12


def test_steps_that_reuse_features_are_priced_by_themselves(folder, monkeypatch):
    """Three steps, the second the outer ring alone: what is timed for it is a call with the features of the first."""
    from vsuav import info
    from vsuav.networks import Networks

    timed = []

    def call(self, step, frames, latents, low_res, prompt, deep=None):
        timed.append((step, deep is not None))

    def shortest(work):
        before = len(timed)
        work()
        return (6.0, 1.0, 5.0)[timed[-1][0]] if len(timed) > before else 0.0

    monkeypatch.setattr(Networks, "window", call)
    monkeypatch.setattr(Networks, "window_and_deep", lambda *given: (call(*given), "deep"))
    monkeypatch.setattr(info, "_shortest", shortest)
    clip = vs.core.std.BlankClip(width=32, height=24, format=vs.YUV420P8, length=8)
    opened = video.Video(folder / "vfr.mkv", clip, range(8), Fraction(1, 25), Fraction(0))
    given = {"model": str(folder / "model"), "reuse_steps": [1], "propagation_steps": []}
    price = info.price(opened, range(8), given)
    assert timed == [(0, False), (0, False), (1, True), (2, False)]  # the second, to have its features
    assert price.seconds == pytest.approx(6.0 + 1.0 + 5.0)


def test_short_clips_are_priced_by_their_own_windows(folder, monkeypatch):
    from vsuav import info

    timed = []
    monkeypatch.setattr(info, "_window", lambda networks, step, count, size: timed.append(count) or 1.0)
    monkeypatch.setattr(info, "_decode", lambda networks, count, size: timed.append(count) or 2.0)
    monkeypatch.setattr(info, "_shortest", lambda work: work if isinstance(work, float) else 0.25)
    clip = vs.core.std.BlankClip(width=32, height=24, format=vs.YUV420P8, length=2)
    opened = video.Video(folder / "vfr.mkv", clip, range(2), Fraction(1, 25), Fraction(0))
    price = info.price(opened, range(2), {"model": str(folder / "model")})
    assert set(timed) == {2} and price.seconds == pytest.approx(3 * 1.0 + 2.0 + 0.25)  # one window, one chunk


@pytest.mark.parametrize("angle", [90, -90, 180])
def test_pictures_are_turned_as_players_turn_them(tmp_path, angle):
    plain, turned, raw = tmp_path / "plain.mp4", tmp_path / "turned.mp4", tmp_path / "raw.y4m"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=36x28:r=25:d=0.2", "-vf", "setsar=4/3", "-c:v", "libx264", "-pix_fmt",
           "yuv420p", plain)  # fmt: skip
    ffmpeg("-display_rotation", angle, "-i", plain, "-c", "copy", turned)
    ffmpeg("-i", turned, raw)  # ffmpeg turns by itself
    ours, theirs = video.open_video(turned), vs.core.bs.VideoSource(str(raw))
    assert (ours.clip.width, ours.clip.height) == (theirs.width, theirs.height)
    for plane in range(3):
        assert np.array_equal(np.asarray(ours.clip.get_frame(3)[plane]), np.asarray(theirs.get_frame(3)[plane]))
    assert ours.pixel_shape == (Fraction(4, 3) if angle == 180 else Fraction(3, 4))


@pytest.mark.parametrize(
    ("form", "coded", "expected"),
    [
        ("gbrp", "ffv1", ("yuv444p10le", 1, 1)),
        ("gray", "ffv1", ("yuv420p10le", 1, 1)),
        ("yuvj420p", "mjpeg", ("yuv420p10le", 5, 2)),
        ("yuv422p10le", "ffv1", ("yuv422p10le", 6, 1)),
    ],
)
def test_formats_of_files(folder, run, tmp_path, form, coded, expected):
    """RGB and gray become BT.709; full range stays full; depth and subsampling are kept or raised to ten bits."""
    source, target = tmp_path / "in.mkv", tmp_path / "out.mkv"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=36x28:r=25:d=0.04", "-c:v", coded, "-pix_fmt", form, source)
    code, said, _ = run("restore", source, target, "--model", folder / "model", "--", "-c:v", "libx264")
    assert code == 0, said
    with av.open(str(target)) as container:
        context = container.streams.video[0].codec_context
        assert (context.pix_fmt, int(context.colorspace), int(context.color_range)) == expected


def test_interlaced_files_are_refused_unless_said_to_be_progressive(folder, run, tmp_path):
    source, target = tmp_path / "in.mkv", tmp_path / "out.mkv"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=32x32:r=25:d=0.04", "-c:v", "libx264", "-flags", "+ilme+ildct",
           "-pix_fmt", "yuv420p", source)  # fmt: skip
    code, said, _ = run("restore", source, target, "--model", folder / "model", *LOSSLESS)
    assert code == 1 and "deinterlace it first" in said and "SetFieldBased" in said
    assert run("restore", source, target, "--model", folder / "model", "--progressive", *LOSSLESS)[0] == 0


@pytest.mark.parametrize("module", ["av", "imageio_ffmpeg"])
def test_a_missing_package_is_one_line_that_names_the_extra(module, tmp_path):
    code = f"import sys; sys.modules[{module!r}] = None; from vsuav.__main__ import main; main()"
    command = [sys.executable, "-c", code, "restore", str(tmp_path / "in.mkv"), str(tmp_path / "out.mkv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f'vsuav: {module} is missing: pip install "vsuav[cli]"\n'
