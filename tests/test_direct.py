from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import random
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from batchkit import direct, teams
from batchkit.direct import BUFFER_BYTES, LargeFile
from batchkit.errors import StorageError
from batchkit.storage import write_large

PIECES = [os.urandom(size) for size in (10, 300_000, 900_000, 1, 5_000_000, 70_000, 2_000_000, 0, 4096, 123)]
WHOLE = b"".join(PIECES)
DIRECT: int = getattr(os, "O_DIRECT", 0)


@pytest.fixture(autouse=True)
def unknown_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The speed of the disk is known of the whole process: each test begins without."""
    monkeypatch.setattr(direct, "_disk", direct._Disk())
    yield
    direct.settle()


def is_direct(stream: LargeFile) -> bool:
    return bool(fcntl.fcntl(stream.fileno(), fcntl.F_GETFL) & DIRECT)


def write(path: Path, pieces: Iterable[bytes] = PIECES) -> None:
    with write_large(path) as stream:
        for piece in pieces:
            assert stream.write(piece) == len(piece)


@pytest.mark.parametrize("size", [0, 1, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 5 * BUFFER_BYTES])
def test_what_is_written_is_there_whatever_its_size(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    write(tmp_path / "a", [data])
    assert (tmp_path / "a").read_bytes() == data


def test_pieces_of_all_sizes_are_written_in_order(tmp_path: Path) -> None:
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == WHOLE
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_after_a_flush_all_is_there_and_more_can_follow(tmp_path: Path) -> None:
    with LargeFile(tmp_path / "a") as stream:
        written = b""
        for piece in PIECES:
            stream.write(piece)
            written += piece
            stream.flush()
            assert (tmp_path / "a").read_bytes() == written


def test_large_files_go_past_the_page_cache_where_the_file_system_can(tmp_path: Path) -> None:
    with LargeFile(tmp_path / "a") as stream:
        stream.write(bytes(BUFFER_BYTES - 1))
        assert not is_direct(stream), "small ones do not"
        stream.write(bytes(BUFFER_BYTES))
        try:
            os.close(os.open(tmp_path / "b", os.O_WRONLY | os.O_CREAT | DIRECT))
        except OSError:
            assert not is_direct(stream)
        else:
            assert is_direct(stream) == bool(DIRECT)


def test_a_slow_disk_is_left_to_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "PROBE_BYTES", 2 * BUFFER_BYTES)
    monkeypatch.setattr(direct, "SLOW", 1e15)
    with LargeFile(tmp_path / "a") as stream:
        for piece in PIECES:
            stream.write(piece)
        assert not is_direct(stream)
    assert (tmp_path / "a").read_bytes() == WHOLE


def test_a_file_system_that_refuses_direct_writes_only_when_they_come_gets_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_at, refused = os.pwrite, 0

    def refuse(file: int, data: bytes, offset: int) -> int:
        nonlocal refused
        if fcntl.fcntl(file, fcntl.F_GETFL) & DIRECT:
            refused += 1
            raise OSError(errno.EINVAL, "no")
        return write_at(file, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == WHOLE
    assert refused <= 1, "it is asked once for each file"


def test_short_writes_go_on_where_they_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_at = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write_at(file, data[:4096], offset))
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == WHOLE


@pytest.mark.parametrize("whole", [0, 1, 5])
def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    write_at = os.pwrite

    def fill(file: int, data: bytes, offset: int) -> int:
        if offset >= whole * BUFFER_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_at(file, data, offset)

    monkeypatch.setattr(os, "pwrite", fill)
    with pytest.raises(StorageError, match="No space left on device") as raised:
        write(tmp_path / "a")
    assert raised.value.hint is not None
    assert "free some disk space" in raised.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_abandoned_is_not_written_to_its_end(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield WHOLE
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", pieces())
    assert list(tmp_path.iterdir()) == []


def test_the_process_can_be_forked_in_between_and_the_fork_changes_nothing(tmp_path: Path) -> None:
    with write_large(tmp_path / "a") as stream:
        for piece in PIECES:
            stream.write(piece)
            teams.can_fork()  # which it asks before it forks; other tests may have left threads of libraries
            assert not [thread for thread in threading.enumerate() if thread.name == "batchkit-writing"]
            child = multiprocessing.get_context("fork").Process(target=_close, args=(stream,))
            child.start()
            child.join()
            assert child.exitcode == 0
    assert (tmp_path / "a").read_bytes() == WHOLE


def _close(stream: LargeFile) -> None:
    stream.close()
    with write_large(Path(f"/dev/shm/batchkit-test-{os.getpid()}")) as own:  # noqa: S108
        own.write(WHOLE)
    os.unlink(f"/dev/shm/batchkit-test-{os.getpid()}")  # noqa: S108, PTH108
