"""Video files ↔ clips: opening with BestSource, writing through ffmpeg with everything but the picture carried over.

Frames go to ffmpeg as raw video in a NUT stream, which has timestamps, so a variable frame rate survives. ffmpeg reads
the input file a second time for sound, subtitles, chapters, attachments and tags. No shell is involved.
"""

import contextlib
import io
import itertools
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.format
import imageio_ffmpeg
import numpy as np
import vapoursynth as vs
from av.video.format import VideoFormat

from vsuav.containers import Carried, carried_over, tag_of
from vsuav.parts import MediaError, check_name, new_part

UNSPECIFIED = 2
DEFAULT_ENCODER = ("-c:v", "libx265", "-crf", "14", "-preset", "medium", "-x265-params", "log-level=error")
"""Visually lossless, 10 bit (the pixel format is chosen with the clip)."""
CHROMA_LOCATIONS = ("left", "center", "topleft", "top", "bottomleft", "bottom")
FINER_CHROMA = {(0, 1): (0, 0), (2, 0): (1, 0), (2, 2): (1, 1)}
"""Subsampling (4:4:0, 4:1:1, 4:1:0) that NUT or encoders do not know with 10 bits -> what holds it."""
SLIVER = Fraction(1, 1250)
"""Seconds: no chapter of which a part shows less, because it ends where the part begins or begins where it ends."""
FILTERS, PACKET_FILTERS = ("-vf", "-filter:v", "-filter:v:0"), ("-bsf:v", "-bsf:v:0")
"""ffmpeg's names for options of which the last one given counts alone."""


@dataclass(frozen=True)
class Video:
    """An opened video file.

    `ticks` are the frames' presentation times in units of `time_base` seconds, `begins` is the time in seconds at which
    the file's earliest stream begins (players call it 0). `pixel_shape` is width / height of a pixel, `last` for how
    many seconds the last frame is shown, `lost` says what of the picture the clip does not have.
    """

    path: Path
    clip: vs.VideoNode
    ticks: Sequence[int]
    time_base: Fraction
    begins: Fraction
    pixel_shape: Fraction = Fraction(1)
    last: Fraction = Fraction(1, 25)
    lost: Sequence[str] = ()

    def time(self, n: int) -> Fraction:
        """Seconds from the beginning of the file to frame n."""
        return self.ticks[n] * self.time_base - self.begins

    def duration(self, n: int) -> Fraction:
        """Seconds for which frame n is shown."""
        return self.time(n + 1) - self.time(n) if n + 1 < len(self.ticks) else self.last

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
        raise MediaError(f"{path} is no file" if path.exists() else f"no such file: {path}")
    check_name(path)
    if not hasattr(vs.core, "bs"):
        raise MediaError('BestSource is not installed: pip install "vsuav[cli]"')
    try:
        with av.open(str(path)) as container:
            begins = Fraction(container.start_time or 0, av.time_base)
            stream = next(iter(container.streams.video), None)
            if stream is None:
                raise MediaError(f"{path} holds no video")
            if stream.codec_context is None:
                raise MediaError(f"{path} holds video in a codec that ffmpeg does not know")
            width, height, shape = stream.width, stream.height, stream.sample_aspect_ratio
            start = begins if stream.start_time is None else stream.start_time * stream.time_base
            last = _shown_last(container, stream)
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path} is no file ffmpeg can read ({getattr(error, 'strerror', None) or error})") from None
    try:
        clip, ticks = _decoded(path)
        props = clip.get_frame(0).props
    except vs.Error as error:
        raise MediaError(f"{path}: {' '.join(str(error).split())}") from None
    if clip.format.color_family == vs.YUV and props.get("_Matrix", UNSPECIFIED) == UNSPECIFIED:
        hd = width >= 1280 or height > 576
        clip = clip.std.SetFrameProps(_Matrix=vs.MATRIX_BT709 if hd else vs.MATRIX_ST170_M)
    shape = shape or Fraction(int(props.get("_SARNum", 1)) or 1, int(props.get("_SARDen", 1)) or 1)
    if (width - height) * (clip.width - clip.height) < 0:  # the picture was turned, but its pixels' shape was not
        width, height, shape = height, width, 1 / shape
    clip = clip.std.SetFrameProps(_SARNum=shape.numerator, _SARDen=shape.denominator)
    cut = 0 < width - clip.width < 4 or 0 < height - clip.height < 4
    lost = [f"the edge of the picture: {width}x{height} is cut to {clip.width}x{clip.height}"] if cut else []
    rate, base, millisecond = Fraction(clip.fps) or Fraction(25), Fraction(1, 100_000), Fraction(1, 1000)
    last = last if last and last > 0 else 1 / rate
    if ticks is None:
        begins, base, ticks, last = begins - start, 1 / rate, range(len(clip)), 1 / rate
    elif all(abs((tick - ticks[0]) * base - n / rate) <= millisecond for n, tick in enumerate(ticks)):
        # constant, but for the rounding of the container: count frames, and let `begins` carry the offset
        begins, base, ticks = begins - ticks[0] * base, 1 / rate, range(len(ticks))
        last = last if last > 1 / rate + millisecond else 1 / rate
    return Video(path, clip, ticks, base, begins, shape, last, lost)


