"""The far end of an engine on a Ray cluster: runs in an actor, and drives the same runner as on one machine.

It shares no file system with batchkit: the input comes in pieces, and the log and the output go back in pieces, whole
or not. Ray kills an actor's child processes before it ends the actor, so the engine's keeper is none of them; and each
input gets a folder of its own, so that what an earlier attempt still writes is never read as a later one's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from batchkit import __version__, processes
from batchkit.backends.vllm import INPUT, LOG, OUTPUT, Vllm
from batchkit.errors import BatchkitError

LOOK_SECONDS = 0.5
PIECE_BYTES = 8_000_000
"""Of a file, at most, in one message: what each end holds of it."""


class Replica:
    """One engine at a time. Answers are plain values, so that another version of batchkit can read them."""

    def __init__(
        self, *, model: str, args: Sequence[str], environment: Mapping[str, str], pooling: str | None = None
    ) -> None:
        os.environ.update(environment)
        self._folder: Path | None = None
        self._engine: processes.Engine | None = None
        self._runner: Vllm | None = None
        self._error: dict[str, str | None] | None = None
        try:
            self._runner = Vllm(model=model, args=args, pooling=pooling)
        except BatchkitError as exc:
            self._error = {"message": exc.message, "hint": exc.hint}

    def hello(self) -> dict[str, Any]:
        """Who is here: the versions, and what keeps an engine from running."""
        return {
            "batchkit": __version__,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "memory": int(psutil.virtual_memory().available),
            "install": msgspec.to_builtins(self._runner.install) if self._runner else None,
            "notes": self._runner.notes if self._runner else [],
            "error": self._error,
        }

    def open(self) -> None:
        """A new folder, for a new input."""
        self.stop()
        self._folder = Path(tempfile.mkdtemp(prefix="bkit-ray-"))

    def write(self, piece: bytes) -> None:
        """Append to the input."""
        with open(self._at(INPUT), "ab") as stream:
            stream.write(piece)

    def start(self) -> None:
        """Start the engine on the input."""
        assert self._runner is not None  # noqa: S101  # hello said so
        folder = self._at(INPUT).parent
        self._engine = self._runner.start_engine(folder, 0, orphan=folder)

    def look(self, output_at: int, log_at: int) -> tuple[int | None, bytes, bytes]:
        """The exit code once the engine has ended, and what its output and its log have behind these offsets.

        Waits a little where there is nothing new.
        """
        assert self._engine is not None  # noqa: S101  # it was started
        code = self._engine.poll()
        output, log = self._read(OUTPUT, output_at), self._read(LOG, log_at)
        if code is None and not output and not log:
            self._engine.poll(LOOK_SECONDS)
        return code, output, log

    def halt(self) -> None:
        """End the engine; what it has written can still be looked at."""
        if self._engine is not None:
            self._engine.stop()

    def stop(self) -> None:
        """End the engine, and remove its files."""
        self.halt()
        self._engine = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _at(self, name: str) -> Path:
        assert self._folder is not None  # noqa: S101  # open was called
        return self._folder / name

    def _read(self, name: str, offset: int) -> bytes:
        with contextlib.suppress(FileNotFoundError), open(self._at(name), "rb") as stream:
            stream.seek(offset)
            return stream.read(PIECE_BYTES)
        return b""
