"""Engines as processes: none outlives us, none is mistaken for another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchkit import processes
from batchkit.errors import StorageError
from batchkit.keeper import members, start_time

# A main process with a child that holds shared memory, as vLLM has: both ignore nothing.
FAMILY = """
import multiprocessing as mp, sys, time
from multiprocessing import shared_memory
def child(ready):
    ready.set()
    time.sleep(600)
if __name__ == "__main__":
    mp.set_start_method("spawn")
    memory = shared_memory.SharedMemory(create=True, size=4096)
    ready = mp.Event()
    process = mp.Process(target=child, args=(ready,))
    process.start()
    ready.wait()
    print("ready", memory.name, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def family(tmp_path: Path) -> list[str]:
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    return [sys.executable, str(script)]


def start(command: list[str], folder: Path) -> processes.Engine:
    return processes.start(
        command,
        environment=dict(os.environ),
        log=folder / "log.txt",
        identity=folder / "identity.json",
        scratch=processes.make_scratch(),
    )


def wait_for(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_ready(folder: Path) -> bool:
    return "ready" in (folder / "log.txt").read_text() if (folder / "log.txt").exists() else False


def shared_memory(folder: Path) -> Path:
    return Path("/dev/shm") / (folder / "log.txt").read_text().split()[1]  # noqa: S108  # where Linux keeps it


def identity_of(folder: Path) -> processes.Identity:
    identity = processes.read_identity(folder / "identity.json")
    assert identity is not None
    return identity


def test_start_reports_the_exit_code_and_keeps_the_output(tmp_path: Path) -> None:
    engine = start([sys.executable, "-c", "print('hello'); raise SystemExit(5)"], tmp_path)
    assert engine.poll(20) == 5
    assert (tmp_path / "log.txt").read_text() == "hello\n"
    assert not Path(identity_of(tmp_path).scratch).exists()


def test_start_of_a_missing_command_ends_with_127_and_says_so(tmp_path: Path) -> None:
    engine = start(["/nowhere/engine"], tmp_path)
    assert engine.poll(20) == 127
    assert "No such file" in (tmp_path / "log.txt").read_text()


def test_stop_ends_the_whole_family_and_its_shared_memory(tmp_path: Path, family: list[str]) -> None:
    engine = start(family, tmp_path)
    wait_for(lambda: is_ready(tmp_path))
    assert len(members(engine.pid)) == 3, "main, resource tracker, child"
    assert engine.stop() == -signal.SIGTERM
    assert members(engine.pid) == []
    assert not shared_memory(tmp_path).exists()


def test_the_family_of_a_killed_main_process_is_ended(tmp_path: Path, family: list[str]) -> None:
    engine = start(family, tmp_path)
    wait_for(lambda: is_ready(tmp_path))
    os.kill(engine.pid, signal.SIGKILL)
    assert engine.poll(20) == -signal.SIGKILL
    assert members(engine.pid) == []
    assert not shared_memory(tmp_path).exists()


def test_stop_kills_an_engine_that_ignores_the_polite_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    engine = start([sys.executable, "-c", deaf], tmp_path)
    wait_for(lambda: is_ready(tmp_path))
    assert engine.stop() == -signal.SIGKILL


BATCHKIT = """
import os, sys, time
from pathlib import Path
from batchkit import processes
from batchkit.errors import StorageError
folder = Path(sys.argv[1])
engine = processes.start(sys.argv[2:], environment=dict(os.environ), log=folder / "log.txt",
                         identity=folder / "identity.json", scratch=processes.make_scratch())
if os.fork() == 0:
    time.sleep(600)  # a forked worker, which holds every pipe of ours open
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_engine_ends_when_batchkit_is_killed(tmp_path: Path, family: list[str], number: signal.Signals) -> None:
    batchkit = subprocess.Popen([sys.executable, "-c", BATCHKIT, str(tmp_path), *family], start_new_session=True)
    try:
        wait_for(lambda: is_ready(tmp_path))
        identity = identity_of(tmp_path)
        assert identity.pid in members(identity.pid)
        os.kill(batchkit.pid, number)
        wait_for(lambda: members(identity.pid) == [], seconds=10)
        wait_for(lambda: not Path(identity.scratch).exists())
        assert not shared_memory(tmp_path).exists()
    finally:
        os.killpg(batchkit.pid, signal.SIGKILL)
        batchkit.wait()


def test_batchkit_ends_the_engine_itself_when_its_keeper_was_killed(tmp_path: Path, family: list[str]) -> None:
    engine = start(family, tmp_path)
    wait_for(lambda: is_ready(tmp_path))
    engine._kept.kill()
    assert engine.poll(20) == -9
    assert members(engine.pid) == []
    assert not shared_memory(tmp_path).exists()


def orphan(folder: Path, family: list[str]) -> processes.Identity:
    """An engine whose batchkit and keeper were both killed."""
    code = BATCHKIT.replace("if os.fork()", "os.kill(engine._kept.pid, 9)\nos.kill(os.getpid(), 9)\nif os.fork()")
    subprocess.run([sys.executable, "-c", code, str(folder), *family], check=False)
    wait_for(lambda: is_ready(folder))
    return identity_of(folder)


def test_a_later_process_ends_an_orphan_by_its_identity(tmp_path: Path, family: list[str]) -> None:
    identity = orphan(tmp_path, family)
    assert identity.pid in members(identity.pid)
    assert processes.end_left_over(identity)
    assert members(identity.pid) == []
    assert not Path(identity.scratch).exists()
    assert not processes.end_left_over(identity), "nothing is left"


def test_a_later_process_ends_orphans_whose_main_process_is_gone(tmp_path: Path, family: list[str]) -> None:
    identity = orphan(tmp_path, family)
    os.kill(identity.pid, signal.SIGKILL)
    wait_for(lambda: start_time(identity.pid) is None)
    # The child would live on for ten minutes.
    processes.end_left_over(identity)
    assert members(identity.pid) == []


def test_another_process_with_the_same_number_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        identity = processes.Identity(pid=stranger.pid, started="another time", command=[], scratch=str(tmp_path / "s"))
        assert not processes.end_left_over(identity)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_start_writes_no_engine_where_the_identity_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="identity"):
        processes.start(
            [sys.executable, "-c", "open('started', 'w')"],
            environment=dict(os.environ),
            log=tmp_path / "log.txt",
            identity=tmp_path / "missing" / "identity.json",
            scratch=processes.make_scratch(),
        )
    assert not (tmp_path / "log.txt").exists()
