"""Files appear whole, under names nobody has, from one process at a time."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from vsuav.parts import MediaError, alone, check_target, complete, new_part

HOLD = """
import sys, time
from pathlib import Path
from vsuav.parts import alone, new_part
target = Path(sys.argv[1])
with alone(target, target.with_name("kept")) as note:
    note(new_part(target))
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_part_takes_no_name_that_is_there(tmp_path, monkeypatch):
    names = iter(["aaaaaaaa", "aaaaaaaa", "bbbbbbbb"])
    monkeypatch.setattr("secrets.token_hex", lambda count: next(names))
    first, second = new_part(tmp_path / "new.mkv"), new_part(tmp_path / "new.mkv")
    assert first != second and first.suffix == second.suffix == ".mkv"
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_a_file_appears_when_it_is_complete_and_with_usual_rights(tmp_path):
    target = tmp_path / "page.html"
    with complete(target) as part:
        part.write_text("new")
        assert not target.exists()
    (tmp_path / "other").touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    with pytest.raises(KeyboardInterrupt), complete(target) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "new" and len(list(tmp_path.iterdir())) == 2


def test_one_process_at_a_time_and_nothing_is_left(tmp_path):
    target, folder = tmp_path / "new.mkv", tmp_path / "kept"
    with alone(target, folder), pytest.raises(MediaError, match="is being written by another run"):
        alone(target, folder).__enter__()
    assert not folder.exists()
    with alone(target, folder):
        (folder / "own.txt").write_text("mine")
    assert [path.name for path in folder.iterdir()] == ["own.txt"]


def test_the_part_of_a_killed_process_is_removed(tmp_path):
    target = tmp_path / "new.mkv"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(MediaError, match="another run"):
        alone(target, tmp_path / "kept").__enter__()
    own = tmp_path / "vsuav-01234567.part.mkv"  # another target's
    own.touch()
    assert len(list(tmp_path.iterdir())) == 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    with alone(target, tmp_path / "kept"):
        assert sorted(tmp_path.iterdir()) == [tmp_path / "kept", own]
    assert list(tmp_path.iterdir()) == [own]


def test_a_file_in_the_way_of_the_folder_is_said(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(MediaError, match="kept must be a folder that can be written: File exists"):
        alone(tmp_path / "new.mkv", tmp_path / "kept").__enter__()
    assert (tmp_path / "kept").read_text() == "mine"


def test_where_no_file_may_appear(tmp_path):
    source, link = tmp_path / "old.mkv", tmp_path / "link.mkv"
    source.touch()
    os.link(source, link)
    (tmp_path / "folder.mkv").mkdir()
    for target, says in (
        (source, "INPUT and OUTPUT are the same file"),
        (link, "INPUT and OUTPUT are the same file"),
        (tmp_path / "folder.mkv", "OUTPUT is a folder"),
        (tmp_path / "new.avi", "OUTPUT must end in .mkv or .mp4, got new.avi"),
        (tmp_path / "none" / "new.mkv", "no such folder"),
        (tmp_path / os.fsdecode(b"\xff.mkv"), "is not in UTF-8"),
    ):
        with pytest.raises(MediaError, match=says):
            check_target(target, {"INPUT": source}, (".mkv", ".mp4"), overwrite=True)
    other = tmp_path / "other.MKV"
    check_target(other, {"INPUT": source}, (".mkv", ".mp4"), overwrite=False)
    other.touch()
    check_target(other, {"INPUT": source}, (".mkv", ".mp4"), overwrite=True)
    with pytest.raises(MediaError, match="exists already; --overwrite"):
        check_target(other, {"INPUT": source}, (".mkv", ".mp4"), overwrite=False)
