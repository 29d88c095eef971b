"""Images that a model made: saved beside the results, named in them, and left out of their text."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from batchkit import gemini_responses, piles
from batchkit.albums import MARK
from batchkit.errors import StorageError
from batchkit.merging import merge
from batchkit.outcomes import load
from batchkit.piles import merge_pile
from batchkit.responses import Verdict, parse
from tests.conftest import WriteTasks
from tests.made_runs import MadeRun, response_line


def made_image(colour: str, kind: str = "PNG", size: tuple[int, int] = (4, 4)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


RED, BLUE = made_image("red"), made_image("blue")
JPEG, WEBP = made_image("red", "JPEG"), made_image("red", "WEBP")


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{encoded(data)}"


def part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(data)}}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def line(custom_id: str, body: dict[str, Any]) -> bytes:
    response = {"status_code": 200, "request_id": "r", "body": body}
    return json.dumps({"id": "b", "custom_id": custom_id, "response": response, "error": None}).encode()


def chat(custom_id: str, content: Any, **message: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": "stop"}
    return line(custom_id, {"model": "m", "choices": [choice]})


def output(*items: dict[str, Any]) -> dict[str, Any]:
    return {"object": "response", "status": "completed", "output": list(items)}


def gemini(custom_id: str, *parts: dict[str, Any]) -> bytes:
    candidate = {"content": {"parts": list(parts)}, "finishReason": "STOP"}
    return json.dumps({"key": custom_id, "response": {"candidates": [candidate]}}).encode()


MARKDOWN = f"First. ![a picture]({url(RED)}) Then ![]({url(BLUE)})"
CALL = {"type": "image_generation_call", "status": "completed", "result": encoded(RED), "output_format": "png"}
SAID = {"type": "message", "content": [{"type": "output_text", "text": "Here."}]}
BLOB = {"inlineData": {"mimeType": "image/png", "data": encoded(RED)}}

SHAPES: dict[str, tuple[bytes, Any, list[bytes], int | None]] = {
    "openrouter": (chat("x", "Here.", images=[part(RED), part(BLUE)]), "Here.", [RED, BLUE], None),
    "openrouter-without-text": (chat("x", None, images=[part(RED)]), "", [RED], None),
    "in-both-places": (chat("x", [text("a"), part(RED)], images=[part(RED)]), "a", [RED], 1),
    "parts": (chat("x", [text("a"), part(RED), text("b"), text("c"), part(BLUE)]), "a\n\nbc", [RED, BLUE], 2),
    "image-url-as-text": (chat("x", [{"type": "image_url", "image_url": url(RED)}]), "", [RED], 0),
    "output-image": (chat("x", [{"type": "output_image", "b64_json": encoded(RED)}, text("b")]), "b", [RED], 1),
    "anthropic": (
        chat("x", [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded(RED)}}]),
        "", [RED], 0,
    ),
    "markdown": (chat("x", MARKDOWN), "First. \n\n Then ", [RED, BLUE], 2),
    "a-data-url-alone": (chat("x", url(JPEG, "image/jpeg")), None, [JPEG], 0),
    "responses": (line("x", output(CALL, SAID)), "Here.", [RED], 1),
    "responses-without-text": (line("x", output(CALL)), "", [RED], 0),
    "images-generations": (
        line("x", {"data": [{"b64_json": encoded(RED)}, {"b64_json": encoded(BLUE)}]}), "", [RED, BLUE], None,
    ),
    "images-generations-with-prompts": (line("x", {"data": [{"b64_json": encoded(RED), "revised_prompt": "p"}]}),
                                        [{"revised_prompt": "p"}], [RED], None),
    "gemini": (gemini("x", {"text": "a"}, BLOB, {"text": "b"}), "a\n\nb", [RED], 2),
    "gemini-translated": (
        gemini_responses.translate(gemini("x", {"text": "a"}, BLOB, {"text": "b"})), "a\n\nb", [RED], 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_images_are_found_wherever_a_response_has_them_and_are_no_text(name: str) -> None:
    raw, answer, images, segments = SHAPES[name]
    kept: list[bytes] = []

    def keep(image: Any) -> str:
        kept.append(base64.b64decode(image.text))
        return str(len(kept))

    response = parse(raw, keep)
    assert response.verdict is Verdict.ANSWERED
    assert response.answer == ("" if name == "a-data-url-alone" else answer)
    assert kept == images
    assert [image.kept for image in response.images] == [str(count) for count in range(1, len(images) + 1)]
    assert response.segments == segments
    assert encoded(RED)[:40] not in repr(response)


@pytest.mark.parametrize(
    "said",
    [
        f'<img src="{url(RED)}">',
        f"the icon is {url(RED)}",
        "data:image/ is how such a URL begins",
        "![a](https://a.example/b.png)",
        "![" * 50_000 + "data:image/png;base64,",
        "data:image/png;base64,AAAA" + " " * 100_000 + "!",
    ],
)
def test_a_data_url_in_code_or_prose_is_text(said: str) -> None:
    response = parse(chat("x", said))
    assert (response.answer, response.images) == (said, ())


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    made = MadeRun(tmp_path / "run")
    made.add_shard([b'{"id":0}', b'{"id":1}', b'{"id":2}'])
    made.add_shard([b'{"id":3}'])
    made.finish()
    return made


def results_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def files_in(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name != MARK}


def answer(made: MadeRun) -> None:
    made.add_attempt(0, [chat(made.ids[2], [text("c"), part(JPEG), part(WEBP)]), chat(made.ids[0], "no image")])
    made.add_attempt(1, [chat(made.ids[3], [part(BLUE), text("d")])])


def test_images_are_saved_by_row_under_names_that_tell_their_type(made: MadeRun) -> None:
    answer(made)
    merge(made.run)
    results = results_of(made.run.path / "results.jsonl")
    assert files_in(made.run.path / "output_images") == {
        "2/output_image_1.jpg": JPEG,
        "2/output_image_2.webp": WEBP,
        "3/output_image_1.png": BLUE,
    }
    assert results[2]["raw_response"] == "c"
    assert results[2]["batchkit"]["output_images"] == [
        "output_images/2/output_image_1.jpg",
        "output_images/2/output_image_2.webp",
    ]
    assert results[3]["batchkit"]["text_segments"] == 1
    assert "output_images" not in results[0]["batchkit"]
    for result in results:
        for name in result["batchkit"].get("output_images", []):
            assert (made.run.path / name).is_file()


def test_merging_again_gives_the_same_and_what_is_gone_goes(made: MadeRun) -> None:
    answer(made)
    merge(made.run)
    first = files_in(made.run.path)
    merge(made.run)
    assert files_in(made.run.path) == first
    made.run.responses_path(0, 1).write_bytes(chat(made.ids[2], "no image now") + b"\n")
    merge(made.run)
    assert files_in(made.run.path / "output_images") == {"3/output_image_1.png": BLUE}
    made.run.responses_path(1, 1).write_bytes(b"")
    merge(made.run)
    assert not (made.run.path / "output_images").exists()


def test_another_name_for_the_results_has_images_of_its_own(made: MadeRun, tmp_path: Path) -> None:
    answer(made)
    merge(made.run, output=tmp_path / "pilot.csv.gz")
    assert "3/output_image_1.png" in files_in(tmp_path / "pilot.output_images")


def test_a_merge_that_fails_leaves_the_images_as_they_were(made: MadeRun) -> None:
    answer(made)
    merge(made.run)
    before = files_in(made.run.path)
    made.run.responses_path(0, 1).write_bytes(chat(made.ids[0], [part(RED)]) + b"\n")
    rows = made.run.rows_path(1)
    rows.write_bytes(rows.read_bytes().replace(b"3", b"4"))
    with pytest.raises(Exception, match="not what prepare wrote"):
        merge(made.run)
    assert {n: d for n, d in files_in(made.run.path).items() if "output_images" in n} == {
        n: d for n, d in before.items() if "output_images" in n
    }
    assert not list(made.run.path.glob(".*.tmp"))


def test_what_a_killed_merge_left_of_images_is_removed_by_the_next(made: MadeRun) -> None:
    answer(made)
    left = made.run.path / ".output_images.99-abc.tmp" / "kept"
    left.mkdir(parents=True)
    (left / "1.png").write_bytes(RED)
    merge(made.run)
    assert not left.parent.exists()


def test_a_folder_of_the_users_own_is_never_replaced(made: MadeRun) -> None:
    answer(made)
    mine = made.run.path / "output_images" / "0" / "output_image_1.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(StorageError, match="was not made by batchkit"):
        merge(made.run)
    assert mine.read_bytes() == b"mine"
    assert not (made.run.path / "results.jsonl").exists()


def test_of_several_answers_only_the_images_of_the_chosen_one_are_saved(made: MadeRun) -> None:
    made.add_attempt(0, [chat(made.ids[0], [text("a"), part(RED)])])
    made.add_attempt(0, [chat(made.ids[0], [text("a"), part(BLUE)])])
    merge(made.run)
    assert files_in(made.run.path / "output_images") == {"0/output_image_1.png": BLUE}


def test_answers_that_differ_in_their_images_alone_are_in_conflict(made: MadeRun) -> None:
    made.add_attempt(0, [chat(made.ids[0], [text("a"), part(RED)]), chat(made.ids[0], [text("a"), part(BLUE)])])
    merge(made.run)
    assert results_of(made.run.path / "results.jsonl")[0]["batchkit"]["verdict"] == "conflicting"
    assert files_in(made.run.path / "output_images") == {"0/output_image_1.png": RED}


def test_what_is_no_base64_is_kept_as_it_is_and_links_are_named(made: MadeRun) -> None:
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}
    away = {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}
    made.add_attempt(0, [chat(made.ids[0], [broken, away])])
    merge(made.run)
    note = results_of(made.run.path / "results.jsonl")[0]["batchkit"]
    assert note["output_images"] == ["output_images/0/output_image_1.txt", "https://a.example/b.png"]
    assert files_in(made.run.path / "output_images") == {"0/output_image_1.txt": b"%%%"}


@pytest.mark.parametrize("partition_bytes", [1 << 20, 200], ids=["one-partition", "many-partitions"])
def test_images_of_foreign_piles_are_saved_too(
    write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition_bytes: int
) -> None:
    monkeypatch.setattr(piles, "PARTITION_BYTES", partition_bytes)
    tasks = write_tasks([{"id": "a"}, {"id": "b"}, {"id": "c"}])
    lines = [gemini("c", BLOB), chat("a", "x"), chat("b", [text("t"), part(JPEG)]), chat("stray", [part(BLUE)])]
    (tmp_path / "out.jsonl").write_bytes(b"".join(raw + b"\n" for raw in lines))
    merge_pile(tasks, [tmp_path / "out.jsonl"], output=tmp_path / "results.jsonl")
    assert files_in(tmp_path / "output_images") == {"1/output_image_1.jpg": JPEG, "2/output_image_1.png": RED}
    results = results_of(tmp_path / "results.jsonl")
    assert [result["batchkit"].get("output_images") for result in results] == [
        None,
        ["output_images/1/output_image_1.jpg"],
        ["output_images/2/output_image_1.png"],
    ]
    assert [result["raw_response"] for result in results] == ["x", "t", ""]


def test_images_do_not_stay_in_memory(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    seal = made.add_shard([b'{"id":%d}' % number for number in range(60)])
    made.finish()
    big = RED + b"\0" * 3_000_000
    made.add_attempt(0, [chat(custom_id, [part(big)]) for custom_id in made.ids])
    process = psutil.Process()
    before = process.memory_info().rss
    shard = load(made.run, seal)
    assert process.memory_info().rss - before < 60_000_000  # 240 MB of base64 were read
    assert (
        len({image.digest for outcome in shard.outcomes if outcome.response for image in outcome.response.images}) == 1
    )
    merge(made.run)
    assert process.memory_info().rss - before < 60_000_000
    assert (made.run.path / "output_images" / "59" / "output_image_1.png").read_bytes() == big


def test_a_plain_answer_is_as_it_was(made: MadeRun) -> None:
    made.add_attempt(0, [response_line(made.ids[0], " red ")])
    merge(made.run)
    assert results_of(made.run.path / "results.jsonl")[0]["raw_response"] == " red "
    assert not (made.run.path / "output_images").exists()


def test_an_image_that_the_completions_endpoint_gives_is_an_image_too() -> None:
    def completion(said: str) -> bytes:
        return line("x", {"model": "m", "choices": [{"index": 0, "text": said, "finish_reason": "stop"}]})

    alone = parse(completion(url(RED)), lambda _: "1.png")
    assert (alone.verdict, alone.answer, [image.kept for image in alone.images]) == (Verdict.ANSWERED, "", ["1.png"])
    both = parse(completion(f"Here: ![]({url(RED)}) there"), lambda _: "1.png")
    assert (both.answer, len(both.images), both.segments) == ("Here: \n\n there", 1, 2)


@pytest.mark.parametrize(
    "content",
    [
        f'![a]({url(RED)} "a title")',
        f"![a](<{url(RED)}>)",
        f"<{url(RED)}>",
        url(RED).replace(";base64", ";charset=utf-8;base64"),
        url(RED).replace("+", "-").replace("/", "_").replace("data:image_png", "data:image/png"),
        [{"type": "image_url", "text": "", "image_url": {"url": url(RED)}}],
        [{"text": "", "inlineData": {"mimeType": "image/png", "data": encoded(RED)}}],
    ],
)
def test_less_common_ways_to_write_an_image_are_known(made: MadeRun, content: Any) -> None:
    made.add_attempt(0, [chat(made.ids[0], content)])
    merge(made.run)
    assert files_in(made.run.path / "output_images") == {"0/output_image_1.png": RED}
    assert results_of(made.run.path / "results.jsonl")[0]["raw_response"] == ""


def test_what_killed_merges_left_elsewhere_goes_once_it_is_old(made: MadeRun, tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    dead, alive, old = process.pid, os.getpid(), time.time() - 3600
    out = tmp_path / "out"
    kept = [f".r.jsonl.{alive}-ab.tmp", f".other.jsonl.{dead}-ab.tmp"]
    gone = [f".r.jsonl.{dead}-ab.tmp", f".r.summary.json.{dead}-ab.tmp", f".r.retry.jsonl.{dead}-ab.tmp"]
    out.mkdir()
    for name in (*kept, *gone):
        (out / name).touch()
        os.utime(out / name, (old, old))
    (out / f".r.jsonl.{dead}-young.tmp").touch()
    for folder in (f".r.output_images.{dead}-ab.tmp", f".r.jsonl.{dead}-pile.tmp"):
        (out / folder).mkdir()
        (out / folder / "1").touch()
        os.utime(out / folder / "1", (old, old))
        os.utime(out / folder, (old, old))
    merge(made.run, output=out / "r.jsonl")
    assert {path.name for path in out.glob(".*")} == {*kept, f".r.jsonl.{dead}-young.tmp"}
