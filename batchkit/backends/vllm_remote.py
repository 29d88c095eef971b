"""One engine of a Ray cluster, as `engines` sees it: as one of this machine, its log and its output in a folder."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any

from batchkit import clusters
from batchkit.backends.vllm import INPUT, LOG, OUTPUT
from batchkit.backends.vllm_log import Cause
from batchkit.backends.vllm_replica import PIECE_BYTES

WAIT_SECONDS = 1.0
STOP_SECONDS = 30.0


class RemoteEngine:
    """One engine in an actor; a thread brings the input there, and the log and the output back."""

    def __init__(self, ray: Any, actor: Any, folder: Path) -> None:
        self._ray = ray
        self._actor = actor
        self._folder = folder
        self._code: int | None = None
        self._over, self._stopping = threading.Event(), threading.Event()
        self.cause: Cause | None = None
        self._thread = threading.Thread(target=self._work, name="batchkit-ray", daemon=True)
        self._thread.start()

    def poll(self, seconds: float = 0.0) -> int | None:
        """The exit code once it has ended and all that it wrote is here, None before that."""
        return self._code if self._over.wait(seconds) else None

    def stop(self) -> int:
        """End it, and get what it has written."""
        self._stopping.set()
        code = self.poll(STOP_SECONDS)
        if code is None:  # its machine does not answer: Ray ends the actor when it does again
            self._lose("it did not answer", code=-9)
            self._ray.kill(self._actor)
        return -9 if code is None else code

    def _work(self) -> None:
        errors = self._ray.exceptions
        try:
            self._bring_input()
            code = self._follow()
            self._get(self._actor.stop.remote())
            self._code = code
        except _StoppedError:
            self._code = -9
        except errors.RayTaskError as exc:  # raised by our own code there
            cause = exc.cause
            full = isinstance(cause, OSError) or "No space left" in str(cause)
            self.cause, self._code = Cause("disk" if full else "other", clusters.reason(cause), ""), 1
        except errors.RayError as exc:
            self._lose(clusters.reason(exc), code=1)
        except OSError as exc:  # of our own files
            self._abandon(Cause("disk", f"{exc.filename}: {exc.strerror}", ""))
        except Exception as exc:  # noqa: BLE001  # whatever it is, submit must not wait for ever
            self._abandon(Cause("other", f"{type(exc).__name__}: {exc}", ""))
        finally:
            self._over.set()

    def _lose(self, why: str, *, code: int) -> None:
        self.cause, self._code = Cause("lost", f"its Ray actor died: {why}", ""), code

    def _abandon(self, cause: Cause) -> None:
        with contextlib.suppress(Exception):
            self._actor.stop.remote()
        self.cause, self._code = cause, 1

    def _get(self, reference: Any) -> Any:
        """Wait for an answer, as long as nobody has given up. Raises what Ray raises."""
        given_up: float | None = None
        while True:
            try:
                return self._ray.get(reference, timeout=WAIT_SECONDS)
            except self._ray.exceptions.GetTimeoutError:
                if self._stopping.is_set():
                    given_up = given_up or time.monotonic() + STOP_SECONDS
                if given_up is not None and time.monotonic() > given_up:
                    raise

    def _bring_input(self) -> None:
        self._get(self._actor.open.remote())
        with open(self._folder / INPUT, "rb") as stream:
            while piece := stream.read(PIECE_BYTES):
                if self._stopping.is_set():
                    self._get(self._actor.stop.remote())
                    raise _StoppedError
                self._get(self._actor.write.remote(piece))
        self._get(self._actor.start.remote())

    def _follow(self) -> int:
        """Append what the engine writes to the files here, up to its end. Returns its exit code."""
        halted = False
        with open(self._folder / OUTPUT, "ab") as output, open(self._folder / LOG, "ab") as log:
            while True:
                if self._stopping.is_set() and not halted:
                    self._get(self._actor.halt.remote())
                    halted = True
                code, answers, said = self._get(self._actor.look.remote(output.tell(), log.tell()))
                for stream, piece in ((output, answers), (log, said)):
                    stream.write(piece)
                    stream.flush()
                if answers:
                    os.fsync(output.fileno())
                if code is not None and not answers and not said:
                    return int(code)


class _StoppedError(Exception):
    """Stopped before the engine was started."""
