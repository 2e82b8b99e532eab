"""Files of tensors: what is read is what was written, and nothing in them runs."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from vsuav.weights import ModelError, metadata, read_tensors, shapes


class Trap:
    """Unpickling this makes a folder: proof that code ran."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def some_tensors():
    return {
        "a.weight": torch.randn(3, 4),
        "half": torch.randn(5).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pth"])
def test_tensors_come_back_in_their_dtypes(tmp_path, name):
    tensors = some_tensors()
    if name.endswith(".safetensors"):
        save_file(tensors, tmp_path / name, metadata={"who": "me"})
        assert metadata(tmp_path / name) == {"who": "me"}
        assert shapes(tmp_path / name) == {key: tuple(value.shape) for key, value in tensors.items()}
    else:
        torch.save(tensors, tmp_path / name)
    read = read_tensors(tmp_path / name)
    assert read.keys() == tensors.keys()
    for key, value in tensors.items():
        assert read[key].dtype == value.dtype and torch.equal(read[key], value)


def test_legacy_torch_files_are_read(tmp_path):
    torch.save({"x": torch.arange(4.0)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors(tmp_path / "old.pth")["x"], torch.arange(4.0))


def test_tensors_own_their_memory(tmp_path):
    """Overwriting a file in place, as a training script may, must not change weights that are in use."""
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(4096)}, path)
    read = read_tensors(path)["x"]
    with path.open("r+b") as file:
        file.seek(-4096 * 4, 2)
        file.write(bytes(4096 * 4))
    assert torch.equal(read, torch.ones(4096))
    assert torch.equal(read_tensors(path)["x"], torch.zeros(4096))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path, nested, legacy):
    trap = Trap(tmp_path / "ran")
    content = {"w": torch.ones(2), "x": {"y": [trap]}} if nested else trap
    torch.save(content, tmp_path / "evil.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match="wants to run code") as caught:
        read_tensors(tmp_path / "evil.bin")
    assert "mkdir" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 5, 8, 40, 200, -1])
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_files_that_are_cut_off(tmp_path, name, keep):
    path = tmp_path / name
    tensors = {"w": torch.randn(64, 64)}
    if name.endswith("bin"):
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def header(entries, data=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        header({"a": F32, "b": F32}, bytes(8)),  # overlap
        header({"a": F32 | {"data_offsets": [4, 12]}}, bytes(12)),  # gap
        header({"a": F32 | {"shape": [3]}}, bytes(8)),  # shape and bytes disagree
        header({"a": F32 | {"dtype": "F99"}}, bytes(8)),
        header({"a": F32}, bytes(9)),  # trailing bytes
        header({"a": F32 | {"shape": [-2, -1]}}, bytes(8)),
        header({"a": F32 | {"shape": [0, 2**63, 2], "data_offsets": [0, 0]}}),
        header({"a": F32 | {"shape": [2.0]}}, bytes(8)),
        header({"a": F32 | {"data_offsets": [0, 4, 8]}}, bytes(8)),
        header([1, 2]),
        header({"a": 3}),
        b"\x05\0\0\0\0\0\0\0{{{{{",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_malformed_safetensors(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_tensors(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>not found</html>", "is a web page"),
        (b'\n<?xml version="1.0"?>', "is a web page"),
    ],
)
def test_what_lies_in_a_large_files_place(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name} {says}"):
        read_tensors(tmp_path / name)


def test_a_header_as_long_as_a_bracket_is_no_web_page(tmp_path):
    """The first byte of a safetensors file is the lowest of its header's length."""
    text = json.dumps({"a": F32}).encode()
    text += b" " * ((ord("<") - len(text)) % 256)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert len(text) % 256 == ord("<") and read_tensors(tmp_path / "x.safetensors")["a"].tolist() == [0, 0]


def test_every_cut_of_a_legacy_file(tmp_path):
    torch.save({"w": torch.randn(4, 4), "b": torch.randn(3)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "w.pth").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.pth"):
            read_tensors(tmp_path / "cut.pth")


def test_other_protocols_are_not_accused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.bin", pickle_protocol=4)
    with pytest.raises(ModelError, match="is not a file of tensors this program can read"):
        read_tensors(tmp_path / "x.bin")


def test_names_that_share_memory_each_get_their_own(tmp_path):
    whole = torch.arange(12.0)
    tied = torch.ones(3)
    torch.save({"part": whole[4:8], "rest": whole[8:], "a": tied, "b": tied}, tmp_path / "x.bin")
    read = read_tensors(tmp_path / "x.bin")
    assert read["part"].tolist() == [4, 5, 6, 7] and read["rest"].tolist() == [8, 9, 10, 11]
    assert len({value.untyped_storage().data_ptr() for value in read.values()}) == 4
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in read.values())


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(1)], {"a": 1}, "text", {1: torch.ones(1)}, {"a": torch.ones(2).to_sparse()},
        {"a": torch.ones(2, dtype=torch.complex64)},
        {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
    ],
)  # fmt: skip
def test_other_contents_of_pickles(tmp_path, content):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ModelError, match="plain dictionary of tensors"):
        read_tensors(tmp_path / "x.bin")


def test_missing_file(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        read_tensors(tmp_path / "x.safetensors")
