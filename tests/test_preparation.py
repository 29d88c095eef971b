from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from batchkit import preparation
from batchkit.conversion import Converted
from batchkit.errors import InputError, RunBusyError, RunError, StorageError, UsageError
from batchkit.jobs import Job
from batchkit.limits import LIMITS
from batchkit.manifests import Input, Manifest
from batchkit.options import PrepareKeywords, PrepareOptions
from batchkit.piles import merge_pile
from batchkit.runs import Run
from batchkit.shardfiles import IdsSeen
from batchkit.tasks import Row
from tests.conftest import WriteTasks

Picture = Callable[..., Path]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def requests(run: Path) -> list[dict[str, Any]]:
    return [request for seal in Run.open(run).seals() for request in lines(Run.open(run).requests_path(seal.shard))]


def reasons(run: Path) -> list[str]:
    return [rejection.message for seal in Run.open(run).seals() for rejection in seal.rejected]


def files(run: Path) -> dict[str, bytes]:
    """What a preparation wrote, without its times."""
    return {
        str(path.relative_to(run)): re.sub(rb'"(created|finished)": "[^"]*"', b"", path.read_bytes())
        for path in sorted(run.rglob("*"))
        if path.is_file() and "leases" not in path.parts
    }


def test_a_row_becomes_one_request_with_its_image_before_the_question(
    write_tasks: WriteTasks, picture: Picture, tmp_path: Path
) -> None:
    data = picture("photos/1.png").read_bytes()
    tasks = write_tasks([{"id": "a", "image": "photos/1.png", "question": 'What is «this»?\n"x"'}])
    report = preparation.prepare(tasks, tmp_path / "run", model="m")
    assert (report.rows, report.requests, report.rejected, report.shards) == (1, 1, 0, 1)
    (request,) = requests(tmp_path / "run")
    assert re.fullmatch(r"0-[0-9a-f]{16}", request.pop("custom_id"))
    assert request == {
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "image_url",
                            "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()},
                        },
                        {"type": "text", "text": 'What is «this»?\n"x"'},
                    ],
                }
            ],
            "max_tokens": 100,
            "temperature": 0.0,
        },
    }


def test_options_reach_the_request(write_tasks: WriteTasks, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Be «brief».")
    preparation.prepare(
        write_tasks([{"q": "Why?", "topic": "sky"}]),
        tmp_path / "run",
        model="m",
        question_field="q",
        prompt_template="{{ topic | upper }}: {{ q }}",
        system_prompt=f"@{tmp_path}/system.txt",
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        reasoning_effort="low",
        extra_body={"top_k": 5, "max_tokens": 9},
    )
    assert requests(tmp_path / "run")[0]["body"] == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be «brief»."}, {"role": "user", "content": "SKY: Why?"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "reasoning_effort": "low",
        "top_k": 5,
    }


def test_several_images_come_in_the_order_of_fields_and_lists(
    write_tasks: WriteTasks, picture: Picture, tmp_path: Path
) -> None:
    paths = [picture(f"{name}.png", colour=name) for name in ("red", "green", "blue")]
    tasks = write_tasks([{"b": ["green.png", "blue.png"], "a": "red.png", "question": "?"}])
    preparation.prepare(tasks, tmp_path / "run", model="m", image_field=("a", "b"), image_detail="low")
    content = requests(tmp_path / "run")[0]["body"]["messages"][0]["content"]
    sent = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in content[:-1]]
    assert sent == [path.read_bytes() for path in paths]
    assert {part["image_url"]["detail"] for part in content[:-1]} == {"low"}


