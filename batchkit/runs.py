"""The run directory: the only state that batchkit has. Its layout is in docs/architecture.md.

Whole files are written aside and renamed. `rows/` and `requests/` can be made again and are guarded by checksums;
`jobs/` and `responses/` cannot and are fsynced. What stands in its files is in `manifests` and `jobs`.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from batchkit import leases, mirrors, s3, storage
from batchkit.errors import RunError, StorageError
from batchkit.jobs import Job
from batchkit.manifests import FORMAT, PREPARE_AGAIN, Manifest, Prepared, Seal, as_json, now, read
from batchkit.storage import open_read, read_lines, write_whole
from batchkit.wording import counted

FOLDERS = ("rows", "requests", "jobs", "responses")

LOOK_SECONDS = 10.0
SETTLED_NS = 2_000_000_000
"""A folder that was changed less than this ago may be changed again without its time showing it."""

_RESPONSES = re.compile(r"(\d{5}|[1-9]\d{5,})\.(\d+)\.jsonl")


class Run:
    """A run directory. Make one with `Run.create`, open one with `Run.open`.

    `path` is local; for a run in a bucket it is the working copy, and `name` the run's URI.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.name = storage.shown(path)
        self.manifest = manifest
        self._mirror = mirrors.of(path)
        self._looked = 0.0
        self._listed: tuple[int, dict[int, list[tuple[int, Path]]]] | None = None

    # -- the directory -------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> Run:
        """Make the directory and write its manifest; where there is a run already, open that one, as it is.

        Raises `RunError` where the path holds something else.
        """
        root = _root(path)
        mirror = mirrors.of(root)
        taken = mirror.refresh() if mirror is not None else root.is_dir() and not all(map(_is_begun, root.iterdir()))
        if (root / "manifest.json").is_file():
            return cls._opened(root)
        if root.is_file() or taken:
            raise RunError(
                f"{storage.shown(root)}: exists and is not a run directory", hint="name a new directory for the run"
            )
        try:
            for folder in FOLDERS:
                (root / folder).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StorageError(f"{root}: cannot be made: {exc.strerror or exc}") from exc
        with leases.hold(
            root, "prepare"
        ):  # two at once must not both write: the shards of one, the manifest of the other
            if (root / "manifest.json").is_file():
                return cls._opened(root)
            with write_whole(root / "manifest.json", durable=True) as stream:
                stream.write(as_json(manifest))
        return cls(root, manifest)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open an existing run. Raises `RunError` where there is none, or one of another version."""
        root = _root(path)
        mirror = mirrors.of(root)
        if mirror is not None:
            mirror.refresh()
        return cls._opened(root)

    @classmethod
    def _opened(cls, root: Path) -> Run:
        manifest_path = root / "manifest.json"
        if not manifest_path.is_file():
            name = storage.shown(root)
            raise RunError(
                f"{name}: not a run directory (it has no manifest.json)",
                hint=f"batchkit prepare TASKS {name} --model MODEL",
            )
        found = read(manifest_path, dict[str, Any])
        if found.get("format") != FORMAT:
            raise RunError(
                f"{storage.shown(manifest_path)}: format {found.get('format')!r}, "
                f"but this batchkit reads format {FORMAT}",
                hint="use the batchkit version that made the run",
            )
        with contextlib.suppress(OSError):  # a run may be read where it cannot be written
            for folder in FOLDERS:  # empty ones get lost on the way through git, zip or S3
                (root / folder).mkdir(exist_ok=True)
        return cls(root, read(manifest_path, Manifest))

    @classmethod
    def exists(cls, path: str | Path) -> bool:
        root = _root(path)
        mirror = mirrors.of(root)
        if mirror is not None:
            mirror.refresh()
        return (root / "manifest.json").is_file()

    def refresh(self) -> None:
        """Take over what other machines have written since; nothing to do for a local run."""
        if self._mirror is not None:
            self._mirror.refresh()

    def fetch(self, path: Path) -> Path:
        """A file of rows, ids or requests, made sure to be here where the run is in a bucket."""
        if self._mirror is not None:
            self._mirror.fetch(path)
        return path

    def leave_requests(self, shard: int) -> None:
        """Let go of the local copy of a shard's requests, where the run is in a bucket: they are its largest part."""
        self.leave(self.requests_path(shard))

    def leave(self, path: Path) -> None:
        """Let go of the local copy of a file, where the run is in a bucket."""
        if self._mirror is not None:
            self._mirror.leave(path)

    def version_of(self, path: Path) -> str | None:
        """Differs where the file was written anew, when the run was opened or refreshed; None where there is none."""
        if self._mirror is not None:
            return self._mirror.version_of(path)
        with contextlib.suppress(OSError):
            found = path.stat()
            return f"{found.st_size}-{found.st_mtime_ns}"
        return None

    def bytes_of(self, path: Path) -> int | None:
        """The size of a file of the run, which need not be here; None where there is none."""
        if self._mirror is not None:
            return self._mirror.bytes_of(path)
        with contextlib.suppress(OSError):
            return path.stat().st_size
        return None

    # -- what prepare writes -------------------------------------------------------------------------------------

    def rows_path(self, shard: int) -> Path:
        """The rows of a shard, verbatim, one a line."""
        return self.path / "rows" / f"{shard:05d}.jsonl"

    def ids_path(self, shard: int) -> Path:
        """The custom_ids of a shard's rows, one a line, in the order of `rows_path`, rejected rows too."""
        return self.path / f"rows/{shard:05d}.ids"

    def requests_path(self, shard: int) -> Path:
        """The requests of a shard, in row order, without the rejected rows."""
        return self.path / "requests" / f"{shard:05d}.jsonl"

    def seal_path(self, shard: int) -> Path:
        return self.path / f"requests/{shard:05d}.json"

    def write_seal(self, seal: Seal) -> None:
        with write_whole(self.seal_path(seal.shard)) as stream:
            stream.write(as_json(seal))

    def seals(self) -> Iterator[Seal]:
        """The sealed shards, in order. Raises `RunError` where one is damaged, or lost of a finished preparation."""
        prepared = self.prepared()
        shard, end = 0, None
        while (path := self.seal_path(shard)).exists():
            seal = read(path, Seal, hint=PREPARE_AGAIN)
            if end is not None and seal.start != end:
                raise RunError(
                    f"{storage.shown(path)}: begins at row {seal.start}, not {end}: it is damaged", hint=PREPARE_AGAIN
                )
            yield seal
            shard, end = shard + 1, seal.end
        if prepared is not None and shard < prepared.shards:
            raise RunError(
                f"{storage.shown(path)}: is missing, of {counted(prepared.shards, 'shard')}", hint=PREPARE_AGAIN
            )

    def seal(self, shard: int) -> Seal | None:
        """The seal of one shard; None where it has none that can be read."""
        with contextlib.suppress(RunError):
            return read(self.seal_path(shard), Seal)
        return None

    def read_ids(self, seal: Seal) -> list[str]:
        """The custom_ids of the shard's rows: `ids[i]` is that of position `seal.start + i`."""
        with open_read(str(self.fetch(self.ids_path(seal.shard)))) as stream:
            ids = [line.decode("utf-8") for line in read_lines(stream)]
        if len(ids) != seal.end - seal.start:
            raise RunError(
                f"{storage.shown(self.ids_path(seal.shard))}: {len(ids)} ids for {seal.end - seal.start} rows: "
                "the file is damaged",
                hint="restore the file from a copy of the run",
            )
        return ids

    def write_prepared(self, prepared: Prepared) -> None:
        with write_whole(self.path / "prepared.json", durable=True) as stream:
            stream.write(as_json(prepared))

    def prepared(self) -> Prepared | None:
        """The totals, or None while `prepare` has not finished."""
        path = self.path / "prepared.json"
        return read(path, Prepared) if path.exists() else None

    # -- what submit writes --------------------------------------------------------------------------------------

    def job_path(self, shard: int) -> Path:
        return self.path / f"jobs/{shard:05d}.json"

    def job(self, shard: int) -> Job:
        """The shard's attempts so far: an empty job where it was never sent."""
        path = self.job_path(shard)
        return read(path, Job) if path.exists() else Job(shard=shard)

    def next_attempt(self, shard: int) -> int:
        """A number that no attempt at the shard, and no file of responses, bears yet."""
        numbers = [attempt.number for attempt in self.job(shard).attempts]
        numbers += [number for number, _ in self.responses_paths(shard)]
        return max(numbers, default=0) + 1

    def write_job(self, job: Job) -> None:
        with write_whole(self.job_path(job.shard), durable=True) as stream:
            stream.write(as_json(job))

    def cancel(self) -> None:
        """Tell a `submit` that waits, here or elsewhere, to send nothing more."""
        with write_whole(self.path / "cancelled") as stream:
            stream.write(now().encode() + b"\n")

    def last_cancel(self) -> bytes:
        """Differs after each `cancel`; one on another machine is noticed within `LOOK_SECONDS`."""
        path = self.path / "cancelled"
        if self._mirror is not None and time.monotonic() - self._looked > LOOK_SECONDS:
            self._mirror.look_again(path)
            self._looked = time.monotonic()
        try:
            return path.read_bytes()
        except OSError:
            return b""

    def was_sent(self) -> bool:
        """Whether any request was ever handed to a backend, or was about to be. Answers of another run were not."""
        return any(self.was_shard_sent(int(path.stem)) for path in (self.path / "jobs").glob("[0-9]*.json"))

    def was_shard_sent(self, shard: int) -> bool:
        """The same of one shard: it has a job, and not of answers of another run alone."""
        attempts = self.job(shard).attempts
        reused = len(attempts) > 0 and all(attempt.reused_from is not None for attempt in attempts)
        return self.job_path(shard).exists() and not reused

    def responses_path(self, shard: int, attempt: int) -> Path:
        return self.path / "responses" / f"{shard:05d}.{attempt}.jsonl"

    def responses_paths(self, shard: int) -> list[tuple[int, Path]]:
        """The shard's response files with their attempt numbers, in the order of the attempts."""
        if self._mirror is not None:
            self._mirror.fetch_responses(f"{shard:05d}")
        folder = self.path / "responses"
        changed = _changed(folder)
        if time.time_ns() - changed < SETTLED_NS:
            return _response_files(folder, f"{shard:05d}.").get(shard, [])
        if self._listed is None or self._listed[0] != changed:
            self._listed = changed, _response_files(folder)
        return list(self._listed[1].get(shard, ()))

    def responses_versions(self) -> dict[int, list[str]]:
        """For each shard that has any, its response files and what differs where one is written anew or grows. Nothing
        is fetched where the run is in a bucket."""
        if self._mirror is not None:
            versions = self._mirror.responses_versions()
        else:
            files = _response_files(self.path / "responses").values()
            versions = [(path.name, self.version_of(path) or "") for some in files for _, path in some]
        found: dict[int, list[str]] = {}
        for name, version in sorted(versions):
            if match := _RESPONSES.match(name):  # in a bucket there may be parts of files
                found.setdefault(int(match[1]), []).append(f"{name} {version}")
        return found

    @property
    def counts_path(self) -> Path:
        """What `counts` remembers."""
        return self.path / "counts.json"

    def engine_path(self, session: str) -> Path:
        """The folder of one engine start: its input, output and log, and who runs it."""
        return self.path / "engine" / session

    def lease(self, name: str) -> AbstractContextManager[None]:
        """Hold `name` (`prepare`, `merge`, or a shard's number) until the block ends or this process dies.

        Raises `RunBusyError`, which says who holds it, at once.
        """
        return leases.hold(self.path, name)


