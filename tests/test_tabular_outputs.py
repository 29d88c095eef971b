"""Results as CSV and Parquet, and as flat columns: the same values as the JSONL results have."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from batchkit import prepare
from batchkit.errors import UsageError
from batchkit.flat import COLUMNS
from batchkit.merging import merge
from batchkit.piles import merge_pile
from batchkit.result_tables import BLOCK_ROWS, _spill, write_table
from tests.conftest import WriteTasks
from tests.made_runs import MadeRun, failure_line, response_line
from tests.test_cli import answer_all, call
from tests.test_generated_images import RED
from tests.test_reuse import answer

ROWS: list[dict[str, Any]] = [
    {"id": 1, "question": 'say "hi", twice\nor\r\nthrice\rplease', "score": 1.5, "mixed": "a", "huge": 10**30},
    {"id": 2, "question": "=1+1", "score": 2, "ok": True, "mixed": 7, "tags": ["x", "y"], "huge": 1},
    {"id": 3, "question": " spaced ", "score": None, "ok": False, "mixed": None, "tags": [], "late": {"a": 1}},
    {"id": -(2**63), "question": "", "ok": None, "mixed": True, "line": "\u2028 é 漢 🙂 \x00"},
]


def as_bytes(rows: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(row, ensure_ascii=False).encode() for row in rows]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, strict=True))


def columns_of(result: dict[str, Any]) -> dict[str, Any]:
    """A result as the columns of a table, another way."""
    columns = {name: value for name, value in result.items() if not name.endswith("batchkit")}
    name = next(name for name in result if name.endswith("batchkit"))
    for member, value in result[name].items():
        if member == "usage":
            columns |= {f"{name}.usage.{key}": count for key, count in (value or {}).items()}
        else:
            columns[f"{name}.{member}"] = value
    return columns


def as_field(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    made = MadeRun(tmp_path / "run")
    made.add_shard([*as_bytes(ROWS), b"{bad"], {4: "tasks.jsonl:5: not valid JSON"})
    made.finish()
    lines = [response_line(made.ids[0], "red"), response_line(made.ids[1], "1,5", finish="length")]
    made.add_attempt(0, [*lines, failure_line(made.ids[2], 400, "too long")])
    return made


def test_a_csv_read_back_has_the_values_of_the_jsonl_results(made: MadeRun) -> None:
    merge(made.run)
    summary = merge(made.run, output=made.run.path / "table.csv")
    expected = [columns_of(result) for result in read_jsonl(made.run.path / "results.jsonl")]
    rows = read_csv(made.run.path / "table.csv")
    assert len(rows) == len(expected) == summary.rows == 5
    for row, result in zip(rows, expected, strict=True):
        numbers = {"tags", "late"}  # JSON, which may be spaced otherwise
        assert {name: text for name, text in row.items() if name not in numbers} == {
            name: as_field(result.get(name)) for name in row if name not in numbers
        }
        assert all(json.loads(row[name] or "null") == result.get(name) for name in numbers)
    assert list(rows[0])[:9] == ["id", "question", "score", "mixed", "huge", "ok", "tags", "late", "line"]
    assert list(rows[0])[9:15] == [
        "model", "raw_response", "parsed_answer", "error", "batchkit.custom_id", "batchkit.verdict",
    ]  # fmt: skip


def test_a_csv_is_rfc_4180_and_tells_null_from_an_empty_text(made: MadeRun) -> None:
    merge(made.run, output=made.run.path / "table.csv.gz")
    text = gzip.decompress((made.run.path / "table.csv.gz").read_bytes())
    assert text.startswith(b"id,question,score,")
    assert b'\r\n1,"say ""hi"", twice\nor\r\nthrice\rplease",1.5,a,' in text
    assert b'\r\n-9223372036854775808,"",,' in text  # an empty question, and no score
    assert text.endswith(b"\r\n")
    opened = arrow_csv.read_csv(
        gzip.GzipFile(made.run.path / "table.csv.gz"),
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
    )
    assert opened.num_rows == 5
    assert opened["question"].to_pylist()[:4] == [row["question"] for row in ROWS]


def test_a_parquet_read_back_equals_the_jsonl_results_type_by_type(made: MadeRun) -> None:
    merge(made.run)
    merge(made.run, output=made.run.path / "results.parquet")
    table = parquet.read_table(made.run.path / "results.parquet")
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert {name: types[name] for name in ("id", "question", "score", "ok")} == {
        "id": "int64", "question": "string", "score": "double", "ok": "bool",
    }  # fmt: skip
    assert types["batchkit.usage.prompt_tokens"] == types["batchkit.attempt"] == "int64"
    as_json = {"mixed", "tags", "late", "huge"}
    for row, result in zip(
        table.to_pylist(), map(columns_of, read_jsonl(made.run.path / "results.jsonl")), strict=True
    ):
        for name, value in row.items():
            found = json.loads(value) if name in as_json and value is not None else value
            assert (name, found, type(found)) == (name, *_expected(result.get(name), types[name]))
    assert {name for name, kind in types.items() if kind == "string"} >= as_json


def _expected(value: Any, kind: str) -> tuple[Any, type]:
    value = float(value) if kind == "double" and value is not None else value
    return value, type(value)


def test_whole_numbers_that_no_double_holds_are_not_rounded(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.add_shard([b'{"a":9007199254740993,"b":9007199254740992}', b'{"a":0.5,"b":0.5}'])
    made.finish()
    merge(made.run, output=tmp_path / "r.parquet")
    table = parquet.read_table(tmp_path / "r.parquet")
    assert table["a"].to_pylist() == ["9007199254740993", "0.5"]
    assert table["b"].to_pylist() == [9007199254740992.0, 0.5]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
NAMES = st.sampled_from(["a", "b", "", "é,\r\n", 'q"', "batchkit", "c.d"])


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.dictionaries(NAMES, JSON, max_size=5), min_size=1, max_size=6))
def test_whatever_rows_hold_both_tables_give_it_back(
    rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    ours: dict[str, Any] = {f"z_{name}": None for name in ("model", "raw_response", "parsed_answer", "error")}
    lines = [
        json.dumps({**row, **ours, "z_batchkit": {"custom_id": "1", "usage": {"n": 1}}}, ensure_ascii=False).encode()
        for row in rows
    ]
    for name in ("t.csv", "t.parquet"):
        with write_table(folder / name) as writer:
            for line in lines:
                writer.write(line + b"\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = parquet.read_table(folder / "t.parquet")
    with open(folder / "t.csv", encoding="utf-8", newline="") as stream:
        header, *fields = csv.reader(stream, strict=True)
    assert header == table.column_names == [*names, *ours, "z_batchkit.custom_id", "z_batchkit.usage.n"]
    for place, name in enumerate(names):
        kind = str(table.schema.field(place).type)
        values = [row.get(name) for row in rows]
        is_text = all(value is None or isinstance(value, str) for value in values)
        found = table.column(place).to_pylist()
        read = [json.loads(v) if kind == "string" and not is_text and v is not None else v for v in found]
        assert [_typed(value, kind) for value in values] == read
        for value, record in zip(values, fields, strict=True):
            text = record[place]
            if value is None or isinstance(value, str):
                assert text == (value or "")
            else:
                assert json.loads(text) == value


def _typed(value: Any, kind: str) -> Any:
    return float(value) if kind == "double" and value is not None else value


def test_a_parquet_file_has_row_groups_of_bounded_rows(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.add_shard([b'{"id":%d}' % number for number in range(BLOCK_ROWS + 5)])
    made.finish()
    merge(made.run, output=tmp_path / "r.parquet")
    found = parquet.ParquetFile(tmp_path / "r.parquet").metadata
    assert [found.row_group(group).num_rows for group in range(found.num_row_groups)] == [BLOCK_ROWS, 5]
    assert parquet.read_table(tmp_path / "r.parquet")["id"].to_pylist() == list(range(BLOCK_ROWS + 5))


@pytest.mark.parametrize("name", ["results.csv", "results.csv.gz", "results.parquet"])
def test_a_merge_that_fails_leaves_the_old_table_and_nothing_beside_it(
    made: MadeRun, name: str, tmp_path: Path
) -> None:
    output = tmp_path / "out" / name
    merge(made.run, output=output)
    before = output.read_bytes()
    merge(made.run, output=output)
    assert output.read_bytes() == before
    made.run.rows_path(0).write_bytes(made.run.rows_path(0).read_bytes()[:-3])
    with pytest.raises(Exception, match="not what prepare wrote"):
        merge(made.run, output=output)
    assert output.read_bytes() == before
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".")]


def test_the_lines_set_aside_have_no_name_that_could_be_left_behind(tmp_path: Path) -> None:
    with _spill(tmp_path) as spill:
        spill.write(b"x")
        assert list(tmp_path.iterdir()) == []


def test_a_row_whose_field_is_called_like_a_column_asks_for_a_prefix(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.add_shard([b'{"batchkit.verdict":1}'])
    made.finish()
    with pytest.raises(UsageError, match=r"'batchkit.verdict', which a column") as caught:
        merge(made.run, output=tmp_path / "r.csv")
    assert "--prefix" in (caught.value.hint or "")
    merge(made.run, output=tmp_path / "r.csv", prefix="b_")
    assert read_csv(tmp_path / "r.csv")[0]["batchkit.verdict"] == "1"


def test_without_pyarrow_the_extra_is_named(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        merge(made.run, output=made.run.path / "results.parquet")
    assert caught.value.hint == "pip install 'batchkit-vlm[parquet]'"


def test_merge_loads_pyarrow_only_for_parquet(made: MadeRun) -> None:
    import subprocess

    code = f"import sys, batchkit; batchkit.merge({str(made.run.path)!r}, output={str(made.run.path / 'r.csv')!r}); "
    code += "sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["flat.jsonl", "flat.csv", "flat.parquet"])
def test_flat_results_have_the_six_columns_in_every_format(
    name: str, write_tasks: WriteTasks, picture: Any, tmp_path: Path
) -> None:
    picture("a.png")
    tasks = write_tasks([
        {"set": "x", "n": 1.50, "image": "a.png", "question": "what?", "error": "theirs"},
        {"set": "x", "n": 2, "image": None, "question": "why, \"so\"?"},
        {"set": "x", "n": 3, "question": "when?"},
        {"set": None, "n": 4, "question": "who?"},
    ])  # fmt: skip
    assert call("prepare", tasks, tmp_path / "run", "--model", "m", "--id-fields", "set,n").exit_code == 0
    answer_all(tmp_path / "run", {0: "red", 1: ""})
    done = call("merge", tmp_path / "run", "--flat", "-o", tmp_path / name)
    assert done.exit_code == 3, done.stderr
    rejected = "tasks.jsonl:4: id field 'set' is missing; the row has set, n, question"
    expected = [
        ["x|1.5", "what?", True, "red", "success", None],
        ["x|2", 'why, "so"?', False, "", "success", None],
        ["x|3", "when?", False, None, "error", "too long"],
        ["3", "who?", False, None, "error", rejected],
    ]
    if name.endswith(".jsonl"):
        found = [list(row.values()) for row in read_jsonl(tmp_path / name)]
        assert list(read_jsonl(tmp_path / name)[0]) == list(COLUMNS)
    elif name.endswith(".csv"):
        found = [list(row.values()) for row in read_csv(tmp_path / name)]
        expected = [[as_field(value) for value in row] for row in expected]
    else:
        table = parquet.read_table(tmp_path / name)
        assert [str(field.type) for field in table.schema] == ["string"] * 2 + ["bool"] + ["string"] * 3
        found = [list(row.values()) for row in table.to_pylist()]
    assert found == expected


def test_has_image_tells_what_was_sent_not_what_the_row_names(
    write_tasks: WriteTasks, picture: Any, tmp_path: Path
) -> None:
    picture("a.png")
    quoted = '"type":"image_url"'
    tasks = write_tasks([
        {"photo": "a.png", "question": "a"},
        {"photo": "gone.png", "question": "b"},
        {"question": quoted},
    ])  # fmt: skip
    options = ["--image-field", "photo", "--on-bad-image", "text-only"]
    call("prepare", tasks, tmp_path / "run", "--model", "m", *options)
    call("merge", tmp_path / "run", "--flat")
    results = read_jsonl(tmp_path / "run" / "results.jsonl")
    assert [row["has_image"] for row in results] == [True, False, False]
    run = MadeRun(tmp_path / "made")  # rows of a table are kept without their images
    run.add_shard([b'{"id":0}', b"{bad", b'{"id":2}'], {1: "bad"})
    run.finish()
    run.run.requests_path(0).write_bytes(b'{"a":{"type":"text"}}\n{"a":{"type":"image_url"}}\n')
    merge(run.run, flat=True)
    assert [row["has_image"] for row in read_jsonl(run.run.path / "results.jsonl")] == [False, False, True]


def test_flat_ids_are_the_id_field_or_the_position_in_the_file(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "a"}, {"id": 7, "question": "b"}, {"question": "c"}])
    call("prepare", tasks, tmp_path / "run", "--model", "m", "--start", "1")
    call("merge", tmp_path / "run", "--flat")
    assert [row["id"] for row in read_jsonl(tmp_path / "run" / "results.jsonl")] == ["7", "2"]


def test_flat_results_of_rows_that_are_requests_tell_what_the_user_said(
    write_tasks: WriteTasks, tmp_path: Path
) -> None:
    def request(custom_id: str, content: Any) -> dict[str, Any]:
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
        body = {"model": "m", "messages": messages}
        return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}

    shown = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    tasks = write_tasks([request("one", "what?"), request("two", [shown, {"type": "text", "text": "this?"}])])
    call("prepare", tasks, tmp_path / "run", "--model", "m")
    call("merge", tmp_path / "run", "--flat")
    assert [
        (row["id"], row["question"], row["has_image"]) for row in read_jsonl(tmp_path / "run" / "results.jsonl")
    ] == [
        ("one", "what?", False),
        ("two", "this?", True),
    ]


def test_a_pile_may_be_merged_into_a_table_and_flat(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"id": "a", "question": "what?"}, {"id": 2, "question": "why?"}])
    (tmp_path / "out.jsonl").write_bytes(response_line("2", "so") + b"\n")
    merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "r.csv", flat=True)
    assert [list(row.values()) for row in read_csv(tmp_path / "r.csv")] == [
        ["a", "what?", "false", "", "error", "no file has a response to it"],
        ["2", "why?", "false", "so", "success", ""],
    ]
    merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "r.parquet")
    assert parquet.read_table(tmp_path / "r.parquet")["batchkit.verdict"].to_pylist() == ["missing", "answered"]


@pytest.mark.parametrize("kind", ["csv", "vlmevalkit"])
def test_rows_that_are_no_tasks_without_their_images_or_prompts_make_no_retry_file(tmp_path: Path, kind: str) -> None:
    red = base64.b64encode(RED).decode()
    tasks = tmp_path / ("t.csv" if kind == "csv" else "t.tsv")
    cell = "\t" if kind == "vlmevalkit" else ","
    header = "index,question,image" if kind == "csv" else "index\tquestion\tA\tB\timage"
    rows = [cell.join([str(n), "which?", *(["x", "y"] if kind != "csv" else []), red]) for n in range(2)]
    tasks.write_text("\n".join([header, *rows]) + "\n")
    for name, start in (("one", 0), ("two", 1)):
        prepare(tasks, tmp_path / name, model="m", start=start, end=start + 1, workers=1)
    runs = [tmp_path / "one", tmp_path / "two"]
    answer(runs[0], lambda _, one: [response_line(one, "x")])
    answer(runs[1], lambda _, one: [failure_line(one, 400, "too long")])
    (tmp_path / "retry.jsonl").write_bytes(b"of an earlier merge\n")
    summary = merge(runs, output=tmp_path / "results.jsonl")
    assert not (tmp_path / "retry.jsonl").exists()
    assert summary.retry_file is None
    command = f"batchkit prepare TASKS NEW_RUN … --reuse {runs[0]} --reuse {runs[1]}"
    assert summary.send_rest == command
    told = call("merge", runs[1])
    assert f"--reuse {runs[1]}" in told.output
    with pytest.raises(UsageError, match="--retry-file") as caught:
        merge(runs[1], retry_file=tmp_path / "mine.jsonl")
    assert str(caught.value.hint).startswith("batchkit prepare TASKS NEW_RUN … --reuse")
    assert call("merge", runs[0]).output.count("--reuse") == 0, "all answered"


@pytest.mark.parametrize("name", ["flat.csv", "flat.parquet"])
def test_flat_results_of_no_rows_have_their_columns(tmp_path: Path, name: str) -> None:
    made = MadeRun(tmp_path / "run")
    made.finish()
    merge(made.run, output=tmp_path / name, flat=True)
    if name.endswith("csv"):
        assert (tmp_path / name).read_bytes() == ",".join(COLUMNS).encode() + b"\r\n"
    else:
        assert parquet.read_table(tmp_path / name).column_names == list(COLUMNS)