def test_bad_rows_are_rejected_with_file_line_and_reason(
    write_tasks: WriteTasks, picture: Picture, tmp_path: Path
) -> None:
    picture("ok.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "ok.png").read_bytes()[:-20])
    rows: list[dict[str, Any] | bytes] = [
        {"image": "ok.png", "question": "fine"},
        b'{"image": "ok.png", "question": "cut',
        b"",
        b"[1, 2]",
        b'"text"',
        b'{"question": "not \xff UTF-8"}',
        b'{"question": NaN}',
        b"[" * 100_000,
        {"image": "ok.png", "frage": "no question"},
        {"image": "none.png", "question": "?"},
        {"image": "cut.png", "question": "?"},
        {"image": 17, "question": "?"},
        {"image": "ok.png", "question": ["?"]},
        {"image": "ok.png", "question": "last"},
    ]
    report = preparation.prepare(write_tasks(rows), tmp_path / "run", model="m")
    assert (report.rows, report.requests, report.rejected) == (13, 2, 11)
    assert report.reasons == {"json": 4, "object": 2, "image": 3, "field": 2}
    assert [message.split(": ")[0] for message in reasons(tmp_path / "run")] == [
        f"tasks.jsonl:{line}" for line in (2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)
    ]
    messages = dict(message.split(": ", 1) for message in reasons(tmp_path / "run"))
    assert messages["tasks.jsonl:4"] == "not a JSON object but a list"
    assert messages["tasks.jsonl:9"] == "question field 'question' is missing; the row has image, frage"
    assert messages["tasks.jsonl:10"] == "image not found: none.png"
    assert messages["tasks.jsonl:11"] == "image is cut off (its end is missing): cut.png"
    assert messages["tasks.jsonl:12"] == "image field 'image' holds a number, not a path or a list of paths"
    kept = [line for line in (tmp_path / "tasks.jsonl").read_bytes().split(b"\n") if line]
    assert Run.open(tmp_path / "run").rows_path(0).read_bytes() == b"\n".join(kept) + b"\n"


def test_strict_stops_at_the_first_bad_row_and_what_is_sealed_stays(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "1"}, {"question": "2"}, {"nothing": "3"}, {"question": "4"}])
    with pytest.raises(InputError, match=r"^tasks\.jsonl:3: question field 'question' is missing"):
        preparation.prepare(tasks, tmp_path / "run", model="m", max_requests=2, strict=True)
    assert len(list(Run.open(tmp_path / "run").seals())) == 1
    report = preparation.prepare(tasks, tmp_path / "run", model="m", max_requests=2)
    assert (report.rows, report.requests, report.rejected) == (4, 3, 1)


@pytest.mark.parametrize("on_bad_image", ["reject", "text-only"])
def test_a_bad_image_rejects_the_row_or_leaves_its_text(
    on_bad_image: Any, write_tasks: WriteTasks, picture: Picture, tmp_path: Path
) -> None:
    picture("ok.png")
    rows = [{"image": ["ok.png", "none.png"], "question": "a"}, {"image": None, "question": "b"}, {"question": "c"}]
    report = preparation.prepare(
        write_tasks(rows), tmp_path / "run", model="m", image_field=("image",), on_bad_image=on_bad_image
    )
    contents = [request["body"]["messages"][0]["content"] for request in requests(tmp_path / "run")]
    assert contents == ([] if on_bad_image == "reject" else ["a", "b", "c"])
    assert report.rejected == (3 if on_bad_image == "reject" else 0)


def test_rows_without_an_image_are_text_only_unless_the_field_was_named(
    write_tasks: WriteTasks, tmp_path: Path
) -> None:
    report = preparation.prepare(
        write_tasks([{"question": "a"}, {"image": "", "question": "b"}]), tmp_path / "r", model="m"
    )
    assert report.requests == 2


def test_custom_ids_prove_the_row_and_are_the_same_every_time(write_tasks: WriteTasks, tmp_path: Path) -> None:
    rows = [
        {"a": 1, "b": "x", "question": "q"},
        {"a": 1, "b": "y", "question": "q"},
        {"a": 1, "b": "x", "question": "r"},
    ]
    tasks = write_tasks(rows)
    for name in ("one", "two"):
        preparation.prepare(tasks, tmp_path / name, model="m", id_fields=("a", "b"))
    one, two = ([request["custom_id"] for request in requests(tmp_path / name)] for name in ("one", "two"))
    assert one == two
    digests = [custom_id.partition("-")[2] for custom_id in one]
    assert digests[0] == digests[2] != digests[1]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", custom_id) for custom_id in one)


def test_a_named_id_field_that_is_missing_rejects_the_row(write_tasks: WriteTasks, tmp_path: Path) -> None:
    preparation.prepare(write_tasks([{"question": "q"}]), tmp_path / "run", model="m", id_fields=("key",))
    assert reasons(tmp_path / "run") == ["tasks.jsonl:1: id field 'key' is missing; the row has question"]


