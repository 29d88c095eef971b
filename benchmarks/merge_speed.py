"""`merge` beside the loops of `merge_rivals`, and `merge` alone at several sizes.

    python benchmarks/merge_speed.py --rows 200000 --rounds 3
    python benchmarks/merge_speed.py --sizes 10000,100000,1000000,5000000

Everything runs in a process of its own, in turns, as often as `--rounds` says; the table has the medians. CPU is user
and system time of all its processes. What the rivals wrote is compared with batchkit's results.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).parent))
import merge_data
import merge_rivals

BATCHKIT = [sys.executable, "-m", "batchkit", "merge"]


class Measured(NamedTuple):
    seconds: float
    cpu: float
    largest_mb: float
    sum_mb: float


def measure(command: list[str]) -> Measured:
    """Peak memory is read from the process tree 50 times a second; memory that two processes share counts for both."""
    before, started = os.times(), time.monotonic()
    largest = total = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):  # one of them has just ended
                sizes = [one.memory_info().rss for one in [watched, *watched.children(recursive=True)]]
                largest, total = max(largest, *sizes), max(total, sum(sizes))
            time.sleep(0.02)
        seconds, after = time.monotonic() - started, os.times()
        said = process.stderr.read() if process.stderr is not None else ""
    if process.returncode != 0:
        raise RuntimeError(said)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Measured(seconds, cpu, largest / 1e6, total / 1e6)


def compare(folder: Path, rows: int, rounds: int) -> None:
    run = merge_data.make(folder, rows).path
    tasks, responses = folder / merge_data.TASKS, folder / merge_data.RESPONSES
    results = run / "results.jsonl"
    pile = ["--tasks", str(tasks), "--responses", str(responses), "-o", str(folder / "pile.jsonl")]
    commands = {
        "batchkit": [*BATCHKIT, str(run)],
        "batchkit, 1 worker": [*BATCHKIT, str(run), "--workers", "1"],
        "batchkit, a pile": [*BATCHKIT, *pile],
    }
    script = str(Path(merge_rivals.__file__))
    for name in merge_rivals.RIVALS:
        commands[name] = [sys.executable, script, name, str(tasks), str(responses), str(folder / f"{name}.out")]
    measured: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            measured[name].append(measure(command))
    for name in merge_rivals.RIVALS:
        if merge_rivals.check(results, folder / f"{name}.out") != rows:
            raise RuntimeError(f"{name} and batchkit have not {rows:,} rows")
    print(f"{'':20} {'seconds':>8} {'CPU s':>7} {'rows/s':>9} {'largest MB':>11} {'sum MB':>7}")
    for name, found in measured.items():
        show(name, rows, Measured(*map(statistics.median, zip(*found, strict=True))))


def show(name: str, rows: int, found: Measured) -> None:
    print(
        f"{name:20} {found.seconds:8.2f} {found.cpu:7.2f} {rows / found.seconds:9,.0f} {found.largest_mb:11.0f} "
        f"{found.sum_mb:7.0f}",
        flush=True,
    )


def sizes(folder: Path, numbers: list[int]) -> None:
    print(f"{'rows':20} {'seconds':>8} {'CPU s':>7} {'rows/s':>9} {'largest MB':>11} {'sum MB':>7}")
    for rows in numbers:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            run = merge_data.make(Path(place), rows, foreign=False)
            found = measure([*BATCHKIT, str(run.path)])
            show(f"{rows:,}", rows, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", help="sizes, separated by commas: batchkit alone")
    parser.add_argument("--folder", type=Path, help="where to work [default: a temporary folder]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.sizes:
            sizes(Path(folder), [int(size) for size in arguments.sizes.split(",")])
        else:
            compare(Path(folder), arguments.rows, arguments.rounds)


if __name__ == "__main__":
    main()
