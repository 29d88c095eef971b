"""What a merge writes line by line, and counts: results, rows to retry, lines that belong nowhere.

A sheet is all of the results, or those of one shard that a worker process makes; the files are others' business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Protocol

from batchkit.billing import Charges
from batchkit.generated import Generated, Inline
from batchkit.outcomes import Outcome
from batchkit.responses import ANSWERS, Verdict
from batchkit.results import Result
from batchkit.summaries import Tally

HELD_BYTES = 1 << 18
"""Results are written in blocks of about this size."""


class Encoder(Protocol):
    """Makes the line of a result: `ResultEncoder`, or `FlatEncoder`. `columns` are those that each of them has."""

    columns: ClassVar[Sequence[str]]

    def encode(self, row: bytes, outcome: Outcome, images: Sequence[str] = ()) -> Result: ...


class Writer(Protocol):
    def write(self, lines: bytes, /) -> object: ...


class Pictures(Protocol):
    """Takes the images that models made: an `Album`, or `NoAlbum`."""

    def keep(self, image: Inline) -> str: ...

    def place(self, row: int, images: Sequence[Generated]) -> list[str]: ...


class HasImagesError(Exception):
    """There are images that a model made, and no album for them here."""


class NoAlbum:
    def keep(self, image: Inline) -> str:  # noqa: ARG002  # it is taken by nobody
        raise HasImagesError

    def place(self, row: int, images: Sequence[Generated]) -> list[str]:  # noqa: ARG002  # the same
        raise HasImagesError


class Sheet:
    """Takes rows with their outcomes in row order; `flush` brings what is held to the writers.

    Without `retry` the rows to retry are left out. `strays` opens what lines go to that belong nowhere; it is called
    where there are any.
    """

    def __init__(
        self,
        encoder: Encoder,
        tally: Tally,
        results: Writer,
        *,
        retry: Writer | None,
        strays: Callable[[], Writer],
        album: Pictures,
    ) -> None:
        self.encoder = encoder
        self.tally = tally
        self.charges = Charges()
        self.album = album
        self._results = results
        self._retry = retry
        self._strays = strays
        self.held: list[bytes] = []
        """Pieces of results, to be written with the next `flush`; what is added here is counted by who adds it."""
        self._size = 0

    def add(self, row: bytes, outcome: Outcome, place: int) -> None:
        """Write the result of `row`, the row's line without its line feed. `place` counts results from 0."""
        response = outcome.response
        names = self.album.place(place, response.images) if response is not None and response.images else ()
        result = self.encoder.encode(row, outcome, names)
        self.held.append(result.line)
        self._size += len(result.line)
        if self._size > HELD_BYTES:
            self.flush()
        self.tally.add(outcome, result.verdict, result.error)
        if response is not None and outcome.is_paid_here:
            self.charges.add(response.usage, response.model, outcome.backend)
        if self._retry is not None and result.verdict not in ANSWERS and result.verdict is not Verdict.PENDING:
            self._retry.write(row + b"\n")

    def flush(self) -> None:
        if self.held:
            self._results.write(b"".join(self.held))
            self.held.clear()
            self._size = 0

    def add_strays(self, unexpected: Iterable[bytes], unreadable: Iterable[bytes]) -> None:
        """Keep lines that belong to no row, or are no responses, and count them."""
        for line in unexpected:
            self.tally.unexpected += 1
            self._strays().write(line + b"\n")
        for line in unreadable:
            self.tally.unreadable += 1
            self._strays().write(line + b"\n")

    def take_strays(self, blocks: Iterable[bytes], *, unexpected: int, unreadable: int) -> None:
        """Keep such lines, which others have told apart and counted."""
        self.tally.unexpected += unexpected
        self.tally.unreadable += unreadable
        for block in blocks:
            self._strays().write(block)
