"""Working copies of runs in a bucket: a local folder, of which every file that matters is in the bucket as well.

The bucket is the truth. What is written goes there before it gets its name here, so that a file here is never ahead.
Only responses stay here whatever becomes of their PUT, for they are paid for: what one that failed has left is put when
the shard is next worked on. What others have written comes here when the run is opened (manifest, seals, jobs: all
that is small), or when it is read (rows, requests, responses). A job is replaced only on the condition that it is the
one that was read: of two processes that both believe in their lease, one is told.

`engine/`, `servers/`, `uploads/` and `downloads/` are of the machine, and stay here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from batchkit import s3, storage
from batchkit.errors import BatchkitError, RunBusyError, StorageError
from batchkit.growth import PART, Growth
from batchkit.ledgers import FILE, Ledger
from batchkit.listings import Listing
from batchkit.s3 import ChangedError, Found
from batchkit.tenures import Tenure

LOCAL = frozenset({"engine", "servers", "uploads", "downloads", "leases"})
"""Folders that are of the machine."""

PULLS = 16
"""Objects that are fetched side by side."""

_SMALL = re.compile(r"manifest\.json|prepared\.json|counts\.json|cancelled|requests/[^/]+\.json|jobs/[^/]+\.json")
_mirrors: dict[tuple[int, Path], Mirror] = {}


def at(uri: str) -> Mirror:
    """The mirror of the run at `uri`: one for each process."""
    uri = uri.rstrip("/")
    root = _root(uri)
    key = os.getpid(), root
    if key not in _mirrors:
        _mirrors[key] = Mirror(uri, root)
        storage.follow(root, _mirrors[key])
    return _mirrors[key]


def of(path: Path) -> Mirror | None:
    """The mirror whose working copy `path` is."""
    return _mirrors.get((os.getpid(), path))


def _root(uri: str) -> Path:
    """The same for the same run at the same servers."""
    bucket, key = s3.split(uri)
    if not key:
        raise StorageError(f"{uri}: a run needs a name in the bucket", hint=f"{uri}/my-run")
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    digest = hashlib.blake2b(f"{server}\0{bucket}\0{key}".encode(), digest_size=6).hexdigest()
    if "BATCHKIT_WORK_DIR" in os.environ:
        folder = Path(os.environ["BATCHKIT_WORK_DIR"]).expanduser().absolute()
    else:
        import platformdirs

        folder = Path(platformdirs.user_cache_dir("batchkit")) / "runs"
    return folder / f"{key.rpartition('/')[2]}-{digest}"


class Mirror:
    """The working copy in `root` of the run at `uri`. Names are paths below both, with slashes."""

    def __init__(self, uri: str, root: Path) -> None:
        self.uri = uri
        self.root = root
        self._listing = Listing()
        self._refreshing = threading.Lock()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StorageError(f"{root}: cannot be made: {exc.strerror or exc}", hint="--work-dir DIR") from exc
        self._ledger = Ledger(root)
        self.tenure = Tenure(uri, self._ledger.copy)
        self._growth = Growth(self._where, self.tenure.check)

    # -- from the bucket ---------------------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Take over what others have written. Returns whether there is anything in the bucket."""
        known = self._ledger.all()  # before the list: what is known by now and not in the list is gone
        with self._refreshing:
            self._listing.relist(lambda: s3.listed(self.uri + "/"))
        if "manifest.json" in known and known["manifest.json"] != _etag(self._listing.get("manifest.json")):
            self._forget_all()  # another run bears the name now
            known = {}
        self._take_over(known, self._listing.all())
        return any(not name.startswith("leases/") for name in self._listing.names())

    def refresh_shard(self, shard: str) -> None:
        """The same of one shard's job and responses; its lease is held. What is paid for and not there yet is put."""
        prefixes = (f"jobs/{shard}.", f"responses/{shard}.")
        known = {name: etag for name, etag in self._ledger.all().items() if name.startswith(prefixes)}
        objects = [
            found._replace(name=prefix + found.name)
            for prefix in prefixes
            for found in s3.listed(f"{self.uri}/{prefix}")
        ]
        for name in (f"jobs/{shard}.json", *self._listing.responses(shard)):
            self._listing.remove(name)
        self._listing.update(objects)
        self._take_over(known, objects)
        self.fetch_responses(shard)
        for path in (self.root / "responses").glob(f"{shard}.*.jsonl"):
            # Not there, or there with less than here: what this machine had when it was stopped.
            if self._ledger.etag(self._name(path)) is None and not self._growth.has(self._name(path)):
                self.settle(path)

    def fetch(self, path: Path) -> None:
        """Have this file here, as it is in the bucket; where it is not there either, that is the reader's error."""
        name = self._name(path)
        found = self._listing.get(name)
        if found is not None and not (path.exists() and self._ledger.etag(name) == found.etag):
            self._pull(name)

    def fetch_responses(self, shard: str) -> None:
        """Have all responses of a shard here, also those that are still coming in elsewhere."""
        found = self._listing.responses(shard)
        parts: dict[str, list[Found]] = {}
        for name, piece in found.items():
            whole, cut, _ = name.partition(PART)
            if not cut:
                self.fetch(self.root / name)
            elif whole not in found:
                parts.setdefault(whole, []).append(piece)
        for name, pieces in parts.items():
            self._join(name, pieces)

    def leave(self, path: Path) -> None:
        """Have it in the bucket alone: it is not needed here for now."""
        name = self._name(path)
        found = self._listing.get(name)
        if found is not None:
            self._drop(name, found.etag)

    def bytes_of(self, path: Path) -> int | None:
        """The size of a file in the bucket; None where it is not there."""
        found = self._listing.get(self._name(path))
        return found.bytes if found is not None else None

    def version_of(self, path: Path) -> str | None:
        """The ETag of a file in the bucket; None where it is not there."""
        return _etag(self._listing.get(self._name(path)))

    def responses_versions(self) -> list[tuple[str, str]]:
        """The names of all response files with their ETags, of those too that are not here; and with size and time of
        what is here, where that is not as it is there: it grows, or was not put yet."""
        ledger = self._ledger.all()
        listed = {found.name: found for found in self._listing.all() if found.name.startswith("responses/")}
        versions = [(name.removeprefix("responses/"), found.etag) for name, found in listed.items()]
        for path in (self.root / "responses").glob("[0-9]*.jsonl"):
            name, size = self._name(path), path.stat()
            there = listed.get(name)
            same = there is not None and (ledger.get(name), size.st_size) == (there.etag, there.bytes)
            if not same or self._growth.has(name):
                versions.append((path.name, f"{size.st_size}-{size.st_mtime_ns}"))
        return versions

    def look_again(self, path: Path) -> None:
        """Have the file here as it is now: others may have written it since the run was opened."""
        name = self._name(path)
        found = next((found for found in s3.listed(self._where(name)) if not found.name), None)
        if found is not None and found.etag != self._ledger.etag(name):
            self._listing.add(found._replace(name=name))
            self._pull(name)

    def _take_over(self, known: dict[str, str], objects: Sequence[Found]) -> None:
        for name in known.keys() - {found.name for found in objects}:
            self._drop(name, known[name])
        small = []
        for name, etag, *_ in objects:
            if _SMALL.fullmatch(name):
                if known.get(name) != etag or not (self.root / name).exists():
                    small.append(name)
            elif known.get(name, etag) != etag:
                self._drop(name, known[name])  # it is fetched when it is read
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(PULLS, len(small) or 1)) as pool:
            for _ in pool.map(self._pull, small):
                pass

    def _pull(self, name: str) -> None:
        """Fetch an object; unless another process of this machine has written the file meanwhile."""
        before = self._ledger.etag(name)
        with self._aside(name) as aside:
            try:
                found = s3.download(self._where(name), aside)
            except s3.MissingError:
                self._listing.remove(name)
                return
            if name.startswith("responses/") and before is None and _goes_on(self.root / name, aside):
                return
            with contextlib.suppress(_OutrunError), self._ledger.recording(name, found.etag) as now:
                if now != before:
                    raise _OutrunError
                os.replace(aside, self.root / name)

    def _join(self, name: str, pieces: Sequence[Found]) -> None:
        """Make of its parts a file that grows elsewhere, or grew there until that machine was lost."""
        path = self.root / name
        if self._growth.has(name):
            return  # it grows here
        with self._aside(name) as aside, contextlib.suppress(s3.MissingError):  # it is whole by now
            for piece in pieces:
                s3.download(self._where(piece.name), aside, append=True)
            if not _begins_with(path, aside):  # else it grew here, or does, in another process: never to be replaced
                os.replace(aside, path)

    # -- to the bucket -----------------------------------------------------------------------------------------------

    def place(self, aside: Path, target: Path) -> None:
        name = self._name(target)
        if name.partition("/")[0] in LOCAL or "/." in f"/{name}":
            os.replace(aside, target)
            return
        self.tenure.check()
        try:
            etag = self._put(name, aside)
        except BatchkitError:
            if name.startswith("responses/"):
                os.replace(aside, target)
            raise
        with self._ledger.recording(name, etag):
            os.replace(aside, target)
        self._listing.add(Found(name, etag, target.stat().st_size))
        self._remove_parts(name)

    def remove(self, target: Path) -> None:
        self.tenure.check()
        name = self._name(target)
        self._remove_parts(name)
        s3.delete(self._where(name))
        with self._ledger.recording(name, None):
            target.unlink(missing_ok=True)
        self._listing.remove(name)

    def grew(self, target: Path) -> None:
        self._growth.grew(self._name(target), target)

    def settle(self, target: Path) -> None:
        self.tenure.check()
        name = self._name(target)
        if not target.exists():
            return
        self._growth.pause(name)
        etag = s3.put_file(self._where(name), target)
        with self._ledger.recording(name, etag):
            pass
        self._listing.add(Found(name, etag, target.stat().st_size))
        self._remove_parts(name)

    def _put(self, name: str, aside: Path) -> str:
        """Jobs and the manifest go only where nobody else has written meanwhile."""
        where = self._where(name)
        if not name.startswith("jobs/") and name != "manifest.json":
            return s3.put_file(where, aside)
        before = self._ledger.etag(name)
        try:
            return s3.put_file(where, aside, only_new=before is None, only_over=before)
        except (ChangedError, s3.MissingError) as exc:
            with contextlib.suppress(s3.MissingError):
                body, found = s3.get(where)
                if body == aside.read_bytes():  # the server has done it, and its answer was lost
                    return found.etag
            raise RunBusyError(
                f"{where}: another process has changed it", hint="wait for that to end, and run this again"
            ) from exc

    def names_below(self, folder: Path) -> list[str]:
        return [found.name for found in s3.listed(f"{self.uri}/{self._name(folder)}/")]

    # -- names -------------------------------------------------------------------------------------------------------

    def _remove_parts(self, name: str) -> None:
        """Of a file that is whole there now, or gone."""
        if name.startswith("responses/"):
            shard = name.removeprefix("responses/").partition(".")[0]
            listed = [known for known in self._listing.responses(shard) if known.startswith(name + PART)]
            for part in {*self._growth.stop(name), *listed}:
                s3.delete(self._where(part))
                self._listing.remove(part)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _where(self, name: str) -> str:
        return f"{self.uri}/{name}"

    @contextlib.contextmanager
    def _aside(self, name: str) -> Iterator[Path]:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            yield aside
        except OSError as exc:
            raise StorageError(
                f"{path}: cannot be written: {exc.strerror or exc}",
                hint="free some disk space, or --work-dir DIR",
            ) from exc
        finally:
            aside.unlink(missing_ok=True)

    def _drop(self, name: str, etag: str) -> None:
        """Remove a file that is not what is in the bucket, unless another process has just written it."""
        with contextlib.suppress(_OutrunError), self._ledger.recording(name, None) as now:
            if now != etag:
                raise _OutrunError
            (self.root / name).unlink(missing_ok=True)

    def _forget_all(self) -> None:
        for name in self._ledger.all():
            with self._ledger.recording(name, None):
                pass
        for entry in self.root.iterdir():
            if entry.is_dir() and entry.name != "leases":
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.is_file() and not entry.name.startswith(FILE):
                entry.unlink(missing_ok=True)


class _OutrunError(Exception):
    """Another process of this machine was here first."""


def _etag(found: Found | None) -> str | None:
    return found.etag if found is not None else None


def _goes_on(path: Path, known: Path) -> bool:
    """Whether the file holds all that `known` has, and more: what this machine had written when it was stopped."""
    return _begins_with(path, known) and path.stat().st_size > known.stat().st_size


def _begins_with(path: Path, known: Path) -> bool:
    if not path.exists() or path.stat().st_size < known.stat().st_size:
        return False
    with open(path, "rb") as longer, open(known, "rb") as shorter:
        while piece := shorter.read(1 << 20):
            if longer.read(len(piece)) != piece:
                return False
    return True
