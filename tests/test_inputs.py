"""Every input format: the same rows give the same requests, whatever they lie in; what is wrong is said where it is."""

from __future__ import annotations

import base64
import csv
import datetime as dt
import decimal
import gzip
import io
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchkit import hf, inputs, preparation, vlmevalkit
from batchkit.columns import Columns
from batchkit.errors import CredentialsError, InputError, RunError, UsageError
from batchkit.merging import merge
from batchkit.piles import merge_pile
from batchkit.runs import Run
from batchkit.tasks import Place
from tests.conftest import WriteTasks

ROWS = 10_000
COLOURS = 50

Rows = list[dict[str, Any]]


def encoded(colour: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 6), (colour * 5, 0, 99)).save(stream, "PNG")
    return stream.getvalue()


PICTURES = [encoded(colour) for colour in range(COLOURS)]


def made_rows(count: int) -> Rows:
    return [
        {"index": str(number), "image": f"p/{number % COLOURS}.png", "question": f'«{number}»,\t"which"\ncolour?'}
        for number in range(count)
    ]


def write_csv(path: Path, rows: Rows, **options: Any) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def with_bytes(rows: Rows) -> Rows:
    return [row | {"image": PICTURES[int(row["index"]) % COLOURS]} for row in rows]


def write_jsonl(folder: Path, rows: Rows) -> str:
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "tasks.jsonl")


def csv_of_paths(folder: Path, rows: Rows) -> str:
    return str(write_csv(folder / "tasks.csv", rows))


def zipped_tsv_of_base64(folder: Path, rows: Rows) -> str:
    cells = [row | {"image": base64.b64encode(row["image"]).decode()} for row in with_bytes(rows)]
    plain = write_csv(folder / "plain.tsv", cells, delimiter="\t")
    (folder / "tasks.tsv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return str(folder / "tasks.tsv.gz")


def vlmevalkit_with_references(folder: Path, rows: Rows) -> str:
    texts = [base64.b64encode(picture).decode() for picture in PICTURES]
    cells = [
        row | {"image": texts[number] if number < COLOURS else str(number % COLOURS)} for number, row in enumerate(rows)
    ]
    return str(write_csv(folder / "tasks.tsv", cells[::-1], delimiter="\t"))


def parquet_of_bytes(folder: Path, rows: Rows) -> str:
    pq.write_table(pa.Table.from_pylist(with_bytes(rows)), folder / "tasks.parquet", row_group_size=900)
    return str(folder / "tasks.parquet")


def parquet_of_paths(folder: Path, rows: Rows) -> str:
    pq.write_table(pa.Table.from_pylist(rows), folder / "tasks.pq")
    return str(folder / "tasks.pq")


def dataset_of_images(folder: Path, rows: Rows) -> str:
    features = datasets.Features(
        {"index": datasets.Value("string"), "image": datasets.Image(), "question": datasets.Value("string")}
    )
    made = datasets.Dataset.from_list(with_bytes(rows), features=features)
    made.save_to_disk(folder / "saved", num_shards=3)
    return str(folder / "saved")


def split_of_paths(folder: Path, rows: Rows) -> str:
    made = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows[:1]), "test": datasets.Dataset.from_list(rows)}
    )
    made.save_to_disk(folder / "splits")
    return f"{folder / 'splits'}:test"


FORMATS = {
    "csv": csv_of_paths,
    "tsv": zipped_tsv_of_base64,
    "vlmevalkit": vlmevalkit_with_references,
    "parquet-bytes": parquet_of_bytes,
    "parquet-paths": parquet_of_paths,
    "hf-images": dataset_of_images,
    "hf-split": split_of_paths,
}
READ_AS = {"tsv": "tsv", "vlmevalkit": "vlmevalkit"}


def request_lines(run: Path) -> list[bytes]:
    opened = Run.open(run)
    return [line for seal in opened.seals() for line in opened.requests_path(seal.shard).read_bytes().splitlines()]


def row_lines(run: Path) -> list[Any]:
    opened = Run.open(run)
    return [
        json.loads(line)
        for seal in opened.seals()
        for line in opened.rows_path(seal.shard).read_bytes().split(b"\n")[:-1]
    ]


def reasons(run: Path) -> list[str]:
    return [rejection.message for seal in Run.open(run).seals() for rejection in seal.rejected]


def asked(run: Path) -> list[str]:
    """The texts of the requests."""
    contents = [json.loads(line)["body"]["messages"][-1]["content"] for line in request_lines(run)]
    return [content if isinstance(content, str) else content[-1]["text"] for content in contents]


