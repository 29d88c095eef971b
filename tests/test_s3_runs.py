"""Runs, task files and results in a bucket, on a real server of the S3 protocol: as local ones, and from two machines.

A machine is a working copy of its own (BATCHKIT_WORK_DIR).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from batchkit import cancelling, reporting, s3, storage, tenures
from batchkit.backends.openai import OpenAIBatches
from batchkit.cli import main
from batchkit.errors import InputError, RunBusyError, RunError, StorageError, UsageError
from batchkit.evaluation import evaluate
from batchkit.jobs import Attempt, Job
from batchkit.merging import merge
from batchkit.preparation import prepare
from batchkit.responses import Verdict
from batchkit.runs import Run
from batchkit.submission import discard, submit
from tests import s3_servers
from tests.fake_provider import Provider
from tests.fake_server import Server
from tests.made_runs import response_line, task_lines
from tests.s3_servers import ACCESS_KEY, SECRET_KEY, Bucket
from tests.test_submission import Fake, install_fake

ROWS = 30
ROOT = Path(__file__).parent.parent


def prepared(bucket: Bucket, *, backend: Any = "server", name: str = "runs/one", shard: int = 10) -> Run:
    tasks = bucket.put("in/tasks.jsonl", task_lines())
    prepare(tasks, bucket.uri(name), model="m", backend=backend, max_requests=shard, workers=1)
    return Run.open(bucket.uri(name))


def send(run: Run | str, server: Server, **options: Any) -> Any:
    return submit(run, endpoints=[server.url], **options)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


# -- as a local run ----------------------------------------------------------------------------------------------------


def test_a_run_in_a_bucket_gives_the_bytes_that_a_local_one_gives(
    bucket: Bucket, server: Server, tmp_path: Path
) -> None:
    tasks = bucket.put("in/tasks.jsonl.gz", gzip.compress(task_lines()))
    local = tmp_path / "tasks.jsonl"
    local.write_bytes(task_lines())
    for source, target in ((tasks, bucket.uri("runs/one")), (str(local), str(tmp_path / "run"))):
        done = call("run", source, target, "--model", "m", "--backend", "server", "--max-requests", "10",
                    "--endpoints", server.url)  # fmt: skip
        assert done.exit_code == 0, done.output
        assert f"results: {target}/results.jsonl" in done.output
    assert bucket.get("runs/one/results.jsonl") == (tmp_path / "run" / "results.jsonl").read_bytes()
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    kept = {name for name in bucket.names("runs/one/") if "/leases/" not in name}
    assert kept == {f"runs/one/{name}" for name in files if not name.startswith("leases/")}


def test_shards_that_are_sealed_while_the_run_is_listed_are_not_forgotten(
    bucket: Bucket, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = s3.listed

    def late(uri: str) -> Iterator[s3.Found]:
        found = list(listed(uri))
        time.sleep(0.2)
        return iter(found)

    monkeypatch.setattr(s3, "listed", late)
    tasks = bucket.put("in/tasks.jsonl", task_lines())
    done = call("run", tasks, bucket.uri("runs/one"), "--model", "m", "--backend", "server", "--max-requests", "3",
                "--endpoints", server.url)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert set(server.answered.values()) == {1}


def test_a_run_in_a_bucket_is_reused_from_another_machine(bucket: Bucket, server: Server, tmp_path: Path) -> None:
    send(prepared(bucket), server)
    bucket.on("second")
    report = prepare(
        bucket.uri("in/tasks.jsonl"),
        tmp_path / "again",
        model="m",
        backend="server",
        reuse=(bucket.uri("runs/one"),),
        workers=1,
    )
    assert (report.requests, report.to_send) == (ROWS, 0)


def test_status_on_another_machine_fetches_no_responses_that_were_counted(bucket: Bucket, server: Server) -> None:
    first = prepared(bucket)
    send(first, server, shards="1/2")  # the first and the third shard
    bucket.on("second")
    here = Run.open(bucket.uri("runs/one"))
    status = reporting.status(here)
    assert (status.answers, status.verdicts["pending"]) == (20, 10)
    assert not list((here.path / "responses").iterdir())
    assert not list((here.path / "rows").iterdir())
    assert send(here, server).sent == 10
    assert [path.name for path in (here.path / "responses").iterdir()] == ["00001.1.jsonl"]
    bucket.on("first")
    assert reporting.status(bucket.uri("runs/one")).answers == ROWS
    assert send(bucket.uri("runs/one"), server).sent == 0
    assert len(list((first.path / "responses").iterdir())) == 2


def test_responses_that_another_machine_has_replaced_are_counted_anew(bucket: Bucket, server: Server) -> None:
    send(prepared(bucket), server)
    assert reporting.status(bucket.uri("runs/one")).answers == ROWS
    lines = bucket.get("runs/one/responses/00001.1.jsonl").splitlines(keepends=True)
    bucket.put("runs/one/responses/00001.1.jsonl", b"".join(lines[1:]))
    for machine in ("first", "second"):
        bucket.on(machine)
        for _ in range(2):
            status = reporting.status(bucket.uri("runs/one"))
            assert (status.answers, status.verdicts["missing"]) == (ROWS - 1, 1)


def test_what_still_comes_in_on_another_machine_is_counted_as_far_as_it_has_come(bucket: Bucket) -> None:
    run = prepared(bucket)
    bucket.put("runs/one/responses/notes.txt", b"of somebody")
    ids = run.read_ids(next(iter(run.seals())))
    attempt = Attempt(number=1, backend="server", state="running", rows=[(0, 10)], started="2026-01-01T00:00:00+00:00")
    run.write_job(Job(shard=0, attempts=[attempt]))
    bucket.on("second")
    for number in (1, 2, 3):
        part = f"runs/one/responses/00000.1.jsonl.part-{number:05d}"
        bucket.put(part, response_line(ids[number], "there") + b"\n")
        for _ in range(3):
            assert reporting.status(bucket.uri("runs/one")).verdicts["answered"] == number


def test_a_run_that_may_only_be_read_is_counted_all_the_same(
    bucket: Bucket, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(prepared(bucket), server)
    s3.delete(bucket.uri("runs/one/counts.json"))
    bucket.on("second")

    def refuse(uri: str, *_: Any, **__: Any) -> str:
        raise StorageError(f"{uri}: AccessDenied")

    monkeypatch.setattr(s3, "put_file", refuse)
    for _ in range(2):
        assert reporting.status(bucket.uri("runs/one")).answers == ROWS
    assert "runs/one/counts.json" not in bucket.names("runs/one/")


def test_evaluate_on_another_machine_takes_the_results_as_they_were_merged(bucket: Bucket, server: Server) -> None:
    run = prepared(bucket)
    send(run, server)
    merge(run, prefix="answer_")
    before = bucket.get("runs/one/results.jsonl")
    bucket.on("second")
    assert not evaluate(bucket.uri("runs/one")).merged
    assert bucket.get("runs/one/results.jsonl") == before


def test_another_machine_sees_all_of_it_and_fetches_only_what_it_reads(bucket: Bucket, server: Server) -> None:
    first = prepared(bucket)
    send(first, server)
    assert not list((first.path / "requests").glob("*.jsonl"))  # let go with the shards' leases
    bucket.on("second")
    status = reporting.status(bucket.uri("runs/one/"))
    assert (status.run, status.answers, status.exit_code) == (bucket.uri("runs/one"), ROWS, 0)
    merge(bucket.uri("runs/one"))
    assert len(bucket.get("runs/one/results.jsonl").splitlines()) == ROWS
    here = Run.open(bucket.uri("runs/one"))
    assert not list((here.path / "requests").glob("*.jsonl"))
    assert here.path.is_relative_to(bucket.folder / "second")


def test_prepare_goes_on_behind_the_shards_that_another_machine_sealed(bucket: Bucket) -> None:
    whole = prepared(bucket)
    kept = {name: bucket.get(name) for name in bucket.names("runs/one/re")}
    for name in ("prepared.json", "requests/00001.json", "requests/00002.json", "rows/00001.jsonl"):
        s3.delete(bucket.uri(f"runs/one/{name}"))
    bucket.on("second")
    tasks = bucket.uri("in/tasks.jsonl")
    report = prepare(tasks, whole.name, model="m", backend="server", max_requests=10, workers=1)
    assert (report.rows, report.shards, report.already) == (ROWS, 3, False)
    assert {name: bucket.get(name) for name in bucket.names("runs/one/re")} == kept


def test_what_is_no_run_is_not_written_into(bucket: Bucket) -> None:
    tasks = bucket.put("photos/tasks.jsonl", task_lines())
    with pytest.raises(RunError, match="exists and is not a run directory"):
        prepare(tasks, bucket.uri("photos"), model="m")
    with pytest.raises(RunError, match="not a run directory"):
        Run.open(bucket.uri("photos"))
    assert bucket.names("photos/") == ["photos/tasks.jsonl"]


def test_another_run_under_the_same_name_takes_nothing_over_from_the_first(bucket: Bucket, server: Server) -> None:
    send(prepared(bucket), server)
    for name in bucket.names("runs/one/"):
        s3.delete(bucket.uri(name))
    again = prepared(bucket, shard=20)
    assert not again.was_sent()
    assert [seal.end for seal in again.seals()] == [20, 30]
    assert reporting.status(again).verdicts["pending"] == ROWS


def test_no_resume_empties_the_bucket_of_responses(bucket: Bucket, server: Server) -> None:
    send(prepared(bucket), server)
    bucket.on("second")
    assert discard(bucket.uri("runs/one")) == ROWS
    assert not bucket.names("runs/one/responses/")
    assert not bucket.names("runs/one/jobs/")
    bucket.on("first")
    assert reporting.status(bucket.uri("runs/one")).verdicts["pending"] == ROWS


def test_an_object_of_many_megabytes_goes_in_parts(bucket: Bucket, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(s3, "WHOLE_BYTES", 12 << 20)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(13 << 20))
    etag = s3.put_file(bucket.uri("large"), path)
    assert etag.endswith('-3"')
    s3.download(bucket.uri("large"), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_a_run_with_vllm_works_too(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(monkeypatch)
    Fake(tmp_path, monkeypatch)
    report = submit(prepared(bucket, backend="vllm"))
    assert (report.responses, report.exit_code) == (ROWS, 0)
    bucket.on("second")
    assert merge(bucket.uri("runs/one")).verdicts[Verdict.ANSWERED] == ROWS
    assert not bucket.names("runs/one/engine/")


# -- killed, and resumed elsewhere -----------------------------------------------------------------------------------

SUBMIT = """
import sys
from batchkit import growth, tenures
growth.PART_SECONDS, tenures.VALID_SECONDS, tenures.RENEW_SECONDS = 0.2, {valid}, 0.3
from batchkit.submission import submit
submit(sys.argv[1], endpoints=[sys.argv[2]], concurrency=1)
"""


def start_submit(run: str, server: Server, valid: float = 2.0) -> subprocess.Popen[bytes]:
    script = SUBMIT.format(valid=valid)
    return subprocess.Popen([sys.executable, "-c", script, run, server.url], cwd=ROOT, stderr=subprocess.PIPE)


def wait_for(what: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come about")


def patiently(act: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Do it as soon as the lease of a dead process has expired."""
    end = time.monotonic() + seconds
    while True:
        try:
            return act()
        except RunBusyError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def parts(bucket: Bucket) -> list[str]:
    return [name for name in bucket.names("runs/one/responses/") if ".part-" in name]


