"""Engines as processes: started so that they can never outlive us, known again by a later process, ended whole.

A process is known by its number and its kernel start time, since numbers are used again. See `keeper` for how an
engine is ended when batchkit itself is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from batchkit import keeper
from batchkit.errors import EngineError, StorageError
from batchkit.keeper import end_session, members, start_time

GRACE_SECONDS = 1.0
START_SECONDS = 30.0
SOCKET_FOLDER_LENGTH = 60
"""A Unix socket's path has at most 107 bytes, and engines put names of 36 and more into the folder."""


MARK = "BATCHKIT_ENGINE"
"""A variable in the environment of all of an engine's processes: its scratch folder."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What tells an engine from every other process, ever. `scratch` is its folder for sockets."""

    pid: int
    started: str
    command: list[str]
    scratch: str


class Engine:
    """A running engine: its main process and whatever that started. Made by `start`."""

    def __init__(self, kept: subprocess.Popen[bytes], pid: int, scratch: Path) -> None:
        self._kept = kept
        self._scratch = scratch
        self._said = b""
        self._code: int | None = None
        self.pid = pid
        self.cause: None = None  # its log says it

    def poll(self, seconds: float = 0.0) -> int | None:
        """The exit code once every process of the engine has ended (negative: the signal), None while it runs.

        Waits up to `seconds` for the end.
        """
        if self._code is None and (message := self._hear(seconds)) is not None:
            # A keeper that ended without a word was killed: then the engine is ours to end.
            self._code = message.get("exit", -9) if message else self._end_alone()
            self._kept.wait()
            self._close()
        return self._code

    def stop(self) -> int:
        """End the engine, whole. Returns its exit code."""
        if self._kept.stdin is not None:
            with contextlib.suppress(OSError):
                self._kept.stdin.close()
        code = self.poll(GRACE_SECONDS + 2 * keeper.KILL_SECONDS)
        if code is None:
            self._kept.kill()
            code = self.poll(GRACE_SECONDS)
        return -9 if code is None else code

    def _hear(self, seconds: float) -> dict[str, Any] | None:
        """The keeper's next message: empty when it has closed its output, None when nothing came in time."""
        assert self._kept.stdout is not None  # noqa: S101  # started with a pipe
        deadline = time.monotonic() + seconds
        while b"\n" not in self._said:
            if not select.select([self._kept.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            piece = os.read(self._kept.stdout.fileno(), 4096)
            if not piece:
                return {}
            self._said += piece
        line, _, self._said = self._said.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _end_alone(self) -> int:
        end_session(self.pid, GRACE_SECONDS)
        shutil.rmtree(self._scratch, ignore_errors=True)
        return -9

    def _close(self) -> None:
        for stream in (self._kept.stdin, self._kept.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def start(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    identity: Path,
    scratch: Path,
    orphan: Path | None = None,
) -> Engine:
    """Start `command` in a session of its own, with its output appended to `log`.

    When this returns, `identity` is on the disk. The engine ends when `stop` is called or this process ends, however
    that comes about; `scratch` is removed then. `orphan`, a folder, is for a process whose own children are killed
    before it is (a Ray actor's): the keeper is none of them, and removes the folder when this process dies. Raises
    `StorageError` where `identity` cannot be written.
    """
    kept = subprocess.Popen(
        [sys.executable, "-I", "-S", keeper.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    engine = Engine(kept, 0, scratch)
    spec = {
        "command": list(command),
        "environment": {**environment, MARK: str(scratch)},
        "log": str(log),
        "identity": str(identity),
        "scratch": str(scratch),
        "parent": os.getpid(),
        "parent_started": start_time(os.getpid()),
        "orphan": str(orphan) if orphan is not None else None,
        "grace": GRACE_SECONDS,
    }
    try:
        assert kept.stdin is not None  # noqa: S101  # started with a pipe
        with contextlib.suppress(BrokenPipeError):  # the answer will say it
            kept.stdin.write(json.dumps(spec).encode() + b"\n")
            kept.stdin.flush()
        answer = engine._hear(START_SECONDS)  # noqa: SLF001  # ours
    except BaseException:
        engine.stop()
        raise
    if not answer or "pid" not in answer:
        engine.stop()
        if answer and "error" in answer:
            raise StorageError(f"the engine's identity cannot be written: {answer['error']}")
        raise EngineError("the engine could not be started: its keeper did not answer")
    engine.pid = answer["pid"]
    return engine


def read_identity(path: Path) -> Identity | None:
    """The identity on disk, or None where no engine was started or the file is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Identity)
    except (OSError, msgspec.DecodeError):
        return None


def end_left_over(identity: Identity) -> bool:
    """End what is left of an engine whose batchkit has died. Returns whether there was anything to end.

    Never touches another process: where the main process is gone and its number was given to another, the whole
    session had ended, for the kernel gives away no number that a session still bears.
    """
    found = start_time(identity.pid)
    left = members(identity.pid) if found in (None, identity.started) else []
    if found is None and not any(_bears(pid, identity) for pid in left):
        left = []
    if left:
        end_session(identity.pid, GRACE_SECONDS)
    shutil.rmtree(identity.scratch, ignore_errors=True)
    return bool(left)


def _bears(pid: int, identity: Identity) -> bool:
    """Whether a process was started with the engine's mark, and so its session too.

    Not every member shows it: a process that gives itself a title, as vLLM's do, overwrites its environment.
    """
    try:
        return f"{MARK}={identity.scratch}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def make_scratch() -> Path:
    """A new folder for an engine's sockets, with a path short enough for them."""
    folder = Path(tempfile.mkdtemp(prefix="bkit-"))
    if len(str(folder).encode()) <= SOCKET_FOLDER_LENGTH:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="bkit-", dir="/tmp"))