@pytest.mark.parametrize(
    ("keywords", "positions"),
    [
        ({"start": 2}, [2, 3, 4, 5, 6]),
        ({"end": 2}, [0, 1]),
        ({"start": 2, "end": 4}, [2, 3]),
        ({"start": 2, "limit": 3}, [2, 3, 4]),
        ({"start": 2, "end": 4, "limit": 3}, [2, 3]),
        ({"start": 9}, []),
        ({"limit": 0}, []),
    ],
)
def test_slices_keep_the_positions_of_the_file(
    keywords: PrepareKeywords, positions: list[int], write_tasks: WriteTasks, tmp_path: Path
) -> None:
    rows: list[dict[str, Any] | bytes] = [{"question": str(number)} for number in range(7)]
    rows.insert(1, b"  ")
    options: PrepareKeywords = {**keywords, "model": "m", "max_requests": 2}
    preparation.prepare(write_tasks(rows), tmp_path / "run", **options)
    made = requests(tmp_path / "run")
    assert [int(request["custom_id"].partition("-")[0]) for request in made] == positions
    assert [request["body"]["messages"][0]["content"] for request in made] == [str(number) for number in positions]


def test_limits_are_kept_and_checksums_guard_every_file(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "x" * (1 + number % 50)} for number in range(500)])
    preparation.prepare(tasks, tmp_path / "run", model="m", max_bytes=5000, max_requests=20)
    run = Run.open(tmp_path / "run")
    seals = list(run.seals())
    assert [seal.start for seal in seals] == [0] + [seal.end for seal in seals[:-1]]
    assert seals[-1].end == 500
    for seal in seals:
        assert seal.requests <= 20
        assert run.requests_path(seal.shard).stat().st_size == seal.requests_bytes <= 5000
        assert xxhash.xxh3_128_hexdigest(run.requests_path(seal.shard).read_bytes()) == seal.requests_checksum
        assert xxhash.xxh3_128_hexdigest(run.rows_path(seal.shard).read_bytes()) == seal.rows_checksum
        assert xxhash.xxh3_128_hexdigest(run.ids_path(seal.shard).read_bytes()) == seal.ids_checksum
        assert run.read_ids(seal) == [request["custom_id"] for request in lines(run.requests_path(seal.shard))]


def test_a_request_larger_than_a_shard_is_rejected(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "short"}, {"question": "x" * 3000}])
    preparation.prepare(tasks, tmp_path / "run", model="m", max_bytes=1000)
    (message,) = reasons(tmp_path / "run")
    assert re.fullmatch(r"tasks\.jsonl:2: the request has 3,\d+ bytes, a shard at most 1,000", message)


def test_the_number_of_workers_changes_nothing(write_tasks: WriteTasks, picture: Picture, tmp_path: Path) -> None:
    picture("1.png", size=(50, 40))
    rows: list[dict[str, Any] | bytes] = [{"id": n, "image": "1.png", "question": str(n)} for n in range(300)]
    rows[100] = b"broken"
    tasks = write_tasks(rows)
    for workers in (1, 3):
        preparation.prepare(tasks, tmp_path / f"{workers}", model="m", max_requests=70, max_side=20, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_plan_tells_what_prepare_makes_and_writes_nothing(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "x" * n} for n in range(100)] + [b"broken"])
    before = sorted(tmp_path.iterdir())
    planned = preparation.plan(tasks, model="m", max_bytes=3000)
    assert sorted(tmp_path.iterdir()) == before
    assert planned == preparation.prepare(tasks, tmp_path / "run", model="m", max_bytes=3000)


