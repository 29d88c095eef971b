"""Requests that name their images (`--images link`): what `prepare` writes, and what each backend gets of it."""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from PIL import Image

from batchkit import attempts, engines, fetching, handouts, limits, mishaps, outcomes, packing, pipeline, s3, ways
from batchkit.backends import vllm_install
from batchkit.errors import StorageError, UsageError
from batchkit.evaluation import evaluate
from batchkit.feeds import Feed
from batchkit.handover import Cost
from batchkit.links import Links, path_of, split
from batchkit.merging import merge
from batchkit.parcels import Parcel
from batchkit.preparation import plan, prepare
from batchkit.progress import Silent
from batchkit.reports import SubmitReport
from batchkit.resolving import Resolver, Ways
from batchkit.responses import Verdict
from batchkit.runs import Run
from batchkit.submission import submit
from tests.conftest import WriteTasks
from tests.fake_provider import Provider
from tests.fake_server import Server
from tests.s3_servers import ACCESS_KEY, Bucket
from tests.test_batch_services import send as send_to_service
from tests.test_live import quick as quick  # noqa: PLC0414
from tests.test_presign import call, machine  # noqa: F401
from tests.test_remote_images import Web
from tests.test_remote_images import web as web  # noqa: PLC0414
from tests.test_submission import Fake
from tests.test_submission import fake as fake  # noqa: PLC0414

AWKWARD = ["a#1.png", "b?x=1.png", "100%20.png", "c d.png", "größe.png", "plus+.png", "e;f.png", "quote\"'.png"]

Picture = Callable[..., Path]


def urls_of(line: bytes | str) -> list[str]:
    content = json.loads(line)["body"]["messages"][-1]["content"]
    return [part["image_url"]["url"] for part in content if part["type"] == "image_url"]


def requests_of(run: Run) -> list[str]:
    return [line for seal in run.seals() for line in run.requests_path(seal.shard).read_text().splitlines()]


def verdicts(run: Run) -> Counter[str]:
    return Counter(str(outcome.verdict) for seal in run.seals() for outcome in outcomes.load(run, seal).outcomes)


def messages(run: Run) -> list[str]:
    return [outcome.message or "" for seal in run.seals() for outcome in outcomes.load(run, seal).outcomes]


def decoded(url: str) -> bytes:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(data)


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


