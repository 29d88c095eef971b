"""Local GPUs (or CPUs), through vLLM's own batch runner: one engine takes a file of requests and writes a file.

It knows of files in a folder, not of rows, shards or runs: `input.jsonl` in, `output.jsonl` out, `log.txt` and
`identity.json` beside them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import psutil

from batchkit import processes
from batchkit.backends import vllm_install
from batchkit.backends.vllm_log import Cause, LineCount, LogTail, find_cause
from batchkit.errors import BatchkitError, EngineError, StorageError, UsageError

INPUT, OUTPUT, LOG, IDENTITY = "input.jsonl", "output.jsonl", "log.txt", "identity.json"


class End(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine ended. `ready`: it had come as far as taking requests, after `startup_seconds`.

    The exit code alone does not tell a death: up to 0.32 run_batch ends with 0 when its engine process died, and
    writes error lines for what was open.
    """

    exit_code: int
    ready: bool
    startup_seconds: float | None
    seconds: float
    cause: Cause
    """Of no meaning where it ended well."""


class Process(Protocol):
    """An engine's processes, here or elsewhere, as `processes.Engine`. `cause` is known where no log says it."""

    @property
    def cause(self) -> Cause | None: ...

    def poll(self, seconds: float = 0.0) -> int | None: ...

    def stop(self) -> int: ...


class Start:
    """One running engine."""

    def __init__(self, engine: Process, folder: Path, slot: int) -> None:
        self._engine = engine
        self._log = LogTail(folder / LOG)
        self._began = time.monotonic()
        self._startup: float | None = None
        self._output = LineCount(folder / OUTPUT)
        self.folder = folder
        self.slot = slot

    @property
    def done(self) -> int:
        """How many requests the engine says it has finished."""
        return max(self._log.done, self._output.lines)

    @property
    def ready(self) -> bool:
        """Whether it has come as far as taking requests."""
        return self._log.ready or self._output.lines > 0

    @property
    def stage(self) -> str:
        if self.ready:
            return "running"
        return (
            f"{'loading the model' if self._log.loading else 'starting vLLM'}, {time.monotonic() - self._began:.0f} s"
        )

    def poll(self, seconds: float = 0.0) -> End | None:
        """How it ended, None while it runs. Waits up to `seconds` for the end."""
        code = self._engine.poll(seconds)
        self._look()
        return None if code is None else self._end(code)

    def stop(self) -> End:
        """End it now."""
        code = self._engine.stop()
        self._look()
        return self._end(code)

    def _look(self) -> None:
        self._log.read()
        self._output.read()
        if self.ready and self._startup is None:
            self._startup = time.monotonic() - self._began

    def _end(self, code: int) -> End:
        return End(
            exit_code=code,
            ready=self.ready,
            startup_seconds=self._startup,
            seconds=time.monotonic() - self._began,
            cause=self._engine.cause or find_cause(self.folder / LOG, code),
        )


class Runner(Protocol):
    """Where the engines of one `submit` run: `Vllm` here, or one on a cluster."""

    replicas: int
    args: tuple[str, ...]
    notes: list[str]

    @property
    def streams(self) -> bool: ...

    def memory(self) -> int:
        """The bytes that all engines together can have now."""

    def is_up(self, slot: int) -> bool:
        """Whether an engine can be started in this slot now. Raises `EngineError` where none ever can."""

    def start(self, folder: Path, slot: int) -> Start: ...

    def explain(self, end: End) -> BatchkitError: ...