def test_prepare_again_does_nothing(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": str(n)} for n in range(10)])
    preparation.prepare(tasks, tmp_path / "run", model="m")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.json*") if path.is_file()}
    os.utime(tasks, (1, 1))  # only its time has changed: the checksums tell that the rows have not
    assert preparation.prepare(tasks, tmp_path / "run", model="m").already
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("lost", ["requests/00001.jsonl", "requests/00001.json", "rows/00002.jsonl", "rows/00000.ids"])
def test_what_was_lost_of_a_finished_run_is_made_again(lost: str, write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": str(n)} for n in range(10)])
    preparation.prepare(tasks, tmp_path / "run", model="m", max_requests=3)
    before = files(tmp_path / "run")
    (tmp_path / "run" / lost).unlink()
    assert not preparation.prepare(tasks, tmp_path / "run", model="m", max_requests=3).already
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize(
    "damaged", ["requests/00001.jsonl", "requests/00001.json", "rows/00002.jsonl", "rows/00000.ids"]
)
def test_what_was_cut_off_of_a_finished_run_is_made_again(
    damaged: str, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    tasks = write_tasks([{"question": str(n)} for n in range(10)])
    preparation.prepare(tasks, tmp_path / "run", model="m", max_requests=3)
    before = files(tmp_path / "run")
    os.truncate(tmp_path / "run" / damaged, 10)
    os.utime(tasks, (1, 1))  # as if the file had been copied: the rows are compared, too
    assert not preparation.prepare(tasks, tmp_path / "run", model="m", max_requests=3).already
    assert files(tmp_path / "run") == before


def test_a_run_that_was_stopped_before_its_manifest_is_made_by_the_same_command(
    write_tasks: WriteTasks, tmp_path: Path
) -> None:
    tasks = write_tasks([{"question": "a"}])
    for folder in ("rows", "requests", "leases"):
        (tmp_path / "run" / folder).mkdir(parents=True)
    (tmp_path / "run" / ".manifest.json.1-ab.tmp").write_bytes(b"{")
    assert preparation.prepare(tasks, tmp_path / "run", model="m").requests == 1
    (tmp_path / "other" / "rows").mkdir(parents=True)
    (tmp_path / "other" / "rows" / "mine.txt").write_text("years")
    with pytest.raises(RunError, match="exists and is not a run directory"):
        preparation.prepare(tasks, tmp_path / "other", model="m")


def cut_again(write_tasks: WriteTasks, picture: Picture, tmp_path: Path, *, sent: bool) -> list[tuple[int, int]]:
    """Prepare; lose a file; make images too large for a shard, which moves the cuts; prepare again. The row ranges."""
    tasks = write_tasks([{"question": "q", "image": str(picture(f"{n}.png"))} for n in range(10)])
    preparation.prepare(tasks, tmp_path / "run", model="m", max_bytes=1500)
    run = Run.open(tmp_path / "run")
    assert len(list(run.seals())) == 3
    if sent:
        run.write_job(Job(shard=0))
    run.requests_path(0).unlink()
    for number in range(9):
        picture(f"{number}.png", (1500, 1500))
    preparation.prepare(tasks, tmp_path / "run", model="m", max_bytes=1500)
    return [(seal.start, seal.end) for seal in run.seals()]


def test_cuts_that_changed_images_move_leave_no_row_twice(
    write_tasks: WriteTasks, picture: Picture, tmp_path: Path
) -> None:
    assert cut_again(write_tasks, picture, tmp_path, sent=False) == [(0, 10)]


def test_a_run_that_was_sent_is_not_cut_anew(write_tasks: WriteTasks, picture: Picture, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="shard 0: was sent, and would have other rows now"):
        cut_again(write_tasks, picture, tmp_path, sent=True)


def test_a_run_that_another_process_has_just_made_keeps_its_manifest(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def create(model: str) -> Run:
        manifest = Manifest(
            format=1, batchkit="0", created="", input=Input(uri="", bytes=0), model=model, backend="vllm", options={}
        )
        return Run.create(path, manifest)

    assert create("first").manifest.model == "first"
    assert create("second").manifest.model == "first"
    assert Run.open(path).manifest.model == "first"


def test_messages_of_rows_are_short_however_long_what_they_quote(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"k" * 100_000: 1}])
    preparation.prepare(tasks, tmp_path / "run", model="m")
    (message,) = reasons(tmp_path / "run")
    assert message.startswith("tasks.jsonl:1: question field 'question' is missing")
    assert len(message) < 1100


def test_a_copy_of_a_run_without_its_empty_folders_is_as_good(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "a"}])
    preparation.prepare(tasks, tmp_path / "run", model="m")
    for folder in ("jobs", "responses"):
        (tmp_path / "run" / folder).rmdir()
    with pytest.raises(RunError, match="prepared with --model m, now it is n"):
        preparation.prepare(tasks, tmp_path / "run", model="n")
    assert (tmp_path / "run" / "responses").is_dir()


