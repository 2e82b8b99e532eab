"""Video files ↔ clips: opening with BestSource, writing through ffmpeg with everything but the picture carried over.

Frames go to ffmpeg as raw video in a NUT stream, which has timestamps, so a variable frame rate survives. ffmpeg reads
the input file a second time for sound, subtitles, chapters, attachments and tags. No shell is involved.
"""

import contextlib
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import vapoursynth as vs

UNSPECIFIED = 2
DEFAULT_ENCODER = ("-c:v", "libx265", "-crf", "14", "-preset", "medium", "-x265-params", "log-level=error")
"""Visually lossless, 10 bit (the pixel format is chosen with the clip)."""
SOUND_OF = {
    ".mp4": {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac", "mp2"},
    ".mov": {"aac", "mp3", "ac3", "eac3", "alac", "pcm_s16le", "pcm_s24le", "pcm_s16be", "pcm_s24be"},
    ".webm": {"opus", "vorbis"},
}
"""Container -> codecs it takes as they are (Matroska takes all). Other sound is encoded again."""
ATTACHED = av.stream.Disposition.attached_pic
TEXT_SUBTITLES = {"subrip", "srt", "ass", "ssa", "webvtt", "mov_text", "text"}
SUBTITLES_OF = {".mkv": "subrip", ".mp4": "mov_text", ".mov": "mov_text", ".webm": "webvtt"}
"""Container -> what text subtitles become that it does not take as they are."""
CHROMA_LOCATIONS = ("left", "center", "topleft", "top", "bottomleft", "bottom")


class MediaError(ValueError):
    """A video file that cannot be read or written; one line that says what would work."""


@dataclass(frozen=True)
class Video:
    """An opened video file.

    `ticks` are the frames' presentation times in units of `time_base` seconds, `begins` is the time in seconds at which
    the file's earliest stream begins (players call it 0).
    """

    path: Path
    clip: vs.VideoNode
    ticks: Sequence[int]
    time_base: Fraction
    begins: Fraction

    def time(self, n: int) -> Fraction:
        """Seconds from the beginning of the file to frame n."""
        return self.ticks[n] * self.time_base - self.begins

    @property
    def pixel_shape(self) -> Fraction:
        """Width / height of a pixel."""
        props = self.clip.get_frame(0).props
        return Fraction(int(props.get("_SARNum", 1)) or 1, int(props.get("_SARDen", 1)) or 1)

    def between(self, start: float | None, end: float | None) -> range:
        """The frames shown from `start` until before `end`, in seconds from the beginning of the file."""
        slack = Fraction(1, 2000)  # Matroska rounds to milliseconds
        inside = [
            n for n in range(len(self.ticks))
            if (start is None or self.time(n) >= Fraction(start) - slack)
            and (end is None or self.time(n) < Fraction(end) - slack)
        ]  # fmt: skip
        if not inside:
            length = float(self.time(len(self.ticks) - 1))
            raise MediaError(f"no frame of {self.path} lies between these times; its last one is at {length:.3f} s")
        return range(inside[0], inside[-1] + 1)


def open_video(path: Path) -> Video:
    """Open a file. Unspecified matrices are set by the players' rule of thumb: BT.709 for HD, BT.601 below.

    Raises:
        MediaError: no such file, no video in it, or BestSource is missing.
    """
    if not path.is_file():
        raise MediaError(f"no such file: {path}")
    if not hasattr(vs.core, "bs"):
        raise MediaError('BestSource is not installed: pip install "vsuav[cli]"')
    try:
        with av.open(str(path)) as container:
            begins = Fraction(container.start_time or 0, av.time_base)
            coded = [(stream.width, stream.height) for stream in container.streams.video]
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path} is no file ffmpeg can read ({getattr(error, 'strerror', None) or error})") from None
    if not coded:
        raise MediaError(f"{path} holds no video")
    try:
        with tempfile.TemporaryDirectory() as folder:
            times = Path(folder) / "times"
            clip = vs.core.bs.VideoSource(str(path), timecodes=str(times), apply_rotation=True)
            ticks = [round(float(line) * 100) for line in times.read_text().splitlines() if not line.startswith("#")]
    except vs.Error as error:
        raise MediaError(f"{path}: {' '.join(str(error).split())}") from None
    if clip.format.color_family == vs.YUV and clip.get_frame(0).props.get("_Matrix", UNSPECIFIED) == UNSPECIFIED:
        clip = clip.std.SetFrameProps(_Matrix=vs.MATRIX_BT709 if clip.height > 576 else vs.MATRIX_ST170_M)
    if coded[0] == (clip.height, clip.width) != (clip.width, clip.height):  # turned, but its pixels' shape was not
        props = clip.get_frame(0).props
        clip = clip.std.SetFrameProps(_SARNum=props.get("_SARDen", 1), _SARDen=props.get("_SARNum", 1))
    base, rate, millisecond = Fraction(1, 100_000), Fraction(clip.fps), Fraction(1, 1000)
    if rate and all(abs((tick - ticks[0]) * base - n / rate) <= millisecond for n, tick in enumerate(ticks)):
        # constant, but for the rounding of the container: count frames, and let `begins` carry the offset
        begins, base, ticks = begins - ticks[0] * base, 1 / rate, list(range(len(ticks)))
    return Video(path, clip, ticks, base, begins)


