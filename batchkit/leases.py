"""Leases: which process works on which part of a run. Two never work on one part.

The locks are the operating system's, so a holder that died blocks nobody. Beside each lock lies a file that says who
holds it. Of a run in a bucket the lock is that of the working copy, and a lease in the bucket keeps out other machines.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

from batchkit import mirrors
from batchkit.errors import RunBusyError, StorageError
from batchkit.storage import shown, write_whole


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a lease."""

    host: str
    pid: int
    since: str


@contextlib.contextmanager
def hold(run: Path, name: str) -> Iterator[None]:
    """Hold `name` (`prepare`, `merge`, or a shard's number) of the run until the block ends or this process dies.

    Raises `RunBusyError`, which says who holds it, at once, and `StorageError` where locks cannot be made.
    """
    import filelock

    folder = run / "leases"
    info = folder / f"{name}.json"
    try:
        folder.mkdir(exist_ok=True)
        lock = filelock.FileLock(folder / f"{name}.lock", timeout=0)
        lock.acquire()
    except filelock.Timeout as exc:
        raise RunBusyError(
            f"{shown(run)}: {_shown(name)} is held by {_holder(info)}",
            hint="wait for it to end, or stop it; run this again then",
        ) from exc
    except OSError as exc:
        raise StorageError(
            f"{folder}: cannot be locked: {exc.strerror or exc}",
            hint="ulimit -n 4096 allows more open files"
            if exc.errno == errno.EMFILE
            else "check who may write to the run directory",
        ) from exc
    try:
        with write_whole(info) as stream:
            since = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
            stream.write(msgspec.json.encode(Holder(host=socket.gethostname(), pid=os.getpid(), since=since)) + b"\n")
        with _held_everywhere(run, name):
            yield
    finally:
        info.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def _held_everywhere(run: Path, name: str) -> Iterator[None]:
    """Keep out other machines, too, where the run is in a bucket; what they have written is here when the block begins.

    Raises `RunBusyError`.
    """
    mirror = mirrors.of(run)
    if mirror is None:
        yield
        return
    mirror.tenure.take(name, _shown(name))
    try:
        if name.isdigit():
            mirror.refresh_shard(name)
        elif name == "prepare":
            mirror.refresh()
        yield
    finally:
        mirror.tenure.release(name)


def _holder(info: Path) -> str:
    with contextlib.suppress(OSError, msgspec.DecodeError):
        holder = msgspec.json.decode(info.read_bytes(), type=Holder)
        return f"process {holder.pid} on {holder.host}, since {holder.since}"
    return "another process"


def _shown(name: str) -> str:
    return f"shard {int(name)}" if name.isdigit() else f"the lease of {name}"
