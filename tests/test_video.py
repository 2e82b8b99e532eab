"""Files that are opened and written again without a model: times, colours, shapes, and what is left when it fails."""

import contextlib
import re
import signal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from media import av, close, ffmpeg, look

vs = pytest.importorskip("vapoursynth")
if not hasattr(vs.core, "bs"):
    pytest.skip("BestSource is not installed", allow_module_level=True)

from vsuav import video  # noqa: E402
from vsuav.parts import MediaError  # noqa: E402

PICTURE = ["-f", "lavfi", "-i", "testsrc2=s=32x24:r=25:d=0.48"]
SOUND = ["-f", "lavfi", "-i", "sine=d=0.48:r=48000"]
CODED = ["-c:v", "libx264", "-pix_fmt", "yuv420p"]
ORANGE = ["-f", "lavfi", "-i", "color=0xC86432:s=32x24:r=25:d=0.12"]


def again(source: Path, target: Path, *encoder: str, start=None, end=None) -> video.Writer:
    """Write the pictures of `source`, as they are, with everything else of it."""
    opened = video.open_video(source)
    span, clip = opened.between(start, end), video.ten_bit(opened.clip)
    writer = video.Writer(clip[span.start : span.stop], opened, span, target, encoder or ["-c:v", "ffv1"])
    writer.check()
    with writer:
        for n, frame in enumerate(clip[span.start : span.stop].frames(close=True)):
            writer.write(n, frame)
    return writer


def colours(path: Path) -> list[tuple[float, ...]]:
    """The mean R, G, B of every frame, 0…255, by its planes and tags (untagged: BT.601) and the textbook."""
    found = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            planes = []
            for plane, part in zip(frame.planes, frame.format.components, strict=True):
                samples = np.frombuffer(plane, np.uint8 if part.bits == 8 else np.uint16).reshape(plane.height, -1)
                planes.append(samples[:, : plane.width].mean() / 2 ** (part.bits - 8))
            full = int(frame.color_range) == 2
            y = planes[0] / 255 if full else (planes[0] - 16) / 219
            u, v = ((p - 128) / (255 if full else 224) for p in planes[1:])
            kr, kb = (0.2126, 0.0722) if int(frame.colorspace) == 1 else (0.299, 0.114)
            r, b = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
            found.append((255 * r, 255 * (y - kr * r - kb * b) / (1 - kr - kb), 255 * b))
    return found


def seconds(path: Path) -> float:
    with av.open(str(path)) as container:
        return container.duration / av.time_base


@pytest.mark.parametrize(
    ("form", "coded", "expected"),
    [
        ("yuv440p", "ffv1", "yuv444p10le"),
        ("yuv440p10le", "ffv1", "yuv444p10le"),
        ("yuv411p", "ffv1", "yuv422p10le"),
        ("yuv410p", "ffv1", "yuv420p10le"),
        ("yuv422p", "ffv1", "yuv422p10le"),
    ],
)
@pytest.mark.parametrize("encoder", ["ffv1", "libx265"])
def test_colours_stay_in_every_subsampling(form, coded, expected, encoder, tmp_path):
    ffmpeg(*ORANGE, "-c:v", coded, "-pix_fmt", form, tmp_path / "in.mkv")
    again(tmp_path / "in.mkv", tmp_path / "out.mkv", "-c:v", encoder, "-crf", "1")
    assert look(tmp_path / "out.mkv")["format"] == expected
    assert np.allclose(colours(tmp_path / "out.mkv"), (200, 100, 50), atol=2)