def deepened(clip: vs.VideoNode) -> vs.VideoNode:
    """YUV of less than 10 bits as YUV of 10 bits, everything else as it is: the restored clip has its input's depth."""
    shallow = clip.format.color_family == vs.YUV and clip.format.bits_per_sample < 10
    return ten_bit(clip) if shallow else clip


def ten_bit(clip: vs.VideoNode) -> vs.VideoNode:
    """`clip` as YUV with 10 bits a sample and its own subsampling, exactly (8-bit values are multiplied by 4)."""
    form = clip.format
    if form.color_family == vs.RGB:
        return clip.resize.Bicubic(format=vs.YUV444P10, matrix=vs.MATRIX_BT709, range=vs.RANGE_LIMITED)
    if form.color_family == vs.GRAY:
        return clip.resize.Bicubic(format=vs.YUV420P10, matrix=vs.MATRIX_BT709)
    wanted = vs.core.query_video_format(vs.YUV, vs.INTEGER, 10, form.subsampling_w, form.subsampling_h)
    return clip if form.id == wanted.id else clip.resize.Bicubic(format=wanted.id)


def pixel_format(clip: vs.VideoNode) -> str:
    """ffmpeg's name of the clip's format (YUV, 8 to 16 bits)."""
    form = clip.format
    chroma = {(1, 1): "420", (1, 0): "422", (0, 0): "444", (2, 0): "411", (0, 1): "440", (2, 2): "410"}
    name = f"yuv{chroma[form.subsampling_w, form.subsampling_h]}p"
    return name if form.bits_per_sample == 8 else f"{name}{form.bits_per_sample}le"


def colour_filter(props: vs.FrameProps, shape: Fraction) -> str:
    """A filter that tags frames with the colour properties of `props`, and with pixels of this `shape` (w / h)."""
    tags = {"colorspace": "_Matrix", "color_primaries": "_Primaries", "color_trc": "_Transfer"}
    known = [f"{name}={int(props[key])}" for name, key in tags.items() if props.get(key, UNSPECIFIED) != UNSPECIFIED]
    full = props["_Range"] == vs.RANGE_FULL if "_Range" in props else props.get("_ColorRange", 1) == 0
    known.append(f"range={'pc' if full else 'tv'}")
    if (place := props.get("_ChromaLocation")) is not None:
        known.append(f"chroma_location={CHROMA_LOCATIONS[place]}")
    return f"setparams={':'.join(known)},setsar={shape.numerator}/{shape.denominator}"


def disposition(stream: av.stream.Stream) -> str:
    """What a stream is marked as (default, forced, …), as ffmpeg's option of this name takes it."""
    return "+".join(mark.name for mark in av.stream.Disposition if mark & stream.disposition) or "0"