class Inputs:
    """What the fake engine was given: its inputs, and its arguments."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        self.args: list[str] = []
        made = vllm_install.engine_command

        def command(install: Any, *, source: Path, target: Path, args: Any, **others: Any) -> list[str]:
            self.args = list(args)
            os.link(source, folder / f"{len(list(folder.iterdir())):03d}")
            return made(install, source=source, target=target, args=args, **others)

        patch.setattr(vllm_install, "engine_command", command)

    @property
    def lines(self) -> list[str]:
        return [line for path in sorted(self.folder.iterdir()) for line in path.read_text().splitlines()]


@pytest.fixture
def inputs(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    return Inputs(tmp_path / "inputs", monkeypatch)


@pytest.fixture
def linked(tmp_path: Path, write_tasks: WriteTasks) -> Callable[..., Run]:
    """A run of rows with these images, by their addresses."""

    def make(images: list[Any], **options: Any) -> Run:
        tasks = write_tasks([{"id": n, "image": image, "question": f"q{n}"} for n, image in enumerate(images)])
        name = options.pop("run", str(tmp_path / "run"))
        prepare(tasks, name, **{"model": "m", "images": "link", "workers": 1, **options})
        return Run.open(name)

    return make


LinkedRun = Callable[..., Run]


# -- prepare -----------------------------------------------------------------------------------------------------------


def test_requests_name_files_by_uris_that_lead_back_to_them(picture: Picture, linked: LinkedRun) -> None:
    paths = [picture(f"pictures/{name}") for name in AWKWARD]
    run = linked([f"pictures/{name}" for name in AWKWARD])
    urls = [url for line in requests_of(run) for url in urls_of(line)]
    assert urls == [path.as_uri() for path in paths]
    assert [path_of(url) for url in urls] == paths
    assert all(set(url) <= set(urlsplit(url).path) | set("file://") for url in urls), "no query, no fragment"


def test_nothing_of_an_image_is_read_and_a_file_that_is_not_there_is_rejected(
    tmp_path: Path, linked: LinkedRun, web: Web, write_tasks: WriteTasks
) -> None:
    (tmp_path / "large.jpg").write_bytes(b"no image at all" * 100_000)
    (tmp_path / "empty.jpg").write_bytes(b"")
    images = ["large.jpg", "gone.jpg", "empty.jpg", ".", f"{web.url}/a.png", "s3://no-such-bucket/a b#?.png", "s3://x"]
    run = linked(images, allow_private_hosts=True)
    (seal,) = run.seals()
    assert [(rejected.position, rejected.message.partition(": ")[2]) for rejected in seal.rejected] == [
        (1, "image not found: gone.jpg"),
        (2, "image is empty: empty.jpg"),
        (3, "image is a directory: ."),
        (6, "not the address of an image: s3://x"),
    ]
    urls = [urls_of(line)[0] for line in requests_of(run)]
    assert urls == [(tmp_path / "large.jpg").as_uri(), f"{web.url}/a.png", "s3://no-such-bucket/a b#?.png"]
    assert not web.asked
    assert seal.requests_bytes < 1500
    assert plan(write_tasks([{"image": "large.jpg", "question": "?"}]), model="m", images="link").requests == 1


def test_a_private_address_is_refused_in_prepare_where_it_is_a_number(linked: LinkedRun) -> None:
    (seal,) = linked(["http://169.254.169.254/latest", "https://example.com/a.png"]).seals()
    assert "169.254.169.254, which is not a public address; prepare --allow-private-hosts" in seal.rejected[0].message
    assert seal.requests == 1


def test_relative_names_below_a_remote_root_are_links_too(linked: LinkedRun) -> None:
    run = linked(["a#b.png"], image_root="s3://bucket/photos")
    assert urls_of(requests_of(run)[0]) == ["s3://bucket/photos/a#b.png"]


def test_images_that_are_inside_the_rows_stay_inside_the_requests(picture: Picture, linked: LinkedRun) -> None:
    inside = "data:image/png;base64," + base64.b64encode(picture("in.png").read_bytes()).decode()
    run = linked([[inside, "in.png"]])
    assert urls_of(requests_of(run)[0]) == [inside, picture("in.png").as_uri()]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"max_side": 100}, "--max-side changes images"),
        ({"max_pixels": 100}, "--max-pixels"),
        ({"image_format": "jpeg"}, "--image-format"),
        ({"image_quality": 50}, "--image-quality"),
        ({"reuse": ("x",)}, "--reuse goes without --images link"),
    ],
)
def test_what_needs_the_images_themselves_is_refused(linked: LinkedRun, options: Any, flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        linked(["a.png"], **options)


def test_texts_that_quote_a_request_are_no_links() -> None:
    text = json.dumps({"t": '"image_url":{"url":"file:///etc/passwd"}'}, separators=(",", ":")).encode()
    assert split(text) == [text]
    line = rb'{"image_url":{"url":"s3://b/a\"\\b"},"x":{"type":"input_image","image_url":"https://h/"}}'
    assert [piece for piece in split(line) if isinstance(piece, str)] == ['s3://b/a"\\b', "https://h/"]


def test_the_responses_endpoint_has_links_in_its_own_shape(
    picture: Picture, linked: LinkedRun, provider: Provider
) -> None:
    path = picture("a.png")
    run = linked(["a.png"], backend="openai", url="/v1/responses")
    assert json.loads(requests_of(run)[0])["body"]["input"][0]["content"][0]["image_url"] == path.as_uri()
    send_to_service(run, provider)
    (uploaded,) = [data for name, data in provider.files.items() if b"input_image" in data]
    assert decoded(json.loads(uploaded)["body"]["input"][0]["content"][0]["image_url"]) == path.read_bytes()


# -- vLLM --------------------------------------------------------------------------------------------------------------


def test_vllm_gets_files_as_they_are_and_may_read_their_folder(
    picture: Picture, linked: LinkedRun, inputs: Inputs, tmp_path: Path
) -> None:
    paths = [picture(f"pictures/{name}") for name in AWKWARD]
    run = linked([str(path) for path in paths])
    assert submit(run).exit_code == 0
    assert inputs.args == ["--allowed-local-media-path", str(tmp_path / "pictures")]
    assert inputs.lines == requests_of(run)


def test_files_that_vllm_may_not_read_go_as_base64(
    picture: Picture, linked: LinkedRun, inputs: Inputs, tmp_path: Path
) -> None:
    inner, outer = picture("allowed/a.png"), picture("other/b.png", colour="blue")
    (tmp_path / "allowed" / "link.png").symlink_to(outer)
    run = linked([str(inner), str(outer), "allowed/link.png"])
    submit(run, engine_args=["--allowed-local-media-path", str(tmp_path / "allowed")])
    assert inputs.args == ["--allowed-local-media-path", str(tmp_path / "allowed")]
    first, second, third = (urls_of(line)[0] for line in inputs.lines)
    assert first == inner.as_uri()
    assert decoded(second) == decoded(third) == outer.read_bytes()


def test_what_a_symbolic_link_leads_to_is_allowed_too(
    picture: Picture, linked: LinkedRun, inputs: Inputs, tmp_path: Path
) -> None:
    picture("blobs/1.png")
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / "a.png").symlink_to(tmp_path / "blobs" / "1.png")
    run = linked(["names/a.png"])
    submit(run)
    assert inputs.args == ["--allowed-local-media-path", str(tmp_path / "blobs")]
    assert inputs.lines == requests_of(run)


def test_a_file_that_is_gone_fails_its_row_alone_and_retry_sends_it(
    picture: Picture, linked: LinkedRun, fake: Fake
) -> None:
    paths = [picture(f"{n}.png") for n in range(5)]
    run = linked([path.name for path in paths], max_requests=2)
    paths[2].unlink()
    report = submit(run)
    assert (report.sent, report.responses, report.remaining, report.unanswered, report.exit_code) == (4, 5, 0, 1, 3)
    assert verdicts(run) == {"answered": 4, "failed": 1}
    assert messages(run)[2] == (
        f"image not found: {paths[2]}; when that is mended: batchkit submit {run.name} --retry failed"
    )
    assert submit(run).sent == 0, "it is no passing fault"
    picture("2.png")
    assert submit(run, retry=frozenset({Verdict.FAILED})).sent == 1
    assert verdicts(run) == {"answered": 5}
    assert len(fake.asked) == 5
    assert not list((run.path / "engine").glob("*/plan.json"))


def test_where_all_are_gone_the_disk_is_missing_and_nothing_is_failed(
    picture: Picture, linked: LinkedRun, fake: Fake
) -> None:
    paths = [picture(f"{n}.png") for n in range(120)]
    run = linked([path.name for path in paths])
    for path in paths:
        path.unlink()
    with pytest.raises(StorageError, match="nor are the 99 images before it there"):
        submit(run)
    assert verdicts(run) == {"pending": 120}
    for path in paths[:5]:
        picture(path.name)
    assert submit(run).sent == 5, "a few that are there show that the disk is"
    assert verdicts(run) == {"answered": 5, "failed": 115}


def test_where_no_image_is_left_no_engine_starts(picture: Picture, linked: LinkedRun, fake: Fake) -> None:
    run = linked([picture("a.png").name])
    (run.path.parent / "a.png").unlink()
    report = submit(run)
    assert (report.sent, report.starts, report.exit_code) == (0, 0, 3)
    assert fake.starts == []
    assert verdicts(run) == {"failed": 1}


def test_a_request_that_kills_the_engine_is_still_found(picture: Picture, linked: LinkedRun, fake: Fake) -> None:
    paths = [picture(f"{n}.png") for n in range(20)]
    run = linked([path.name for path in paths])
    paths[7].unlink()
    (seal,) = run.seals()
    fake.set(poison=[run.read_ids(seal)[3]], death="crash")
    assert submit(run).exit_code == 3
    assert verdicts(run) == {"answered": 18, "failed": 2}


def test_vllm_is_never_given_all_of_the_disk(picture: Picture, linked: LinkedRun, tmp_path: Path) -> None:
    run = linked([picture("pictures/a.png").relative_to(tmp_path).as_posix()])
    (seal,) = run.seals()
    apart = msgspec.structs.replace(seal, links=Links(files=2, folder="/"))
    assert ways.media_args(run, Feed([apart]), []) == [ways.ALLOWED, str(tmp_path)]
    # While prepare still works, what comes is likely to be beside what is there.
    feed = Feed(is_open=True)
    feed.add([seal])
    feed.take()
    assert ways.media_args(run, feed, []) == [ways.ALLOWED, str(tmp_path)]
    elsewhere = msgspec.structs.replace(seal, links=Links(files=2, folder="/usr/share"))
    assert ways.media_args(run, Feed([elsewhere]), []) == [ways.ALLOWED, "/usr/share"]


def test_run_makes_links_and_sends_them_while_it_prepares(
    picture: Picture, inputs: Inputs, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    for number in range(6):
        picture(f"{number}/a.png")
    rows = [{"id": number, "image": f"{number}/a.png", "question": "?"} for number in range(6)]
    summary = pipeline.run(write_tasks(rows), tmp_path / "run", model="m", images="link", max_requests=1, workers=1)
    assert summary.exit_code == 0
    assert sorted(inputs.lines) == sorted(requests_of(Run.open(tmp_path / "run")))


# -- objects and the web, for vLLM -------------------------------------------------------------------------------------


def png(colour: str = "red") -> bytes:
    import io

    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


KEYS = ["a#1.png", "b?x.png", "100%20.png", "c d/größe.png"]


def test_objects_go_as_base64_each_fetched_once(
    bucket: Bucket, linked: LinkedRun, inputs: Inputs, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = [bucket.put(key, png()) for key in KEYS]
    run = linked(uris * 5)
    web.behind = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", web.url)
    assert submit(run).exit_code == 0
    assert [decoded(urls_of(line)[0]) for line in inputs.lines] == [png()] * 20
    assert sorted(web.asked.values()) == [1] * 4


def test_an_object_that_is_gone_fails_its_row_alone(bucket: Bucket, linked: LinkedRun, fake: Fake) -> None:
    uris = [bucket.put(f"{n}.png", png()) for n in range(4)]
    bucket.put("text.png", b"<html>")
    run = linked([*uris, bucket.uri("text.png")])
    s3.delete(uris[1])
    assert submit(run).exit_code == 3
    assert verdicts(run) == {"answered": 3, "failed": 2}
    assert messages(run)[1].startswith(f"image not found: {uris[1]}; when that is mended: batchkit submit ")
    assert messages(run)[4].startswith(f"not an image that can be read: {bucket.uri('text.png')} (it begins like HTML")


def test_a_start_takes_no_more_than_there_is_room_for_with_the_images_in_it(
    bucket: Bucket, linked: LinkedRun, tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = [bucket.put(f"{n}.png", noise(tmp_path / f"{n}.png").read_bytes()) for n in range(12)]
    run = linked(uris, max_requests=5)
    s3.delete(uris[3])
    monkeypatch.setattr(engines, "most_bytes", lambda room: 21_000)
    report = submit(run)
    assert (report.sent, report.responses, report.remaining, report.exit_code) == (11, 12, 0, 3)
    assert verdicts(run) == {"answered": 11, "failed": 1}
    assert [path.stat().st_size <= 21_000 for path in inputs.folder.iterdir()] == [True] * 4
    asked = [json.loads(line)["custom_id"] for line in inputs.lines]
    assert asked == [custom_id for custom_id in ids_of(run) if not custom_id.startswith("3-")]
    assert submit(run).sent == 0


@pytest.mark.parametrize("backend", ["vllm", "server", "openai"])
def test_an_object_that_a_server_does_not_give_now_is_tried_again_by_the_next_submit(
    backend: Any, request: pytest.FixtureRequest, bucket: Bucket, linked: LinkedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    senders: dict[str, Callable[[], SubmitReport]] = {
        "vllm": lambda: (request.getfixturevalue("fake"), submit(run))[1],
        "server": lambda: submit(run, endpoints=[request.getfixturevalue("server").url]),
        "openai": lambda: send_to_service(run, request.getfixturevalue("provider")),
    }
    send = senders[backend]
    monkeypatch.setattr(fetching, "TRIES", 1)
    run = linked([bucket.put("a.png", png()), bucket.put("b.png", png())], backend=backend)
    asked = fetching.Fetcher._get_s3

    def busy(self: fetching.Fetcher, uri: str) -> Any:
        if uri.endswith("b.png"):
            raise mishaps.PassingError("the server says 503 SlowDown")
        return asked(self, uri)

    with monkeypatch.context() as patch:
        patch.setattr(fetching.Fetcher, "_get_s3", busy)
        assert send().exit_code != 0
        assert verdicts(run) == {"answered": 1, "failed": 1}
        assert messages(run)[1].endswith(f"b.png: the server says 503 SlowDown; once more: batchkit submit {run.name}")
        send()
    assert send().exit_code == 0
    assert verdicts(run) == {"answered": 2}


def test_a_bucket_that_is_not_there_stops_submit_and_fails_no_row(
    bucket: Bucket, linked: LinkedRun, fake: Fake
) -> None:
    run = linked(["s3://no-such-bucket-anywhere/a.png"] * 3)
    with pytest.raises(StorageError, match="there is no bucket no-such-bucket-anywhere"):
        submit(run)
    assert verdicts(run) == {"pending": 3}
    assert not list((run.path / "engine").glob("*"))


def test_presigned_objects_are_in_the_engines_input_alone(
    bucket: Bucket, linked: LinkedRun, inputs: Inputs, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = linked([bucket.put(key, png()) for key in KEYS])
    echo = "import json,sys\nfor line in open(sys.argv[1]): r=json.loads(line); "
    echo += "u=r['body']['messages'][-1]['content'][0]['image_url']['url']; print(u, file=sys.stderr); "
    echo += "open(sys.argv[2],'a').write(json.dumps({'custom_id':r['custom_id'],'response':{'status_code':422,'body':"
    echo += "None},'error':{'error':{'message':'HTTP 403 error (value='+u+')','code':422}}})+chr(10))"
    captured = vllm_install.engine_command

    def command(install: Any, *, source: Path, target: Path, **others: Any) -> list[str]:
        captured(install, source=source, target=target, **others)
        return [sys.executable, "-c", echo, str(source), str(target)]

    monkeypatch.setattr(vllm_install, "engine_command", command)
    submit(run, presign=True)
    urls = [urls_of(line)[0] for line in inputs.lines]
    for url, key in zip(urls, KEYS, strict=True):
        assert "X-Amz-Signature=" in url
        assert web_get(url) == png(), key
    assert messages(run)[0].startswith("HTTP 403 error (value=http://127.0.0.1")
    assert "a%231.png" in messages(run)[0]
    merge(run)
    kept = everything(run.path)
    assert ACCESS_KEY.encode() not in kept
    for url in urls:
        assert url.partition("X-Amz-Signature=")[2].encode() not in kept


def web_get(url: str) -> bytes:
    import urllib.request

    with urllib.request.urlopen(url) as answer:  # noqa: S310  # loopback
        return bytes(answer.read())


def test_presign_without_links_is_refused(fake: Fake, tmp_path: Path, write_tasks: WriteTasks) -> None:
    prepare(write_tasks([{"question": "?"}]), tmp_path / "run", model="m")
    with pytest.raises(UsageError, match="--presign is for runs that name their images"):
        submit(tmp_path / "run", presign=True)


def test_web_images_go_as_given_and_private_hosts_do_not(
    linked: LinkedRun, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = {"public.example": "93.184.216.34", "inside.example": "10.0.0.7"}

    def look_up(host: str, *_: Any, **__: Any) -> list[Any]:
        return [(2, 1, 6, "", (addresses[host], 0))]

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    run = linked(["https://public.example/a.png?x=1#y", "https://inside.example/a.png"])
    submit(run)
    assert [urls_of(line) for line in inputs.lines] == [["https://public.example/a.png?x=1#y"]]
    assert verdicts(run) == {"answered": 1, "failed": 1}
    assert "inside.example is 10.0.0.7, which is not a public address" in messages(run)[1]


# -- batch services ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["openai", "gemini"])
def test_a_batch_service_gets_base64_of_files_and_objects(
    backend: str, bucket: Bucket, picture: Picture, linked: LinkedRun, provider: Provider
) -> None:
    paths = [picture("a#1.png"), picture("b c.png", colour="blue")]
    model = "gemini-2.5-flash" if backend == "gemini" else "m"
    run = linked([*(path.name for path in paths), bucket.put("o.png", png("green"))], backend=backend, model=model)
    report = send_to_service(run, provider)
    assert (report.sent, report.exit_code) == (3, 0)
    (upload,) = [data for data in provider.files.values() if b"base64" in data or b"inline_data" in data]
    wanted = [path.read_bytes() for path in paths] + [png("green")]
    for line, image in zip(upload.splitlines(), wanted, strict=True):
        assert base64.b64encode(image) in line
    assert b"file://" not in upload
    assert set(provider.paid.values()) == {1}
    assert not list((run.path / "uploads").iterdir())
    assert b"base64" not in everything(run.path)


def small_files(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    small = dataclasses.replace(limits.LIMITS["openai"], max_bytes=most)
    monkeypatch.setitem(limits.HOSTS, "openai", dataclasses.replace(limits.HOSTS["openai"], limits=small))


def noise(path: Path, size: int = 40) -> Path:
    Image.frombytes("RGB", (size, size), os.urandom(3 * size * size)).save(path)
    return path


def test_files_keep_to_the_providers_limit_with_the_images_in_them(
    tmp_path: Path, linked: LinkedRun, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [noise(tmp_path / f"{n}.png") for n in range(20)]
    small_files(monkeypatch, 30_000)
    run = linked([path.name for path in paths], backend="openai", max_requests=15)
    (tmp_path / "3.png").unlink()
    noise(tmp_path / "5.png", 120)
    report = send_to_service(run, provider)
    assert report.exit_code == 3
    assert verdicts(run) == {"answered": 18, "failed": 2}
    assert "with its images, the request has " in messages(run)[5]
    sizes = [len(data) for data in provider.files.values() if b"base64" in data]
    assert len(sizes) == 6  # 4 requests a file: 13 of one shard, 5 of the other
    assert max(sizes) <= 30_000
    assert provider.paid == Counter(name for name in ids_of(run) if not name.startswith(("3-", "5-")))
    assert send_to_service(run, provider).sent == 0


def ids_of(run: Run) -> list[str]:
    return [custom_id for seal in run.seals() for custom_id in run.read_ids(seal)]


def test_a_pilot_of_links_is_a_pilot(tmp_path: Path, linked: LinkedRun, provider: Provider) -> None:
    run = linked([noise(tmp_path / f"{n}.png").name for n in range(6)], backend="openai")
    assert send_to_service(run, provider, limit=2).sent == 2
    assert send_to_service(run, provider).sent == 4
    assert set(provider.paid.values()) == {1}


@pytest.mark.parametrize("step", ["upload", "create"])
def test_a_file_that_the_provider_finds_too_large_is_halved(
    step: str, tmp_path: Path, linked: LinkedRun, provider: Provider
) -> None:
    from tests import fake_provider

    run = linked([noise(tmp_path / f"{n}.png").name for n in range(8)], backend="openai")
    provider.faults[step] += [fake_provider.status(413, "too large")] * 2
    report = send_to_service(run, provider)
    assert report.exit_code == 0
    assert set(provider.paid.values()) == {1}
    sizes = [len(data) for data in provider.files.values() if b"base64" in data]
    assert len(sizes) == {"upload": 4, "create": 6}[step]
    assert max(sizes[-4:]) <= len(b"".join(provider.files.values())) // 4


def test_a_file_that_has_to_wait_is_gone_when_submit_ends(
    tmp_path: Path, linked: LinkedRun, provider: Provider
) -> None:
    paths = [noise(tmp_path / f"{n}.png").name for n in range(8)]
    run = linked(paths, backend="openai", model="gpt-4o-mini", max_requests=4)
    assert send_to_service(run, provider, wait=False, max_enqueued_tokens=1).sent == 4
    assert b"base64" not in everything(run.path)
    assert send_to_service(run, provider, max_enqueued_tokens=1).exit_code == 0
    assert set(provider.paid.values()) == {1}


def test_what_a_killed_process_has_left_of_a_file_is_removed_by_the_next_submit(
    tmp_path: Path, linked: LinkedRun, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = linked([noise(tmp_path / f"{n}.png").name for n in range(4)], backend="openai", max_requests=2)
    assert send_to_service(run, provider, shards="1/2").sent == 2
    uploads = run.path / "uploads"
    pid = os.fork()
    if pid == 0:
        try:
            monkeypatch.setattr(packing, "request_tokens", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            send_to_service(run, provider)
        finally:  # a fork must not go on with the tests
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    (aside,) = uploads.iterdir()
    assert aside.name.startswith(".links-00001.jsonl.")
    (uploads / "links-00001.jsonl").write_bytes(b"one that waited for its batch")
    (uploads / "links-100001.jsonl").write_bytes(b"of another shard, which somebody works on")
    with run.lease("100001"):
        assert send_to_service(run, provider, shards="1/2").sent == 0
        assert [path.name for path in uploads.iterdir()] == ["links-100001.jsonl"]
    assert send_to_service(run, provider).sent == 2
    assert not list(uploads.iterdir())
    assert set(provider.paid.values()) == {1}


def test_a_file_whose_urls_became_too_old_while_it_waited_is_made_again(
    picture: Picture, linked: LinkedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = linked([picture("a.png").name], backend="openai")
    (seal,) = run.seals()
    parcel = Parcel(seal=seal, positions=[0], url="/v1/chat/completions", size=1)
    resolver = Resolver(run, Ways(limits=limits.LIMITS["openai"]))
    service: Any = SimpleNamespace(request=bytes)
    with resolver, packing.Packer(run, resolver, service, cost=lambda _: Cost(), most=10**6) as packer:
        first = packer.pack(parcel)
        assert packer.pack(parcel).cost is first.cost, "it is there already"
        monkeypatch.setattr(packing.Packer, "holds", lambda self, until: False)
        assert packer.pack(parcel).cost is not first.cost
        assert packer.file_of(0, [0]).exists()
    assert not list((run.path / "uploads").iterdir())


def test_an_attempt_that_was_only_intended_is_packed_anew(
    tmp_path: Path, linked: LinkedRun, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = linked([noise(tmp_path / f"{n}.png").name for n in range(3)], backend="openai")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attempts, "upload", killed)
        with pytest.raises(KeyboardInterrupt):
            send_to_service(run, provider)
    assert [attempt.state for attempt in run.job(0).attempts] == ["intended"]
    (tmp_path / "1.png").unlink()
    send_to_service(run, provider)
    assert verdicts(run) == {"answered": 2, "failed": 1}
    assert set(provider.paid.values()) == {1}


def test_an_upload_that_fails_in_passing_is_made_again_of_the_same_file(
    tmp_path: Path, linked: LinkedRun, provider: Provider
) -> None:
    from tests import fake_provider

    run = linked([noise(tmp_path / f"{n}.png").name for n in range(3)], backend="openai")
    provider.faults["upload"].append(fake_provider.status(503))
    assert send_to_service(run, provider).exit_code == 0
    assert set(provider.paid.values()) == {1}


def test_presigned_objects_are_in_the_upload_alone(bucket: Bucket, linked: LinkedRun, provider: Provider) -> None:
    run = linked([bucket.put(key, png()) for key in KEYS], backend="openai")
    provider.answer = lambda custom_id, question, tries: (400, f"cannot download {url}")
    url = "https://h/a.png?X-Amz-Credential=AKIA&X-Amz-Signature=0123abcd"
    send_to_service(run, provider, presign=True)
    (upload,) = [data for data in provider.files.values() if b"X-Amz-Algorithm" in data]
    for line in upload.splitlines():
        assert web_get(urls_of(line)[0]) == png()
    assert messages(run)[0] == "cannot download https://h/a.png?X-Amz-Credential=…&X-Amz-Signature=…"
    kept = everything(run.path)
    assert b"0123abcd" not in kept
    assert ACCESS_KEY.encode() not in kept
    (attempt,) = run.job(0).attempts
    assert attempt.remote is not None
    assert dt.datetime.fromisoformat(attempt.remote.signed_until or "") > dt.datetime.now(dt.UTC) + dt.timedelta(6)


def test_a_bound_of_tokens_that_nobody_knows_is_told_of(bucket: Bucket, linked: LinkedRun, provider: Provider) -> None:
    run = linked([bucket.put("a.png", png())], backend="openai")
    said: list[str] = []

    class Told(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    send_to_service(run, provider, presign=True, max_enqueued_tokens=1000, progress=Told())
    assert "--max-enqueued-tokens counts nothing" in said[0]


def temporary(monkeypatch: pytest.MonkeyPatch, hours: float) -> None:
    end = dt.datetime.now(dt.UTC) + dt.timedelta(hours=hours)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", end.isoformat(timespec="seconds"))


def test_urls_that_would_expire_before_the_window_ends_are_refused(
    bucket: Bucket, linked: LinkedRun, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = linked([bucket.put("a.png", png())], backend="openai")
    temporary(monkeypatch, 12)
    with pytest.raises(
        UsageError, match=r"--presign: a batch may take 25h, and these credentials expire in "
    ) as refused:
        send_to_service(run, provider, presign=True)
    assert "without --presign the images go as base64" in (refused.value.hint or "")
    assert "--duration-seconds" in (refused.value.hint or "")
    with pytest.raises(UsageError, match="a signed URL holds 7d at most"):
        send_to_service(run, provider, presign=True, completion_window="14d")
    assert provider.calls["upload"] == 0
    assert verdicts(run) == {"pending": 1}
    temporary(monkeypatch, 26)
    assert send_to_service(run, provider, presign=True).exit_code == 0


def test_urls_that_became_too_old_while_they_waited_are_signed_anew(
    bucket: Bucket, linked: LinkedRun, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = linked([bucket.put("a.png", png())], backend="openai")
    provider.endings.append("token-limit")
    old = iter([False])
    monkeypatch.setattr(packing.Packer, "holds", lambda self, until: next(old, True))
    assert send_to_service(run, provider, presign=True).exit_code == 0
    assert provider.calls["upload"] == 2
    assert set(provider.paid.values()) == {1}


def test_gemini_fetches_nothing(bucket: Bucket, linked: LinkedRun, provider: Provider, tmp_path: Path) -> None:
    run = linked([bucket.put("a.png", png())], backend="gemini", model="gemini-2.5-flash")
    with pytest.raises(UsageError, match="--presign: gemini fetches no images") as refused:
        send_to_service(run, provider, presign=True)
    assert refused.value.hint == "leave it out: they go as base64 then"
    web = ["https://example.com/a.png"]
    (seal,) = linked(web, backend="gemini", model="gemini-2.5-flash", run=str(tmp_path / "two")).seals()
    assert "gemini fetches no images: https://example.com/a.png; without --images link" in seal.rejected[0].message
    other = linked(web, backend="openai", run=str(tmp_path / "three"))
    with pytest.raises(UsageError, match="gemini fetches no images, and the run names some"):
        submit(other, backend="gemini", base_url=provider.url)


def test_a_provider_is_given_no_urls_of_the_own_network(
    bucket: Bucket, linked: LinkedRun, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = linked([bucket.put("a.png", png())], backend="openai")
    monkeypatch.setattr("batchkit.targets.connect", lambda target: (None, "KEY"))
    monkeypatch.setattr(batch_submission_module(), "settle", lambda *_, **__: None)
    with pytest.raises(UsageError, match="--presign: openai cannot reach http:"):
        submit(run, presign=True, base_url="https://api.openai.com/v1")
    near = ["http://minio:9000", "http://s3.internal", "http://127.0.0.1:9000"]
    assert [url for url in (*near, "https://s3.example.com") if ways._is_private(url)] == near


def batch_submission_module() -> Any:
    from batchkit import batch_submission

    return batch_submission


def test_max_cost_says_why_it_cannot_be_kept(picture: Picture, linked: LinkedRun, provider: Provider) -> None:
    run = linked([picture("a.png").name], backend="openai", model="gpt-4o-mini", max_tokens=5)
    with pytest.raises(UsageError, match="the requests name their images, whose tokens nobody knows before they are"):
        send_to_service(run, provider, max_cost=1.0)
    send_to_service(run, provider)
    (attempt,) = run.job(0).attempts
    assert attempt.remote is not None
    assert attempt.remote.input_tokens is not None, "when it is sent they are known"


# -- live servers ------------------------------------------------------------------------------------------------------


def test_live_servers_get_base64_and_what_is_gone_fails_alone(
    bucket: Bucket, picture: Picture, linked: LinkedRun, server: Server
) -> None:
    paths = [picture(f"{n}.png") for n in range(6)]
    uris = [bucket.put(f"{n}.png", png("green")) for n in range(3)]
    run = linked([*(path.name for path in paths), *uris], backend="server", max_requests=4)
    paths[5].unlink()
    s3.delete(uris[2])
    report = submit(run, endpoints=[server.url])
    assert (report.sent, report.responses, report.exit_code) == (7, 9, 3)
    assert verdicts(run) == {"answered": 7, "failed": 2}
    sent = [json.loads(body)["messages"][-1]["content"][0]["image_url"]["url"] for body in server.bodies]
    assert Counter(map(decoded, sent)) == {paths[0].read_bytes(): 5, png("green"): 2}
    assert f"image not found: {uris[2]}" in messages(run)[8]
    assert submit(run, endpoints=[server.url]).sent == 0


def test_rows_that_share_a_link_and_a_question_are_sent_once(
    picture: Picture, tmp_path: Path, write_tasks: WriteTasks, server: Server
) -> None:
    for name in "ab":
        picture(f"{name}.png")
    rows: list[Any] = [{"image": "gone.png" if n == 4 else f"{'ab'[n % 2]}.png", "question": "q"} for n in range(12)]
    prepare(write_tasks(rows), tmp_path / "run", model="m", backend="server", images="link", dedupe=True, workers=1)
    run = Run.open(tmp_path / "run")
    picture("b.png").unlink()
    report = submit(run, endpoints=[server.url])
    assert (report.sent, report.responses) == (1, 2)
    assert verdicts(run) == {"answered": 5, "failed": 6, "rejected": 1}
    picture("b.png")
    assert submit(run, endpoints=[server.url], retry=frozenset({Verdict.FAILED})).sent == 1
    assert verdicts(run) == {"answered": 11, "rejected": 1}


def test_live_servers_get_signed_urls_where_that_is_wanted(
    bucket: Bucket, linked: LinkedRun, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = linked([bucket.put("a.png", png()), "https://93.184.216.34/a.png"], backend="server")
    submit(run, endpoints=[server.url], presign=True)
    sent = sorted(json.loads(body)["messages"][-1]["content"][0]["image_url"]["url"] for body in server.bodies)
    assert "X-Amz-Signature" in sent[0]
    assert sent[1] == "https://93.184.216.34/a.png"
    assert b"X-Amz" not in everything(run.path)


# -- machines elsewhere ------------------------------------------------------------------------------------------------


def test_presign_signs_the_images_of_a_run_too(bucket: Bucket, linked: LinkedRun) -> None:
    run = linked([bucket.put(key, png()) for key in KEYS], run=bucket.uri("runs/links"))
    (entry,) = json.loads(call("presign", run.name, "--format", "json").stdout)
    lines = web_get(entry["input"]).splitlines()
    assert [web_get(urls_of(line)[0]) for line in lines] == [png()] * 4
    assert (
        "X-Amz"
        not in b"".join(bucket.get(name) for name in bucket.names("runs/links/") if "presigned" not in name).decode()
    )
    (again,) = json.loads(call("presign", run.name, "--format", "json", "--again", "--expires", "7d").stdout)
    assert urlsplit(again["input"]).path == urlsplit(entry["input"]).path
    assert "X-Amz-Expires=604" in urls_of(web_get(again["input"]).splitlines()[0])[0]
    (shorter,) = json.loads(call("presign", run.name, "--format", "json", "--again", "--expires", "1h").stdout)
    assert shorter["input"] != again["input"]
    assert "X-Amz-Expires=604" in urls_of(web_get(again["input"]).splitlines()[0])[0], "its commands hold longer"


def test_an_input_that_nobody_was_given_is_removed_by_the_next_presign(
    bucket: Bucket, linked: LinkedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = linked([bucket.put("a.png", png())], run=bucket.uri("runs/links"))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_job", killed)
        with pytest.raises(KeyboardInterrupt):
            handouts.hand_out(run.name)
    (orphan,) = bucket.names("runs/links/presigned/")
    (entry,) = json.loads(call("presign", run.name, "--format", "json").stdout)
    (there,) = bucket.names("runs/links/presigned/")
    assert there != orphan
    assert there in entry["input"]


def test_presign_refuses_a_run_whose_images_are_files(bucket: Bucket, linked: LinkedRun, picture: Picture) -> None:
    run = linked([picture("a.png").name], run=bucket.uri("runs/files"))
    with pytest.raises(UsageError, match="names 1 image in files, which machines elsewhere cannot open"):
        handouts.hand_out(run)


# -- afterwards --------------------------------------------------------------------------------------------------------


def test_results_know_of_the_images_that_were_links(
    picture: Picture, linked: LinkedRun, fake: Fake, tmp_path: Path
) -> None:
    path = picture("a#1.png")
    run = linked([path.name, None])
    submit(run)
    merge(run, flat=True, output=tmp_path / "flat.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "flat.jsonl").read_text().splitlines()]
    assert [row["has_image"] for row in rows] == [True, False]
    merge(run)
    evaluate(run.path, copy_images=True)
    (copied,) = (run.path / "evaluation").rglob("problem_image_1.png")
    assert copied.read_bytes() == path.read_bytes()