def pictures(line: bytes) -> list[bytes]:
    content = json.loads(line)["body"]["messages"][-1]["content"]
    parts = [] if isinstance(content, str) else content
    return [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in parts if "image_url" in part]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """A folder with pictures, and the requests of the rows as JSONL."""
    folder = tmp_path_factory.mktemp("baseline")
    (folder / "p").mkdir()
    for colour, picture in enumerate(PICTURES):
        (folder / f"p/{colour}.png").write_bytes(picture)
    tasks = write_jsonl(folder, made_rows(ROWS))
    preparation.prepare(tasks, folder / "run", model="m", id_fields=("index",), max_requests=3000)
    lines = request_lines(folder / "run")
    assert len(lines) == ROWS
    return folder, lines


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_rows_give_the_same_requests_byte_for_byte(
    name: str, baseline: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    folder, expected = baseline
    rows = made_rows(ROWS)
    tasks = FORMATS[name](tmp_path, rows)
    backwards = name == "vlmevalkit"  # there references come before what they refer to
    report = preparation.prepare(
        tasks,
        tmp_path / "run",
        model="m",
        id_fields=("index",),
        max_requests=3000,
        image_root=str(folder),
        input_format="tsv" if name == "tsv" else "auto",
    )
    assert (report.rows, report.requests, report.rejected) == (ROWS, ROWS, 0)
    lines = request_lines(tmp_path / "run")
    if backwards:
        positions = [re.sub(rb'"custom_id":"\d+-', b'"custom_id":"N-', line) for line in lines[::-1]]
        assert positions == [re.sub(rb'"custom_id":"\d+-', b'"custom_id":"N-', line) for line in expected]
    else:
        assert lines == expected
    shown = row_lines(tmp_path / "run")
    assert [row["question"] for row in shown] == [row["question"] for row in (rows[::-1] if backwards else rows)]
    assert all("image" not in row or len(row["image"]) < 20 for row in shown)


@pytest.mark.parametrize("name", FORMATS)
def test_a_stopped_prepare_goes_on_and_a_changed_input_is_refused(name: str, tmp_path: Path) -> None:
    rows = made_rows(60)
    (tmp_path / "p").mkdir()
    for colour, picture in enumerate(PICTURES):
        (tmp_path / f"p/{colour}.png").write_bytes(picture)
    tasks = FORMATS[name](tmp_path, rows)
    options: Any = {"model": "m", "max_requests": 7, "id_fields": ("index",), "input_format": READ_AS.get(name, "auto")}
    preparation.prepare(tasks, tmp_path / "run", **options)
    before = request_lines(tmp_path / "run")
    (tmp_path / "run" / "prepared.json").unlink()
    for shard in range(4, 9):
        (tmp_path / "run" / "requests" / f"{shard:05d}.json").unlink()
    assert preparation.prepare(tasks, tmp_path / "run", **options).requests == 60
    assert request_lines(tmp_path / "run") == before
    planned = preparation.plan(tasks, **options | {"start": 13, "end": 55, "limit": 20})
    assert (planned.rows, planned.requests) == (20, 20)
    again = FORMATS[name](tmp_path, [row | {"question": row["question"].replace("«3", "«4")} for row in rows])
    with pytest.raises(RunError, match=r"changed since|when the run was prepared"):
        preparation.prepare(again, tmp_path / "run", **options)


def test_changed_image_bytes_of_the_same_size_are_noticed(tmp_path: Path) -> None:
    def write(colour: int) -> str:
        rows = [{"id": number, "image": encoded(colour), "question": "?"} for number in range(5)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", compression="none")
        return str(tmp_path / "t.parquet")

    tasks = write(1)
    size = os.path.getsize(tasks)  # noqa: PTH202
    preparation.prepare(tasks, tmp_path / "run", model="m")
    os.utime(tasks, (1, 1))
    assert preparation.prepare(tasks, tmp_path / "run", model="m").already
    assert os.path.getsize(write(2)) == size  # noqa: PTH202
    with pytest.raises(RunError, match="its rows have changed since"):
        preparation.prepare(tasks, tmp_path / "run", model="m")


# -- CSV and TSV -----------------------------------------------------------------------------------------------------


def prepare_bytes(tmp_path: Path, content: bytes, name: str = "tasks.csv", **options: Any) -> Path:
    (tmp_path / name).write_bytes(content)
    preparation.prepare(tmp_path / name, tmp_path / "run", model="m", **options)
    return tmp_path / "run"


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("beginning", [b"", b"\xef\xbb\xbf"])
def test_a_spoilt_csv_row_is_rejected_with_its_line_and_shifts_no_other(
    beginning: bytes, ending: bytes, tmp_path: Path
) -> None:
    rows = [
        b"id,question",
        b'1,"two' + ending + b'lines, ""quoted"""',  # lines 2 and 3
        b"2,not \xff utf-8",
        b"",
        b"3",
        b"4,too,many",
        b"5,nul \x00 in it",
        b"6,lone \r return",
        "7,a\u2028b\x85c".encode(),
        b'8,"two lines \xff' + ending + b'and not utf-8"',  # lines 10 and 11
        b"9,",
        b'10,"last, cut',
    ]
    run = prepare_bytes(tmp_path, beginning + ending.join(rows))
    newline = ending.decode()
    assert asked(run) == [f'two{newline}lines, "quoted"', "a\u2028b\x85c"]
    assert reasons(run) == [
        "tasks.csv:4: the row is not valid UTF-8",
        "tasks.csv:6: the row has 1 cells, the header 2",
        "tasks.csv:7: the row has 3 cells, the header 2",
        "tasks.csv:8: the row has a NUL character",
        "tasks.csv:9: a carriage return stands alone, outside of quotes",
        "tasks.csv:11: the row is not valid UTF-8",
        "tasks.csv:13: question field 'question' is empty, not text",
        "tasks.csv:14: a quote is not closed: the row is cut off",
    ]
    assert [row["id"] for row in row_lines(run)] == ["1", "2", "3", "4", "5", "6,lone \r return", "7", "8", "9", "10"]
    assert row_lines(run)[1]["question"] == "not \ufffd utf-8"
    assert row_lines(run)[3] == {"id": "4", "question": "too", "extra cells": "many"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"id,question\n", "has no rows"),
        ("a.csv", b"id,question\r\n\r\n", "has no rows"),
        ("a.csv", b"id,question,id\n1,2,3\n", "two columns are named 'id'"),
        ("a.csv", b"id\tquestion\n1\t2\n", "its columns are separated by tabs"),
        ("a.csv", "id,question\n1,2\n".encode("utf-16"), "its first line is not UTF-8 text"),
        ("a.csv", b"id,question\r1,why\r2,why\r", "the header cannot be read"),
        (
            "a.csv",
            b'id,question\n1,"why' + b"\n2,why" * 10_000,
            "a.csv:2: a quote is opened in this row and not closed",
        ),
        ("a.csv", b'id,"question" or not\n1,why\n', "the header cannot be read: text follows a closing quote"),
        ("a.csv", b",,\n1,2,3\n", "its first line names no column"),
        ("a.jsonl", b"id,question\n1,why\n", "is not JSONL: line 1 begins with 'id,question'"),
        ("a.parquet", b"id,question\n1,why\n", "cannot be read as Parquet"),
        ("a.parquet.gz", gzip.compress(b"PAR1"), "a Parquet file is not compressed as a whole"),
        ("a.csv.gz", gzip.compress(b"id,question\n" + os.urandom(999).replace(b"\n", b""))[:-90], "cannot be read"),
    ],
)
def test_a_file_that_is_no_table_is_named_at_once(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        prepare_bytes(tmp_path, content, name)


def test_what_a_file_is_decides_where_its_name_is_wrong_and_the_user_decides_over_both(tmp_path: Path) -> None:
    line = b'{"id": 1, "question": "a, b"}\n'
    (tmp_path / "a.csv").write_bytes(line)
    assert inputs.open_source(tmp_path / "a.csv").format == "jsonl"
    (tmp_path / "b.csv").write_bytes(b'"{""id"": 1",question\n1,2\n')
    assert inputs.open_source(tmp_path / "b.csv").format == "csv"
    pq.write_table(pa.table({"question": ["?"]}), tmp_path / "c.jsonl")
    assert inputs.open_source(tmp_path / "c.jsonl").format == "parquet"
    (tmp_path / "d.txt").write_bytes(b"id,question\n1,why\n")
    preparation.prepare(tmp_path / "d.txt", tmp_path / "run", model="m", input_format="csv")
    assert asked(tmp_path / "run") == ["why"]
    (tmp_path / "e.tsv").write_bytes(b"index\timage\tquestion\tA\n1\t\twhy\tx\n")
    assert inputs.open_source(tmp_path / "e.tsv").format == "vlmevalkit"
    preparation.prepare(tmp_path / "e.tsv", tmp_path / "plain", model="m", input_format="tsv")
    assert asked(tmp_path / "plain") == ["why"]


def test_inferred_formats_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"question\nwhy\n")
    assert preparation.plan(tmp_path / "a.csv", model="m").notes == [
        "a.csv is read as CSV; --input-format says otherwise"
    ]
    assert preparation.plan(tmp_path / "a.csv", model="m", input_format="csv").notes == []


