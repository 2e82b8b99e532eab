"""The disk tier: what comes back is what was put, or nothing, whatever happens to the file or to the process."""

import multiprocessing
import random
import resource
import signal
import sqlite3
from pathlib import Path

import pytest
import torch

from vsuav.disk import FILE, Disk, program

ROOM = 1 << 40


def latent(i: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(i)).to(dtype)


def name(i: int) -> bytes:
    return i.to_bytes(20, "little")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_latent_outlives_its_store(tmp_path, dtype):
    first = Disk(tmp_path / "a" / "b", ROOM)
    first.put(name(1), latent(1, dtype))
    first.close()
    second = Disk(tmp_path / "a" / "b", ROOM)
    assert torch.equal(second.get(name(1)), latent(1, dtype))
    assert second.get(name(1)).dtype == dtype
    assert second.get(name(2)) is None
    assert second.hits == 2


def test_a_view_is_kept_as_it_looks(tmp_path):
    disk = Disk(tmp_path, ROOM)
    disk.put(name(0), latent(0).transpose(0, 2)[1:3])
    assert torch.equal(disk.get(name(0)), latent(0).transpose(0, 2)[1:3])


def test_the_size_is_capped_and_the_least_recently_used_goes(tmp_path):
    one = latent(0).nbytes
    disk = Disk(tmp_path, 3 * one + one // 2)
    for i in range(3):
        disk.put(name(i), latent(i))
    assert disk.get(name(0)) is not None
    disk.put(name(3), latent(3))
    assert disk.bytes == 3 * one
    assert [disk.get(name(i)) is not None for i in range(4)] == [True, False, True, True]
    disk.put(name(2), latent(7))
    assert disk.bytes == 3 * one
    assert torch.equal(disk.get(name(2)), latent(7))


def test_the_file_stays_near_the_cap(tmp_path):
    value = torch.zeros(4, 64, 64)
    disk = Disk(tmp_path, 10 * value.nbytes)
    for i in range(100):
        disk.put(name(i), value + i)
    disk.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 20 * value.nbytes


def test_one_that_is_larger_than_the_cap_drives_nothing_out(tmp_path):
    disk = Disk(tmp_path, latent(0).nbytes)
    disk.put(name(0), latent(0))
    disk.put(name(1), torch.zeros(100, 100))
    assert disk.get(name(1)) is None
    assert disk.get(name(0)) is not None


@pytest.mark.parametrize("column", ["data", "kind", "checksum", "name"])
def test_a_damaged_latent_is_dropped_and_can_be_put_again(tmp_path, column):
    lines = []
    disk = Disk(tmp_path, ROOM, lines.append)
    for i in range(2):
        disk.put(name(i), latent(i))
    table = "body" if column == "data" else "latent"
    with sqlite3.connect(tmp_path / FILE) as db:
        if column == "name":  # the bytes of one under the name of the other
            db.execute("DELETE FROM body WHERE name = ?", (name(0),))
            db.execute("UPDATE body SET name = ? WHERE name = ?", (name(0), name(1)))
        elif column == "data":
            data = bytearray(db.execute("SELECT data FROM body WHERE name = ?", (name(0),)).fetchone()[0])
            data[17] ^= 1
            db.execute("UPDATE body SET data = ? WHERE name = ?", (bytes(data), name(0)))
        else:
            db.execute(f"UPDATE {table} SET {column} = ? WHERE name = ?", ('["float16", [4]]', name(0)))
    assert disk.get(name(0)) is None
    assert len(lines) == 1
    disk.put(name(0), latent(0))
    assert torch.equal(disk.get(name(0)), latent(0))


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    match how:
        case "garbage":
            data = bytearray(random.Random(0).randbytes(len(data)))
        case "empty":
            data = bytearray()
        case "truncated":
            data = data[: len(data) // 2 + 100]
        case "header only":
            data = data[:100]
        case "text":
            data = bytearray(b"hello")
        case "holes":
            generator = random.Random(1)
            for _ in range(60):
                place = generator.randrange(100, len(data) - 64)
                data[place : place + 64] = bytes(64)
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["garbage", "empty", "truncated", "header only", "text", "holes"])
def test_a_damaged_database_gives_right_latents_or_none(tmp_path, how):
    disk = Disk(tmp_path, ROOM)
    for i in range(60):
        disk.put(name(i), latent(i))
    disk.close()
    spoil(tmp_path / FILE, how)
    again = Disk(tmp_path, ROOM)
    for _ in range(2):
        for i in range(60):
            value = again.get(name(i))
            assert value is None or torch.equal(value, latent(i))
            again.put(name(i), latent(i))
    assert all(torch.equal(again.get(name(i)), latent(i)) for i in range(60))


def test_damage_while_it_is_open_is_survived(tmp_path):
    disk = Disk(tmp_path, ROOM)
    for i in range(60):
        disk.put(name(i), latent(i))
    for path in tmp_path.iterdir():
        path.write_bytes(b"x" * path.stat().st_size)
    for _ in range(3):
        for i in range(60):
            value = disk.get(name(i))
            assert value is None or torch.equal(value, latent(i))
            disk.put(name(i), latent(i))
    disk.close()
    assert torch.equal(Disk(tmp_path, ROOM).get(name(5)), latent(5))


@pytest.mark.parametrize("change", ["a.py", "b.so", "new.py"])
def test_another_program_has_other_names(tmp_path, change):
    folders = [tmp_path / name for name in ("one", "same", "other")]
    for folder in folders:
        folder.mkdir()
        (folder / "a.py").write_text("x = 1")
        (folder / "b.so").write_bytes(b"machine code")
    with (folders[2] / change).open("a") as file:
        file.write("more")
    one, same, other = map(program, folders)
    assert one == same != other


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cache_dir must be a folder that can be made, got '.*file' \(File exists\)"):
        Disk(tmp_path / "file", ROOM)
    (tmp_path / "folder" / FILE).mkdir(parents=True)
    with pytest.raises(OSError, match="cache_dir must be a folder that can be written"):
        Disk(tmp_path / "folder", ROOM)


@pytest.mark.parametrize("folder", ["", " ", 5, b"folder"])
def test_what_is_no_path_is_an_error_and_writes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"cache_dir must be the path of a folder, got {folder!r}"):
        Disk(folder, ROOM)
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Disk("~/kept", ROOM)
    assert (tmp_path / "kept" / FILE).is_file()


