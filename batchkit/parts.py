"""Several runs of one task file, each of some of its rows: in order, and checked before `merge` makes one of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from batchkit.errors import UsageError
from batchkit.manifests import Seal
from batchkit.runs import Run
from batchkit.storage import is_plain_local
from batchkit.summaries import Gap, Part

_MAY_DIFFER = frozenset(
    {"start", "end", "limit", "reuse", "image_root", "max_requests", "max_bytes", "allow_private_hosts"}
)
"""Options that say which rows, or how they are packed, or where this machine has the files."""
_SHOWN = 60
_ONE_FILE = "name the parts of one task file, each prepared with its own --start and --end"


class Span(NamedTuple):
    """A run and the rows `[start, end)` that it had when it was looked at; `last` is its last seal. `attached`: some
    rows had images beside their JSON."""

    run: Run
    start: int
    end: int
    last: Seal | None
    attached: bool = False

    def seals(self) -> Iterator[Seal]:
        """Those of these rows: more may have been prepared since."""
        return itertools.takewhile(lambda seal: seal.end <= self.end, self.run.seals())

    @property
    def rows(self) -> str:
        return f"{self.start:,} to {self.end - 1:,}"

    @property
    def rows_are_tasks(self) -> bool:
        """Whether the rows that the run keeps ask by themselves what was asked: those of some tables had images beside
        them, and those of VLMEvalKit are asked by its own rules."""
        return not self.attached and self.run.manifest.options.get("input_format") != "vlmevalkit"


class Parts:
    """Runs in the order of their rows.

    Raises `UsageError` where they are not parts of one file or have rows in common, `RunError` where one is damaged.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.spans = sorted(map(_span, runs), key=lambda span: (span.start, span.end))
        if len(runs) > 1:
            _refuse_twice(runs)
            _refuse_other_files(runs)
            _refuse_overlap(self.spans)

    def known(self) -> dict[str, Any]:
        """What the summary says of them, where there are several."""
        if len(self.spans) == 1:
            return {"model": self.spans[0].run.manifest.model}
        models = {span.run.manifest.model for span in self.spans}
        return {
            "model": models.pop() if len(models) == 1 else None,
            "parts": [
                Part(run=str(span.run.path), start=span.start, end=span.end, model=span.run.manifest.model)
                for span in self.spans
            ],
            "gaps": list(_gaps([span for span in self.spans if span.last is not None])),
            "differences": list(_differences([span.run for span in self.spans])),
        }


def _span(run: Run) -> Span:
    first = last = None
    attached = False
    for last in run.seals():  # the last one is wanted
        first = first or last
        attached = attached or bool(last.attached_checksum)
    if first is None or last is None:
        start = int(run.manifest.options.get("start") or 0)
        return Span(run, start, start, None)
    return Span(run, first.start, last.end, last, attached)


def _refuse_twice(runs: Sequence[Run]) -> None:
    seen: set[Path] = set()
    for run in runs:
        if run.path.resolve() in seen:
            raise UsageError(f"{run.path}: is named twice", hint=_ONE_FILE)
        seen.add(run.path.resolve())


def _refuse_other_files(runs: Sequence[Run]) -> None:
    """Where the files are on another machine is no matter; what is in them is."""
    one = runs[0].manifest.input
    for run in runs[1:]:
        other = run.manifest.input
        names = f"{run.path} was prepared from {other.uri}, {runs[0].path} from {one.uri}"
        if one.bytes != other.bytes:
            raise UsageError(f"{names}: files of {other.bytes:,} and {one.bytes:,} bytes are not one", hint=_ONE_FILE)
        if None not in (one.fingerprint, other.fingerprint) and one.fingerprint != other.fingerprint:
            raise UsageError(f"{names}: these files are not the same", hint=_ONE_FILE)


def _refuse_overlap(spans: Sequence[Span]) -> None:
    for one, other in itertools.pairwise(span for span in spans if span.last is not None):
        if other.start < one.end:
            both = Gap(start=other.start, end=min(one.end, other.end)).rows
            raise UsageError(
                f"{both} are in two of the runs: {one.run.path} has rows {one.rows}, {other.run.path} {other.rows}",
                hint=_ONE_FILE,
            )


def _gaps(spans: Sequence[Span]) -> Iterator[Gap]:
    end = 0
    for span in spans:
        if span.start > end:
            yield Gap(start=end, end=span.start)
        end = span.end
    if spans and _goes_on(spans[-1]):
        yield Gap(start=end, end=None)


def _goes_on(span: Span) -> bool:
    """Whether the task file is known to have rows behind the span, and nobody is preparing them."""
    asked = span.run.manifest
    in_bytes = asked.options.get("input_format") in ("jsonl", "batch") and is_plain_local(asked.input.uri)
    if not in_bytes or span.last is None or span.run.prepared() is None:
        return False
    return _has_row(Path(asked.input.uri.removeprefix("file://")), span.last.next_offset, asked.input.bytes)


def _has_row(path: Path, start: int, end: int) -> bool:
    """Whether a line of the file that is not blank begins in `[start, end)`; where it cannot be read, a byte more than
    a line feed is taken for one."""
    try:
        with open(path, "rb") as stream:
            if os.fstat(stream.fileno()).st_size != end:
                return end - start > 1
            stream.seek(start)
            return any(line.strip() for line in stream)
    except OSError:
        return end - start > 1


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    settings = [{"model": run.manifest.model, "backend": run.manifest.backend, **run.manifest.options} for run in runs]
    for name in dict.fromkeys(itertools.chain.from_iterable(settings)):
        values: dict[str, list[str]] = {}
        for run, options in zip(runs, settings, strict=True):
            values.setdefault(repr(options.get(name)), []).append(str(run.path))
        if name not in _MAY_DIFFER and len(values) > 1:
            said = "; ".join(f"{_shown(value)} in {', '.join(paths)}" for value, paths in values.items())
            yield f"--{name.replace('_', '-')} is {said}"


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def open_all(run: str | Path | Run | Sequence[str | Path | Run]) -> list[Run]:
    """The run or runs that are named. Raises `UsageError` for none at all."""
    several = [run] if isinstance(run, (str, Path, Run)) else list(run)
    if not several:
        raise UsageError("no run is named", hint="batchkit merge --help")
    return [one if isinstance(one, Run) else Run.open(one) for one in several]
