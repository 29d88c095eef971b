from __future__ import annotations

import gzip
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchkit.errors import RunBusyError, RunError, UsageError
from batchkit.manifests import OUR_NAMES
from batchkit.merging import merge
from batchkit.outcomes import Outcome
from batchkit.responses import ANSWERS, Verdict, parse
from batchkit.results import ResultEncoder
from tests.made_runs import MadeRun, failure_line, response_line
from tests.shapes import SHAPES


def results_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def verdicts_of(results: list[dict[str, Any]]) -> list[str]:
    return [result["batchkit"]["verdict"] for result in results]


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """Two shards of three rows; the second row is rejected."""
    made = MadeRun(tmp_path / "run")
    made.add_shard([b'{"id": 0,  "n": 1.50}', b"{bad", b'{"id": 2}\r'], {1: "tasks.jsonl:2: not valid JSON"})
    made.add_shard([b" {} ", b'{"id":"\\u00e9 \xc3\xa9"}', b'{"id": 5}'])
    made.finish()
    return made


def test_a_result_is_the_rows_own_bytes_and_then_our_fields(made: MadeRun) -> None:
    made.add_attempt(0, [response_line(made.ids[0], " red ")])
    merge(made.run)
    first = (made.run.path / "results.jsonl").read_bytes().split(b"\n")[0]
    assert first == (
        b'{"id": 0,  "n": 1.50,"model":"m","raw_response":" red ","parsed_answer":"red","error":null,"batchkit":'
        b'{"custom_id":"' + made.ids[0].encode() + b'","verdict":"answered","finish_reason":"stop","usage":'
        b'{"prompt_tokens":10,"completion_tokens":2,"total_tokens":12},"backend":"vllm","attempt":1}}'
    )


def test_there_is_one_result_per_row_in_row_order_and_counts_add_up(made: MadeRun) -> None:
    made.add_attempt(0, [failure_line(made.ids[2], 400, "too long"), response_line(made.ids[0], "red")])
    made.add_attempt(1, [response_line(made.ids[4], "blue", finish="length")], rows=[(3, 5)])
    summary = merge(made.run)
    results = results_of(made.run.path / "results.jsonl")
    assert verdicts_of(results) == ["answered", "rejected", "failed", "missing", "truncated", "pending"]
    assert [result["batchkit"]["custom_id"] for result in results] == made.ids
    assert sum(summary.verdicts.values()) == summary.rows == 6
    assert set(summary.verdicts) == set(Verdict)
    assert {str(verdict): count for verdict, count in summary.verdicts.items() if count} == dict.fromkeys(
        ("answered", "truncated", "failed", "missing", "pending", "rejected"), 1
    )


def test_failures_never_go_into_the_answer_fields(made: MadeRun) -> None:
    made.add_attempt(0, [failure_line(made.ids[0], 400, "too long")])
    merge(made.run)
    for result in results_of(made.run.path / "results.jsonl"):
        assert (result["raw_response"], result["parsed_answer"]) == (None, None)
        assert isinstance(result["error"], str)
        assert result["error"]


def test_a_row_that_is_no_object_keeps_its_line_beside_our_fields(made: MadeRun) -> None:
    merge(made.run)
    result = results_of(made.run.path / "results.jsonl")[1]
    assert list(result) == list(OUR_NAMES)
    assert result["batchkit"]["line"] == "{bad"
    assert result["error"] == "tasks.jsonl:2: not valid JSON"


def test_an_empty_object_and_white_space_around_a_row_are_no_trouble(made: MadeRun) -> None:
    merge(made.run)
    lines = (made.run.path / "results.jsonl").read_bytes().split(b"\n")
    assert lines[2].startswith(b'{"id": 2,"model":')
    assert lines[3].startswith(b'{"model":')


def test_the_model_is_the_responses_own_or_the_manifests(made: MadeRun) -> None:
    made.add_attempt(0, [response_line(made.ids[0], "red")])
    merge(made.run)
    results = results_of(made.run.path / "results.jsonl")
    assert [results[0]["model"], results[2]["model"]] == ["m", "manifest-model"]


def test_an_answer_that_does_not_parse_is_invalid_and_kept(made: MadeRun) -> None:
    made.add_attempt(0, [response_line(made.ids[0], "The answer is 4"), response_line(made.ids[2], "four")])
    summary = merge(made.run, parse="number")
    results = results_of(made.run.path / "results.jsonl")
    assert results[0]["parsed_answer"] == 4
    assert (results[2]["raw_response"], results[2]["parsed_answer"]) == ("four", None)
    assert (results[2]["batchkit"]["verdict"], results[2]["error"]) == ("invalid", "no number in it")
    assert summary.answers == 2


def test_a_truncated_answer_is_parsed_where_it_can_be_and_stays_truncated(made: MadeRun) -> None:
    lines = [response_line(made.ids[index], text, finish="length") for index, text in ((0, '{"a":1} as'), (2, '{"a":'))]
    made.add_attempt(0, lines)
    merge(made.run, parse="json")
    results = results_of(made.run.path / "results.jsonl")
    assert [results[index]["parsed_answer"] for index in (0, 2)] == [{"a": 1}, None]
    assert [results[index]["error"] for index in (0, 2)] == [None, None]


