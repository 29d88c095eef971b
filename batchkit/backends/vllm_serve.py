"""vLLM's own server on local GPUs (or CPUs), started and watched over: a live endpoint that batchkit owns."""

from __future__ import annotations

import http.client
import socket
import time
import urllib.request
from pathlib import Path

from batchkit import processes
from batchkit.backends import vllm_install
from batchkit.backends.vllm import IDENTITY, LOG, End, Vllm
from batchkit.backends.vllm_log import LogTail, find_cause

MODULE = "vllm.entrypoints.openai.api_server"
"""The command `vllm serve` runs it, too; the CPU wheels have no such command (0.10 to 0.33)."""

HEALTH_SECONDS = 2.0


class Served:
    """One server, of one slot of a `Vllm`. It may be started again after its end, on the same port."""

    def __init__(self, runner: Vllm, folder: Path, slot: int) -> None:
        self._runner = runner
        self._folder = folder.absolute()
        self._slot = slot
        self._port = _free_port()
        self.url = f"http://127.0.0.1:{self._port}/v1"
        self.starts = 0
        self.ready = False

    def start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        runner, scratch = self._runner, processes.make_scratch()
        command = vllm_install.server_command(
            runner.install, module=MODULE, port=self._port, model=runner.model, args=runner.args, mib=runner.mib
        )
        (self._folder / LOG).unlink(missing_ok=True)
        self._engine = processes.start(
            command,
            environment=runner.environment(self._slot, scratch),
            log=self._folder / LOG,
            identity=self._folder / IDENTITY,
            scratch=scratch,
        )
        self._log = LogTail(self._folder / LOG)
        self._began = time.monotonic()
        self.ready = False
        self.starts += 1

    def look(self, seconds: float = 0.0) -> End | None:
        """How it ended, None while it runs; also looks whether it answers."""
        code = self._engine.poll(seconds)
        if code is not None:
            return self._end(code)
        if not self.ready:
            self._log.read()
            self.ready = _is_healthy(f"http://127.0.0.1:{self._port}/health")
        return None

    @property
    def stage(self) -> str:
        if self.ready:
            return "serving"
        word = "loading the model" if self._log.loading else "starting vLLM"
        return f"{word}, {self.seconds:.0f} s"

    @property
    def seconds(self) -> float:
        """Since it was started the last time."""
        return time.monotonic() - self._began

    def stop(self) -> None:
        self._engine.stop()

    def _end(self, code: int) -> End:
        return End(
            exit_code=code,
            ready=self.ready,
            startup_seconds=None,
            seconds=self.seconds,
            cause=find_cause(self._folder / LOG, code),
        )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _is_healthy(url: str) -> bool:
    """Asked directly: a proxy would look for the server at itself."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=HEALTH_SECONDS) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False