def carried_over(source: Path, suffix: str) -> tuple[list[str], list[str]]:
    """ffmpeg's options that carry all but the picture of `source` (its input 1) into a container, and what is lost."""
    options, lost = ["-map_metadata", "1", "-map_chapters", "1", "-c:a", "copy", "-c:s", "copy"], []
    counts = {"audio": 0, "subtitle": 0}
    with av.open(str(source)) as container:
        for stream in container.streams:
            context = stream.codec_context
            codec = context.name if context else "unknown"
            if stream.type == "audio":
                options += ["-map", f"1:{stream.index}"]
                options += [f"-disposition:a:{counts['audio']}", disposition(stream)]
                if codec not in SOUND_OF.get(suffix, {codec}):
                    again = "libopus" if suffix == ".webm" else "aac"
                    options += [f"-c:a:{counts['audio']}", again, f"-b:a:{counts['audio']}", "256k"]
                counts["audio"] += 1
            elif stream.type == "subtitle":
                target = SUBTITLES_OF.get(suffix)
                if codec not in TEXT_SUBTITLES and suffix != ".mkv":
                    lost.append(f"subtitles {stream.index} ({codec}): only .mkv takes subtitles that are pictures")
                    continue
                options += ["-map", f"1:{stream.index}", f"-disposition:s:{counts['subtitle']}", disposition(stream)]
                if codec in TEXT_SUBTITLES and (suffix != ".mkv" or codec == "mov_text") and target:
                    options += [f"-c:s:{counts['subtitle']}", target]
                counts["subtitle"] += 1
            elif stream.type == "attachment" and suffix == ".mkv":
                options += ["-map", f"1:{stream.index}", "-c:t", "copy"]
        video = container.streams.video[0]
        options += ["-disposition:v:0", disposition(video)]
        lost += [f"cover picture {s.index}" for s in container.streams.video if s.disposition & ATTACHED]
        for name in ("language", "title"):
            if name in video.metadata:
                options += ["-metadata:s:v:0", f"{name}={video.metadata[name]}"]
    return options, lost


