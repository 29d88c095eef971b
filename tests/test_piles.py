from __future__ import annotations

import gzip
import json
import random
import resource
from pathlib import Path
from typing import Any

import pytest

from batchkit import identities, joining, piles, plain, responses, sorting, spills, teams
from batchkit.errors import InputError, StorageError, UsageError
from batchkit.piles import merge_pile
from batchkit.responses import Response
from batchkit.summaries import Summary
from tests.made_runs import failure_line, response_line
from tests.shapes import SHAPES, Shape


def write_lines(path: Path, lines: list[bytes], *, torn: bytes = b"") -> Path:
    content = b"".join(line + b"\n" for line in lines) + torn
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def results_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def counts(summary: Summary) -> dict[str, int]:
    return {str(verdict): count for verdict, count in summary.verdicts.items() if count}


def verdicts_of(path: Path) -> list[str]:
    return [result["batchkit"]["verdict"] for result in results_of(path)]


@pytest.fixture(params=["in memory", "in many partitions"])
def partitioned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough for one partition, and so divided that files are merged in several levels."""
    if request.param == "in many partitions":
        monkeypatch.setattr(piles, "PARTITION_BYTES", 300)
        monkeypatch.setattr(spills, "BUFFERED_BYTES", 2000)
        monkeypatch.setattr(identities, "SHARD_ROWS", 7)
        monkeypatch.setattr(sorting, "LEAST_BYTES", 900)


def test_a_pile_of_every_shape_with_cut_lines_duplicates_and_strangers_is_counted_exactly(
    tmp_path: Path, partitioned: None
) -> None:
    names = [shape.name for shape in SHAPES]
    rows = [b'{"id":"%b","n":%d}' % (name.encode(), number) for number, name in enumerate(names)]
    rows += [
        b'{"id":"twice"}',
        b'{"id":"torn"}',
        b'{"id":"split"}',
        b'{"id":"nobody"}',
        b'{"id":"twice"}',
        b'{"n":1}',
        b"{bad",
        b"[1]",
    ]
    tasks = write_lines(tmp_path / "tasks.jsonl", [*rows[:3], b"", *rows[3:]])
    lines = [shape.of(shape.name) for shape in SHAPES]
    random.Random(7).shuffle(lines)
    good, bad = lines[::2], lines[1::2]
    twice = response_line("twice", "same")
    write_lines(tmp_path / "output-1.jsonl", [*good, twice, b"", *good], torn=response_line("torn", "x")[:80])
    write_lines(
        tmp_path / "output-2.jsonl.gz",
        [response_line("split", "x"), twice, b"\x00\x00", response_line("stranger", "x"), b'{"no":"id"}'],
    )
    write_lines(
        tmp_path / "errors.jsonl",
        [*bad, failure_line("twice", 500, "late"), response_line("split", "y"), response_line("nobody ", "x")],
    )
    output = tmp_path / "results.jsonl"
    summary = merge_pile(tasks, [str(tmp_path / "output-*"), tmp_path / "errors.jsonl"], output=output)

    expected = (
        [shape.verdict for shape in SHAPES] + ["answered", "missing", "conflicting", "missing"] + ["rejected"] * 4
    )
    assert verdicts_of(output) == expected
    assert counts(summary) == {verdict: expected.count(verdict) for verdict in set(expected)}
    assert (summary.rows, summary.unexpected, summary.unreadable) == (len(rows), 2, 3)
    assert len((tmp_path / "unexpected.jsonl").read_bytes().split(b"\n")) == 6
    for row, line in zip(rows, output.read_bytes().split(b"\n"), strict=False):
        if row not in (b"{bad", b"[1]"):
            assert line.startswith(row[:-1])
    for shape, result in zip(SHAPES, results_of(output), strict=False):
        if shape.verdict in ("answered", "truncated", "refused"):
            assert result["raw_response"] == shape.answer
    errors = [result["error"] for result in results_of(output)[-4:]]
    assert errors[0] == f"{tasks}:{len(rows) - 2}: the same id as line {len(SHAPES) + 2}: twice"
    assert errors[1] == f"{tasks}:{len(rows) - 1}: id field 'id' is missing"
    assert errors[2].startswith(f"{tasks}:{len(rows)}: not valid JSON")
    assert errors[3].startswith(f"{tasks}:{len(rows) + 1}: not a JSON object")
    assert not list(tmp_path.glob(".*"))


def test_row_order_is_kept_and_partitions_change_nothing(tmp_path: Path, partitioned: None) -> None:
    count = 400
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"id":%d}' % number for number in range(count)])
    lines = [response_line(str(number), f"answer {number}") for number in range(count) if number % 7]
    random.Random(1).shuffle(lines)
    write_lines(tmp_path / "out.jsonl", lines)
    merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "results.jsonl")
    assert [result["raw_response"] for result in results_of(tmp_path / "results.jsonl")] == [
        f"answer {number}" if number % 7 else None for number in range(count)
    ]


def mixed_pile(folder: Path) -> tuple[Path, list[Path]]:
    """A little of everything that a task file and its responses can have, in any order, in some files."""
    rows = [b'{"id":"r%d", "n":1.50}' % number for number in range(300)]
    for number, row in ((7, b"{bad"), (40, b'{"id":"r3"}'), (41, b'{"id":"r3"}'), (90, b""), (91, b" \t"), (92, b"[]"),
                        (130, b'{"id":17}'), (131, b'{"id":"\\u00e9"}\r'), (200, b'{"id":"r199"}'), (201, b" {} "),
                        (202, b'{"id":"long","q":"%b"}' % (b"x" * 5000))):  # fmt: skip
        rows[number] = row
    tasks = write_lines(folder / "tasks.jsonl", rows, torn=b'{"id":"last"}')
    tasks.write_bytes(b"\xef\xbb\xbf" + tasks.read_bytes())
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5, "x y": " "}}
    lines = [response_line(f"r{number}", f"answer {number}") for number in range(300) if number % 11]
    lines += [response_line(f"r{number}", "cut", finish="length", usage=usage) for number in range(0, 300, 11)]
    lines += [response_line(f"r{number}", f"other {number}") for number in range(50, 60)]
    lines += [response_line(f"r{number}", f"answer {number}") for number in range(60, 70)]
    lines += [failure_line(f"r{number}", 500, f"failed {number}") for number in range(65, 140, 3)]
    lines += [
        response_line(name, f"to {name}", model="m2") for name in ("17", "\u00e9", "long", "last", "", "stranger")
    ]
    lines += [response_line("r1", "![](data:image/png;base64,AAAA)"), b"garbage", b"", b"  ", b"{}", b'"text"', b"\x00"]
    lines += [b'{"custom_id":"r5","method":"POST","url":"/v1/x","body":{}}', b'{"custom_id":"\\ud800","response":null}']
    lines += [response_line("stranger", "z" * 3000).replace(b": ", b":")] + [shape.of(f"r{n}") for n, shape in
              enumerate(SHAPES, 210)]  # fmt: skip
    random.Random(5).shuffle(lines)
    return tasks, [
        write_lines(folder / "a.jsonl", lines[:250], torn=b'{"custom_id":"r9","resp'),
        write_lines(folder / "b.jsonl.gz", lines[250:300], torn=response_line("r299", "other")),
        write_lines(folder / "c.jsonl", lines[300:], torn=response_line("r22", "other")),
    ]


@pytest.mark.parametrize("forked", [True, False], ids=["forked", "spawned"])
def test_several_processes_sort_a_pile_as_one_does(
    forked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, responses = mixed_pile(tmp_path)
    monkeypatch.setattr(identities, "SHARD_ROWS", 20)
    written: list[dict[str, bytes]] = []
    for partition, section, workers in ((1 << 30, 1 << 20, 1), (20_000, 1500, 1), (20_000, 1500, 3)):
        monkeypatch.setattr(piles, "PARTITION_BYTES", partition)
        monkeypatch.setattr(piles, "LEAST_BYTES", section)
        monkeypatch.setattr(sorting, "LEAST_BYTES", section)
        monkeypatch.setattr(teams, "can_fork", lambda: forked)
        output = tmp_path / f"{len(written)}" / "results.jsonl"
        summary = merge_pile(tasks, responses, output=output, workers=workers)
        assert summary.rows == 299
        files = {path.name: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()}
        files["summary.json"] = files["summary.json"].replace(str(output.parent).encode(), b"")
        written.append(files)
    one, divided, several = written
    assert several == divided
    assert one["results.jsonl"] == divided["results.jsonl"]
    assert sorted(one["unexpected.jsonl"].split(b"\n")) == sorted(divided["unexpected.jsonl"].split(b"\n"))
    assert {"results.jsonl", "retry.jsonl", "unexpected.jsonl", "output_image_1.png"} <= one.keys()
    assert response_line("stranger", "z" * 3000).replace(b": ", b":") in one["unexpected.jsonl"].split(b"\n")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_changes_while_it_is_merged_is_an_error(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"id":%d}' % number for number in range(100)])
    answers = write_lines(tmp_path / "out.jsonl", [response_line(str(number), "x") for number in range(200)])
    monkeypatch.setattr(piles, "LEAST_BYTES", 1000)
    monkeypatch.setattr(sorting, "LEAST_BYTES", 1000)
    take = sorting.Sorting.take_responses
    look_up = sorting.Sorting._look_up

    def taken(self: sorting.Sorting, *arguments: Any, **named: Any) -> None:
        take(self, *arguments, **named)
        tasks.write_bytes(tasks.read_bytes().replace(b'"id":50', b'"id":51'))

    def looked_up(self: sorting.Sorting, *arguments: Any) -> None:
        look_up(self, *arguments)
        answers.write_bytes(answers.read_bytes().replace(b'"150"', b'"151"'))

    for changed, method, path in ((taken, "take_responses", tasks), (looked_up, "_look_up", answers)):
        with monkeypatch.context() as patch:
            patch.setattr(sorting.Sorting, method, changed)
            with pytest.raises(InputError, match="was changed while it was merged") as caught:
                merge_pile(tasks, [answers], output=tmp_path / "results.jsonl", workers=workers)
        assert str(path) in caught.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "tasks.jsonl"]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_plain_line_without_what_nobody_reads_is_the_same_response(shape: Shape) -> None:
    for line in (shape.of("a"), response_line("a", "x", usage=None), response_line("a", "x", finish="length")):
        try:
            short = plain.encode_lines([plain.read_line(line)])
        except plain.NOT_PLAIN:
            continue
        assert len(short) < len(line)
        if b"data:image/" not in short:
            assert responses.parse(short) == responses.parse(line)


def test_rows_of_a_table_are_sorted_by_several_processes_as_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_lines(tmp_path / "tasks.csv", [b"id,question", *(b'r%d,"a\nb"' % number for number in range(100))])
    names = [f"r{number}" for number in range(0, 100, 3)]
    answers = write_lines(tmp_path / "out.jsonl", [response_line(name, f"to {name}") for name in names])
    monkeypatch.setattr(identities, "SHARD_ROWS", 9)
    for module in (piles, sorting):
        monkeypatch.setattr(module, "LEAST_BYTES", 500)
    for workers in (1, 2):
        merge_pile(table, [answers], output=tmp_path / f"{workers}.jsonl", workers=workers)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    said = [result["raw_response"] for result in results_of(tmp_path / "1.jsonl")]
    assert said == [f"to r{number}" if number % 3 == 0 else None for number in range(100)]


@pytest.mark.parametrize(
    ("row", "fields", "custom_id"),
    [
        (b'{"id":"a b"}', ["id"], "a b"),
        (b'{"id":17}', ["id"], "17"),
        (b'{"id":1.50}', ["id"], "1.50"),
        (b'{"id":1e3}', ["id"], "1e3"),
        (b'{"id":true}', ["id"], "true"),
        (b'{"id":"\\u00e9"}', ["id"], "é"),
        (b'{"doc":"a","page":3}', ["doc", "page"], "a|3"),
    ],
)
def test_the_custom_id_is_the_text_of_the_id_fields(
    tmp_path: Path, row: bytes, fields: list[str], custom_id: str
) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [row])
    write_lines(tmp_path / "out.jsonl", [response_line(custom_id, "x")])
    summary = merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "results.jsonl", id_fields=fields)
    assert counts(summary) == {"answered": 1}
    assert summary.exit_code == 0


def test_the_separator_of_id_fields_can_be_chosen(tmp_path: Path) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"doc":"a","page":3}'])
    write_lines(tmp_path / "out.jsonl", [response_line("a-p3", "x")])
    summary = merge_pile(
        tasks,
        [tmp_path / "out.jsonl"],
        output=tmp_path / "results.jsonl",
        id_fields=["doc", "page"],
        id_separator="-p",
    )
    assert counts(summary) == {"answered": 1}


@pytest.mark.parametrize("row", [b'{"id":null}', b'{"id":[1]}', b'{"id":{}}', b'{"ID":1}', b'{"id":NaN}', b"7"])
def test_a_row_without_a_usable_id_is_rejected_with_its_place(tmp_path: Path, row: bytes) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"id":"a"}', row])
    write_lines(tmp_path / "out.jsonl", [response_line("a", "x")])
    summary = merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "results.jsonl")
    assert counts(summary) == {"answered": 1, "rejected": 1}
    assert results_of(tmp_path / "results.jsonl")[1]["error"].startswith(f"{tasks}:2: ")
    assert summary.exit_code == 3


def test_rows_without_an_answer_go_into_a_task_file(tmp_path: Path) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"id": 1}', b'{"id": 2}', b'{"id": 3}'])
    write_lines(tmp_path / "out.jsonl", [response_line("2", "x"), failure_line("3", 400, "no")])
    merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "results.jsonl", retry_file=tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == b'{"id": 1}\n{"id": 3}\n'


def test_answers_are_parsed_and_fields_prefixed_as_for_a_run(tmp_path: Path) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"id":1,"model":"mine"}'])
    write_lines(tmp_path / "out.jsonl", [response_line("1", "It is 4.")])
    with pytest.raises(UsageError, match="'model' already"):
        merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "results.jsonl")
    merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "results.jsonl", parse="number", prefix="x_")
    result = results_of(tmp_path / "results.jsonl")[0]
    assert (result["model"], result["x_model"], result["x_parsed_answer"]) == ("mine", "m", 4)


def test_a_pattern_means_neither_the_task_file_nor_what_a_merge_wrote(tmp_path: Path) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"id":"a"}'])
    write_lines(tmp_path / "out.jsonl", [response_line("a", "x"), b"garbage"])
    for _ in range(2):
        summary = merge_pile(tasks, [tmp_path / "*.jsonl"], output=tmp_path / "results.jsonl")
        assert (summary.unexpected, summary.unreadable) == (0, 1)


def test_a_file_that_two_patterns_match_is_read_once(tmp_path: Path) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"id":"a"}'])
    write_lines(tmp_path / "out.jsonl", [response_line("stranger", "x")])
    summary = merge_pile(tasks, [tmp_path / "out.jsonl", tmp_path / "o*"], output=tmp_path / "results.jsonl")
    assert summary.unexpected == 1


def test_requests_among_the_responses_are_not_taken_for_failures(tmp_path: Path) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"id":"a"}'])
    request = b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"m"}}'
    write_lines(tmp_path / "out.jsonl", [request])
    summary = merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "results.jsonl")
    assert (counts(summary), summary.unreadable) == ({"missing": 1}, 1)


def test_files_that_are_missing_and_outputs_that_are_inputs_are_refused(tmp_path: Path) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"id":"a"}'])
    out = write_lines(tmp_path / "out.jsonl", [])
    with pytest.raises(InputError, match="no such file"):
        merge_pile(tasks, [tmp_path / "none-*.jsonl"], output=tmp_path / "results.jsonl")
    with pytest.raises(InputError, match="no such file"):
        merge_pile(tmp_path / "none.jsonl", [out], output=tmp_path / "results.jsonl")
    for output in (tasks, out):
        with pytest.raises(UsageError, match="would overwrite"):
            merge_pile(tasks, [out], output=output)
    with pytest.raises(UsageError, match="need a name"):
        merge_pile(tasks, [out])
    assert tasks.read_bytes() == b'{"id":"a"}\n'


def test_a_task_file_without_rows_gives_no_results(tmp_path: Path) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [])
    write_lines(tmp_path / "out.jsonl", [response_line("a", "x")])
    summary = merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "results.jsonl")
    assert (summary.rows, summary.unexpected, summary.exit_code) == (0, 1, 0)
    assert (tmp_path / "results.jsonl").read_bytes() == b""


def test_what_a_full_disk_leaves_is_an_error_and_no_file(tmp_path: Path, partitioned: None) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"id":%d}' % number for number in range(200)])
    write_lines(tmp_path / "out.jsonl", [response_line(str(number), "x" * 100) for number in range(200)])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # a file that may not grow stands for a full disk
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "results.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "tasks.jsonl"]


def test_results_in_a_place_that_cannot_be_made_are_an_error(tmp_path: Path) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"id":1}'])
    with pytest.raises(StorageError, match="cannot be made"):
        merge_pile(tasks, [tasks], output=write_lines(tmp_path / "file", []) / "results.jsonl")


def test_many_different_answers_to_one_row_are_each_looked_at_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 3000
    looks = 0
    gist = responses.gist

    def counted(response: Response) -> bytes:
        nonlocal looks
        looks += 1
        return gist(response)

    monkeypatch.setattr(responses, "gist", counted)
    monkeypatch.setattr(joining, "gist", counted)
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"id":"a"}'])
    lines = [response_line("a", f"answer {number % count}") for number in range(2 * count)]
    write_lines(tmp_path / "out.jsonl", lines)
    merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "results.jsonl")
    (result,) = results_of(tmp_path / "results.jsonl")
    assert result["raw_response"] == "answer 0"
    listed = [conflict["raw_response"] for conflict in result["batchkit"]["conflicts"]]
    assert listed == [f"answer {number}" for number in range(1, count)]
    assert looks == 3 * count, "each line once, and each different answer once more"


def test_one_response_repeated_endlessly_takes_no_memory(tmp_path: Path) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"id":"a"}'])
    write_lines(tmp_path / "out.jsonl", [failure_line("a", 500, "x" * 20_000)] * 1500)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary = merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "results.jsonl")
    assert counts(summary) == {"failed": 1}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 25_000  # of 30 MB of lines


def test_an_id_without_characters_is_no_custom_id_whatever_its_answer_looks_like(tmp_path: Path) -> None:
    tasks = write_lines(tmp_path / "tasks.jsonl", [b'{"id":"a"}', b'{"id":""}'])
    for finish in ("stop", "content_filter"):
        answers = write_lines(tmp_path / "out.jsonl", [response_line("", "red", finish=finish)])
        merge_pile(tasks, [answers], output=tmp_path / "results.jsonl")
        result = results_of(tmp_path / "results.jsonl")[1]
        assert (result["raw_response"], result["batchkit"]["custom_id"]) == ("red", None)
