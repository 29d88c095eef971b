"""The requests of one `submit` through live servers: each response is on the disk soon after it came.

The durable steps of a shard: the attempt is in the job as `running` → whole lines are appended to
`responses/NNNNN.A.jsonl`, each in one write, and brought to the disk once a second → the attempt is `collected`. An
attempt that is found `running` while nobody holds its shard was killed: a torn last line is cut off, what is there
stays, the rest is sent again.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec

from batchkit.client import Call, Reply
from batchkit.errors import StorageError
from batchkit.jobs import OVER, Attempt
from batchkit.manifests import Seal, now
from batchkit.measures import request_tokens
from batchkit.parcels import is_foreign
from batchkit.progress import Progress
from batchkit.queues import Queue
from batchkit.reports import SubmitReport
from batchkit.resolving import Resolved, Resolver, fault_line
from batchkit.responses import ANSWERS, UnreadableLine, decode, parse
from batchkit.runs import Run
from batchkit.shardfiles import request_views
from batchkit.signatures import hide_bytes
from batchkit.storage import cut_torn_line, grew, settle, sync_folder
from batchkit.work import Leases

SYNC_SECONDS = 1.0


class _Line(msgspec.Struct):
    custom_id: str
    url: str
    body: msgspec.Raw


class _Head(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: str
    method: str
    url: str


HEAD_BYTES = 512
"""What stands before the body in lines that batchkit made fits into it."""

_decode_head = msgspec.json.Decoder(_Head).decode
_decode = msgspec.json.Decoder(_Line).decode
_check = msgspec.json.Decoder(msgspec.Raw).decode
_encode = msgspec.json.Encoder().encode


class _Open(msgspec.Struct):
    """A shard of which requests are under way."""

    seal: Seal
    attempt: Attempt
    stream: IO[bytes]
    left: int
    size: int
    dirty: bool = False

    def append(self, line: bytes) -> None:
        """All of it or, on a full disk, nothing. Raises `StorageError`."""
        descriptor = self.stream.fileno()
        try:
            written = os.write(descriptor, line)
            while written < len(line):
                written += os.write(descriptor, line[written:])
        except OSError as exc:
            os.ftruncate(descriptor, self.size)
            raise _not_written(self.stream.name, exc) from exc
        self.size += len(line)
        self.dirty = True

    def sync(self) -> None:
        """Bring it to the disk. Raises `StorageError`."""
        try:
            os.fsync(self.stream.fileno())
        except OSError as exc:
            raise _not_written(self.stream.name, exc) from exc
        self.dirty = False
        grew(Path(str(self.stream.name)))


def _not_written(path: str | Path, exc: OSError) -> StorageError:
    return StorageError(
        f"{path}: cannot be written: {exc.strerror or exc}",
        hint="free some disk space and run the same command again: it goes on where it stopped",
    )


class Live:
    """The shards of one `submit` while their requests are at servers. `backend` is how results name who answered,
    `total` what the progress was told of."""

    def __init__(
        self,
        run: Run,
        queue: Queue,
        *,
        backend: str,
        leases: Leases,
        report: SubmitReport,
        progress: Progress,
        count_tokens: bool = False,
        resolver: Resolver | None = None,
    ) -> None:
        self._run = run
        self._queue = queue
        self._backend = backend
        self._leases = leases
        self._report = report
        self._progress = progress
        self._count_tokens = count_tokens
        self._resolver = resolver
        self._foreign = is_foreign(run)
        self._open: dict[tuple[int, int], _Open] = {}
        self._synced = time.monotonic()
        self._tokens = 0
        self._planned = 0
        self.total = 0

    def calls(self) -> Iterator[Call | None]:
        """All that is due, read as it is asked for; keys are (shard, attempt, custom_id). None: nothing yet."""
        while (parcel := self._queue.first()) is not None or self._queue.may_grow:
            if parcel is None:
                if not self._open:
                    self._progress.update(0, note=self._queue.idle())
                yield None
                continue
            seal, rows = parcel.seal, parcel.seal.ranges(parcel.positions)
            self._queue.remove_first(parcel)
            lines = self._lines(seal, rows)
            first = next(lines)  # raises where the file is not what was sealed, before anything is sent of it
            number = self._begin(seal, rows, len(parcel.positions))
            self._planned += len(parcel.positions)
            if self._planned > self.total:  # of shards that were not there when it began
                self.total = self._planned
                self._progress.grow(self.total)
            for line in itertools.chain([first], lines):
                if line is None:
                    yield None
                elif isinstance(line, Resolved):
                    self._give_up(seal, number, line)
                else:
                    yield self._call(seal.shard, number, line)

    def _lines(self, seal: Seal, rows: Sequence[tuple[int, int]]) -> Iterator[memoryview | Resolved | None]:
        """The requests of these rows; None where the next one waits for its images, `Resolved` where these cannot be
        had."""
        if self._resolver is None:
            yield from request_views(self._run, seal, rows)
            return
        for resolved in self._resolver.lines_as_they_come(seal, rows):
            yield resolved if resolved is None or resolved.fault is not None else memoryview(resolved.line)

    def _call(self, shard: int, number: int, line: memoryview) -> Call:
        custom_id, url, body = _split(line, foreign=self._foreign)
        tokens = self._tokens_of(bytes(line)) if self._count_tokens else 0
        self._report.sent += 1
        return Call((shard, number, custom_id), url, body, tokens)

    def _give_up(self, seal: Seal, number: int, resolved: Resolved) -> None:
        """Keep that a request cannot be sent."""
        assert resolved.fault is not None  # noqa: S101  # it says why
        custom_id = self._run.read_ids(seal)[resolved.position - seal.start]
        self._keep(self._open[seal.shard, number], fault_line(custom_id, resolved.fault))

    def _tokens_of(self, line: bytes) -> int:
        tokens = request_tokens(line, self._run.manifest.model)
        return tokens.text + (tokens.image or 0) + (tokens.max_output or 0)

    def _begin(self, seal: Seal, rows: Sequence[tuple[int, int]], count: int) -> int:
        job = self._run.job(seal.shard)
        attempt = Attempt(
            number=self._run.next_attempt(seal.shard),
            backend=self._backend,
            state="running",
            rows=list(rows),
            started=now(),
        )
        job.attempts.append(attempt)
        self._run.write_job(job)
        path = self._run.responses_path(seal.shard, attempt.number)
        try:
            stream = open(path, "ab", buffering=0)  # noqa: SIM115  # closed with the shard
        except OSError as exc:
            raise _not_written(path, exc) from exc
        sync_folder(path.parent)
        self._open[seal.shard, attempt.number] = _Open(seal, attempt, stream, count, stream.tell())
        return attempt.number

    def take(self, reply: Reply) -> None:
        """Keep a reply."""
        shard, number, custom_id = reply.key
        line = as_line(custom_id, reply)
        self._keep(self._open[shard, number], line if self._resolver is None else hide_bytes(line))

    def _keep(self, opened: _Open, line: bytes) -> None:
        opened.append(line)
        opened.left -= 1
        self._count(line)
        if opened.left == 0:
            self._close(opened, "collected")
        elif time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def _count(self, line: bytes) -> None:
        report = self._report
        try:
            response = parse(line)
        except UnreadableLine:  # cannot be: the line is ours
            return
        report.responses += 1
        report.passing += response.passing
        report.errors += response.verdict not in ANSWERS
        if response.usage is not None and isinstance(total := response.usage.get("total_tokens"), int):
            self._tokens += total
        note = f"{self._tokens:,} tokens" + (f", {report.errors:,} errors" if report.errors else "")
        self._progress.update(1, note=note)

    def sync(self) -> None:
        """Bring all that was written to the disk."""
        for opened in self._open.values():
            if opened.dirty:
                opened.sync()
        self._synced = time.monotonic()

    def stop(self) -> None:
        """Close what is open: the requests without a reply are pending again."""
        for opened in list(self._open.values()):
            self._close(opened, "died" if opened.left else "collected")

    def _close(self, opened: _Open, state: str) -> None:
        if not opened.stream.closed:  # a signal may have come between these steps
            opened.sync()
            opened.stream.close()
        settle(Path(str(opened.stream.name)))
        _end(self._run, opened.seal.shard, opened.attempt.number, died=state == "died")
        del self._open[opened.seal.shard, opened.attempt.number]
        self.release()

    def release(self) -> None:
        """Let go of the shards that nothing is done with any more."""
        self._leases.release_all_but({shard for shard, _ in self._open} | self._queue.shards)


def _split(line: memoryview, *, foreign: bool) -> tuple[str, str, memoryview]:
    """custom_id, url and body of a request line. In lines that batchkit made the body comes last, and is not parsed."""
    if foreign:
        request = _decode(line)
        return request.custom_id, request.url, memoryview(request.body)
    head = bytes(line[:HEAD_BYTES])
    cut = head.index(b',"body":{"model":')
    start = _decode_head(head[:cut] + b"}")
    return start.custom_id, start.url, line[cut + len(b',"body":') : -1]


def as_line(custom_id: str, reply: Reply) -> bytes:
    """A reply as a line of batch output, with its line feed. The server's JSON stays as it is but for line feeds, and
    for what JSON does not allow (NaN, a byte order mark): that is mended, for the answer may be whole."""
    if reply.status == 0:
        error = {"code": "no_answer", "message": f"{reply.message} (tried {reply.tries} times)"}
        line = {
            "custom_id": custom_id,
            "response": {"status_code": 0, "request_id": None, "body": None},
            "error": error,
        }
        return _encode(line) + b"\n"
    head = (
        b'{"id":null,"custom_id":' + _encode(custom_id) + b',"response":{"status_code":%d,"request_id":' % reply.status
    )
    body = reply.body.strip()
    try:
        _check(body)
        body = msgspec.json.format(body, indent=-1) if b"\n" in body or b"\r" in body else body
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        try:
            body = _encode(decode(body))
        except UnreadableLine:
            body = _encode({"error": {"message": body[:1000].decode("utf-8", "replace") or "an empty answer"}})
    return head + _encode(reply.request_id) + b',"body":' + body + b'},"error":null}\n'


def _end(run: Run, shard: int, number: int, *, died: bool) -> None:
    job = run.job(shard)
    for attempt in job.attempts:
        if attempt.number == number:
            attempt.state, attempt.ended = "died" if died else "collected", now()
            attempt.message = "stopped before all requests had a response" if died else None
    run.write_job(job)


def recover(run: Run, seals: Mapping[int, Seal], backends: frozenset[str], leases: Leases) -> int:
    """Close attempts whose batchkit has died; `leases` are taken for it, and let go. Returns how many there were."""
    count = 0
    for shard in seals:
        if _stale(run, shard, backends) and leases.try_hold(shard):
            for attempt in _stale(run, shard, backends):  # looked at again: it may have ended before we held the lease
                path = run.responses_path(shard, attempt.number)
                cut_torn_line(path)
                settle(path)
                _end(run, shard, attempt.number, died=True)
                count += 1
            leases.release_all_but(())
    return count


def _stale(run: Run, shard: int, backends: frozenset[str]) -> list[Attempt]:
    return [
        attempt
        for attempt in run.job(shard).attempts
        if attempt.backend in backends
        and attempt.state not in OVER
        and attempt.session is None
        and attempt.elsewhere is None
    ]
