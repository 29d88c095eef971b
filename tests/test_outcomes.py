from __future__ import annotations

from pathlib import Path

import pytest

from batchkit.due import to_send
from batchkit.errors import RunError
from batchkit.jobs import AttemptState
from batchkit.outcomes import ShardOutcomes, load
from batchkit.responses import Verdict
from tests.made_runs import ENGINE_DIED, MadeRun, failure_line, response_line

ROWS = [b'{"id": 0}', b'{"id": 1}', b'{"id": 2}', b'{"id": 3}']


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    made = MadeRun(tmp_path / "run")
    made.add_shard(ROWS)
    return made


def loaded(made: MadeRun, shard: int = 0) -> ShardOutcomes:
    return load(made.run, list(made.run.seals())[shard])


def verdicts(made: MadeRun, shard: int = 0) -> list[str]:
    return [str(outcome.verdict) for outcome in loaded(made, shard).outcomes]


def test_rows_that_were_never_sent_are_pending(made: MadeRun) -> None:
    assert verdicts(made) == ["pending"] * 4
    assert loaded(made).outcomes[0].message == "not sent yet"


def test_responses_are_joined_by_id_whatever_their_order(made: MadeRun) -> None:
    made.add_attempt(0, [response_line(made.ids[index], f"answer {index}") for index in (2, 0, 3, 1)])
    outcomes = loaded(made).outcomes
    assert [outcome.response and outcome.response.answer for outcome in outcomes] == [
        "answer 0", "answer 1", "answer 2", "answer 3"
    ]  # fmt: skip
    assert {(outcome.verdict, outcome.attempt, outcome.backend, outcome.tries) for outcome in outcomes} == {
        (Verdict.ANSWERED, 1, "vllm", 0)
    }


def test_a_row_without_a_line_is_missing_pending_or_pending_again_as_its_attempt_is(made: MadeRun) -> None:
    made.add_attempt(0, rows=[(0, 1)], state="collected")
    made.add_attempt(0, rows=[(1, 2)], state="died")
    made.add_attempt(0, rows=[(2, 3)], state="running")
    assert verdicts(made) == ["missing", "pending", "pending", "pending"]
    assert [outcome.tries for outcome in loaded(made).outcomes] == [1, 1, 0, 0]
    assert [outcome.attempt for outcome in loaded(made).outcomes] == [1, 2, 3, None]


def test_rejected_rows_are_rejected_and_their_id_is_nobodys(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.add_shard(ROWS, {1: "tasks.jsonl:2: not valid JSON"})
    made.add_attempt(0, [response_line(made.ids[1], "x")])
    assert verdicts(made) == ["missing", "rejected", "missing", "missing"]
    shard = loaded(made)
    assert shard.outcomes[1].message == "tasks.jsonl:2: not valid JSON"
    assert len(shard.unexpected) == 1


def test_strangers_and_wrong_digests_are_unexpected(made: MadeRun) -> None:
    made.add_attempt(0, [response_line("stranger", "x"), response_line("0-0000000000000000", "x")])
    assert verdicts(made) == ["missing"] * 4
    assert len(loaded(made).unexpected) == 2


def test_a_torn_last_line_is_unreadable_once_its_attempt_is_over(made: MadeRun) -> None:
    line = response_line(made.ids[1], "x")
    made.add_attempt(0, [response_line(made.ids[0], "x"), b"", b"garbage"], torn=line[:50], state="died")
    assert verdicts(made) == ["answered", "pending", "pending", "pending"]
    assert loaded(made).unreadable == [b"garbage", line[:50]]


def test_a_torn_last_line_of_a_running_attempt_is_still_being_written(made: MadeRun) -> None:
    made.add_attempt(0, [response_line(made.ids[0], "x")], torn=b'{"custom_id": "', state="running")
    assert loaded(made).unreadable == []


@pytest.mark.parametrize("state", ["collected", "running"])
def test_a_whole_last_line_needs_no_line_feed(made: MadeRun, state: AttemptState) -> None:
    made.add_attempt(0, torn=response_line(made.ids[0], "x"), state=state)
    assert verdicts(made)[0] == "answered"


def test_a_later_attempt_decides_but_never_against_an_answer(made: MadeRun) -> None:
    made.add_attempt(
        0, [response_line(made.ids[0], "x"), *(failure_line(made.ids[index], 429, "busy") for index in (1, 2))]
    )
    made.add_attempt(0, [failure_line(made.ids[0], 500, "late"), response_line(made.ids[1], "y")], state="collected")
    outcomes = loaded(made).outcomes
    assert [str(outcome.verdict) for outcome in outcomes] == ["answered", "answered", "missing", "missing"]
    assert [outcome.attempt for outcome in outcomes] == [1, 2, 2, 2]
    assert [outcome.tries for outcome in outcomes] == [1, 1, 2, 2]


def test_a_failed_row_that_is_being_sent_again_is_pending(made: MadeRun) -> None:
    made.add_attempt(0, [failure_line(made.ids[0], 429, "busy")])
    made.add_attempt(0, rows=[(0, 1)], state="running")
    assert verdicts(made)[0] == "pending"


def test_a_line_that_only_says_that_the_engine_died_is_no_response(made: MadeRun) -> None:
    made.add_attempt(0, [failure_line(made.ids[0], 500, ENGINE_DIED), response_line(made.ids[1], "x")], state="died")
    assert verdicts(made) == ["pending", "answered", "pending", "pending"]


def test_two_answers_within_an_attempt_conflict(made: MadeRun) -> None:
    made.add_attempt(0, [response_line(made.ids[0], text) for text in ("x", "y", "x")])
    outcome = loaded(made).outcomes[0]
    assert outcome.verdict is Verdict.CONFLICTING
    assert outcome.response is not None
    assert (outcome.response.answer, [other.answer for other in outcome.conflicts]) == ("x", ["y"])
    assert outcome.message == "2 different answers within one attempt; the first is kept"


def test_due_is_what_is_pending_missing_or_failed_in_passing(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.add_shard([b"%d" % index for index in range(10)])
    made.add_shard([b"{}"] * 8, {7: "tasks.jsonl:18: an empty row"})
    expired = b'{"custom_id":"%b","response":null,"error":{"code":"batch_expired","message":"m"}}'
    lines = [
        response_line(made.ids[10], "x"),
        response_line(made.ids[11], "x", finish="length"),
        failure_line(made.ids[12], 400, "too long"),
        failure_line(made.ids[13], 429, "busy"),
        expired % made.ids[14].encode(),
    ]
    made.add_attempt(1, lines, rows=[(10, 16)])
    shard = loaded(made, 1)
    assert [str(outcome.verdict) for outcome in shard.outcomes] == [
        "answered", "truncated", "failed", "failed", "expired", "missing", "pending", "rejected"
    ]  # fmt: skip
    assert to_send(shard, attempts=2) == [13, 14, 15, 16]
    assert to_send(shard, attempts=1) == [16]
    assert to_send(shard, attempts=1, retry=frozenset({Verdict.FAILED})) == [12, 13, 16]
    assert to_send(shard, attempts=1, retry=frozenset(Verdict)) == [10, 11, 12, 13, 14, 15, 16]


def test_damaged_or_missing_ids_are_a_run_error(made: MadeRun) -> None:
    path = made.run.ids_path(0)
    path.write_bytes(path.read_bytes().replace(b"0-", b"9-"))
    with pytest.raises(RunError, match="checksum differs"):
        loaded(made)
    path.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        loaded(made)