NOT_CLOSED = "a quote is opened in this row and not closed properly"
BEHIND = "text follows a closing quote: a quote that is part of a text is doubled"


@pytest.mark.parametrize(
    ("name", "content", "questions", "faults"),
    [
        ("a.csv", b'1,"abc\n2,ok\n3,"x"\n4,y\n', ["ok", "x", "y"], [f"2: {NOT_CLOSED}"]),
        ("a.csv", b'1,"abc\r\n2,ok\r\n3,why', ["ok", "why"], [f"2: {NOT_CLOSED}"]),
        ("a.csv", b'1,"the 12" monitor"\n2,ok\n', ["ok"], [f"2: {BEHIND}"]),
        ("a.csv", b'1,"a" \n2,12" is wide\n', ['12" is wide'], [f"2: {BEHIND}"]),
        ("a.csv", b'1,"a\n2,"b\n3,"c\n4,d\n', ["d"], [f"{line}: {NOT_CLOSED}" for line in (2, 3, 4)]),
        ("a.csv", b'1,"a\n2,ok\n3,"b",c\n', ["ok"], [f"2: {NOT_CLOSED}", "4: the row has 3 cells, the header 2"]),
        ("a.csv", b'1,"a\nb",c\n4,d\n', ["d"], ["2: the row has 3 cells, the header 2 (it spans 2 lines)"]),
        (
            "a.tsv",
            b'1\t"Stop, she said\n2\twhy\n3\t"No" he said\n4\tok\n',
            ["why", "ok"],
            [f"2: {NOT_CLOSED}", f"4: {BEHIND}"],
        ),
    ],
)  # fmt: skip
def test_a_quote_out_of_place_swallows_no_row(
    name: str, content: bytes, questions: list[str], faults: list[str], tmp_path: Path
) -> None:
    header = b"id\tquestion\n" if name == "a.tsv" else b"id,question\n"
    run = prepare_bytes(tmp_path, header + content, name)
    assert (asked(run), reasons(run)) == (questions, [f"{name}:{fault}" for fault in faults])
    source = inputs.open_source(tmp_path / name)
    rows = list(source.rows())
    for number, row in enumerate(rows[:-1], 1):
        behind = Place(number, rows[number].line, row.end)
        assert [again[:4] for again in source.rows(behind)] == [again[:4] for again in rows[number:]]