def _shown_last(container: av.container.InputContainer, stream: av.VideoStream) -> Fraction | None:
    """Seconds for which a file says that its last frame is shown."""
    with contextlib.suppress(av.FFmpegError, StopIteration):
        first = next(container.demux(stream))
        with contextlib.suppress(av.FFmpegError):  # else all packets are read
            container.seek(2**62, stream=stream)
        packets = [packet for packet in container.demux(stream) if packet.pts is not None and packet.duration]
        if packets:
            shown = max(packets, key=lambda packet: packet.pts)
            if "mp4" not in container.format.name:
                return shown.duration * stream.time_base
            end = max(packet.dts + packet.duration for packet in packets)  # MP4 tells how long frames are decoded
            return (end + first.pts - first.dts - shown.pts) * stream.time_base
    return None


def _decoded(path: Path) -> tuple[vs.VideoNode, list[int] | None]:
    """The clip of a file and its frames' times in units of 0.01 ms, None where the file does not say them."""
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times"
        try:
            clip = vs.core.bs.VideoSource(str(path), timecodes=str(times), apply_rotation=True)
        except vs.Error as error:
            if "unknown timestamp" not in str(error):
                raise
            return vs.core.bs.VideoSource(str(path), apply_rotation=True), None
        ticks = [round(float(line) * 100) for line in times.read_text().splitlines() if not line.startswith("#")]
        return clip, _rising(ticks)


def _rising(ticks: Sequence[int]) -> list[int]:
    """`ticks`; where they do not rise, for a transport stream starts again, they go on in step with those before."""
    risen, moved, step = [], 0, 1
    for tick in ticks:
        if risen and tick + moved <= risen[-1]:
            moved = risen[-1] + step - tick
        step = tick + moved - risen[-1] if risen else step
        risen.append(tick + moved)
    return risen


def deepened(clip: vs.VideoNode) -> vs.VideoNode:
    """YUV of less than 10 bits as YUV of 10 bits, everything else as it is: the restored clip has its input's depth."""
    shallow = clip.format.color_family == vs.YUV and clip.format.bits_per_sample < 10
    return ten_bit(clip) if shallow else clip


def ten_bit(clip: vs.VideoNode) -> vs.VideoNode:
    """`clip` as YUV with 10 bits a sample, exactly (8-bit values are multiplied by 4), and its own subsampling where
    that is 4:2:0, 4:2:2 or 4:4:4, else the next finer one of these."""
    form = clip.format
    if form.color_family == vs.RGB:
        return clip.resize.Bicubic(format=vs.YUV444P10, matrix=vs.MATRIX_BT709, range=vs.RANGE_LIMITED)
    if form.color_family == vs.GRAY:
        return clip.resize.Bicubic(format=vs.YUV420P10, matrix=vs.MATRIX_BT709)
    own = form.subsampling_w, form.subsampling_h
    wanted = vs.core.query_video_format(vs.YUV, vs.INTEGER, 10, *FINER_CHROMA.get(own, own))
    return clip if form.id == wanted.id else clip.resize.Bicubic(format=wanted.id)


def pixel_format(clip: vs.VideoNode) -> str:
    """ffmpeg's name of the clip's format (4:2:0, 4:2:2 or 4:4:4 with 8 to 16 bits)."""
    form = clip.format
    chroma = {(1, 1): "420", (1, 0): "422", (0, 0): "444"}
    name = f"yuv{chroma[form.subsampling_w, form.subsampling_h]}p"
    return name if form.bits_per_sample == 8 else f"{name}{form.bits_per_sample}le"


