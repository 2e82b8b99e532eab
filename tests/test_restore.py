"""scripts/restore.py beside files of others: nothing but OUTPUT and its picture is written or removed."""

import pytest
import toy
from media import ffmpeg, look

pytest.importorskip("vapoursynth")
import restore  # noqa: E402


def test_only_output_and_its_picture_appear(tmp_path, capfd):
    source, own = tmp_path / "m.part.mkv", tmp_path / "m.part.png"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=32x24:r=25:d=0.08", "-c:v", "libx264", "-pix_fmt", "yuv420p", source)
    own.write_text("mine")
    model, before = toy.write(tmp_path / "model"), source.read_bytes()
    assert restore.main([str(source), str(tmp_path / "m.mkv"), f"model={model}"]) == 0, capfd.readouterr().err
    assert look(tmp_path / "m.mkv")["size"] == (128, 96)
    assert source.read_bytes() == before and own.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "m.part.mkv", "m.part.png", "m.mkv", "m.png"}


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("in.png", "in.mkv", "INPUT and OUTPUT are the same file"),
        ("in.mkv", "in.mkv", "INPUT and OUTPUT are the same file"),
        ("in.mkv", "out.avi", "OUTPUT must end in .mkv, .mp4, .mov or .webm, got out.avi"),
    ],
)
def test_input_stays(source, target, says, tmp_path, capfd):
    """The picture beside OUTPUT would be INPUT, or OUTPUT itself would."""
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=32x24", "-frames:v", "1", "-update", "1", tmp_path / source)
    before = (tmp_path / source).read_bytes()
    assert restore.main([str(tmp_path / source), str(tmp_path / target)]) == 1
    assert says in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [source] and (tmp_path / source).read_bytes() == before