def test_semicolons_separate_where_the_header_has_no_comma(tmp_path: Path) -> None:
    run = prepare_bytes(tmp_path, b'id;question\n1;"a;b, c"\n')
    assert asked(run) == ["a;b, c"]


def test_a_cell_may_be_an_image_or_a_list_of_them(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(PICTURES[1])
    text = [base64.b64encode(picture).decode() for picture in PICTURES[:3]]
    cells = [
        "1.png",
        text[0],
        f"data:image/png;base64,{text[0]}",
        json.dumps(["1.png", text[2]]),
        str(["1.png", text[2]]),
        '["1.png", "1.png"]',
        "",
        text[0][:-9] + "!",
        "none.png",
    ]
    rows = [{"id": number, "image": cell, "question": "?"} for number, cell in enumerate(cells)]
    preparation.prepare(write_csv(tmp_path / "t.csv", rows), tmp_path / "run", model="m")
    one, zero, two = PICTURES[1], PICTURES[0], PICTURES[2]
    got = [pictures(line) for line in request_lines(tmp_path / "run")]
    assert got == [[one], [zero], [zero], [one, two], [one, two], [one, one], []]
    assert [row.get("image") for row in row_lines(tmp_path / "run")] == [
        "1.png", None, None, ["1.png", None], ["1.png", None], '["1.png", "1.png"]', "", None, "none.png",
    ]  # fmt: skip
    assert [reason.split(": ", 1)[0] for reason in reasons(tmp_path / "run")] == ["t.csv:9", "t.csv:10"]


def test_jsonl_takes_the_images_that_cells_take_and_base64_is_in_no_message(tmp_path: Path) -> None:
    text = [base64.b64encode(picture).decode() for picture in PICTURES[:3]]
    images: list[Any] = [text[0], [text[1], f"data:image/png;base64,{text[2]}"], json.dumps(text), "A" + text[0], [""]]
    rows = [{"id": number, "image": image, "question": "?"} for number, image in enumerate(images)]
    preparation.prepare(write_jsonl(tmp_path, rows), tmp_path / "run", model="m")
    assert [pictures(line) for line in request_lines(tmp_path / "run")] == [PICTURES[:1], PICTURES[1:3], PICTURES[:3]]
    assert row_lines(tmp_path / "run") == rows
    size = f"{len(text[0]) + 1:,} characters"
    assert reasons(tmp_path / "run") == [
        f"tasks.jsonl:4: image not found: (base64, {size}, of no image format that is known by its beginning)",
        "tasks.jsonl:5: image field 'image' holds empty, not a path or a list of paths",
    ]


NAMED = "<image_start>[photo]<image_end>?"


@pytest.mark.parametrize("kind", ["csv", "tsv", "vlmevalkit", "bytes", "struct", "list", "text", "texts", "dictionary"])
def test_a_placeholder_names_an_image_that_no_option_names(kind: str, tmp_path: Path) -> None:
    picture, text = PICTURES[3], base64.b64encode(PICTURES[3]).decode()
    row: dict[str, Any] = {"index": "1", "question": NAMED, "A": "x", "image_path": ""}
    if kind in ("csv", "tsv", "vlmevalkit"):
        tasks = tmp_path / ("t.csv" if kind == "csv" else "t.tsv")
        del row["image_path" if kind == "tsv" else "A"]
        write_csv(tasks, [row | {"photo": text}], delimiter="," if kind == "csv" else "\t")
    else:
        value: Any = {"bytes": picture, "struct": {"bytes": picture, "path": None}, "list": [picture], "text": text}
        column = pa.array([value.get(kind, [text])])
        if kind == "dictionary":
            column = pa.array([picture]).dictionary_encode()
        tasks = tmp_path / "t.parquet"
        pq.write_table(pa.table({"index": ["1"], "question": [NAMED], "photo": column}), tasks)
    report = preparation.prepare(tasks, tmp_path / "run", model="m")
    assert reasons(tmp_path / "run") == []
    assert [pictures(line) for line in request_lines(tmp_path / "run")] == [[picture]]
    assert row_lines(tmp_path / "run")[0].get("photo") == ({"path": None} if kind == "struct" else None)
    assert "columns of bytes are left out: 'photo'" in report.notes[-1]
    template = '{{ image("photo") }}{{ index }}'
    preparation.prepare(tasks, tmp_path / "template", model="m", prompt_template=template)
    assert [pictures(line) for line in request_lines(tmp_path / "template")] == [[picture]]
    preparation.prepare(tasks, tmp_path / "unnamed", model="m", prompt_template="{{ index }}")
    assert b"base64" not in b"".join(request_lines(tmp_path / "unnamed"))


def test_lists_in_cells_are_lists_where_images_or_documents_are_meant(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(PICTURES[number])
    rows = [{"question": NAMED, "photo": '["1.png", "2.png"]'}]
    preparation.prepare(write_csv(tmp_path / "t.csv", rows), tmp_path / "run", model="m")
    assert [pictures(line) for line in request_lines(tmp_path / "run")] == [PICTURES[1:3]]
    assert row_lines(tmp_path / "run") == rows
    cells = ['["a", "b"]', "['a', 'b']", "a, b", '["a", ""]']
    write_csv(tmp_path / "d.csv", [{"question": "?", "documents": cell} for cell in cells])
    preparation.prepare(tmp_path / "d.csv", tmp_path / "scores", model="m", url="/v1/rerank")
    bodies = [json.loads(line)["body"] for line in request_lines(tmp_path / "scores")]
    assert [body["documents"] for body in bodies] == [["a", "b"], ["a", "b"], ["a, b"]]
    assert reasons(tmp_path / "scores") == ["d.csv:5: documents field 'documents'[1] is empty, not text"]


def test_rows_without_an_id_are_told_apart_by_their_images(tmp_path: Path) -> None:
    ids = []
    for colour in (1, 2):
        pq.write_table(pa.Table.from_pylist([{"image": encoded(colour), "question": "?"}]), tmp_path / "t.parquet")
        preparation.prepare(tmp_path / "t.parquet", tmp_path / f"{colour}", model="m")
        ids.append(json.loads(request_lines(tmp_path / f"{colour}")[0])["custom_id"])
    assert ids[0] != ids[1]


# -- Parquet and Hugging Face ----------------------------------------------------------------------------------------


def test_values_of_every_type_have_one_form_in_json(tmp_path: Path) -> None:
    rows: Rows = [
        {
            "question": "?",
            "float": float("nan"),
            "inf": float("inf"),
            "big": 2**63 - 1,
            "date": dt.date(2024, 2, 29),
            "time": dt.datetime(2024, 2, 29, 1, 2, 3, 4, tzinfo=dt.UTC),
            "money": decimal.Decimal("1.50"),
            "nested": {"list": [1, None], "when": dt.date(2020, 1, 1)},
            "yes": True,
            "nothing": None,
            "audio": b"\x00\x01",
            "deep": [{"bytes": b"\x01", "label": "x", "none": None}],
        }
    ]
    table = pa.Table.from_pylist(rows)
    stamps = pa.array([1_700_000_000_123_456_789], pa.timestamp("ns"))
    table = table.append_column("ns", stamps).append_column("word", pa.array(["a"]).dictionary_encode())
    table = table.append_column("half", pa.array([1.5], pa.float32()).cast(pa.float16()))
    pq.write_table(table.drop_columns(["half"]), tmp_path / "t.parquet")
    report = preparation.prepare(tmp_path / "t.parquet", tmp_path / "run", model="m")
    assert row_lines(tmp_path / "run") == [
        {
            "question": "?",
            "float": None,
            "inf": None,
            "big": 2**63 - 1,
            "date": "2024-02-29",
            "time": "2024-02-29T01:02:03.000004Z",
            "money": "1.50",
            "nested": {"list": [1, None], "when": "2020-01-01"},
            "yes": True,
            "nothing": None,
            "deep": [{"label": "x", "none": None}],
            "ns": "2023-11-14T22:13:20.123456",
            "word": "a",
        }
    ]
    assert report.notes[1].startswith("columns of bytes are left out: 'audio', 'deep'")


def test_a_value_that_cannot_be_read_rejects_its_row_alone(tmp_path: Path) -> None:
    texts = pa.array([b"one", b"not \xff utf-8", b"three", b"four"]).view(pa.string())
    days = pa.array([0, 0, 2**62, 0], pa.int64()).view(pa.timestamp("ms"))
    pq.write_table(pa.table({"question": texts, "when": days}), tmp_path / "t.parquet")
    preparation.prepare(tmp_path / "t.parquet", tmp_path / "run", model="m")
    assert asked(tmp_path / "run") == ["one", "four"]
    assert [reason.split(":")[:3] for reason in reasons(tmp_path / "run")] == [
        ["t.parquet", "2", " column 'question' holds what cannot be read"],
        ["t.parquet", "3", " column 'when' holds what cannot be read"],
    ]
    assert len(row_lines(tmp_path / "run")) == 4


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_image_columns_are_bytes_structs_or_lists_of_these(kind: str, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(PICTURES[1])
    inline, named = {"bytes": PICTURES[0], "path": "zero.png"}, {"bytes": None, "path": "1.png"}
    rows: Rows = [
        {"question": "a", "image": [inline, named]},
        {"question": "b", "image": []},
        {"question": "c", "image": None},
        {"question": "d", "image": [inline, {"bytes": None, "path": None}]},
        {"question": "e", "image": [{"bytes": b"no image", "path": None}]},
    ]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "tasks.parquet")
        tasks = tmp_path / "tasks.parquet"
    else:
        tasks = tmp_path / "saved"
        datasets.Dataset(pa.Table.from_pylist(rows)).save_to_disk(tasks)
    preparation.prepare(tasks, tmp_path / "run", model="m")
    assert asked(tmp_path / "run") == ["a", "b", "c"]
    assert pictures(request_lines(tmp_path / "run")[0]) == [PICTURES[0], PICTURES[1]]
    assert row_lines(tmp_path / "run")[0] == {"question": "a", "image": ["zero.png", "1.png"]}
    assert reasons(tmp_path / "run") == [
        f"{tasks.name}:4: image field 'image' holds null or missing, not a path or a list of paths",
        f"{tasks.name}:5: not an image that can be read: (field 'image') (it begins with 6e 6f 20 69 6d 61 67 65)",
    ]


def test_decoded_images_of_a_dataset_are_sent_as_they_are_stored(tmp_path: Path) -> None:
    picture = Image.new("RGB", (5, 4), "blue")
    made = datasets.Dataset.from_dict(
        {"question": ["a", "b"], "photo": [picture, picture], "more": [[picture], [picture, picture]]},
        features=datasets.Features(
            {"question": datasets.Value("string"), "photo": datasets.Image(), "more": [datasets.Image()]}
        ),
    )
    made.save_to_disk(tmp_path / "saved")
    preparation.prepare(tmp_path / "saved", tmp_path / "run", model="m", image_field=("photo", "more"))
    sent = [pictures(line) for line in request_lines(tmp_path / "run")]
    assert [len(images) for images in sent] == [2, 3]
    assert Image.open(io.BytesIO(sent[1][2])).size == (5, 4)
    assert row_lines(tmp_path / "run") == [{"question": "a"}, {"question": "b"}]


def test_a_dataset_whose_order_was_changed_is_read_in_its_order(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"question": [str(number) for number in range(1000)]})
    made.shuffle(seed=1).select(range(300)).save_to_disk(tmp_path / "saved")
    expected = made.shuffle(seed=1).select(range(300))["question"]
    preparation.prepare(tmp_path / "saved", tmp_path / "run", model="m")
    assert asked(tmp_path / "run") == list(expected)
    opened = hf.Opened("x", datasets.load_from_disk(str(tmp_path / "saved")).select(range(299, -1, -1)))
    assert [json.loads(row.raw)["question"] for row in hf.read_rows(opened, ("image",))] == list(expected)[::-1]


def test_a_folder_says_which_splits_it_has(tmp_path: Path) -> None:
    tasks = split_of_paths(tmp_path, made_rows(3)).removesuffix(":test")
    with pytest.raises(InputError, match="names no split; there are train, test"):
        preparation.plan(tasks, model="m")
    with pytest.raises(InputError, match="has no split 'dev'; there are train, test"):
        preparation.plan(tasks + ":dev", model="m")
    shutil.rmtree(tmp_path / "splits" / "test")
    with pytest.raises(InputError, match="cannot be read as a dataset"):
        preparation.plan(tasks + ":test", model="m")


def test_a_broken_file_of_a_dataset_is_an_error(tmp_path: Path) -> None:
    tasks = dataset_of_images(tmp_path, made_rows(300))
    (file,) = Path(tasks).glob("data-00001*.arrow")
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(InputError, match="cannot be read as a dataset"):
        preparation.plan(tasks, model="m")


def cached_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library leaves in its cache of a dataset `owner/name` from the hub; from then on there is no network."""
    pq.write_table(pa.Table.from_pylist(made_rows(30)), tmp_path / "source.parquet")
    made = datasets.load_dataset("parquet", data_files=str(tmp_path / "source.parquet"), cache_dir=str(tmp_path / "c"))
    (file,) = made["train"].cache_files
    folder = tmp_path / "cache" / "owner___name" / "default" / "0.0.0" / "0123abc"
    shutil.copytree(Path(file["filename"]).parent, folder)
    (folder / "parquet-train.arrow").rename(folder / "name-train.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "name", "config_name": "default"}))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_dataset_of_the_hub_is_read_from_the_cache_where_there_is_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_dataset(tmp_path, monkeypatch)
    (tmp_path / "p").mkdir()
    for colour in range(30):
        (tmp_path / f"p/{colour}.png").write_bytes(PICTURES[colour])
    monkeypatch.chdir(tmp_path)
    options: Any = {"model": "m", "id_fields": ("index",)}
    report = preparation.prepare("hf://owner/name:train", tmp_path / "run", **options)
    assert (report.requests, report.rejected) == (30, 0)
    preparation.prepare(write_jsonl(tmp_path, made_rows(30)), tmp_path / "jsonl", **options)
    assert request_lines(tmp_path / "run") == request_lines(tmp_path / "jsonl")
    assert Run.open(tmp_path / "run").manifest.input.fingerprint
    assert preparation.prepare("hf://owner/name:train", tmp_path / "run", **options).already
    assert preparation.plan("hf://owner/name", **options).requests == 30
    assert preparation.plan("hf://owner/name:train[10:15]", **options).requests == 5
    with pytest.raises(InputError, match=r'hf://owner/name:dev: Unknown split "dev"'):
        preparation.plan("hf://owner/name:dev", **options)


def test_an_unknown_dataset_without_a_network_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_dataset(tmp_path, monkeypatch)
    with pytest.raises(InputError, match="the hub cannot be reached"):
        preparation.plan("hf://owner/other:train", model="m")


class GatedRepoError(Exception):
    """As the hub's client names it."""


def test_a_dataset_that_the_hub_does_not_show_us_asks_for_a_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokens = []

    def refuse(*arguments: Any, token: str | None, **options: Any) -> None:
        tokens.append(token)
        raise datasets.exceptions.DatasetNotFoundError(f"cannot be accessed with {token}") from GatedRepoError()

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("HUGGING_FACE_HUB_TOKEN=hf_secret\n")
    with pytest.raises(CredentialsError, match=r"the hub does not let us read it: cannot be accessed with \[token\]$"):
        preparation.plan("hf://owner/name:train", model="m")
    assert set(tokens) == {"hf_secret"}


def test_what_the_hub_said_of_the_usual_reading_of_a_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *arguments: Any, **options: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"{path} does not exist")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match="no such dataset: owner/name does not exist") as caught:
        preparation.plan("hf://owner/name:train", model="m")
    assert caught.value.hint == "check the name; a private dataset needs HF_TOKEN"


