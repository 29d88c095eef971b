"""Servers of the S3 protocol on loopback, as processes of their own: moto, which takes everything, and ministack, which
checks who asks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from batchkit import s3

ACCESS_KEY, SECRET_KEY = "AKIATESTTESTTEST", "wJalrXUtnFEMI-not-to-be-seen-anywhere"


def environment(url: str, work: Path) -> dict[str, str]:
    """What a user has set."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "BATCHKIT_WORK_DIR": str(work),
    }


class Bucket:
    """A bucket of one test's own."""

    def __init__(self, name: str, url: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.name = name
        self.url = url
        self.folder = folder
        self._patch = patch
        self.on("first")
        s3.client().create_bucket(Bucket=name)

    def on(self, machine: str) -> None:
        """Go on, on this machine."""
        for name, value in environment(self.url, self.folder / machine).items():
            self._patch.setenv(name, value)

    def uri(self, name: str) -> str:
        return f"s3://{self.name}/{name}"

    def put(self, name: str, body: bytes) -> str:
        s3.put(self.uri(name), body)
        return self.uri(name)

    def get(self, name: str) -> bytes:
        return s3.get(self.uri(name))[0]

    def names(self, prefix: str = "") -> list[str]:
        return [prefix + found.name for found in s3.listed(self.uri(prefix))]


@contextmanager
def moto(folder: Path) -> Iterator[str]:
    port = free_port()
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with _serving(command, port, folder, {}) as url:
        yield url


@contextmanager
def ministack(folder: Path, **settings: str) -> Iterator[str]:
    port = free_port()
    command = [str(Path(sys.executable).with_name("ministack"))]
    with _serving(command, port, folder, {"GATEWAY_PORT": str(port), **settings}) as url:
        yield url


@contextmanager
def _serving(command: list[str], port: int, folder: Path, settings: dict[str, str]) -> Iterator[str]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(command, cwd=folder, env={**os.environ, **settings}, stdout=log, stderr=log)
        try:
            _wait_for(port, server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert server.poll() is None, "the server has ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server does not listen")


@contextmanager
def refusing(status: int, code: str) -> Iterator[str]:
    """A server that answers every GET and HEAD with one error, as S3 words it: for what no real one does on request."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
