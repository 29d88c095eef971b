"""Runs to merge, of any size, made without a single request, by batchkit's own writers.

The rows lie in `TASKS`, their run in `RUN`, and the same responses once more in one foreign file, `RESPONSES`, shuffled
over all rows, under the rows' own ids.

    python benchmarks/merge_data.py FOLDER --rows 200000
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import msgspec

from batchkit.conversion import Converted
from batchkit.jobs import Attempt, Job
from batchkit.manifests import Input, Manifest, Prepared, now
from batchkit.runs import Run
from batchkit.shardfiles import ShardWriter
from batchkit.tasks import Row, make_custom_id

SHARD_ROWS = 5_000
"""What `prepare` puts into a shard for vLLM."""
SCATTERED = 256
"""Files that hold the foreign responses until each is shuffled: a uniform shuffle in little memory."""

TASKS, RESPONSES, RUN = "rows.jsonl", "responses.jsonl", "run"
_encode = msgspec.json.Encoder().encode


def row_of(number: int) -> bytes:
    """About 150 bytes, as short tasks are."""
    question = f"Which of the objects on the table is the {number % 17}th from the left, and what is its colour?"
    return _encode({"id": f"row-{number}", "image": f"images/{number // 100}/{number}.jpg", "question": question})


def answer_of(number: int) -> str:
    words = ("red", "green", "blue", "a cup", "a “plate”", "the lamp\nbehind it", "\u00e9tag\u00e8re")
    return f"{number}: " + " ".join(words[(number + place) % len(words)] for place in range(number % 5 + 1))


def response_of(custom_id: str, number: int) -> bytes:
    """A line as vLLM's batch runner writes it, about 550 bytes."""
    message: dict[str, Any] = {"role": "assistant", "content": answer_of(number), "refusal": None, "tool_calls": []}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    usage = {"prompt_tokens": 90 + number % 9, "total_tokens": 100 + number % 9, "completion_tokens": 10}
    body = {"id": f"chatcmpl-{number:032x}", "object": "chat.completion", "created": 1_790_000_000, "model": "m",
            "choices": [choice], "service_tier": None, "system_fingerprint": None, "usage": usage,
            "prompt_logprobs": None}  # fmt: skip
    returned = {"status_code": 200, "request_id": f"vllm-batch-{number:032x}", "body": body}
    return _encode({"id": f"vllm-{number:032x}", "custom_id": custom_id, "response": returned, "error": None})


def make(folder: Path, rows: int, *, foreign: bool = True) -> Run:
    """The run, its task file, and (`foreign`) the pile of its responses, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / TASKS, "wb", buffering=1 << 20) as stream:
        stream.writelines(row_of(number) + b"\n" for number in range(rows))
    asked = Input(uri=str(folder / TASKS), bytes=(folder / TASKS).stat().st_size)
    manifest = Manifest(format=1, batchkit="0", created=now(), input=asked, model="m", backend="vllm", options={})
    run = Run.create(folder / RUN, manifest)
    chance = random.Random(rows)
    with _Scattered(folder) if foreign else contextlib.nullcontext() as scattered:
        for shard, start in enumerate(range(0, rows, SHARD_ROWS)):
            numbers = range(start, min(start + SHARD_ROWS, rows))
            lines = list(_one_shard(run, shard, numbers))
            chance.shuffle(lines)
            run.responses_path(shard, 1).write_bytes(b"".join(lines))
            if scattered is not None:
                scattered.add([response_of(f"row-{number}", number) + b"\n" for number in numbers], chance)
        if scattered is not None:
            scattered.gather(folder / RESPONSES, chance)
    counts: dict[str, Any] = {"shards": -(-rows // SHARD_ROWS), "rows": rows, "requests": rows, "rejected": 0}
    run.write_prepared(Prepared(**counts, rows_bytes=asked.bytes, requests_bytes=0, names_in_use=[], finished=now()))
    return run


def _one_shard(run: Run, shard: int, numbers: range) -> Iterator[bytes]:
    """Seal rows, note the attempt that took them, and give its responses."""
    writer = ShardWriter(run, shard)
    for number in numbers:
        raw = row_of(number)
        custom_id = make_custom_id(number, b'"row-%d"' % number)
        writer.add(Row(number, number + 1, raw, 0), Converted(custom_id, b""), None)
        yield response_of(custom_id, number) + b"\n"
    writer.seal()
    whole = [(numbers.start, numbers.stop)]
    attempt = Attempt(number=1, backend="vllm", state="collected", rows=whole, started=now(), ended=now())
    run.write_job(Job(shard=shard, attempts=[attempt]))


class _Scattered:
    """Lines in files chosen by lot, each shuffled at the end: together a shuffle of all."""

    def __init__(self, folder: Path) -> None:
        self._paths = [folder / f".scattered-{number}" for number in range(SCATTERED)]

    def __enter__(self) -> Self:
        self._streams = [open(path, "wb", buffering=1 << 16) for path in self._paths]  # noqa: SIM115
        return self

    def __exit__(self, *_: object) -> None:
        for stream, path in zip(self._streams, self._paths, strict=True):
            stream.close()
            path.unlink(missing_ok=True)

    def add(self, lines: list[bytes], chance: random.Random) -> None:
        for line, stream in zip(lines, chance.choices(self._streams, k=len(lines)), strict=False):
            stream.write(line)

    def gather(self, target: Path, chance: random.Random) -> None:
        with open(target, "wb", buffering=1 << 20) as out:
            for stream, path in zip(self._streams, self._paths, strict=True):
                stream.flush()
                lines = path.read_bytes().splitlines(keepends=True)
                chance.shuffle(lines)
                out.writelines(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--no-foreign", action="store_true", help="leave out responses.jsonl")
    arguments = parser.parse_args()
    made = make(arguments.folder, arguments.rows, foreign=not arguments.no_foreign)
    shards = sum(1 for _ in made.seals())
    print(f"{made.path}: {arguments.rows:,} rows in {shards:,} shards")


if __name__ == "__main__":
    main()