def test_colours_stay_when_the_picture_is_turned(tmp_path):
    ffmpeg(*ORANGE, "-c:v", "libx264", "-pix_fmt", "yuv422p", "-qp", "0", tmp_path / "plain.mp4")
    ffmpeg("-display_rotation", 90, "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "in.mp4")
    again(tmp_path / "in.mp4", tmp_path / "out.mkv")
    assert look(tmp_path / "out.mkv")["size"] == (24, 32)
    assert np.allclose(colours(tmp_path / "out.mkv"), (200, 100, 50), atol=2)


@pytest.mark.parametrize("late", [0, 0.1, 0.5])
def test_sound_of_a_transport_stream_stays_as_late_as_it_is(late, tmp_path):
    ffmpeg(*PICTURE, "-itsoffset", late, *SOUND, *CODED, "-c:a", "mp2", tmp_path / "in.ts")
    again(tmp_path / "in.ts", tmp_path / "out.mkv")
    before, after = look(tmp_path / "in.ts")["times"], look(tmp_path / "out.mkv")["times"]
    apart = before["audio"][0][0] - before["video"][0][0]
    assert abs(after["audio"][0][0] - after["video"][0][0] - apart) <= Fraction(2, 1000)


@pytest.mark.parametrize("turned", [False, True])
def test_the_shape_that_the_container_says_counts(turned, tmp_path):
    """The frames say 4:3 pixels, the container 3:2."""
    ffmpeg(*PICTURE, "-vf", "setsar=4/3", *CODED, tmp_path / "plain.mp4")
    turn = ["-display_rotation", 90] if turned else []
    ffmpeg(*turn, "-i", tmp_path / "plain.mp4", "-c", "copy", "-aspect", "2:1", tmp_path / "in.mp4")
    again(tmp_path / "in.mp4", tmp_path / "out.mkv")
    assert look(tmp_path / "in.mp4")["shape"] == Fraction(3, 2)
    assert look(tmp_path / "out.mkv")["shape"] == (Fraction(2, 3) if turned else Fraction(3, 2))


def test_tags_are_those_of_the_frames_that_are_written(tmp_path):
    """As `upscale` gives them: all in the look of the clip's first frame, whatever a later one was."""
    ffmpeg(*ORANGE, "-vf", "scale=out_color_matrix=smpte170m,format=yuv420p,setparams=colorspace=smpte170m:range=tv",
           "-c:v", "ffv1", tmp_path / "in.mkv")  # fmt: skip
    opened = video.open_video(tmp_path / "in.mkv")
    clip = opened.clip.resize.Bicubic(format=vs.YUV420P10, matrix=vs.MATRIX_BT709, range=vs.RANGE_FULL)
    writer = video.Writer(clip, opened, range(len(clip)), tmp_path / "out.mkv", ["-c:v", "ffv1"])
    with writer:
        for n, frame in enumerate(clip.frames(close=True)):
            writer.write(n, frame)
    assert look(tmp_path / "out.mkv")["colour"][0] == 1
    assert np.allclose(colours(tmp_path / "out.mkv"), (200, 100, 50), atol=2)


@pytest.mark.parametrize("source", ["slides.gif", "slides.mp4"])
@pytest.mark.parametrize("target", ["out.mkv", "out.mp4"])
@pytest.mark.parametrize("reordered", ["0", "3"])
def test_the_last_frame_is_shown_as_long_as_it_was(source, target, reordered, tmp_path):
    """Twelve frames of 0.04 s, but for the last, of three seconds."""
    if source == "slides.gif":
        ffmpeg(*PICTURE, "-final_delay", "300", tmp_path / source)
    else:
        ffmpeg(*PICTURE, *CODED, "-bf", "0", "-bsf:v", "setts=pts=PTS:dts=DTS:duration='if(eq(N,11),3/TB,DURATION)'",
               tmp_path / source)  # fmt: skip
    assert abs(seconds(tmp_path / source) - 3.44) < 0.001
    again(tmp_path / source, tmp_path / target, "-c:v", "libx264", "-bf", reordered)
    assert abs(seconds(tmp_path / target) - 3.44) < 0.001
    assert len(look(tmp_path / target)["times"]["video"][0]) == 12
    again(tmp_path / target, tmp_path / "back.mkv", start=0.2)
    assert abs(seconds(tmp_path / "back.mkv") - 3.24) < 0.001
    again(tmp_path / target, tmp_path / "front.mkv", end=0.2)
    assert abs(seconds(tmp_path / "front.mkv") - 0.2) < 0.001


@pytest.mark.parametrize("name", ["-vf", "-filter:v"])
def test_a_filter_of_the_user_comes_after_ours(name, tmp_path):
    tags = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv,setsar=4/3"
    ffmpeg(*PICTURE, "-vf", tags, *CODED, tmp_path / "in.mkv")
    again(tmp_path / "in.mkv", tmp_path / "out.mkv", "-c:v", "libx264", name, "crop=16:16", "-qp", "0")
    seen = look(tmp_path / "out.mkv")
    assert (seen["size"], seen["colour"], seen["shape"]) == ((16, 16), (1, 1, 1), Fraction(4, 3))


@pytest.mark.parametrize(
    ("size", "turned", "matrix"),
    [
        ("1280x534", False, 1), ("1280x534", True, 1), ("1024x576", False, 6), ("720x576", True, 6),
        ("960x720", False, 1),
    ],  # fmt: skip
)
def test_what_says_no_matrix_is_hd_by_its_coded_size(size, turned, matrix, tmp_path):
    ffmpeg("-f", "lavfi", "-i", f"color=red:s={size}:d=0.04", *CODED, tmp_path / "plain.mp4")
    ffmpeg(*(["-display_rotation", 90] if turned else []), "-i", tmp_path / "plain.mp4", "-c", "copy",
           tmp_path / "in.mp4")  # fmt: skip
    assert video.open_video(tmp_path / "in.mp4").clip.get_frame(0).props["_Matrix"] == matrix


@pytest.mark.parametrize(
    ("name", "coded"),
    [("in.vob", ["-c:v", "mpeg2video", "-bf", "2"]), ("in.avi", ["-c:v", "mpeg4", "-bf", "2"]), ("in.h264", CODED)],
)
def test_files_without_timestamps_are_counted(name, coded, tmp_path):
    ffmpeg(*PICTURE, *coded, tmp_path / name)
    again(tmp_path / name, tmp_path / "out.mkv")
    assert close(look(tmp_path / "out.mkv")["times"]["video"][0], [Fraction(n, 25) for n in range(12)])


def test_sound_beside_frames_without_timestamps(tmp_path):
    """An MPEG program stream, whose sound begins a little before its picture."""
    ffmpeg(*PICTURE, *SOUND, "-c:v", "mpeg2video", "-bf", "2", "-c:a", "ac3", tmp_path / "in.vob")
    again(tmp_path / "in.vob", tmp_path / "out.mkv")
    before, after = look(tmp_path / "in.vob")["times"], look(tmp_path / "out.mkv")["times"]
    apart = before["audio"][0][0] - before["video"][0][0]
    assert abs(after["audio"][0][0] - after["video"][0][0] - apart) <= Fraction(2, 1000)


def test_a_transport_stream_that_starts_again_goes_on(tmp_path):
    ffmpeg(*PICTURE, *SOUND, *CODED, "-c:a", "mp2", tmp_path / "once.ts")
    (tmp_path / "twice.ts").write_bytes(2 * (tmp_path / "once.ts").read_bytes())
    again(tmp_path / "twice.ts", tmp_path / "out.mkv")
    times = look(tmp_path / "out.mkv")["times"]
    assert close(times["video"][0], [times["video"][0][0] + Fraction(n, 25) for n in range(24)])
    assert len(times["audio"][0]) == 2 * len(look(tmp_path / "once.ts")["times"]["audio"][0])
    assert abs(times["audio"][0][-1] - times["video"][0][-1]) < Fraction(1, 25)


def test_a_second_video_in_an_unknown_codec_is_no_obstacle(tmp_path):
    source = tmp_path / "in.mp4"
    ffmpeg(*PICTURE, *PICTURE, "-map", 0, "-map", 1, *CODED, source)
    whole = source.read_bytes()
    first, last = whole.find(b"avc1", whole.find(b"trak")), whole.rfind(b"avc1")
    source.write_bytes(whole[:last] + b"zzzz" + whole[last + 4 :])
    assert again(source, tmp_path / "out.mkv").lost == ["video 1: only the first video of a file is restored"]
    source.write_bytes(whole[:first] + b"zzzz" + whole[first + 4 :])
    with pytest.raises(MediaError, match="holds video in a codec that ffmpeg does not know"):
        video.open_video(source)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_part_has_the_chapters_it_shows_and_begins_at_once(suffix, tmp_path):
    chapters = "".join(
        f"[CHAPTER]\nTIMEBASE=1/1000\nSTART={start}\nEND={end}\ntitle={start}\n"
        for start, end in ((0, 200), (200, 400), (400, 480))
    )
    (tmp_path / "meta.txt").write_text(f";FFMETADATA1\n{chapters}")
    source, target = tmp_path / f"in{suffix}", tmp_path / "out.mkv"
    ffmpeg(*PICTURE, *SOUND, "-i", tmp_path / "meta.txt", "-map", 0, "-map", 1, "-map_chapters", 2, *CODED, source)
    again(source, target, start=0.2, end=0.4)
    seen = look(target)
    assert [title for title, *_ in seen["chapters"]] == ["200"]
    assert seen["times"]["video"][0] == [Fraction(n, 25) for n in range(5)] and abs(seconds(target) - 0.2) < 0.04
    again(source, target)
    assert [title for title, *_ in look(target)["chapters"]] == ["0", "200", "400"]


@pytest.mark.parametrize(("size", "cut"), [("33x25", "33x25 is cut to 32x24"), ("32x24", "")])
def test_an_edge_that_is_cut_is_said(size, cut, tmp_path):
    scaled = f"scale={size.replace('x', ':')}"
    ffmpeg(*PICTURE, "-vf", scaled, "-c:v", "ffv1", "-pix_fmt", "yuv420p", tmp_path / "in.mkv")
    opened = video.open_video(tmp_path / "in.mkv")
    assert [cut in line for line in opened.lost] == [True] * bool(cut)


def test_an_encoder_that_does_not_fit_is_found_before_frames_are_written(tmp_path):
    ffmpeg(*PICTURE, *CODED, tmp_path / "in.mkv")
    opened = video.open_video(tmp_path / "in.mkv")
    clip, span = video.ten_bit(opened.clip), range(len(opened.clip))
    for target, encoder in (("out.webm", ["-c:v", "libx264"]), ("out.mp4", ["-c:v", "huffyuv"])):
        with pytest.raises(MediaError, match="ffmpeg could not write"):
            video.Writer(clip, opened, span, tmp_path / target, encoder).check()
    assert [path.name for path in tmp_path.iterdir()] == ["in.mkv"]


@pytest.mark.parametrize("frames", [12, 300], ids=["finishing", "writing"])
def test_stopping_is_noticed_once_and_leaves_no_process_and_no_part(frames, tmp_path):
    """The filter makes the encoder take hours for what it has been given: a few frames wait in it, many in the pipe."""
    ffmpeg(*PICTURE, "-vf", "scale=160:120", *CODED, tmp_path / "in.mkv")
    opened = video.open_video(tmp_path / "in.mkv")
    clip = video.ten_bit(opened.clip)
    slow = ["-c:v", "ffv1", "-vf", "realtime=limit=1000:speed=0.0001"]
    writer = video.Writer(clip, opened, range(len(clip)), tmp_path / "out.mkv", slow)
    stops = []

    def stop(*_):
        stops.append(1)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(KeyboardInterrupt), writer:
            signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
            for n in range(frames):
                writer.write(n % 12, clip.get_frame(n % 12))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(stops) == 1
    running = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            running.append(process.read_bytes())
    assert running and not any(bytes(writer.part) in line for line in running)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mkv"]


@pytest.mark.parametrize("page", ["docs/getting-started.md", "scripts/restore.vpy"])
def test_the_pipe_that_is_shown_tags_what_y4m_does_not(page, tmp_path):
    shown = re.search(r"-vf (setparams=\S+)", (Path(__file__).parents[1] / page).read_text())[1]
    ffmpeg(*PICTURE, "-pix_fmt", "yuv420p", tmp_path / "pipe.y4m")
    ffmpeg("-i", tmp_path / "pipe.y4m", "-vf", shown, tmp_path / "new.mkv")
    seen = look(tmp_path / "new.mkv")
    assert (seen["colour"][0], seen["shape"]) == (6, Fraction(4, 3))