class Vllm:
    """The engines of one `submit`: up to `replicas` of them at a time, each on its own GPUs.

    `pooling` is vLLM's word for the task of a model that generates nothing (embed, score).

    Raises `UsageError` for arguments that are batchkit's to set or more replicas than GPUs, `EngineError` where there
    is no vLLM.
    """

    def __init__(self, *, model: str, replicas: int = 1, args: Sequence[str] = (), pooling: str | None = None) -> None:
        if replicas < 1:
            raise UsageError("--replicas must be at least 1")
        vllm_install.refuse_ours(args)
        self.install = vllm_install.find_install()
        self.replicas = replicas
        added = vllm_install.pooling_args(self.install, pooling, args) if pooling is not None else []
        self.args = (*added, *args)
        self.model = model
        environment = dict(os.environ)
        gpus = [] if self.install.cpu else vllm_install.list_gpus(environment)
        self.mib = min((gpu.mib for gpu in gpus), default=0)
        self._groups = vllm_install.split_gpus(gpus, replicas, args)
        self._cores = vllm_install.split_cores(replicas, args) if self.install.cpu else [None] * replicas
        self._environment = environment
        space = vllm_install.kv_cache_gib(self.install, environment, args, replicas)
        self.notes = [f"vLLM on CPUs: {space} GiB for its cache; VLLM_CPU_KVCACHE_SPACE says another size"] * bool(
            space
        )
        if added:
            self.notes.append(f"vLLM gets {' '.join(added)}: the requests ask for no text")
        self._space = space

    @property
    def streams(self) -> bool:
        """Whether it reads and writes as it goes, so that one start can take any amount."""
        return self.install.streams

    def memory(self) -> int:
        """The bytes that all engines together can have now."""
        return int(psutil.virtual_memory().available)

    def is_up(self, slot: int) -> bool:
        """Always: they are on this machine."""
        return slot < self.replicas

    def start(self, folder: Path, slot: int) -> Start:
        """Start an engine on `folder/input.jsonl`, on the GPUs of `slot` (below `replicas`)."""
        return Start(self.start_engine(folder, slot), folder.absolute(), slot)

    def start_engine(self, folder: Path, slot: int, *, orphan: Path | None = None) -> processes.Engine:
        """The same, for one who watches over it himself; `orphan` is as for `processes.start`."""
        folder = folder.absolute()
        scratch = processes.make_scratch()
        command = vllm_install.engine_command(
            self.install,
            source=folder / INPUT,
            target=folder / OUTPUT,
            model=self.model,
            names=[self.model],
            args=self.args,
            mib=self.mib,
        )
        return processes.start(
            command,
            environment=self.environment(slot, scratch),
            log=folder / LOG,
            identity=folder / IDENTITY,
            scratch=scratch,
            orphan=orphan,
        )

    def environment(self, slot: int, scratch: Path) -> dict[str, str]:
        """Of an engine on the GPUs of `slot`."""
        return vllm_install.engine_environment(
            base=self._environment,
            scratch=scratch,
            gpus=self._groups[slot],
            cores=self._cores[slot],
            kv_cache_gib=self._space,
        )

    def explain(self, end: End) -> BatchkitError:
        """The error for an engine that did not work, with the end of its own log."""
        return explain_end(end, install=self.install, model=self.model, args=self.args)


def explain_end(end: End, *, install: vllm_install.Install, model: str, args: Sequence[str]) -> BatchkitError:
    """The error for an engine that did not work, with the end of its own log."""
    cause = end.cause
    if cause.kind == "disk":
        return StorageError(
            f"the disk is full: vLLM says: {cause.text}",
            hint="free some disk space and run the same command again: it goes on where it stopped",
            detail=cause.tail,
        )
    weights = vllm_install.given(args).get("--model") or model
    said = {
        "argument": f"vLLM {install.text} does not take the arguments given to it: {cause.text}",
        "missing": "vLLM is not installed",
        "model": f"vLLM cannot load the model {weights}: {cause.text}",
        "memory": f"vLLM ran out of memory: {cause.text}",
    }
    less = "--gpu-memory-utilization 0.85" if not install.cpu else "--kv-cache-memory-bytes 1G"
    hints = {
        "argument": "correct the arguments behind --",
        "missing": "pip install 'batchkit-vlm[vllm]'",
        "model": "the weights are a folder that holds config.json, or a name on the model hub; where they go by "
        "another name than the one prepared with: batchkit submit RUN -- --model FOLDER",
        "memory": f"give it less to hold, for example: -- --max-model-len 4096 {less}",
    }
    when = "ended while it ran" if end.ready else "did not start"
    message = said.get(cause.kind, f"vLLM {when}: {cause.text}")
    return EngineError(message, hint=hints.get(cause.kind, "the end of vLLM's own log may say more"), detail=cause.tail)


def end_left_over(folder: Path) -> bool:
    """End the engine that worked in `folder` and whose batchkit has died. Returns whether it still ran."""
    identity = processes.read_identity(folder / IDENTITY)
    return identity is not None and processes.end_left_over(identity)
