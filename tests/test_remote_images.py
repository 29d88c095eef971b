"""Images behind addresses: fetched by `prepare` as if they were local, each once, and what becomes of those that cannot
be had. S3 is moto; a server of our own answers with the faults that no real one has on request."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pybase64
import pytest
from click.testing import CliRunner

from batchkit import addresses, fetching, mishaps, s3, stocks
from batchkit.cli import main
from batchkit.errors import BatchkitError, CredentialsError, RowError, StorageError
from batchkit.inference import infer
from batchkit.preparation import plan, prepare
from batchkit.references import remote, shown
from batchkit.runs import Run
from batchkit.signing import Signer
from tests import fake_server, s3_servers
from tests.conftest import WriteTasks
from tests.s3_servers import Bucket

Answer = tuple[int, dict[str, str], bytes]


class Web:
    """A server on loopback. `answers` are by path, each an answer or a function that makes one; `asked` counts."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer | Callable[[], Answer]] = {}
        self.asked: Counter[str] = Counter()
        self.behind: str | None = None
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                web.asked[self.path] += 1
                status, headers, body = web.answer(self.path, dict(self.headers))
                self.send_response(status)
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    if value:
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path: str, headers: dict[str, str]) -> Answer:
        found = self.answers.get(path)
        if found is not None:
            return found() if callable(found) else found
        if self.behind is None:
            return 404, {}, b"no such page"
        request = urllib.request.Request(self.behind + path, headers=headers)  # noqa: S310  # loopback
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            return answer.status, {}, answer.read()

    def has(self, path: str, body: bytes, status: int = 200, **headers: str) -> str:
        self.answers[path] = (status, headers, body)
        return self.url + path

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    yield web
    web.close()


