"""What request files say, whoever wrote them: to compare the outputs of contenders."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson
import xxhash


class Asked(NamedTuple):
    question: str
    image: bytes


def read(paths: Sequence[Path]) -> Iterator[Asked]:
    """The question and the decoded image bytes of each request, in order."""
    for path in paths:
        with open(path, "rb") as stream:
            for line in stream:
                yield _asked(orjson.loads(line)["body"]["messages"][-1]["content"])


def _asked(content: list[dict[str, object]]) -> Asked:
    question, image = None, None
    for part in content:
        if part["type"] == "text":
            question = part["text"]
        else:
            image = part["image_url"]["url"]  # type: ignore[index]  # that is how it looks
    assert isinstance(question, str)
    assert isinstance(image, str)
    head, _, data = image.partition(",")
    assert head == "data:image/jpeg;base64", head
    return Asked(question, base64.b64decode(data, validate=True))


def digests(paths: Sequence[Path]) -> list[tuple[str, str]]:
    return [(asked.question, xxhash.xxh3_128_hexdigest(asked.image)) for asked in read(paths)]


def of_run(run: Path) -> list[Path]:
    return sorted((run / "requests").glob("*.jsonl"))
