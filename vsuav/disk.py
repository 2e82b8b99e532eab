"""A disk tier for final latents: one SQLite database in a folder, safe with many processes and against kills.

A latent is kept under a name, a digest of everything it depends on, with a checksum. SQLite writes it whole or not at
all. A latent whose checksum does not fit, or a database that cannot be read, is dropped, and computed again.
"""

import contextlib
import functools
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE = "latents.sqlite3"
TABLES = (
    "CREATE TABLE IF NOT EXISTS latent (name BLOB PRIMARY KEY, used REAL NOT NULL, size INTEGER NOT NULL,"
    " kind TEXT NOT NULL, checksum BLOB NOT NULL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS age ON latent (used, size)",
    "CREATE TABLE IF NOT EXISTS body (name BLOB PRIMARY KEY, data BLOB NOT NULL)",
)
"""The bytes lie apart, so that noting a use or adding up sizes touches none of them."""
DTYPES = {"float32": np.float32, "float16": np.float16}


@functools.cache
def program(folder: Path = Path(__file__).parent) -> bytes:
    """A digest of vsuav's own files, which decide a latent's bits as its weights do: part of every name."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return blake2b(b"".join(blake2b(file.name.encode() + file.read_bytes()).digest() for file in files)).digest()


class Disk:
    """Latents by name in `folder`, at most `limit` bytes of them; the least recently used go first.

    Args:
        folder: made if it is not there; may begin with "~".
        limit: bytes.
        log: called with one line when something is wrong with what is on disk, once for each kind of trouble.

    Raises:
        ValueError: `folder` is no path.
        OSError: it cannot be made or written.
    """

    def __init__(self, folder: str | Path, limit: int, log: Callable[[str], None] = lambda line: None):
        if not isinstance(folder, str | Path) or not str(folder).strip():
            raise ValueError(f"cache_dir must be the path of a folder, got {folder!r}")
        self.path = Path(os.path.expanduser(folder)).absolute() / FILE  # the program may change folders
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"cache_dir must be a folder that can be made, got {str(folder)!r} ({reason})") from error
        self._limit = limit
        self._log = log
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._file: int | None = None
        self.hits = 0
        with self._lock:
            self._open()

    def get(self, name: bytes) -> Tensor | None:
        """The latent of `name`, or None."""
        with self._lock:
            row = self._try(lambda db: db.execute(
                "SELECT kind, checksum, data FROM latent JOIN body USING (name) WHERE name = ?", (name,)
            ).fetchone())  # fmt: skip
            if row is None:
                return None
            kind, checksum, data = row
            if _checksum(name, kind, data) != checksum:
                self._say("a stored latent is damaged and will be computed again")
                self._try(lambda db: _delete(db, name))
                return None
            self._try(lambda db: db.execute("UPDATE latent SET used = ? WHERE name = ?", (time.time(), name)))
            self.hits += 1
            dtype, shape = json.loads(kind)
            return torch.from_numpy(np.frombuffer(data, DTYPES[dtype]).reshape(shape).copy())

    def put(self, name: bytes, value: Tensor) -> None:
        """Keep `value` (float32 or float16) under `name`. A full or failing disk costs the entry, not the frame."""
        data = value.contiguous().numpy().tobytes()
        if len(data) > self._limit:
            return
        kind = json.dumps([str(value.dtype).removeprefix("torch."), list(value.shape)])
        row = (name, time.time(), len(data), kind, _checksum(name, kind, data))

        def write(db: sqlite3.Connection) -> None:
            with _transaction(db):
                db.execute("INSERT OR REPLACE INTO latent VALUES (?, ?, ?, ?, ?)", row)
                db.execute("INSERT OR REPLACE INTO body VALUES (?, ?)", (name, data))
                self._evict(db)

        with self._lock:
            self._try(write)

    @property
    def bytes(self) -> int:
        """Bytes of latents held."""
        with self._lock:
            return self._try(_size) or 0

    def close(self) -> None:
        """Close the database; later calls open it again."""
        with self._lock:
            self._close()

    def _evict(self, db: sqlite3.Connection) -> None:
        excess = _size(db) - self._limit
        while excess > 0:
            name, size = db.execute("SELECT name, size FROM latent ORDER BY used LIMIT 1").fetchone()
            _delete(db, name)
            excess -= size

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            try:
                connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            except sqlite3.Error as error:
                raise OSError(f"cache_dir must be a folder that can be written: {self.path}: {error}") from error
            self._file = self._inode()
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                for table in TABLES:
                    connection.execute(table)
                connection.execute("SELECT * FROM latent LEFT JOIN body USING (name) LIMIT 1").fetchone()
            except sqlite3.OperationalError as error:
                connection.close()
                raise OSError(f"{self.path} cannot be used: {error}") from error
            except sqlite3.DatabaseError as error:
                connection.close()
                self._rebuild(error)
                return self._open()
            self._connection = connection
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _inode(self) -> int | None:
        try:
            return self.path.stat().st_ino
        except FileNotFoundError:
            return None

    def _rebuild(self, error: Exception) -> None:
        """Remove the damaged database, unless another process has put a new one in its place."""
        self._say(f"{self.path} is damaged ({error}); it is started anew")
        self._close()
        if self._inode() == self._file:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def _try(self, action: Callable[[sqlite3.Connection], object]):
        """Run `action`; a damaged database is started anew, any other trouble is logged and gives None."""
        try:
            return action(self._open())
        except (sqlite3.OperationalError, OSError) as error:
            self._say(f"{self.path}: {error}")
        except sqlite3.DatabaseError as error:
            self._rebuild(error)
        return None

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._log(line)


def _checksum(name: bytes, kind: str, data: bytes) -> bytes:
    return blake2b(name + kind.encode() + data, digest_size=16).digest()


def _size(db: sqlite3.Connection) -> int:
    return db.execute("SELECT COALESCE(SUM(size), 0) FROM latent").fetchone()[0]


def _delete(db: sqlite3.Connection, name: bytes) -> None:
    with _transaction(db):
        for table in ("latent", "body"):
            db.execute(f"DELETE FROM {table} WHERE name = ?", (name,))


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of the block or nothing of it; inside another transaction, part of that one."""
    if db.in_transaction:
        yield
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
