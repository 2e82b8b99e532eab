"""What a container takes of a file besides its picture: as it is, encoded again, or not at all.

Streams are those of a file that PyAV has opened; the answers are options for ffmpeg.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

TEXT = {"subrip", "ass", "webvtt", "mov_text", "text"}
"""Subtitles that are text."""
SUBTITLES_OF = {".mkv": "subrip", ".mp4": "mov_text", ".mov": "mov_text", ".webm": "webvtt"}
"""Container -> what text subtitles become that it does not take as they are."""
PICTURES = {"dvb_subtitle", "dvd_subtitle", "hdmv_pgs_subtitle"}
"""Subtitles that are pictures."""
SOUND_OF = {
    ".mkv": {
        "aac", "ac3", "adpcm_ima_wav", "adpcm_ms", "alac", "amr_nb", "amr_wb", "atrac3", "cook", "dts", "eac3", "flac",
        "mlp", "mp1", "mp2", "mp3", "opus", "pcm_alaw", "pcm_f32le", "pcm_f64le", "pcm_mulaw", "pcm_s16be",
        "pcm_s16le", "pcm_s24be", "pcm_s24le", "pcm_s32be", "pcm_s32le", "pcm_u8", "ra_144", "ra_288", "sipr",
        "truehd", "tta", "vorbis", "wavpack", "wmalossless", "wmapro", "wmav1", "wmav2",
    },
    ".mp4": {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac", "mp2"},
    ".mov": {"aac", "mp3", "ac3", "eac3", "alac", "pcm_s16le", "pcm_s24le", "pcm_s16be", "pcm_s24be"},
    ".webm": {"opus", "vorbis"},
}  # fmt: skip
"""Container -> sound that it takes as it is."""
SOUND_AGAIN = {
    ".mkv": ("flac",), ".mp4": ("aac", "256k"), ".mov": ("aac", "256k"), ".webm": ("libopus", "256k"),
}  # fmt: skip
"""Container -> encoder, and bits a second, of other sound."""
KINDS = {"audio": "a", "subtitle": "s", "attachment": "t"}
"""Type of a stream -> ffmpeg's letter for it, for what is carried over."""


@dataclass(frozen=True)
class Carried:
    """What is carried over: ffmpeg's options (the file is its input 1), the time in seconds at which the earliest of
    these streams starts, None if there are none, and a line for each stream that is left out."""

    options: list[str]
    start: Fraction | None
    lost: list[str]


def carried_over(streams, suffix: str) -> Carried:
    """What of a file's `streams` besides the first video goes into a container, and how."""
    picture = streams.video[0]
    options = ["-map_metadata", "1", "-map_chapters", "1", "-c:a", "copy", "-c:s", "copy", "-c:t", "copy"]
    options += ["-disposition:v:0", _marks(picture)]
    for name in ("language", "title"):
        if name in picture.metadata:
            options += ["-metadata:s:v:0", f"{name}={picture.metadata[name]}"]
    starts, lost, counts = [], [], Counter()
    for stream in streams:
        if stream.index == picture.index or _titles(stream):
            continue
        codec = stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"
        if why := _obstacle(stream, codec, suffix):
            lost.append(why)
            continue
        kind = KINDS[stream.type]
        number = f"{kind}:{counts[kind]}"
        options += ["-map", f"1:{stream.index}"]
        if kind != "t":
            options += [f"-disposition:{number}", _marks(stream)]
        if kind == "a" and codec not in SOUND_OF[suffix]:
            encoder, *rate = SOUND_AGAIN[suffix]
            options += [f"-c:{number}", encoder, *(word for bits in rate for word in (f"-b:{number}", bits))]
        elif codec in TEXT and (suffix != ".mkv" or codec == "mov_text"):
            options += [f"-c:{number}", SUBTITLES_OF[suffix]]
        counts[kind] += 1
        if stream.start_time is not None:
            starts.append(stream.start_time * stream.time_base)
    return Carried(options, min(starts, default=None), lost)


def tag_of(encoder: Sequence[str], suffix: str) -> list[str]:
    """Options that have ffmpeg call H.265 in MP4 what Apple's players want it to be called."""
    hevc = any(word == "libx265" or word.startswith("hevc") for word in encoder)
    return ["-tag:v", "hvc1"] if hevc and suffix in (".mp4", ".mov") else []


def _titles(stream) -> bool:
    """Whether a stream is only the titles of a MOV's chapters, which are carried over as chapters."""
    return stream.type == "data" and stream.name == "bin_data" and 0 < stream.frames == len(stream.container.chapters())


def _obstacle(stream, codec: str, suffix: str) -> str | None:
    """Why a stream is left out, None if it is not."""
    if stream.type == "video":
        if "attached_pic" in _marks(stream):
            return f"cover picture {stream.index}"
        return f"video {stream.index}: only the first video of a file is restored"
    if stream.type == "audio" and codec == "unknown":
        return f"sound {stream.index}: ffmpeg does not know its codec"
    if stream.type == "subtitle" and codec in PICTURES and suffix != ".mkv":
        return f"subtitles {stream.index} ({codec}): only .mkv takes subtitles that are pictures"
    if stream.type == "subtitle" and codec not in PICTURES | TEXT:
        return f"subtitles {stream.index} ({codec}): {suffix} does not take them"
    if stream.type == "attachment" and suffix != ".mkv":
        return f"attachment {stream.index}: only .mkv takes attachments"
    if stream.type not in KINDS:
        return f"{stream.type} {stream.index}: time codes and other data are not carried over"
    return None


def _marks(stream) -> str:
    """What a stream is marked as (default, forced, …), as ffmpeg's option -disposition takes it."""
    return "+".join(mark.name for mark in stream.disposition) or "0"
