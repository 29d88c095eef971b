from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchkit.answers import ParseError, parser
from batchkit.errors import UsageError


def test_text_is_stripped() -> None:
    assert parser("text")("\n a b \n") == "a b"


def test_answers_that_are_no_text_come_out_as_they_are() -> None:
    assert parser("text")([0.5, 1.0]) == [0.5, 1.0]
    assert parser("json")({"a": 1}) == {"a": 1}
    assert parser("number")(0.25) == 0.25


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        (" [1, 2]\n", [1, 2]),
        ("42", 42),
        ('"red"', "red"),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ("Here it is:\n```\n[1]\n```\nDone.", [1]),
        ('<think>is it {"a": 2}?</think>\n{"a": 1}', {"a": 1}),
        ('no opening tag {"a": 2}</think>{"a": 1}', {"a": 1}),
        ('The answer is {"a": [1, {"b": 2}]}, I think {"c": 3}', {"a": [1, {"b": 2}]}),
        ('[see below] {"a": "}"}', {"a": "}"}),
        ('{"a": 123456789012345678901234567890}', {"a": 123456789012345678901234567890}),
    ],
)
def test_json_is_found(text: str, value: Any) -> None:
    assert parser("json")(text) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON in it"),
        ("I cannot say.", "no JSON in it"),
        ('{"a": {"b": 1}, "c": ', "its JSON is cut off"),
        ('{"a": {"b": 1}, "c": "unfin', "its JSON is cut off"),
        ("{'a': {\"b\": 1}}", "no JSON in it"),
        ('{"a": NaN}', "not usable JSON"),
        ("[" * 100_000, "not usable JSON"),
    ],
    ids=lambda text: text[:20],
)
def test_json_that_is_none_is_a_parse_error(text: str, reason: str) -> None:
    with pytest.raises(ParseError, match=reason):
        parser("json")(text)


def test_json_is_checked_against_a_schema() -> None:
    parse = parser("json", {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    assert parse('{"n": 1}') == {"n": 1}
    with pytest.raises(ParseError, match=r"does not match the schema: \$\.n: 'x' is not of type 'integer'"):
        parse('{"n": "x"}')


def test_a_schema_that_is_none_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no JSON schema"):
        parser("json", {"type": 7})


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("A", "A"),
        ("b", "B"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("B.", "B"),
        ("B. Paris", "B"),
        ("B) Paris", "B"),
        ("A: a cat", "A"),
        ("(C) because it is round", "C"),
        ("**B. Paris**", "B"),
        ("B - Paris", "B"),
        ("The answer is D.", "D"),
        ("Answer: **B**", "B"),
        ("answer: b", "B"),
        ("The correct option is (B) Paris", "B"),
        ("Option B is correct", "B"),
        ("Final answer: $\\boxed{\\text{D}}$", "D"),
        ("The answer is A. Wait, no: the answer is C.", "C"),
        ("The answer is A because it is red.", "A"),
        ("Option A is wrong. The correct answer is C.", "C"),
        ("First I look at the shapes.\nThey are round.\n\nD", "D"),
        ("A\nIt is red.", "A"),
        ("<think>A? Or B?</think>\n\nC", "C"),
        ("I think it is (B), as far as I can see.", "B"),
        ("I think B", "B"),
    ],
)
def test_a_choice_is_found(text: str, choice: str) -> None:
    assert parser("choice")(text) == choice


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A dog runs over the grass.",
        "Answer: A dog is running.",
        "The answer is a cat.",
        "I am not sure.",
        "None of these",
        "A or B",
        "It is not B",
        "(A) and (B) both fit",
        "It's a cat",
    ],
)
def test_what_names_no_choice_is_a_parse_error(text: str) -> None:
    with pytest.raises(ParseError):
        parser("choice")(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("-7", -7),
        ("−7", -7),
        ("about 1,234.5 %", 1234.5),
        ("$3.50", 3.5),
        ("-$5", -5),
        ("The answer is 42.", 42),
        ("The answer is 5, since 2 + 3 = 5 and not 9", 5),
        ("Answer: **7** of 9 cats", 7),
        ("\\boxed{-3} of 10", -3),
        ("so 4 + 4\n#### 1,000", 1000),
        ("There are 3 cats and 4 dogs", 4),
        ("between 3-7", 7),
        ("1,2,3", 3),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("<think>10</think>9", 9),
    ],
)
def test_a_number_is_found(text: str, number: float) -> None:
    found = parser("number")(text)
    assert found == number
    assert type(found) is type(number)


@pytest.mark.parametrize("text", ["", "three", "H2O", "9" * 5000])
def test_what_holds_no_number_is_a_parse_error(text: str) -> None:
    with pytest.raises(ParseError):
        parser("number")(text)


def test_regex_gives_the_first_group_or_the_whole_match() -> None:
    assert parser(r"regex:colour: (\w+)")("the colour: red") == "red"
    assert parser(r"regex:\d+")("17 cats") == "17"
    assert parser(r"regex:(a)|(b)")("b") == "b"
    with pytest.raises(ParseError, match="does not match"):
        parser(r"regex:\d+")("none")


@pytest.mark.parametrize("spec", ["", "yaml", "regex", "JSON"])
def test_an_unknown_spec_is_a_usage_error_that_names_the_known_ones(spec: str) -> None:
    with pytest.raises(UsageError, match="is not known") as caught:
        parser(spec)
    assert caught.value.hint == "one of text, json, choice, number, regex:…"


def test_a_broken_pattern_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no regular expression"):
        parser("regex:(")


@pytest.mark.parametrize("spec", ["text", "json", "choice", "number", "regex:(.)"])
@given(text=st.text())
def test_no_text_whatever_raises_anything_but_a_parse_error(spec: str, text: str) -> None:
    with contextlib.suppress(ParseError):
        parser(spec)(text)
