"""How a file appears: when it is complete, and written by one process at a time.

What is being written is a part, a file beside its target under a name that no file had. A process that is killed leaves
its part behind; the next one that writes the same target removes it.
"""

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

LOCK = "vsuav.lock"
NAME = re.compile(r"vsuav-[0-9a-f]{8}\.part\.\w+")


class MediaError(ValueError):
    """A file that cannot be read or written; one line that says what would work."""


def check_name(path: Path) -> None:
    """Raise MediaError for a name that not all of VapourSynth, SQLite and a terminal can take."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise MediaError(f"{ascii(str(path))} is not in UTF-8; rename it") from None


def check_target(target: Path, inputs: Mapping[str, Path], suffixes: Collection[str], overwrite: bool) -> None:
    """Raise MediaError if no file may appear at `target`.

    Args:
        inputs: name in the command line -> a file that has to stay.
        suffixes: those that can be written.
        overwrite: whether another file may be replaced.
    """
    check_name(target)
    if target.suffix.lower() not in suffixes:
        *others, last = suffixes
        raise MediaError(f"OUTPUT must end in {', '.join(others)} or {last}, got {target.name}")
    if not target.parent.is_dir():
        raise MediaError(f"no such folder: {target.parent}")
    if target.is_dir():
        raise MediaError(f"OUTPUT is a folder: {target}")
    if not target.exists():
        return
    for name, path in inputs.items():
        if path.exists() and target.samefile(path):
            raise MediaError(f"{name} and OUTPUT are the same file: {path}")
    if not overwrite:
        raise MediaError(f"{target} exists already; --overwrite replaces it")


def new_part(target: Path) -> Path:
    """A new, empty file beside `target`, with its suffix."""
    while True:
        part = target.with_name(f"vsuav-{secrets.token_hex(4)}.part{target.suffix}")
        with contextlib.suppress(FileExistsError):
            part.touch(exist_ok=False)
            return part


@contextlib.contextmanager
def complete(target: Path) -> Iterator[Path]:
    """A part to write into: it becomes `target` when the block ends, and is removed when the block fails."""
    part = new_part(target)
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(target: Path, folder: Path) -> Iterator[Callable[[Path], None]]:
    """Hold `folder` while the block runs, so that no other process writes `target`; it is removed where it is empty.

    Gives a function that notes the part being written, which is removed by the next process if this one is killed.

    Raises:
        MediaError: another process holds it, or there can be no such folder.
    """
    try:
        descriptor = _locked(folder)
    except BlockingIOError:
        raise MediaError(f"{target} is being written by another run; wait for it, or choose another OUTPUT") from None
    except OSError as error:
        raise MediaError(f"{folder} must be a folder that can be written: {error.strerror}") from None

    def note(part: Path) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, part.name.encode(), 0)

    try:
        left = os.pread(descriptor, 100, 0).decode(errors="replace")
        if NAME.fullmatch(left):
            target.with_name(left).unlink(missing_ok=True)
        yield note
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):
            folder.rmdir()


def _locked(folder: Path) -> int:
    """The descriptor of the lock file in `folder`, which is made where it is not there."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the one who held the folder has just removed it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:  # a file system without locks
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                return descriptor
        os.close(descriptor)  # locked, but removed before: not the file that others would lock
