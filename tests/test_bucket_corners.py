"""What is rare with buckets: pictures that change, images of an earlier merge elsewhere, evaluations, refusals."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from batchkit import ranges, s3
from batchkit.cli import main
from batchkit.evaluation import evaluate
from batchkit.inference import infer
from batchkit.jobs import Attempt, Job
from batchkit.merging import merge
from batchkit.preparation import prepare
from batchkit.responses import Verdict
from batchkit.runs import Run
from batchkit.submission import submit
from tests import s3_servers
from tests.conftest import WriteTasks
from tests.fake_server import Server
from tests.made_runs import response_line, task_lines
from tests.s3_servers import Bucket
from tests.test_generated_images import BLUE, RED, chat, part


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
    assert "answered 3" in call(*everything, bucket.uri("out/part-[[^0-9].jsonl")).stderr, "letters, and nothing more"
    wrong = call(*everything, bucket.uri("out/part-[3-0].jsonl"))
    assert (
        wrong.exit_code,
        f"Error: {bucket.uri('out/part-[3-0].jsonl')}: bad character range 3-0" in wrong.stderr,
    ) == (2, True)
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


# -- what a server refuses ---------------------------------------------------------------------------------------------


Key = tuple[str, str]


class Strict:
    """A server that asks who does what: every key is of a user with a policy of its own."""

    def __init__(self, url: str, patch: pytest.MonkeyPatch) -> None:
        self.url = url
        self._patch = patch

    def use(self, *allowed: str, key: Key | None = None) -> None:
        """Go on as a user who may do this alone: `ACTION NAMES`, as `GetObject in/*`."""
        name, secret = key or _make_user(self.url, allowed)
        self._patch.setenv("AWS_ACCESS_KEY_ID", name)
        self._patch.setenv("AWS_SECRET_ACCESS_KEY", secret)


def _make_user(url: str, allowed: Sequence[str]) -> Key:
    pairs = [one.partition(" ") for one in allowed]
    statements = [
        {"Effect": "Allow", "Action": f"s3:{action}", "Resource": f"arn:aws:s3:::bucket{names and '/' + names}"}
        for action, _, names in pairs
    ]
    return _user(url, _ADMINS[url], statements)


def _user(url: str, by: Key, statements: list[dict[str, str]]) -> Key:
    import boto3

    known = {"aws_access_key_id": by[0], "aws_secret_access_key": by[1], "region_name": "us-east-1"}
    iam = boto3.client("iam", endpoint_url=url, **known)
    name = f"user-{time.monotonic_ns()}"
    iam.create_user(UserName=name)
    policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
    iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=policy)
    made = iam.create_access_key(UserName=name)["AccessKey"]
    return made["AccessKeyId"], made["SecretAccessKey"]


_ADMINS: dict[str, Key] = {}


@pytest.fixture(scope="module")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import boto3

    with s3_servers.moto(tmp_path_factory.mktemp("strict")) as url:
        known = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=url, **known).create_bucket(Bucket="bucket")
        _ADMINS[url] = _user(url, ("x", "x"), [{"Effect": "Allow", "Action": "*", "Resource": "*"}])
        begin = urllib.request.Request(f"{url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})  # noqa: S310  # loopback
        with urllib.request.urlopen(begin):  # noqa: S310  # from now on everybody is asked who they are
            pass
        yield url


@pytest.fixture
def strict(strict_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Strict:
    for name, value in s3_servers.environment(strict_server, tmp_path / "work").items():
        monkeypatch.setenv(name, value)
    strict = Strict(strict_server, monkeypatch)
    strict.use(key=_ADMINS[strict_server])
    for found in list(s3.listed("s3://bucket/")):
        s3.delete(f"s3://bucket/{found.name}")
    return strict


def test_images_that_may_not_be_read_reject_their_rows_and_no_others(strict: Strict, tmp_path: Path) -> None:
    rows = [{"image": f"s3://bucket/{name}.png", "question": "?"} for name in ("open/a", "secret/b", "open/c")]
    for row in rows:
        s3.put(row["image"], png("red"))
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    strict.use("GetObject open/*")
    done = call("prepare", tasks, tmp_path / "run", "--model", "m")
    assert done.exit_code == 0, done.output
    assert "prepared 2 requests of 3 rows" in done.stderr
    assert "tasks.jsonl:2: image cannot be fetched: s3://bucket/secret/b.png: access denied" in done.stderr
    assert "let them (IAM: s3:GetObject on bucket), or use others: aws configure" in done.stderr


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_a_key_or_a_secret_that_the_server_does_not_know_stops_everything_and_names_the_object(
    code: str, strict: Strict, tmp_path: Path
) -> None:
    s3.put("s3://bucket/a.png", png("red"))
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"image": "s3://bucket/a.png", "question": "?"}\n')
    keys = {"InvalidAccessKeyId": ("AKIANOBODYNOBODY", "x"), "SignatureDoesNotMatch": (_ADMINS[strict.url][0], "wrong")}
    strict.use(key=keys[code])
    for arguments, named in (
        (("prepare", tasks, tmp_path / "run", "--model", "m"), "s3://bucket/a.png"),
        (("prepare", "s3://bucket/in/tasks.jsonl", tmp_path / "other", "--model", "m"), "s3://bucket/in/tasks.jsonl"),
        (("status", "s3://bucket/run"), "s3://bucket/run/"),
        (("submit", "s3://bucket/run"), "s3://bucket/run/"),
    ):
        done = call(*arguments)
        assert done.exit_code == 4, done.output
        assert f"Error: {named}: the credentials are not taken ({code})" in done.stderr
        assert "hint: aws configure, aws sso login" in done.stderr
    assert not list(Run.open(tmp_path / "run").seals())


@pytest.mark.parametrize(
    ("allowed", "verb", "message"),
    [
        (["GetBucketLocation"], "status", "s3://bucket/run/: access denied: these credentials may not list it"),
        (["ListBucket"], "status", "s3://bucket/run/manifest.json: access denied: these credentials may not read it"),
        (["ListBucket", "GetObject *"], "merge", ": access denied: these credentials may not write it"),
        (["ListBucket", "GetObject *"], "presign", ": access denied: these credentials may not write it"),
        (["PutObject *", "GetObject *"], "prepare", "s3://bucket/new/: access denied: these credentials may not list"),
    ],
)
def test_a_run_that_these_credentials_may_not_touch_is_named_with_the_permission(
    *, allowed: list[str], verb: str, message: str, strict: Strict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    s3.put("s3://bucket/in/tasks.jsonl", task_lines(3))
    prepare("s3://bucket/in/tasks.jsonl", "s3://bucket/run", model="m", workers=1)
    before = {found for found in s3.listed("s3://bucket/") if "leases" not in found.name}
    strict.use(*allowed)
    monkeypatch.setenv("BATCHKIT_WORK_DIR", str(tmp_path / "second"))
    more = ["s3://bucket/new", "--model", "m"] if verb == "prepare" else []
    done = call(verb, "s3://bucket/in/tasks.jsonl" if verb == "prepare" else "s3://bucket/run", *more)
    assert done.exit_code == 1, done.output
    assert "Error: s3://bucket/" in done.stderr
    assert message in done.stderr
    needed = {"list": "s3:ListBucket", "read": "s3:GetObject", "write": "s3:PutObject"}
    assert (
        f"hint: let them (IAM: {next(needed[word] for word in needed if f'may not {word}' in message)} on bucket)"
        in (done.stderr)
    )
    assert "Traceback" not in done.output
    strict.use(key=_ADMINS[strict.url])
    assert {found for found in s3.listed("s3://bucket/") if "leases" not in found.name} == before


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "RequestTimeTooSkewed", "this machine's clock is off, and the server refuses its requests"),
        (404, "NoSuchBucket", "there is no bucket bucket at http://127.0.0.1"),
    ],
)
def test_a_clock_that_is_off_and_a_bucket_that_is_not_there_are_named_by_every_verb(
    *, status: int, code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_bytes(task_lines(2))
    with s3_servers.refusing(status, code) as url:
        for name, value in s3_servers.environment(url, tmp_path / "work").items():
            monkeypatch.setenv(name, value)
        for arguments, named in (
            (("prepare", "s3://bucket/tasks.jsonl", tmp_path / "run", "--model", "m"), "s3://bucket/tasks.jsonl"),
            (("prepare", tasks, "s3://bucket/run", "--model", "m"), "s3://bucket/run/"),
            (("presign", "s3://bucket/tasks.jsonl"), "s3://bucket/tasks.jsonl"),
            (("presign", "s3://bucket/run", "--shards", "1/2"), "s3://bucket/run/"),
            (("merge", "--tasks", tasks, "--responses", "s3://bucket/out.jsonl", "-o", tmp_path / "r.jsonl"),
             "s3://bucket/out.jsonl"),
            (("merge", "--tasks", tasks, "--responses", "s3://bucket/o/*.jsonl", "-o", tmp_path / "r.jsonl"),
             "s3://bucket/o/"),
        ):  # fmt: skip
            done = call(*arguments)
            assert done.exit_code == 1, (arguments, done.output)
            assert f"Error: {named}: {message}" in done.stderr, arguments
            assert "\n\nhint: " in done.stderr


def expiring(bucket: str, key: str) -> str:
    """A URL that holds for a second."""
    return str(s3.client().generate_presigned_url("get_object", {"Bucket": bucket, "Key": key}, 1))


def test_a_url_that_has_expired_is_named_for_task_files_images_and_responses_by_a_server_that_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_servers.ministack(tmp_path / "server") as url:
        bucket = Bucket("checked", url, tmp_path / "machines", monkeypatch)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        tasks = bucket.put("tasks.jsonl", task_lines(2))
        signed = expiring(bucket.name, "tasks.jsonl")
        bucket.put("a.png", png("red"))
        image = expiring(bucket.name, "a.png")
        time.sleep(2.1)
        done = call("prepare", signed, tmp_path / "run", "--model", "m")
        assert f"Error: {url}/checked/tasks.jsonl: the server says 403" in done.stderr
        assert "hint: it may have expired" in done.stderr
        local = tmp_path / "tasks.jsonl"
        local.write_text(json.dumps({"image": image, "question": "?"}) + "\n")
        done = call("prepare", local, tmp_path / "run", "--model", "m", "--allow-private-hosts")
        assert f"{url}/checked/a.png: its signature has expired (403): sign it anew" in done.stderr
        done = call("merge", "--tasks", tasks, "--responses", signed, "-o", tmp_path / "results.jsonl")
        assert f"Error: {url}/checked/tasks.jsonl: the server says 403" in done.stderr
        assert "Signature" not in done.output


def test_a_script_whose_urls_have_expired_says_how_to_make_new_ones(bucket: Bucket, tmp_path: Path) -> None:
    answered_run(bucket)
    script = tmp_path / "run.sh"
    assert call("presign", bucket.uri("runs/one"), "-o", script, "--expires", "1h").exit_code == 0
    later = tmp_path / "bin" / "date"
    later.parent.mkdir()
    later.write_text("#!/bin/sh\necho 99999999999\n")
    later.chmod(0o700)
    done = subprocess.run(
        ["/bin/sh", str(script)], env={"PATH": str(later.parent)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "the URLs in here expired at 20" in done.stderr
    assert "batchkit presign --again makes new ones" in done.stderr


# -- answers that were taken over, deleted requests, stale files -------------------------------------------------------


def reused_run(bucket: Bucket, server: Server) -> Run:
    """A run in a bucket of which the last seal was lost, whose answers are all of another run."""
    tasks = bucket.put("in/tasks.jsonl", task_lines(6))
    for name in ("old", "one"):
        reuse = () if name == "old" else (bucket.uri("runs/old"),)
        prepare(tasks, bucket.uri(f"runs/{name}"), model="m", backend="server", max_requests=3, workers=1, reuse=reuse)
        if name == "old":
            submit(bucket.uri("runs/old"), endpoints=[server.url])
    run = Run.open(bucket.uri("runs/one"))
    assert [seal.reused for seal in run.seals()] == [{bucket.uri("runs/old"): 3}] * 2
    return run


def prepare_again(bucket: Bucket) -> Any:
    return prepare(bucket.uri("in/tasks.jsonl"), bucket.uri("runs/one"), model="m", backend="server", max_requests=3,
                   workers=1, reuse=(bucket.uri("runs/old"),))  # fmt: skip


@pytest.mark.parametrize("lost", [["jobs/00001.json"], []], ids=["job", "nothing"])
def test_a_shard_with_answers_of_another_run_is_made_again_on_another_machine(
    lost: list[str], bucket: Bucket, server: Server
) -> None:
    reused_run(bucket, server)
    for name in ("prepared.json", "requests/00001.json", *lost):
        s3.delete(bucket.uri(f"runs/one/{name}"))
    bucket.on("second")
    report = prepare_again(bucket)
    assert (report.requests, report.to_send, report.reused) == (6, 0, {bucket.uri("runs/old"): 6})
    assert bucket.names("runs/one/responses/") == [
        "runs/one/responses/00000.1.jsonl",
        "runs/one/responses/00001.1.jsonl",
    ]
    assert merge(bucket.uri("runs/one")).verdicts[Verdict.ANSWERED] == 6
    assert set(server.asked.values()) == {1}


def test_a_damaged_shard_keeps_the_answers_that_it_had_of_another_run(bucket: Bucket, server: Server) -> None:
    run = reused_run(bucket, server)
    s3.delete(f"{run.name}/rows/00000.jsonl")
    s3.delete(f"{bucket.uri('runs/old')}/responses/00000.1.jsonl")  # they could not be taken over anew
    bucket.on("second")
    prepare_again(bucket)
    assert merge(run.name).verdicts[Verdict.ANSWERED] == 6


def test_a_stale_file_of_this_machine_never_hides_what_another_has_answered(bucket: Bucket, server: Server) -> None:
    run = answered_run(bucket)
    ids = run.read_ids(next(run.seals()))
    began = "2026-01-01T00:00:00+00:00"
    job = Job(shard=0, attempts=[Attempt(number=1, backend="server", state="running", rows=[(0, 3)], started=began)])
    run.write_job(job)
    lines = [response_line(one, f"of the other machine {one}") + b"\n" for one in ids]
    stale = run.responses_path(0, 1)
    stale.write_bytes(response_line(ids[0], "stale") + b"\n")
    for number, line in enumerate(lines, 1):
        bucket.put(f"runs/one/responses/00000.1.jsonl.part-{number:05d}", line)
    opened = Run.open(run.name)
    assert [path.read_bytes() for _, path in opened.responses_paths(0)] == [b"".join(lines)]
    ahead = b"".join(lines) + response_line(ids[0], "more than is there") + b"\n"
    stale.write_bytes(ahead)
    assert [path.read_bytes() for _, path in Run.open(run.name).responses_paths(0)] == [ahead]


def test_flat_results_of_a_run_in_a_bucket_know_from_its_requests_which_rows_have_images(
    bucket: Bucket, server: Server, tmp_path: Path
) -> None:
    cell = base64.b64encode(png("red")).decode()
    tasks = bucket.put("in/tasks.csv", f"id,question,image\n0,a,{cell}\n1,b,\n2,c,gone.png\n".encode())
    run = bucket.uri("runs/one")
    prepare(tasks, run, model="m", backend="server", on_bad_image="text-only", workers=1)
    submit(run, endpoints=[server.url])
    bucket.on("second")
    merge(run, flat=True)
    results = [json.loads(line) for line in bucket.get("runs/one/results.jsonl").splitlines()]
    assert [row["has_image"] for row in results] == [True, False, False]


def test_no_resume_keeps_answers_whose_requests_were_deleted_also_from_another_machine(
    bucket: Bucket, server: Server
) -> None:
    tasks, run = bucket.put("in/tasks.jsonl", task_lines(6)), bucket.uri("runs/one")
    done = call("run", tasks, run, "--model", "m", "--backend", "server", "--max-requests", "3", "--delete-sent",
                "--endpoints", server.url)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert [name for name in bucket.names("runs/one/requests/") if name.endswith(".jsonl")] == []
    before = bucket.names("runs/one/responses/"), bucket.names("runs/one/jobs/")
    bucket.on("second")
    refused = call("submit", run, "--no-resume", "--yes", "--endpoints", server.url)
    assert refused.exit_code == 1
    assert (
        f"Error: {run}: the requests of 2 shards were deleted when they had answers (--delete-sent)" in refused.stderr
    )
    assert "hint: keep the answers; or prepare the task file into a new run" in refused.stderr
    assert (bucket.names("runs/one/responses/"), bucket.names("runs/one/jobs/")) == before
    assert merge(run).verdicts[Verdict.ANSWERED] == 6
