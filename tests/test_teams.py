"""Processes that work side by side."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchkit import teams


def test_processes_are_forked_before_tasks_are_made_which_may_start_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teams, "can_fork", lambda: True)
    there: list[int] = []

    def tasks() -> Iterator[int]:
        there.append(len(multiprocessing.active_children()))
        yield from (-1, -2, -3)

    before = len(multiprocessing.active_children())
    with teams.Team(2) as team:
        for _ in range(2):
            assert list(team.in_order(tasks(), abs)) == [(-1, 1), (-2, 2), (-3, 3)]
    assert there == [before + 2] * 2
    assert len(multiprocessing.active_children()) == before


FORKABLE = """
import os, sys, threading
from batchkit import direct, teams
file = direct.LargeFile(sys.argv[1])
file.write(bytes(5 * direct.BUFFER_BYTES))
def writing(): return [one for one in threading.enumerate() if one.name == direct.THREAD]
print(len(writing()), teams.can_fork(), len(writing()))
with teams.Team(2) as team:
    print([made for _, made in team.in_order([-1, -2], abs)], len(writing()), teams.can_fork())
    file.write(bytes(5 * direct.BUFFER_BYTES))
file.close()
print(os.path.getsize(sys.argv[1]) == 10 * direct.BUFFER_BYTES)
threading.Thread(target=sys.stdin.read, daemon=True).start()
print(teams.can_fork())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_to_ask_whether_workers_can_be_forked_ends_no_thread_and_to_fork_them_does(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKABLE, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        said = process.stdout.read() if process.stdout is not None else ""
    # The pool has threads of its own in this process.
    assert said.splitlines() == ["1 True 1", "[1, 2] 0 False", "True", "False"]
