"""`prepare --dedupe`: what several rows of a shard ask alike is sent once, and each of them has the answer."""

from __future__ import annotations

import base64
import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from batchkit import evaluate, infer, merge, outcomes, plan, prepare, status, submit, twins
from batchkit.cli import main
from batchkit.errors import RunError
from batchkit.jobs import Attempt, Job
from batchkit.manifests import now
from batchkit.responses import Verdict
from batchkit.runs import Run
from tests import fake_server
from tests.conftest import WriteTasks
from tests.fake_server import Server
from tests.made_runs import response_line
from tests.test_submission import Fake, fake, spawn

__all__ = ["fake"]

QUESTIONS = ["a", "b", "a", "a", "c", "b", "a", "d", "d", "d", "a", "c"]
"""Of twelve rows; eight to a shard: a b a a c b a d | d d a c."""


@pytest.fixture
def tasks(write_tasks: WriteTasks) -> Path:
    return write_tasks([{"id": n, "question": question} for n, question in enumerate(QUESTIONS)])


def make(tasks: Path, run: Path, **options: Any) -> Any:
    defaults = {"model": "m", "backend": "server", "max_requests": 8, "workers": 1, "dedupe": True}
    return prepare(tasks, run, **{**defaults, **options})


def results_of(run: Path) -> list[dict[str, Any]]:
    merge(run)
    return [json.loads(line) for line in (run / "results.jsonl").read_bytes().splitlines()]


def respond(path: Path, line_of: Callable[[str], bytes], backend: str = "openai") -> None:
    """Answer the requests of a run, as a backend that bills them would."""
    run = Run.open(path)
    for seal in run.seals():
        asked = [json.loads(line)["custom_id"] for line in run.requests_path(seal.shard).read_bytes().splitlines()]
        run.responses_path(seal.shard, 1).write_bytes(b"".join(line_of(one) + b"\n" for one in asked))
        whole = [(seal.start, seal.end)]
        attempt = Attempt(number=1, backend=backend, state="collected", rows=whole, started=now(), ended=now())
        run.write_job(Job(shard=seal.shard, attempts=[attempt]))


# -- what is sent ------------------------------------------------------------------------------------------------------


def test_each_question_of_a_shard_is_sent_once_and_answers_all_its_rows(
    tasks: Path, tmp_path: Path, server: Server
) -> None:
    report = make(tasks, tmp_path / "run")
    assert (report.rows, report.requests, report.repeated, report.rejected) == (12, 7, 5, 0)
    done = submit(tmp_path / "run", endpoints=[server.url])
    assert (done.sent, done.responses, done.remaining, done.unanswered, done.exit_code) == (7, 7, 0, 0, 0)
    assert server.asked == {"a": 2, "b": 1, "c": 2, "d": 2}, "once in each shard"
    assert [attempt.rows for attempt in Run.open(tmp_path / "run").job(0).attempts] == [[(0, 8)]]
    results = results_of(tmp_path / "run")
    assert [result["id"] for result in results] == list(range(12))
    assert [result["raw_response"] for result in results] == [f"answer to {question}" for question in QUESTIONS]
    assert {result["batchkit"]["verdict"] for result in results} == {"answered"}


def test_a_result_says_whose_request_stands_for_its_row_and_counts_no_tokens_twice(tasks: Path, tmp_path: Path) -> None:
    make(tasks, tmp_path / "run", backend="openai", model="gpt-4o-mini", max_tokens=10)
    respond(tmp_path / "run", lambda custom_id: response_line(custom_id, "yes"))
    results = results_of(tmp_path / "run")
    notes = [result["batchkit"] for result in results]
    ids = [note["custom_id"] for note in notes]
    assert len(set(ids)) == 12
    firsts = [None, None, 0, 0, None, 1, 0, None, None, 8, None, None]
    assert [note.get("same_as") for note in notes] == [None if first is None else ids[first] for first in firsts]
    assert [note["usage"] is None for note in notes] == [first is not None for first in firsts]
    assert {note["attempt"] for note in notes} == {1}
    summary = json.loads((tmp_path / "run" / "summary.json").read_bytes())
    assert summary["verdicts"]["answered"] == 12
    assert summary["repeated"] == 5
    assert summary["tokens"] == {"prompt": 70, "completion": 14, "total": 84}
    assert summary["spent"]["usd"] == pytest.approx(7 * (10 * 0.15 + 2 * 0.6) / 2e6, abs=1e-6)
    spread = evaluate(tmp_path / "run").statistics.prompt_tokens
    assert spread is not None
    assert spread.count == 7


