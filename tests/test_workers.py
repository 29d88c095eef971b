"""Several processes prepare what one prepares."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image

from batchkit import arenas, workers
from batchkit.errors import BatchkitError
from batchkit.preparation import prepare
from tests.conftest import WriteTasks
from tests.test_preparation import files


def tasks_of(write_tasks: WriteTasks, count: int) -> Path:
    path = write_tasks(
        [{"id": number, "image": f"{number % 7}.png", "question": f"q{number}"} for number in range(count)]
    )
    for number in range(7):
        Image.effect_noise((30 + number, 20), 60).save(path.parent / f"{number}.png")
    return path


def test_any_number_of_workers_makes_the_same_run(
    write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BLOCK_SECONDS", 0.002)  # many blocks
    tasks = tasks_of(write_tasks, 1200)
    rows = [line for number, line in enumerate(tasks.read_text().splitlines()) if number % 7 != 3 or number < 80]
    tasks.write_text("\n".join(rows) + "\n")  # a few of the huge ones are enough
    huge = Image.frombytes("RGB", (1300, 1100), os.urandom(1300 * 1100 * 3))
    huge.save(tasks.parent / "3.png", compress_level=0)
    size = (tasks.parent / "3.png").stat().st_size
    assert size * 4 // 3 > arenas.SLOT_BYTES, "its request has no room in the shared memory"
    (tasks.parent / "5.png").unlink()  # every seventh row is rejected
    made = []
    for count in (1, 2, 4):
        report = prepare(tasks, tmp_path / f"run{count}", model="m", workers=count, max_requests=100)
        assert report.rejected > 100
        made.append(files(tmp_path / f"run{count}"))
    assert made[0] == made[1] == made[2]


def test_without_shared_memory_lines_go_through_the_pipe(
    write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tasks_of(write_tasks, 300)
    prepare(tasks, tmp_path / "shared", model="m", workers=2)
    monkeypatch.delattr(os, "memfd_create", raising=False)
    prepare(tasks, tmp_path / "piped", model="m", workers=2)
    assert files(tmp_path / "shared") == files(tmp_path / "piped")


def test_a_worker_that_is_killed_ends_prepare_which_then_goes_on(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = tasks_of(write_tasks, 8000)

    def kill(_: object) -> None:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # some are gone already
                if "resource_tracker" not in " ".join(child.cmdline()):
                    child.send_signal(signal.SIGKILL)

    with pytest.raises(BatchkitError, match="a worker of prepare was killed"):
        prepare(tasks, tmp_path / "run", model="m", workers=2, max_requests=500, sealed=kill)
    report = prepare(tasks, tmp_path / "run", model="m", workers=1, max_requests=500)
    assert (report.rows, report.requests, report.shards) == (8000, 8000, 16)


def test_shared_memory_has_no_name() -> None:
    with arenas.Arena(2) as arena:
        if arena.path is None:
            pytest.skip("there is no such memory here")
        assert " (deleted)" in str(Path(arena.path).readlink())  # nothing is left of it, however the process ends
        slot, other = arena.take(), arena.take()
        assert slot is not None
        assert other is not None
        assert arena.take() is None
        arenas.Corner(arena.path).slot(slot)[:5] = b"hello"
        assert bytes(arena.slot(slot)[:5]) == b"hello"
        assert bytes(arena.slot(other)[:5]) == b"\0" * 5
        arena.give_back(slot)
        assert arena.take() == slot