def _root(path: str | Path) -> Path:
    if s3.is_s3(path):
        return mirrors.at(str(path)).root
    if "://" in str(path):
        raise RunError(
            f"{path}: a run is a local directory or in a bucket", hint="name a directory, or s3://BUCKET/RUN"
        )
    return Path(path).expanduser()


def _is_begun(entry: Path) -> bool:
    """Whether a directory with this in it may be what a `create` that was stopped before the manifest has left."""
    if entry.name in FOLDERS:
        return entry.is_dir() and not any(entry.iterdir())
    return entry.name == "leases" or entry.name.startswith(".manifest.json.")


def _changed(folder: Path) -> int:
    """When a name in it was made or removed last, in ns; 0 where it is not there."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _response_files(folder: Path, beginning: str = "") -> dict[int, list[tuple[int, Path]]]:
    """For each shard its response files with their attempt numbers, in order; only those with this `beginning`."""
    found: dict[int, list[tuple[int, Path]]] = {}
    try:
        names = [name for name in os.listdir(folder) if name.startswith(beginning)]  # noqa: PTH208  # names are enough
    except FileNotFoundError:
        return {}
    except OSError as exc:  # never to be taken for an empty folder: what is in it was paid for
        raise StorageError(f"{storage.shown(folder)}: cannot be read: {exc.strerror or exc}") from exc
    for name in names:
        if match := _RESPONSES.fullmatch(name):
            found.setdefault(int(match[1]), []).append((int(match[2]), folder / name))
    return {shard: sorted(files) for shard, files in found.items()}