def test_without_dedupe_every_row_is_sent(tasks: Path, tmp_path: Path) -> None:
    assert make(tasks, tmp_path / "run", dedupe=False).requests == 12
    with pytest.raises(RunError, match="--dedupe False, now it is True"):
        make(tasks, tmp_path / "run")


def test_rows_with_the_same_image_bytes_ask_the_same_whatever_the_file_is_called(
    write_tasks: WriteTasks, picture: Callable[..., Path], tmp_path: Path
) -> None:
    for name, colour in (("a.png", "red"), ("copy of a.png", "red"), ("b.png", "blue")):
        picture(name, colour=colour)
    names = ("a.png", "copy of a.png", "b.png", "missing.png", "missing.png")
    report = make(write_tasks([{"image": name, "question": "?"} for name in names]), tmp_path / "run")
    assert (report.requests, report.repeated, report.rejected) == (2, 1, 2)
    (seal,) = Run.open(tmp_path / "run").seals()
    assert (seal.firsts, list(seal.asking)) == ({1: 0}, [0, 2])


def test_a_shard_takes_as_many_rows_as_its_distinct_requests_leave_room_for(
    write_tasks: WriteTasks, tmp_path: Path
) -> None:
    tasks = write_tasks([{"id": n, "question": "x" * 1000} for n in range(100)])
    report = make(tasks, tmp_path / "run", max_requests=40, max_bytes=1500)
    assert (report.shards, report.requests, report.repeated) == (3, 3, 97)
    assert report.requests_bytes < 4500


def test_the_number_of_workers_changes_nothing(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"id": n, "question": f"{n * n % 37}?"} for n in range(300)])
    for workers in (1, 2):
        make(tasks, tmp_path / str(workers), workers=workers, max_requests=100)
    one, two = (Run.open(tmp_path / name) for name in ("1", "2"))
    assert list(one.seals()) == list(two.seals())
    assert sum(len(seal.firsts) for seal in one.seals()) > 200


def test_the_plan_counts_and_prices_what_is_sent(tasks: Path) -> None:
    options: Any = {"model": "gpt-4o-mini", "backend": "openai", "max_tokens": 10, "workers": 1}
    planned, whole = (plan(tasks, dedupe=dedupe, **options) for dedupe in (True, False))
    assert (planned.requests, planned.repeated, whole.requests) == (4, 8, 12)
    assert planned.tokens is not None
    assert whole.tokens is not None
    assert (planned.tokens.requests, whole.tokens.requests) == (4, 12)


