"""Starts one engine, watches over it, and ends all of it: with batchkit, or when the engine's own main process ends.

It runs as a script, in a process and a session of its own (`python -I -S keeper.py`), so it needs nothing but the
standard library, and outlives a batchkit that is killed with SIGKILL. batchkit holds the other end of its standard
input: when that closes, whatever the reason, the engine is ended. `processes` talks to it; the protocol is JSON lines:

    in    {"command": […], "environment": {…}, "log": …, "identity": …, "scratch": …, "parent": …, "grace": …,
           "parent_started": …, "orphan": …}
    out   {"pid": …, "started": …}      the engine runs, and its identity is on the disk
    out   {"exit": …}                   all of it has ended; negative is the signal that ended its main process
    out   {"error": …}                  nothing was started

With `orphan`, a folder, it is no child of batchkit's process: Ray kills the children of an actor before it ends it, and
then nobody would end the engine. The folder is removed when that process has died.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

POLL_SECONDS = 0.5
KILL_SECONDS = 10.0
"""How long killed processes may take to vanish: giving back the memory of a large model takes seconds."""


def start_time(pid: int) -> str | None:
    """When the kernel started `pid`, in a form that tells it from any other process that ever gets this number.

    None where there is no such process. Zombies still have one.
    """
    fields = _stat(pid)
    if fields is None:
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{boot}:{fields[19]}"


def members(session: int) -> list[int]:
    """The live processes of a session (zombies are not)."""
    numbers = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]  # noqa: PTH208  # numbers, not paths
    states = [(pid, fields) for pid in numbers if (fields := _stat(pid))]
    return [pid for pid, fields in states if fields[3] == str(session) and fields[0] not in "ZX"]


def end_session(session: int, grace: float) -> None:
    """End every process of the session: asked first, killed after `grace` seconds.

    Python's resource tracker goes last, by itself: it wakes up when all others are gone and removes the shared
    memory that they left in /dev/shm. It ignores the polite signals.
    """
    _signal(_others(session), signal.SIGTERM)
    if not _gone(session, _others, grace):
        _signal(_others(session), signal.SIGKILL)
        _gone(session, _others, KILL_SECONDS)
    if not _gone(session, members, KILL_SECONDS / 2):
        _signal(members(session), signal.SIGKILL)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat behind the name, which may itself hold blanks and parentheses: [0] is the state."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _others(session: int) -> list[int]:
    return [pid for pid in members(session) if not _is_tracker(pid)]


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _gone(session: int, which: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while which(session):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


# -- the script ------------------------------------------------------------------------------------------------------


def _main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    line = sys.stdin.buffer.readline()
    if not line:
        return
    spec = json.loads(line)
    if spec["orphan"] and os.fork():
        os._exit(0)
    gate_read, gate_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become(spec, gate_read, gate_write)
    code: int | None = None
    try:
        os.close(gate_read)
        started = start_time(pid)
        _write_identity(spec, pid, started)
        # Only now may the child become the engine: whatever is killed from here on, somebody knows of it.
        os.write(gate_write, b"!")
        os.close(gate_write)
        _say({"pid": pid, "started": started})
        code = _watch(pid, spec)
    except OSError as exc:
        _say({"error": f"{exc.strerror}: {exc.filename or spec['identity']}"})
    finally:
        end_session(pid, spec["grace"])
        shutil.rmtree(spec["scratch"], ignore_errors=True)
        if spec["orphan"] and not _has_parent(spec):
            shutil.rmtree(spec["orphan"], ignore_errors=True)
    _say({"exit": _reap(pid) if code is None else code})


def _become(spec: dict[str, Any], gate_read: int, gate_write: int) -> NoReturn:
    """The forked child: a session of its own, then, once its identity is on the disk, the engine."""
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(gate_write)
        if os.read(gate_read, 1) == b"!":
            log = os.open(spec["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            null = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((null, 0), (log, 1), (log, 2)):
                os.dup2(source, target)
            os.closerange(3, 256)
            os.execvpe(spec["command"][0], spec["command"], spec["environment"])  # noqa: S606  # no shell, on purpose
    except OSError as exc:
        os.write(2, f"{spec['command'][0]}: {exc.strerror}\n".encode())
    finally:
        os._exit(127)


def _write_identity(spec: dict[str, Any], pid: int, started: str | None) -> None:
    path = Path(spec["identity"])
    aside = path.with_suffix(".tmp")
    fields = {"pid": pid, "started": started, "command": spec["command"], "scratch": spec["scratch"]}
    with open(aside, "w") as stream:
        json.dump(fields, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _watch(pid: int, spec: dict[str, Any]) -> int | None:
    """Wait until the engine's main process ends (its exit code) or batchkit does, or closes our input (None)."""
    waited: list[int] = [0]
    with contextlib.suppress(AttributeError, OSError):  # not every kernel has pidfd: then the time-out finds it
        waited.append(os.pidfd_open(pid))
    while True:
        ready, _, _ = select.select(waited, [], [], POLL_SECONDS)
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        # A process that batchkit forked may still hold the pipe open when batchkit is killed.
        if 0 in ready or not _has_parent(spec):
            return None


def _has_parent(spec: dict[str, Any]) -> bool:
    """Whether batchkit's process lives."""
    fields = _stat(spec["parent"])
    return fields is not None and fields[0] not in "ZX" and start_time(spec["parent"]) == spec["parent_started"]


def _reap(pid: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return -signal.SIGKILL


def _say(fields: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # batchkit is gone
        os.write(1, json.dumps(fields).encode() + b"\n")


if __name__ == "__main__":
    _main()
