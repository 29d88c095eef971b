"""A batch provider on a real socket that does, on request, what real ones do when nobody wants it.

It speaks OpenAI's Files and Batches API (platform.openai.com/docs/api-reference/batch) below `/v1`, and Gemini's batch
jobs (ai.google.dev/api/batch-api) below `/v1beta`, as the real SDKs use them. It keeps the books: `paid` counts how
often each request was accepted for payment, `answers` what each of them was answered.
"""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[["_Handler", Callable[[], None]], None]
"""Gets the handler, and what it would do; does it or not, and breaks what it likes."""


# -- faults ----------------------------------------------------------------------------------------------------------


def status(code: int, message: str = "no", **headers: str) -> Fault:
    """Answer with an error, and do nothing."""

    def fault(handler: _Handler, _: Callable[[], None]) -> None:
        handler.read_body()
        handler.send_json({"error": {"message": message, "type": "t", "code": None}}, code, headers)

    return fault


def drop_after(handler: _Handler, do: Callable[[], None]) -> None:
    """Do it, and close the connection without an answer."""
    handler.muted = True
    do()
    handler.hang_up()


def fail_after(code: int) -> Fault:
    """Do it, and say that it failed."""

    def fault(handler: _Handler, do: Callable[[], None]) -> None:
        handler.muted = True
        do()
        handler.muted = False
        handler.send_json({"error": {"message": "internal"}}, code)

    return fault


def stall_after(seconds: float) -> Fault:
    """Do it, and answer so late that the caller has given up."""

    def fault(handler: _Handler, do: Callable[[], None]) -> None:
        handler.muted = True
        do()
        time.sleep(seconds)
        handler.hang_up()

    return fault


def fine(_: _Handler, do: Callable[[], None]) -> None:
    """Nothing is wrong."""
    do()


def nonsense_after(handler: _Handler, do: Callable[[], None]) -> None:
    """Do it, and answer with a page of HTML."""
    handler.muted = True
    do()
    handler.muted = False
    handler.send_bytes(b"<html>Welcome to the proxy</html>", 200, "text/html")


def drop_before(handler: _Handler, _: Callable[[], None]) -> None:
    """Close the connection in the middle of what is being sent."""
    handler.rfile.read(min(64, int(handler.headers.get("content-length") or 0)))
    handler.hang_up()


def cut(handler: _Handler, do: Callable[[], None]) -> None:
    """Close the connection in the middle of the answer."""
    handler.cut = True
    do()


def call(function: Callable[[], Any], *, after: bool = False) -> Fault:
    """Call something of the test's before it is done, or after it was done and before it is answered."""

    def fault(handler: _Handler, do: Callable[[], None]) -> None:
        handler.muted = after
        if after:
            do()
            function()
            handler.hang_up()
        else:
            function()
            do()

    return fault


# -- the provider ----------------------------------------------------------------------------------------------------


