from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchkit.responses import ANSWERS, Response, UnreadableLine, Verdict, choose, parse
from tests.made_runs import response_line
from tests.shapes import SHAPES, Shape


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_known_shape_is_judged(shape: Shape) -> None:
    response = parse(shape.of("row-7"))
    assert response.custom_id == "row-7"
    assert (response.verdict, response.answer) == (shape.verdict, shape.answer)
    assert response.message == shape.message
    assert (response.passing, response.engine_died) == (shape.passing, shape.engine_died)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_a_failure_that_may_pass_is_passing(status: int) -> None:
    line = {"custom_id": "a", "response": {"status_code": status, "body": None}, "error": {"message": "m"}}
    assert parse(json.dumps(line).encode()).passing


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_failure_that_lasts_is_not_passing(status: int) -> None:
    line = {"custom_id": "a", "response": {"status_code": status, "body": None}, "error": {"message": "m"}}
    assert not parse(json.dumps(line).encode()).passing


def test_a_failing_status_is_no_success_though_the_body_has_choices() -> None:
    line = response_line("a", "red").replace(b'"status_code": 200', b'"status_code": 500')
    assert parse(line).verdict is Verdict.FAILED


@pytest.mark.parametrize("finish", ["stop", "length"])
@pytest.mark.parametrize("name", ["candidates", "promptFeedback"])
def test_choices_are_read_whatever_stands_beside_them(name: str, finish: str) -> None:
    response = parse(response_line("a", "red", finish=finish, **{name: None}))
    assert (response.answer, response.finish_reason) == ("red", finish)


def test_an_answer_that_quotes_the_death_of_an_engine_is_an_answer() -> None:
    response = parse(response_line("a", "EngineCore encountered an issue. See stack trace (above)"))
    assert (response.verdict, response.engine_died) == (Verdict.ANSWERED, False)


def test_a_bad_request_that_quotes_the_death_of_an_engine_is_no_death() -> None:
    message = "Invalid prompt: 'EngineCore encountered an issue.'"
    line = {"custom_id": "a", "response": {"status_code": 500, "body": None}, "error": {"message": message}}
    assert not parse(json.dumps(line).encode()).engine_died


def test_base64_that_an_error_quotes_is_left_out() -> None:
    line = {
        "custom_id": "a",
        "response": None,
        "error": {"message": f"cannot read data:image/png;base64,{'iVBO' * 99}!"},
    }
    assert parse(json.dumps(line).encode()).message == "cannot read data:image/png;base64,…!"


def test_usage_model_and_finish_reason_are_kept() -> None:
    response = parse(response_line("a", "red"))
    assert response.usage == {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    assert (response.model, response.finish_reason) == ("m", "stop")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\x00\x00\x00",
        b'{"id":"x"}',
        b'{"custom_id":7,"response":null}',
        b'{"custom_id":"a","response":{"status_code":200,"body":{"choi',
        b"[" * 100_000,
        b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{}}',
        b'{"key":"a","request":{"contents":[]}}',
    ],
    ids=lambda line: repr(line[:24]),
)
def test_what_is_no_response_is_unreadable(line: bytes) -> None:
    with pytest.raises(UnreadableLine):
        parse(line)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "error", "code", "data", "output", "status", "body", "status_code",
                 "finish_reason", "response", "candidates", "promptFeedback",
                 "results", "embedding", "index", "refusal", "text", "type"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)  # fmt: skip


@given(JSON, JSON)
def test_no_shape_whatever_raises(returned: object, error: object) -> None:
    response = parse(json.dumps({"custom_id": "a", "response": returned, "error": error}).encode())
    assert response.verdict in ANSWERS | {Verdict.FAILED, Verdict.EXPIRED}
    assert (response.message is None) == (response.verdict in {Verdict.ANSWERED, Verdict.TRUNCATED})


@given(st.binary(max_size=200))
def test_no_bytes_whatever_raise_anything_else(line: bytes) -> None:
    with pytest.raises(UnreadableLine):
        parse(line)


def answered(text: str) -> Response:
    return parse(response_line("a", text))


ERROR = parse(b'{"custom_id":"a","response":null,"error":{"code":"batch_expired","message":"m"}}')


def test_an_answer_beats_an_error_wherever_it_stands() -> None:
    for candidates in ([(1, answered("x")), (2, ERROR)], [(1, ERROR), (2, answered("x"))]):
        assert choose(candidates).response == answered("x")


def test_the_answer_of_a_later_attempt_wins_without_conflict() -> None:
    chosen = choose([(1, answered("x")), (2, answered("y"))])
    assert (chosen.response, chosen.attempt, chosen.conflicts) == (answered("y"), 2, [])


def test_equal_answers_are_one() -> None:
    assert choose([(1, answered("x")), (1, answered("x"))]).conflicts == []


def test_different_answers_within_an_attempt_conflict_and_the_first_is_kept() -> None:
    chosen = choose([(1, answered("x")), (1, answered("y")), (1, answered("x")), (1, answered("z"))])
    assert (chosen.response, chosen.conflicts) == (answered("x"), [answered("y"), answered("z")])


def test_of_errors_the_last_counts() -> None:
    last = parse(b'{"custom_id":"a","response":null,"error":{"code":"x","message":"last"}}')
    assert choose([(2, last), (1, ERROR)]).response == last
    assert choose([(1, ERROR), (1, last)]).response == last


def test_nothing_is_chosen_from_nothing() -> None:
    assert choose([]) == (None, None, [])
