"""Progress of a long stage: a bar on a terminal, a plain line now and then in a log, nothing on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

LOG_SECONDS = 15.0
MOST_SHOWN = 20
"""Rows of a table: it must fit on a screen."""


class BoardRow(NamedTuple):
    """One of several things that run elsewhere. Counts are of requests, None where nobody says."""

    name: str
    state: str
    total: int
    done: int | None
    failed: int | None
    tokens: int | None
    seconds: float


class Progress(Protocol):
    """What a stage tells about itself. `total` may grow; `note` is a short text behind the counts.

    `board` is told all that runs elsewhere, each time it was looked at.
    """

    def update(self, done: int = 1, *, note: str | None = None) -> None: ...

    def grow(self, total: int) -> None: ...

    def say(self, message: str) -> None: ...

    def board(self, rows: Sequence[BoardRow]) -> None: ...


class Silent:
    """Tells nobody: what library calls use by default."""

    def update(self, done: int = 1, *, note: str | None = None) -> None:
        pass

    def grow(self, total: int) -> None:
        pass

    def say(self, message: str) -> None:
        pass

    def board(self, rows: Sequence[BoardRow]) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Console:
    """Tells stderr. Use as a context manager; `unit` is the plural of what is counted. `quiet`: only what is said."""

    def __init__(self, title: str, total: int | None = None, *, unit: str = "rows", quiet: bool = False) -> None:
        self._quiet = quiet
        self._title = title
        self._unit = unit
        self._total = total
        self._done = 0
        self._note = ""
        self._started = self._last = time.monotonic()
        self._bar: Any = None
        self._board: Any = None
        self._states: dict[str, str] = {}
        if sys.stderr.isatty() and not quiet:
            from tqdm import tqdm

            # With each update shown, no thread needs to watch over the bar; beside threads no worker can be forked.
            tqdm.monitor_interval = 0
            self._bar = tqdm(total=total, desc=title, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True, miniters=1)

    def update(self, done: int = 1, *, note: str | None = None) -> None:
        self._done += done
        self._note = note if note is not None else self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(done)
        elif not self._quiet and time.monotonic() - self._last >= LOG_SECONDS:
            self._line()

    def grow(self, total: int) -> None:
        self._total = total
        if self._bar is not None:
            self._bar.total = total
            self._bar.refresh()

    def say(self, message: str) -> None:
        if self._board is not None:
            self._board.console.print(message, highlight=False, markup=False)
        elif self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def board(self, rows: Sequence[BoardRow]) -> None:
        """A live table on a terminal; in a log, a line for each whose state has changed."""
        if self._quiet:
            return
        if sys.stderr.isatty():
            self._live_board().update(_table(self._title, rows), refresh=True)
            return
        for row in rows:
            if self._states.get(row.name) != row.state:
                self._states[row.name] = row.state
                counts = f", {row.done:,} of {row.total:,} done" if row.done else f", {row.total:,} {self._unit}"
                failed = f", {row.failed:,} failed" if row.failed else ""
                print(f"{self._title}: {row.name} {row.state}{counts}{failed}", file=sys.stderr, flush=True)

    def _live_board(self) -> Any:
        if self._board is None:
            from rich.console import Console as Terminal
            from rich.live import Live

            if self._bar is not None:  # the table says more
                self._bar.leave = False
                self._bar.close()
                self._bar = None
            self._board = Live(console=Terminal(stderr=True), auto_refresh=False)
            self._board.start()
        return self._board

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
        if self._board is not None:
            self._board.stop()
        if self._bar is not None:
            self._bar.close()


def _table(title: str, rows: Sequence[BoardRow]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("shard")
    table.add_column("state")
    for name in ("requests", "done", "failed", "tokens", "age"):
        table.add_column(name, justify="right")
    shown = sorted(rows)[:MOST_SHOWN]
    for row in shown:
        counts = [f"{count:,}" if count is not None else "" for count in (row.total, row.done, row.failed, row.tokens)]
        table.add_row(row.name, row.state, *counts, _age(row.seconds))
    if len(rows) > len(shown):
        table.add_row(f"… {len(rows) - len(shown):,} more", "", *[""] * 5)
    return table


def _age(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
