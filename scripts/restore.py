"""Restores a video file through restore.vpy: script -> VapourSynth -> upscale -> ffmpeg, sound kept.

    scripts/run                             the bundled sample clip, into out/
    scripts/run INPUT OUTPUT [name=value …] any video; names are those of `upscale` (prompt="…" noise_level=60 …)

Progress goes to stderr; at the end stdout gets two lines, the paths of the restored video and of a side-by-side PNG.
"""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import vapoursynth as vs
from PIL import Image

from vsuav.containers import SOUND_OF
from vsuav.parts import MediaError, check_target, complete
from vsuav.video import Video, colour_filter, everything_else, open_video

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "restore.vpy"
SAMPLE = HERE / "sample" / "city.mp4"
LARGEST = (960, 720)
"""The picture shows at most this much of a frame (width, height), from its middle."""


class Failed(Exception):
    """Something the user can mend; the message is one line."""


class Progress:
    """A bar on stderr: redrawn in place on a terminal, a line every tenth of the way elsewhere."""

    def __init__(self):
        self.start = time.monotonic()
        self.first: tuple[int, float] | None = None
        self.tenth = -1

    def show(self, done: int, total: int) -> None:
        if done and self.first is None:
            self.first = done, time.monotonic()  # rates leave out what came before: loading, the first windows
        frames, since = (done - self.first[0], time.monotonic() - self.first[1]) if self.first else (0, 0.0)
        pace = ""
        if frames and since:
            pace = f", {frames / since:.2f} a second, {(total - done) * since / frames:.0f} s left"
        if done == total:
            pace = f" in {time.monotonic() - self.start:.0f} s"
        bar = "#" * (30 * done // total)
        line = f"  [{bar:<30}] {done}/{total} frames{pace}"
        if sys.stderr.isatty():
            print(f"\r{line:<90}", end="", file=sys.stderr, flush=True)
            if done == total and self.tenth < 10:
                print(file=sys.stderr)
                self.tenth = 10
        elif 10 * done // total > self.tenth:
            self.tenth = 10 * done // total
            print(line, file=sys.stderr, flush=True)


def follow(messages, progress: Progress) -> list[str]:
    """Read vspipe's stderr to its end: frame counts become the bar, everything else is passed on and returned."""
    said, pending = [], b""
    while chunk := os.read(messages.fileno(), 4096):
        *lines, pending = re.split(rb"[\r\n]+", pending + chunk)
        if re.fullmatch(rb"Frame: \d+/\d+( \(.*\))?", pending):  # vspipe ends a count when it writes the next one
            lines, pending = [*lines, pending], b""
        for line in (line.decode(errors="replace") for line in lines if line):
            if count := re.match(r"Frame: (\d+)/(\d+)", line):
                progress.show(int(count[1]), int(count[2]))
            elif count := re.match(r"Output (\d+) frames", line):
                progress.show(int(count[1]), int(count[1]))
            elif news := re.match(r"Information: upscale: (frames \d+ .*)", line):
                if progress.first is None:  # the first frames take long; later the bar says enough
                    print(f"  {news[1]}", file=sys.stderr, flush=True)
            elif not re.match(r"Script evaluation done|Information: VideoSource track", line):
                said.append(line)
                print(f"  {line}", file=sys.stderr, flush=True)
    return said


def environment() -> dict[str, str]:
    """The environment for vspipe: it finds this Python by the PATH, and its plugins by this Python."""
    return os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


def vspipe() -> list[str]:
    """The command that evaluates a script: vspipe, or our stand-in where vspipe finds no shared libpython to load."""
    command = str(Path(sys.executable).with_name("vspipe"))
    try:
        if subprocess.run([command, "--version"], env=environment(), capture_output=True).returncode == 0:
            return [command, "-p", "-c", "y4m"]
    except OSError:
        pass
    return [sys.executable, str(HERE / "pipe.py")]


def carried_over(video: Video, target: Path) -> list[str]:
    """`video` as ffmpeg's second input, and options that carry its sound, subtitles, chapters and colour tags over."""
    if any(tick != n for n, tick in enumerate(video.ticks)):
        raise Failed(f"{video.path} has a variable frame rate, which y4m has no place for; use .venv/bin/vsuav restore")
    props = dict(video.clip.get_frame(0).props)
    if video.clip.format.color_family != vs.YUV:
        props |= {"_Matrix": vs.MATRIX_BT709, "_Range": vs.RANGE_LIMITED}  # restore.vpy turns it into this
    given, carried = everything_else(video.path, target.suffix.lower())
    for line in (*video.lost, *carried.lost):
        print(f"  left out: {line}", file=sys.stderr)
    return [*given, "-map", "0:v:0", *carried.options, "-vf", colour_filter(props, video.pixel_shape)]


def restore(source: Path, target: Path, settings: list[str], script: Path = SCRIPT) -> None:
    """Run `script` on `source` and encode what comes out into `target`, which appears only when it is complete."""
    arguments = [word for pair in [f"input={source}", *settings] for word in ("-a", pair)]
    video = open_video(source)
    encode = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", "-itsoffset", f"{float(video.time(0)):.6f}",
        "-f", "yuv4mpegpipe", "-i", "-", *carried_over(video, target), "-c:v", "libx264", "-crf", "16",
        "-preset", "medium",
    ]  # fmt: skip
    evaluate = [*vspipe(), *arguments, str(script), "-"]
    with complete(target) as part:
        encoded(evaluate, [*encode, str(part)], source, target)


