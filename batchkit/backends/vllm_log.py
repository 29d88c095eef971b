"""vLLM's own log, read: how far it is, and why it ended."""

from __future__ import annotations

import contextlib
import re
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Literal

import msgspec

from batchkit.signatures import hide

Kind = Literal["disk", "missing", "model", "memory", "argument", "request", "lost", "other"]
"""`lost`: where the engine ran is gone, which says nothing of its requests. No log says that."""

# `Running batch:  12% Completed | 25/200 [00:01<00:09, 19.1req/s]`; it prints 0% before the first request.
_PROGRESS = re.compile(rb"Running batch[^|]*\|\s*(\d+)/(\d+) \[")
_LOADING = re.compile(rb"Starting to load model|Loading (?:model|weights|safetensors)")
_PREFIX = re.compile(
    r"^(?:\([^)]*pid=\d+\)\s*)?(?:(?:INFO|WARNING|ERROR|DEBUG|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\]\s?)?"
)
_FRAME = re.compile(
    r"^(?!  Value error|  .*\[type=)\s+|^Traceback \(most recent call last\)|^(?:The above|During handling)|^\^+$"
)
_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|Exit))\b:? ?(.*)")
_SECOND_HAND = re.compile(r"EngineDeadError|RuntimeError: Engine core init")
_CHATTER = re.compile(
    r"^(?:\([^)]*pid=\d+\)\s*)?(?:INFO|DEBUG) |it/s\]|req/s\]|\[transformers\]|Warning: |^Triton is installed"
    r"|^Retrying in \d+s|thrown while requesting "
)

_CAUSES: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("disk", re.compile(r"No space left on device|Disk quota exceeded")),
    (
        "argument",
        re.compile(r"error: (?P<text>(?:unrecognized arguments?|argument|ambiguous option|the following arg).*)"),
    ),
    ("request", re.compile(r"validation errors? for Batch\w*Input")),
    # pydantic's reason for refusing vLLM's configuration stands on a line of its own.
    ("argument", re.compile(r"^  Value error, (?P<text>[^\[]+)")),
    ("missing", re.compile(r"No module named '?vllm\b")),
    (
        "model",
        re.compile(
            r"Repo id must|is not a local folder and is not a valid model identifier|Invalid repository ID or local"
            r"|does not appear to have a file named config\.json|Repository Not Found|LocalEntryNotFound"
            r"|couldn't connect to 'https://huggingface|Cannot find any model weights|Unrecognized model in"
            r"|outgoing traffic has been disabled|Model architectures .* are not supported"
        ),
    ),
    (
        "memory",
        re.compile(
            r"out of memory|OutOfMemoryError|Free memory on device|No available memory"
            r"|KV cache.*larger than|larger than the available KV cache|[Cc]annot allocate memory|^MemoryError"
            r"|[Nn]ot enough (?:available )?memory|bad_alloc|Available memory on node .* less than"
        ),
    ),
    # Options of a request that exclude each other. Last: while the engine works, it logs these and goes on.
    ("request", re.compile(r"^(?:[\w.]+\.)?VLLMValidationError\b")),
)
TAIL_BYTES = 256 * 1024


class Cause(msgspec.Struct, frozen=True):
    """Why an engine ended: `text` is one line of its log, or of ours; `tail` the last useful lines."""

    kind: Kind
    text: str
    tail: str


class LogTail:
    """Follows a log as it grows. `done` of `total` requests; `ready` once the engine works on them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self.done = 0
        self.total = 0
        self.ready = False
        self.loading = False

    def read(self) -> None:
        """Take in what was written since the last call."""
        try:
            with open(self._path, "rb") as stream:
                stream.seek(self._offset)
                new = stream.read()
        except FileNotFoundError:
            return
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            if found := _PROGRESS.search(line):
                self.done, self.total, self.ready = int(found[1]), int(found[2]), True
            elif not self.loading and _LOADING.search(line):
                self.loading = True


class LineCount:
    """Counts the lines of a file as it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.lines = 0

    def read(self) -> None:
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as stream:
            stream.seek(self._offset)
            while piece := stream.read(1 << 20):
                self._offset += len(piece)
                self.lines += piece.count(b"\n")


def find_cause(path: Path, exit_code: int) -> Cause:
    """Why the engine that wrote `path` ended with `exit_code`."""
    lines = useful_lines(path)
    tail = "\n".join(list(lines)[-15:])
    for kind, pattern in _CAUSES:
        # The first that matches: what follows is mostly vLLM reporting the same from further out.
        for place, line in enumerate(lines):
            if found := pattern.search(line):
                text = found.groupdict().get("text") or line
                if kind == "request" and " validation error" in line:  # the field and what is wrong with it come next
                    text = "; ".join(part.strip() for part in islice(lines, place, place + 3))
                return Cause(kind, _shorten(_bare(text)), tail)
    if exit_code == -9:
        return Cause("memory", "it was killed (signal 9): most often the system does that when memory runs out", tail)
    said = [_bare(line) for line in lines if _EXCEPTION.match(line)]
    # What the main process says of the death of its engine process comes after the reason, if there is one.
    said = [line for line in said if not _SECOND_HAND.match(line)] or said
    if said:
        return Cause("other", _shorten(said[0]), tail)
    if not exit_code:
        return Cause("other", "its engine process died", tail)
    how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    return Cause("other", f"it ended with {how}", tail)


def useful_lines(path: Path) -> deque[str]:
    """The end of the log without time stamps, chatter, progress bars and the frames of tracebacks."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = stream.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return deque()
    lines: deque[str] = deque(maxlen=1000)
    for raw in re.split(r"[\r\n]+", text):
        line = _PREFIX.sub("", raw).rstrip()
        if line and not _FRAME.match(line) and not _CHATTER.search(raw) and (not lines or lines[-1] != line):
            lines.append(_shorten(hide(line), 500))
    return lines


def _bare(line: str) -> str:
    """An exception's message without its module: `a.b.FooError: text` → `FooError: text`."""
    found = _EXCEPTION.match(line)
    return f"{found[1]}: {found[2]}" if found and found[2] else line


def _shorten(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
