"""submit against AIBrix, a batch server from another project, over its real Files and Batches API.

It runs in an environment of its own. The model behind it is a stub: what is tested is the batch service, and one batch
has to be slow enough to expire.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv" / "aibrix" / "bin" / "python"
# Its metadata service takes a static backend where it would look for a Kubernetes cluster.
LAUNCH = """
import sys
import aibrix.metadata.app as app
from aibrix.batch.client.sources.static import StaticEndpointSource
url = sys.argv.pop(1)
app.NoopEndpointSource = lambda: StaticEndpointSource(url, capacity=4, timeout=120)
app.main()
"""
ROWS, SHARD = 500, 100
SLOW = range(200, 300)
BAD = frozenset(range(7, ROWS, 50))


class Model(BaseHTTPRequestHandler):
    """Answers a question with itself, some with 400, some slowly in the first minute."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    asked: ClassVar[Counter[str]] = Counter()
    began: ClassVar[list[float]] = []

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        question = body["messages"][-1]["content"]
        number = int(question.rstrip("?"))
        self.asked[question] += 1
        if number in SLOW:
            self.began.append(time.monotonic())
            if time.monotonic() - self.began[0] < 55:
                time.sleep(13)  # five times: none ends near the minute, where AIBrix may lose what ends then
        if number in BAD:
            self.answer(400, {"error": {"message": f"no {number}", "type": "BadRequestError", "code": 400}})
            return
        message = {"role": "assistant", "content": f"answer to {number}"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        self.answer(200, {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": choices,
                          "usage": usage})  # fmt: skip

    def answer(self, code: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def model_server() -> Iterator[str]:
    Model.asked.clear()
    Model.began.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def aibrix(folder: Path, model: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-c", LAUNCH, model, "--host", "127.0.0.1", "--port", str(port), "--dry-run"]
    with open(folder / "aibrix.log", "wb") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/healthz", server, folder / "aibrix.log")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.kill()
            server.wait()


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310  # loopback
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    if sys.version_info >= (3, 13):
        pytest.skip("AIBrix 0.8 runs on Python 3.10 to 3.12")
    subprocess.run([sys.executable, ROOT / "tools" / "bootstrap.py", "--aibrix"], check=True)


def batchkit(*arguments: str | Path, key: str = "sk-of-no-meaning") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "batchkit", *map(str, arguments)],
        env={**os.environ, "OPENAI_API_KEY": key},
        capture_output=True,
        text=True,
        check=False,
    )


def test_500_requests_in_5_batches_of_which_one_expires(tmp_path: Path) -> None:
    tasks, run = tmp_path / "tasks.jsonl", tmp_path / "run"
    tasks.write_text("".join(json.dumps({"id": n, "question": f"{n}?"}) + "\n" for n in range(ROWS)))
    prepared = batchkit("prepare", tasks, run, "--model", "m", "--backend", "openai", "--max-requests", str(SHARD))
    assert "500 requests of 500 rows, in 5 shards" in prepared.stderr
    with model_server() as model, aibrix(tmp_path, model) as url:
        options = ("--base-url", url, "--completion-window", "1m", "--poll-interval", "1")
        submitted = batchkit("submit", run, *options)
        asked = dict(Model.asked)
    assert submitted.returncode == 3, submitted.stderr
    assert "expired or failed in passing; once more" in submitted.stderr
    merged = batchkit("merge", run)
    assert merged.returncode == 3

    summary = json.loads((run / "summary.json").read_bytes())
    assert {verdict: count for verdict, count in summary["verdicts"].items() if count} == {
        "answered": ROWS - len(BAD),
        "failed": len(BAD),
    }
    results = [json.loads(line) for line in (run / "results.jsonl").read_bytes().splitlines()]
    assert [result["id"] for result in results] == list(range(ROWS))
    for number, result in enumerate(results):
        assert result["raw_response"] == (None if number in BAD else f"answer to {number}")
        assert (result["batchkit"]["verdict"] == "failed") == (number in BAD)

    endings = [
        [attempt["ending"] for attempt in json.loads((run / "jobs" / f"{shard:05d}.json").read_bytes())["attempts"]]
        for shard in range(5)
    ]
    assert [shard for shard, seen in enumerate(endings) if "expired" in seen] == [2]
    assert endings[2][-1] == "completed"
    first = sum(1 for line in (run / "responses" / "00002.1.jsonl").read_bytes().splitlines() if line)
    second = sum(1 for line in (run / "responses" / "00002.2.jsonl").read_bytes().splitlines() if line)
    assert 0 < first < SHARD, "the expired batch has a part of its answers"
    assert first + second == SHARD, "and only the rest was sent again"
    assert all(asked[f"{n}?"] == 1 for n in range(ROWS) if n not in SLOW and n not in BAD)