def encoded(evaluate: list[str], encode: list[str], source: Path, target: Path) -> None:
    """Run the two commands, the first piped into the second."""
    pipe = subprocess.Popen(evaluate, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    ffmpeg = subprocess.Popen(encode, stdin=pipe.stdout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    pipe.stdout.close()  # ffmpeg holds it now
    try:
        complaints = []
        reader = threading.Thread(target=lambda: complaints.append(ffmpeg.stderr.read().decode(errors="replace")))
        reader.start()
        said = follow(pipe.stderr, Progress())
        failed_script, failed_encode = pipe.wait(), ffmpeg.wait()
        reader.join()
        if failed_encode and complaints[0].strip() and not said:
            raise Failed(f"ffmpeg could not write {target}: {complaints[0].strip().splitlines()[-1]}")
        if failed_script or failed_encode:
            raise Failed(f"{source} was not restored, see above")
    finally:
        for process in (pipe, ffmpeg):
            process.kill()
            process.wait()


def rgb(clip: vs.VideoNode, n: int, width: int, height: int) -> np.ndarray:
    """Frame n at this size (bicubic) as "h w c", 8 bits."""
    frame = vs.core.resize.Bicubic(clip, width, height, format=vs.RGB24).get_frame(n)
    return np.dstack([np.asarray(frame[plane]) for plane in range(3)])


def side_by_side(source: Path, restored: Path, picture: Path) -> None:
    """Write the middle frame of both: the input enlarged by bicubic on the left, the restored one on the right."""
    before, after = open_video(source).clip, open_video(restored).clip
    n = min(before.num_frames, after.num_frames) // 2
    width, height = min(after.width, LARGEST[0]), min(after.height, LARGEST[1])
    left, top = (after.width - width) // 2, (after.height - height) // 2
    halves = [rgb(clip, n, after.width, after.height) for clip in (before, after)]
    halves = [half[top : top + height, left : left + width] for half in halves]
    with complete(picture) as part:
        Image.fromarray(np.hstack(halves)).save(part)


def main(arguments: list[str]) -> int:
    try:
        if any(word in ("-h", "--help") for word in arguments):
            print(__doc__, file=sys.stderr)
            return 0
        files = [word for word in arguments if not re.match(r"[a-z_]+=", word)]
        settings = [word for word in arguments if word not in files]
        if len(files) not in (0, 2):
            raise Failed("scripts/run takes no file (the sample clip) or two, INPUT and OUTPUT; see scripts/run --help")
        source, target = (Path(file).resolve() for file in files or (SAMPLE, HERE.parent / "out" / "city-4x.mp4"))
        if not source.is_file():
            raise Failed(f"no such file: {source}")
        picture = target.with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        check_target(target, {"INPUT": source}, SOUND_OF, overwrite=True)
        check_target(picture, {"INPUT": source}, (".png",), overwrite=True)
        print(f"restoring {source} (the first frames take longest)", file=sys.stderr, flush=True)
        restore(source, target, settings)
        side_by_side(source, target, picture)
    except (Failed, MediaError, vs.Error) as error:
        print(f"vsuav: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nvsuav: stopped", file=sys.stderr)
        return 130
    print(f"restored video:                  {target}")
    print(f"input by bicubic | restored:     {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