def test_other_options_or_another_input_are_refused_with_a_hint(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "aa"}, {"question": "bb"}])
    preparation.prepare(tasks, tmp_path / "run", model="m")
    with pytest.raises(RunError, match="prepared with --max-side None, now it is 10") as caught:
        preparation.prepare(tasks, tmp_path / "run", model="m", max_side=10)
    assert caught.value.hint is not None
    with pytest.raises(RunError, match="prepared with --model m, now it is n"):
        preparation.prepare(tasks, tmp_path / "run", model="n")
    tasks.write_bytes(tasks.read_bytes().replace(b"bb", b"bc"))
    with pytest.raises(RunError, match="rows have changed since"):
        preparation.prepare(tasks, tmp_path / "run", model="m")
    write_tasks([{"question": "aaa"}, {"question": "bb"}])
    with pytest.raises(RunError, match="bytes when the run was prepared, now it has"):
        preparation.prepare(tasks, tmp_path / "run", model="m")


def test_a_directory_with_other_things_in_it_is_not_taken_for_a_run(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "a"}])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    with pytest.raises(RunError, match="exists and is not a run directory"):
        preparation.prepare(tasks, tmp_path / "full", model="m")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_two_prepares_at_once_are_refused_politely(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "a"}])
    preparation.prepare(tasks, tmp_path / "run", model="m")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunBusyError, match=f"held by process {process.pid} on "):
            preparation.prepare(tasks, tmp_path / "run", model="m")
        process.kill()
        process.wait()
    assert preparation.prepare(tasks, tmp_path / "run", model="m").already  # the dead block nobody


