"""A live OpenAI-compatible server on a real socket that fails on request. Answers a question with itself.

A process of its own where it is to be killed (`python -m tests.fake_server PORT`), else a thread (`running`).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """`faults` are used up in order, one a request; `always` is for those behind them. `answered` counts
    the whole 200s by question, `times` has when each request came; `elsewhere` is where its list of models moved."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.faults: deque[Callable[[Handler], bool]] = deque()
        self.always: Callable[[Handler], bool] | None = None
        self.answered: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.bodies: list[bytes] = []
        self.times: list[float] = []
        self.models = ["m"]
        self.say: Callable[[str], str] = lambda question: f"answer to {question}"
        self.key: str | None = None
        self.elsewhere: str | None = None
        self.models_status = 200
        self.delay = 0.0
        self.busy = self.busiest = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    question = ""

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.server.key is not None and self.headers.get("authorization") != f"Bearer {self.server.key}":
            self.send(401, {"error": {"message": f"no such key: {self.headers.get('authorization')}"}})
        elif self.server.elsewhere is not None:
            self.send(307, {}, {"location": self.server.elsewhere})
        elif self.path == "/v1/models":
            self.send(
                self.server.models_status, {"object": "list", "data": [{"id": name} for name in self.server.models]}
            )
        else:
            self.send(404, {"error": {"message": "not here"}})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        server = self.server
        body = json.loads(raw)
        question = question_of(body)
        self.question = question
        with server.lock:
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            server.asked[question] += 1
            server.times.append(time.monotonic())
            if len(server.bodies) < 10:
                server.bodies.append(raw)
            fault = server.faults.popleft() if server.faults else server.always
        try:
            if fault is not None and fault(self):
                return
            if server.delay:
                time.sleep(server.delay)
            self.answer(question, body)
        finally:
            with server.lock:
                server.busy -= 1

    def answer(self, question: str, body: dict[str, Any]) -> None:
        with self.server.lock:
            self.server.answered[question] += 1
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        named = {"id": "c", "created": 1, "model": "m", "usage": usage}
        self.send(200, {**named, **reply_of(self.path, body, self.server.say(question))})

    def send(self, code: int, value: Any, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(2)


def question_of(body: dict[str, Any]) -> str:
    """The text that a request of any endpoint asks about."""
    asked = next(body[key] for key in ("messages", "input", "prompt", "query", "text_1") if key in body)
    if isinstance(asked, list) and asked and isinstance(asked[-1], dict):
        asked = asked[-1]["content"]
    return asked[-1]["text"] if isinstance(asked, list) else str(asked)


def reply_of(path: str, body: dict[str, Any], text: str) -> dict[str, Any]:
    """What vLLM 0.32 says at each endpoint. Documents score by their length, a question's vector is its length too."""
    scores = [len(document) for document in as_list(body.get("documents", body.get("text_2", [])))]
    if path == "/v1/completions":
        return {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": "stop"}]}
    if path == "/v1/responses":
        message = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
        return {"object": "response", "status": "completed", "output": [{"type": "reasoning"}, message]}
    if path == "/v1/embeddings":
        return {"object": "list", "data": [{"index": 0, "embedding": [float(len(question_of(body))), 0.5]}]}
    if path.endswith("/score"):
        data = [{"index": at, "object": "score", "score": score} for at, score in enumerate(scores)]
        return {"object": "list", "data": data[::-1]}
    if path.endswith("/rerank"):
        ranked = sorted(enumerate(scores), key=lambda entry: -entry[1])
        return {"results": [{"index": at, "document": {"text": "…"}, "relevance_score": n} for at, n in ranked]}
    message = {"role": "assistant", "content": text}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# -- faults: they return whether the request is done with ------------------------------------------------------------


def status(code: int, message: str = "no", **headers: str) -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        handler.send(code, {"error": {"message": message, "type": "t", "code": code}}, named)
        return True

    return fault


def hang(seconds: float) -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        time.sleep(seconds)
        handler.hang_up()
        return True

    return fault


def drop(handler: Handler) -> bool:
    """Close the connection without a word."""
    handler.hang_up()
    return True


def cut(handler: Handler) -> bool:
    """Half of a 200, and then nothing."""
    handler.send(200, {"id": "c", "choices": [{"message": {"content": "half an answer"}}]}, cut=True)
    return True


def nonsense(handler: Handler) -> bool:
    """A 200 that is no JSON."""
    data = b"<html>\nhello\n</html>"
    handler.send_response(200)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
    return True


def whole(body: bytes, *, length: bool = True, **headers: str) -> Callable[[Handler], bool]:
    """A 200 with just this body; without its length the end of the connection ends it."""

    def fault(handler: Handler) -> bool:
        handler.send_response(200)
        for name, text in headers.items():
            handler.send_header(name.replace("_", "-"), text)
        if length:
            handler.send_header("content-length", str(len(body)))
        else:
            handler.send_header("connection", "close")
        handler.end_headers()
        handler.wfile.write(body)
        if not length:
            handler.hang_up()
        return True

    return fault


def fine(_: Handler) -> bool:
    return False


@contextmanager
def running() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    alone = Server(int(sys.argv[1]))
    alone.delay = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    alone.serve_forever()
