"""Progress of a long stage: a bar on a terminal, a plain line now and then in a log, nothing on stdout."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self

LOG_SECONDS = 15.0


class Progress(Protocol):
    """What a stage tells about itself. `total` may grow; `note` is a short text behind the counts."""

    def update(self, done: int = 1, *, note: str | None = None) -> None: ...

    def grow(self, total: int) -> None: ...

    def say(self, message: str) -> None: ...


class Silent:
    """Tells nobody: what library calls use by default."""

    def update(self, done: int = 1, *, note: str | None = None) -> None:
        pass

    def grow(self, total: int) -> None:
        pass

    def say(self, message: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Console:
    """Tells stderr. Use as a context manager; `unit` is the plural of what is counted."""

    def __init__(self, title: str, total: int | None = None, *, unit: str = "rows") -> None:
        self._title = title
        self._unit = unit
        self._total = total
        self._done = 0
        self._note = ""
        self._started = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=title, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True)

    def update(self, done: int = 1, *, note: str | None = None) -> None:
        self._done += done
        self._note = note if note is not None else self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(done)
        elif time.monotonic() - self._last >= LOG_SECONDS:
            self._line()

    def grow(self, total: int) -> None:
        self._total = total
        if self._bar is not None:
            self._bar.total = total
            self._bar.refresh()

    def say(self, message: str) -> None:
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def _line(self) -> None:
        self._last = time.monotonic()
        rate = self._done / max(self._last - self._started, 1e-9)
        of = f"/{self._total:,}" if self._total is not None else ""
        note = f", {self._note}" if self._note else ""
        print(f"{self._title}: {self._done:,}{of} {self._unit}, {rate:,.0f}/s{note}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
