"""Counts that are remembered: never other than those that reading everything again gives."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest

from batchkit import cancelling, counts, engines, outcomes, reporting
from batchkit.counts import Counts
from batchkit.due import to_send
from batchkit.errors import RunError, StorageError
from batchkit.jobs import Attempt, Job, Remote
from batchkit.manifests import Rejection, Seal, now
from batchkit.preparation import prepare
from batchkit.responses import ANSWERS, Verdict
from batchkit.runs import Run
from batchkit.submission import discard, submit
from tests.conftest import WriteTasks
from tests.fake_provider import Provider
from tests.fake_server import Server
from tests.made_runs import ENGINE_DIED, MadeRun, failure_line, response_line
from tests.test_submission import Fake, install_fake

ROOT = Path(__file__).parent.parent
STARTUP = ROOT / "benchmarks" / "startup.py"
RETRIES: tuple[frozenset[Verdict], ...] = (
    frozenset(),
    frozenset({Verdict.FAILED}),
    frozenset({Verdict.ANSWERED, Verdict.TRUNCATED}),
    frozenset({Verdict.MISSING, Verdict.EXPIRED}),
)


def assert_true(run: Run) -> None:
    """What is counted, or remembered, is what reading everything says."""
    with Counts(run) as known:
        for seal in run.seals():
            loaded, found = outcomes.load(run, seal), known.of(seal)
            assert found.verdicts() == Counter(outcome.verdict.value for outcome in loaded.outcomes)
            assert found.own == len(loaded.own)
            assert found.answered == sum(outcome.verdict in ANSWERS for outcome in loaded.own)
            assert found.reused == sum(outcome.reused_from is not None for outcome in loaded.own)
            assert found.flying == sum(outcome.in_flight and outcome.verdict not in ANSWERS for outcome in loaded.own)
            for attempts in (1, 2, 3):
                for retry in RETRIES:
                    due = len(to_send(loaded, attempts=attempts, retry=retry))
                    assert found.due(attempts=attempts, retry=retry) == due
                    assert known.look(seal, attempts=attempts, retry=retry)[1] == due
                    if known.is_done(seal, attempts=attempts, retry=retry):
                        assert not due


def shards_read(run: Run, patch: pytest.MonkeyPatch) -> list[int]:
    """The shards whose responses `status` reads."""
    read: list[int] = []
    load = outcomes.load

    def noted(run: Run, seal: Seal, *more: Any) -> Any:
        read.append(seal.shard)
        return load(run, seal, *more)

    with patch.context() as here:
        here.setattr(outcomes, "load", noted)
        reporting.status(run)
    return read


# -- every kind of change ----------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """Three shards of four rows: of the first the last row is rejected and the third failed in passing; the second has
    one attempt that is under way; the third was not sent."""
    made = MadeRun(tmp_path / "run")
    made.add_shard([b'{"n":0}', b'{"n":1}', b'{"n":2}', b"{"], {3: "not JSON"})
    made.add_shard([b'{"n":4}', b'{"n":5}', b'{"n":6}', b'{"n":7}'])
    made.add_shard([b'{"n":8}', b'{"n":9}', b'{"n":10}', b'{"n":11}'])
    made.finish()
    ids = made.ids
    made.add_attempt(0, [response_line(ids[0], "a"), failure_line(ids[1], 400, "no"), failure_line(ids[2], 503, "?")])
    made.add_attempt(1, [response_line(ids[4], "b")], state="running")
    return made


Change = Callable[[MadeRun], None]


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    """As a person would, some time later: a clock that ticks every few milliseconds does not show a quick test."""
    times = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 20_000_000))


def save(made: MadeRun, shard: int, change: Callable[[list[Attempt]], Any]) -> None:
    job = made.run.job(shard)
    change(job.attempts)
    made.run.write_job(job)


def a_file_grows(made: MadeRun) -> None:
    with open(made.run.responses_path(1, 1), "ab") as stream:
        stream.write(response_line(made.ids[5], "late") + b"\n")


def half_a_line_comes(made: MadeRun) -> None:
    with open(made.run.responses_path(1, 1), "ab") as stream:
        stream.write(response_line(made.ids[5], "late")[:40])


def a_line_is_mended_to_the_same_size(made: MadeRun) -> None:
    edit(made.run.responses_path(0, 1), lambda body: body.replace(b"503", b"400"))


def a_file_is_lost(made: MadeRun) -> None:
    made.run.responses_path(0, 1).unlink()


def a_file_comes_before_its_job(made: MadeRun) -> None:
    made.run.responses_path(2, 1).write_bytes(response_line(made.ids[8], "early") + b"\n")


def it_goes_again(made: MadeRun) -> None:
    made.add_attempt(0, [response_line(made.ids[2], "c")], rows=[(2, 3)])


def it_goes_again_in_vain(made: MadeRun) -> None:
    made.add_attempt(0, [failure_line(made.ids[2], 503, "?")], rows=[(2, 3)])


def an_answer_is_asked_for_again(made: MadeRun) -> None:
    made.add_attempt(0, [response_line(made.ids[0], "another"), response_line(made.ids[0], "two")], rows=[(0, 1)])


def an_attempt_is_over(made: MadeRun) -> None:
    save(made, 1, lambda attempts: setattr(attempts[0], "state", "collected"))


def an_attempt_died(made: MadeRun) -> None:
    made.run.responses_path(1, 1).write_bytes(failure_line(made.ids[4], 500, ENGINE_DIED) + b"\n")
    save(made, 1, lambda attempts: setattr(attempts[0], "state", "died"))


def an_attempt_was_refused(made: MadeRun) -> None:
    made.add_attempt(0, state="refused", rows=[(0, 3)])


def at_provider(made: MadeRun, state: Any, **more: Any) -> None:
    remote = Remote(base_url="http://localhost", key_env="KEY", url="/v1/chat/completions")
    attempt = Attempt(number=1, backend="openai", state=state, rows=[(8, 12)], started=now(), remote=remote, **more)
    made.run.write_job(Job(shard=2, attempts=[attempt]))


def it_is_at_a_provider(made: MadeRun) -> None:
    at_provider(made, "running")


def its_batch_was_cancelled(made: MadeRun) -> None:
    at_provider(made, "running")
    assert_true(made.run)
    made.run.responses_path(2, 1).write_bytes(response_line(made.ids[8], "paid") + b"\n")
    at_provider(made, "collected", ending="cancelled")


def it_is_taken_over(made: MadeRun) -> None:
    save(made, 0, lambda attempts: setattr(attempts[0], "reused_from", "/elsewhere"))


def all_is_thrown_away(made: MadeRun) -> None:
    for shard in range(3):
        made.run.requests_path(shard).write_bytes(b"")
    discard(made.run)


def the_shard_is_made_anew(made: MadeRun) -> None:
    """With another row rejected; an answer to it belongs to no request then."""
    seal = next(iter(made.run.seals()))
    first = Rejection(position=0, line=1, custom_id=made.ids[0], code="x", message="not good any more")
    made.run.write_seal(msgspec.structs.replace(seal, rejected=[first, *seal.rejected], requests=seal.requests - 1))


CHANGES: list[Change] = [
    a_file_grows, half_a_line_comes, a_line_is_mended_to_the_same_size, a_file_is_lost, a_file_comes_before_its_job,
    it_goes_again, it_goes_again_in_vain, an_answer_is_asked_for_again, an_attempt_is_over, an_attempt_died,
    an_attempt_was_refused, it_is_at_a_provider, its_batch_was_cancelled, it_is_taken_over, all_is_thrown_away,
    the_shard_is_made_anew,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_counted_anew(change: Change, made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {shard.shard: (shard.verdicts, shard.state) for shard in reporting.status(made.run).shards}
    assert_true(made.run)
    change(made)
    assert_true(made.run)
    after = {shard.shard: (shard.verdicts, shard.state) for shard in reporting.status(made.run).shards}
    reused = reporting.status(made.run).reused
    assert after != before or reused or change in (half_a_line_comes, it_goes_again_in_vain, an_attempt_was_refused,
                                                   a_line_is_mended_to_the_same_size)  # fmt: skip
    assert shards_read(made.run, monkeypatch) == []


def test_all_changes_one_after_another(made: MadeRun) -> None:
    for change in CHANGES:
        change(made)
        assert_true(made.run)


def test_only_the_shard_that_has_changed_is_read(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shards_read(made.run, monkeypatch) == [0, 1]  # of the last there is nothing to read
    assert shards_read(made.run, monkeypatch) == []
    a_file_grows(made)
    assert shards_read(made.run, monkeypatch) == [1]
    assert shards_read(made.run, monkeypatch) == []


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"0":["x"]}', b"\xff\xfe", None])
def test_counts_that_are_lost_or_cannot_be_read_are_made_anew(body: bytes | None, made: MadeRun) -> None:
    assert_true(made.run)
    before = made.run.counts_path.read_bytes()
    if body is None:
        made.run.counts_path.unlink()
    else:
        made.run.counts_path.write_bytes(body)
    assert_true(made.run)
    assert json.loads(made.run.counts_path.read_bytes()) == json.loads(before)


def test_counts_of_another_version_are_not_believed(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_true(made.run)
    monkeypatch.setattr(counts, "__version__", "0.0.1")
    assert shards_read(made.run, monkeypatch) == [0, 1]


def test_counts_of_another_run_are_not_believed(made: MadeRun, tmp_path: Path) -> None:
    assert_true(made.run)
    other = MadeRun(tmp_path / "other")
    other.add_shard([b'{"m":0}', b'{"m":1}', b'{"m":2}', b'{"m":3}'])
    other.add_attempt(0, [response_line(other.ids[0], "a")])
    other.run.counts_path.write_bytes(made.run.counts_path.read_bytes())
    assert_true(other.run)


def test_what_changes_while_it_is_counted_is_not_remembered(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    load = outcomes.load

    def load_and_grow(run: Run, seal: Seal) -> Any:
        loaded = load(run, seal)
        if seal.shard == 1:
            a_file_grows(made)
        return loaded

    with monkeypatch.context() as patch:
        patch.setattr(outcomes, "load", load_and_grow)
        reporting.status(made.run)
    assert set(json.loads(made.run.counts_path.read_bytes())) == {"0"}
    assert_true(made.run)


def test_a_run_that_cannot_be_written_is_counted_each_time(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise StorageError("read-only file system")

    monkeypatch.setattr(counts, "write_whole", refuse)
    assert_true(made.run)
    assert not made.run.counts_path.exists()
    assert shards_read(made.run, monkeypatch) == [0, 1]


def test_two_that_count_at_once_keep_what_the_other_has_counted(made: MadeRun) -> None:
    first, second = list(made.run.seals())[:2]
    with Counts(made.run) as one:
        one.of(first)
        with Counts(made.run) as other:
            other.of(second)
    assert set(json.loads(made.run.counts_path.read_bytes())) == {"0", "1"}
    assert_true(made.run)


def test_files_that_are_damaged_are_noticed_though_they_were_counted(made: MadeRun) -> None:
    assert_true(made.run)
    edit(made.run.ids_path(0), lambda body: body.replace(b"0", b"1"))
    with pytest.raises(RunError, match="checksum"):
        reporting.status(made.run)


def test_a_folder_of_responses_that_cannot_be_read_is_not_an_empty_one(made: MadeRun) -> None:
    folder = made.run.path / "responses"
    folder.rename(folder.with_name("moved"))
    folder.write_bytes(b"")
    with pytest.raises(StorageError, match="responses: cannot be read"):
        reporting.status(made.run)


def test_a_new_file_of_responses_is_seen_also_in_a_folder_that_was_long_at_rest(made: MadeRun) -> None:
    run, folder = made.run, made.run.path / "responses"
    past = time.time_ns() - 3_600_000_000_000
    for number in (2, 3, 4):
        os.utime(folder, ns=(past, past + number))
        assert [attempt for attempt, _ in run.responses_paths(0)] == list(range(1, number))
        assert [path.name for _, path in run.responses_paths(1)] == ["00001.1.jsonl"]
        assert run.responses_paths(2) == []
        run.responses_path(0, number).write_bytes(b"")
        assert [attempt for attempt, _ in run.responses_paths(0)] == list(range(1, number + 1))
        assert run.next_attempt(0) == number + 1
    (folder / ".00000.9.jsonl.1-a.tmp").write_bytes(b"")
    (folder / "00000.x.jsonl").write_bytes(b"")
    (folder / "000000.5.jsonl").write_bytes(b"")
    (folder / "notes.txt").write_bytes(b"")
    os.utime(folder, ns=(past, past))
    assert [attempt for attempt, _ in run.responses_paths(0)] == [1, 2, 3, 4]
    assert_true(run)


# -- through the stages ------------------------------------------------------------------------------------------------


def prepared(write_tasks: WriteTasks, path: Path, backend: str, **options: Any) -> Run:
    rows: list[Any] = [{"id": number, "question": f"q{number}"} for number in range(30)]
    prepare(write_tasks(rows), path, **{"model": "m", "backend": backend, "max_requests": 10, "workers": 1, **options})
    return Run.open(path)


def forbid_reading(patch: pytest.MonkeyPatch) -> None:
    def refuse(run: Run, seal: Seal, *_: Any) -> NoReturn:
        raise AssertionError(f"the responses of shard {seal.shard} are read")

    patch.setattr(outcomes, "load", refuse)


def test_a_submit_leaves_counts_and_the_next_reads_nothing(
    write_tasks: WriteTasks, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(write_tasks, tmp_path / "run", "server")
    assert submit(run, endpoints=[server.url]).sent == 30
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        report = submit(run, endpoints=[server.url])
        assert (report.sent, report.exit_code) == (0, 0)
        assert reporting.status(run).answers == 30
    assert_true(run)
    assert submit(run, endpoints=[server.url], retry=frozenset({Verdict.ANSWERED}), limit=5).sent == 5
    assert_true(run)


def test_an_answer_that_somebody_removed_is_asked_for_again(
    write_tasks: WriteTasks, tmp_path: Path, server: Server
) -> None:
    run = prepared(write_tasks, tmp_path / "run", "server")
    submit(run, endpoints=[server.url])
    edit(run.responses_path(1, 1), lambda body: body[body.index(b"\n") + 1 :])
    assert submit(run, endpoints=[server.url]).sent == 1
    assert_true(run)


def test_batches_are_counted_whatever_becomes_of_them(
    write_tasks: WriteTasks, tmp_path: Path, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(write_tasks, tmp_path / "run", "openai")
    provider.endings.extend(["completed", "cancelled:4", "completed"])
    url = f"{provider.url}/v1"
    submit(run, base_url=url, wait=False)
    assert_true(run)
    cancelling.cancel(run)
    assert_true(run)
    submit(run, base_url=url)
    assert_true(run)
    created = provider.calls["create"]
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        assert submit(run, base_url=url, max_cost=1.0).exit_code == 0
    assert provider.calls["create"] == created


def test_what_is_taken_over_is_counted(write_tasks: WriteTasks, tmp_path: Path, server: Server) -> None:
    submit(prepared(write_tasks, tmp_path / "old", "server", end=25), endpoints=[server.url])
    run = prepared(write_tasks, tmp_path / "run", "server", reuse=(str(tmp_path / "old"),))
    assert_true(run)
    assert reporting.status(run).reused == 25
    assert submit(run, endpoints=[server.url]).sent == 5
    assert_true(run)
    assert reporting.status(run).reused == 25


def test_rows_that_share_a_request_are_counted_as_rows_and_sent_once(
    write_tasks: WriteTasks, tmp_path: Path, server: Server
) -> None:
    rows: list[Any] = [{"id": number, "question": f"q{number % 4}"} for number in range(30)]
    prepare(write_tasks(rows), tmp_path / "run", model="m", backend="server", max_requests=10, dedupe=True, workers=1)
    run = Run.open(tmp_path / "run")
    assert_true(run)
    for limit, sent, answered in ((5, 5, 13), (None, 7, 30)):
        report = submit(run, endpoints=[server.url], limit=limit)
        assert (report.sent, report.unanswered) == (sent, 0)
        assert_true(run)
        assert reporting.status(run).answers == answered


def test_engines_leave_counts_as_well(write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(write_tasks, tmp_path / "run", "vllm")
    install_fake(monkeypatch)
    monkeypatch.setattr(engines, "POLL_SECONDS", 0.02)
    Fake(tmp_path, monkeypatch)
    submit(run)
    forbid_reading(monkeypatch)
    assert reporting.status(run).answers == 30
    assert submit(run).sent == 0


# -- the benchmark -----------------------------------------------------------------------------------------------------


def test_the_benchmark_of_starts_says_what_it_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(STARTUP), "--shards", "3", "--rows", "60", "--times", "2", "--json"]
    done = subprocess.run([*command, str(tmp_path / "out.json")], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    whole = json.loads((tmp_path / "out.json").read_bytes())
    assert (whole["shards"], whole["rows_per_shard"]) == (3, 60)
    assert {"--help", "status", "submit, nothing to do"} <= whole["commands"].keys()
    for name, figure in whole["commands"].items():
        assert name in done.stdout
        assert 0 < figure["cpu_s"] < 600
        assert len(figure["all_wall_s"]) == (1 if name in ("first status", "status, one shard anew") else 2)


def test_the_benchmark_of_starts_compares_what_status_says_with_what_was_written(tmp_path: Path) -> None:
    startup = runpy.run_path(str(STARTUP))
    run = startup["make_run"](tmp_path, shards=2, rows=60)
    failed = startup["answer"](run)
    assert failed == 3
    show = [*startup["COMMAND"], "status", str(run), "--json"]
    startup["cost"](show, 3, startup["checked"](answered=117, failed=3))
    with pytest.raises(AssertionError):
        startup["cost"](show, 3, startup["checked"](answered=118, failed=2))
    with pytest.raises(AssertionError):
        startup["cost"](show, 0, startup["check_nothing"])
