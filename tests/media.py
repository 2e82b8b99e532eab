"""Video files for tests: made by ffmpeg, looked at with PyAV, neither through vsuav."""

import subprocess
from fractions import Fraction
from pathlib import Path

import pytest

av = pytest.importorskip("av")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")


def ffmpeg(*arguments) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def look(path: Path) -> dict:
    """What a file holds, as PyAV sees it: times in seconds from the file's beginning."""
    with av.open(str(path)) as container:
        picture = container.streams.video[0]
        streams = {s.index: s for s in container.streams if s.type != "data"}
        times, payload = {i: [] for i in streams}, {i: [] for i in streams}
        for packet in container.demux(*streams.values()):
            if packet.pts is not None:
                times[packet.stream.index].append(packet.pts * packet.time_base)
                payload[packet.stream.index].append(bytes(packet))
        by_kind = {kind: [i for i, s in streams.items() if s.type == kind] for kind in ("video", "audio", "subtitle")}
        context = picture.codec_context
        return {
            "size": (context.width, context.height),
            "format": context.pix_fmt,
            "colour": (int(context.colorspace), int(context.color_primaries), int(context.color_trc)),
            "shape": picture.sample_aspect_ratio,
            "kinds": [streams[i].type for i in streams],
            "codecs": [streams[i].codec_context.name for i in streams],
            "times": {kind: [sorted(times[i]) for i in rows] for kind, rows in by_kind.items()},
            "payload": {kind: [payload[i] for i in rows] for kind, rows in by_kind.items()},
            "marks": [str(streams[i].disposition) for i in streams],
            "languages": [streams[i].metadata.get("language") for i in streams],
            "title": container.metadata.get("title"),
            "chapters": [
                (c["metadata"]["title"], c["start"] * c["time_base"], c["end"] * c["time_base"])
                for c in container.chapters()
            ],
        }


def pictures(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray().tobytes() for frame in container.decode(video=0)]


def close(a, b, tolerance=Fraction(2, 1000)) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))