def test_rows_that_are_requests_are_sent_once_too(write_tasks: WriteTasks, tmp_path: Path, server: Server) -> None:
    bodies = [{"model": "m", "messages": [{"role": "user", "content": question}]} for question in "aab"]
    rows = [
        {"custom_id": f"r{n}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n, body in enumerate(bodies)
    ]
    report = make(write_tasks(rows), tmp_path / "run")
    assert (report.requests, report.repeated) == (2, 1)
    submit(tmp_path / "run", endpoints=[server.url])
    results = results_of(tmp_path / "run")
    assert [result["raw_response"] for result in results] == ["answer to a", "answer to a", "answer to b"]
    assert results[1]["batchkit"]["same_as"] == "r0"


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_a_failure_is_that_of_all_its_rows_and_goes_again_once(tasks: Path, tmp_path: Path, server: Server) -> None:
    make(tasks, tmp_path / "run", max_requests=50)
    refuse = fake_server.status(400)
    server.always = lambda handler: handler.question == "a" and refuse(handler)
    assert submit(tmp_path / "run", endpoints=[server.url]).exit_code == 3
    counts = status(tmp_path / "run").verdicts
    assert (counts["answered"], counts["failed"]) == (7, 5)
    merge(tmp_path / "run")
    assert (tmp_path / "run" / "retry.jsonl").read_bytes().count(b"\n") == 5
    server.always = None
    server.asked.clear()
    again = submit(tmp_path / "run", endpoints=[server.url], retry=frozenset({Verdict.FAILED}))
    assert (again.sent, server.asked, again.exit_code) == (1, {"a": 1}, 0)
    assert {result["batchkit"]["attempt"] for result in results_of(tmp_path / "run")} == {1, 2}


def test_a_pilot_answers_the_rows_of_its_requests(tasks: Path, tmp_path: Path, server: Server) -> None:
    make(tasks, tmp_path / "run", max_requests=50)
    report = submit(tmp_path / "run", endpoints=[server.url], limit=2)
    assert (report.sent, report.remaining) == (2, 2)
    counts = status(tmp_path / "run").verdicts
    assert (counts["answered"], counts["pending"]) == (7, 5)
    assert submit(tmp_path / "run", endpoints=[server.url]).sent == 2


def test_rows_chosen_by_their_ids_are_answered_by_the_request_of_another(tmp_path: Path, server: Server) -> None:
    rows = [{"id": n, "question": question} for n, question in enumerate(QUESTIONS)]
    options: dict[str, Any] = {"prepare_options": {"dedupe": True, "workers": 1}, "endpoints": [server.url]}
    answers = infer(rows, model="m", run=tmp_path / "run", only=[6, 11], **options)
    assert answers == {6: "answer to a", 11: "answer to c"}
    assert server.asked == {"a": 1, "c": 1}


def test_images_that_the_model_made_are_those_of_all_its_rows(tasks: Path, tmp_path: Path) -> None:
    make(tasks, tmp_path / "run")
    url = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\nimage").decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    content: Any = [{"type": "text", "text": "Here."}, part]
    respond(tmp_path / "run", lambda custom_id: response_line(custom_id, content))
    results = results_of(tmp_path / "run")
    names = [result["batchkit"]["output_images"] for result in results]
    assert names[0] == names[2] == names[3] == names[6] == ["output_images/0/output_image_1.png"]
    assert len({name for (name,) in names}) == 7
    assert all((tmp_path / "run" / name).is_file() for (name,) in names)


def test_flat_results_know_whether_a_repeated_row_has_an_image(
    write_tasks: WriteTasks, picture: Callable[..., Path], tmp_path: Path
) -> None:
    picture("a.png")
    rows = [{"image": "a.png", "question": "?"}, {"question": "?"}, {"image": "a.png", "question": "?"}]
    make(write_tasks([*rows, {"question": "?"}]), tmp_path / "run")
    respond(tmp_path / "run", lambda custom_id: response_line(custom_id, "yes"))
    merge(tmp_path / "run", flat=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_bytes().splitlines()]
    assert [(line["has_image"], line["response"]) for line in lines] == [(True, "yes"), (False, "yes")] * 2


def test_a_line_under_the_id_of_a_row_that_was_not_sent_is_unexpected(tasks: Path, tmp_path: Path) -> None:
    make(tasks, tmp_path / "run", max_requests=50)
    respond(tmp_path / "run", lambda custom_id: response_line(custom_id, "yes"))
    run = Run.open(tmp_path / "run")
    (seal,) = run.seals()
    with open(run.responses_path(0, 1), "ab") as stream:
        stream.write(response_line(run.read_ids(seal)[2], "another") + b"\n")
    summary = merge(run)
    assert (summary.unexpected, summary.verdicts[Verdict.ANSWERED]) == (1, 12)
    assert results_of(tmp_path / "run")[2]["raw_response"] == "yes"


def test_the_command_line_tells_of_rows_that_ask_the_same(tasks: Path, tmp_path: Path) -> None:
    arguments = ["prepare", tasks, tmp_path / "run", "--model", "m", "--workers", 1, "--dedupe"]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert "prepared 4 requests of 12 rows" in done.stderr
    assert "8 of these rows share the request of another one" in done.stderr
    respond(tmp_path / "run", lambda custom_id: response_line(custom_id, "yes"), "vllm")
    done = CliRunner().invoke(main, ["merge", str(tmp_path / "run")])
    assert "8 of these rows share the request of another one" in done.stderr


# -- beside --reuse ----------------------------------------------------------------------------------------------------


def test_answers_of_another_run_are_taken_over_once_for_all_rows(tasks: Path, tmp_path: Path, server: Server) -> None:
    make(tasks, tmp_path / "old", dedupe=False)
    respond(tmp_path / "old", lambda custom_id: response_line(custom_id, f"for {custom_id.partition('-')[0]}"))
    report = make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),))
    assert (report.reused, report.to_send) == ({str(tmp_path / "old"): 7}, 0)
    results = results_of(tmp_path / "new")
    assert [result["raw_response"] for result in results[:4]] == ["for 0", "for 1", "for 0", "for 0"]
    assert all(result["batchkit"]["reused_from"] == str(tmp_path / "old") for result in results)
    assert submit(tmp_path / "new", endpoints=[server.url]).sent == 0


