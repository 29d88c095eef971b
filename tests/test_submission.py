"""submit: what has a response is never sent again, whatever dies and whenever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from batchkit import division, engines, outcomes, rounds, submission
from batchkit.backends import vllm_install
from batchkit.errors import EngineError, RunBusyError, RunError, StorageError, UsageError
from batchkit.keeper import members
from batchkit.preparation import prepare
from batchkit.processes import read_identity
from batchkit.responses import Verdict
from batchkit.runs import Run
from batchkit.submission import submit

ENGINE = Path(__file__).with_name("fake_engine.py")


def install_fake(patch: pytest.MonkeyPatch, version: tuple[int, int] = (0, 32)) -> None:
    install = vllm_install.Install(version=version, text="0.0", cpu=True, module="fake")
    patch.setattr(vllm_install, "find_install", lambda: install)

    def command(_: object, *, source: Path, target: Path, **__: object) -> list[str]:
        return [sys.executable, str(ENGINE), "-i", str(source), "-o", str(target)]

    patch.setattr(vllm_install, "engine_command", command)


class Fake:
    """The fake engine's faults, and what it was asked."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.journal = folder / "journal.jsonl"
        self._patch = patch
        self.set()

    def set(self, **faults: Any) -> None:
        self._patch.setenv("FAKE_ENGINE", json.dumps({"journal": str(self.journal), **faults}))

    @property
    def starts(self) -> list[list[str]]:
        return [json.loads(line) for line in self.journal.read_text().splitlines()] if self.journal.exists() else []

    @property
    def asked(self) -> Counter[str]:
        return Counter(custom_id for start in self.starts for custom_id in start)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    install_fake(monkeypatch)
    monkeypatch.setattr(engines, "EXCUSE_SECONDS", 0.0)
    monkeypatch.setattr(engines, "POLL_SECONDS", 0.02)
    return Fake(tmp_path, monkeypatch)


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run of `count` rows, prepared for real, 50 requests a shard; rows in `bad` are rejected."""

    def make(count: int = 200, *, bad: tuple[int, ...] = ()) -> Run:
        tasks = tmp_path / "tasks.jsonl"
        rows = [json.dumps({"id": n, "question": f"{n}?"}) if n not in bad else "{" for n in range(count)]
        tasks.write_text("\n".join(rows) + "\n")
        prepare(tasks, tmp_path / "run", model="m", max_requests=50, workers=1)
        return Run.open(tmp_path / "run")

    return make


def verdicts(run: Run) -> Counter[str]:
    return Counter(str(outcome.verdict) for seal in run.seals() for outcome in outcomes.load(run, seal).outcomes)


def assert_each_answered_by_its_own(run: Run) -> None:
    for seal in run.seals():
        found = outcomes.load(run, seal)
        assert not found.unexpected
        assert not found.unreadable
        for outcome in found.outcomes:
            if outcome.verdict == Verdict.ANSWERED:
                assert outcome.response is not None
                assert outcome.response.answer == f"answer to {outcome.custom_id}"


def assert_nothing_left(run: Run) -> None:
    left = [path for path in (run.path / "engine").iterdir() if path.is_dir()]
    assert left == []
    states = {attempt.state for seal in run.seals() for attempt in run.job(seal.shard).attempts}
    assert states <= {"collected", "died"}


def ids_of(run: Run) -> list[str]:
    return [custom_id for seal in run.seals() for custom_id in run.read_ids(seal)]


# -- when all goes well ----------------------------------------------------------------------------------------------


def test_one_start_takes_many_shards_and_its_output_is_divided(fake: Fake, make_run: MakeRun) -> None:
    run = make_run(200, bad=(3, 120))
    report = submit(run)
    assert len(fake.starts) == 1
    assert (report.sent, report.responses, report.remaining, report.unanswered) == (198, 198, 0, 2)
    assert report.exit_code == 3, "two rows are rejected"
    assert verdicts(run) == {"answered": 198, "rejected": 2}
    assert_each_answered_by_its_own(run)
    assert_nothing_left(run)
    assert [path.name for path in sorted((run.path / "responses").iterdir())] == [f"{n:05d}.1.jsonl" for n in range(4)]


def test_submit_again_sends_nothing(fake: Fake, make_run: MakeRun) -> None:
    run = make_run(60)
    assert submit(run).exit_code == 0
    again = submit(run)
    assert (again.sent, again.starts, again.exit_code) == (0, 0, 0)
    assert len(fake.starts) == 1


def test_a_pilot_and_then_the_rest(fake: Fake, make_run: MakeRun) -> None:
    run = make_run(120)
    pilot = submit(run, limit=20)
    assert (pilot.sent, pilot.remaining, pilot.exit_code) == (20, 100, 8)
    assert fake.starts == [ids_of(run)[:20]]
    assert submit(run).exit_code == 0
    assert set(fake.asked.values()) == {1}
    assert verdicts(run) == {"answered": 120}


def test_parts_of_a_run_are_disjoint_and_cover_it(fake: Fake, make_run: MakeRun) -> None:
    run = make_run(300)
    for part in ("1/2", "2/2"):
        submit(run, shards=part)
    assert len(fake.starts) == 2
    assert set(fake.asked.values()) == {1}
    assert verdicts(run) == {"answered": 300}


def test_replicas_share_the_work(fake: Fake, make_run: MakeRun) -> None:
    fake.set(seconds=0.5)
    run = make_run(200)
    assert submit(run, replicas=2).starts == 2
    assert sorted(map(len, fake.starts)) == [100, 100]
    assert verdicts(run) == {"answered": 200}
    assert_each_answered_by_its_own(run)


@pytest.mark.parametrize("part", ["0/2", "3/2", "two", "1/0"])
def test_a_part_that_is_none_is_refused(fake: Fake, make_run: MakeRun, part: str) -> None:
    with pytest.raises(UsageError, match="not a part"):
        submit(make_run(10), shards=part)


@pytest.mark.parametrize(
    "args", [("-i", "x"), ("--input-file=x",), ("--served_model_name", "x"), ("--output-file", "x")]
)
def test_arguments_that_batchkit_sets_are_refused(fake: Fake, make_run: MakeRun, args: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="batchkit sets"):
        submit(make_run(10), engine_args=args)


def test_retry_sends_verdicts_again(fake: Fake, make_run: MakeRun) -> None:
    run = make_run(10)
    submit(run)
    assert submit(run, retry=frozenset({Verdict.ANSWERED})).sent == 10
    assert verdicts(run) == {"answered": 10}


def test_changed_requests_are_not_sent(fake: Fake, make_run: MakeRun) -> None:
    run = make_run(10)
    path = run.requests_path(0)
    path.write_bytes(path.read_bytes().replace(b"9?", b"8?"))
    with pytest.raises(RunError, match="checksum") as caught:
        submit(run)
    assert caught.value.hint is not None
    assert fake.starts == []
    with pytest.raises(RunError, match="checksum"):
        submit(run)


# -- when the engine dies --------------------------------------------------------------------------------------------


def test_requests_of_a_died_engine_run_again_and_answers_are_kept(fake: Fake, make_run: MakeRun) -> None:
    fake.set(flaky=1)
    run = make_run(100)
    report = submit(run)
    assert (report.starts, report.deaths, report.exit_code) == (2, 1, 0)
    assert verdicts(run) == {"answered": 100}
    assert_nothing_left(run)


@pytest.mark.parametrize("death", ["lines", "crash", "stream", "half"])
def test_a_poisonous_request_is_found_in_few_starts(fake: Fake, make_run: MakeRun, death: str) -> None:
    run = make_run(200)
    poison = ids_of(run)[137]
    fake.set(poison=[poison], death=death)
    report = submit(run)
    assert verdicts(run) == {"answered": 199, "failed": 1}
    assert (report.remaining, report.unanswered, report.exit_code) == (0, 1, 3)
    failed = outcomes.load(run, next(s for s in run.seals() if s.start <= 137 < s.end)).outcomes[137 - 100]
    assert failed.custom_id == poison
    assert failed.message is not None
    assert "the last time alone" in failed.message
    assert len(fake.starts) <= 14, f"{death}: {len(fake.starts)} starts"
    assert_each_answered_by_its_own(run)
    assert_nothing_left(run)
    assert submit(run).sent == 0, "it is given up"


@pytest.mark.parametrize("places", [(0,), (199,), (3, 150), (0, 1)])
def test_poison_anywhere_is_found_without_any_answer_of_a_died_start(
    fake: Fake, make_run: MakeRun, places: tuple[int, ...]
) -> None:
    run = make_run(200)
    fake.set(poison=[ids_of(run)[place] for place in places], death="lines", all_at_once=True)
    report = submit(run)
    assert verdicts(run) == {"answered": 200 - len(places), "failed": len(places)}
    assert report.starts <= 13 * len(places)


def test_an_engine_that_never_answers_is_broken_and_fails_nothing(fake: Fake, make_run: MakeRun) -> None:
    fake.set(flaky=1000)
    run = make_run(200)
    with pytest.raises(EngineError, match="bad mood"):
        submit(run)
    assert len(fake.starts) <= 6
    assert verdicts(run) == {"pending": 200}
    fake.set()
    assert submit(run).exit_code == 0


def test_an_engine_that_has_worked_is_excused_one_failed_start(
    fake: Fake, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "FIRST_ROUND", 50)
    run = make_run(100)
    fake.set(late=[2])
    assert submit(run).exit_code == 0
    fake.set(late=[4, 5])
    with pytest.raises(EngineError, match="memory"):
        submit(run, retry=frozenset({Verdict.ANSWERED}))
    assert verdicts(run) == {"answered": 100}


def test_a_pilot_of_one_that_kills_the_engine_is_the_engines_fault(fake: Fake, make_run: MakeRun) -> None:
    fake.set(flaky=1000)
    run = make_run(10)
    with pytest.raises(EngineError):
        submit(run, limit=1)
    assert verdicts(run) == {"pending": 10}


def test_one_attempt_means_that_nothing_runs_again(fake: Fake, make_run: MakeRun) -> None:
    fake.set(flaky=1)
    run = make_run(10)
    report = submit(run, attempts=1)
    assert (report.starts, report.remaining, report.exit_code) == (1, 10, 8)


@pytest.mark.parametrize(
    ("log", "said", "hint"),
    [
        ("ModuleNotFoundError: No module named 'vllm'", "not installed", "pip install"),
        ("run_batch.py: error: unrecognized arguments: --nonsense", "--nonsense", "behind --"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB", "out of memory", "max-model-len"),
        ("OSError: nothing is not a local folder and is not a valid model identifier", "cannot load", "config.json"),
    ],
)
def test_an_engine_that_does_not_start_is_one_clear_error(
    fake: Fake, make_run: MakeRun, log: str, said: str, hint: str
) -> None:
    fake.set(startup=f'Traceback (most recent call last):\n  File "x.py", line 1, in x\n    x()\n{log}')
    run = make_run(10)
    with pytest.raises(EngineError, match=said) as caught:
        submit(run)
    assert hint in (caught.value.hint or "")
    assert caught.value.detail == log
    assert verdicts(run) == {"pending": 10}


def test_a_disk_that_is_full_loses_nothing(fake: Fake, make_run: MakeRun) -> None:
    fake.set(startup="OSError: [Errno 28] No space left on device")
    run = make_run(10)
    with pytest.raises(StorageError, match="disk is full"):
        submit(run)
    fake.set()
    assert submit(run).exit_code == 0


def test_a_disk_that_is_full_when_responses_are_written_loses_nothing(
    fake: Fake, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(200)

    def full(lines: Iterable[bytes], target: Path) -> None:
        if target.name.startswith("00002"):
            raise StorageError("disk full")
        write(lines, target)

    write = division._write
    with monkeypatch.context() as patch:
        patch.setattr(division, "_write", full)
        with pytest.raises(StorageError):
            submit(run)
    assert verdicts(run) == {"answered": 100, "pending": 100}
    report = submit(run)
    assert (report.sent, report.exit_code) == (0, 0), "the engine's output was still there"
    assert verdicts(run) == {"answered": 200}


# -- when batchkit dies ----------------------------------------------------------------------------------------------

SUBMIT = """
import os, sys
import pytest
sys.path.insert(0, sys.argv[2])
from batchkit import division, runs, sessions
from batchkit.backends import vllm
from tests.test_submission import install_fake
install_fake(pytest.MonkeyPatch(), (0, int(sys.argv[4])))
step, left = sys.argv[3], 0
if ":" in step:
    step, left = step.split(":")[0], int(step.split(":")[1])