class Writer:
    """Writes a clip's frames, with everything else of `video`, into a file that appears when it is complete.

    A context manager: leaving it without an exception finishes the file, with one removes what there is of it.

    Args:
        clip: what will be written, YUV; its first frame gives the colour tags.
        span: the frames of `video` that it is made of.
        target: file to write; its suffix names the container.
        encoder: ffmpeg's options for the video stream.
        shape: width / height of the clip's pixels, None: such that it is shown in the shape of `video`.
    """

    def __init__(
        self,
        clip: vs.VideoNode,
        video: Video,
        span: range,
        target: Path,
        encoder: Sequence[str] = DEFAULT_ENCODER,
        shape: Fraction | None = None,
    ):
        self._video, self._span, self._target = video, span, target
        self._part = target.with_name(f"{target.stem}.part{target.suffix}")
        self._first = video.ticks[span.start]
        self._complaints: list[str] = []
        self._size = clip.width, clip.height, pixel_format(clip)
        rate = Fraction(clip.fps) or 25
        props = video.clip.get_frame(span.start).props
        self.options, self.lost = carried_over(video.path, target.suffix.lower())
        stretched = Fraction(clip.height, clip.width) / Fraction(video.clip.height, video.clip.width)
        shape = shape or video.pixel_shape * stretched
        offset = video.time(span.start)
        cut = []
        if len(span) < len(video.ticks):
            end = video.time(span[-1]) + (1 / rate)
            if span.stop < len(video.ticks):
                end = video.time(span.stop)
            cut = ["-ss", _seconds(max(offset - Fraction(1, 2000), 0)), "-to", _seconds(end)]
        base = _fine(video.time_base)
        self.command = [
            imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-loglevel", "error", "-y",
            "-itsoffset", _seconds(offset), "-f", "nut", "-i", "pipe:0", "-i", str(video.path),
            "-map", "0:v:0", *self.options, "-vf", colour_filter(self._props(clip, props), shape),
            "-fps_mode", "passthrough", "-enc_time_base", f"{base.numerator}/{base.denominator}",
            "-pix_fmt", self._size[2], *encoder, *cut, str(self._part),
        ]  # fmt: skip
        self._rate = rate
        self._encoder = encoder

    def check(self) -> None:
        """Encode one grey frame of the clip's size into nothing. Raises MediaError if the encoder cannot do that."""
        width, height, form = self._size
        grey = f"color=gray:s={width}x{height}:r={self._rate.numerator}/{self._rate.denominator}"
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-loglevel", "error",
            "-f", "lavfi", "-i", grey, "-frames:v", "1", "-pix_fmt", form, *self._encoder, "-f", "null", "-",
        ]  # fmt: skip
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode:
            self._complaints = done.stderr.splitlines()
            raise MediaError(self._said())

    @staticmethod
    def _props(clip: vs.VideoNode, props: vs.FrameProps) -> dict:
        """Tags of the result without computing a frame of it: the source's, but RGB and GRAY became BT.709."""
        known = dict(props)
        if known.get("_Matrix", UNSPECIFIED) in (0, UNSPECIFIED):
            known |= {"_Matrix": 1, "_Range": vs.RANGE_LIMITED}
        return known

    def __enter__(self) -> "Writer":
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us to handle
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read_complaints, daemon=True)
        self._reader.start()
        self._nut = av.open(_Pipe(self._process.stdin), "w", format="nut")
        self._stream = self._nut.add_stream("rawvideo", rate=self._rate)
        self._stream.width, self._stream.height, self._stream.pix_fmt = self._size
        self._stream.time_base = self._stream.codec_context.time_base = self._video.time_base
        return self

    def write(self, index: int, frame: vs.VideoFrame) -> None:
        """Write the frame number `index` of the span. Raises MediaError when ffmpeg has stopped."""
        planes = [np.ascontiguousarray(np.asarray(plane)).reshape(-1).view(np.uint8) for plane in frame]
        packet = av.Packet(np.concatenate(planes).tobytes())
        packet.stream, packet.time_base = self._stream, self._video.time_base
        packet.pts = packet.dts = self._video.ticks[self._span[index]] - self._first
        packet.is_keyframe = True
        try:
            self._nut.mux(packet)
        except (av.FFmpegError, OSError):
            raise self._failure() from None

    def __exit__(self, kind, error, trace) -> None:
        with contextlib.suppress(av.FFmpegError, OSError):
            self._nut.close()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if kind is not None:
            self._process.terminate()
        code = self._process.wait()
        self._reader.join(5)
        try:
            if kind is None and code:
                raise self._failure()
            if kind is None:
                os.replace(self._part, self._target)
        finally:
            self._part.unlink(missing_ok=True)

    def _read_complaints(self) -> None:
        for line in self._process.stderr:
            self._complaints = [*self._complaints, line.decode(errors="replace").strip()][-20:]

    def _failure(self) -> MediaError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._reader.join(5)
        return MediaError(self._said())

    def _said(self) -> str:
        said = "; ".join(line for line in self._complaints if line) or "it stopped without a word"
        return f"ffmpeg could not write {self._target}: {said[:500]}"


class _Pipe:
    """A process's input as a file that cannot seek."""

    def __init__(self, pipe):
        self.write = pipe.write
        self.flush = pipe.flush

    def seekable(self) -> bool:
        return False


def _seconds(time: Fraction) -> str:
    return f"{float(time):.6f}"


def _fine(base: Fraction) -> Fraction:
    """A unit of at most 0.1 ms that `base` is a multiple of, so that a clip may begin between two of its frames."""
    return Fraction(1, base.denominator * -(-10000 // base.denominator))


def seconds(text: str) -> float:
    """Seconds of ``90``, ``1:30``, ``1:30.5`` or ``0:01:30``. Raises MediaError for anything else."""
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d*)?", text):
        raise MediaError(f"a time is written 90, 1:30.5 or 0:01:30, got {text!r}")
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + float(part)
    return total
