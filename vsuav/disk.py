"""A disk tier for final latents: one SQLite database in a folder, safe with many processes and against kills.

A row is a name (a digest of everything the latent depends on), the tensor's bytes and their checksum. SQLite writes a
row whole or not at all. A row whose checksum does not fit, or a database that cannot be read, is dropped and its
latents are computed again.
"""

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE = "latents.sqlite3"
TABLE = """CREATE TABLE IF NOT EXISTS latent (
    name BLOB PRIMARY KEY, used REAL NOT NULL, size INTEGER NOT NULL, kind TEXT NOT NULL, data BLOB NOT NULL,
    checksum BLOB NOT NULL) WITHOUT ROWID"""
DTYPES = {"float32": np.float32, "float16": np.float16}


class Disk:
    """Latents by name in `folder`, at most `limit` bytes of them; the least recently used go first.

    Args:
        folder: made if it is not there.
        limit: bytes.
        log: called with one line when something was wrong with what is on disk.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path, limit: int, log: Callable[[str], None] = lambda line: None):
        self.path = Path(folder) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._limit = limit
        self._log = log
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self.hits = 0
        with self._lock:
            self._open()

    def get(self, name: bytes) -> Tensor | None:
        """The latent of `name`, or None."""
        with self._lock:
            row = self._try(lambda db: db.execute(
                "SELECT kind, data, checksum FROM latent WHERE name = ?", (name,)).fetchone())  # fmt: skip
            if row is None:
                return None
            kind, data, checksum = row
            if blake2b(data, digest_size=16).digest() != checksum:
                self._log("a stored latent is damaged and will be computed again")
                self._try(lambda db: db.execute("DELETE FROM latent WHERE name = ?", (name,)))
                return None
            self._try(lambda db: db.execute("UPDATE latent SET used = ? WHERE name = ?", (time.time(), name)))
            self.hits += 1
            dtype, shape = json.loads(kind)
            return torch.from_numpy(np.frombuffer(data, DTYPES[dtype]).reshape(shape).copy())

    def put(self, name: bytes, value: Tensor) -> None:
        """Keep `value` (float32 or float16) under `name`. A full or failing disk costs the entry, not the frame."""
        data = value.contiguous().numpy().tobytes()
        kind = json.dumps([str(value.dtype).removeprefix("torch."), list(value.shape)])
        row = (name, time.time(), len(data), kind, data, blake2b(data, digest_size=16).digest())
        with self._lock:
            self._try(lambda db: db.execute("INSERT OR REPLACE INTO latent VALUES (?, ?, ?, ?, ?, ?)", row))
            self._evict()

    @property
    def bytes(self) -> int:
        """Bytes of latents held."""
        with self._lock:
            return self._size()

    def close(self) -> None:
        """Close the database; later calls open it again."""
        with self._lock:
            self._close()

    def _size(self) -> int:
        row = self._try(lambda db: db.execute("SELECT COALESCE(SUM(size), 0) FROM latent").fetchone())
        return row[0] if row else 0

    def _evict(self) -> None:
        excess = self._size() - self._limit
        while excess > 0:
            row = self._try(lambda db: db.execute("SELECT name, size FROM latent ORDER BY used LIMIT 1").fetchone())
            if row is None:
                return
            self._try(lambda db, name=row[0]: db.execute("DELETE FROM latent WHERE name = ?", (name,)))
            excess -= row[1]

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute(TABLE)
                connection.execute("SELECT COUNT(*) FROM latent").fetchone()
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

    def _rebuild(self, error: Exception) -> None:
        self._log(f"{self.path} is damaged ({error}); it is started anew")
        self._close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def _try(self, action: Callable[[sqlite3.Connection], object]):
        """Run `action`; a damaged database is started anew, any other trouble is logged and gives None."""
        try:
            return action(self._open())
        except (sqlite3.OperationalError, OSError) as error:
            self._log(f"{self.path}: {error}")
        except sqlite3.DatabaseError as error:
            self._rebuild(error)
        return None
