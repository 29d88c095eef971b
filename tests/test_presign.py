"""presign: URLs for objects, and a run's commands for machines that have neither credentials nor batchkit."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from click.testing import CliRunner, Result

from batchkit import cancelling, elsewhere, handouts, live, presigning, reporting, s3
from batchkit.cli import main
from batchkit.errors import CredentialsError, RunBusyError, RunError, UsageError
from batchkit.merging import merge
from batchkit.preparation import prepare
from batchkit.responses import Verdict
from batchkit.runs import Run
from batchkit.submission import discard, submit
from batchkit.work import Leases
from tests import s3_servers
from tests.made_runs import task_lines
from tests.s3_servers import ACCESS_KEY, SECRET_KEY, Bucket
from tests.test_submission import Fake, install_fake

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "digits"


def prepared(bucket: Bucket, *, rows: int = 30, **options: Any) -> Run:
    tasks = bucket.put("in/tasks.jsonl", task_lines(rows))
    prepare(tasks, bucket.uri("runs/one"), model="org/m", max_requests=10, workers=1, **options)
    return Run.open(bucket.uri("runs/one"))


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class Machine:
    """Another machine: no variables of AWS, another folder, and a Python that stands in for one with vLLM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.journal = folder / "journal.jsonl"
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.fake_run_batch "$@"\n')
        self.python.chmod(0o700)

    def environment(self, **faults: Any) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "BATCHKIT_"))}
        faults = {"journal": str(self.journal), **faults}
        return {**kept, "PYTHON": str(self.python), "FAKE_ENGINE": json.dumps(faults)}

    def run(self, script: str | Path, *shards: int, **faults: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(script), *map(str, shards)],
            cwd=self.folder,
            env=self.environment(**faults),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    @property
    def asked(self) -> list[str]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [custom_id for line in lines for custom_id in json.loads(line)["ids"]]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "elsewhere")


def presign(run: Run, tmp_path: Path, *arguments: str) -> Path:
    """Its script."""
    path = tmp_path / "run.sh"
    done = call("presign", run.name, "-o", path, *arguments)
    assert done.exit_code == 0, done.output
    return path


def verdicts(run: Run) -> dict[str, int]:
    return {name: count for name, count in reporting.status(run.name).verdicts.items() if count}


def expire(run: Run, shard: int, seconds: float = elsewhere.GRACE_SECONDS + 60) -> None:
    job = Run.open(run.name).job(shard)
    for attempt in job.attempts:
        assert attempt.elsewhere is not None
        attempt.elsewhere.expires = (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=seconds)).isoformat()
    run.write_job(job)


# -- the commands of a run ---------------------------------------------------------------------------------------------


def test_a_machine_without_credentials_answers_all_and_merge_finds_it(
    bucket: Bucket, machine: Machine, tmp_path: Path
) -> None:
    run = prepared(bucket)
    script = presign(
        run, tmp_path, "--", "--max-model-len", "64", "--limit-mm-per-prompt", '{"image": 2}', "it's $HOME"
    )
    assert script.stat().st_mode & 0o777 == 0o700
    assert verdicts(run) == {"pending": 30}
    done = machine.run(script)
    assert done.returncode == 0, done.stderr
    merged = call("merge", run.name)
    assert merged.exit_code == 0, merged.output
    assert "collected 30 responses of 3 machines elsewhere" in merged.stderr
    results = [json.loads(line) for line in bucket.get("runs/one/results.jsonl").splitlines()]
    assert [row["id"] for row in results] == list(range(30))
    assert all(row["raw_response"] == f"answer to {row['batchkit']['custom_id']}" for row in results)
    assert {row["batchkit"]["backend"] for row in results} == {"vllm"}
    arguments = json.loads(machine.journal.read_text().splitlines()[0])["args"]
    assert arguments[0] == "vllm.entrypoints.openai.run_batch"
    assert arguments[1:5] == ["--model", "org/m", "--served-model-name", "org/m"]
    assert arguments[-5:] == ["--max-model-len", "64", "--limit-mm-per-prompt", '{"image": 2}', "it's $HOME"]
    assert len(machine.asked) == len(set(machine.asked)) == 30
    assert call("presign", run.name).stderr.startswith("nothing is due")