def colour_filter(props: Mapping[str, Any], shape: Fraction) -> str:
    """A filter that tags frames with the colour properties of `props`, and with pixels of this `shape` (w / h)."""
    tags = {"colorspace": "_Matrix", "color_primaries": "_Primaries", "color_trc": "_Transfer"}
    known = [f"{name}={int(props[key])}" for name, key in tags.items() if props.get(key, UNSPECIFIED) != UNSPECIFIED]
    full = props["_Range"] == vs.RANGE_FULL if "_Range" in props else props.get("_ColorRange", 1) == 0
    known.append(f"range={'pc' if full else 'tv'}")
    if (place := props.get("_ChromaLocation")) is not None:
        known.append(f"chroma_location={CHROMA_LOCATIONS[place]}")
    return f"setparams={':'.join(known)},setsar={shape.numerator}/{shape.denominator}"


def everything_else(path: Path, suffix: str) -> tuple[list[str], Carried]:
    """The file as ffmpeg's second input, counted from its earliest stream, and what is carried over from it."""
    with av.open(str(path)) as container:
        carried = carried_over(container.streams, suffix)
        late = Fraction(0)
        if carried.start is not None and container.format.flags & av.format.Flags.ts_discont.value:
            # of a transport stream, ffmpeg counts from the earliest stream that is used
            late = carried.start - Fraction(container.start_time or 0, av.time_base)
    return ["-itsoffset", _seconds(late), "-i", str(path)], carried


class Writer:
    """Writes a clip's frames, with everything else of `video`, into a file that appears when it is complete.

    A context manager: leaving it without an exception finishes the file, with one removes what there is of it. The
    first frame gives the colour tags. `part` is the file being written, `lost` says what is left out.

    Args:
        clip: what will be written, YUV as `ten_bit` makes it.
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
        self._video, self._span, self._target, self._encoder = video, span, target, encoder
        self._size = clip.width, clip.height, pixel_format(clip)
        self._rate = Fraction(clip.fps) or Fraction(25)
        stretched = Fraction(clip.height, clip.width) / Fraction(video.clip.height, video.clip.width)
        self._shape = shape or video.pixel_shape * stretched
        self._input, carried = everything_else(video.path, target.suffix.lower())
        self._options, self.lost = carried.options, carried.lost
        self._complaints: list[str] = []
        self._process: subprocess.Popen | None = None

    def check(self) -> None:
        """Write the beginning of the file, with a frame of zeros, and remove it. Raises MediaError if that fails."""
        file = io.BytesIO()
        nut = _Nut(file, self._size, self._rate, self._video.time_base)
        planes = VideoFormat(self._size[2], *self._size[:2]).components
        nut.write(bytes(sum(plane.width * plane.height * -(-plane.bits // 8) for plane in planes)), 0)
        nut.close()
        part = self._new_part()
        try:
            *command, name = self._command(part, {}, [])
            done = subprocess.run([*command, "-fs", "1", name], input=file.getvalue(), capture_output=True)
        finally:
            part.unlink(missing_ok=True)
        if done.returncode:
            self._complaints = done.stderr.decode(errors="replace").splitlines()
            raise MediaError(self._said())

    def __enter__(self) -> "Writer":
        self.part = self._new_part()
        return self

    def write(self, index: int, frame: vs.VideoFrame) -> None:
        """Write the frame number `index` of the span. Raises MediaError when ffmpeg has stopped."""
        if self._process is None:
            self._start(frame.props)
        planes = [np.ascontiguousarray(np.asarray(plane)).reshape(-1).view(np.uint8) for plane in frame]
        ticks, first = self._video.ticks, self._span.start
        try:
            self._nut.write(np.concatenate(planes).tobytes(), ticks[first + index] - ticks[first])
        except (av.FFmpegError, OSError):
            raise self._failure() from None

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._end()

    def _finish(self) -> None:
        with contextlib.suppress(av.FFmpegError, OSError):
            self._nut.close()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if self._process.wait():
            raise self._failure()
        os.replace(self.part, self._target)

    def _end(self) -> None:
        """Leave no process and no part behind."""
        try:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
                self._reader.join(5)
                self._process.stderr.close()
        finally:
            self.part.unlink(missing_ok=True)

    def _start(self, props: Mapping[str, Any]) -> None:
        self._process = subprocess.Popen(
            self._command(self.part, props, self._cut()), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, start_new_session=True,  # Ctrl-C is for us to handle
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read_complaints, daemon=True)
        self._reader.start()
        self._nut = _Nut(self._process.stdin, self._size, self._rate, self._video.time_base)

    def _command(self, part: Path, props: Mapping[str, Any], cut: Sequence[str]) -> list[str]:
        base = _fine(self._video.time_base)
        encoder = _joined(FILTERS, colour_filter(props, self._shape), self._encoder)
        if (last := self._video.duration(self._span[-1])) != 1 / self._rate:
            encoder = _joined(PACKET_FILTERS, self._ending(last, bool(cut)), encoder)
        return [
            imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-loglevel", "error", "-y",
            "-itsoffset", _seconds(self._video.time(self._span.start)), "-f", "nut", "-i", "pipe:0", *self._input,
            *(["-itsoffset", _seconds(-SLIVER), "-i", str(self._video.path)] if cut else []),
            "-map", "0:v:0", *self._options, *(["-map_chapters", "2"] if cut else []), "-fps_mode", "passthrough",
            "-enc_time_base", f"{base.numerator}/{base.denominator}", "-pix_fmt", self._size[2],
            *tag_of(encoder, self._target.suffix.lower()), *encoder, *cut, str(part),
        ]  # fmt: skip

    def _cut(self) -> list[str]:
        """ffmpeg's options that leave out what lies before and after the span, a sliver less than that at its end."""
        if len(self._span) == len(self._video.ticks):
            return []
        shown = self._video.duration(self._span[-1])
        end = self._video.time(self._span[-1]) + max(shown - 2 * SLIVER, shown / 2)
        return ["-ss", _seconds(self._video.time(self._span.start)), "-to", _seconds(end)]

    def _ending(self, last: Fraction, cut: bool) -> str:
        """A packet filter that has the last frame shown for `last` seconds.

        Matroska takes that from the frame shown last, MP4 from the frame decoded last.
        """
        time, span = self._video.time, self._span
        begin = time(span.start) if cut else 0
        shown = time(span[-1]) - begin
        after = shown - self._video.duration(span[-2]) / 2 if len(span) > 1 else Fraction(-1)
        end = f"{_seconds(shown + last)}/TB"
        decoded = f"if(eq(N,{len(span) - 1}),{end}-STARTPTS+STARTDTS-DTS,DURATION)"
        return f"setts=pts=PTS:dts=DTS:duration='if(gte(PTS*TB,{_seconds(after)}),{end}-PTS,{decoded})'"

    def _new_part(self) -> Path:
        try:
            return new_part(self._target)
        except OSError as error:
            raise MediaError(f"{self._target.parent} cannot be written: {error.strerror}") from None

    def _read_complaints(self) -> None:
        for line in self._process.stderr:
            self._complaints = [*self._complaints, line.decode(errors="replace").strip()][-20:]

    def _failure(self) -> MediaError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._reader.join(5)
        return MediaError(self._said())

    def _said(self) -> str:
        ended = self._process.returncode if self._process is not None else None
        unsaid = f"signal {-ended} ended it" if ended is not None and ended < 0 else "it stopped without a word"
        said = "; ".join(line for line in self._complaints if line) or unsaid
        return f"ffmpeg could not write {self._target}: {said[:500]}"