@pytest.mark.parametrize("uri", ["hf://", "hf://a//b:train", "hf://a/b/c/d:train"])
def test_a_name_that_is_none_is_an_error(uri: str) -> None:
    with pytest.raises(UsageError, match="names no dataset"):
        preparation.plan(uri, model="m")


@pytest.mark.parametrize(("module", "extra"), [("pyarrow", "parquet"), ("datasets", "datasets")])
def test_a_missing_library_is_named_with_its_extra(
    module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = (
        parquet_of_paths(tmp_path, made_rows(3)) if extra == "parquet" else dataset_of_images(tmp_path, made_rows(3))
    )
    monkeypatch.setitem(__import__("sys").modules, module, None)
    monkeypatch.setitem(__import__("sys").modules, f"{module}.parquet", None)
    with pytest.raises(UsageError) as caught:
        preparation.plan(tasks, model="m")
    assert caught.value.hint == f"pip install 'batchkit-vlm[{extra}]'"


# -- VLMEvalKit ------------------------------------------------------------------------------------------------------


def write_vlmevalkit(tmp_path: Path, rows: Rows) -> Path:
    return write_csv(tmp_path / "bench.tsv", rows, delimiter="\t")


def test_options_and_hint_become_part_of_the_question_as_vlmevalkit_does(tmp_path: Path) -> None:
    image = base64.b64encode(PICTURES[0]).decode()
    rows = [
        {
            "index": "7",
            "image": image,
            "question": "Which?",
            "hint": "Look.",
            "A": "cat",
            "B": "dog",
            "C": "",
            "answer": "A",
        },
        {"index": "8", "image": "7", "question": "Why?", "hint": "nan", "A": "", "B": "", "C": "", "answer": ""},
        {"index": "9", "image": "7", "question": "How?", "hint": "", "A": "1", "B": "", "C": "3", "answer": "C"},
    ]
    preparation.prepare(write_vlmevalkit(tmp_path, rows), tmp_path / "run", model="m")
    please = "Please select the correct answer from the options above. \n"
    assert asked(tmp_path / "run") == [
        f"Hint: Look.\nQuestion: Which?\nOptions:\nA. cat\nB. dog\n{please}",
        "Question: Why?\n",
        f"Question: How?\nOptions:\nA. 1\nC. 3\n{please}",
    ]
    assert [pictures(line) for line in request_lines(tmp_path / "run")] == [[PICTURES[0]]] * 3
    assert row_lines(tmp_path / "run") == [{k: v for k, v in rows[0].items() if k != "image"}, rows[1], rows[2]]
    preparation.prepare(tmp_path / "bench.tsv", tmp_path / "own", model="m", prompt_template="{{ question }} {{ A }}")
    assert asked(tmp_path / "own") == ["Which? cat", "Why? ", "How? 1"]


def test_a_file_without_options_asks_the_question_alone() -> None:
    assert vlmevalkit.question_of({"question": "Why?", "hint": "Look."}, "Why?") == "Why?"


def test_images_of_vlmevalkit_are_base64_lists_references_or_paths(tmp_path: Path) -> None:
    one, two = (base64.b64encode(picture).decode() for picture in PICTURES[:2])
    (tmp_path / "5.png").write_bytes(PICTURES[5])
    cells = [
        ("1", one, ""),
        ("2", str([one, two]), "['a.jpg', 'b.jpg']"),
        ("3", "2", ""),
        ("4", "", "5.png"),
        ("5", "nan", "['5.png', '5.png']"),
        ("6", "5.png", ""),
        ("7", "", ""),
        ("8", "77", ""),
        ("9", "3", ""),  # a reference to a reference: VLMEvalKit has none either
        ("10", one[:-5] + "!!", ""),
    ]
    rows = [{"index": i, "image": image, "image_path": path, "question": "?"} for i, image, path in cells]
    preparation.prepare(write_vlmevalkit(tmp_path, rows), tmp_path / "run", model="m")
    first, second, five = PICTURES[0], PICTURES[1], PICTURES[5]
    got = [pictures(line) for line in request_lines(tmp_path / "run")]
    assert got == [[first], [first, second], [first, second], [five], [five, five], [five], []]
    assert reasons(tmp_path / "run") == [
        "bench.tsv:9: no row with an image of its own has the index '77'",
        "bench.tsv:10: no row with an image of its own has the index '3'",
        "bench.tsv:11: data URL is not valid base64: data:;base64,…",
    ]
    zipped = tmp_path / "bench.tsv.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "bench.tsv").read_bytes()))
    with pytest.raises(InputError, match="a compressed file cannot be searched for"):
        preparation.plan(zipped, model="m")


def test_a_table_without_the_columns_of_vlmevalkit_is_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"id\tquestion\n1\t2\n")
    with pytest.raises(InputError, match="has not the columns of VLMEvalKit"):
        preparation.plan(tmp_path / "a.tsv", model="m", input_format="vlmevalkit")


