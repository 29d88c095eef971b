"""The files of one shard while `prepare` writes them, and what guards them."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from batchkit import twins
from batchkit.errors import RunError, StorageError
from batchkit.links import Links
from batchkit.manifests import PREPARE_AGAIN, Rejection, Seal
from batchkit.measures import Totals
from batchkit.runs import Run
from batchkit.storage import open_read, remove, shown, write_large, write_whole
from batchkit.takeovers import Answer, Taken, standing, take_over
from batchkit.tasks import FILE_START, Place, Row, make_custom_id, whole

if TYPE_CHECKING:  # it brings pydantic, and whoever reads requests converts nothing
    from batchkit.conversion import Converted


class ShardDraft:
    """Counts the rows of one shard and hashes its three files, in row order."""

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self._start: int | None = None
        self._last: Row | None = None
        self._requests = 0
        self._pixels = 0
        self._tokens: Totals | None = None
        self._tokens_to_send = Totals()
        self._reused: Counter[str] = Counter()
        self._rejected: list[Rejection] = []
        self._twins: list[tuple[int, int]] = []
        self._names: set[str] = set()
        self._rows_bytes = 0
        self._requests_bytes = 0
        self._hashes = [xxhash.xxh3_128() for _ in range(3)]
        self._attached = AttachedHash()
        self._links: Links | None = None

    def add(
        self, row: Row, done: Converted, rejection: Rejection | None, answer: Answer | None = None
    ) -> tuple[bytes, bytes, bytes | memoryview]:
        """Take in one row; return what it adds to the rows, the ids and the requests. `answer` is another run's."""
        if self._start is None:
            self._start = row.position
        self._last = row
        self._names |= done.names
        line, custom_id, request = added = row.raw + b"\n", done.custom_id.encode() + b"\n", done.request or b""
        rows_hash, ids_hash, requests_hash = self._hashes
        rows_hash.update(line)
        ids_hash.update(custom_id)
        requests_hash.update(request)
        self._attached.add(row)
        self._rows_bytes += len(line)
        self._requests_bytes += len(request)
        if rejection is not None:
            self._rejected.append(rejection)
        elif done.same_as is not None:
            self._twins.append((row.position, done.same_as))
        else:
            self._requests += 1
            self._pixels += done.pixels
            for link in done.links:
                self._links = (self._links or Links()).with_one(link)
            if done.tokens is not None:
                self._tokens = self._tokens or Totals()
                self._tokens.add(done.tokens)
            if answer is not None:
                self._reused[answer.run] += 1
            elif done.tokens is not None:
                self._tokens_to_send.add(done.tokens)
        return added

    def sealed(self) -> Seal:
        assert self._start is not None  # noqa: S101  # a shard begins with its first row
        assert self._last is not None  # noqa: S101
        rows_checksum, ids_checksum, requests_checksum = (digest.hexdigest() for digest in self._hashes)
        return Seal(
            shard=self.shard,
            start=self._start,
            end=self._last.position + 1,
            requests=self._requests,
            rejected=self._rejected,
            twins=twins.as_text(self._twins),
            rows_bytes=self._rows_bytes,
            requests_bytes=self._requests_bytes,
            pixels=self._pixels,
            rows_checksum=rows_checksum,
            ids_checksum=ids_checksum,
            requests_checksum=requests_checksum,
            next_line=self._last.line + 1,
            next_offset=self._last.end,
            names_in_use=sorted(self._names),
            tokens=self._tokens,
            reused=dict(self._reused),
            tokens_to_send=self._tokens_to_send if self._reused and self._tokens is not None else None,
            attached_checksum=self._attached.hexdigest(),
            links=self._links,
        )


