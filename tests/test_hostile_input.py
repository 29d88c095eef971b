"""Whatever a file holds: N rows in, N results out, in order; a bad row is rejected, an unusable file a clear error."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchkit import inputs, merging, preparation
from batchkit.errors import BatchkitError
from batchkit.tasks import FILE_START, InputFormat, Place
from tests.conftest import WriteTasks

SLOW = settings(
    max_examples=settings().max_examples * 2 // 5,  # each writes files
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(tasks: Path, run: Path, **options: Any) -> list[dict[str, Any]]:
    """The results of a run without any response: rows that became requests are `pending`."""
    report = preparation.prepare(tasks, run, model="m", **options)
    merging.merge(run)
    results = [json.loads(line) for line in (run / "results.jsonl").read_bytes().split(b"\n")[:-1]]
    assert len(results) == report.rows == report.requests + report.rejected
    positions = [int(result["batchkit"]["custom_id"].partition("-")[0]) for result in results]
    assert positions == sorted(set(positions))
    return results


def verdicts(results: list[dict[str, Any]]) -> list[str]:
    return [result["batchkit"]["verdict"] for result in results]


HOSTILE_LINES: list[tuple[bytes, str | None]] = [
    (b'{"id": 0, "question": "fine"}', None),
    (b'{"id": 1, "question": "not \xff UTF-8"}', "not valid JSON"),
    ('{"id": 2, "question": "a\u2028b\u2029c\x85d"}'.encode(), None),
    (b'{"id": 3, "question": "crlf"}\r', None),
    (b'{"id": 4, "question": "nul \x00 raw"}', "not valid JSON"),
    (b'{"id": 5, "question": "nul \\u0000 escaped"}', None),
    (b'{"id": 6, "question": "first", "question": "last"}', None),
    (b'{"id": 7, "question": "?", "n": 1E400}', "a number is too large to be kept"),
    (b'{"id": 8, "question": "?", "n": -1e999}', "a number is too large to be kept"),
    (b'{"id": 9, "question": "?", "n": ' + b"9" * 5000 + b"}", "a number is too large to be kept"),
    (b'{"id": 10, "question": "?", "n": 123456789012345678901234567890}', None),
    (b'{"id": 11, "question": "?", "n": NaN}', "not valid JSON"),
    (b'{"id": 12, "question": "?", "n": Infinity}', "not valid JSON"),
    (b'{"id": 13, "question": "\\ud800"}', "half of a surrogate pair"),
    (b'{"id": 14, "question": "\\udc00 alone"}', "half of a surrogate pair"),
    (b'{"id": 15, "question": "\\ud83d\\ude00"}', None),
    (b'{"id": 16, "question": "\\ud800\\ud800"', "not valid JSON"),
    (b'{"id": 17, "question": "?", "image": 17}', "image field 'image' holds a number"),
    (b'{"id": 18, "question": "?", "image": {"a": 1}}', "image field 'image' holds an object"),
    (b'{"id": 19, "question": "?", "image": [[]]}', "image field 'image' holds empty"),
    (b'{"id": 20, "question": "?", "image": "\\u0000"}', "image cannot be read"),
    (b'{"id": 21, "question": "?", "image": "' + b"x" * 9999 + b'"}', "image cannot be read"),
    (b'{"id": 22, "question": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
    (b'{"question": "?", "": "", "\\u0000": 1}', None),
    (b"[]", "not a JSON object but empty"),
    (b"null", "not a JSON object but null"),
    ("\ufeff".encode() + b'{"id": 26, "question": "a byte order mark in mid-file"}', "not valid JSON"),
    ('{"id": 27, "question": "x"}'.encode("utf-16-le"), "not valid JSON"),
]


def test_each_hostile_line_is_a_request_or_a_rejection_that_says_why(write_tasks: WriteTasks, tmp_path: Path) -> None:
    results = outcome(write_tasks([line for line, _ in HOSTILE_LINES]), tmp_path / "run")
    assert len(results) == len(HOSTILE_LINES)
    for number, (result, (_, why)) in enumerate(zip(results, HOSTILE_LINES, strict=True)):
        assert result["batchkit"]["custom_id"].startswith(f"{number}-")
        assert result.get("id", number) == number
        if why is None:
            assert result["batchkit"]["verdict"] == "pending"
        else:
            assert result["error"].startswith(f"tasks.jsonl:{number + 1}: ")
            assert why in result["error"]
    request = (tmp_path / "run" / "requests" / "00000.jsonl").read_bytes().split(b"\n")[3]
    assert json.loads(request)["body"]["messages"][0]["content"] == "nul \0 escaped"
    assert b'"content":"last"' in (tmp_path / "run" / "requests" / "00000.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.csv", "tasks.parquet"])
def test_a_line_of_100_megabytes_is_a_row_like_any_other(name: str, tmp_path: Path) -> None:
    long = "long, " * 17_000_000
    rows = [{"id": "0", "question": "a"}, {"id": "1", "question": long}, {"id": "2", "question": "c"}]
    tasks = tmp_path / name
    if name == "tasks.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tasks)
    elif name == "tasks.csv":
        with open(tasks, "w", newline="") as stream:
            csv.writer(stream).writerows([list(rows[0]), *([row["id"], row["question"]] for row in rows)])
    else:
        tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = outcome(tasks, tmp_path / "run", max_bytes=50_000_000)
    assert verdicts(results) == ["pending", "rejected", "pending"]
    assert "2: the request has 102," in results[1]["error"] or "3: the request has 102," in results[1]["error"]
    assert results[1]["question"] == long


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)


@SLOW
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=30), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_any_texts_come_back_from_a_csv_in_their_rows(
    pairs: list[tuple[str, str]], ending: str, all_quoted: bool
) -> None:
    stream = io.StringIO(newline="")
    # Before Python 3.13 the writer leaves a carriage return unquoted where lines do not end in one.
    all_quoted |= any("\r" in text for pair in pairs for text in pair)
    writer = csv.writer(stream, lineterminator=ending, quoting=csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL)
    writer.writerows([("id", "question"), *pairs])
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / "tasks.csv"
        tasks.write_bytes(stream.getvalue().encode())
        rows = list(inputs.open_source(tasks).rows())
        for stop in (0, len(rows) // 2):  # from behind any row on, too
            place = FILE_START if not stop else Place(stop, rows[stop].line, rows[stop - 1].end)
            again = list(inputs.open_source(tasks).rows(place))
            assert [row[:4] for row in again] == [row[:4] for row in rows[stop:]]
    assert [tuple(json.loads(row.raw).values()) for row in rows] == pairs
    assert all(row.fault is None for row in rows)


plain = st.text(st.characters(exclude_characters='\n\r"\x00,', exclude_categories=["Cs"]), min_size=1, max_size=12)
spoilt = st.binary(min_size=1, max_size=12).filter(lambda raw: not set(raw) & set(b'\n\r"'))


@SLOW
@given(st.lists(plain | spoilt, min_size=1, max_size=40))
def test_a_spoilt_line_of_a_csv_spoils_no_other(lines: list[str | bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / "tasks.csv"
        content = [b"7," + (line.encode() if isinstance(line, str) else line) for line in lines]
        tasks.write_bytes(b"id,question\n" + b"\n".join(content) + b"\n")
        rows = list(inputs.open_source(tasks).rows())
        assert [(row.position, row.line) for row in rows] == [(n, n + 2) for n in range(len(lines))]
        for row, line in zip(rows, lines, strict=True):
            if isinstance(line, str):
                assert (json.loads(row.raw), row.fault) == ({"id": "7", "question": line}, None)
        results = outcome(tasks, Path(folder) / "run")
        assert [result["id"] for result in results] == ["7"] * len(lines)


FORMATS: list[InputFormat] = ["auto", "jsonl", "csv", "tsv", "parquet", "hf", "vlmevalkit", "batch"]
pieces = st.lists(
    st.sampled_from(
        [b"id,question\n", b"index\timage\tquestion\tA\n", b'"', b"\n", b"\r", b",", b"\t", b"\x00", b"\xff", b"{",
         b"}", b'{"question": "a"}\n', b"1,why\n", b"1\t2\twhy\tx\n", b"PAR1", b"\xef\xbb\xbf", b"[",
         b"null\n", b"\xe2\x80\xa8"]
    )
    | st.binary(max_size=6),
    max_size=25,
)  # fmt: skip


@SLOW
@given(pieces, st.sampled_from(FORMATS), st.sampled_from(["t", "t.csv", "t.tsv", "t.parquet", "t.gz", "t.csv.gz"]))
def test_any_bytes_are_rows_or_a_clear_error(parts: list[bytes], wanted: InputFormat, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / name
        tasks.write_bytes(b"".join(parts))
        try:
            results = outcome(tasks, Path(folder) / "run", input_format=wanted)
        except BatchkitError:  # anything else is a bug of ours
            return
        assert set(verdicts(results)) <= {"pending", "rejected"}


@SLOW
@given(st.data())
def test_a_parquet_file_with_flipped_bytes_is_rows_or_a_clear_error(data: st.DataObject) -> None:
    stream = io.BytesIO()
    pq.write_table(pa.table({"question": ["a", "b", "c"] * 50, "n": range(150)}), stream, row_group_size=50)
    content = bytearray(stream.getvalue())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "t.parquet").write_bytes(content)
        with contextlib.suppress(BatchkitError):  # anything else is a bug of ours
            outcome(Path(folder) / "t.parquet", Path(folder) / "run", workers=1)
