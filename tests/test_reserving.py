from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from batchkit import reserving
from batchkit.reserving import FIRST_BYTES, ReservingFile
from batchkit.storage import write_whole

PIECES = [os.urandom(size) for size in (10, 300_000, 900_000, 1, 5_000_000, 70_000, 2_000_000)]


def on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_what_is_written_is_there_and_nothing_more_is_taken(tmp_path: Path) -> None:
    with write_whole(tmp_path / "a") as stream:
        for piece in PIECES:
            stream.write(piece)
    assert (tmp_path / "a").read_bytes() == b"".join(PIECES)
    assert on_disk(tmp_path / "a") < len(b"".join(PIECES)) + 100_000


def test_room_is_reserved_ahead_and_the_size_is_that_of_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def take(_: int, __: int, at: int, size: int) -> int:
        asked.append((at, size))
        return 0

    monkeypatch.setattr(reserving, "_fallocate", lambda: take)
    with ReservingFile(tmp_path / "a") as stream:
        stream.write(b"x" * FIRST_BYTES)
        assert asked == [], "small files are left alone"
        stream.write(b"x")
        assert asked == [(0, FIRST_BYTES + 1)]
        assert (tmp_path / "a").stat().st_size == FIRST_BYTES + 1
        stream.write(b"x" * 100)
        stream.write(b"x" * FIRST_BYTES)
    starts = [start for start, _ in asked]
    assert starts == [0, *(start + size for start, size in asked[:-1])], "each goes on where the last ended"
    assert (tmp_path / "a").stat().st_size == 2 * FIRST_BYTES + 101


def test_where_nothing_can_be_reserved_files_are_written_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def refuse(*_: int) -> int:
        tried.append(errno.ENOSPC)
        return -1

    for number, found in enumerate([None, refuse]):
        monkeypatch.setattr(reserving, "_fallocate", lambda found=found: found)
        with write_whole(tmp_path / f"{number}") as stream:
            for piece in PIECES:
                stream.write(piece)
        assert (tmp_path / f"{number}").read_bytes() == b"".join(PIECES)
    assert len(tried) == 1, "and not tried again and again"