def killed(module, name, when):
    real = getattr(module, name)
    def wrapper(*args, **kwargs):
        global left
        if when == "before" and not left:
            os.kill(os.getpid(), 9)
        value = real(*args, **kwargs)
        if when == "after" and not left:
            os.kill(os.getpid(), 9)
        left -= 1
        return value
    setattr(module, name, wrapper)
places = {
    "plan": (sessions, "request_lines", "before"), "input": (runs.Run, "write_job", "before"),
    "intent": (runs.Run, "write_job", "after"), "laid": (sessions, "lay_down", "after"),
    "started": (vllm.Vllm, "start", "after"), "running": (sessions, "mark_running", "after"),
    "output": (sessions, "collect", "before"), "response": (division, "_write", "after"),
    "mark": (sessions, "_mark", "after"), "folder": (sessions.shutil, "rmtree", "before"),
    "collected": (sessions, "collect", "after"),
}
if step in places:
    killed(*places[step])
from batchkit.submission import submit
submit(sys.argv[1], engine_args=())
"""


def spawn(run: Run, step: str, minor: int = 32) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-c", SUBMIT, str(run.path), root, step, str(minor)], cwd=root, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize(
    "step",
    [
        *("plan", "input", "intent", "intent:2", "laid", "started", "running", "output", "response", "response:2"),
        *("mark:1", "mark:3", "mark:5", "mark:7", "folder", "collected"),
    ],
)
def test_a_kill_between_any_two_steps_loses_nothing_and_sends_nothing_twice(
    fake: Fake, make_run: MakeRun, step: str
) -> None:
    run = make_run(200)
    killed = spawn(run, step)
    assert killed.wait(60) == -signal.SIGKILL, killed.stderr and killed.stderr.read()
    answered = verdicts(run)["answered"]
    output_was_whole = step.split(":", maxsplit=1)[0] in ("output", "response", "folder", "collected") or step in (
        "mark:5",
        "mark:7",
    )
    report = submit(run)
    assert report.exit_code == 0
    assert verdicts(run) == {"answered": 200}
    assert report.sent <= 200 - answered
    if output_was_whole:
        assert set(fake.asked.values()) == {1}, "what had a response was sent again"
    assert_each_answered_by_its_own(run)
    assert_nothing_left(run)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("minor", [32, 33])
def test_killed_in_the_middle_the_engine_ends_and_its_lines_are_kept(
    fake: Fake, make_run: MakeRun, number: signal.Signals, minor: int
) -> None:
    run = make_run(100)
    fake.set(seconds=20, death="stream", hang=minor == 32)
    process = spawn(run, "none", minor)
    folder = wait_for(lambda: next((run.path / "engine").glob("*/log.txt"), None)).parent
    wait_for(lambda: "Running batch" in (folder / "log.txt").read_text())
    identity = read_identity(folder / "identity.json")
    assert identity is not None
    wait_for(lambda: minor == 32 or (folder / "output.jsonl").read_bytes().count(b"\n") > 5)
    os.kill(process.pid, number)
    assert process.wait(20) in (-9, 128 + 15, 1, 130, -2)
    wait_for(lambda: members(identity.pid) == [])
    wait_for(lambda: not Path(identity.scratch).exists())
    fake.set()
    report = submit(run)
    assert verdicts(run) == {"answered": 100}
    assert_each_answered_by_its_own(run)
    assert_nothing_left(run)
    if minor == 33:
        assert report.sent < 100, "the flushed prefix was kept"
        asked = fake.starts
        assert set(asked[1]) < set(asked[0])


def test_what_a_streaming_engine_has_answered_shows_while_it_runs(fake: Fake, make_run: MakeRun) -> None:
    run = make_run(100)
    fake.set(seconds=8, death="stream")
    process = spawn(run, "none", minor=33)
    wait_for(lambda: 0 < verdicts(run)["answered"] < 100)
    assert verdicts(run)["pending"] > 0
    assert process.wait(60) == 0
    assert verdicts(run) == {"answered": 100}
    assert_each_answered_by_its_own(run)


def test_two_submits_never_work_on_one_shard(fake: Fake, make_run: MakeRun) -> None:
    run = make_run(100)
    fake.set(seconds=3)
    process = spawn(run, "none")
    wait_for(lambda: next((run.path / "engine").glob("*/output.jsonl"), None))
    with pytest.raises(RunBusyError, match=f"process {process.pid}"):
        submit(run)
    with pytest.raises(RunBusyError):
        submission.discard(run)
    assert process.wait(30) == 0
    assert set(fake.asked.values()) == {1}
    assert verdicts(run) == {"answered": 100}


def test_discard_makes_everything_pending(fake: Fake, make_run: MakeRun) -> None:
    run = make_run(60)
    submit(run, limit=55)
    assert submission.responses_count(run) == 55
    assert submission.discard(run) == 55
    assert verdicts(run) == {"pending": 60}


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found
