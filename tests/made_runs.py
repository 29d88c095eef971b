"""Runs made by hand, for tests of what reads them: rows, ids, seals, jobs and response lines, without `prepare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from batchkit.jobs import Attempt, AttemptState, Job
from batchkit.manifests import OUR_NAMES, Input, Manifest, Prepared, Rejection, Seal
from batchkit.runs import Run
from batchkit.tasks import make_custom_id


def task_lines(count: int = 30) -> bytes:
    """A task file whose rows are questions without images."""
    return b"".join(json.dumps({"id": n, "question": f"q{n}"}).encode() + b"\n" for n in range(count))


def response_line(custom_id: str, content: str | None, *, finish: str = "stop", **body: Any) -> bytes:
    """A success as vLLM 0.32 and OpenAI write it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    whole = {"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage, **body}
    returned = {"status_code": 200, "request_id": "vllm-batch-1", "body": whole}
    return json.dumps({"id": "vllm-1", "custom_id": custom_id, "response": returned, "error": None}).encode()


def failure_line(custom_id: str, status: int, message: str) -> bytes:
    """A failure as vLLM 0.32 writes it."""
    error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    returned = {"status_code": status, "request_id": "vllm-batch-1", "body": None}
    line = {"id": "vllm-1", "custom_id": custom_id, "response": returned, "error": {"error": error}}
    return json.dumps(line).encode()


ENGINE_DIED = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def _fields(row: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(row)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


class MadeRun:
    """A run whose shards are added one after another; `ids` are those of all rows so far."""

    def __init__(self, path: Path) -> None:
        manifest = Manifest(
            format=1,
            batchkit="0",
            created="2026-01-01T00:00:00.000+00:00",
            input=Input(uri=str(path.parent / "tasks.jsonl"), bytes=0),
            model="manifest-model",
            backend="vllm",
            options={},
        )
        self.run = Run.create(path, manifest)
        self.ids: list[str] = []
        self.shards = 0

    def add_shard(self, rows: Sequence[bytes], rejected: dict[int, str] | None = None) -> Seal:
        """`rejected` maps indices within the shard to messages."""
        start, shard = len(self.ids), self.shards
        ids = [make_custom_id(start + index, row) for index, row in enumerate(rows)]
        self.ids += ids
        self.shards += 1
        rows_bytes, ids_bytes = (b"".join(line + b"\n" for line in lines) for lines in (rows, map(str.encode, ids)))
        self.run.rows_path(shard).write_bytes(rows_bytes)
        self.run.ids_path(shard).write_bytes(ids_bytes)
        seal = Seal(
            shard=shard,
            start=start,
            end=start + len(rows),
            requests=len(rows) - len(rejected or {}),
            rejected=[
                Rejection(
                    position=start + index, line=start + index + 1, custom_id=ids[index], code="json", message=why
                )
                for index, why in (rejected or {}).items()
            ],
            rows_bytes=len(rows_bytes),
            requests_bytes=0,
            pixels=0,
            rows_checksum=xxhash.xxh3_128_hexdigest(rows_bytes),
            ids_checksum=xxhash.xxh3_128_hexdigest(ids_bytes),
            requests_checksum="",
            next_line=0,
            next_offset=0,
            names_in_use=sorted({name for row in rows for name in _fields(row) if name in OUR_NAMES}),
        )
        self.run.write_seal(seal)
        return seal

    def add_attempt(
        self,
        shard: int,
        lines: Sequence[bytes] = (),
        *,
        state: AttemptState = "collected",
        rows: list[tuple[int, int]] | None = None,
        torn: bytes = b"",
    ) -> int:
        """An attempt that took `rows` (all of the shard by default); `torn` follows the lines without a line feed."""
        seal = list(self.run.seals())[shard]
        job = self.run.job(shard)
        number = len(job.attempts) + 1
        attempt = Attempt(
            number=number,
            backend="vllm",
            state=state,
            rows=rows or [(seal.start, seal.end)],
            started=f"2026-01-01T00:0{number}:00.000+00:00",
            ended=f"2026-01-01T00:0{number}:10.000+00:00" if state in ("collected", "died") else None,
        )
        self.run.write_job(Job(shard=shard, attempts=[*job.attempts, attempt]))
        self.run.responses_path(shard, number).write_bytes(b"".join(line + b"\n" for line in lines) + torn)
        return number

    def finish(self, names_in_use: Sequence[str] = ()) -> None:
        count = len(self.ids)
        self.run.write_prepared(
            Prepared(
                shards=self.shards,
                rows=count,
                requests=count,
                rejected=0,
                rows_bytes=0,
                requests_bytes=0,
                names_in_use=list(names_in_use),
                finished="2026-01-01T00:00:00.000+00:00",
            )
        )