def test_rows_that_share_a_request_are_answered_from_elsewhere_by_one(
    bucket: Bucket, machine: Machine, tmp_path: Path
) -> None:
    tasks = bucket.put(
        "in/tasks.jsonl", b"".join(b'{"id":%d,"question":"%d?"}\n' % (n, n % 10 // 4) for n in range(20))
    )
    prepare(tasks, bucket.uri("runs/one"), model="org/m", max_requests=10, workers=1, dedupe=True)
    run = Run.open(bucket.uri("runs/one"))
    script = presign(run, tmp_path)
    assert reporting.status(run.name).batches[0].requests == 3
    assert elsewhere.requests_out(Run.open(run.name), run.seals()) == 6
    assert machine.run(script).returncode == 0
    merged = call("merge", run.name)
    assert "collected 6 responses of 2 machines elsewhere" in merged.stderr
    assert "responses; batchkit presign" not in merged.stderr, "no output lacks any"
    assert verdicts(run) == {"answered": 20}
    assert len(machine.asked) == len(set(machine.asked)) == 6
    assert call("presign", run.name).stderr.startswith("nothing is due")


def test_what_machines_elsewhere_put_is_counted_as_it_comes(bucket: Bucket, machine: Machine, tmp_path: Path) -> None:
    run = prepared(bucket)
    script = presign(run, tmp_path)
    for shard, answered in ((2, 10), (0, 20)):
        assert machine.run(script, shard).returncode == 0
        for _ in range(2):
            assert verdicts(run) == {"answered": answered, "pending": 30 - answered}
    assert machine.run(script, 0, half=0.5).returncode == 0  # once more, and cut off
    assert verdicts(run) == {"answered": 20, "pending": 10}
    expire(run, 1)
    for _ in range(2):
        status = reporting.status(run.name)
        assert (status.answers, status.verdicts["pending"]) == (20, 10)
        assert [shard.state for shard in status.shards] == ["done", "open", "done"]


def test_one_shard_of_the_script_is_run_for_a_slurm_array(bucket: Bucket, machine: Machine, tmp_path: Path) -> None:
    run = prepared(bucket)
    script = presign(run, tmp_path)
    assert "until" in script.read_text().splitlines()[2]
    assert machine.run(script, 1).returncode == 0
    assert {int(custom_id.split("-")[0]) // 10 for custom_id in machine.asked} == {1}
    assert verdicts(run) == {"answered": 10, "pending": 20}
    unknown = machine.run(script, 7)
    assert unknown.returncode == 2
    assert "shard 7 is not in here, only 0 1 2" in unknown.stderr


def test_a_failing_shard_stops_no_other_and_shows_in_the_exit_code(
    bucket: Bucket, machine: Machine, tmp_path: Path
) -> None:
    run = prepared(bucket)
    done = machine.run(presign(run, tmp_path), fail="3")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "failed: 0"
    assert verdicts(run) == {"answered": 20, "pending": 10}


def test_the_list_for_schedulers_says_what_to_start(bucket: Bucket, machine: Machine) -> None:
    run = prepared(bucket)
    commands = json.loads(call("presign", run.name, "--format", "json", "--shards", "2/3").stdout)
    assert [(entry["shard"], entry["attempt"], entry["requests"]) for entry in commands] == [(1, 1, 10)]
    (entry,) = commands
    assert entry["command"][:3] == ["python", "-m", "vllm.entrypoints.openai.run_batch"]
    assert entry["command"][3:7] == ["-i", entry["input"], "-o", entry["output"]]
    assert dt.datetime.fromisoformat(entry["expires"]) > dt.datetime.now(dt.UTC) + dt.timedelta(hours=11)
    subprocess.run([str(machine.python), *entry["command"][1:]], env=machine.environment(), check=True)
    assert verdicts(run) == {"answered": 10, "pending": 20}


def test_what_is_given_out_is_sent_by_nobody_else(
    bucket: Bucket, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(bucket)
    script = presign(run, tmp_path, "--shards", "1/3")
    install_fake(monkeypatch)
    fake = Fake(tmp_path, monkeypatch)
    bucket.on("second")
    report = submit(run.name)
    assert (report.sent, report.in_flight, report.remaining, report.exit_code) == (20, 10, 10, 8)
    assert {int(custom_id.split("-")[0]) // 10 for custom_id in fake.asked} == {1, 2}
    assert json.loads(call("presign", run.name, "--format", "json").stdout) == []
    assert machine.run(script).returncode == 0
    report = submit(run.name)
    assert (report.sent, report.remaining, report.exit_code) == (0, 0, 0)
    assert not set(machine.asked) & set(fake.asked)


def test_only_what_is_due_goes_into_an_input_of_its_own(
    bucket: Bucket, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(bucket)
    install_fake(monkeypatch)
    fake = Fake(tmp_path, monkeypatch)
    submit(run.name, limit=4)
    script = presign(run, tmp_path)
    (own,) = bucket.names("runs/one/presigned/")
    assert own.endswith(".input.jsonl")
    assert len(bucket.get(own).splitlines()) == 6
    machine.run(script)
    assert verdicts(run) == {"answered": 30}
    assert len(machine.asked) == 26
    assert not set(machine.asked) & set(fake.asked)
    assert own not in bucket.names("runs/one/presigned/")


@pytest.mark.parametrize("half", [0.5, 0.0, 0.999], ids=["half", "empty", "last-line-cut"])
def test_a_half_written_output_is_only_its_own_missing_rows(
    bucket: Bucket, machine: Machine, tmp_path: Path, half: float
) -> None:
    run = prepared(bucket)
    script = presign(run, tmp_path)
    machine.run(script, 0, half=half)
    machine.run(script, 1, 2)
    merged = call("merge", run.name)
    (output,) = [name for name in bucket.names("runs/one/presigned/") if "/00000." in name]
    told = re.search(
        re.escape(bucket.uri(output)) + r": has (\d) of 10 responses(, and ends in the middle)?", merged.stderr
    )
    assert told is not None, merged.stderr
    assert f"batchkit presign {run.name} gives out, and submit sends, what has no response" in merged.stderr
    summary = merge(run.name)
    kept = {0.5: 5, 0.0: 0, 0.999: 9}[half] if half else 0
    found = summary.verdicts
    assert found[Verdict.ANSWERED] in (20 + kept, 20 + kept - 1)  # lines are not all of one length
    assert found[Verdict.MISSING] == 30 - found[Verdict.ANSWERED]
    lost = found[Verdict.MISSING]
    assert int(told[1]) == 10 - lost
    again = presign(Run.open(run.name), tmp_path)
    before = len(machine.asked)
    machine.run(again)
    assert len(machine.asked) - before == lost
    assert verdicts(run) == {"answered": 30}


def test_an_output_that_is_no_responses_at_all_loses_no_row(bucket: Bucket, tmp_path: Path) -> None:
    run = prepared(bucket)
    (entry, *_) = json.loads(call("presign", run.name, "--format", "json").stdout)
    assert fetch(entry["output"], b"<html>\n\xff\xfe\nnot found") == 200
    assert merge(run.name).verdicts[Verdict.MISSING] == 10


def test_new_urls_for_the_same_attempts_write_the_same_output(bucket: Bucket, machine: Machine, tmp_path: Path) -> None:
    run = prepared(bucket)
    first = json.loads(call("presign", run.name, "--format", "json").stdout)
    again = json.loads(call("presign", run.name, "--format", "json", "--again", "--expires", "1d").stdout)
    assert [urlsplit(entry["output"]).path for entry in again] == [urlsplit(entry["output"]).path for entry in first]
    assert [entry["attempt"] for entry in again] == [1, 1, 1]
    assert again[0]["output"] != first[0]["output"]
    # Expired, and nobody has looked since: the same attempts, too.
    expire(run, 0)
    renewed = json.loads(call("presign", run.name, "--format", "json", "--again").stdout)
    assert [entry["attempt"] for entry in renewed] == [1, 1, 1]
    assert machine.run(presign(run, tmp_path, "--again")).returncode == 0
    assert verdicts(run) == {"answered": 30}


def test_what_has_expired_is_due_again_and_a_late_output_is_still_taken(
    bucket: Bucket, machine: Machine, tmp_path: Path
) -> None:
    run = prepared(bucket)
    script = presign(run, tmp_path)
    expire(run, 0)
    output = Run.open(run.name).job(0).attempts[0].elsewhere
    assert output is not None
    merged = call("merge", run.name)
    assert f"{run.name}/{output.output}: has not come, and its URLs expired at 20" in merged.stderr
    assert f"batchkit presign {run.name} gives out" in merged.stderr
    status = reporting.status(run.name)
    assert [batch.attempt for batch in status.batches] == ["00001.1", "00002.1"]
    second = json.loads(call("presign", run.name, "--format", "json").stdout)
    assert [(entry["shard"], entry["attempt"]) for entry in second] == [(0, 2)]
    machine.run(script)  # moto heeds no expiry: the outputs come late
    assert verdicts(run) == {"answered": 30}
    results = merge(run.name)
    assert results.exit_code == 0
    rows = [json.loads(line) for line in bucket.get("runs/one/results.jsonl").splitlines()]
    assert {row["batchkit"]["attempt"] for row in rows} == {1}


def test_an_output_that_is_written_again_replaces_no_answer_by_none(
    bucket: Bucket, machine: Machine, tmp_path: Path
) -> None:
    run = prepared(bucket)
    script = presign(run, tmp_path)
    machine.run(script)
    assert verdicts(run) == {"answered": 30}
    machine.run(script, 1, half=0.3)
    assert verdicts(run) == {"answered": 30}
    assert merge(run.name).verdicts[Verdict.CONFLICTING] == 0


def test_cancel_makes_it_due_again_and_no_resume_asks_for_that_first(
    bucket: Bucket, machine: Machine, tmp_path: Path
) -> None:
    run = prepared(bucket)
    script = presign(run, tmp_path)
    with pytest.raises(RunError, match="3 attempts given to machines elsewhere") as refused:
        discard(run.name)
    assert refused.value.hint == f"batchkit cancel {run.name} first"
    done = call("cancel", run.name)
    assert done.exit_code == 0
    assert "gave up 3 attempts on machines elsewhere. They cannot be stopped from here" in done.stderr
    assert [entry["attempt"] for entry in json.loads(call("presign", run.name, "--format", "json").stdout)] == [2, 2, 2]
    machine.run(script, 0)
    assert verdicts(run) == {"answered": 10, "pending": 20}
    assert cancelling.cancel(run.name).given_up == 3  # one of these has all its answers of another


def test_what_is_given_out_is_never_said_to_be_at_a_provider(
    bucket: Bucket, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(bucket)
    script = presign(run, tmp_path, "--shards", "1/3")
    install_fake(monkeypatch)
    Fake(tmp_path, monkeypatch)
    submitted = call("submit", run.name)
    assert submitted.exit_code == 8, submitted.output
    assert "10 requests on machines elsewhere, which presign gave out" in submitted.stderr
    machine.run(script)
    cancelled = call("cancel", run.name)
    assert "collected 10 responses" in cancelled.stderr
    assert not any("provider" in done.output or "batches" in done.output for done in (submitted, cancelled))


def test_reuse_of_a_run_collects_first_what_has_come_from_elsewhere(
    bucket: Bucket, machine: Machine, tmp_path: Path
) -> None:
    run = prepared(bucket)
    machine.run(presign(run, tmp_path), 0, 1)
    bucket.on("second")
    again = call("prepare", bucket.uri("in/tasks.jsonl"), tmp_path / "again", "--model", "org/m", "--reuse", run.name)
    assert again.exit_code == 0, again.output
    assert f"{run.name}: collected 20 responses of 2 machines elsewhere" in again.stderr
    assert f"reused 20 answers of {run.name}" in again.stderr
    assert "10 requests to send" in again.stderr
    assert verdicts(run) == {"answered": 20, "pending": 10}  # what is out there still is left alone


def test_reuse_of_a_run_that_may_only_be_read_says_what_is_not_collected(
    bucket: Bucket, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(bucket)
    machine.run(presign(run, tmp_path), 0)

    def refuse(uri: str, *_: Any, **__: Any) -> str:
        raise s3.DeniedError(f"{uri}: access denied: these credentials may not write it")

    bucket.on("second")
    monkeypatch.setattr(s3, "put", refuse)
    monkeypatch.setattr(s3, "put_file", refuse)
    again = call("prepare", bucket.uri("in/tasks.jsonl"), tmp_path / "again", "--model", "org/m", "--reuse", run.name)
    assert again.exit_code == 0, again.output
    assert f"{run.name}: what came from machines elsewhere is not collected: s3://" in again.stderr
    assert "30 requests of 30 rows" in again.stderr


def test_whatever_is_given_out_anew_has_a_name_that_was_never_given_out(bucket: Bucket, tmp_path: Path) -> None:
    run = prepared(bucket)
    outputs = []
    for undo in (lambda: expire(run, 0), lambda: call("cancel", run.name), lambda: None):
        given = json.loads(call("presign", run.name, "--shards", "1/3", "--format", "json").stdout)
        outputs += [urlsplit(entry["output"]).path for entry in given]
        undo()
    call("cancel", run.name)
    assert discard(run.name) == 0
    given = json.loads(call("presign", run.name, "--shards", "1/3", "--format", "json").stdout)
    outputs += [urlsplit(entry["output"]).path for entry in given]
    assert given[0]["attempt"] == 1  # as the first
    assert len(outputs) == len(set(outputs)) == 4


def test_discard_forgets_what_came_from_elsewhere(bucket: Bucket, machine: Machine, tmp_path: Path) -> None:
    run = prepared(bucket)
    machine.run(presign(run, tmp_path))
    assert discard(run.name) == 30
    assert bucket.names("runs/one/presigned/") == []
    assert verdicts(run) == {"pending": 30}


def test_a_shard_that_another_machine_works_on_is_left_out(bucket: Bucket) -> None:
    run = prepared(bucket)
    with run.lease("00001"):
        bucket.on("second")
        handout = handouts.hand_out(run.name)
        assert [command.shard for command in handout.commands] == [0, 2]
        with pytest.raises(RunBusyError, match="shard 1 is held by"):
            handouts.hand_out(run.name)


def test_a_submit_to_live_servers_leaves_alone_what_is_elsewhere(bucket: Bucket) -> None:
    run = prepared(bucket)
    handouts.hand_out(run)
    seals = {seal.shard: seal for seal in run.seals()}
    with Leases(run) as leases:
        assert live.recover(run, seals, frozenset({"vllm", "server"}), leases) == 0
    assert len(reporting.status(run.name).batches) == 3


def test_signatures_are_in_the_script_alone(bucket: Bucket, machine: Machine, tmp_path: Path) -> None:
    run = prepared(bucket)
    script = tmp_path / "run.sh"
    said = [call("presign", run.name, "-o", script)]
    machine.run(script, 0)
    said += [call("status", run.name), call("status", run.name, "--json"), call("merge", run.name)]
    said += [call("presign", run.name, "--expires", "9d"), call("presign", run.name, "-o", tmp_path / "no" / "dir")]
    said += [call("cancel", run.name), call("submit", run.name, "--no-resume", "--yes", "--shards", "x")]
    signed = [f"X-Amz-Signature={text.split('&')[0]}" for text in script.read_text().split("X-Amz-Signature=")[1:]]
    signed = [text.partition("'")[0] for text in signed]
    assert len(signed) == 6
    texts = [done.output for done in said]
    texts += [bucket.get(name).decode() for name in bucket.names("runs/one/")]
    texts += [path.read_text(errors="replace") for path in bucket.folder.rglob("*") if path.is_file()]
    assert len(texts) > 30
    for text in texts:
        assert not any(signature.removeprefix("X-Amz-Signature=") in text for signature in signed)
        for word in ("X-Amz-", ACCESS_KEY, SECRET_KEY):
            assert word not in text


def test_a_local_run_is_refused_with_the_way_to_the_bucket(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_bytes(task_lines(3))
    prepare(tasks, tmp_path / "run", model="m")
    done = call("presign", tmp_path / "run")
    assert done.exit_code == 2
    assert "is a local run" in done.stderr
    assert "aws s3 cp --recursive" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--put"], "names no object"),
        (["--", "-o", "x"], "-o cannot be given to vLLM"),
        (["--expires", "8d"], "--expires 8d: from 1s to 7d"),
        (["--expires", "soon"], "--expires soon: from 1s to 7d"),
        (["--shards", "4/3"], "--shards 4/3: not a part of the run"),
        (["--put", "--again"], "--put is for one object"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_given_out(
    bucket: Bucket, arguments: list[str], message: str
) -> None:
    run = prepared(bucket)
    target = f"s3://{bucket.name}" if arguments == ["--put"] else run.name
    done = call("presign", target, *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not bucket.names("runs/one/jobs/")


# -- URLs for objects --------------------------------------------------------------------------------------------------


def test_an_object_is_read_and_written_by_url(bucket: Bucket) -> None:
    uri = bucket.put("a b/ü#?.txt", b"hello")
    got = call("presign", uri, "--expires", "7d")
    url = got.stdout.strip()
    assert "to read" in got.stderr
    assert parse_qs(urlsplit(url).query)["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert int(parse_qs(urlsplit(url).query)["X-Amz-Expires"][0]) in range(604_700, 604_801)
    with urllib.request.urlopen(url) as answer:  # noqa: S310  # http, of a test's server
        assert answer.read() == b"hello"
    url = call("presign", bucket.uri("new"), "--put").stdout.strip()
    assert fetch(url, b"there") == 200
    assert bucket.get("new") == b"there"


def test_what_is_not_there_cannot_be_read(bucket: Bucket) -> None:
    done = call("presign", bucket.uri("nothing"))
    assert done.exit_code == 1
    assert f"{bucket.uri('nothing')}: no such object" in done.stderr
    assert call("presign", "https://example.org/x").exit_code == 2


def test_a_server_that_checks_refuses_expired_and_changed_urls(tmp_path: Path, monkeypatch: Any) -> None:
    with s3_servers.ministack(tmp_path / "server") as url:
        bucket = Bucket("checked", url, tmp_path / "machines", monkeypatch)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        uri = bucket.put("x", b"hello")
        good = {put: handouts.sign_object(uri, expires="1h", put=put)[0] for put in (False, True)}
        assert fetch(good[False]) == 200
        assert fetch(good[True], b"new") == 200
        assert fetch(good[False].replace("X-Amz-Signature=", "X-Amz-Signature=0")) == 403
        assert fetch(good[False], b"a GET URL does not write") == 403
        short = {put: handouts.sign_object(uri, expires="1s", put=put)[0] for put in (False, True)}
        wait_until_over(short[True])
        assert fetch(short[False]) == 403
        assert fetch(short[True], b"late") == 403
        assert bucket.get("x") == b"new"


def fetch(url: str, body: bytes | None = None) -> int:
    """The status. What kind of body it is, is said as vLLM's batch runner says it."""
    kind = {} if body is None else {"Content-Type": "application/octet-stream"}
    request = urllib.request.Request(url, data=body, method="GET" if body is None else "PUT", headers=kind)  # noqa: S310  # http
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310  # the same
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        return exc.code


def wait_until_over(url: str) -> None:
    import time

    query = parse_qs(urlsplit(url).query)
    signed = dt.datetime.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=dt.UTC)
    end = signed + dt.timedelta(seconds=int(query["X-Amz-Expires"][0]) + 1)
    while dt.datetime.now(dt.UTC) < end:
        time.sleep(0.05)


# -- credentials that expire -------------------------------------------------------------------------------------------


def test_urls_never_outlive_credentials_that_say_when_they_expire(bucket: Bucket, monkeypatch: Any) -> None:
    uri = bucket.put("x", b"hello")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    end = dt.datetime.now(dt.UTC) + dt.timedelta(hours=2, seconds=30)
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", end.isoformat(timespec="seconds"))
    refused = call("presign", uri, "--expires", "3h")
    assert refused.exit_code == 2
    assert "--expires 3h: these credentials expire in 120m" in refused.stderr
    assert "the most is --expires 120m" in refused.stderr
    assert "a long-lived key" in refused.stderr
    _, signer = handouts.sign_object(uri, expires="120m")
    assert signer.until <= end
    usual = call("presign", uri)
    assert "when the credentials expire" in usual.stderr
    assert 7200 < int(parse_qs(urlsplit(usual.stdout.strip()).query)["X-Amz-Expires"][0]) <= 7230


def test_temporary_credentials_that_say_nothing_sign_for_an_hour(bucket: Bucket, monkeypatch: Any) -> None:
    uri = bucket.put("x", b"hello")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    refused = call("presign", uri, "--expires", "2h")
    assert refused.exit_code == 2
    assert "expire at an unknown time" in refused.stderr
    assert "the most is --expires 1h" in refused.stderr
    assert "AWS_CREDENTIAL_EXPIRATION=" in refused.stderr
    assert handouts.sign_object(uri, expires="1h")[0]
    assert "nobody knows when these expire" in call("presign", uri).stderr


def test_credentials_that_a_program_gives_are_bounded_by_what_it_says(
    bucket: Bucket, tmp_path: Path, monkeypatch: Any
) -> None:
    uri = bucket.put("x", b"hello")
    end = (dt.datetime.now(dt.UTC) + dt.timedelta(hours=1, seconds=30)).isoformat(timespec="seconds")
    given = {"Version": 1, "AccessKeyId": "A", "SecretAccessKey": "B", "SessionToken": "C", "Expiration": end}
    (tmp_path / "given.json").write_text(json.dumps(given))
    (tmp_path / "config").write_text(f"[profile p]\ncredential_process = cat {tmp_path / 'given.json'}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "p")
    with pytest.raises(UsageError, match=r"expire in 60m.*the most is --expires 60m"):
        handouts.sign_object(uri, expires="2h")
    assert handouts.sign_object(uri)[1].until == dt.datetime.fromisoformat(end)


def test_expired_and_missing_credentials_say_so(bucket: Bucket, monkeypatch: Any) -> None:
    uri = bucket.put("x", b"hello")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", "2026-01-01T00:00:00Z")
    done = call("presign", uri, "--put")
    assert done.exit_code == 4, done.output
    assert "the credentials have expired" in done.stderr
    for name in ("AWS_SESSION_TOKEN", "AWS_CREDENTIAL_EXPIRATION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(CredentialsError, match="no credentials to sign with"):
        handouts.sign_object(uri, put=True)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("12h", 43_200), ("7d", 604_800), ("60", 60)]
)
def test_times_are_read_as_people_write_them(text: str, seconds: int) -> None:
    assert presigning.seconds_of(text) == seconds


def test_a_url_is_signed_for_the_region_that_the_bucket_is_in(monkeypatch: Any) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(presigning, "_region", lambda client, bucket: "eu-central-1")
    url = presigning.Signer("s3://my-bucket/x").put("s3://my-bucket/x")
    assert url.startswith("https://s3.eu-central-1.amazonaws.com/my-bucket/x?")  # not s3.amazonaws.com, which leads on
    assert "%2Feu-central-1%2Fs3%2F" in url
    assert s3.client().meta.region_name == "us-east-1"


# -- the real thing ----------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_real_run_batch_through_the_script_without_any_aws_variable(bucket: Bucket, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (EXAMPLE / "tasks.jsonl").read_text().splitlines()][:60]
    tasks = bucket.put("in/tasks.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    run = bucket.uri("runs/digits")
    prepare(tasks, run, model=str(EXAMPLE / "model"), image_root=str(EXAMPLE), max_tokens=8, workers=1)
    script = presign(Run.open(run), tmp_path, "--", "--enforce-eager", "--max-model-len", "256", "--dtype", "float32",
                     "--limit-mm-per-prompt", '{"image":2}', "--max-num-batched-tokens", "2048")  # fmt: skip
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "BATCHKIT_", "PYTHON"))}
    extra = {"PYTHON": sys.executable, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(["sh", str(script)], cwd=folder, env={**kept, **extra}, capture_output=True, text=True,
                          timeout=500, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(folder.iterdir())
    (name,) = bucket.names("runs/digits/presigned/")
    assert not bucket.get(name).endswith(b"\n")
    summary = merge(run)
    assert (summary.verdicts[Verdict.ANSWERED], summary.exit_code) == (len(rows), 0)
    results = [json.loads(line) for line in bucket.get("runs/digits/results.jsonl").splitlines()]
    assert [row["id"] for row in results] == [row["id"] for row in rows]
    assert sum(row["raw_response"] == row["truth"] for row in results) >= 0.95 * len(rows)