@pytest.fixture
def aws(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what a user sets, for a server: moto, unless told otherwise."""

    def use(url: str) -> None:
        for name, value in s3_servers.environment(url, tmp_path / "work").items():
            monkeypatch.setenv(name, value)

    use(moto)
    return use


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_wait", lambda state: 0.0)


@pytest.fixture
def png(picture: Callable[..., Path]) -> bytes:
    return picture("one.png").read_bytes()


def sent(run: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)["body"] for path in sorted((run / "requests").glob("*.jsonl")) for line in open(path, "rb")
    ]


def images_of(body: dict[str, Any]) -> list[bytes]:
    parts = body["messages"][-1]["content"]
    found = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [pybase64.b64decode(url.partition(",")[2]) for url in found]


def rejections(run: Path) -> list[tuple[str, str]]:
    return [(one.code, one.message) for seal in Run.open(run).seals() for one in seal.rejected]


def prepared(tasks: Path | str, run: Path, **options: Any) -> Any:
    return prepare(tasks, run, **{"model": "m", "allow_private_hosts": True, "workers": 1, **options})


# -- what is fetched -------------------------------------------------------------------------------------------------


def test_a_thousand_images_in_a_bucket_are_fetched_once_each_and_sent_as_local_ones_are(
    *,
    bucket: Bucket,
    web: Web,
    moto: str,
    aws: Any,
    picture: Callable[..., Path],
    write_tasks: WriteTasks,
    tmp_path: Path,
) -> None:
    for number in range(1000):
        path = picture(f"photos/{number}.png", colour=f"#{number:06x}")
        bucket.put(f"photos/{number}.png", path.read_bytes())
    rows = [{"id": n, "image": f"photos/{n % 1000}.png", "question": "?"} for n in range(1200)]
    local = prepared(write_tasks(rows), tmp_path / "local")
    there = [{**row, "image": f"s3://{bucket.name}/{row['image']}"} for row in rows]
    web.behind = moto
    aws(web.url)
    report = prepared(write_tasks(there, "there.jsonl"), tmp_path / "run", workers=2)
    assert (report.requests, report.rejected) == (local.requests, local.rejected) == (1200, 0)
    assert sent(tmp_path / "run") == sent(tmp_path / "local")
    assert set(web.asked.values()) == {1}
    assert len(web.asked) == 1000


def test_rows_and_their_identity_are_those_of_the_task_file(
    web: Web, png: bytes, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    url = web.has("/a.png", png)
    tasks = write_tasks([{"image": url, "question": str(n)} for n in range(5)])
    prepared(tasks, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    (seal,) = run.seals()
    assert (run.path / "rows" / "00000.jsonl").read_bytes() == tasks.read_bytes()
    ids = run.read_ids(seal)
    web.has("/a.png", png + b"\x00")
    prepared(tasks, tmp_path / "again")
    assert Run.open(tmp_path / "again").read_ids(seal) == ids
    assert web.asked["/a.png"] == 2


@pytest.mark.parametrize(
    "name", ["plain.png", "a#1.png", "100%.png", "what?.png", "%20 x+y&z=ü.png", "deep//er/../x.png"]
)
def test_keys_with_any_letters_are_found(
    name: str, bucket: Bucket, png: bytes, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    bucket.put(name, png)
    prepared(write_tasks([{"image": bucket.uri(name), "question": "?"}]), tmp_path / "run")
    assert images_of(sent(tmp_path / "run")[0]) == [png]


def test_relative_paths_begin_at_a_remote_root_or_beside_a_remote_task_file(
    bucket: Bucket, web: Web, png: bytes, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    line = json.dumps({"image": ["a/b 1.png", "./a/../c.png"], "question": "?"}).encode()
    for name in ("set/a/b 1.png", "set/c.png"):
        bucket.put(name, png)
    bucket.put("set/tasks.jsonl", line)
    web.has("/set/a/b%201.png", png)
    web.has("/set/c.png", png)
    prepared(bucket.uri("set/tasks.jsonl"), tmp_path / "beside")
    for root in (bucket.uri("set"), bucket.uri("set/"), web.url + "/set"):
        folder = tmp_path / f"root{len(list(tmp_path.iterdir()))}"
        prepared(write_tasks([line]), folder, image_root=root)
        assert images_of(sent(folder)[0]) == [png, png], root
    assert images_of(sent(tmp_path / "beside")[0]) == [png, png]


def test_images_that_only_a_placeholder_or_a_template_names_are_fetched_and_no_others(
    web: Web, png: bytes, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    row = {"first": web.has("/1.png", png), "other": web.has("/2.png", png), "source": web.url + "/page"}
    tasks = write_tasks([{**row, "question": "<image_start>[first]<image_end> or what?"}])
    prepared(tasks, tmp_path / "placed")
    prepared(tasks, tmp_path / "templated", prompt_template='{{ image("ot" ~ "her") }} {{ source }}')
    assert len(images_of(sent(tmp_path / "placed")[0])) == len(images_of(sent(tmp_path / "templated")[0])) == 1
    assert web.asked == {"/1.png": 1, "/2.png": 1}


def test_escaped_slashes_and_tables_are_seen(web: Web, png: bytes, write_tasks: WriteTasks, tmp_path: Path) -> None:
    url = web.has("/a.png", png)
    escaped = b'{"image": "' + url.replace("/", r"\/").encode() + b'", "question": "?"}'
    spelled = b'{"image": "' + url.replace("/", r"\u002f").encode() + b'", "question": "?"}'
    prepared(write_tasks([escaped, spelled]), tmp_path / "escaped")
    table = tmp_path / "tasks.csv"
    table.write_text(f'image,question\n"[""{url}"", ""{url}""]",?\n')
    prepared(table, tmp_path / "table")
    assert [len(images_of(body)) for body in sent(tmp_path / "escaped") + sent(tmp_path / "table")] == [1, 1, 2]


def test_rows_in_batch_format_and_plans_keep_their_ways(
    web: Web, png: bytes, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    url = web.has("/a.png", png)
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    prepare(write_tasks([line]), tmp_path / "run", workers=1)
    assert not web.asked
    tasks = write_tasks([{"image": url, "question": "?"}], "tasks.jsonl")
    report = plan(tasks, model="m", allow_private_hosts=True)
    assert (report.requests, web.asked["/a.png"]) == (1, 1)


def test_infer_takes_remote_images(web: Web, png: bytes, tmp_path: Path) -> None:
    with fake_server.running() as server:
        answers = infer(
            [{"image": web.has("/a.png", png), "question": "?"}],
            model="m",
            run=tmp_path / "run",
            endpoints=[server.url],
            prepare_options={"allow_private_hosts": True},
        )
    assert answers[0] is not None
    assert images_of(sent(tmp_path / "run")[0]) == [png]


# -- what goes wrong with one image ----------------------------------------------------------------------------------


def _xml(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()


FAULTS: dict[str, tuple[int, dict[str, str], bytes, str]] = {
    "missing": (404, {}, b"", "image not found: URL (404)"),
    "denied": (403, {}, b"no", "image cannot be fetched: URL: access denied (403)"),
    "expired": (403, {}, _xml("AccessDenied") + b"Request has expired", "URL: its signature has expired (403)"),
    "teapot": (418, {}, b"", "URL: the server says 418"),
    "page": (200, {}, b"<html>log in</html>", "not an image that can be read: URL (it begins like HTML or XML)"),
    "empty": (200, {}, b"", "image is empty: URL"),
    "large": (200, {}, b"x" * 70_000, "image has more than 60,000 bytes: URL"),
    "endless": (200, {"content-length": "", "connection": "close"}, b"x" * 70_000, "more than 60,000 bytes: URL"),
    "cut": (200, {"content-length": "999", "connection": "close"}, b"x", "URL: the connection broke off"),
    "loop": (302, {"location": "/x"}, b"", "image has more than 5 redirects: URL"),
    "elsewhere": (302, {"location": "file:///etc/passwd"}, b"", "image is redirected from http to file: URL"),
    "busy": (503, {}, b"", "image cannot be fetched: URL: the server says 503"),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(FAULTS))
def test_an_image_that_cannot_be_had_rejects_its_row_and_no_other(
    *, fault: str, web: Web, png: bytes, write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mishaps, "FILE_LIMIT", 60_000)
    status, headers, body, message = FAULTS[fault]
    web.answers["/x"] = (status, headers, body)
    web.answers["/x?token=secret"] = (status, headers, body)
    good = web.has("/good.png", png)
    rows = [{"image": url, "question": "?"} for url in (good, web.url + "/x?token=secret", good)]
    report = prepared(write_tasks(rows), tmp_path / "run")
    assert report.requests == 2
    ((code, told),) = rejections(tmp_path / "run")
    assert code == "image"
    assert message.replace("URL", web.url + "/x") in told
    assert "secret" not in told


def test_a_silent_server_is_given_up(
    web: Web, write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mishaps, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(fetching, "TRIES", 2)
    over = threading.Event()

    def late() -> Answer:
        over.wait(20)
        return 200, {}, b""

    web.answers["/x"] = late
    prepared(write_tasks([{"image": web.url + "/x", "question": "?"}]), tmp_path / "run")
    over.set()
    assert "/x: no answer within 0.2 s" in rejections(tmp_path / "run")[0][1]
    assert web.asked["/x"] == 2


def test_what_passes_is_tried_again(web: Web, png: bytes, write_tasks: WriteTasks, tmp_path: Path) -> None:
    left = [(503, {"retry-after": "0"}, b""), (429, {}, b""), (200, {}, png)]
    web.answers["/x"] = lambda: left.pop(0)
    web.has("/y", b"", 302, location="/x")
    assert prepared(write_tasks([{"image": web.url + "/y", "question": "?"}]), tmp_path / "run").requests == 1
    assert web.asked == {"/y": 3, "/x": 3}


def test_text_only_takes_a_row_whose_image_cannot_be_had(web: Web, write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"image": web.url + "/none", "question": "?"}])
    assert prepared(tasks, tmp_path / "run", on_bad_image="text-only").requests == 1


def test_a_host_that_does_not_exist_is_named(write_tasks: WriteTasks, tmp_path: Path, monkeypatch: Any) -> None:
    import socket

    def nowhere(*args: object, **options: object) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    prepared(write_tasks([{"image": "http://pictures.invalid/a.png", "question": "?"}]), tmp_path / "run")
    assert "pictures.invalid/a.png: there is no host pictures.invalid" in rejections(tmp_path / "run")[0][1]


def test_objects_that_are_missing_or_forbidden_reject_their_rows(
    web: Web, aws: Any, png: bytes, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    aws(web.url)
    web.has("/b/good.png", png)
    web.has("/b/gone.png", _xml("NoSuchKey"), 404)
    web.has("/b/secret.png", _xml("AccessDenied"), 403)
    rows = [{"image": f"s3://b/{name}.png", "question": "?"} for name in ("gone", "good", "secret")]
    assert prepared(write_tasks(rows), tmp_path / "run").requests == 1
    gone, secret = [message for _, message in rejections(tmp_path / "run")]
    assert "image not found: s3://b/gone.png" in gone
    assert "s3://b/secret.png: access denied: these credentials may not read it" in secret
    assert "s3:GetObject on b" in secret


@pytest.mark.parametrize(
    "name", ["s3://", "s3://b", "s3:///a.png", "s3://no bucket/a.png", "http://", "https://[::1", "http://a:b:c/x"]
)
def test_what_names_no_image_rejects_its_row(name: str, aws: Any, write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"image": name, "question": "?"}, {"question": "?"}])
    assert prepared(tasks, tmp_path / "run").requests == 1
    assert [code for code, _ in rejections(tmp_path / "run")] == ["image"]


def test_a_bucket_in_another_region_is_asked_there(
    web: Web, aws: Any, png: bytes, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    aws(web.url)
    left: list[Answer] = [
        (400, {"x-amz-bucket-region": "eu-west-1"}, _xml("AuthorizationHeaderMalformed")),
        (200, {}, png),
    ]
    web.answers["/b/a.png"] = lambda: left.pop(0)
    assert prepared(write_tasks([{"image": "s3://b/a.png", "question": "?"}]), tmp_path / "run").requests == 1


# -- what stops everything -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "kind", "message"),
    [
        (404, "NoSuchBucket", StorageError, "s3://b/0.png: there is no bucket b at http://127.0.0.1"),
        (403, "InvalidAccessKeyId", CredentialsError, "s3://b/0.png: the credentials are not taken"),
        (400, "ExpiredToken", CredentialsError, "s3://b/0.png: the credentials have expired"),
        (403, "RequestTimeTooSkewed", StorageError, "this machine's clock is off"),
    ],
)
def test_what_is_wrong_for_all_images_stops_at_once(
    *,
    status: int,
    code: str,
    kind: type[BatchkitError],
    message: str,
    aws: Any,
    write_tasks: WriteTasks,
    tmp_path: Path,
) -> None:
    tasks = write_tasks([{"image": f"s3://b/{n}.png", "question": "?"} for n in range(300)])
    with s3_servers.refusing(status, code) as url:
        aws(url)
        with pytest.raises(kind, match=message) as caught:
            prepared(tasks, tmp_path / "run")
    assert caught.value.hint
    assert not list(Run.open(tmp_path / "run").seals())


def test_a_wrong_bucket_is_one_clear_error(bucket: Bucket, write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"image": f"s3://no-such-{bucket.name}/a.png", "question": "?"}])
    done = CliRunner().invoke(main, ["prepare", str(tasks), str(tmp_path / "run"), "--model", "m"])
    assert done.exit_code == 1
    assert f"Error: s3://no-such-{bucket.name}/a.png: there is no bucket no-such-{bucket.name}" in done.stderr
    assert "hint: check its name" in done.stderr


def test_no_credentials_is_one_clear_error(
    aws: Any, write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    tasks = write_tasks([{"image": "s3://b/a.png", "question": "?"}])
    with pytest.raises(CredentialsError, match=r"s3://b/a.png: no credentials for S3"):
        prepared(tasks, tmp_path / "run")


def test_a_server_of_s3_that_is_down_and_a_network_that_is_down_reject_nothing(
    aws: Any, write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "MOST_LOST", 20)
    nobody = f"http://127.0.0.1:{s3_servers.free_port()}"
    aws(nobody)
    with pytest.raises(StorageError, match=r"s3://b/a.png: 127.0.0.1 cannot be reached"):
        prepared(write_tasks([{"image": "s3://b/a.png", "question": "?"}]), tmp_path / "one")
    rows = [{"image": f"{nobody}/{n}.png", "question": "?"} for n in range(30)]
    with pytest.raises(StorageError, match=r"images in a row could not be fetched, the last: http"):
        prepared(write_tasks(rows), tmp_path / "two")


# -- whose network is asked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("192.168.0.1", False), ("172.16.0.1", False), ("0.0.0.0", False),  # noqa: S104
        ("100.64.0.1", False), ("169.254.169.254", False), ("224.0.0.1", False), ("255.255.255.255", False),
        ("::1", False), ("::", False), ("fe80::1", False), ("fe80::1%eth0", False), ("fd00:ec2::254", False),
        ("ff0e::1", False), ("::ffff:127.0.0.1", False), ("::ffff:169.254.169.254", False),
        ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False),
    ],
)  # fmt: skip
def test_public_addresses_are_told_from_others(address: str, public: bool) -> None:
    assert addresses.is_public(address) is public


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "LOCALHOST", "[::1]", "127.1", "2130706433", "0x7f000001", "0", "169.254.169.254",
     "[::ffff:127.0.0.1]", "user:word@127.0.0.1"],
)  # fmt: skip
def test_private_hosts_are_refused_unless_allowed(host: str, web: Web, write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"image": f"http://{host}:{web.port}/a.png", "question": "?"}])
    prepared(tasks, tmp_path / "run", allow_private_hosts=False)
    ((code, message),) = rejections(tmp_path / "run")
    assert code == "image"
    assert ("--allow-private-hosts" in message) or "not an address that can be asked" in message
    assert "word" not in message
    assert not web.asked


def test_a_redirect_to_a_private_host_is_refused(
    web: Web, png: bytes, write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1")
    web.has("/secret", png)
    rows = [
        {"image": web.has("/a", b"", 302, location=f"http://127.0.0.2:{web.port}/secret"), "question": "?"},
        {"image": web.has("/b", b"", 302, location=web.url + "/c"), "question": "?"},
    ]
    web.has("/c", png)
    assert prepared(write_tasks(rows), tmp_path / "run", allow_private_hosts=False).requests == 1
    assert "127.0.0.2, which is not a public address; --allow-private-hosts" in rejections(tmp_path / "run")[0][1]
    assert web.asked["/secret"] == 0


def test_a_redirect_from_https_to_http_is_not_followed() -> None:
    from yarl import URL

    with pytest.raises(RowError, match="redirected from https to http"):
        fetching._next("https://a.example/x?s=1", URL("https://a.example/x"), "http://a.example/x")


# -- where they lie meanwhile ----------------------------------------------------------------------------------------


def test_the_disk_holds_so_much_and_nothing_afterwards(
    web: Web, png: bytes, write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(stocks, "MOST_BYTES", 10 * len(png))
    most = []

    def count() -> Answer:
        most.append(sum(1 for _ in (tmp_path / "tmp").glob("*/*")))
        return 200, {}, png

    for number in range(200):
        web.answers[f"/{number}"] = count
    monkeypatch.setattr(fetching, "AT_ONCE", 4)
    monkeypatch.setattr("batchkit.provision.AHEAD_IMAGES", 8)
    rows = [{"image": f"{web.url}/{n % 200}", "question": "?"} for n in range(400)]
    assert prepared(write_tasks(rows), tmp_path / "run").requests == 400
    assert max(most) < 30
    assert set(web.asked.values()) == {2}
    assert not list((tmp_path / "tmp").iterdir())


def test_of_an_image_that_is_too_large_nothing_stays(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(mishaps, "FILE_LIMIT", 60_000)
    web.answers["/x"] = (200, {"content-length": "", "connection": "close"}, b"x" * 70_000)
    with stocks.Stock(private_hosts=True) as stock:
        assert "more than 60,000 bytes" in str(stock.read(stock.take(web.url + "/x")))
        assert sum(path.stat().st_size for path in (tmp_path / "tmp").glob("*/*")) == 0


def test_what_a_killed_process_has_left_is_removed(
    web: Web, png: bytes, write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    left = tmp_path / "tmp" / "batchkit-images-left"
    left.mkdir(parents=True)
    (left / "1").write_bytes(b"x")
    os.utime(left, (time.time() - 100,) * 2)
    prepared(write_tasks([{"image": web.has("/a", png), "question": "?"}]), tmp_path / "run")
    assert not left.exists()


def test_addresses_are_shown_without_what_is_secret() -> None:
    assert shown("https://me:word@h.example/a.png?X-Amz-Signature=s") == "https://h.example/a.png"
    assert shown("s3://b/what?.png") == "s3://b/what?.png"
    assert remote("a?b#c.png", "https://h.example/set") == "https://h.example/set/a%3Fb%23c.png"
    assert remote("/local/a.png", "s3://b/set") is None


@pytest.mark.parametrize(
    ("root", "name", "address"),
    [
        ("s3://b/set", "deep//er/x.png", "s3://b/set/deep//er/x.png"),
        ("s3://b/set/", "x.png", "s3://b/set//x.png"),  # of a task file s3://b/set//tasks.jsonl
        ("s3://b", "x.png", "s3://b/x.png"),
        ("s3://b/set", "./a/../c.png", "s3://b/set/c.png"),
        ("s3://b/set", "../../../x.png", "s3://b/x.png"),
    ],
)
def test_relative_names_below_a_bucket_keep_their_slashes_and_lead_out_of_no_bucket(
    root: str, name: str, address: str
) -> None:
    assert remote(name, root) == address


def test_a_key_with_two_slashes_is_found_beside_its_task_file(
    bucket: Bucket, png: bytes, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    for folder in (bucket.uri("set"), bucket.uri("set/")):
        s3.put(f"{folder}/a//b.png", png + folder.encode())
        s3.put(f"{folder}/tasks.jsonl", json.dumps({"image": "a//b.png", "question": "?"}).encode())
        run = tmp_path / f"run{len(folder)}"
        prepared(f"{folder}/tasks.jsonl", run)
        prepared(write_tasks([{"image": "a//b.png", "question": "?"}]), run / "other", image_root=f"{folder}/")
        for one in (run, run / "other"):
            assert images_of(sent(one)[0]) == [png + folder.encode()]


# -- signatures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a.png", "a b/ü+%20&=#?~*().png", "//twice//a.png"])
@pytest.mark.parametrize("token", ["", "token"])
def test_gets_are_signed_as_boto3_signs_them(
    key: str, token: str, aws: Any, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws(web.url)
    if token:
        monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    seen: list[Any] = []
    client = s3.client()
    client.meta.events.register("before-send.s3.GetObject", lambda request, **_: seen.append(request))
    for _ in range(5):
        with contextlib.suppress(Exception):  # nobody has it
            client.get_object(Bucket="bucket", Key=key)
        url, headers = Signer().sign(f"s3://bucket/{key}")
        theirs = {name.lower(): value for name, value in seen[-1].headers.items()}
        if theirs["x-amz-date"].decode() == headers["X-Amz-Date"]:
            break
    assert url == seen[-1].url
    for name, value in headers.items():
        assert theirs[name.lower()] in (value, value.encode())
    assert ("X-Amz-Security-Token" in headers) == bool(token)


def test_addresses_are_those_of_amazon_where_no_other_server_is_named(
    aws: Any, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws(web.url)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    signer = Signer()
    assert signer.sign("s3://bucket/a.png")[0] == "https://bucket.s3.us-west-2.amazonaws.com/a.png"
    assert signer.move("s3://bucket/a.png", "eu-west-1")
    url, headers = signer.sign("s3://bucket/a.png")
    assert url == "https://bucket.s3.eu-west-1.amazonaws.com/a.png"
    assert "/eu-west-1/s3/aws4_request" in headers["Authorization"]
    assert not signer.move("s3://bucket/a.png", "eu-west-1")


def test_a_presigned_address_is_fetched_as_it_is_until_it_expires(
    aws: Any, png: bytes, write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with s3_servers.ministack(tmp_path / "ministack") as url:  # checks signatures by the secret that it is started with
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3.client().create_bucket(Bucket="bucket")
        s3.put("s3://bucket/a b+c%20.png", png)
        of = {"Bucket": "bucket", "Key": "a b+c%20.png"}
        good, expired = (s3.client().generate_presigned_url("get_object", of, seconds) for seconds in (600, 1))
        time.sleep(2.1)
        rows = [{"image": uri, "question": "?"} for uri in (good, expired, "s3://bucket/a b+c%20.png")]
        assert prepared(write_tasks(rows), tmp_path / "run").requests == 2
    ((_, message),) = rejections(tmp_path / "run")
    assert "a%20b%2Bc%2520.png: its signature has expired (403): sign it anew" in message
    assert "Signature" not in message
    assert [images_of(body) for body in sent(tmp_path / "run")] == [[png], [png]]
