"""Which version of each object a working copy holds: its ETag, in a file of SQLite's that processes share.

Every call opens the file anew: it takes a fraction of a millisecond, and neither threads nor forks share a connection.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from batchkit.errors import StorageError

if TYPE_CHECKING:
    import sqlite3

FILE = ".mirror.sqlite"
_PATIENCE_SECONDS = 60.0


class Ledger:
    def __init__(self, root: Path) -> None:
        self._path = root / FILE
        with self._open() as database:
            database.execute("CREATE TABLE IF NOT EXISTS objects (name TEXT PRIMARY KEY, etag TEXT) WITHOUT ROWID")
            database.execute("CREATE TABLE IF NOT EXISTS copy (id TEXT)")
            if database.execute("SELECT id FROM copy").fetchone() is None:
                database.execute("INSERT INTO copy VALUES (?)", (secrets.token_hex(8),))
            self.copy: str = database.execute("SELECT id FROM copy").fetchone()[0]

    def all(self) -> dict[str, str]:
        """Name → ETag."""
        with self._open() as database:
            return dict(database.execute("SELECT name, etag FROM objects"))

    def etag(self, name: str) -> str | None:
        with self._open() as database:
            row = database.execute("SELECT etag FROM objects WHERE name = ?", (name,)).fetchone()
            return row[0] if row else None

    @contextlib.contextmanager
    def recording(self, name: str, etag: str | None) -> Iterator[str | None]:
        """Record the ETag of what the block puts into place (None: it removes it); others wait meanwhile. Gives the one
        before, so that a block can see that another process was here first."""
        with self._open() as database:
            row = database.execute("SELECT etag FROM objects WHERE name = ?", (name,)).fetchone()
            yield row[0] if row else None
            if etag is None:
                database.execute("DELETE FROM objects WHERE name = ?", (name,))
            else:
                database.execute("INSERT OR REPLACE INTO objects VALUES (?, ?)", (name, etag))

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A transaction that nobody else writes beside."""
        import sqlite3

        try:
            database = sqlite3.connect(self._path, timeout=_PATIENCE_SECONDS, isolation_level=None)
        except sqlite3.Error as exc:
            raise StorageError(f"{self._path}: cannot be opened: {exc}", hint="--work-dir DIR") from exc
        with contextlib.closing(database):
            try:
                # What a power cut takes of it is pulled again.
                database.execute("PRAGMA synchronous = OFF")
                database.execute("BEGIN IMMEDIATE")
                yield database
                database.execute("COMMIT")
            except sqlite3.Error as exc:
                raise StorageError(
                    f"{self._path}: cannot be written: {exc}",
                    hint="free some disk space, or name another place: --work-dir DIR",
                ) from exc
