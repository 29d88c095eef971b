"""`merge` of several runs: parts of one task file that were prepared and answered apart."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from batchkit import infer, merge, prepare, submit
from batchkit.cli import main
from batchkit.errors import RunError, UsageError
from batchkit.responses import Verdict
from batchkit.runs import Run
from batchkit.summaries import Gap
from tests.conftest import WriteTasks
from tests.fake_server import Server
from tests.made_runs import failure_line, response_line
from tests.test_reuse import answer

CUTS = (0, 40, 41, 100)


def rows_of(count: int) -> list[dict[str, Any] | bytes]:
    return [{"id": number, "question": f"question {number}"} for number in range(count)]


def make(tasks: Path, run: Path, start: int, end: int | None, **options: Any) -> Path:
    options = {"model": "m", "backend": "server", "max_requests": 16, "workers": 1, **options}
    prepare(tasks, run, start=start, end=end, **options)
    return run


def make_parts(tasks: Path, folder: Path, cuts: Sequence[int] = CUTS, **options: Any) -> list[Path]:
    spans = itertools.pairwise(cuts)
    return [make(tasks, folder / f"part{n}", start, end, **options) for n, (start, end) in enumerate(spans, start=1)]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_parts_answered_apart_are_one_result_like_that_of_one_run(
    write_tasks: WriteTasks, tmp_path: Path, server: Server
) -> None:
    rows = rows_of(100)
    rows[50] = b"broken"
    tasks = write_tasks(rows)
    one, two, three = make_parts(tasks, tmp_path)
    whole = make(tasks, tmp_path / "whole", 0, None)
    for run in (one, two, three, whole):
        submit(run, endpoints=[server.url])
    assert set(server.asked.values()) == {2}, "once in a part, once in the whole"
    output = tmp_path / "results.jsonl"
    summary = merge([three, one, two], output=output)
    merge(whole, output=tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "retry.jsonl").read_bytes() == b"broken\n"
    assert (summary.rows, sum(summary.verdicts.values())) == (100, 100)
    assert (summary.verdicts[Verdict.ANSWERED], summary.verdicts[Verdict.REJECTED]) == (99, 1)
    assert [(part.run, part.start, part.end) for part in summary.parts] == [
        (str(one), 0, 40), (str(two), 40, 41), (str(three), 41, 100),
    ]  # fmt: skip
    assert (summary.gaps, summary.differences, summary.model) == ([], [], "m")
    assert json.loads((tmp_path / "summary.json").read_bytes())["parts"][2]["start"] == 41
    assert summary.exit_code == 3


def test_the_command_line_merges_runs_in_any_order(write_tasks: WriteTasks, tmp_path: Path) -> None:
    parts = make_parts(write_tasks(rows_of(100)), tmp_path)
    for part in parts:
        answer(part, lambda position, one: [response_line(one, f"a{position}")])
    done = call("merge", *reversed(parts), "-o", tmp_path / "out.jsonl")
    assert done.exit_code == 0, done.stderr
    assert "merged 100 rows of 3 runs: answered 100" in done.stderr
    assert [row["raw_response"] for row in lines_of(tmp_path / "out.jsonl")] == [f"a{n}" for n in range(100)]
    refused = call("merge", *parts)
    assert refused.exit_code == 2
    assert "hint: -o results.jsonl" in refused.stderr
    assert call("merge", parts[0]).exit_code == 0  # a single one goes into itself, as ever
    assert (parts[0] / "results.jsonl").exists()


def test_rows_in_none_of_the_runs_are_told(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(100))
    parts = [make(tasks, tmp_path / f"{start}", start, end) for start, end in ((10, 20), (30, 40), (40, 90))]
    for part in parts:
        answer(part, lambda _, one: [response_line(one, "a")])
    summary = merge(parts, output=tmp_path / "out.jsonl")
    assert summary.gaps == [Gap(start=0, end=10), Gap(start=20, end=30), Gap(start=90, end=None)]
    assert summary.rows == summary.answers == 70
    assert summary.exit_code == 3
    done = call("merge", *parts, "-o", tmp_path / "out.jsonl")
    assert "warning: rows 20 to 29 are in none of the runs\n" in done.stderr
    assert "warning: the rows from 90 on are in none of the runs\n" in done.stderr
    assert done.exit_code == 3


def test_the_end_of_the_file_is_no_gap(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(10))
    tasks.write_bytes(tasks.read_bytes().rstrip(b"\n"))
    parts = [make(tasks, tmp_path / "one", 0, 5), make(tasks, tmp_path / "two", 5, 10)]
    assert merge(parts, output=tmp_path / "out.jsonl").gaps == []


def test_rows_in_two_runs_are_refused(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(100))
    parts = [make(tasks, tmp_path / "a", 30, 100), make(tasks, tmp_path / "b", 0, 40)]
    both = f"rows 30 to 39 are in two of the runs: {parts[1]} has rows 0 to 39, {parts[0]} 30 to 99"
    with pytest.raises(UsageError, match=both):
        merge(parts, output=tmp_path / "out.jsonl")
    with pytest.raises(UsageError, match="is named twice"):
        merge([parts[0], tmp_path / "b" / ".." / "a"], output=tmp_path / "out.jsonl")
    with pytest.raises(UsageError, match="no run is named"):
        merge([], output=tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_copy_of_the_file_elsewhere_is_the_same_file(write_tasks: WriteTasks, tmp_path: Path) -> None:
    rows = rows_of(20)
    (tmp_path / "elsewhere").mkdir()
    one = make(write_tasks(rows), tmp_path / "one", 0, 10)
    two = make(write_tasks(rows, "elsewhere/copy.jsonl"), tmp_path / "two", 10, None)
    summary = merge([two, one], output=tmp_path / "out.jsonl")
    assert (summary.rows, summary.gaps, summary.differences) == (20, [], [])


@pytest.mark.parametrize("change", [b"question 0", b"longer question 15"])
def test_runs_of_different_files_are_refused_and_named(change: bytes, write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(20))
    one = make(tasks, tmp_path / "one", 0, 10)
    other = tmp_path / "other.jsonl"
    other.write_bytes(tasks.read_bytes().replace(b"question 15", change.ljust(11)))
    two = make(other, tmp_path / "two", 10, None)
    with pytest.raises(UsageError, match=f"{two} was prepared from {other}, {one} from {tasks}: "):
        merge([one, two], output=tmp_path / "out.jsonl")


def test_runs_that_were_prepared_otherwise_are_merged_and_told(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(20))
    one = make(tasks, tmp_path / "one", 0, 10)
    two = make(tasks, tmp_path / "two", 10, None, model="n", system_prompt="be brief " * 20, max_requests=3)
    answer(one, lambda _, custom_id: [failure_line(custom_id, 400, "no")])
    summary = merge([one, two], output=tmp_path / "out.jsonl")
    assert summary.model is None
    assert [part.model for part in summary.parts] == ["m", "n"]
    assert [text.split(" ")[0] for text in summary.differences] == ["--model", "--system-prompt"]
    assert summary.differences[0] == f"--model is 'm' in {one}; 'n' in {two}"
    results = lines_of(tmp_path / "out.jsonl")
    assert {row["model"] for row in results[:10]} == {"m"}
    assert {row["model"] for row in results[10:]} == {"n"}
    assert len(lines_of(tmp_path / "out.retry.jsonl")) == 10
    assert summary.exit_code == 8


def test_each_part_is_priced_as_its_own_model(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(20))
    models = ("gpt-5-mini", "gpt-5")
    parts = [
        make(tasks, tmp_path / model, start, end, model=model, backend="openai")
        for model, start, end in zip(models, (0, 10), (10, None), strict=True)
    ]
    for part in parts:
        answer(part, lambda _, one: [response_line(one, "a", model=None)], "openai")
    alone = [merge(part).spent for part in parts]
    together = merge(parts, output=tmp_path / "out.jsonl").spent
    assert together is not None
    dollars = [spent.usd for spent in alone if spent is not None and spent.usd is not None]
    assert len(set(dollars)) == 2
    assert together.usd == pytest.approx(sum(dollars), abs=2e-6)  # each is rounded


def test_a_part_that_is_not_prepared_to_its_end_is_pending(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(40))
    one, two = make_parts(tasks, tmp_path, (0, 20, 40))
    for part in (one, two):
        answer(part, lambda _, custom_id: [response_line(custom_id, "a")])
    (one / "prepared.json").unlink()
    Run.open(one).seal_path(1).unlink()
    summary = merge([two, one], output=tmp_path / "out.jsonl")
    assert summary.gaps == [Gap(start=16, end=20)]
    assert (summary.rows, summary.exit_code) == (36, 8)
    Run.open(one).seal_path(0).unlink()
    assert merge([two, one], output=tmp_path / "out.jsonl").gaps == [Gap(start=0, end=20)]


def test_a_damaged_part_stops_it_all_and_results_stay_as_they_were(write_tasks: WriteTasks, tmp_path: Path) -> None:
    one, two = make_parts(write_tasks(rows_of(40)), tmp_path, (0, 20, 40))
    output = tmp_path / "out.jsonl"
    merge([one, two], output=output)
    before = output.read_bytes()
    path = two / "rows" / "00001.jsonl"
    path.write_bytes(path.read_bytes().replace(b"37", b"38"))
    with pytest.raises(RunError, match=f"{path}: is not what prepare wrote"):
        merge([one, two], output=output)
    assert output.read_bytes() == before
    assert [name.name for name in tmp_path.glob(".*")] == []


def test_what_any_part_reads_is_never_overwritten(write_tasks: WriteTasks, tmp_path: Path) -> None:
    one, two = make_parts(write_tasks(rows_of(40)), tmp_path, (0, 20, 40))
    for path in (two / "rows" / "00000.jsonl", tmp_path / "tasks.jsonl"):
        with pytest.raises(UsageError, match="would overwrite what the merge reads"):
            merge([one, two], output=path)


def test_parts_may_have_reused_answers(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(40))
    old = make(tasks, tmp_path / "old", 0, None)
    answer(old, lambda position, one: [response_line(one, f"a{position}")])
    parts = make_parts(tasks, tmp_path, (0, 20, 40), reuse=(str(old),))
    summary = merge(parts, output=tmp_path / "out.jsonl")
    assert (summary.reused, summary.exit_code) == (40, 0)
    assert [row["raw_response"] for row in lines_of(tmp_path / "out.jsonl")] == [f"a{n}" for n in range(40)]


def test_infer_still_merges_its_one_run(tmp_path: Path, server: Server) -> None:
    found = infer(
        [{"id": "a", "question": "x"}], model="m", backend="server", endpoints=[server.url], run=tmp_path / "run"
    )
    assert found == {"a": "answer to x"}


@pytest.mark.parametrize(("end", "gap"), [(b"\n\n \r\n\n", False), (b"\n\n{}", True), (b"", False)])
def test_blank_lines_at_the_end_are_no_rows_that_are_missing(
    write_tasks: WriteTasks, tmp_path: Path, end: bytes, gap: bool
) -> None:
    tasks = write_tasks(rows_of(4))
    tasks.write_bytes(tasks.read_bytes() + end)
    runs = make_parts(tasks, tmp_path, (0, 2, 4))
    assert merge(runs, output=tmp_path / "r.jsonl").gaps == ([Gap(start=4, end=None)] if gap else [])


def test_a_part_without_a_schema_is_read_as_text(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks(rows_of(4))
    one = make(tasks, tmp_path / "one", 0, 2)
    two = make(tasks, tmp_path / "two", 2, None, response_schema={"type": "object"})
    answer(one, lambda _, name: [response_line(name, "just text")])
    answer(two, lambda _, name: [response_line(name, '{"a": 1}')])
    merge([one, two], output=tmp_path / "r.jsonl")
    found = [result["parsed_answer"] for result in lines_of(tmp_path / "r.jsonl")]
    assert found == ["just text"] * 2 + [{"a": 1}] * 2
    merge([one, two], output=tmp_path / "r.jsonl", parse="json")
    assert lines_of(tmp_path / "r.jsonl")[0]["batchkit"]["verdict"] == "invalid"