PREPARE = """
import sys
from batchkit import prepare
prepare(sys.argv[1], sys.argv[2], model="m", max_requests=100, max_side=40)
"""
HOLD = """
import sys, time
from batchkit.runs import Run
with Run.open(sys.argv[1]).lease("prepare"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_killed_again_and_again_it_ends_with_the_same_files(
    write_tasks: WriteTasks, picture: Picture, tmp_path: Path
) -> None:
    picture("1.png", size=(300, 300))
    rows: list[dict[str, Any] | bytes] = [{"id": n, "image": "1.png", "question": str(n)} for n in range(2500)]
    rows[::97] = [b"broken"] * len(rows[::97])
    tasks = write_tasks(rows)
    command = [sys.executable, "-c", PREPARE, str(tasks)]
    seals = tmp_path / "run" / "requests"
    killed = 0
    for wanted in (0, 3, 9, 15):
        with subprocess.Popen([*command, str(tmp_path / "run")], stderr=subprocess.PIPE) as process:
            while process.poll() is None and len(list(seals.glob("*.json"))) <= wanted:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    assert killed >= 3, "it must have been killed in the middle, or this test shows nothing"
    subprocess.run([*command, str(tmp_path / "run")], check=True)
    subprocess.run([*command, str(tmp_path / "undisturbed")], check=True)
    assert files(tmp_path / "run") == files(tmp_path / "undisturbed")


def test_workers_do_not_outlive_a_killed_parent(write_tasks: WriteTasks, picture: Picture, tmp_path: Path) -> None:
    import psutil

    for number in range(80):  # different ones: each is made smaller once
        picture(f"{number}.png", size=(1500, 1500 + number))
    tasks = write_tasks([{"image": f"{n % 80}.png", "question": str(n)} for n in range(2000)])
    with subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(tasks), str(tmp_path / "run")], stderr=subprocess.DEVNULL
    ) as process:
        children: list[psutil.Process] = []
        deadline = time.monotonic() + 30
        while not children and time.monotonic() < deadline:
            children = psutil.Process(process.pid).children(recursive=True)
            time.sleep(0.05)
        process.kill()
    assert children
    assert not psutil.wait_procs(children, timeout=10)[1]


MESSAGES = [{"role": "user", "content": "?"}]
BATCH = {"method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": MESSAGES}}


def test_a_batch_file_is_checked_sharded_and_kept_as_it_is(write_tasks: WriteTasks, tmp_path: Path) -> None:
    rows: list[dict[str, Any] | bytes] = [
        {"custom_id": "request-1", **BATCH},
        b' {"method" : "POST", "custom_id":"caf\xc3\xa9 2", "url":"/v1/embeddings",  "body":{"model":"m","input":1}}\r',
        {"custom_id": "request-1", **BATCH},
        {"custom_id": "request-3", **BATCH, "method": "GET"},
        {"custom_id": "request-4", **BATCH, "body": {"model": "other", "messages": MESSAGES}},
        {"custom_id": "request-5", **BATCH, "url": "/v1/images"},
        {"custom_id": 6, **BATCH},
        {"custom_id": "request-7", **BATCH, "url": "/v1/score", "body": {"model": "m", "text_1": "a", "text_2": "b"}},
        {"custom_id": "request-8", **BATCH, "body": {"model": "m", "messages": []}},
        {"custom_id": "request-9", **BATCH, "body": {"model": "m", "messages": ["?"]}},
    ]
    tasks = write_tasks(rows)
    preparation.prepare(tasks, tmp_path / "run", max_requests=4)
    run = Run.open(tmp_path / "run")
    assert run.manifest.model == "m"
    raw = tasks.read_bytes().split(b"\n")
    assert run.requests_path(0).read_bytes() == raw[0] + b"\n" + raw[1].strip() + b"\n"
    assert run.requests_path(1).read_bytes() == raw[7] + b"\n"
    assert reasons(tmp_path / "run") == [
        "tasks.jsonl:3: custom_id 'request-1' is that of line 1 already",
        "tasks.jsonl:4: method is 'GET', not 'POST'",
        "tasks.jsonl:5: body.model is 'other', but the run's model is 'm'",
        "tasks.jsonl:6: url '/v1/images' is none that vllm runs (" + ", ".join(LIMITS["vllm"].endpoints) + ")",
        "tasks.jsonl:7: custom_id is a number, not text on one line",
        "tasks.jsonl:9: body.messages is empty, not a list of messages",
        "tasks.jsonl:10: body.messages[0] is not an object with a role",
    ]
    assert run.read_ids(next(run.seals()))[:2] == ["request-1", "café 2"]


def test_a_repeated_custom_id_is_found_across_a_resume(write_tasks: WriteTasks, tmp_path: Path) -> None:
    rows: list[dict[str, Any] | bytes] = [{"custom_id": f"r{n % 3}", **BATCH} for n in range(4)]
    tasks = write_tasks(rows)
    preparation.prepare(tasks, tmp_path / "whole", max_requests=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "prepared.json").unlink()
    (tmp_path / "run" / "requests" / "00001.json").unlink()
    assert preparation.prepare(tasks, tmp_path / "run", max_requests=2).rejected == 1


def test_options_that_would_change_a_batch_file_are_refused(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"custom_id": "1", **BATCH}])
    with pytest.raises(UsageError, match="--max-side has no meaning"):
        preparation.prepare(tasks, tmp_path / "run", max_side=5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
        (b"id,question\n1,why\n", "is not JSONL: line 1 begins with 'id,question'"),
        (b'[{"question": 1}]\n', "holds a JSON array"),
        (b'{\n  "question": 1\n}\n', "spread over several lines"),
        (b'[\n{"question": 1},\n{"question": 2}\n]\n', "holds a JSON array"),
        (b"PAR1\x15\x04", "cannot be read as Parquet"),
        (b"\x1f\x8b\x08\x00\x00", "binary file"),
    ],
)
def test_a_file_of_another_kind_is_named_at_once(content: bytes, message: str, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        preparation.prepare(tasks, tmp_path / "run", model="m")
    assert not (tmp_path / "run").exists()


def test_a_missing_task_file_makes_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        preparation.prepare(tmp_path / "tasks.jsonl", tmp_path / "run", model="m")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("beginning", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [b"", None])
def test_line_ends_and_byte_order_marks_do_not_matter(
    ending: bytes, beginning: bytes, last: bytes | None, tmp_path: Path
) -> None:
    rows = ['{"question": "a\u2028b"}'.encode(), b'{"question": "c"}']
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_bytes(beginning + ending.join(rows) + (ending if last is None else last))
    preparation.prepare(tasks, tmp_path / "run", model="m")
    asked = [request["body"]["messages"][0]["content"] for request in requests(tmp_path / "run")]
    assert asked == ["a\u2028b", "c"]


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2"])
def test_compressed_task_files_are_read(ending: str, write_tasks: WriteTasks, tmp_path: Path) -> None:
    import smart_open

    plain = write_tasks([{"question": str(n)} for n in range(10)])
    with smart_open.open(str(plain) + ending, "wb") as stream:
        stream.write(plain.read_bytes())
    preparation.prepare(str(plain) + ending, tmp_path / "run", model="m", max_requests=3)
    (tmp_path / "run" / "prepared.json").unlink()
    for path in (tmp_path / "run" / "requests").glob("0000[23].json"):
        path.unlink()
    preparation.prepare(str(plain) + ending, tmp_path / "run", model="m", max_requests=3)  # on from the middle
    assert [r["body"]["messages"][0]["content"] for r in requests(tmp_path / "run")] == [str(n) for n in range(10)]


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("kept", [60, None])
def test_a_compressed_file_that_is_cut_off_or_none_is_named(kept: int | None, ending: str, tmp_path: Path) -> None:
    import smart_open

    path = tmp_path / f"tasks.jsonl{ending}"
    with smart_open.open(path, "wb") as stream:
        stream.write(b'{"question": "a"}\n' + os.urandom(1000))
    path.write_bytes(path.read_bytes()[:kept] if kept else b'{"question": "a"}\n' * 10)
    with pytest.raises(InputError, match="cannot be read") as caught:
        preparation.prepare(path, tmp_path / "run", model="m")
    assert path.name in caught.value.message


def test_a_pipe_is_refused_as_a_task_file_because_it_is_read_more_than_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe or a device"):
        preparation.prepare(tmp_path / "pipe", tmp_path / "run", model="m")
    with pytest.raises(InputError, match="is a pipe or a device"):
        merge_pile(tmp_path / "pipe", ["x"], output=tmp_path / "results.jsonl")


@pytest.mark.parametrize(
    "template",
    ["{{ nothing }}", "{{ question.__class__.__mro__ }}", "{{ 1 / 0 }}", "{% if 0 %}x{% endif %}", r"{{ '\ud800' }}"],
)
def test_a_template_that_fails_on_a_row_rejects_the_row(template: str, write_tasks: WriteTasks, tmp_path: Path) -> None:
    report = preparation.prepare(
        write_tasks([{"question": "a"}]), tmp_path / "run", model="m", prompt_template=template
    )
    assert report.reasons == {"template": 1}


def test_a_template_with_a_syntax_error_stops_before_anything_is_made(write_tasks: WriteTasks, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--prompt-template, line 1"):
        preparation.prepare(
            write_tasks([{"question": "a"}]), tmp_path / "run", model="m", prompt_template="{{ question"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("taken", ["model", "messages", "stream"])
def test_extra_body_may_not_set_what_is_ours(taken: str, write_tasks: WriteTasks, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"may not set '{taken}'"):
        preparation.prepare(write_tasks([{"question": "a"}]), tmp_path / "run", model="m", extra_body={taken: 1})


def test_wrong_options_are_named_as_on_the_command_line(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "a"}])
    with pytest.raises(UsageError, match="--image-quality: Input should be less than or equal to 100"):
        preparation.prepare(tasks, tmp_path / "run", model="m", image_quality=101)
    with pytest.raises(UsageError, match="no model is named"):
        preparation.prepare(tasks, tmp_path / "run")


def test_names_of_ours_that_rows_use_are_told(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "a", "model": 1}, {"no question": "b", "error": 2}])
    report = preparation.prepare(tasks, tmp_path / "run", model="m", max_requests=1)
    assert report.names_in_use == ["error", "model"]
    prepared = Run.open(tmp_path / "run").prepared()
    assert prepared is not None
    assert prepared.names_in_use == ["error", "model"]


def test_the_keyword_types_are_those_of_the_options() -> None:
    assert set(PrepareKeywords.__annotations__) == set(PrepareOptions.model_fields)


def test_a_full_disk_is_told_and_the_next_call_goes_on(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "x" * 1000} for _ in range(3000)])
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from batchkit.cli import main; sys.argv = ['batchkit', 'prepare', *sys.argv[1:]]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, str(tasks), str(tmp_path / "run"), "--model", "m"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Error: " in done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run" / "requests").iterdir())
    assert preparation.prepare(tasks, tmp_path / "run", model="m").requests == 3000


def test_no_room_for_the_custom_ids_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def small(name: str, isolation_level: None) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(name, isolation_level=isolation_level)
        connection.execute("PRAGMA max_page_count = 3")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(StorageError, match="custom_ids cannot be written: database or disk is full"):
        IdsSeen().update(str(number) for number in range(10_000))
    seen, row = IdsSeen(), Row(0, 1, b"{}", 3)
    with pytest.raises(StorageError, match="custom_ids cannot be written: database or disk is full"):
        deque((seen.check(row, Converted(str(number), b"{}")) for number in range(10_000)), maxlen=0)