def test_a_submit_that_was_killed_goes_on_from_another_machine(bucket: Bucket, server: Server) -> None:
    run = prepared(bucket, shard=ROWS)
    server.delay = 0.1
    killed = start_submit(run.name, server, valid=3.0)
    wait_for(lambda: len(parts(bucket)) > 1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    synced = [json.loads(line) for name in parts(bucket) for line in bucket.get(name).splitlines()]
    assert len(synced) >= 2
    server.delay = 0.0
    bucket.on("second")
    with pytest.raises(RunBusyError, match=rf"shard 0 is held by process {killed.pid} on .*, last heard of \d+ s ago"):
        send(run.name, server)
    report = patiently(lambda: send(run.name, server))
    assert report.responses + len(synced) == ROWS
    summary = merge(run.name)
    assert summary.verdicts[Verdict.ANSWERED] == ROWS
    for line in synced:
        assert server.asked["q" + line["custom_id"].partition("-")[0]] == 1
    assert not parts(bucket)
    assert [json.loads(line)["id"] for line in bucket.get("runs/one/results.jsonl").splitlines()] == list(range(ROWS))


def test_on_the_same_machine_nothing_is_waited_for_and_no_answer_lost(bucket: Bucket, server: Server) -> None:
    run = prepared(bucket)
    server.delay = 0.1
    killed = start_submit(run.name, server, valid=600.0)
    wait_for(lambda: server.answered.total() > 3 and parts(bucket))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    server.delay = 0.0
    send(run.name, server)
    assert merge(run.name).verdicts[Verdict.ANSWERED] == ROWS
    assert server.answered.total() <= ROWS + 1  # the one that was under way
    assert not parts(bucket)


def test_a_machine_that_is_lost_with_its_engine_leaves_its_parts(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake(monkeypatch)
    fake = Fake(tmp_path, monkeypatch)
    run = prepared(bucket, backend="vllm")
    began = "2026-01-01T00:00:00+00:00"
    attempt = Attempt(number=1, backend="vllm", state="running", rows=[(0, 10)], started=began, session="gone")
    run.write_job(Job(shard=0, attempts=[attempt]))
    ids = run.read_ids(next(run.seals()))
    for number, custom_ids in enumerate((ids[:3], ids[3:5]), 1):
        lines = b"".join(response_line(one, "yes") + b"\n" for one in custom_ids)
        bucket.put(f"runs/one/responses/00000.1.jsonl.part-{number:05d}", lines)
    bucket.on("second")
    submit(run.name)
    assert not set(ids[:5]) & set(fake.asked)
    assert merge(run.name).verdicts[Verdict.ANSWERED] == ROWS
    first = Run.open(run.name).job(0).attempts[0]
    assert (first.state, first.ended is not None) == ("died", True)
    assert not parts(bucket)


def test_responses_whose_put_failed_are_put_when_the_shard_is_next_worked_on(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake(monkeypatch)
    fake = Fake(tmp_path, monkeypatch)
    run = prepared(bucket, backend="vllm")
    real = s3.put_file

    def fail(uri: str, path: Path, **condition: Any) -> str:
        if "/responses/" in uri:
            raise StorageError(f"{uri}: cannot be reached")
        return real(uri, path, **condition)

    monkeypatch.setattr(s3, "put_file", fail)
    with pytest.raises(StorageError, match="cannot be reached"):
        submit(run.name)
    monkeypatch.setattr(s3, "put_file", real)
    submit(run.name)
    assert merge(run.name).verdicts[Verdict.ANSWERED] == ROWS
    assert set(fake.asked.values()) == {1}
    assert len(bucket.names("runs/one/responses/")) == 3


# -- two at once -----------------------------------------------------------------------------------------------------


def test_a_second_machine_works_on_other_shards_or_is_told_who_holds_them(bucket: Bucket, server: Server) -> None:
    run = prepared(bucket)
    with run.lease("00001"):
        bucket.on("second")
        report = send(run.name, server)
        assert (report.responses, report.remaining) == (20, 10)
        with pytest.raises(RunBusyError, match=rf"shard 1 is held by process {os.getpid()} on "):
            send(run.name, server, shards="2/3")
        with pytest.raises(RunBusyError), Run.open(run.name).lease("00001"):
            pass
    assert send(run.name, server).responses == 10
    assert set(server.asked.values()) == {1}
    assert [name for name in bucket.names("runs/one/leases/") if "processes" not in name] == []


def test_two_processes_of_one_machine_share_the_working_copy(bucket: Bucket, server: Server) -> None:
    run = prepared(bucket)
    server.delay = 0.02
    both = [start_submit(run.name, server) for _ in range(2)]
    for one in both:
        one.wait()
    send(run.name, server)  # where the second was told that all are held
    assert merge(run.name).verdicts[Verdict.ANSWERED] == ROWS
    assert set(server.asked.values()) == {1}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that expire at once, and whose holders, as if their laptops were closed, do not renew them."""
    monkeypatch.setattr(tenures, "VALID_SECONDS", 1.0)
    monkeypatch.setattr(tenures, "RENEW_SECONDS", 1000.0)


def test_a_lost_lease_stops_its_former_holder(bucket: Bucket, impatient: None) -> None:
    sleeper = prepared(bucket)
    lease = sleeper.lease("00000")
    lease.__enter__()
    bucket.on("second")
    heir = Run.open(sleeper.name)
    new_lease = contextlib.ExitStack()
    patiently(lambda: new_lease.enter_context(heir.lease("00000")))
    job = Job(shard=0, attempts=[Attempt(number=1, backend="server", state="running", rows=[(0, 10)], started="now")])
    heir.write_job(job)
    with pytest.raises(RunBusyError, match=r"was taken over by process \d+ on .*") as caught:
        sleeper.write_job(Job(shard=0))
    assert "run the same command again" in str(caught.value.hint)
    path = sleeper.responses_path(0, 1)
    path.write_bytes(b"{}\n")
    with pytest.raises(RunBusyError):
        storage.settle(path)
    lease.__exit__(None, None, None)
    assert json.loads(bucket.get("runs/one/jobs/00000.json"))["attempts"]
    assert "runs/one/leases/00000.json" in bucket.names("runs/one/leases/")
    assert not bucket.names("runs/one/responses/")
    new_lease.close()
    assert "runs/one/leases/00000.json" not in bucket.names("runs/one/leases/")


def test_a_submit_that_was_asleep_stops_when_others_have_taken_over(bucket: Bucket, server: Server) -> None:
    run = prepared(bucket, shard=ROWS)
    server.delay = 0.1
    sleeper = start_submit(run.name, server)
    wait_for(lambda: parts(bucket))
    sleeper.send_signal(signal.SIGSTOP)
    try:
        bucket.on("second")
        server.delay = 0.0
        patiently(lambda: send(run.name, server))
        jobs = bucket.get("runs/one/jobs/00000.json")
        before = {name: bucket.get(name) for name in bucket.names("runs/one/") if "/leases/" not in name}
        server.delay = 0.3
    finally:
        sleeper.send_signal(signal.SIGCONT)
    assert b"was taken over by process" in sleeper.communicate(timeout=30)[1]
    assert bucket.get("runs/one/jobs/00000.json") == jobs
    assert {name: bucket.get(name) for name in before} == before
    assert not parts(bucket)
    assert merge(run.name).verdicts[Verdict.ANSWERED] == ROWS


def test_a_holder_that_is_heard_of_keeps_its_lease(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenures, "VALID_SECONDS", 2.0)
    monkeypatch.setattr(tenures, "RENEW_SECONDS", 0.2)
    run = prepared(bucket)
    with run.lease("00000"):
        bucket.on("second")
        other = Run.open(run.name)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            with pytest.raises(RunBusyError, match="is held by"), other.lease("00000"):
                pass
            time.sleep(0.3)
    with other.lease("00000"):
        pass


def test_of_two_that_write_a_job_one_is_told(bucket: Bucket) -> None:
    first = prepared(bucket)
    bucket.on("second")
    second = Run.open(first.name)
    second.write_job(Job(shard=0))
    job = Job(shard=0, attempts=[Attempt(number=1, backend="server", state="running", rows=[(0, 10)], started="now")])
    with pytest.raises(RunBusyError, match=r"jobs/00000\.json: another process has changed it"):
        first.write_job(job)
    first.refresh()
    first.write_job(Job(shard=0))


def test_of_many_machines_one_gets_the_lease(bucket: Bucket) -> None:
    prepared(bucket)
    got: list[int] = []
    told: list[str] = []

    def try_it(number: int) -> None:
        tenure = tenures.Tenure(bucket.uri("runs/one"), f"copy-{number}")
        try:
            tenure.take("00000", "shard 0")
            got.append(number)
        except RunBusyError as exc:
            told.append(exc.message)

    threads = [threading.Thread(target=try_it, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(told)) == (1, 7)
    assert all("is held by process" in text for text in told)


def test_a_server_that_heeds_no_conditions_is_refused(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    real = s3.put
    monkeypatch.setattr(s3, "put", lambda uri, body, **conditions: real(uri, body))
    with pytest.raises(StorageError, match="does not heed the conditions of a PUT"):
        prepared(bucket)
    assert not bucket.names("runs/one/")


# -- batch services --------------------------------------------------------------------------------------------------


def test_the_intent_is_in_the_bucket_before_a_batch_is_created(
    bucket: Bucket, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(bucket, backend="openai")
    create, states = OpenAIBatches.create, []

    def watched(service: OpenAIBatches, order: Any) -> Any:
        jobs = [json.loads(bucket.get(name)) for name in bucket.names("runs/one/jobs/")]
        states.append([attempt["state"] for job in jobs for attempt in job["attempts"]].count("creating"))
        return create(service, order)

    monkeypatch.setattr(OpenAIBatches, "create", watched)
    submit(run, base_url=f"{provider.url}/v1")
    assert states == [1, 1, 1]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_the_create_call_and_another_machine_never_create_twice(
    bucket: Bucket, provider: Provider, impatient: None, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    run = prepared(bucket, backend="openai")
    url = f"{provider.url}/v1"
    pid = os.fork()
    if pid == 0:
        try:
            create = OpenAIBatches.create

            def die(service: OpenAIBatches, order: Any) -> Any:
                if when == "after":
                    create(service, order)
                os.kill(os.getpid(), signal.SIGKILL)

            monkeypatch.setattr(OpenAIBatches, "create", die)
            submit(run.name, base_url=url)
        except BaseException:  # noqa: BLE001  # a fork must not go on with the tests
            traceback.print_exc()
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    bucket.on("second")
    patiently(lambda: submit(run.name, base_url=url))
    doubtful = submit(run.name, base_url=url).doubtful
    assert len(doubtful) == (1 if when == "before" else 0)
    if doubtful:
        submit(run.name, base_url=url, resend=doubtful)
    assert merge(run.name).verdicts[Verdict.ANSWERED] == ROWS
    assert set(provider.paid.values()) == {1}
    assert len(provider.batches) == 3


def test_cancel_on_one_machine_is_noticed_by_a_submit_on_another(
    bucket: Bucket, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchkit.runs.LOOK_SECONDS", 0.0)
    run = prepared(bucket, backend="openai")
    before = run.last_cancel()
    bucket.on("second")
    with pytest.raises(UsageError, match=f"{run.name} was never sent to a batch service"):
        cancelling.cancel(run.name)
    Run.open(run.name).cancel()
    assert run.last_cancel() != before


# -- task files and results --------------------------------------------------------------------------------------------


def test_a_task_file_that_has_changed_is_refused(bucket: Bucket) -> None:
    tasks = bucket.put("in/tasks.jsonl", task_lines())
    prepare(tasks, bucket.uri("runs/one"), model="m", workers=1)
    bucket.put("in/tasks.jsonl", task_lines())  # the same rows again
    assert prepare(tasks, bucket.uri("runs/one"), model="m", workers=1).already
    bucket.put("in/tasks.jsonl", task_lines().replace(b"q7", b"q8"))
    with pytest.raises(RunError, match="its rows have changed since"):
        prepare(tasks, bucket.uri("runs/one"), model="m", workers=1)


@pytest.fixture
def website() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A web server, and its files."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            body = files.get(self.path.partition("?")[0])
            self.send_response(404 if body is None else 200)
            self.send_header("content-length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", files
    server.shutdown()
    server.server_close()


def test_a_task_file_may_be_on_the_web_and_its_signature_is_written_nowhere(
    website: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    url, files = website
    files["/tasks.jsonl.gz"] = gzip.compress(task_lines())
    for signature in ("X-Amz-Signature=first-secret", "X-Amz-Signature=second-secret"):
        done = call("prepare", f"{url}/tasks.jsonl.gz?{signature}", str(tmp_path / "run"), "--model", "m")
        assert done.exit_code == 0, done.output
        assert "30 requests of 30 rows" in done.output
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"-secret" not in path.read_bytes()
    done = call("prepare", f"{url}/others.jsonl?X-Amz-Signature=a-secret", str(tmp_path / "other"), "--model", "m")
    assert done.exit_code == 1
    assert f"Error: {url}/others.jsonl: the server says 404" in done.output
    assert "a-secret" not in done.output
    gone = "http://127.0.0.1:9/tasks.jsonl?X-Amz-Signature=a-secret"
    done = call("prepare", gone, str(tmp_path / "other"), "--model", "m")
    assert "Error: http://127.0.0.1:9/tasks.jsonl: cannot be reached: " in done.output
    assert "a-secret" not in done.output


def test_a_task_file_with_an_unknown_scheme_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ftp://host/tasks\.jsonl: no way to read this is known"):
        prepare("ftp://host/tasks.jsonl", tmp_path / "run", model="m")


@pytest.mark.parametrize("name", ["results.jsonl", "answers.jsonl.gz", "answers.jsonl.zst"])
def test_results_go_to_a_bucket_with_what_belongs_beside_them(
    bucket: Bucket, server: Server, tmp_path: Path, name: str
) -> None:
    run = prepared(bucket, name="runs/one")
    send(run, server, limit=20)
    summary = merge(run, output=bucket.uri(f"out/{name}"))
    assert summary.output == bucket.uri(f"out/{name}")
    stem = "" if name.startswith("results") else "answers."
    assert set(bucket.names("out/")) == {f"out/{one}" for one in (name, f"{stem}summary.json", f"{stem}retry.jsonl")}
    assert json.loads(bucket.get(f"out/{stem}summary.json"))["rows"] == ROWS
    from batchkit.jsonl import read_rows

    assert len(list(read_rows(bucket.uri(f"out/{name}")))) == ROWS


def test_a_merge_that_fails_leaves_the_results_of_the_last_one(bucket: Bucket, server: Server) -> None:
    run = prepared(bucket)
    send(run, server)
    merge(run, output=bucket.uri("out/results.jsonl"))
    before = bucket.get("out/results.jsonl")
    bucket.put("runs/one/rows/00002.jsonl", b"{}\n" * 10)
    bucket.on("second")
    with pytest.raises(RunError, match=r"s3://.*/rows/00002\.jsonl: is not what prepare wrote|rows/00002"):
        merge(run.name, output=bucket.uri("out/results.jsonl"))
    assert bucket.get("out/results.jsonl") == before


@pytest.mark.parametrize("target", ["in/tasks.jsonl", "runs/one/rows/results.jsonl"])
def test_results_never_replace_what_the_merge_reads(bucket: Bucket, target: str) -> None:
    run = prepared(bucket)
    with pytest.raises(UsageError, match="would overwrite what the merge reads"):
        merge(run, output=bucket.uri(target))


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there_is_named(bucket: Bucket) -> None:
    done = call("status", "s3://no-such-bucket/run")
    assert done.exit_code == 1
    assert f"Error: s3://no-such-bucket/run/: there is no bucket no-such-bucket at {bucket.url}" in done.output
    done = call("prepare", bucket.uri("in/none.jsonl"), bucket.uri("runs/x"), "--model", "m")
    assert f"Error: {bucket.uri('in/none.jsonl')}: no such object" in done.output


def test_a_server_that_is_not_there_is_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "TRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    done = call("status", "s3://bucket/run")
    assert done.exit_code == 1
    assert "Error: s3://bucket/run/: http://127.0.0.1:9 cannot be reached (EndpointConnectionError)" in done.output
    assert "hint: check the network and AWS_ENDPOINT_URL" in done.output


def test_without_credentials_it_says_how_to_get_some(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    done = call("status", "s3://bucket/run")
    assert done.exit_code == 4
    assert "Error: s3://bucket/run/: no credentials for S3" in done.output
    assert "hint: aws configure" in done.output
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    done = call("status", "s3://bucket/run")
    assert done.exit_code == 4
    assert "nobody" in done.output


@pytest.mark.parametrize(
    ("refusal", "exit_code", "text", "hint"),
    [
        ((403, "AccessDenied"), 1, "access denied: these credentials may not list it", "s3:ListBucket on bucket"),
        ((400, "ExpiredToken"), 4, "the credentials have expired", "aws sso login"),
        ((403, "InvalidAccessKeyId"), 4, "the credentials are not taken (InvalidAccessKeyId)", "aws configure"),
        ((403, "RequestTimeTooSkewed"), 1, "this machine's clock is off", "timedatectl set-ntp true"),
        ((400, "IllegalLocationConstraintException"), 1, "the bucket is in another region", "AWS_REGION=REGION"),
        ((500, "InternalError"), 1, "cannot list it: InternalError", "run the same command again"),
    ],
)
def test_what_the_server_refuses_is_said_with_the_next_step(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, *, refusal: tuple[int, str], exit_code: int, text: str, hint: str
) -> None:
    monkeypatch.setattr(s3, "TRIES", 1)
    with s3_servers.refusing(*refusal) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        done = call("status", "s3://bucket/run")
    assert done.exit_code == exit_code
    assert f"Error: s3://bucket/run/: {text}" in done.output
    assert hint in done.output
    assert "Traceback" not in done.output


def test_the_secret_is_in_no_file_and_no_message(bucket: Bucket, server: Server) -> None:
    said = ""
    run = bucket.uri("runs/one")
    tasks = bucket.put("in/tasks.jsonl", task_lines())
    for words in (
        ("prepare", tasks, run, "--model", "m", "--backend", "server"),
        ("submit", run, "--endpoints", server.url),
        ("merge", run),
        ("status", run, "--json"),
        ("status", bucket.uri("runs/none")),
    ):
        said += call(*words).output
    for secret in (ACCESS_KEY, SECRET_KEY):
        assert secret not in said
        for path in bucket.folder.rglob("*"):
            assert not path.is_file() or secret.encode() not in path.read_bytes()
        for name in bucket.names():
            assert secret.encode() not in bucket.get(name)


def test_a_server_that_checks_signatures_takes_a_run_and_gives_a_task_file_while_its_url_is_valid(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_servers.ministack(tmp_path / "ministack") as url:
        bucket = Bucket("bucket", url, tmp_path / "machines", monkeypatch)
        run = prepared(bucket)
        send(run, server)
        bucket.on("second")
        assert merge(run.name).verdicts[Verdict.ANSWERED] == ROWS
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(key, "test")  # whose signatures ministack can check
        good, expired = (
            s3.client().generate_presigned_url("get_object", {"Bucket": "bucket", "Key": "in/tasks.jsonl"}, seconds)
            for seconds in (600, 1)
        )
        time.sleep(2.1)
        assert prepare(good, bucket.uri("runs/two"), model="m", workers=1).rows == ROWS
        done = call("prepare", expired, bucket.uri("runs/three"), "--model", "m")
        assert done.exit_code == 1
        assert f"Error: {url}/bucket/in/tasks.jsonl: the server says 403" in done.output
        assert "hint: it may have expired" in done.output
        for text in (done.output.encode(), *map(bucket.get, bucket.names("runs/two/"))):
            assert b"Signature" not in text
