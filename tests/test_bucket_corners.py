"""What is rare with buckets: pictures that change, images of an earlier merge elsewhere, evaluations, refusals."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from batchkit import live_submission, s3
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
