"""infer: answers for rows in memory, durable all the same."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import batchkit
from batchkit.errors import BatchkitError, InputError, RunError, UsageError
from tests import fake_server
from tests.fake_server import Server


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `infer` keeps its runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def ask(server: Server, rows: Any, **options: Any) -> dict[Any, Any]:
    return batchkit.infer(rows, model="m", endpoints=[server.url], **options)


def rows(count: int = 10) -> list[dict[str, Any]]:
    return [{"id": f"r{n}", "question": f"q{n}"} for n in range(count)]


def test_a_dict_from_id_to_answer_of_lists_and_iterators(server: Server) -> None:
    expected = {f"r{n}": f"answer to q{n}" for n in range(10)}
    assert ask(server, rows()) == expected
    assert ask(server, iter(rows())) == expected
    assert server.asked.total() == 10, "the second call found the answers of the first"
    assert ask(server, ({"question": f"q{n}"} for n in range(3))) == {n: f"answer to q{n}" for n in range(3)}


def test_only_some_and_the_others_later(server: Server, tmp_path: Path) -> None:
    run = tmp_path / "my-run"
    assert ask(server, rows(), run=run, only={"r2", "r5"}) == {"r2": "answer to q2", "r5": "answer to q5"}
    assert server.asked.total() == 2
    assert len(ask(server, rows(), run=run)) == 10
    assert set(server.asked.values()) == {1}
    assert ask(server, rows(), run=run, only=[]) == {}
    with pytest.raises(UsageError, match="'r77', which is the id of no row"):
        ask(server, rows(), run=run, only={"r77"})


def test_what_failed_is_none_and_is_asked_again_on_request(server: Server, tmp_path: Path) -> None:
    server.faults.append(fake_server.status(400, "too long"))
    first = ask(server, rows(), concurrency=1)
    assert [name for name, answer in first.items() if answer is None] == ["r0"]
    assert ask(server, rows()) == first
    assert ask(server, rows(), retry_failed=True)["r0"] == "answer to q0"
    assert server.asked.total() == 11


def test_images_of_every_kind(server: Server, tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    picture.save(tmp_path / "red.png")
    encoded = io.BytesIO()
    picture.save(encoded, format="JPEG")
    asked = [
        {"id": 0, "image": "red.png", "question": "path"},
        {"id": 1, "image": tmp_path / "red.png", "question": "Path"},
        {"id": 2, "image": encoded.getvalue(), "question": "bytes"},
        {"id": 3, "image": [picture, "red.png"], "question": "PIL"},
    ]
    answers = ask(server, asked)
    assert answers == {0: "answer to path", 1: "answer to Path", 2: "answer to bytes", 3: "answer to PIL"}
    sent = sorted(body.count(b"data:image/") for body in server.bodies)
    assert sent == [1, 1, 1, 2]
    assert sum(b"data:image/jpeg" in body for body in server.bodies) == 1


def test_answers_are_parsed_and_options_go_through(server: Server) -> None:
    answers = ask(server, rows(2), parse="regex:q(\\d)", prepare_options={"max_tokens": 5})
    assert answers == {"r0": "0", "r1": "1"}
    assert all(b'"max_tokens":5' in body for body in server.bodies)


def test_in_a_running_event_loop_as_in_a_notebook(server: Server) -> None:
    async def cell() -> dict[Any, Any]:
        return ask(server, rows(3))

    assert len(asyncio.run(cell())) == 3


def test_rows_that_cannot_be_taken_are_named(server: Server, tmp_path: Path) -> None:
    cases: list[tuple[list[Any], str]] = [
        ([{"id": 1, "question": "a"}, {"id": 1, "question": "b"}], "row 1: its id 1 is that of row 0 already"),
        (["just a text"], "row 0 is a str, not a mapping"),
        ([{"id": 1.5, "question": "a"}], "row 0: its id 1.5 is neither"),
        ([{"id": 1, "question": object()}], "row 0: cannot be written as JSON"),
        ([], "there are no rows"),
    ]
    for bad, message in cases:
        with pytest.raises(InputError, match=message):
            ask(server, bad)
    ask(server, rows(), run=tmp_path / "run")
    with pytest.raises(RunError, match=r"had .* bytes when the run was prepared"):
        ask(server, rows(11), run=tmp_path / "run")
    assert issubclass(RunError, BatchkitError)


# -- what people get wrong --------------------------------------------------------------------------------------------


def test_whole_numbers_of_numpy_are_ids_as_pythons_are(server: Server) -> None:
    numpy = pytest.importorskip("numpy")
    given = [{"id": numpy.int64(7), "n": numpy.int32(2), "question": "q"}]
    assert ask(server, given, only=numpy.array([7])) == {7: "answer to q"}


def test_only_may_be_a_generator(server: Server) -> None:
    assert ask(server, rows(), only=(f"r{n}" for n in (1, 3))) == {"r1": "answer to q1", "r3": "answer to q3"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prepare_options": {"limit": 3}}, "prepare_options has 'limit'"),
        ({"prepare_options": {"start": 3}}, "prepare_options has 'start'"),
        ({"prepare_options": {"max_tokenz": 3}}, "--max-tokenz"),
        ({"retry": {"failed"}}, "no option 'retry'"),
        ({"concurency": 3}, "no option 'concurency'"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], message: str, server: Server) -> None:
    with pytest.raises(UsageError, match=message):
        ask(server, rows(), **options)
    assert not server.asked


def test_rows_in_batch_format_and_a_root_as_a_path(server: Server, tmp_path: Path) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "q1"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    assert ask(server, [line], id_field="custom_id") == {"a": "answer to q1"}
    options = {"image_root": tmp_path}
    assert ask(server, [{"image": save(tmp_path, "red"), "question": "q"}], prepare_options=options) == {
        0: "answer to q"
    }


def test_another_picture_behind_the_same_path_is_another_question(server: Server, tmp_path: Path) -> None:
    row = {"image": save(tmp_path, "red"), "question": "q"}
    for _ in range(2):
        ask(server, [row])
    assert server.asked.total() == 1
    save(tmp_path, "blue")
    ask(server, [row])
    assert server.asked.total() == 2


def save(folder: Path, colour: str) -> str:
    Image.new("RGB", (8, 8), colour).save(folder / "picture.png")
    return "picture.png"
