"""Runs of vLLM, raw and through batchkit, watched from outside: when the first answer is on the disk, how long the
engine lives, and what is there when all of it is killed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
from harness import BATCHKIT, FailedError, end, say, sizes

from batchkit.backends.vllm_install import Install, find_install

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "examples" / "digits"
# The example's model comes from a folder: nothing need be asked of a hub, or told to anyone.
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
TINY_ARGS = (
    *("--max-model-len", "256", "--dtype", "float32", "--enforce-eager"),
    *("--limit-mm-per-prompt", '{"image": 2}', "--max-num-seqs", "256"),
)
LOOK_SECONDS = 0.02
SCAN_SECONDS = 0.2


class Seen(NamedTuple):
    """`first`: seconds until the first answer was in its file; `engine`: how long engines lived, together. Memory is
    that of the largest process, and of all; it is looked at with every scan."""

    seconds: float
    first: float | None
    engine: float
    answers: int
    largest_mb: float
    sum_mb: float


class Place:
    """A run directory with requests, and the same requests as one file for raw run_batch."""

    def __init__(self, folder: Path, *, model: str, args: Sequence[str]) -> None:
        self.run = folder / "run"
        self.source = folder / "requests.jsonl"
        self.model = model
        self.args = tuple(args)
        self.install: Install = find_install()
        self.environment = dict(QUIET)
        if self.install.cpu:
            self.environment["VLLM_CPU_KVCACHE_SPACE"] = "1"  # else vLLM takes nearly all memory

    def prepare(self, tasks: Path, *options: str) -> None:
        command = [*BATCHKIT, "prepare", str(tasks), str(self.run), "--model", self.model, *options]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        with open(self.source, "wb") as out:
            out.writelines(path.read_bytes() for path in self.shards())

    def shards(self) -> list[Path]:
        return sorted((self.run / "requests").glob("*.jsonl"))

    def raw(self, source: Path, target: Path) -> list[str]:
        command = [sys.executable, "-m", self.install.module, "-i", str(source), "-o", str(target)]
        return [*command, "--model", self.model, *self.args]

    def submit(self, *options: str) -> list[str]:
        return [*BATCHKIT, "submit", str(self.run), *options, "--", *self.args]

    def forget(self) -> None:
        """Nothing was sent, and nothing is known of the engine's speed."""
        known = (self.run / "engine").glob("speed.json")
        for path in [*(self.run / "jobs").iterdir(), *(self.run / "responses").iterdir(), *known]:
            path.unlink()

    def answer_files(self) -> list[Path]:
        """Where there are answers that the next submit will not ask for again: responses, and what an engine wrote."""
        return [*self.run.glob("responses/*.jsonl"), *self.run.glob("engine/*/output.jsonl")]


def answered(paths: Sequence[Path]) -> int:
    """How many requests have a whole line in one of the files."""
    found = set()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            *lines, _ = path.read_bytes().split(b"\n")
            found |= {json.loads(line)["custom_id"] for line in lines}
    return len(found)


def any_answer(paths: Sequence[Path]) -> bool:
    for path in paths:
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as stream:
            if stream.readline().endswith(b"\n"):
                return True
    return False


def texts(paths: Sequence[Path]) -> dict[str, str]:
    """The answers in files of responses, which must all be good ones."""
    found = {}
    for path in paths:
        for line in path.read_bytes().split(b"\n"):
            if line:
                response = json.loads(line)
                assert response["response"]["status_code"] == 200, line
                found[response["custom_id"]] = response["response"]["body"]["choices"][0]["message"]["content"]
    return found


def watch(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    answers: Callable[[], Sequence[Path]],
    near: Path,
    kill_after: float | None = None,
) -> Seen:
    """Run a command to its end, or kill it with all that it has started.

    `answers` are the files that answers come to; engines name something below `near` in their arguments.

    Raises `FailedError` where it ends badly by itself.
    """
    os.sync()
    lives: dict[int, tuple[float, float | None]] = {}
    first = None
    largest = total = 0
    with tempfile.TemporaryFile() as said:
        began, scanned = time.time(), 0.0
        process = psutil.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=said, stderr=said, env={**os.environ, **environment}
        )
        try:
            while process.poll() is None and (kill_after is None or time.time() - began < kill_after):
                if time.time() - scanned > SCAN_SECONDS:
                    scanned = time.time()
                    lives.update((one.pid, (one.create_time(), None)) for one in _engines(near) if one.pid not in lives)
                    _note_ends(lives)
                    family = list(sizes(process))
                    largest, total = max(largest, *family, 0), max(total, sum(family))
                _note_ends(lives)
                if first is None and any_answer(answers()):
                    first = time.time() - began
                time.sleep(LOOK_SECONDS)
        finally:
            end(process)
        ended = time.time()
        if first is None and any_answer(answers()):
            first = ended - began
        code = process.wait()
        if code != 0 and kill_after is None:
            said.seek(0)
            raise FailedError(
                f"{' '.join(command)}: exit code {code}\n{said.read()[-4000:].decode('utf-8', 'replace')}"
            )
    _wait_for_ends(near)
    engine = sum((stopped or ended) - started for started, stopped in lives.values())
    seen = Seen(ended - began, first, engine, answered(answers()), largest / 1e6, total / 1e6)
    early = "none" if first is None else f"{first:.1f} s"
    say(f"  {seen.seconds:.1f} s, first answer {early}, engine {engine:.1f} s, {seen.answers:,} answers")
    return seen


def _engines(near: Path) -> Iterator[psutil.Process]:
    """Batch runners and servers of vLLM whose arguments name a file below `near`."""
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            arguments = one.cmdline()
            runs_vllm = len(arguments) > 2 and arguments[1] == "-m" and arguments[2].startswith("vllm.")
            if runs_vllm and any(argument.startswith(str(near)) for argument in arguments[3:]):
                yield one


def _note_ends(lives: dict[int, tuple[float, float | None]]) -> None:
    for pid, (started, stopped) in lives.items():
        if stopped is None and not _lives(pid, started):
            lives[pid] = (started, time.time())


def _lives(pid: int, started: float) -> bool:
    try:
        one = psutil.Process(pid)
        return bool(one.create_time() == started and one.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _wait_for_ends(near: Path) -> None:
    """What was killed is gone before anything else is measured; batchkit's keeper sees to its engine's session."""
    deadline = time.time() + 30
    while any(_engines(near)):
        if time.time() > deadline:
            raise FailedError(f"an engine on {near} outlives what had started it")
        time.sleep(SCAN_SECONDS)
