"""What containers take besides the picture: each file is written by ffmpeg with what is answered, and looked at."""

import pytest
from media import av, ffmpeg

from vsuav.containers import carried_over, tag_of

PICTURE = ["-f", "lavfi", "-i", "testsrc2=s=32x24:r=25:d=0.2"]
SOUND = ["-f", "lavfi", "-i", "sine=d=0.2:r=48000"]
CODED = ["-c:v", "libx264", "-pix_fmt", "yuv420p"]


def carried(source, target):
    """Streams of `target`, written from the picture and what is carried over of `source`; and what is left out."""
    with av.open(str(source)) as container:
        answer = carried_over(container.streams, target.suffix)
    ffmpeg("-i", source, "-i", source, "-map", "0:v:0", *answer.options, *CODED, target)
    with av.open(str(target)) as container:
        names = [s.codec_context.codec.canonical_name if s.codec_context else s.type for s in container.streams]
    return names, answer.lost


@pytest.mark.parametrize(
    ("codec", "suffix", "options", "in_mkv", "in_mp4"),
    [
        ("libmp3lame", ".mkv", [], "mp3", "mp3"),
        ("ac3", ".mkv", [], "ac3", "ac3"),
        ("pcm_s16le", ".mkv", [], "pcm_s16le", "aac"),
        ("pcm_s8", ".mov", [], "flac", "aac"),
        ("adpcm_ima_qt", ".mov", [], "flac", "aac"),
        ("pcm_bluray", ".m2ts", ["-ac", "2", "-mpegts_m2ts_mode", "1"], "flac", "aac"),
        ("s302m", ".ts", ["-strict", "-2", "-ac", "2"], "flac", "aac"),
        ("nellymoser", ".flv", ["-ar", "22050"], "flac", "aac"),
    ],
)
def test_sound_is_copied_where_it_is_taken_else_encoded_again(codec, suffix, options, in_mkv, in_mp4, tmp_path):
    source = tmp_path / f"in{suffix}"
    ffmpeg(*PICTURE, *SOUND, *CODED, "-c:a", codec, *options, source)
    assert carried(source, tmp_path / "out.mkv") == (["h264", in_mkv], [])
    assert carried(source, tmp_path / "out.mp4") == (["h264", in_mp4], [])


def test_what_is_left_out_is_said(tmp_path):
    ffmpeg(*PICTURE, "-frames:v", "1", tmp_path / "cover.png")
    (tmp_path / "font.ttf").write_bytes(b"\0\1\0\0")
    source = tmp_path / "in.mkv"
    attached = ["-attach", tmp_path / "font.ttf", "-metadata:s:t:0", "mimetype=application/x-truetype-font",
                "-attach", tmp_path / "cover.png", "-metadata:s:t:1", "mimetype=image/png"]  # fmt: skip
    ffmpeg(*PICTURE, *PICTURE, *SOUND, "-map", 0, "-map", 1, "-map", 2, *CODED, *attached, source)
    names, lost = carried(source, tmp_path / "out.mkv")
    assert names[0] == "h264" and names[2:] == ["attachment"]
    assert lost == ["video 1: only the first video of a file is restored", "cover picture 4"]
    names, lost = carried(source, tmp_path / "out.mp4")
    assert len(names) == 2 and "attachment 3: only .mkv takes attachments" in lost
    ffmpeg(*PICTURE, *CODED, "-timecode", "01:00:00:00", tmp_path / "in.mov")
    assert carried(tmp_path / "in.mov", tmp_path / "out.mkv")[1] == [
        "data 1: time codes and other data are not carried over"
    ]


def test_streams_nobody_can_read_are_left_out(tmp_path):
    """A second sound and a second picture in codecs that do not exist."""
    source = tmp_path / "in.mov"
    ffmpeg(*PICTURE, *SOUND, *SOUND, *PICTURE, "-map", 0, "-map", 1, "-map", 2, "-map", 3, *CODED, "-c:a", "pcm_s16le",
           source)  # fmt: skip
    written = bytearray(source.read_bytes())
    for code in (b"sowt", b"avc1"):
        at = written.rfind(code)
        written[at : at + 4] = b"zzzz"
    source.write_bytes(written)
    names, lost = carried(source, tmp_path / "out.mkv")
    assert names == ["h264", "pcm_s16le"]
    assert lost == ["sound 2: ffmpeg does not know its codec", "video 3: only the first video of a file is restored"]


def test_subtitles_become_what_the_container_takes(tmp_path):
    (tmp_path / "sub.srt").write_text("1\n00:00:00,000 --> 00:00:00,100\nHallo\n")
    (tmp_path / "meta.txt").write_text(";FFMETADATA1\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=200\ntitle=one\n")
    source = tmp_path / "in.mp4"
    ffmpeg(*PICTURE, "-i", tmp_path / "sub.srt", "-i", tmp_path / "meta.txt", "-map", 0, "-map", 1, "-map_chapters", 2,
           *CODED, "-c:s", "mov_text", source)  # fmt: skip
    with av.open(str(source)) as container:
        assert [stream.type for stream in container.streams] == ["video", "subtitle", "data"]  # the chapters' titles
    assert carried(source, tmp_path / "out.mkv") == (["h264", "subrip"], [])


@pytest.mark.skipif(not hasattr(av.container.OutputContainer, "add_mux_stream"), reason="this PyAV cannot write them")
def test_subtitles_that_no_container_takes_are_left_out(tmp_path):
    with av.open(str(tmp_path / "608.mov"), "w") as container:
        picture, text = container.add_stream("libx264", rate=25), container.add_mux_stream("eia_608")
        picture.width, picture.height, picture.pix_fmt = 32, 24, "yuv420p"
        for packet in [*picture.encode(av.VideoFrame(32, 24, "yuv420p")), *picture.encode()]:
            container.mux(packet)
        packet = av.Packet(b"\0\0\0\x0acdat\x94\x20")
        packet.stream, packet.time_base, packet.pts, packet.dts = text, picture.time_base, 0, 0
        container.mux(packet)
    for suffix in (".mkv", ".mp4"):
        names, lost = carried(tmp_path / "608.mov", tmp_path / f"608{suffix}")
        assert names == ["h264"] and lost == [f"subtitles 1 (eia_608): {suffix} does not take them"]


def test_h265_in_mp4_is_named_as_players_of_apple_want_it(tmp_path):
    target = tmp_path / "out.mp4"
    encoder = ["-c:v", "libx265", "-x265-params", "log-level=none"]
    ffmpeg(*PICTURE, *tag_of(encoder, ".mp4"), *encoder, target)
    assert b"hvc1" in target.read_bytes() and b"hev1" not in target.read_bytes()
    assert tag_of(encoder, ".mkv") == tag_of(["-c:v", "libx264"], ".mp4") == []
