"""`prepare` and `submit` of one `run`: side by side, or one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from batchkit.feeds import Feed
from batchkit.making import Maker
from batchkit.progress import Console, Silent
from batchkit.reports import SubmitReport
from batchkit.runs import Run
from batchkit.submission import terminable
from batchkit.tallies import Report

Show = Callable[[str], AbstractContextManager[Console | Silent]]
"""Gives the progress of a stage by its name."""


@dataclasses.dataclass(frozen=True)
class Stages:
    """`make` and `send` are `prepare` and `submit` with the user's options.

    `check` is given the names of ours that rows use, before anything is sent; `prepared` and `submitted` get
    the reports.
    """

    make: Callable[..., Report]
    send: Callable[..., SubmitReport]
    check: Callable[[list[str]], None]
    show: Show
    prepared: Callable[[Report], object]
    submitted: Callable[[SubmitReport], object]

    def in_turn(self, run: str | Path, *, delete_sent: bool) -> None:
        """All is prepared before anything is sent."""
        with self.show("prepare") as progress:
            report = self.make(progress=progress)
        self.prepared(report)
        self.check(report.names_in_use)
        feed = Feed(Run.open(run).seals(), bounded=True) if delete_sent else None
        with self.show("submit") as progress:
            sent = self.send(progress=progress, feed=feed)
        self.submitted(sent)

    def overlapped(self, *, shards: str | None, delete_sent: bool) -> None:
        """What is sealed is sent while the rest is prepared. Whichever stage fails first ends the other; what is
        finished is kept."""
        feed = Feed(shards=shards, is_open=True, bounded=delete_sent)
        with self.show("submit") as progress, terminable():
            maker = Maker(lambda shown, sealed: self.make(progress=shown, sealed=sealed), feed, progress, self.check)
            try:
                maker.wait()
                sent = self.send(progress=progress, feed=feed)
                # Where a limit was reached, requests that nobody sends now would fill the disk.
                report = maker.stop() if delete_sent else maker.finish()
            except BaseException:
                maker.stop()
                raise
        if report is not None:
            self.prepared(report)
        self.submitted(sent)
