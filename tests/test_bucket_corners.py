"""What is rare with buckets: pictures that change, images of an earlier merge elsewhere, evaluations, refusals."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from batchkit import live_submission, ranges, s3
from batchkit.cli import main
from batchkit.client import Pacing
from batchkit.evaluation import evaluate
from batchkit.inference import infer
from batchkit.jobs import Attempt
from batchkit.merging import merge
from batchkit.preparation import prepare
from batchkit.runs import Run
from tests import fake_server, s3_servers
from tests.conftest import WriteTasks
from tests.fake_server import Server
from tests.made_runs import response_line
from tests.test_generated_images import BLUE, RED, chat, part
from tests.test_s3_runs import Bucket, task_lines


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_servers.moto(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture
def bucket(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Bucket:
    name = f"b-{abs(hash(request.node.nodeid)) % 10**12}"
    return Bucket(name, moto, tmp_path / "machines", monkeypatch)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(live_submission, "PACING", Pacing(timeout=5.0, patience=0.5))
    with fake_server.running() as server:
        yield server


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


def answered_run(bucket: Bucket, *, rows: int = 3) -> Run:
    """A run of one shard, prepared and not sent."""
    tasks = bucket.put("in/tasks.jsonl", task_lines(rows))
    prepare(tasks, bucket.uri("runs/one"), model="m", workers=1)
    return Run.open(bucket.uri("runs/one"))


def add_attempt(run: Run, lines: list[bytes]) -> None:
    """An attempt at the first shard, and what came back."""
    (seal,) = run.seals()
    job = run.job(0)
    number = len(job.attempts) + 1
    rows = [(seal.start, seal.end)]
    job.attempts.append(Attempt(number=number, backend="vllm", state="collected", rows=rows, started="2026-01-01"))
    run.write_job(job)
    s3.put(f"{run.name}/responses/00000.{number}.jsonl", b"".join(line + b"\n" for line in lines))


# -- images that a model made ------------------------------------------------------------------------------------------


def test_images_of_an_earlier_merge_on_another_machine_leave_the_bucket(bucket: Bucket) -> None:
    run = answered_run(bucket)
    ids = run.read_ids(next(run.seals()))
    add_attempt(run, [chat(ids[0], [part(RED)]), chat(ids[1], [part(RED), part(BLUE)])])
    merge(run.name)
    folder = "runs/one/output_images/"
    made = [f"{folder}{name}" for name in ("0/output_image_1.png", "1/output_image_1.png", "1/output_image_2.png")]
    assert bucket.names(folder) == made
    bucket.put(f"{folder}notes.txt", b"mine")
    bucket.on("second")
    add_attempt(Run.open(run.name), [chat(ids[1], [part(BLUE)])])
    merge(run.name)
    assert bucket.names(folder) == [*made[:2], f"{folder}notes.txt"]
    assert bucket.get(f"{folder}1/output_image_1.png") == BLUE
    bucket.on("third")
    add_attempt(Run.open(run.name), [chat(one, "no image") for one in ids])
    merge(run.name)
    assert bucket.names(folder) == [f"{folder}notes.txt"]


def test_images_beside_results_in_a_bucket_go_with_the_next_merge_elsewhere(bucket: Bucket) -> None:
    run = answered_run(bucket)
    ids = run.read_ids(next(run.seals()))
    add_attempt(run, [chat(ids[0], [part(RED)])])
    output = bucket.uri("out/results.jsonl")
    merge(run.name, output=output)
    assert "out/output_images/0/output_image_1.png" in bucket.names("out/")
    add_attempt(Run.open(run.name), [chat(one, "no image") for one in ids])
    assert call("merge", run.name, "-o", output).exit_code == 0
    assert not bucket.names("out/output_images/")


def test_images_that_a_model_made_are_copied_by_an_evaluation_elsewhere_and_merged_again_there(bucket: Bucket) -> None:
    run = answered_run(bucket)
    ids = run.read_ids(next(run.seals()))
    add_attempt(run, [chat(ids[0], [part(RED)])])
    merge(run.name)
    bucket.on("second")
    found = evaluate(run.name, copy_images=True)
    assert (found.lost, found.folder) == (0, f"{run.name}/evaluation")
    assert bucket.get("runs/one/evaluation/output_images/0/output_image_1.png") == RED
    add_attempt(Run.open(run.name), [chat(ids[0], [part(BLUE)])])
    merge(run.name)
    assert bucket.get("runs/one/output_images/0/output_image_1.png") == BLUE


# -- evaluate ----------------------------------------------------------------------------------------------------------


def results_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    ours = {"model": "m", "raw_response": "x", "parsed_answer": "x", "error": None, "batchkit": {"verdict": "answered"}}
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps({**row, **ours}) + "\n" for row in rows))
    return path


def test_evaluate_fetches_the_pictures_of_rows_and_names_those_that_cannot_be_had(
    bucket: Bucket, tmp_path: Path
) -> None:
    red, blue = png("red"), png("blue")
    bucket.put("photos/blue.png", blue)
    named = {"Bucket": bucket.name, "Key": "photos/blue.png"}
    signed = s3.client().generate_presigned_url("get_object", named)
    rows: list[dict[str, Any]] = [
        {"image": bucket.put("photos/red.png", red), "question": "?"},
        {"image": [signed, "red.png"], "question": "?"},
        {"image": signed.replace("blue.png", "gone.png"), "question": "?"},
        {"image": bucket.uri("photos/gone.png"), "question": "?"},
    ]
    results = results_file(tmp_path, rows)
    done = call("evaluate", "--results", results, "--copy-images", "--image-root", bucket.uri("photos/"),
                "--allow-private-hosts")  # fmt: skip
    assert done.exit_code == 0, done.output
    copied = tmp_path / "evaluation" / "output_images"
    assert (copied / "0" / "problem_image_1.png").read_bytes() == red
    assert [(copied / "1" / f"problem_image_{n}.png").read_bytes() for n in (1, 2)] == [blue, red]
    assert "2 images could not be copied" in done.stderr
    assert f"results.jsonl:3: image not found: {bucket.url}/{bucket.name}/photos/gone.png (404)" in done.stderr
    assert f"results.jsonl:4: image not found: {bucket.uri('photos/gone.png')}" in done.stderr
    said = [done.output, *((tmp_path / "evaluation" / name).read_text() for name in
                           ("evaluation_data.json", "statistics.json", "summary.json"))]  # fmt: skip
    assert not any("Signature" in text for text in said)


def test_evaluate_takes_the_pictures_of_a_run_from_its_requests_where_their_addresses_are_gone(
    bucket: Bucket, server: Server, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    red = png("red")
    tasks = write_tasks([{"image": bucket.put("photos/red.png", red), "question": "?", "answer": "x"}])
    done = call("run", tasks, tmp_path / "run", "--model", "m", "--backend", "server", "--endpoints", server.url)
    assert done.exit_code == 0, done.output
    s3.delete(bucket.uri("photos/red.png"))
    found = evaluate(tmp_path / "run", copy_images=True)
    assert found.lost == 0
    assert (tmp_path / "run/evaluation/output_images/0/problem_image_1.png").read_bytes() == red


def test_results_in_a_bucket_are_evaluated_with_the_images_beside_them(bucket: Bucket, tmp_path: Path) -> None:
    run = answered_run(bucket)
    ids = run.read_ids(next(run.seals()))
    add_attempt(run, [chat(ids[0], [part(RED)])])
    merge(run.name, output=bucket.uri("out/results.jsonl"))
    found = evaluate(results=bucket.uri("out/results.jsonl"), output=tmp_path / "found", copy_images=True)
    assert found.lost == 0
    assert (tmp_path / "found/output_images/0/output_image_1.png").read_bytes() == RED


# -- infer -------------------------------------------------------------------------------------------------------------


def test_infer_asks_again_when_another_picture_is_behind_the_same_key(
    bucket: Bucket, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = bucket.put("photos/a.png", png("red"))
    for count, root in enumerate((None, bucket.uri("photos")), 1):
        rows = [{"image": uri if root is None else "a.png", "question": f"what {count}?"}]
        options = {} if root is None else {"image_root": root}
        bucket.put("photos/a.png", png("red"))
        for colour, asked in (("red", 1), ("red", 1), ("blue", 2), ("red", 2)):
            bucket.put("photos/a.png", png(colour))
            assert infer(rows, model="m", endpoints=[server.url], prepare_options=options)[0] is not None
            assert server.asked[f"what {count}?"] == asked


def test_infer_keeps_a_run_in_a_bucket_and_goes_on_with_it_on_another_machine(bucket: Bucket, server: Server) -> None:
    rows = [{"question": f"q{n}"} for n in range(5)]
    run = bucket.uri("runs/mine")
    first = infer(rows, model="m", run=run, only=[0, 1], endpoints=[server.url])
    assert len(first) == 2
    bucket.on("second")
    answers = infer(rows, model="m", run=run + "/", endpoints=[server.url])
    assert None not in answers.values()
    assert {0: answers[0], 1: answers[1]} == first
    assert set(server.asked.values()) == {1}
    assert "runs/mine/results.jsonl" in bucket.names("runs/mine/")
    with pytest.raises(Exception, match=r"a run is a local folder, or in a bucket"):
        infer(rows, model="m", run="https://host/run")


# -- task files --------------------------------------------------------------------------------------------------------


def parquet_file(path: Path, rows: int, *, size: int = 8) -> bytes:
    """With images in it, in several row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": png(f"#{n:06x}") + os.urandom(size), "path": None} for n in range(rows)]
    table = pa.table({"id": list(range(rows)), "image": images, "question": [f"q{n}" for n in range(rows)]})
    pq.write_table(table, path, row_group_size=max(1, rows // 4))
    return path.read_bytes()


def sent(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((run / "requests").glob("*.jsonl"))]


def test_parquet_in_a_bucket_and_behind_a_signed_address_is_read_as_a_local_file(
    bucket: Bucket, tmp_path: Path
) -> None:
    local = tmp_path / "tasks.parquet"
    uri = bucket.put("in/tasks.parquet", parquet_file(local, 40))
    signed = s3.client().generate_presigned_url("get_object", {"Bucket": bucket.name, "Key": "in/tasks.parquet"})
    for name, source in (("local", str(local)), ("s3", uri), ("web", signed)):
        done = call("prepare", source, tmp_path / name, "--model", "m", "--max-requests", "15", "--end", "35")
        assert done.exit_code == 0, done.output
        assert "35 requests of 35 rows" in done.output
        assert "Signature" not in done.output
        assert sent(tmp_path / name) == sent(tmp_path / "local")
    assert call("prepare", uri, tmp_path / "s3", "--model", "m", "--max-requests", "15", "--end", "35").exit_code == 0
    assert not any(b"Signature" in path.read_bytes() for path in (tmp_path / "web").rglob("*") if path.is_file())


def test_a_parquet_file_that_changes_while_it_is_read_ends_the_reading(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = bucket.put("in/tasks.parquet", parquet_file(tmp_path / "one.parquet", 40, size=5000))
    other = parquet_file(tmp_path / "other.parquet", 40, size=5000)
    monkeypatch.setattr(ranges, "BUFFER_BYTES", 20_000)
    pieces = []
    get_piece = s3.get_piece

    def piece(*arguments: Any) -> bytes:
        pieces.append(len(get_piece(*arguments)))
        if sum(pieces) > 150_000:
            bucket.put("in/tasks.parquet", other)
        return get_piece(*arguments)

    monkeypatch.setattr(s3, "get_piece", piece)
    done = call("prepare", uri, tmp_path / "run", "--model", "m", "--workers", "1")
    assert done.exit_code == 1
    assert f"Error: {uri}: was changed by somebody else" in done.stderr
    assert max(pieces) < 70_000  # of 200 kB: nothing is read whole


def test_a_server_that_gives_no_parts_of_a_file_is_named(tmp_path: Path) -> None:
    with website({"/tasks.parquet": parquet_file(tmp_path / "tasks.parquet", 4)}) as url:
        done = call("prepare", f"{url}/tasks.parquet?token=secret", tmp_path / "run", "--model", "m")
    assert done.exit_code == 1
    assert f"Error: {url}/tasks.parquet: its server gives no parts of a file" in done.stderr
    assert "hint: download it first" in done.stderr
    assert "secret" not in done.stderr


@contextlib.contextmanager
def website(files: dict[str, bytes]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            body = files[self.path.partition("?")[0]]
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("tasks.jsonl", b'[\n{"question": "?"}\n]', "holds a JSON array"),
        ("tasks.jsonl", b"\x00\x01\x02", "is a binary file"),
        ("tasks.csv", b"a,a\n1,2\n", "two columns are named 'a'"),
        ("tasks.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
        ("tasks.jsonl", b"", "has no rows"),
    ],
)
def test_a_task_file_that_is_none_is_named_without_its_signature(
    name: str, body: bytes, message: str, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.put(f"in/{name}", body)
    signed = s3.client().generate_presigned_url("get_object", {"Bucket": bucket.name, "Key": f"in/{name}"})
    done = call("prepare", signed, tmp_path / "run", "--model", "m")
    assert done.exit_code == 1, done.output
    assert f"Error: {bucket.url}/{bucket.name}/in/{name}: " in done.stderr
    assert message in done.stderr
    assert "Signature" not in done.output


def test_rows_of_a_plan_are_named_without_the_signature_of_their_file(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("in/tasks.jsonl", b'{"image": "s3://", "question": "?"}\n')
    signed = s3.client().generate_presigned_url("get_object", {"Bucket": bucket.name, "Key": "in/tasks.jsonl"})
    done = call("prepare", signed, tmp_path / "run", "--model", "m", "--plan")
    assert "tasks.jsonl:1: " in done.stderr
    assert "Signature" not in done.output


def test_wildcards_name_responses_in_a_bucket_and_no_task_file(bucket: Bucket, tmp_path: Path) -> None:
    tasks = bucket.put("in/tasks.jsonl", task_lines(6))
    for number in range(6):
        folder = "deep/er/" if number % 2 else ""
        bucket.put(f"out/{folder}part-{number}.jsonl", response_line(str(number), f"answer {number}") + b"\n")
    bucket.put("out/other.txt", b"no response\n")
    everything = ("merge", "--tasks", tasks, "-o", tmp_path / "results.jsonl", "--responses")
    assert "answered 6" in call(*everything, bucket.uri("out/**/part-?.jsonl")).stderr
    some = call(*everything, bucket.uri("out/part-[0-3].jsonl"))
    assert (some.exit_code, "answered 2" in some.stderr) == (3, True)
    none = call(*everything, bucket.uri("out/gone-*.jsonl"))
    assert f"Error: {bucket.uri('out/gone-*.jsonl')}: no such object" in none.stderr
    for pattern in (bucket.uri("in/*.jsonl"), str(tmp_path / "*.jsonl")):
        done = call("prepare", pattern, tmp_path / "run", "--model", "m")
        assert (done.exit_code, f"Error: {pattern}: a run has one task file" in done.stderr) == (1, True)
    odd = bucket.put("in/what*?.jsonl", task_lines(2))
    assert call("prepare", odd, tmp_path / "run", "--model", "m").exit_code == 0


# -- the local copy of a run -------------------------------------------------------------------------------------------


def test_work_dir_says_where_the_local_copy_is_for_one_command(bucket: Bucket, tmp_path: Path) -> None:
    tasks = bucket.put("in/tasks.jsonl", task_lines(2))
    run, place = bucket.uri("runs/one"), tmp_path / "large"
    assert call("prepare", tasks, run, "--model", "m", "--work-dir", place).exit_code == 0
    assert list(place.glob("one-*/rows/00000.jsonl"))
    assert not (bucket.folder / "first").exists()
    assert call("status", run).exit_code == 8
    assert list((bucket.folder / "first").glob("one-*"))
    assert os.environ["BATCHKIT_WORK_DIR"] == str(bucket.folder / "first")
    (tmp_path / "file").touch()
    done = call("status", run, "--work-dir", tmp_path / "file")
    assert (done.exit_code, "hint: --work-dir DIR" in done.stderr) == (1, True)


@pytest.mark.parametrize("name", list(main.commands))
def test_every_verb_takes_a_work_dir(name: str) -> None:
    assert "--work-dir" in [option for parameter in main.commands[name].params for option in parameter.opts]