class Provider:
    """The state, and what is to go wrong.

    `faults[operation]` are used up in order, one a call; operations are upload, create, list, check, download, cancel,
    delete. `endings` are used up in order, one a batch: `completed`, `expired:3` (three were run before),
    `cancelled:3`, `partial:3`, `token-limit`, `invalid:1,4` (lines), `invalid` (no line), `failed`. `answer` maps a
    request to its status and text. `lost` counts what a Gemini job ran and never gave back.
    """

    def __init__(self) -> None:
        self.url = ""
        self.lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forget everything but the address."""
        self.files: dict[str, bytes] = {}
        self.names: dict[str, str] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.paid: Counter[str] = Counter()
        self.answers: dict[str, list[str]] = defaultdict(list)
        self.calls: Counter[str] = Counter()
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.endings: deque[str] = deque()
        self.deleted: list[str] = []
        self.key = "sk-fake-0123456789"
        self.polls = 1
        self.list_lag = 0
        self.late_files = 0
        self.keeps_metadata = True
        self.counts = True
        self.page = 1000
        self.short_uploads = 0
        self.changes: deque[Callable[[list[bytes]], list[bytes]]] = deque()
        self.answer: Callable[[str, str, int], tuple[int, str]] = lambda custom_id, question, tries: (
            200,
            f"answer to {custom_id}",
        )
        self.seen: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()

    def create(self, file_id: str, **fields: Any) -> dict[str, Any]:
        """Accept a batch. What it will answer is settled, and paid for, now."""
        batch_id = f"batch_{uuid.uuid4().hex[:12]}"
        ending, _, detail = (self.endings.popleft() if self.endings else "completed").partition(":")
        lines = [json.loads(line) for line in self.files[file_id].splitlines() if line.strip()]
        batch = {
            "id": batch_id, "file": file_id, "ending": ending, "detail": detail, "polls": self.polls, "hidden":
            self.list_lag, "created": time.time(), "total": len(lines), "cancelled": False, "late": self.late_files,
            "completed": 0, "failed": 0, **fields,
        }  # fmt: skip
        run = lines
        if ending in ("token-limit", "invalid", "failed"):
            run = []
        elif detail:
            run = lines[: int(detail)]
        batch["output"], batch["errors"] = self._run(run, batch)
        self.batches[batch_id] = batch
        return batch

    def _run(self, lines: list[dict[str, Any]], batch: dict[str, Any]) -> tuple[str | None, str | None]:
        good: list[bytes] = []
        bad: list[bytes] = []
        for line in lines:
            gemini = "key" in line
            custom_id = line["key"] if gemini else line["custom_id"]
            self.paid[custom_id] += 1
            self.seen[custom_id] += 1
            code, text = self.answer(custom_id, _question(line), self.seen[custom_id])
            self.answers[custom_id].append(text)
            if gemini:
                (good if code == 200 else bad).append(_gemini_line(custom_id, code, text))
            else:
                (good if code == 200 else bad).append(_openai_line(custom_id, code, text))
        batch["completed"], batch["failed"] = len(good), len(bad)
        if lines and "key" in lines[0]:
            good, bad = good + bad, []
            if batch["ending"] in ("expired", "failed"):
                self.lost.update(line["key"] for line in lines)
        return self._store(good), self._store(bad)

    def _store(self, lines: list[bytes]) -> str | None:
        if not lines:
            return None
        if self.changes:
            lines = self.changes.popleft()(lines)
        file_id = f"file-{uuid.uuid4().hex[:12]}"
        self.files[file_id] = b"".join(line + b"\n" for line in lines)
        return file_id

    def state_of(self, batch: dict[str, Any]) -> str:
        """Moves the batch on: each poll brings it nearer to its end."""
        if batch["cancelled"] and batch["ending"] == "completed":
            return "cancelled"
        if batch["polls"] > 0:
            return "in_progress"
        word = {"token-limit": "failed", "invalid": "failed"}
        return str(word.get(batch["ending"], batch["ending"]))

    def poll(self, batch: dict[str, Any]) -> None:
        if batch["polls"] > 0:
            batch["polls"] -= 1
        elif batch["late"] > 0:
            batch["late"] -= 1

    def visible(self) -> Iterator[dict[str, Any]]:
        for batch in reversed(list(self.batches.values())):
            if batch["hidden"] > 0:
                batch["hidden"] -= 1
            else:
                yield batch

    @property
    def accepted(self) -> list[dict[str, Any]]:
        """The batches of which something was run."""
        return [batch for batch in self.batches.values() if batch["output"] or batch["errors"]]


def _question(line: dict[str, Any]) -> str:
    if "key" in line:
        return "".join(part.get("text", "") for part in line["request"]["contents"][-1]["parts"])
    if "messages" not in line["body"]:
        return str(line["body"].get("input"))
    content = line["body"]["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _openai_line(custom_id: str, code: int, text: str) -> bytes:
    if code == 200:
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        body: Any = {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m-2026", "usage": usage,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }  # fmt: skip
    else:
        body = {"error": {"message": text, "type": "t", "code": None}}
    returned = {"status_code": code, "request_id": "r", "body": body}
    return json.dumps({"id": "batch_req_1", "custom_id": custom_id, "response": returned, "error": None}).encode()


def _gemini_line(key: str, code: int, text: str) -> bytes:
    if text.startswith("BLOCK:"):
        return json.dumps({"key": key, "response": {"promptFeedback": {"blockReason": text[6:]}}}).encode()
    if code != 200:
        return json.dumps({"key": key, "error": {"code": {429: 8, 503: 14}.get(code, 3), "message": text}}).encode()
    candidate = {"content": {"parts": [{"text": text}], "role": "model"}, "finishReason": "STOP", "index": 0}
    usage = {"promptTokenCount": 10, "candidatesTokenCount": 2, "totalTokenCount": 12}
    response = {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "gemini-2.5-flash"}
    return json.dumps({"key": key, "response": response}).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer takes 40 ms: headers and body are two writes
    provider: Provider
    muted = False
    cut = False

    def log_message(self, *args: Any) -> None:
        pass

    # -- plumbing

    def read_body(self) -> bytes:
        if (self.headers.get("transfer-encoding") or "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def send_json(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(json.dumps(value).encode(), code, "application/json", headers)

    def send_bytes(self, data: bytes, code: int, kind: str, headers: dict[str, str] | None = None) -> None:
        if self.muted:
            return
        self.send_response(code)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.cut:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.hang_up()
        else:
            self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(2)

    def _serve(self, operation: str, do: Callable[[], None]) -> None:
        self.muted = self.cut = False
        provider = self.provider
        with provider.lock:
            provider.calls[operation] += 1
            fault = provider.faults[operation].popleft() if provider.faults[operation] else None
        given = (self.headers.get("authorization") or "").removeprefix("Bearer ") or self.headers.get("x-goog-api-key")
        if given != provider.key and not self.path.startswith("/upload-here/"):  # such a URL is a key by itself
            self.read_body()
            message = f"Incorrect API key provided: {given}. You can find your API key at example.com."
            self.send_json({"error": {"message": message, "code": "invalid_api_key"}}, 401)
        elif fault is not None:
            fault(self, do)
        else:
            do()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not path.startswith(("/v1/", "/v1beta/")):
            self.send_json({"error": {"message": f"nothing at {path}"}}, 404)
        elif path.endswith(("/content", ":download")):
            self._serve("download", lambda: self._download(path))
        elif path.endswith("/batches"):
            self._serve("list", self._list)
        elif "/batches/" in path:
            self._serve("check", lambda: self._check(path.rpartition("/")[2]))
        else:
            self.send_json({"error": {"message": f"nothing at {path}"}}, 404)

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        if path.endswith("/files") or path.startswith("/upload-here/"):
            self._serve("upload", lambda: self._upload(path))
        elif path.endswith(("/batches", ":batchGenerateContent")):
            self._serve("create", self._create)
        elif path.endswith(("/cancel", ":cancel")):
            batch_id = re.split(r"[/:]", path)[-2]
            self._serve("cancel", lambda: self._cancel(batch_id))
        else:
            self.send_json({"error": {"message": f"nothing at {path}"}}, 404)

    def do_DELETE(self) -> None:
        file_id = self.path.rpartition("/")[2]

        def do() -> None:
            with self.provider.lock:
                known = self.provider.files.pop(file_id, None) is not None
                self.provider.deleted.append(file_id)
            self.send_json({"id": file_id, "deleted": known}, 200 if known else 404)

        self._serve("delete", do)

    # -- operations

    @property
    def _gemini(self) -> bool:
        return "v1beta" in self.path or self.path.startswith("/upload-here/")

    def _upload(self, path: str) -> None:
        body = self.read_body()
        if self._gemini and not path.startswith("/upload-here/"):
            self.send_json({}, 200, {"x-goog-upload-url": f"{self.provider.url}/upload-here/{uuid.uuid4().hex[:8]}",
                                     "x-goog-upload-status": "active"})  # fmt: skip
            return
        name = "gemini.jsonl"
        if not self._gemini:
            boundary = (self.headers.get("content-type") or "").partition("boundary=")[2].encode()
            part = next(part for part in body.split(b"--" + boundary) if b'filename="' in part)
            head, _, body = part.partition(b"\r\n\r\n")
            body = body.removesuffix(b"\r\n")
            name = re.search(rb'filename="([^"]*)"', head)[1].decode()  # type: ignore[index]
            assert name.endswith(".jsonl")
        file_id = f"file-{uuid.uuid4().hex[:12]}"
        with self.provider.lock:
            self.provider.files[file_id] = body
            self.provider.names[file_id] = name
        if self._gemini:
            file = {"name": f"files/{file_id}", "sizeBytes": str(len(body))}
            self.send_json({"file": file}, 200, {"x-goog-upload-status": "final"})
        else:
            size = len(body)
            if self.provider.short_uploads:
                self.provider.short_uploads -= 1
                size //= 2
            self.send_json({"id": file_id, "object": "file", "bytes": size, "filename": name, "purpose": "batch"})

    def _create(self) -> None:
        body = json.loads(self.read_body())
        with self.provider.lock:
            if self._gemini:
                inner = body["batch"]
                source = inner.get("inputConfig") or inner.get("input_config")
                file_id = (source.get("fileName") or source.get("file_name")).removeprefix("files/")
                batch = self.provider.create(file_id, display=inner.get("displayName") or inner.get("display_name"))
            else:
                batch = self.provider.create(
                    body["input_file_id"], metadata=body.get("metadata"), endpoint=body["endpoint"]
                )
            shown = self._shown(batch)
        self.send_json(shown)

    def _list(self) -> None:
        with self.provider.lock:
            shown = [self._shown(batch) for batch in self.provider.visible()]
        query = dict(pair.partition("=")[::2] for pair in self.path.partition("?")[2].split("&"))
        size = self.provider.page
        if self._gemini:
            start = int(query.get("pageToken") or 0)
            more = {"nextPageToken": str(start + size)} if start + size < len(shown) else {}
            self.send_json({"operations": shown[start : start + size], **more})
        else:
            ids = [batch["id"] for batch in shown]
            start = ids.index(query["after"]) + 1 if "after" in query else 0
            page = shown[start : start + size]
            self.send_json({"object": "list", "data": page, "has_more": start + size < len(shown)})

    def _check(self, batch_id: str) -> None:
        with self.provider.lock:
            batch = self.provider.batches.get(batch_id)
            if batch is None:
                self.send_json({"error": {"message": f"no batch {batch_id}"}}, 404)
                return
            self.provider.poll(batch)
            shown = self._shown(batch)
        self.send_json(shown)

    def _cancel(self, batch_id: str) -> None:
        self.read_body()
        with self.provider.lock:
            self.provider.batches[batch_id]["cancelled"] = True
            shown = self._shown(self.provider.batches[batch_id])
        self.send_json({} if self._gemini else shown)

    def _download(self, path: str) -> None:
        file_id = path.removesuffix("/content").removesuffix(":download").rpartition("/")[2]
        data = self.provider.files.get(file_id)
        if data is None:
            self.send_json({"error": {"message": f"no file {file_id}"}}, 404)
        else:
            self.send_bytes(data, 200, "application/octet-stream")

    def _shown(self, batch: dict[str, Any]) -> dict[str, Any]:
        state = self.provider.state_of(batch)
        ended = state not in ("in_progress", "validating")
        files = ended and batch["late"] == 0
        if self._gemini:
            return _gemini_batch(batch, state, files=files)
        counts = {name: batch[name] if ended or name == "total" else 0 for name in ("total", "completed", "failed")}
        errors: list[dict[str, Any]] = []
        if ended and batch["ending"] == "token-limit":
            errors = [{"code": "token_limit_exceeded", "message": ENQUEUED, "param": None, "line": None}]
        elif ended and batch["ending"] == "invalid":
            numbers: list[int | None] = [int(number) for number in batch["detail"].split(",") if number]
            numbers = numbers or [None]
            errors = [
                {"code": "invalid_request", "message": f"bad line {number}", "line": number} for number in numbers
            ]
        return {
            "id": batch["id"], "object": "batch", "endpoint": batch["endpoint"], "input_file_id": batch["file"],
            "completion_window": "24h", "status": state, "created_at": int(batch["created"]),
            "output_file_id": batch["output"] if files else None, "error_file_id": batch["errors"] if files else "",
            "errors": {"object": "list", "data": errors} if errors else None,
            "metadata": batch["metadata"] if self.provider.keeps_metadata else None,
            "request_counts": counts if self.provider.counts else None,
        }  # fmt: skip


ENQUEUED = (
    "Enqueued token limit reached for m in organization o. Limit: 90000 enqueued tokens. "
    "Please try again once some in_progress batches have been completed."
)
RUNNING = ("RUNNING", "PENDING", "QUEUED", "PAUSED", "UPDATING", "CANCELLING", "UNSPECIFIED", "NEVER_SEEN_BEFORE")
SPELLINGS = ("JOB_STATE_", "BATCH_STATE_")


def _gemini_batch(batch: dict[str, Any], state: str, *, files: bool) -> dict[str, Any]:
    running = RUNNING[batch["polls"] % len(RUNNING)]
    words = {"in_progress": running, "completed": "SUCCEEDED", "partial": "PARTIALLY_SUCCEEDED"}
    word = words.get(state, state.upper())
    stats = {"requestCount": str(batch["total"]), "successfulRequestCount": str(batch["completed"]),
             "failedRequestCount": str(batch["failed"])}  # fmt: skip
    spelling = SPELLINGS[(int(batch["id"][-1], 16) + batch["polls"]) % 2]
    meta: dict[str, Any] = {
        "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
        "displayName": batch["display"], "state": spelling + word, "model": "models/gemini-2.5-flash",
        "createTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(batch["created"])),
        "batchStats": stats if files else {"requestCount": str(batch["total"])},
    }  # fmt: skip
    shown: dict[str, Any] = {"name": f"batches/{batch['id']}", "metadata": meta}
    if files:
        shown["done"] = True
        if state == "failed":
            shown["error"] = {"code": 3, "message": "the job failed"}
        elif state != "expired" and batch["output"]:
            meta["output"] = {"responsesFile": f"files/{batch['output']}"}
            shown["response"] = {"responsesFile": f"files/{batch['output']}"}
    return shown


@contextmanager
def running() -> Iterator[Provider]:
    """A provider that listens at `provider.url`; OpenAI's base URL is that and `/v1`."""
    provider = Provider()
    handler = type("Handler", (_Handler,), {"provider": provider})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    provider.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        server.server_close()
