"""vLLM's servers for one `submit`: started, waited for, started again when they die, ended with it."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from batchkit.backends.vllm import Vllm
from batchkit.backends.vllm_serve import Served
from batchkit.client import Endpoint
from batchkit.errors import BatchkitError, EngineError
from batchkit.progress import Progress

LOOK_SECONDS = 0.5
START_SECONDS = 3600.0
"""Large models take long to load, from a slow disk longer still."""

MOST_DEATHS = 3
"""In a row, with no answer in between: then it is not a request, it is the server."""


class Serving:
    """The servers and the thread that watches over them. `endpoints` are theirs."""

    def __init__(self, runner: Vllm, folder: Path, progress: Progress) -> None:
        self._runner = runner
        self._folder = folder
        self._progress = progress
        self._servers = [Served(runner, folder / str(slot), slot) for slot in range(runner.replicas)]
        self._over = threading.Event()
        self._deaths = dict.fromkeys(range(runner.replicas), 0)
        self._done = dict.fromkeys(range(runner.replicas), 0)
        self.endpoints = [Endpoint(server.url) for server in self._servers]
        self.error: BatchkitError | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Have all servers up; end them behind the block. Raises `EngineError` where one does not start."""
        watcher = threading.Thread(target=self._watch, name="batchkit-servers", daemon=True)
        try:
            for note in self._runner.notes:
                self._progress.say(note)
            for server in self._servers:
                server.start()
            self._wait()
            watcher.start()
            yield
        finally:
            self._over.set()
            if watcher.ident is not None:
                watcher.join()  # or it might start a server behind our back
            for server in self._servers:
                if server.starts:
                    server.stop()
            shutil.rmtree(self._folder, ignore_errors=True)

    def check(self) -> None:
        """Raise what keeps a server from starting again."""
        if self.error is not None:
            raise self.error

    def _wait(self) -> None:
        end_of_patience = time.monotonic() + START_SECONDS
        while not all(server.ready for server in self._servers):
            if time.monotonic() > end_of_patience:
                raise self._late()
            for server in self._servers:
                if not server.ready and (end := server.look(LOOK_SECONDS)) is not None:
                    raise self._runner.explain(end)
            self._progress.update(0, note=", ".join(sorted({server.stage for server in self._servers})))
        self._progress.update(0, note="serving")

    def _late(self) -> EngineError:
        return EngineError(
            f"vLLM's server has not been ready after {START_SECONDS / 60:.0f} minutes",
            hint="--engine run-batch works without a server; a smaller model says whether vLLM works at all",
        )

    def _watch(self) -> None:
        try:
            while not self._over.wait(LOOK_SECONDS):
                for slot in range(len(self._servers)):
                    self._look_after(slot)
        except BatchkitError as exc:
            self.error = exc
        except Exception as exc:  # noqa: BLE001  # whatever it is, the submit must not wait for ever
            self.error = EngineError(f"vLLM's servers cannot be watched over: {type(exc).__name__}: {exc}")

    def _look_after(self, slot: int) -> None:
        """Start the server again where it has died. Raises `EngineError` where that does not help."""
        server = self._servers[slot]
        end = server.look()
        if end is None:
            if not server.ready and server.seconds > START_SECONDS:
                raise self._late()
            return
        answered = self.endpoints[slot].done
        self._deaths[slot] = 1 if answered > self._done[slot] else self._deaths[slot] + 1
        self._done[slot] = answered
        if self._deaths[slot] >= MOST_DEATHS:
            raise self._runner.explain(end)
        if not self._over.is_set():
            self._progress.say(f"vLLM's server {slot} died: {end.cause.text}; it is started again")
            server.start()