# -- in all formats --------------------------------------------------------------------------------------------------


def test_a_named_image_field_that_a_row_lacks_is_a_bad_image(write_tasks: WriteTasks, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(PICTURES[1])
    rows: Sequence[Any] = [{"a": "1.png", "b": "1.png", "question": "x"}, {"a": "1.png", "question": "y"}]
    tasks = write_tasks(rows)
    preparation.prepare(tasks, tmp_path / "run", model="m", image_field=("a", "b"))
    assert reasons(tmp_path / "run") == ["tasks.jsonl:2: no image in 'b'"]
    preparation.prepare(tasks, tmp_path / "text", model="m", image_field=("a", "b"), on_bad_image="text-only")
    assert [len(pictures(line)) for line in request_lines(tmp_path / "text")] == [2, 0]


def test_texts_and_names_that_are_not_utf8_are_clear_errors(tmp_path: Path) -> None:
    tasks = write_jsonl(tmp_path, [{"question": "?"}])
    for option, value in {
        "system_prompt": "a\udcff",
        "extra_body": {"a": ["\udcff"]},
        "id_fields": ("\udcff",),
    }.items():
        flag = "--" + option.replace("_", "-")
        with pytest.raises(UsageError, match=f"{flag} is not valid UTF-8 text"):
            preparation.plan(tasks, model="m", **{option: value})  # type: ignore[arg-type]
    (tmp_path / "schema.json").write_text(r'{"title": "\ud800", "type": "integer"}')
    with pytest.raises(UsageError, match="--response-schema: a text in it has half of a surrogate pair"):
        preparation.plan(tasks, model="m", response_schema=tmp_path / "schema.json")
    with pytest.raises(InputError, match="the file's name is not UTF-8"):
        preparation.plan(tmp_path / "n\udcff.jsonl", model="m")


def test_rows_of_vlmevalkit_are_known_by_their_index(tmp_path: Path) -> None:
    tasks = write_vlmevalkit(tmp_path, [{"index": "7", "image": "", "question": "?"}])
    preparation.prepare(tasks, tmp_path / "run", model="m")
    merge(tmp_path / "run", output=tmp_path / "flat.jsonl", flat=True)
    assert json.loads((tmp_path / "flat.jsonl").read_text())["id"] == "7"
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}]}
    line = {"custom_id": "7", "response": {"status_code": 200, "body": body}, "error": None}
    (tmp_path / "out.jsonl").write_text(json.dumps(line) + "\n")
    merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "results.jsonl")
    assert json.loads((tmp_path / "results.jsonl").read_text())["raw_response"] == "yes"


