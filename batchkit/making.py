"""`prepare` in a thread of its own, so that `submit` works on what is sealed meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from batchkit.errors import RunError
from batchkit.feeds import Feed, StoppedError
from batchkit.manifests import Seal
from batchkit.progress import BoardRow, Progress
from batchkit.tallies import Report

WAIT_SECONDS = 0.2


class Behind:
    """The progress of `prepare` behind that of `submit`: what it says is said, its rows are counted for the note."""

    def __init__(self, feed: Feed, shown: Progress) -> None:
        self._feed = feed
        self._shown = shown

    def update(self, done: int = 1, *, note: str | None = None) -> None:  # noqa: ARG002  # there is one line: submit's
        self._feed.rows += done
        self._feed.check()  # at each row: a shard may take minutes

    def grow(self, total: int) -> None:
        pass

    def say(self, message: str) -> None:
        self._shown.say(message)

    def board(self, rows: Sequence[BoardRow]) -> None:
        pass


class Maker:
    """`make` is `prepare`, given its progress and whom to tell of what is sealed."""

    def __init__(
        self,
        make: Callable[[Progress, Callable[[list[Seal]], None]], Report],
        feed: Feed,
        shown: Progress,
        check: Callable[[list[str]], None],
    ) -> None:
        self._make = make
        self._feed = feed
        self._shown = shown
        self._check = check
        self._report: Report | None = None
        self._thread = threading.Thread(target=self._work, name="batchkit-prepare")
        self._thread.start()

    def wait(self) -> None:
        """Until there is something to begin with. Raises what ended `prepare`."""
        while not self._feed.wait(WAIT_SECONDS):
            self._shown.update(0, note=self._feed.stage)
        self._shown.update(0, note="")
        self._feed.take()

    def finish(self) -> Report:
        """Wait for the rest of it. Raises what ended it."""
        while self._thread.is_alive():
            self._shown.update(0, note=self._feed.stage)
            self._thread.join(WAIT_SECONDS)
        self._feed.take()  # raises
        if self._report is None:
            raise RunError("prepare was stopped", hint="the same command again goes on where it stopped")
        return self._report

    def stop(self) -> Report | None:
        """End it, and wait for that. Its report, where it had finished."""
        self._feed.stop()
        self._thread.join()
        return self._report

    def _work(self) -> None:
        try:
            self._report = self._make(Behind(self._feed, self._shown), self._sealed)
            self._feed.close()
        except StoppedError:
            self._feed.close()
        except BaseException as exc:  # noqa: BLE001  # raised again in the thread of submit
            self._feed.close(exc)

    def _sealed(self, seals: list[Seal]) -> None:
        """Before anything of them is paid for: what merge would refuse."""
        for seal in seals:
            self._check(seal.names_in_use)
        self._feed.add(seals)
