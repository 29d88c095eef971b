"""Processes that work side by side."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

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