def test_nanoseconds_are_read_in_nested_types_and_what_is_not_json_takes_no_other_field(tmp_path: Path) -> None:
    kind, when = pa.timestamp("ns"), 1_700_000_000_123_456_789
    columns = {
        "question": pa.array(["?"]),
        "map": pa.array([[("a", when)]], pa.map_(pa.string(), kind)),
        "fixed": pa.array([[when]], pa.list_(kind, 1)),
        "deep": pa.array([{"a": [[when]]}], pa.struct([("a", pa.list_(pa.list_(kind, 1)))])),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    preparation.prepare(tmp_path / "t.parquet", tmp_path / "run", model="m")
    text = "2023-11-14T22:13:20.123456"
    assert row_lines(tmp_path / "run") == [
        {"question": "?", "map": [["a", text]], "fixed": [text], "deep": {"a": [[text]]}}
    ]
    views = pa.record_batch({"view": pa.array([[when]], pa.list_view(kind)), "question": pa.array(["?"])})
    (made,) = Columns("t", views.schema, ("image",)).rows(views)
    assert json.loads(made.raw) == {"view": None, "question": "?"}
    assert made.fault is not None
    assert made.fault[1].startswith("column 'view' holds what ")


def test_a_file_that_is_named_a_table_and_is_none_is_one_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["?"]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="is a Parquet file, not CSV"):
        preparation.plan(tmp_path / "t.parquet", model="m", input_format="csv")
    tasks = write_jsonl(tmp_path, [{"question": "?"}])
    with pytest.raises(InputError, match="has a JSON object in its first line, not a header"):
        preparation.plan(tasks, model="m", input_format="tsv")


def test_a_blank_question_is_called_so(tmp_path: Path) -> None:
    run = prepare_bytes(tmp_path, b"id,question\n1,  \n")
    assert reasons(run) == ["tasks.csv:2: question field 'question' is blank, not text"]


def test_an_unknown_split_is_told_with_one_that_is_there(tmp_path: Path) -> None:
    uri = split_of_paths(tmp_path, made_rows(1))
    with pytest.raises(InputError, match="has no split 'foo'") as caught:
        preparation.plan(uri.replace(":test", ":foo"), model="m")
    assert caught.value.hint == uri.replace(":test", ":train")


def test_a_pile_is_merged_with_the_rows_of_a_table(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [{"id": "a", "question": "x"}, {"id": "b", "question": "y"}])
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}]}
    line = {"custom_id": "b", "response": {"status_code": 200, "body": body}, "error": None}
    (tmp_path / "out.jsonl").write_text(json.dumps(line) + "\n")
    merge_pile(tmp_path / "t.csv", [tmp_path / "out.jsonl"], output=tmp_path / "results.jsonl")
    results = [json.loads(one) for one in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["id"], row["raw_response"]) for row in results] == [("a", None), ("b", "yes")]
