"""Files of tensors, read without running anything that is in them.

Two formats exist: safetensors (a JSON header and raw bytes) and the pickles that `torch.save` writes. Both come back as
plain dictionaries of CPU tensors in the dtype of the file, each owning its memory: nothing is mapped, so replacing a
file in use changes no pixel, and a caller that pops tensors as it uses them never holds the weights twice.
"""

import contextlib
import json
import math
import pickle
import struct
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ModelError(ValueError):
    """A model folder or file that cannot be used. The message is one line: what was looked for and what was found."""


class _NoValues(TorchFunctionMode):
    """Leaves out what `torch.nn.init` would do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (args or tuple(kwargs.values()))[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def bare() -> Iterator[None]:
    """Networks built in here have no memory and no values: all on the meta device, no initialiser runs.

    An initialiser on the meta device would load torch's compiler, and with it a second LLVM, which crashes programs
    that have one already, such as previewers that draw with Mesa.
    """
    with torch.device("meta"), _NoValues():
        yield


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format


def _refuse_stand_in(path: Path) -> None:
    """Raise ModelError for what often lies in a large file's place."""
    with path.open("rb") as file:
        beginning = file.read(64)
    if beginning.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the file itself: fetch it with git lfs pull")
    if beginning.lstrip().startswith(b"<") and 0 not in beginning[:8]:
        raise ModelError(f"{path} is a web page, not a file of tensors: fetch it again")


def _header(path: Path) -> tuple[dict[str, dict], dict[str, str], int]:
    """Entries, metadata and the offset of the first data byte of a safetensors file; the file's length is checked."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
        if not 2 <= length <= LARGEST_HEADER:
            raise ModelError(f"{path} is not a safetensors file (its header does not begin with a length)")
        text = file.read(length)
    start = 8 + length
    if len(text) < length:
        raise ModelError(f"{path} is cut off: {size} bytes, its header alone needs {start}; fetch it again")
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        spans = sorted(entry["data_offsets"] for entry in entries.values())
        end = 0
        for name, entry in entries.items():
            begin, stop = entry["data_offsets"]
            if not all(type(side) is int and 0 <= side < 2**63 for side in entry["shape"]):
                raise ModelError(f"{path}: tensor {name} cannot have the shape {entry['shape']}")
            if stop - begin != math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize:
                raise ModelError(f"{path}: the bytes of tensor {name} do not fit its shape {entry['shape']}")
        for begin, stop in spans:
            if begin != end:
                raise ModelError(f"{path}: its tensors overlap or leave gaps")
            end = stop
    except ModelError:
        raise
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(f"{path} is not a safetensors file this program can read ({error!r})") from None
    if size != start + end:
        problem = "is cut off" if size < start + end else "has bytes behind its last tensor"
        raise ModelError(f"{path} {problem}: {size} bytes where its header says {start + end}; fetch it again")
    return entries, metadata, start


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file, from its header alone."""
    return {name: tuple(entry["shape"]) for name, entry in _header(path)[0].items()}


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file: text by name."""
    return _header(path)[1]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    entries, _, start = _header(path)
    tensors = {}
    with path.open("rb", buffering=0) as file:
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            raw = torch.empty(stop - begin, dtype=torch.uint8, device="cpu")
            view, done = memoryview(raw.numpy()), 0
            file.seek(start + begin)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ModelError(f"{path} became shorter while it was read")
                done += count
            tensors[name] = raw.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file that is cut off or something else: whatever its reader stumbles over
        said = " ".join(str(error).split())
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL " in said:
            culprit = said.split("GLOBAL ", 1)[1].split()[0]
            raise ModelError(f"{path} wants to run code ({culprit}): only files of plain tensors are read") from None
        raise ModelError(
            f"{path} is not a file of tensors this program can read, or is cut off "
            f"({type(error).__name__}: {said.split('. ')[0][:120]})"
        ) from None
    if not isinstance(tensors, dict) or not all(map(_is_plain, tensors, tensors.values())):
        raise ModelError(f"{path} must hold a plain dictionary of tensors by their names")
    owners = Counter(value.untyped_storage().data_ptr() for value in tensors.values())
    for name, value in tensors.items():
        storage = value.untyped_storage()
        shared = owners[storage.data_ptr()] > 1 or storage.nbytes() != value.nbytes
        tensors[name] = value.detach().clone() if shared else value.detach()
    return dict(tensors)


def _is_plain(name: object, value: object) -> bool:
    """Whether an entry is a name and an ordinary array of real numbers."""
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return value.layout is torch.strided and not (value.is_quantized or value.is_nested or value.is_complex())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors`, `.bin` or `.pth` file, on the CPU, in the file's dtypes.

    Raises ModelError for files that are cut off, are something else, or (pickles) hold more than tensors.
    """
    if not path.is_file():
        raise ModelError(f"{path} does not exist")
    _refuse_stand_in(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def digest_tensors(tensors: dict[str, Tensor], digest: "blake2b") -> None:
    """Feed names, dtypes, shapes and bytes of `tensors`, sorted by name, to a hash."""
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
