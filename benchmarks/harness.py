"""Contenders as processes: how long they take, and how much memory.

`compare` lets them take turns. Round 0 is not timed: in it memory is looked at 50 times a second, which costs CPU time.
In the rounds that are timed nothing but the contender runs; each begins with another one. Before each turn the inputs
are read, so that all find them in the page cache. Outputs are checked in every round.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

BATCHKIT = (sys.executable, "-m", "batchkit")
LOOK_SECONDS = 0.02


class Measured(NamedTuple):
    """Of one process with all its children. `cpu` is in seconds; memory is None where nobody looked."""

    seconds: float
    cpu: float
    largest_mb: float | None = None
    sum_mb: float | None = None


class FailedError(Exception):
    """A contender ended with an exit code that says so, or wrote what it must not."""


def nothing(_: Path) -> None:
    pass


@dataclass(frozen=True)
class Contender:
    """`command` is what to run for an output in the folder given; `check` raises where that output is wrong.

    `setup` is called with the (empty) folder before the clock starts. `codes` are exit codes that mean success. `most`
    rounds are timed: those that are slower by far need no more.
    """

    name: str
    command: Callable[[Path], Sequence[str]]
    check: Callable[[Path], None] = nothing
    setup: Callable[[Path], None] = nothing
    environment: Mapping[str, str] = field(default_factory=dict)
    codes: tuple[int, ...] = (0,)
    most: int | None = None


@dataclass
class Result:
    """What a contender has shown; `memory` is of round 0, `rounds` are the others."""

    memory: Measured
    rounds: list[Measured] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(one.seconds for one in self.rounds)

    @property
    def cpu(self) -> float:
        return statistics.median(one.cpu for one in self.rounds)


def compare(
    contenders: Sequence[Contender], rounds: int, folder: Path, inputs: Sequence[Path] = ()
) -> dict[str, Result]:
    """Every contender once a round, in turns; results in the order in which they were given. `inputs` are files, and
    folders of files, that they read."""
    # As pip leaves what it installs, the rivals too: a checkout may lie where Python writes no bytecode.
    compileall.compile_dir(Path(__file__).parent.parent / "batchkit", quiet=1)
    results = {one.name: Result(_turn(one, folder, inputs, look=True)) for one in contenders}
    for number in range(rounds):
        first = number % len(contenders)
        for one in (*contenders[first:], *contenders[:first]):
            if one.most is None or number < one.most:
                results[one.name].rounds.append(_turn(one, folder, inputs, look=False))
    return results


def _turn(contender: Contender, folder: Path, inputs: Sequence[Path], *, look: bool) -> Measured:
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        contender.setup(place)
        command = contender.command(place)
        os.sync()  # nobody pays for what another one has left to be written
        for path in inputs:
            _read(path)
        measured = measure(command, look=look, environment=contender.environment, codes=contender.codes)
        note = f"{measured.largest_mb:.0f} MB" if measured.largest_mb is not None else f"{measured.seconds:.2f} s"
        say(f"  {contender.name}: {note}")
        contender.check(place)
    finally:
        shutil.rmtree(place)
    return measured


def _read(path: Path) -> None:
    """Some machines drop from the page cache what was not used for half a minute."""
    for one in path.rglob("*") if path.is_dir() else [path]:
        if one.is_file():
            with open(one, "rb", buffering=0) as stream:
                while stream.read(1 << 20):
                    pass


def measure(
    command: Sequence[str],
    *,
    look: bool = True,
    environment: Mapping[str, str] | None = None,
    codes: tuple[int, ...] = (0,),
) -> Measured:
    """Run a command to its end. `look`: at its memory, which costs some CPU time. Raises `FailedError`."""
    largest = total = 0
    with tempfile.TemporaryFile() as said:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        process = psutil.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env={**os.environ, **(environment or {})},
        )
        try:
            while look and process.poll() is None:
                family = list(sizes(process))
                largest, total = max(largest, *family, 0), max(total, sum(family))
                time.sleep(LOOK_SECONDS)
            code = process.wait()
        finally:
            end(process)
        seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if code not in codes:
            said.seek(0)
            tail = said.read()[-4000:].decode("utf-8", "replace")
            raise FailedError(f"{' '.join(command)}: exit code {code}\n{tail}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(seconds, cpu, largest / 1e6, total / 1e6) if look else Measured(seconds, cpu)


def sizes(process: psutil.Process) -> Iterator[int]:
    """The resident memory of a process and of all below it. Pages that two of them share count twice."""
    family = [process]
    with contextlib.suppress(psutil.Error):
        family += process.children(recursive=True)
    for one in family:
        with contextlib.suppress(psutil.Error):  # it has just ended
            yield one.memory_info().rss


def end(process: psutil.Process) -> None:
    """Kill it and all below it, if it still runs."""
    if not process.is_running():
        return
    family = [process]
    with contextlib.suppress(psutil.Error):
        family += process.children(recursive=True)
    for one in family:
        with contextlib.suppress(psutil.Error):
            one.kill()
    process.wait()


def say(message: str) -> None:
    """Progress, for whoever watches."""
    print(message, file=sys.stderr, flush=True)


def parser(doc: str | None, *, rounds: int | None = 5) -> argparse.ArgumentParser:
    """With the options that every benchmark has; `rounds` None: everything is done once."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="sizes for trying whether it runs: its figures mean nothing")
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds [default: {rounds}]")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    made.add_argument("--folder", type=Path, help="where to work [default: a temporary folder]")
    return made


@contextlib.contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="batchkit-bench-") as name:
        yield Path(name)