def test_a_run_with_repeated_rows_answers_those_of_another(tasks: Path, tmp_path: Path) -> None:
    make(tasks, tmp_path / "old")
    respond(tmp_path / "old", lambda custom_id: response_line(custom_id, "yes"))
    report = make(tasks, tmp_path / "new", dedupe=False, reuse=(str(tmp_path / "old"),))
    assert (report.requests, report.to_send) == (12, 0)
    assert {result["raw_response"] for result in results_of(tmp_path / "new")} == {"yes"}


# -- kills and lost files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["intent", "started", "response:1", "mark:3", "collected"])
def test_a_killed_submit_sends_nothing_twice_and_answers_every_row(
    fake: Fake, write_tasks: WriteTasks, tmp_path: Path, step: str
) -> None:
    tasks = write_tasks([{"id": n, "question": f"{n % 7}?"} if n % 11 != 5 else b"{" for n in range(60)])
    make(tasks, tmp_path / "run", backend="vllm", max_requests=20)
    run = Run.open(tmp_path / "run")
    killed = spawn(run, step)
    assert killed.wait(60) == -signal.SIGKILL, killed.stderr and killed.stderr.read()
    merge(run)  # in the middle, too
    assert submit(run).exit_code == 3, "some rows are rejected"
    assert status(run).verdicts["answered"] == 55
    ids = [run.read_ids(seal)[position - seal.start] for seal in run.seals() for position in seal.asking]
    assert set(fake.asked) == set(ids)
    assert len(ids) < 25
    for seal in run.seals():
        for outcome in outcomes.load(run, seal).outcomes:
            if outcome.response is not None:
                assert outcome.response.answer == f"answer to {outcome.same_as or outcome.custom_id}"
    assert submit(run).sent == 0


@pytest.mark.parametrize("shard", [0, 1])
def test_a_lost_shard_is_made_again_as_it_was(tasks: Path, tmp_path: Path, shard: int) -> None:
    make(tasks, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    before = list(run.seals())
    respond(tmp_path / "run", lambda custom_id: response_line(custom_id, "yes"))
    run.requests_path(shard).unlink()
    make(tasks, tmp_path / "run")
    assert list(run.seals()) == before
    assert {result["raw_response"] for result in results_of(tmp_path / "run")} == {"yes"}


def test_a_shard_that_was_sent_keeps_its_pairs_of_rows(
    write_tasks: WriteTasks, picture: Callable[..., Path], tmp_path: Path
) -> None:
    picture("a.png")
    picture("b.png")
    tasks = write_tasks([{"image": name, "question": "?"} for name in ("a.png", "b.png")])
    make(tasks, tmp_path / "run")
    respond(tmp_path / "run", lambda custom_id: response_line(custom_id, "yes"))
    Run.open(tmp_path / "run").requests_path(0).unlink()
    picture("b.png", colour="blue")
    with pytest.raises(RunError, match="shard 0: was sent, and would have other requests now"):
        make(tasks, tmp_path / "run")


# -- how it is written -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 1000))
def test_twins_are_read_as_they_were_written(questions: list[int], start: int) -> None:
    first: dict[int, int] = {}
    pairs = []
    for row, question in enumerate(questions, start):
        if first.setdefault(question, row) != row:
            pairs.append((row, first[question]))
    assert twins.from_text(twins.as_text(pairs)) == dict(pairs)


def test_neighbours_take_one_entry() -> None:
    assert twins.as_text([(1, 0), (2, 0), (3, 0), (5, 4), (6, 0)]) == "1-3:0 5:4 6:0"
    assert Counter(twins.from_text("1-3:0 5:4").values()) == {0: 3, 4: 1}
