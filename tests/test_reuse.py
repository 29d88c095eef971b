"""`prepare --reuse`: what another run has answered is not sent again, and the run stands on its own."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from batchkit import merge, outcomes, plan, prepare, status, submit, takeovers
from batchkit.cli import main
from batchkit.due import to_send
from batchkit.errors import RunError, UsageError
from batchkit.jobs import Attempt, Job
from batchkit.manifests import now
from batchkit.runs import Run
from tests.conftest import WriteTasks
from tests.fake_server import Server
from tests.made_runs import failure_line, response_line

Picture = Callable[..., Path]


def rows_of(count: int, **more: Any) -> list[dict[str, Any] | bytes]:
    return [{"id": f"r{number}", "question": f"question {number}", **more} for number in range(count)]


def results_of(run: Path) -> list[dict[str, Any]]:
    merge(run)
    return [json.loads(line) for line in (run / "results.jsonl").read_bytes().splitlines()]


def make(tasks: Path, run: Path, **options: Any) -> Any:
    return prepare(tasks, run, **{"model": "m", "backend": "server", "max_requests": 8, "workers": 1, **options})


def ask(run: Path, server: Server) -> Any:
    server.asked.clear()
    return submit(run, endpoints=[server.url])


def answer(path: Path, answers: Callable[[int, str], list[bytes]], backend: str = "vllm") -> None:
    """Answer a run as a backend would: `answers` gives the lines for a position and its custom_id."""
    run = Run.open(path)
    for seal in run.seals():
        lines = [line for index, one in enumerate(run.read_ids(seal)) for line in answers(seal.start + index, one)]
        run.responses_path(seal.shard, 1).write_bytes(b"".join(line + b"\n" for line in lines))
        whole = [(seal.start, seal.end)]
        attempt = Attempt(number=1, backend=backend, state="collected", rows=whole, started=now(), ended=now())
        run.write_job(Job(shard=seal.shard, attempts=[attempt]))


def texts(run: Path) -> list[str | None]:
    return [result["raw_response"] for result in results_of(run)]


# -- what is sent, and what is not -----------------------------------------------------------------------------------


def test_another_version_of_the_dataset_sends_only_what_has_changed(
    write_tasks: WriteTasks, tmp_path: Path, server: Server
) -> None:
    rows: list[Any] = rows_of(30)
    make(write_tasks(rows), tmp_path / "old")
    assert ask(tmp_path / "old", server).sent == 30
    rows[3]["question"] = "a new question"  # changed
    rows[7]["split"] = "test"  # one column more, which is in no prompt
    rows.insert(0, {"id": "first", "question": "a new row"})  # every position behind it moves
    del rows[20]
    report = make(write_tasks(rows, "new.jsonl"), tmp_path / "new", reuse=(str(tmp_path / "old"),))
    assert report.reused == {str(tmp_path / "old"): 28}
    assert (report.requests, report.to_send) == (30, 2)
    assert ask(tmp_path / "new", server).sent == 2
    assert server.asked == Counter({"a new question": 1, "a new row": 1})
    results = results_of(tmp_path / "new")
    assert [result["raw_response"] for result in results] == [f"answer to {row['question']}" for row in rows]
    notes = [result["batchkit"] for result in results]
    assert [note.get("reused_from") for note in notes].count(str(tmp_path / "old")) == 28
    assert {"reused_from"} <= notes[5].keys()
    assert not {"reused_from"} & notes[0].keys()
    assert all(note["custom_id"].startswith(f"{position}-") for position, note in enumerate(notes))
    assert notes[5]["backend"] == "server"


def test_the_run_needs_the_other_no_more(write_tasks: WriteTasks, tmp_path: Path, server: Server) -> None:
    tasks = write_tasks(rows_of(20))
    make(tasks, tmp_path / "old")
    ask(tmp_path / "old", server)
    make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),))
    shutil.rmtree(tmp_path / "old")
    assert texts(tmp_path / "new") == [f"answer to question {number}" for number in range(20)]
    again = make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),))
    assert again.already
    assert again.reused == {str(tmp_path / "old"): 20}
    assert status(tmp_path / "new").exit_code == 0


def test_the_bytes_of_a_response_are_carried_over_under_the_new_custom_id(
    write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = (
        rb'{"id": "x",  "custom_id": "%s", "response": {"status_code":200, "body": {"choices": [{"message": '
        rb'{"content": "\u00e9 \/ 1e3"}, "finish_reason":"stop"}], "price": 1.50e0}}, "error": null, "z": [1 ,2]}'
    )
    make(write_tasks(rows_of(2)), tmp_path / "old")
    answer(tmp_path / "old", lambda _, one: [odd % one.encode()])
    monkeypatch.chdir(tmp_path)  # the manifest has absolute paths
    make(write_tasks([{"question": "question 1"}], "new.jsonl"), tmp_path / "new", reuse=("old",))
    assert Run.open(tmp_path / "new").manifest.options["reuse"] == [str(tmp_path / "old")]
    line = Run.open(tmp_path / "new").responses_path(0, 1).read_bytes()
    new_id = Run.open(tmp_path / "new").read_ids(next(Run.open(tmp_path / "new").seals()))[0]
    assert json.loads(line)["custom_id"] == new_id
    for piece in (rb'"\u00e9 \/ 1e3"', b"1.50e0", b"[1 ,2]", b'"id":"x"'):
        assert piece in line


@pytest.mark.parametrize("content", [rb'"half \ud800 a pair"', b'"\xff broken"'])
def test_an_answer_that_is_no_strict_json_is_carried_over_too(
    content: bytes, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    line = (
        b'{"custom_id": "%s", "response": {"status_code": 200, "body": {"choices": [{"message": {"content": '
        b'%s}, "finish_reason": "stop"}], "score": NaN}}}'
    )
    tasks = write_tasks(rows_of(1))
    make(tasks, tmp_path / "old")
    answer(tmp_path / "old", lambda _, one: [line % (one.encode(), content)])
    make(write_tasks([{"question": "question 0"}], "new.jsonl"), tmp_path / "new", reuse=(str(tmp_path / "old"),))
    assert texts(tmp_path / "new") == texts(tmp_path / "old") != [None]


def test_another_model_or_prompt_shares_nothing(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(5))
    make(tasks, tmp_path / "old")
    answer(tmp_path / "old", lambda _, one: [response_line(one, "a")])
    for name, options in {"model": {"model": "other"}, "prompt": {"system_prompt": "be brief"}}.items():
        report = make(tasks, tmp_path / name, reuse=(str(tmp_path / "old"),), **options)
        assert report.reused == {str(tmp_path / "old"): 0}
        assert report.to_send == 5
        assert not list((tmp_path / name / "jobs").iterdir())


def test_a_changed_image_behind_the_same_path_is_asked_again(
    write_tasks: WriteTasks, picture: Picture, tmp_path: Path, server: Server
) -> None:
    picture("a.png", colour="red")
    picture("b.png", colour="blue")
    tasks = write_tasks([{"image": f"{name}.png", "question": name} for name in "ab"])
    make(tasks, tmp_path / "old")
    ask(tmp_path / "old", server)
    picture("b.png", colour="green")
    assert make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),)).to_send == 1
    ask(tmp_path / "new", server)
    assert server.asked == Counter({"b": 1})


def test_only_answers_are_taken_over(write_tasks: WriteTasks, tmp_path: Path) -> None:
    kinds: list[Callable[[str], list[bytes]]] = [
        lambda one: [response_line(one, "whole")],
        lambda one: [response_line(one, "cut", finish="length")],
        lambda one: [response_line(one, None, finish="content_filter")],
        lambda one: [failure_line(one, 400, "bad request")],
        lambda one: [],  # missing
        lambda one: [response_line(one, "this"), response_line(one, "or that")],  # conflicting
        lambda one: [response_line(one, ""), response_line(one, "")],
    ]
    tasks = write_tasks(rows_of(7))
    make(tasks, tmp_path / "old")
    answer(tmp_path / "old", lambda position, one: kinds[position](one))
    make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),))
    new = Run.open(tmp_path / "new")
    found = [outcome for seal in new.seals() for outcome in outcomes.load(new, seal).outcomes]
    assert [outcome.verdict.value for outcome in found] == [
        "answered", "truncated", "refused", "pending", "pending", "pending", "answered",
    ]  # fmt: skip
    assert to_send(outcomes.load(new, next(new.seals())), attempts=3) == [3, 4, 5]


def test_equal_requests_keep_the_answers_of_their_own_rows(write_tasks: WriteTasks, tmp_path: Path) -> None:
    """Several samples of one question: each row has its own answer, in any order of the rows."""
    rows: list[Any] = [{"id": number, "question": "a random number"} for number in range(20)]
    make(write_tasks(rows), tmp_path / "old")
    answer(tmp_path / "old", lambda position, one: [response_line(one, f"sample {position}")])
    random.Random(0).shuffle(rows)
    rows.append({"id": "new", "question": "a random number"})
    make(write_tasks(rows, "new.jsonl"), tmp_path / "new", reuse=(str(tmp_path / "old"),))
    assert texts(tmp_path / "new") == [f"sample {row['id']}" for row in rows[:-1]] + ["sample 0"]


def test_of_several_runs_the_first_named_counts_first(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(10))
    for name, backend in (("one", "vllm"), ("two", "server")):
        make(tasks, tmp_path / name)
        answer(
            tmp_path / name,
            lambda position, one, name=name: [response_line(one, name)] if name == "two" or position < 4 else [],  # type: ignore[misc]
            backend,
        )
    sources = tuple(str(tmp_path / name) for name in ("one", "two", "one"))
    report = make(tasks, tmp_path / "new", reuse=sources)
    assert report.reused == {sources[0]: 4, sources[1]: 6}
    results = results_of(tmp_path / "new")
    assert [result["raw_response"] for result in results] == ["one"] * 4 + ["two"] * 6
    assert [result["batchkit"]["backend"] for result in results] == ["vllm"] * 4 + ["server"] * 6
    assert [result["batchkit"]["reused_from"] for result in results] == [sources[0]] * 4 + [sources[1]] * 6
    third = make(tasks, tmp_path / "third", reuse=(str(tmp_path / "new"),))  # a run that has reused is reused
    assert third.to_send == 0


def test_a_batch_file_is_compared_by_url_and_body(write_tasks: WriteTasks, tmp_path: Path) -> None:
    line = (
        '{"custom_id": "%s", "method": "POST", "url": "%s", "body": '
        '{"model": "m", "messages": [{"role": "user", "content": "%s"}]}}'
    )
    old = [(line % (f"q-{n}", "/v1/chat/completions", n)).encode() for n in range(3)]
    new = [(line % (name, "/v1/chat/completions", n)).encode() for name, n in (("x", 2), ("y", 9), ("z", 0))]
    make(write_tasks(old), tmp_path / "old")
    answer(tmp_path / "old", lambda position, one: [response_line(one, str(position))])
    report = make(write_tasks(new, "new.jsonl"), tmp_path / "new", reuse=(str(tmp_path / "old"),))
    assert report.to_send == 1
    assert texts(tmp_path / "new") == ["2", None, "0"]


# -- counts, money, messages -----------------------------------------------------------------------------------------


def test_what_was_reused_is_counted_and_costs_nothing(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(10))
    options: dict[str, Any] = {"model": "gpt-5-mini", "backend": "openai"}
    make(tasks, tmp_path / "old", **options)
    answer(tmp_path / "old", lambda _, one: [response_line(one, "a")], "openai")
    spent = merge(tmp_path / "old").spent
    assert spent is not None
    assert spent.usd
    new = write_tasks([*rows_of(10), {"id": "more", "question": "?"}], "new.jsonl")
    whole = plan(new, workers=1, max_requests=8, **options)
    planned = plan(new, workers=1, max_requests=8, reuse=(str(tmp_path / "old"),), **options)
    assert (planned.requests, planned.to_send) == (11, 1)
    assert whole.tokens is not None
    assert planned.tokens is not None
    assert (whole.tokens.requests, planned.tokens.requests) == (11, 1)
    report = make(new, tmp_path / "new", reuse=(str(tmp_path / "old"),), **options)
    assert report.tokens == planned.tokens
    assert report.requests_bytes == whole.requests_bytes
    summary = merge(tmp_path / "new")
    assert summary.reused == 10
    assert summary.spent is not None
    assert summary.spent.usd is None
    assert summary.tokens.total == 0
    assert (summary.seconds, summary.answers_per_second) == (None, None)
    assert summary.exit_code == 8
    assert sum(summary.verdicts.values()) == 11
    stands = status(tmp_path / "new", ask=False)
    assert (stands.reused, stands.answers, stands.verdicts["pending"]) == (10, 10, 1)


def call(*arguments: str | Path, **keywords: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **keywords)


def test_the_command_line_tells_what_is_reused(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(3))
    old, new = tmp_path / "old", tmp_path / "new"
    call("prepare", tasks, old, "--model", "m")
    answer(old, lambda position, one: [response_line(one, "a")] if position else [])
    planned = call("prepare", tasks, new, "--model", "m", "--reuse", old, "--plan")
    assert f"would reuse 2 answers of {old}\n1 request to send\n" in planned.stdout
    assert not new.exists()
    done = call("prepare", tasks, new, "--model", "m", "--reuse", old)
    assert f"{old}: 2 of 3 requests have an answer" in done.stderr
    assert f"reused 2 answers of {old}\n1 request to send\n" in done.stderr
    assert f"next: batchkit submit {new}" in done.stderr
    assert "2 of these answers were taken over from other runs" in call("status", new).stdout
    assert "2 of these answers were taken over from other runs" in call("merge", new).stderr
    asked = call("submit", new, "--no-resume", input="n\n")
    assert f"throw away 2 responses of {new} (2 of them taken over from other runs)" in asked.stderr
    answer(old, lambda _, one: [response_line(one, "a")])
    whole = call("prepare", tasks, tmp_path / "whole", "--model", "m", "--reuse", old)
    assert f"next: batchkit merge {tmp_path / 'whole'}" in whole.stderr


def test_no_resume_throws_reused_answers_away_and_sends_all(
    write_tasks: WriteTasks, tmp_path: Path, server: Server
) -> None:
    from batchkit.submission import discard

    tasks = write_tasks(rows_of(10))
    make(tasks, tmp_path / "old")
    ask(tmp_path / "old", server)
    make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),))
    assert discard(tmp_path / "new") == 10
    again = make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),))
    assert again.already
    assert again.to_send == 10
    assert ask(tmp_path / "new", server).sent == 10


def test_an_engine_that_never_ran_is_not_proven_by_what_was_reused(write_tasks: WriteTasks, tmp_path: Path) -> None:
    from batchkit.work import Scan

    tasks = write_tasks(rows_of(3))
    make(tasks, tmp_path / "old", backend="vllm")
    answer(tmp_path / "old", lambda position, one: [response_line(one, "a")] if position else [])
    make(tasks, tmp_path / "new", backend="vllm", reuse=(str(tmp_path / "old"),))
    opened = [Run.open(tmp_path / name) for name in ("old", "new")]
    scans = [Scan(run, list(run.seals()), attempts=3, retry=frozenset()) for run in opened]
    assert [(scan.due, scan.answered) for scan in scans] == [(1, True), (1, False)]


def test_a_reused_answer_can_be_asked_for_again(write_tasks: WriteTasks, tmp_path: Path, server: Server) -> None:
    from batchkit.responses import Verdict

    tasks = write_tasks(rows_of(3))
    make(tasks, tmp_path / "old")
    answer(tmp_path / "old", lambda _, one: [response_line(one, "cut", finish="length")])
    make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),))
    submit(tmp_path / "new", endpoints=[server.url], retry=frozenset({Verdict.TRUNCATED}))
    summary = merge(tmp_path / "new")
    assert summary.reused == 0
    assert summary.verdicts[Verdict.ANSWERED] == 3
    assert "reused_from" not in results_of(tmp_path / "new")[0]["batchkit"]


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_a_run_that_cannot_be_reused_is_named_and_leaves_nothing(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(2))
    with pytest.raises(RunError, match=f"--reuse {tmp_path}/none: not a run directory"):
        make(tasks, tmp_path / "new", reuse=(str(tmp_path / "none"),))
    with pytest.raises(UsageError, match="is the run itself"):
        make(tasks, tmp_path / "new", reuse=(str(tmp_path / "x" / ".." / "new"),))
    assert not (tmp_path / "new").exists()
    make(tasks, tmp_path / "old")
    answer(tmp_path / "old", lambda _, one: [response_line(one, "a")])
    (tmp_path / "old" / "rows" / "00000.ids").write_text("other\nids\n")
    with pytest.raises(RunError, match=r"old/rows/00000.ids: is not what prepare wrote"):
        make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),))


def test_other_runs_to_reuse_are_other_options(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(2))
    make(tasks, tmp_path / "old")
    make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),))
    with pytest.raises(RunError, match="was prepared with --reuse"):
        make(tasks, tmp_path / "new")


def test_a_run_whose_requests_are_gone_shares_nothing_and_says_so(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(20))
    make(tasks, tmp_path / "old")
    answer(tmp_path / "old", lambda _, one: [response_line(one, "a")])
    (tmp_path / "old" / "requests" / "00001.jsonl").unlink()
    done = call("prepare", tasks, tmp_path / "new", "--model", "m", "--backend", "server", "--reuse", tmp_path / "old")
    assert "1 answered shards have no requests any more" in done.stderr
    assert f"reused 12 answers of {tmp_path / 'old'}" in done.stderr


def test_changed_requests_of_the_other_run_are_no_source(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(4))
    make(tasks, tmp_path / "old")
    answer(tmp_path / "old", lambda _, one: [response_line(one, "a")])
    path = tmp_path / "old" / "requests" / "00000.jsonl"
    path.write_bytes(path.read_bytes().replace(b"question 1", b"question 2"))
    with pytest.raises(RunError, match="its checksum differs"):
        make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),))


def test_responses_that_change_between_look_up_and_copy_are_no_wrong_join(
    write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = write_tasks(rows_of(4))
    make(tasks, tmp_path / "old")
    answer(tmp_path / "old", lambda position, one: [response_line(one, f"a{position}")])
    write = takeovers.take_over

    def changed(run: Run, *arguments: Any, **keywords: Any) -> Any:
        path = tmp_path / "old" / "responses" / "00000.1.jsonl"
        path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))
        return write(run, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("batchkit.shardfiles.take_over", changed)
        with pytest.raises(RunError, match="changed while its answers were taken over"):
            make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),))
    make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),))
    assert texts(tmp_path / "new") == [f"a{position}" for position in range(4)]


# -- kills -----------------------------------------------------------------------------------------------------------


def fork_and_kill(work: Callable[[], object], at: int) -> bool:
    """Run `work` in a fork that kills itself at the `at`-th durable step; whether it came so far."""
    pid = os.fork()
    if pid == 0:
        steps = 0
        replace, unlink = os.replace, Path.unlink

        def step() -> None:
            nonlocal steps
            steps += 1
            if steps == at:
                os.kill(os.getpid(), signal.SIGKILL)

        def replacing(*arguments: Any) -> None:
            step()
            replace(*arguments)
            step()

        def unlinking(path: Path, *, missing_ok: bool = False) -> None:
            step()
            unlink(path, missing_ok=missing_ok)

        os.replace = replacing  # type: ignore[assignment]
        Path.unlink = unlinking  # type: ignore[method-assign,assignment]
        try:
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001  # a fork must not go on with the tests
            os._exit(1)
    _, code = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(code) or os.WEXITSTATUS(code) == 0
    return os.WIFSIGNALED(code)


def snapshot(run: Path) -> dict[str, bytes]:
    """All that matters of a run but the times."""
    found = {
        str(path.relative_to(run)): path.read_bytes()
        for folder in ("rows", "requests", "responses")
        for path in sorted((run / folder).iterdir())
    }
    for path in sorted((run / "jobs").iterdir()):
        job = json.loads(path.read_bytes())
        for attempt in job["attempts"]:
            del attempt["started"], attempt["ended"]
        found[str(path.relative_to(run))] = json.dumps(job).encode()
    return found


def test_a_kill_at_any_step_of_prepare_gives_the_same_and_never_a_shard_to_send_twice(
    write_tasks: WriteTasks, tmp_path: Path
) -> None:
    rows: list[Any] = rows_of(20)
    make(write_tasks(rows), tmp_path / "old")
    answer(tmp_path / "old", lambda position, one: [response_line(one, f"a{position}")] if position % 3 else [])
    tasks = write_tasks([{"id": "x", "question": "first"}, *rows], "new.jsonl")
    options: dict[str, Any] = {"reuse": (str(tmp_path / "old"),)}
    make(tasks, tmp_path / "undisturbed", **options)
    expected = snapshot(tmp_path / "undisturbed")
    step = 0
    while True:
        step += 1
        run = tmp_path / f"killed-{step}"
        if not fork_and_kill(lambda run=run: make(tasks, run, **options), step):  # type: ignore[misc]
            break
        if Run.exists(run):
            opened = Run.open(run)
            for seal in opened.seals():  # whatever is sealed could be sent now: what is reused must not be
                due = to_send(outcomes.load(opened, seal), attempts=3)
                assert due == [p for p in range(seal.start, seal.end) if p == 0 or (p - 1) % 3 == 0]
        make(tasks, run, **options)
        assert snapshot(run) == expected
    assert step > 40


def test_a_second_kill_and_a_lost_file_are_no_trouble(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(20))
    make(tasks, tmp_path / "old")
    answer(tmp_path / "old", lambda position, one: [response_line(one, f"a{position}")])
    options: dict[str, Any] = {"reuse": (str(tmp_path / "old"),)}
    make(tasks, tmp_path / "undisturbed", **options)
    expected = snapshot(tmp_path / "undisturbed")
    generator = random.Random(5)
    for number in range(12):
        run = tmp_path / f"run-{number}"
        for _ in range(3):
            fork_and_kill(lambda run=run: make(tasks, run, **options), generator.randrange(1, 45))  # type: ignore[misc]
        make(tasks, run, **options)
        lost = generator.choice(sorted((run / "rows").iterdir()))
        lost.unlink()
        make(tasks, run, **options)
        assert snapshot(run) == expected


def test_a_lost_file_of_a_run_is_made_anew_and_its_answers_stay(
    write_tasks: WriteTasks, tmp_path: Path, server: Server
) -> None:
    tasks = write_tasks(rows_of(20))
    make(tasks, tmp_path / "old")
    answer(tmp_path / "old", lambda position, one: [response_line(one, f"a{position}")] if position < 18 else [])
    options: dict[str, Any] = {"reuse": (str(tmp_path / "old"),)}
    make(tasks, tmp_path / "new", **options)
    from batchkit.submission import discard

    discard(tmp_path / "old")  # what is here now is the only copy
    (tmp_path / "new" / "rows" / "00000.jsonl").unlink()
    make(tasks, tmp_path / "new", **options)
    assert texts(tmp_path / "new") == [f"a{position}" for position in range(18)] + [None, None]
    ask(tmp_path / "new", server)
    answer(tmp_path / "old", lambda _, one: [response_line(one, "another")])
    (tmp_path / "new" / "rows" / "00002.jsonl").unlink()  # of the shard that was sent
    make(tasks, tmp_path / "new", **options)
    assert texts(tmp_path / "new")[16:] == ["a16", "a17", "answer to question 18", "answer to question 19"]


def test_images_that_change_before_a_second_prepare_take_their_answers_with_them(
    write_tasks: WriteTasks, picture: Picture, tmp_path: Path
) -> None:
    """A shard that was never sealed is made of the images as they are now, and has answers to those alone."""
    picture("a.png", colour="red")
    tasks = write_tasks([{"image": "a.png", "question": "?"}])
    make(tasks, tmp_path / "old")
    answer(tmp_path / "old", lambda _, one: [response_line(one, "red")])
    options: dict[str, Any] = {"reuse": (str(tmp_path / "old"),)}
    make(tasks, tmp_path / "new", **options)
    (tmp_path / "new" / "prepared.json").unlink()
    (tmp_path / "new" / "requests" / "00000.json").unlink()
    picture("a.png", colour="blue")
    assert make(tasks, tmp_path / "new", **options).to_send == 1
    assert texts(tmp_path / "new") == [None]


def test_reading_a_run_while_it_is_asked_takes_whole_answers(
    write_tasks: WriteTasks, tmp_path: Path, server: Server
) -> None:
    server.delay = 0.02
    tasks = write_tasks(rows_of(60))
    make(tasks, tmp_path / "old")
    pid = os.fork()
    if pid == 0:
        try:
            submit(tmp_path / "old", endpoints=[server.url], concurrency=2)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "old" / "responses").glob("0000[2-9].*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    report = make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert 0 < report.to_send < 60
    found = texts(tmp_path / "new")
    assert all(text in (None, f"answer to question {position}") for position, text in enumerate(found))
    assert found.count(None) == report.to_send


def test_an_answer_that_does_not_match_the_schema_is_not_taken_over(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(3))
    schema = {"type": "object", "required": ["a"]}
    make(tasks, tmp_path / "old", response_schema=schema)
    answer(tmp_path / "old", lambda n, one: [response_line(one, '{"a": 1}' if n else "no JSON")])
    report = make(tasks, tmp_path / "new", reuse=(str(tmp_path / "old"),), response_schema=schema)
    assert (report.reused, report.to_send) == ({str(tmp_path / "old"): 2}, 1)
    planned = plan(tasks, model="m", backend="server", reuse=(str(tmp_path / "old"),), response_schema=schema)
    assert planned.to_send == 1
