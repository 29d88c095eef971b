"""submit with a real vLLM on the example's model: what it answers, and what is left when it is killed in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from batchkit import outcomes
from batchkit.keeper import members
from batchkit.preparation import prepare
from batchkit.processes import Identity, read_identity
from batchkit.responses import Verdict
from batchkit.runs import Run
from batchkit.submission import submit

DIGITS = Path(__file__).parent.parent / "examples" / "digits"
ENGINE_ARGS = ["--enforce-eager", "--max-model-len", "256", "--dtype", "float32"]
ENGINE_ARGS += ["--limit-mm-per-prompt", '{"image":2}']
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # where Linux keeps it

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600), pytest.mark.usefixtures("small_engine")]


def tasks(count: int) -> Iterator[dict[str, Any]]:
    """The example's tasks, as often as needed, each with an id of its own."""
    rows = [json.loads(line) for line in (DIGITS / "tasks.jsonl").read_text().splitlines()]
    for number in range(count):
        yield {**rows[number % len(rows)], "id": f"r{number}"}


def make_run(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Run:
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(path, folder / "run", model=str(DIGITS / "model"), image_root=str(DIGITS), **options)
    return Run.open(folder / "run")


def found(run: Run) -> list[outcomes.Outcome]:
    return [outcome for seal in run.seals() for outcome in outcomes.load(run, seal).outcomes]


class Inputs(threading.Thread):
    """Keeps a link to every engine's input, so that it can be counted after the engine's folder is gone."""

    def __init__(self, run: Run, folder: Path) -> None:
        super().__init__(daemon=True)
        self._root, self._folder = run.path / "engine", folder
        folder.mkdir()
        self.start()

    def run(self) -> None:
        while True:
            for path in self._root.glob("*/identity.json"):
                kept = self._folder / path.parent.name
                if not kept.exists():
                    os.link(path.with_name("input.jsonl"), kept)
            time.sleep(0.1)

    def starts(self) -> list[list[str]]:
        paths = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)
        return [[json.loads(line)["custom_id"] for line in path.read_text().splitlines()] for path in paths]


def test_every_row_is_answered_by_its_own_picture(tmp_path: Path) -> None:
    rows = list(tasks(200))
    rows[77]["question"] = "Which digit is this? " * 80
    run = make_run(tmp_path, rows, max_requests=70, max_tokens=8)
    report = submit(run, engine_args=ENGINE_ARGS)
    assert (report.starts, report.sent, report.responses, report.exit_code) == (1, 200, 200, 3)
    outcomes_found = found(run)
    verdicts = Counter(str(outcome.verdict) for outcome in outcomes_found)
    assert verdicts == {"answered": 199, "failed": 1}
    assert outcomes_found[77].verdict == Verdict.FAILED
    right = [
        outcome.response is not None and outcome.response.answer == row["truth"]
        for outcome, row in zip(outcomes_found, rows, strict=True)
    ]
    assert sum(right) >= 0.95 * 199
    assert submit(run, engine_args=ENGINE_ARGS).sent == 0


def test_files_that_requests_name_are_the_ones_that_the_engine_opens(tmp_path: Path) -> None:
    names = ["a#1.png", "b?x=1.png", "100%20.png", "c d.png", "größe.png", "a.png", "b.png", "100 .png"]
    rows = [row for row in tasks(40) if isinstance(row["image"], str)][:8]
    (tmp_path / "pictures").mkdir()
    for row, name in zip(rows, names, strict=True):
        shutil.copy(DIGITS / row["image"], tmp_path / "pictures" / name)
        row["image"] = f"{tmp_path}/pictures/{name}"
    rows.append({**rows[0], "id": "r8", "image": f"{tmp_path}/pictures/gone.png"})
    shutil.copy(rows[5]["image"], rows[8]["image"])
    run = make_run(tmp_path, rows, max_tokens=8, images="link")
    Path(rows[8]["image"]).unlink()
    report = submit(run, engine_args=ENGINE_ARGS)
    assert (report.starts, report.sent, report.exit_code) == (1, 8, 3)
    answers = [outcome.response.answer if outcome.response else None for outcome in found(run)]
    assert answers[:8] == [row["truth"] for row in rows[:8]]
    assert found(run)[8].verdict == Verdict.FAILED
    assert all(b"base64" not in path.read_bytes() for path in (run.path / "requests").iterdir())


SUBMIT = "import sys; from batchkit.submission import submit; submit(sys.argv[1], engine_args=sys.argv[2:])"


def start_submit(run: Run) -> subprocess.Popen[bytes]:
    root = DIGITS.parent.parent
    return subprocess.Popen([sys.executable, "-c", SUBMIT, str(run.path), *ENGINE_ARGS], cwd=root)


def wait_for_log(run: Run, text: str, known: set[Path]) -> Path:
    """The folder of an engine that is not `known`, once its log has `text`."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for log in (run.path / "engine").glob("*/log.txt"):
            if log.parent not in known and text in log.read_text():
                return log.parent
        time.sleep(0.1)
    raise AssertionError(f"no engine said {text!r}")


def wait_until_gone(identity: Identity) -> float:
    began = time.monotonic()
    while members(identity.pid):
        assert time.monotonic() - began < 30, "processes were left behind"
        time.sleep(0.05)
    while Path(identity.scratch).exists():
        assert time.monotonic() - began < 30, "the scratch folder was left behind"
        time.sleep(0.05)
    return time.monotonic() - began


def test_killed_in_the_middle_every_row_is_answered_once(tmp_path: Path) -> None:
    shared = set(SHARED_MEMORY.iterdir())
    run = make_run(tmp_path, list(tasks(1200)), max_requests=300, max_tokens=40, extra_body={"ignore_eos": True})
    inputs = Inputs(run, tmp_path / "inputs")

    # batchkit is killed while the engine works.
    first = start_submit(run)
    folder = wait_for_log(run, "| 0/1200 [", set())
    identity = read_identity(folder / "identity.json")
    assert identity is not None
    time.sleep(1)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    print(f"the engine ended {wait_until_gone(identity):.2f} s after batchkit was killed")
    assert set(SHARED_MEMORY.iterdir()) <= shared
    assert {outcome.verdict for outcome in found(run)} == {Verdict.PENDING}

    # vLLM's engine process is killed when some requests are answered; the same submit runs the rest.
    second = start_submit(run)
    folder = wait_for_log(run, " [00:05<", {folder})
    identity = read_identity(folder / "identity.json")
    assert identity is not None
    core = next(pid for pid in members(identity.pid) if "EngineCore" in " ".join(psutil.Process(pid).cmdline()))
    os.kill(core, signal.SIGKILL)
    assert second.wait(300) == 0
    wait_until_gone(identity)
    assert set(SHARED_MEMORY.iterdir()) <= shared

    assert all(outcome.verdict in (Verdict.ANSWERED, Verdict.TRUNCATED) for outcome in found(run))
    starts = inputs.starts()
    assert len(starts) == 3
    assert len(starts[0]) == len(starts[1]) == 1200
    kept = 1200 - len(starts[2])
    print(f"{kept} answers were kept of the engine that died")
    responses = Counter(
        json.loads(line)["custom_id"]
        for path in (run.path / "responses").iterdir()
        for line in path.read_bytes().splitlines()
    )
    assert set(responses.values()) == {1}, "a request that had a response was sent again"
    assert kept > 0
    left = submit(run, engine_args=ENGINE_ARGS)
    assert (left.sent, left.exit_code) == (0, 0)