def test_conflicting_answers_are_listed(made: MadeRun) -> None:
    made.add_attempt(0, [response_line(made.ids[0], text) for text in ("x", "y")])
    merge(made.run)
    results = results_of(made.run.path / "results.jsonl")
    assert results[0]["raw_response"] == "x"
    assert results[0]["batchkit"]["conflicts"] == [
        {"raw_response": "y", "verdict": "answered", "finish_reason": "stop"}
    ]
    assert "conflicts" not in results[2]["batchkit"]


def test_rows_without_an_answer_are_kept_verbatim_for_a_retry_except_pending_ones(made: MadeRun) -> None:
    made.add_attempt(0, [failure_line(made.ids[2], 400, "x"), response_line(made.ids[0], "red")])
    made.add_attempt(1, rows=[(3, 4)])
    merge(made.run)
    assert (made.run.path / "retry.jsonl").read_bytes() == b'{bad\n{"id": 2}\r\n {} \n'


def test_lines_of_no_row_are_counted_and_kept_aside(made: MadeRun) -> None:
    stranger = response_line("stranger", "x")
    made.add_attempt(0, [stranger, b"garbage"], torn=b'{"cust')
    summary = merge(made.run)
    path = made.run.path / "unexpected.jsonl"
    assert (summary.unexpected, summary.unreadable, summary.unexpected_file) == (1, 2, str(path))
    assert path.read_bytes() == stranger + b'\ngarbage\n{"cust\n'
    made.run.responses_path(0, 1).write_bytes(b"")
    assert merge(made.run).unexpected_file is None
    assert not path.exists()


def test_the_summary_counts_tokens_time_and_the_commonest_errors(made: MadeRun) -> None:
    made.add_attempt(0, [response_line(made.ids[0], "red"), failure_line(made.ids[2], 400, "12 tokens too long")])
    made.add_attempt(1, [failure_line(made.ids[3], 400, "7 tokens too long"), response_line(made.ids[5], "x")])
    summary = merge(made.run)
    assert (summary.tokens.prompt, summary.tokens.completion, summary.tokens.total) == (20, 4, 24)
    # Both attempts ran from 0:01:00 to 0:01:10.
    assert (summary.seconds, summary.answers_per_second) == (10.0, 0.2)
    assert (summary.model, summary.backends) == ("manifest-model", ["vllm"])
    first = summary.errors[0]
    assert (first.verdict, first.message, first.count, first.custom_id) == (
        "failed",
        "12 tokens too long",
        2,
        made.ids[2],
    )
    assert json.loads((made.run.path / "summary.json").read_bytes())["rows"] == 6


def test_exit_codes_say_whether_rows_are_pending_or_without_an_answer(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.add_shard([b"{}", b'{"a":1}'])
    assert merge(made.run).exit_code == 8
    made.add_attempt(0, [response_line(made.ids[0], "x")])
    assert merge(made.run).exit_code == 8  # prepare has not finished
    made.finish()
    assert merge(made.run).exit_code == 3
    made.add_attempt(0, [response_line(made.ids[1], "x")], rows=[(1, 2)])
    assert merge(made.run).exit_code == 0


def test_rows_that_use_our_names_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.add_shard([b"{}", b'{"inner": {"model": 1}, "a": "model"}', b'{"mod\\u0065l": "mine"}'])
    (made.run.path / "results.jsonl").write_bytes(b"of before\n")
    with pytest.raises(UsageError, match="has a field 'model' already") as caught:
        merge(made.run)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("--prefix answer_ ")
    assert (made.run.path / "results.jsonl").read_bytes() == b"of before\n"
    assert not list(made.run.path.glob(".*.tmp"))
    merge(made.run, prefix="answer_")
    results = results_of(made.run.path / "results.jsonl")
    assert list(results[2]) == ["model", *(f"answer_{name}" for name in OUR_NAMES)]
    assert results[2]["model"] == "mine"


def test_names_that_prepare_saw_are_refused_at_once(made: MadeRun) -> None:
    made.finish(names_in_use=["error"])
    with pytest.raises(UsageError, match="'error' already"):
        merge(made.run)


def test_results_may_go_elsewhere_compressed_with_their_companions_beside_them(made: MadeRun, tmp_path: Path) -> None:
    made.add_attempt(0, [response_line(made.ids[0], "red")])
    output = tmp_path / "out" / "pilot.jsonl.gz"
    summary = merge(made.run, output=output)
    assert len(gzip.decompress(output.read_bytes()).split(b"\n")) == 7
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "pilot.jsonl.gz",
        "pilot.retry.jsonl",
        "pilot.summary.json",
    ]
    assert summary.output == str(output)
    once = output.read_bytes()
    merge(made.run, output=output)
    assert output.read_bytes() == once


@pytest.mark.parametrize("name", ["results.xlsx", "results.parquet.gz", "results", "https://host/results.jsonl"])
def test_formats_that_are_not_written_are_a_usage_error(made: MadeRun, name: str) -> None:
    with pytest.raises(UsageError):
        merge(made.run, output=name)