def write(folder: Path, start: int, count: int, limit: int, said) -> None:
    """Put latents and read them back, saying the number of each; with files of at most `limit` bytes if not 0."""
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    disk = Disk(folder, ROOM, said.send)
    for i in range(start, start + count):
        disk.put(name(i % 200), latent(i % 200))
        value = disk.get(name(i % 200))
        assert limit or torch.equal(value, latent(i % 200))
        said.send(i)
    said.send("done")


class Writer:
    """Another process that writes."""

    def __init__(self, folder: Path, start: int, count: int, limit: int = 0):
        fork = multiprocessing.get_context("fork")
        self.heard, said = fork.Pipe(duplex=False)
        self.process = fork.Process(target=write, args=(folder, start, count, limit, said))
        self.process.start()
        said.close()

    def rest(self) -> list:
        """Everything it still says."""
        words = []
        while True:
            try:
                words.append(self.heard.recv())
            except EOFError:
                self.process.join()
                return words


def test_two_processes_share_a_folder(tmp_path):
    writers = [Writer(tmp_path, start, 200) for start in (0, 100)]
    assert [writer.rest()[-1] for writer in writers] == ["done", "done"]
    disk = Disk(tmp_path, ROOM)
    assert all(torch.equal(disk.get(name(i)), latent(i)) for i in range(200))


def test_a_killed_writer_leaves_only_whole_latents(tmp_path):
    writer = Writer(tmp_path, 0, 10**6)
    seen = [writer.heard.recv() for _ in range(30)]
    writer.process.kill()
    seen += [word for word in writer.rest() if isinstance(word, int)]
    lines = []
    disk = Disk(tmp_path, ROOM, lines.append)
    assert all(torch.equal(disk.get(name(i % 200)), latent(i % 200)) for i in seen)
    assert all(value is None or torch.equal(value, latent(i)) for i in range(200) for value in [disk.get(name(i))])
    assert lines == []


def test_a_full_disk_costs_entries_and_one_line(tmp_path):
    words = Writer(tmp_path, 0, 200, limit=100_000).rest()
    assert words[-1] == "done"
    assert 1 <= sum(isinstance(word, str) for word in words[:-1]) <= 2
    disk = Disk(tmp_path, ROOM)
    assert all(value is None or torch.equal(value, latent(i)) for i in range(200) for value in [disk.get(name(i))])
    disk.put(name(150), latent(150))
    assert torch.equal(disk.get(name(150)), latent(150))