class AttachedHash:
    """The checksum of what travels beside the JSON of rows: empty where no row has any."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()
        self._empty = True

    def add(self, row: Row) -> None:
        if row.attached:
            self._digest.update(whole(row))
            self._empty = False

    def hexdigest(self) -> str:
        return "" if self._empty else self._digest.hexdigest()


class ShardWriter:
    """Writes the files of one shard aside; `seal` puts them in place, then the answers of other runs, the seal last."""

    def __init__(self, run: Run, shard: int) -> None:
        self.shard = shard
        self._run = run
        self._draft = ShardDraft(shard)
        self._taken: list[Taken] = []
        self._stack = contextlib.ExitStack()
        self._rows = self._stack.enter_context(write_whole(run.rows_path(shard)))
        self._ids = self._stack.enter_context(write_whole(run.ids_path(shard)))
        self._requests = self._stack.enter_context(write_large(run.requests_path(shard)))

    def add(self, row: Row, done: Converted, rejection: Rejection | None, answer: Answer | None = None) -> None:
        if answer is not None:
            self._taken.append(Taken(row.position, done.custom_id, answer))
        line, custom_id, request = self._draft.add(row, done, rejection, answer)
        try:
            self._rows.write(line)
            self._ids.write(custom_id)
            self._requests.write(request)
        except OSError as exc:
            raise StorageError(
                f"{self._run.name}: cannot be written: {exc.strerror or exc}",
                hint="free some disk space and run the same command again: it goes on where it stopped",
            ) from exc

    def seal(self) -> Seal:
        seal = self._draft.sealed()
        self._refuse_other_cut(seal)
        keep = standing(self._run, seal)
        self._stack.close()
        # Before the seal: from there on `submit` would send what is answered already.
        seal = take_over(self._run, seal, self._taken, keep=keep)
        self._run.write_seal(seal)
        if self._run.job(self.shard).requests_deleted:  # made again only because an earlier shard had to be
            remove(self._run.requests_path(self.shard))
        return seal

    def _refuse_other_cut(self, seal: Seal) -> None:
        """Raise `RunError` where the shard was sent with other rows: changed images may move the cuts."""
        old = self._run.seal(self.shard)
        attempts = self._run.job(self.shard).attempts
        sent = [span for attempt in attempts if attempt.reused_from is None for span in attempt.rows]
        cut = (seal.start, seal.end, seal.ids_checksum)
        moved = old is not None and self._run.was_sent() and (old.start, old.end, old.ids_checksum) != cut
        paired = old is not None and self._run.was_shard_sent(self.shard) and old.twins != seal.twins
        if moved or paired or any(start < seal.start or end > seal.end for start, end in sent):
            what = "requests" if paired else "rows"
            raise RunError(
                f"shard {self.shard}: was sent, and would have other {what} now: images have changed since",
                hint="restore the images as they were, or the lost file from a copy of the run",
            )

    def close(self) -> None:
        """Throw away what is not in place yet; after `seal` there is nothing to throw away."""
        with contextlib.suppress(_AbandonedError):
            self._stack.__exit__(_AbandonedError, _AbandonedError(), None)


class _AbandonedError(Exception):
    """Unwinds the open files of a shard that is not finished."""


def intact_seals(run: Run) -> Iterator[Seal]:
    """The sealed shards up to the first that is damaged or lost: from there on `prepare` makes them again.

    Rows and requests are checked by their sizes alone, so that a resume need not read the whole run. Requests that were
    deleted on purpose are not missed.
    """
    with contextlib.suppress(RunError):
        yield from itertools.takewhile(lambda seal: _is_intact(run, seal), run.seals())


def _is_intact(run: Run, seal: Seal) -> bool:
    try:
        ids = run.fetch(run.ids_path(seal.shard)).read_bytes()
    except OSError:
        return False
    rows, requests = run.bytes_of(run.rows_path(seal.shard)), run.bytes_of(run.requests_path(seal.shard))
    if requests is None and run.job(seal.shard).requests_deleted:
        requests = seal.requests_bytes
    sizes = (rows, requests) == (seal.rows_bytes, seal.requests_bytes)
    return sizes and xxhash.xxh3_128_hexdigest(ids) == seal.ids_checksum


def remove_leftovers(run: Run, shards: int) -> None:
    """Remove what a killed `prepare` wrote aside, and the seals behind the first `shards`, unless something was sent:
    changed images may move the cuts. To be called under the lease `prepare`."""
    if not run.was_sent():
        for path in run.seal_path(0).parent.glob("[0-9]*.json"):
            if path.stem.isdecimal() and int(path.stem) >= shards:
                remove(path)
    for folder in (run.rows_path(0).parent, run.requests_path(0).parent):
        for aside in folder.glob(".*.tmp"):
            aside.unlink(missing_ok=True)


def rows_unchanged(run: Run, read: Callable[[Place], Iterator[Row]]) -> bool:
    """Whether the rows that `read` gives are still those of the sealed shards, by their checksums."""
    place = FILE_START
    for seal in intact_seals(run):
        digest, attached = xxhash.xxh3_128(), AttachedHash()
        for row in itertools.takewhile(lambda row: row.position < seal.end, read(place)):  # noqa: B023
            if row.position >= seal.start:
                digest.update(row.raw + b"\n")
                attached.add(row)
        if (digest.hexdigest(), attached.hexdigest()) != (seal.rows_checksum, seal.attached_checksum):
            return False
        place = Place(seal.end, seal.next_line, seal.next_offset)
    return True


class IdsSeen:
    """The custom_ids so far, on disk, so that the memory does not grow with the rows.

    Rows in batch format bring their own custom_ids: two equal ones cannot be told apart in the responses.
    """

    def __init__(self) -> None:
        # An empty name is a temporary file of SQLite's own, which is gone with the process, however that ends.
        self._ids = sqlite3.connect("", isolation_level=None)
        # What a crash leaves of it is worthless: no journal, no fsync.
        self._ids.execute("PRAGMA journal_mode = OFF")
        self._ids.execute("PRAGMA synchronous = OFF")
        self._ids.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")

    def update(self, ids: Iterable[str]) -> None:
        try:
            self._ids.execute("BEGIN")
            self._ids.executemany("INSERT OR IGNORE INTO ids VALUES (?, NULL)", ((one,) for one in ids))
            self._ids.execute("COMMIT")
        except sqlite3.OperationalError as exc:
            raise _no_room(exc) from exc

    def check(self, row: Row, done: Converted) -> Converted:
        """`done`, or its rejection where an earlier row has the same custom_id."""
        if done.request is None:
            return done
        try:
            cursor = self._ids.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (done.custom_id, row.line))
        except sqlite3.OperationalError as exc:
            raise _no_room(exc) from exc
        if cursor.rowcount:
            return done
        from batchkit.conversion import Converted

        (line,) = self._ids.execute("SELECT line FROM ids WHERE id = ?", (done.custom_id,)).fetchone()
        where = f"line {line}" if line is not None else "an earlier line"
        message = f"custom_id {done.custom_id!r} is that of {where} already"
        return Converted(make_custom_id(row.position, row.raw), None, "duplicate", message, names=done.names)


def _no_room(exc: sqlite3.OperationalError) -> StorageError:
    return StorageError(
        f"the temporary file of custom_ids cannot be written: {exc}",
        hint="free some disk space where temporary files go (SQLITE_TMPDIR or TMPDIR names another place)",
    )


def request_views(run: Run, seal: Seal, rows: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
    """As `request_lines`, without line feeds and without a copy: parts of the file as it is mapped into memory. The
    file is checked before the first line."""
    path = _requests_there(run, seal)
    with open(path, "rb") as stream:
        if not seal.requests_bytes or os.fstat(stream.fileno()).st_size != seal.requests_bytes:
            raise _not_as_sealed(path)
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)  # closed when the last view of it is gone
    view = memoryview(mapped)
    if xxhash.xxh3_128_hexdigest(view) != seal.requests_checksum:
        raise _not_as_sealed(path)
    wanted, start = _wanted(seal, rows), 0
    for is_wanted in wanted:
        end = mapped.find(b"\n", start)
        if is_wanted:
            yield view[start:end]
        start = end + 1


def request_lines(run: Run, seal: Seal, rows: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """The lines of some rows of a shard, with their line feeds. Raises `RunError`, behind the last one at the latest,
    where the file is not the one that was sealed."""
    path, digest = _requests_there(run, seal), xxhash.xxh3_128()
    wanted = _wanted(seal, rows)
    with open_read(str(path)) as stream:
        for line in stream:
            digest.update(line)
            if next(wanted, False):
                yield line
    if digest.hexdigest() != seal.requests_checksum:
        raise _not_as_sealed(path)


def _requests_there(run: Run, seal: Seal) -> Path:
    path = run.requests_path(seal.shard)
    if run.bytes_of(path) is None:
        raise RunError(f"{shown(path)}: is missing", hint=PREPARE_AGAIN)
    return run.fetch(path)


def _wanted(seal: Seal, rows: Sequence[tuple[int, int]]) -> Iterator[bool]:
    """For each request line of a shard, whether its row is in one of the ranges `rows`."""
    positions = {position for start, end in rows for position in range(start, end)}
    return (position in positions for position in seal.asking)


def _not_as_sealed(path: Path) -> RunError:
    return RunError(
        f"{shown(path)}: is not what prepare wrote: its checksum differs",
        hint=f"delete {shown(path.with_suffix('.json'))} and prepare again: it makes the shard anew",
    )
