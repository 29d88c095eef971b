from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import queue
import random
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchkit import direct
from batchkit.direct import BUFFER_BYTES, LargeFile
from batchkit.errors import StorageError
from batchkit.storage import write_large

PIECES = [os.urandom(size) for size in (10, 300_000, 900_000, 1, 5_000_000, 70_000, 2_000_000, 0, 4096, 123)]
WHOLE = b"".join(PIECES)
DIRECT: int = getattr(os, "O_DIRECT", 0)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each write whether it goes past the page cache, so far."""
    write_at, seen = os.pwrite, list[bool]()

    def note(file: int, data: bytes, offset: int) -> int:
        if data:
            seen.append(is_direct(file))
        return write_at(file, data, offset)

    monkeypatch.setattr(os, "pwrite", note)
    return seen


def writing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == direct.THREAD]


def is_direct(file: int) -> bool:
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & DIRECT)


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


def test_nothing_is_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_at, written = os.pwrite, list[tuple[int, int]]()

    def note(file: int, data: bytes, offset: int) -> int:
        written.append((offset, offset + len(data)))
        return write_at(file, data, offset)

    monkeypatch.setattr(os, "pwrite", note)
    with write_large(tmp_path / "a") as stream:
        stream.write(bytes(3 * BUFFER_BYTES + 5))
        stream.flush()
        stream.flush()
    assert [start for start, _ in sorted(written)] == [0, *(end for _, end in sorted(written)[:-1])]


def test_a_file_that_cannot_be_made_is_an_error_and_its_end_is_none(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        LargeFile(tmp_path / ("a" * 300))
    LargeFile.__new__(LargeFile).close()  # as Python closes what was left half made
    with pytest.raises(StorageError, match="cannot be written"):
        write(tmp_path / ("a" * 250))


def test_nothing_is_written_to_a_file_that_is_closed(tmp_path: Path) -> None:
    with write_large(tmp_path / "a") as stream:
        stream.write(b"x")
    with pytest.raises(ValueError, match="closed"):
        stream.write(b"y")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_only_large_files_go_past_the_page_cache_where_the_file_system_can(tmp_path: Path, ways: list[bool]) -> None:
    write(tmp_path / "small", [bytes(BUFFER_BYTES)])
    assert ways == [False]
    try:
        os.close(os.open(tmp_path / "tried", os.O_WRONLY | os.O_CREAT | DIRECT))
    except OSError:
        pytest.skip("the file system of the tests has no direct writes")
    write(tmp_path / "large", [bytes(2 * BUFFER_BYTES + 1)])
    assert ways[1:].count(True) == 2 * bool(DIRECT)
    assert not ways[-1], "the end is too short for it"


def test_what_the_disk_is_too_slow_for_goes_through_the_page_cache(
    tmp_path: Path, ways: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_at = os.pwrite

    def linger(file: int, data: bytes, offset: int) -> int:
        if is_direct(file):
            time.sleep(0.05)
        return write_at(file, data, offset)

    monkeypatch.setattr(os, "pwrite", linger)
    data = random.Random(0).randbytes(30 * BUFFER_BYTES)
    write(tmp_path / "a", [data])
    assert (tmp_path / "a").read_bytes() == data
    most = direct.TRIED + direct.BUFFERS
    assert ways[most:] == [False] * (30 - most), "both ways at once would wait for each other"
    assert True in ways or not DIRECT


def test_a_file_system_that_refuses_direct_writes_only_when_they_come_gets_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_at = os.pwrite

    def refuse(file: int, data: bytes, offset: int) -> int:
        if is_direct(file):
            raise OSError(errno.EINVAL, "no")
        return write_at(file, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == WHOLE


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


def test_no_thread_is_left_behind(tmp_path: Path) -> None:
    write(tmp_path / "a")
    assert not writing_threads()


def test_where_no_thread_can_begin_it_is_written_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == WHOLE


def test_what_ends_the_block_is_told_also_where_the_disk_is_full_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> int:
        time.sleep(0.01)
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted() -> Iterator[bytes]:
        yield bytes(3 * BUFFER_BYTES)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", fill)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", interrupted())
    assert list(tmp_path.iterdir()) == []


def test_after_a_failure_the_file_cannot_be_closed_as_if_it_were_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_at = os.pwrite

    def fail_once(file: int, data: bytes, offset: int) -> int:
        if offset == BUFFER_BYTES:
            raise OSError(errno.EIO, "Input/output error")
        return write_at(file, data, offset)

    monkeypatch.setattr(os, "pwrite", fail_once)
    stream = LargeFile(tmp_path / "a")
    with pytest.raises(OSError, match="Input/output error"):
        stream.write(bytes(20 * BUFFER_BYTES))
    with pytest.raises(OSError, match="Input/output error"):
        stream.close()
    assert stream.closed


def test_ctrl_c_at_any_moment_lets_no_thread_write_into_the_next_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, write_at = queue.SimpleQueue.put, os.pwrite

    class Interrupting(queue.SimpleQueue[Any]):
        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            put(self, item, block, timeout)
            if item is not None:
                raise KeyboardInterrupt

    def linger(file: int, data: bytes, offset: int) -> int:
        time.sleep(0.1)
        return write_at(file, data, offset)

    monkeypatch.setattr(queue, "SimpleQueue", Interrupting)
    monkeypatch.setattr(os, "pwrite", linger)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a")
    with open(tmp_path / "other", "wb", buffering=0) as other:
        other.write(b"ours")
        time.sleep(0.3)
    assert (tmp_path / "other").read_bytes() == b"ours"


def test_the_process_can_be_forked_in_between_and_the_fork_changes_nothing(tmp_path: Path) -> None:
    with write_large(tmp_path / "a") as stream:
        for piece in PIECES:
            stream.write(piece)
            direct.end_threads()
            assert not writing_threads()
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
