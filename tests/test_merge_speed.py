"""`merge` has a fast way for plain answers, and several processes: neither changes a byte of what is written."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batchkit import assembly, pieces, plain, teams
from batchkit.direct import BUFFER_BYTES
from batchkit.errors import BatchkitError, RunError, StorageError, UsageError
from batchkit.jobs import Attempt, Job
from batchkit.merging import merge
from batchkit.responses import parse
from tests.made_runs import MadeRun, failure_line, response_line
from tests.shapes import SHAPES, Shape

ROWS = [
    b'{"id": 0,  "n": 1.50}', b"{bad", b'{"id": 2}\r', b" {} ", b'{"id":"\\u00e9 \xc3\xa9"}', b'{"id": 5}', b"{}",
    b'{"a":{}}', b'{"a": "}" }', b'{"question": "model?"}', b'{"id": 10}', b'{"id": 11}', b'{"id": 12}', b'{"id": 13}',
]  # fmt: skip
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5, "x y": " "}}


def fill(made: MadeRun, shards: int) -> None:
    """Shards with a little of everything, in two attempts, of which the second took some rows again."""
    for shard in range(shards):
        seal = made.add_shard(ROWS, {1: "tasks.jsonl:2: not valid JSON"})
        ids = made.ids[seal.start : seal.end]
        said = ["red", " a\nb ", "42", '{"a": 1}', "é\u2028", "x" * 500, "A", "no", "yes"]
        lines = [
            response_line(name, said[index % len(said)]) for index, name in enumerate(ids) if index not in (1, 5, 11)
        ]
        lines += [
            response_line(ids[5], "cut", finish="length", usage=None),
            response_line(ids[6], "again"),
            response_line("stranger", "x"),
            response_line(ids[1], "to a rejected row"),
            failure_line(ids[11], 500, f"failed {shard}"),
            b"garbage",
            b"",
        ]
        lines[3] = response_line(ids[4], "other model", model="m2", usage=USAGE).replace(b", ", b",")
        made.add_attempt(shard, lines[::-1], torn=b'{"cust')
        made.add_attempt(
            shard,
            [
                response_line(ids[11], "now"),
                response_line(ids[0], "later", usage=USAGE),
                failure_line(ids[2], 400, "no"),
            ],
            rows=[(seal.start, seal.start + 3), (seal.start + 11, seal.start + 13)],
        )
        job = made.run.job(shard)
        reused = Attempt(
            number=3, backend="openai", state="collected", rows=[(seal.start + 12, seal.start + 13)],
            started=job.attempts[0].started, ended=job.attempts[0].ended, reused_from="other",
        )  # fmt: skip
        attempts = [msgspec.structs.replace(job.attempts[0], backend="openai"), job.attempts[1], reused]
        made.run.write_job(Job(shard=shard, attempts=attempts))
        made.run.responses_path(shard, 3).write_bytes(response_line(ids[12], "taken over", model="gpt-4o") + b"\n")
    made.finish()


def written(folder: Path, run: Any, **options: Any) -> dict[str, bytes]:
    folder.mkdir()
    merge(run, output=folder / "results.jsonl", **options)
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return files | {"summary.json": files["summary.json"].replace(str(folder).encode(), b"")}


@pytest.mark.parametrize(
    "options",
    [{}, {"prefix": "our_"}, {"flat": True}, {"parse": "json"}, {"parse": "number"}, {"parse": "regex:([a-z]+)"}],
    ids=str,
)
def test_the_fast_way_writes_what_the_long_way_writes(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeRun(tmp_path / "run")
    fill(made, 2)
    fast = written(tmp_path / "fast", made.run, **options)
    assert {"results.jsonl", "retry.jsonl", "unexpected.jsonl"} <= fast.keys()

    def refuse(line: bytes) -> None:
        raise msgspec.DecodeError

    monkeypatch.setattr(plain, "read_line", refuse)
    assert written(tmp_path / "long", made.run, **options) == fast


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_what_is_read_as_plain_is_what_the_judge_of_responses_says(shape: Shape) -> None:
    for line in (shape.of("a"), response_line("a", "x"), response_line("a", ""), response_line("a", "data:image/x")):
        try:
            found = plain.read_line(line)
        except plain.NOT_PLAIN:
            continue
        (choice,) = found.response.body.choices
        content, usage = choice.message.content, plain.compact_usage(bytes(found.response.body.usage))
        if plain.IMAGE_IN_TEXT not in content:
            read = plain.to_response(found.custom_id, content, usage, found.response.body.model, choice.finish_reason)
            assert read == parse(line)


@pytest.mark.parametrize("forked", [True, False], ids=["forked", "spawned"])
@pytest.mark.parametrize("options", [{}, {"flat": True}], ids=str)
def test_several_processes_write_what_one_writes(
    options: dict[str, Any], forked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeRun(tmp_path / "run")
    fill(made, 7)
    one = written(tmp_path / "one", made.run, workers=1, **options)
    monkeypatch.setattr(teams, "can_fork", lambda: forked)
    assert written(tmp_path / "three", made.run, workers=3, **options) == one
    assert not list((tmp_path / "three").glob(".*"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """A run whose results have several megabytes."""
    made = MadeRun(tmp_path_factory.mktemp("large") / "run")
    for shard in range(6):
        seal = made.add_shard([b'{"id": %d}' % (shard * 100 + index) for index in range(100)])
        ids = made.ids[seal.start : seal.end]
        made.add_attempt(shard, [response_line(name, f"{name} " * 1000) for name in ids[::-1]])
    made.finish()
    return made


def test_large_results_are_the_same_compressed_or_not_and_by_several_processes(large: MadeRun, tmp_path: Path) -> None:
    one, two = (written(tmp_path / str(workers), large.run, workers=workers) for workers in (1, 2))
    assert one == two
    results = one["results.jsonl"]
    assert len(results) > 6 * BUFFER_BYTES
    assert [json.loads(line)["id"] for line in results.splitlines()] == [*range(600)]
    merge(large.run, output=tmp_path / "results.jsonl.gz", workers=1)
    assert gzip.decompress((tmp_path / "results.jsonl.gz").read_bytes()) == results
    for name in ("a.csv", "a.csv.gz"):
        merge(large.run, output=tmp_path / name, workers=1)
    assert gzip.decompress((tmp_path / "a.csv.gz").read_bytes()) == (tmp_path / "a.csv").read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up_leaves_the_old_results(
    workers: int, large: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_at, results = os.pwrite, tmp_path / "results.jsonl"
    results.write_bytes(b"of before\n")

    def fill(file: int, data: bytes, offset: int) -> int:
        if offset >= 2 * BUFFER_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_at(file, data, offset)

    monkeypatch.setattr(os, "pwrite", fill)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        merge(large.run, output=results, workers=workers)
    assert caught.value.hint is not None
    assert "free some disk space" in caught.value.hint
    assert results.read_bytes() == b"of before\n"
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_table_is_the_same_however_many_processes_make_it(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    fill(made, 3)
    for workers in (1, 2):
        merge(made.run, output=tmp_path / f"{workers}.csv.gz", workers=workers)
    assert (tmp_path / "1.csv.gz").read_bytes() == (tmp_path / "2.csv.gz").read_bytes()


def test_images_of_a_shard_are_saved_with_several_processes_too(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    fill(made, 4)
    picture = "![it](data:image/png;base64,iVBORw0KGgo=)"
    made.run.responses_path(2, 4).write_bytes(response_line(made.ids[3 * len(ROWS) - 1], f"Here: {picture}") + b"\n")
    one, two = (written(tmp_path / str(workers), made.run, workers=workers) for workers in (1, 2))
    assert one == two
    assert (tmp_path / "2" / "output_images" / str(3 * len(ROWS) - 1) / "output_image_1.png").exists()


def _die(order: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_an_error_and_leaves_the_old_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeRun(tmp_path / "run")
    fill(made, 4)
    results = made.run.path / "results.jsonl"
    results.write_bytes(b"of before\n")
    monkeypatch.setattr(pieces, "make", _die)
    monkeypatch.setattr(teams, "can_fork", lambda: True)
    with pytest.raises(BatchkitError, match="a worker of merge was killed") as caught:
        merge(made.run, workers=2)
    assert caught.value.hint == "run the same command again, with --workers 1"
    assert results.read_bytes() == b"of before\n"
    assert not list(made.run.path.glob(".*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_a_shard_are_named_whoever_finds_them(workers: int, tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    fill(made, 4)
    path = made.run.rows_path(3)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RunError, match="its checksum differs") as caught:
        merge(made.run, workers=workers)
    assert str(path) in str(caught.value)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("rm ")
    assert not list(made.run.path.glob(".*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_that_uses_the_prefixed_name_is_found_among_plain_answers(workers: int, tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    for _ in range(2):
        made.add_shard([b'{"id": 1}', b'{"our_\\u006dodel": 1}'])
    for shard in range(2):
        made.add_attempt(shard, [response_line(name, "x") for name in made.ids[2 * shard : 2 * shard + 2]])
    made.finish()
    with pytest.raises(UsageError, match="has a field 'our_model' already"):
        merge(made.run, prefix="our_", workers=workers)


def test_a_name_that_prepare_saw_in_a_shard_is_refused_before_all_is_prepared(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.add_shard([b'{"mod\\u0065l": 1}'])
    made.add_attempt(0, [response_line(made.ids[0], "x")])
    with pytest.raises(UsageError, match="has a field 'model' already"):
        merge(made.run)


def test_small_runs_need_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeRun(tmp_path / "run")
    fill(made, 2)
    monkeypatch.setattr(teams, "begin", lambda *_: pytest.fail("not for so few rows"))
    merge(made.run)
    monkeypatch.setattr(assembly, "FORKED_ROWS", 1)
    monkeypatch.setattr(assembly, "SPAWNED_ROWS", 1)
    monkeypatch.setattr(teams, "cores", lambda: 2)
    with pytest.raises(pytest.fail.Exception):
        merge(made.run)


def test_what_a_killed_merge_left_of_pieces_is_removed_by_the_next(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    fill(made, 2)
    left = made.run.path / ".results.jsonl.99999999-abcd.tmp"
    left.mkdir()
    (left / "1-results").write_bytes(b"{}\n")
    merge(made.run)
    assert not left.exists()