@pytest.mark.parametrize("name", ["../tasks.jsonl", "rows/00000.jsonl", "responses/x.jsonl", "manifest.json"])
def test_what_a_merge_reads_is_never_overwritten(made: MadeRun, name: str) -> None:
    with pytest.raises(UsageError, match="would overwrite what the merge reads"):
        merge(made.run, output=made.run.path / name)
    with pytest.raises(UsageError, match="would overwrite what the merge reads"):
        merge(made.run, retry_file=made.run.path / name)


@pytest.mark.parametrize("change", [b"{}\n", b'{"id": 9}\n{}\n{}\n', b"1\n2\n3\n4\n", None])
def test_damaged_rows_are_a_run_error_and_nothing_is_written(made: MadeRun, change: bytes | None) -> None:
    path = made.run.rows_path(1)
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change)
    with pytest.raises(RunError, match=r"00001\.jsonl"):
        merge(made.run)
    assert not (made.run.path / "results.jsonl").exists()


@pytest.mark.parametrize("content", [None, b""])
def test_a_lost_or_damaged_seal_is_a_run_error_not_fewer_results(made: MadeRun, content: bytes | None) -> None:
    made.finish()
    path = made.run.seal_path(made.shards - 1)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError) as caught:
        merge(made.run)
    assert str(path) in caught.value.message
    assert "prepare again" in (caught.value.hint or "")
    assert not (made.run.path / "results.jsonl").exists()


def test_what_a_killed_merge_wrote_aside_is_removed_by_the_next(made: MadeRun) -> None:
    mine = made.run.path / ".thesis.tex.1-ab.tmp"
    for path in (mine, made.run.path / ".results.jsonl.1-ab.tmp", made.run.path / ".retry.jsonl.1-cd.tmp"):
        path.write_bytes(b"{")
    merge(made.run)
    assert list(made.run.path.glob(".*.tmp")) == [mine]


def test_two_merges_of_a_run_do_not_meet(made: MadeRun) -> None:
    with made.run.lease("merge"), pytest.raises(RunBusyError, match="merge"):
        merge(made.run)


ROW = st.dictionaries(
    st.text().filter(lambda name: name not in OUR_NAMES),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=5,
)


@given(ROW, st.sampled_from([None, 1, "\t"]), st.booleans(), st.text(), st.sampled_from(["", " ", "\r", "\t \r"]))
def test_every_result_is_json_with_the_row_verbatim_first(
    row: dict[str, Any], indent: str | int | None, ascii_only: bool, answer: str, behind: str
) -> None:
    text = json.dumps(row, indent=indent, ensure_ascii=ascii_only).replace("\n", " ")
    raw = (behind + text + behind).encode()
    outcome = Outcome(custom_id="a", verdict=Verdict.ANSWERED, response=parse(response_line("a", answer)))
    line = ResultEncoder().encode(raw, outcome).line
    assert line.startswith(text[:-1].rstrip().encode())
    assert line.count(b"\n") == 1
    result = json.loads(line)
    assert list(result) == [*row, *OUR_NAMES]
    assert {name: result[name] for name in row} == json.loads(text)
    assert (result["raw_response"], result["parsed_answer"]) == (answer, answer.strip())


@given(st.binary(max_size=60).filter(lambda raw: b"\n" not in raw))
def test_whatever_a_rejected_row_is_its_result_is_json(raw: bytes) -> None:
    outcome = Outcome(custom_id="a", verdict=Verdict.REJECTED, message="no JSON")
    result = json.loads(ResultEncoder().encode(raw, outcome).line)
    assert result["batchkit"]["verdict"] == "rejected"


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 30), st.integers(1, 4))
def test_row_order_is_kept_when_responses_are_shuffled(shuffler: random.Random, count: int, shards: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = MadeRun(Path(folder) / "run")
        for shard in range(shards):
            seal = made.add_shard([b'{"n":%d}' % (len(made.ids) + index) for index in range(count)])
            lines = [response_line(made.ids[position], str(position)) for position in range(seal.start, seal.end)]
            shuffler.shuffle(lines)
            made.add_attempt(shard, lines)
        made.finish()
        merge(made.run)
        results = results_of(made.run.path / "results.jsonl")
        assert [(result["n"], result["raw_response"]) for result in results] == [
            (position, str(position)) for position in range(count * shards)
        ]


def test_every_known_shape_comes_out_with_its_verdict(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.add_shard([b'{"shape":"%b"}' % shape.name.encode() for shape in SHAPES])
    made.add_attempt(0, [shape.of(custom_id) for shape, custom_id in zip(SHAPES, made.ids, strict=True)])
    made.finish()
    merge(made.run)
    results = results_of(made.run.path / "results.jsonl")
    assert verdicts_of(results) == [shape.verdict for shape in SHAPES]
    for shape, result in zip(SHAPES, results, strict=True):
        assert result["shape"] == shape.name
        assert result["raw_response"] == (shape.answer if shape.verdict in ANSWERS else None)
        assert (result["error"] is None) == (shape.verdict in ("answered", "truncated"))
