"""Answers of other runs, written into a run as attempts of its own: a run needs nothing outside itself.

The order of the durable steps is: the requests of the shard are in place → the responses are in `responses/`, fsynced →
the attempts are in the job, `collected` → the shard is sealed. Before its seal nobody sends anything of a shard; a kill
at any point leaves what the next `prepare` finds as it should be, or writes again.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import msgspec
import xxhash

from batchkit.errors import InputError, RunError
from batchkit.jobs import Attempt, Job
from batchkit.manifests import Seal, as_ranges, now
from batchkit.runs import Run
from batchkit.storage import open_read, remove, write_whole

_MOST_OPEN = 8
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


class Answer(NamedTuple):
    """Where an answer is: a line in the responses of the run `run`, whose request `backend` has answered."""

    run: str
    backend: str
    path: Path
    offset: int
    length: int
    checksum: int


class Taken(NamedTuple):
    """A row whose request another run has answered."""

    position: int
    custom_id: str
    answer: Answer


def checksum(line: bytes) -> int:
    """Of a response line; fits into a signed integer of 64 bits."""
    return xxhash.xxh3_64_intdigest(line) >> 1


def reused_in(run: Run, shard: int) -> dict[str, int]:
    """How many answers of a shard were taken over, by the run that they are from."""
    counts: Counter[str] = Counter()
    for attempt in run.job(shard).attempts:
        if attempt.reused_from is not None:
            counts[attempt.reused_from] += sum(end - start for start, end in attempt.rows)
    return dict(counts)


def as_it_stands(run: Run, seal: Seal) -> Seal:
    """The seal with the answers that are there still: `--no-resume` throws away what was taken over, too."""
    if not seal.reused:
        return seal
    there = reused_in(run, seal.shard)
    return msgspec.structs.replace(seal, reused=there, tokens_to_send=seal.tokens_to_send if there else None)


def standing(run: Run, seal: Seal) -> bool:
    """Whether the answers that a shard has stay as they are when it is made again: it was sent, or its requests are
    what they were when other answers were taken over. To be asked before the requests are replaced."""
    if not run.job_path(seal.shard).exists():
        return False
    return (
        run.was_shard_sent(seal.shard)
        or _file_checksum(run.fetch(run.requests_path(seal.shard))) == seal.requests_checksum
    )


def take_over(run: Run, seal: Seal, taken: Sequence[Taken], *, keep: bool) -> Seal:
    """Write the answers of other runs to the requests of a shard that is about to be sealed. Returns the seal, which
    counts them. With `keep` there are answers that stay.

    Raises `RunError` where another run has changed since its answers were looked up.
    """
    if not taken and not run.job_path(seal.shard).exists():
        return seal
    with run.lease(f"{seal.shard:05d}"):
        _sweep(run, seal.shard)
        if not keep:
            _clear(run, seal.shard)
            _write(run, seal.shard, taken)
    return msgspec.structs.replace(seal, reused=reused_in(run, seal.shard))


def clear_behind(run: Run, shards: int) -> None:
    """Remove what was taken over for shards that there are no more: changed images may move the cuts."""
    numbers = {int(path.stem) for path in run.job_path(0).parent.glob("[0-9]*.json")}
    for shard in sorted(number for number in numbers if number >= shards):
        if not run.was_shard_sent(shard):
            _clear(run, shard)


def _sweep(run: Run, shard: int) -> None:
    """Remove what a killed process wrote aside for a shard whose lease is held."""
    for folder in (run.responses_path(shard, 1).parent, run.job_path(shard).parent):
        for aside in folder.glob(f".{shard:05d}.*.tmp"):
            aside.unlink(missing_ok=True)


def _clear(run: Run, shard: int) -> None:
    """Remove the answers that were taken over for a shard that is not sent, also of a process that was killed before
    it had written the job."""
    numbers = {attempt.number for attempt in run.job(shard).attempts}
    for number, path in run.responses_paths(shard):
        if number in numbers or run.seal(shard) is None:
            remove(path)
    remove(run.job_path(shard))


def _write(run: Run, shard: int, taken: Sequence[Taken]) -> None:
    groups: dict[tuple[str, str], list[Taken]] = {}
    for entry in taken:
        groups.setdefault((entry.answer.run, entry.answer.backend), []).append(entry)
    job = Job(shard=shard, attempts=[])
    with _Lines() as lines:
        for number, ((source, backend), entries) in enumerate(groups.items(), start=1):
            started = now()
            with write_whole(run.responses_path(shard, number), durable=True) as stream:
                for entry in entries:
                    stream.write(rename(lines.read(entry.answer), entry.custom_id) + b"\n")
            job.attempts.append(
                Attempt(
                    number=number,
                    backend=backend,
                    state="collected",
                    rows=as_ranges(entry.position for entry in entries),
                    started=started,
                    ended=now(),
                    reused_from=source,
                )
            )
    if job.attempts:
        run.write_job(job)


def rename(line: bytes, custom_id: str) -> bytes:
    """A response line under another custom_id; all other values keep their bytes."""
    try:
        fields: dict[str, Any] = _decode_fields(line)
    except (msgspec.DecodeError, UnicodeDecodeError):  # NaN, half a surrogate pair: what `responses` reads all the same
        fields = json.loads(line.decode("utf-8", "replace").lstrip("\ufeff"))
        fields["custom_id" if "custom_id" in fields else "key"] = custom_id
        return json.dumps(fields).encode()
    fields["custom_id" if "custom_id" in fields else "key"] = msgspec.Raw(_encode(custom_id))
    return _encode(fields)


class _Lines:
    """Reads lines of responses by their places; keeps a few files open."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._open: dict[Path, BinaryIO] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, answer: Answer) -> bytes:
        try:
            stream = self._stream(answer.path)
            stream.seek(answer.offset)
            line = stream.read(answer.length)
        except (OSError, InputError) as exc:
            raise _changed(answer.path) from exc
        if checksum(line) != answer.checksum:
            raise _changed(answer.path)
        return line

    def _stream(self, path: Path) -> BinaryIO:
        if path not in self._open:
            if len(self._open) == _MOST_OPEN:
                self._stack.close()
                self._open.clear()
            self._open[path] = self._stack.enter_context(open_read(str(path)))
        return self._open[path]


def _changed(path: Path) -> RunError:
    return RunError(f"{path}: changed while its answers were taken over", hint="run the same command again")


def _file_checksum(path: Path) -> str | None:
    digest = xxhash.xxh3_128()
    try:
        with open(path, "rb") as stream:
            for block in _blocks(stream):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def _blocks(stream: BinaryIO) -> Iterable[bytes]:
    return iter(lambda: stream.read(1 << 20), b"")