class _Nut:
    """Raw video with timestamps, into a file that cannot seek.

    PyAV writes into memory: a Ctrl-C that comes while PyAV waits for a pipe would be lost.
    """

    def __init__(self, file, size: tuple[int, int, str], rate: Fraction, time_base: Fraction):
        self._file, self._written = file, io.BytesIO()
        self._container = av.open(_Forwards(self._written), "w", format="nut")
        self._stream = self._container.add_stream("rawvideo", rate=rate)
        self._stream.width, self._stream.height, self._stream.pix_fmt = size
        self._stream.time_base = self._stream.codec_context.time_base = self._time_base = time_base

    def write(self, frame: bytes, tick: int) -> None:
        packet = av.Packet(frame)
        packet.stream, packet.time_base = self._stream, self._time_base
        packet.pts = packet.dts = tick
        packet.is_keyframe = True
        self._container.mux(packet)
        self._pass_on()

    def close(self) -> None:
        self._container.close()
        self._pass_on()

    def _pass_on(self) -> None:
        with self._written.getbuffer() as written:
            self._file.write(written)
        self._written.seek(0)
        self._written.truncate()


class _Forwards:
    """A file that is written from the beginning to the end."""

    def __init__(self, file):
        self.write = file.write

    def seekable(self) -> bool:
        return False


def _joined(names: Sequence[str], ours: str, options: Sequence[str]) -> list[str]:
    """`options` with what they say under one of `names` behind `ours`."""
    theirs = [value for name, value in itertools.pairwise(options) if name in names]
    others = [word for before, word in itertools.pairwise(["", *options]) if not {before, word} & {*names}]
    return [names[0], ",".join([ours, *theirs[-1:]]), *others]


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
