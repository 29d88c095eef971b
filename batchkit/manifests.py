"""What a run says of itself: the manifest, the seals of its shards, the seal of its preparation.

Positions are zero-based row numbers in the task file (blank lines are not rows); ranges are half-open, `[start, end)`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from batchkit import storage, twins
from batchkit.errors import RunError
from batchkit.limits import CHAT
from batchkit.links import Links
from batchkit.measures import Totals

FORMAT = 1
"""Version of the layout. A run of another version is refused."""

PREPARE_AGAIN = "prepare again with the same options: what is missing or damaged is made anew"

OUR_NAMES = ("model", "raw_response", "parsed_answer", "error", "batchkit")
"""The fields that a result adds to its row, in this order."""

T = TypeVar("T")


class Input(msgspec.Struct, frozen=True, kw_only=True):
    """The task file as it was. `modified` is its mtime in ns, None where the storage has none. `fingerprint` tells
    inputs of one size apart, on another machine too: a checksum of places spread over a file, the version (ETag) of an
    object, a dataset's own."""

    uri: str
    bytes: int
    modified: int | None = None
    fingerprint: str | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`image_libraries` are what images are made smaller with, by name and version; empty where none are."""

    format: int
    batchkit: str
    created: str
    input: Input
    model: str
    backend: str
    options: dict[str, Any]
    image_libraries: str = ""

    @property
    def url(self) -> str:
        """The endpoint of the requests, where batchkit made them."""
        return str(self.options.get("url", CHAT))

    @property
    def has_links(self) -> bool:
        """Whether the requests name images by their addresses, which `submit` resolves."""
        return self.options.get("images") == "link"

    @property
    def response_schema(self) -> dict[str, Any] | None:
        """What answers must match, None where anything goes."""
        return self.options.get("response_schema")


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """A row that could not become a request. `line` counts from 1; `message` names file, line and reason."""

    position: int
    line: int
    custom_id: str
    code: str
    message: str


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """What `requests/NNNNN.json` says of a finished shard: rows `[start, end)` of the task file.

    `requests` counts the lines of its file: rows that were rejected, or ask what another one of the shard asks
    (`twins`, as the module of this name writes them), have none there. `pixels` sums the decoded pixels of all images:
    what an engine that decodes them all at once needs memory for. `next_line` and `next_offset` are where the input
    goes on behind the shard (line from 1, offset in bytes). `names_in_use` are the fields of a result that rows of the
    shard have already. `tokens` estimates what the requests take, where a provider bills them. `reused` counts the
    requests whose answers `prepare` took over, by the run that they are from; `tokens_to_send` are those of the others,
    where there are any reused ones. `attached_checksum` is of the images that came with the rows, beside their JSON.
    `links` are the images that the requests name, where they do.
    """

    shard: int
    start: int
    end: int
    requests: int
    rejected: list[Rejection]
    rows_bytes: int
    requests_bytes: int
    pixels: int
    rows_checksum: str
    ids_checksum: str
    requests_checksum: str
    next_line: int
    next_offset: int
    names_in_use: list[str] = []
    tokens: Totals | None = None
    reused: dict[str, int] = {}
    tokens_to_send: Totals | None = None
    attached_checksum: str = ""
    twins: str = ""
    links: Links | None = None

    @property
    def firsts(self) -> dict[int, int]:
        """The positions of rows that ask what an earlier one asks → that one, whose request is sent for them, too."""
        return twins.from_text(self.twins)

    @property
    def asking(self) -> Sequence[int]:
        """The positions of rows that have a request of their own, in the order of the file's lines."""
        rows, others = range(self.start, self.end), {rejection.position for rejection in self.rejected}
        others |= self.firsts.keys()
        return [position for position in rows if position not in others] if others else rows

    def ranges(self, positions: Iterable[int]) -> list[tuple[int, int]]:
        """Ascending positions of requests as half-open ranges, in which rows without a request may lie: so they are few
        where every other row has none."""
        wanted, ranges, goes_on = set(positions), list[tuple[int, int]](), False
        for position in self.asking:
            if position in wanted:
                start = ranges.pop()[0] if goes_on else position
                ranges.append((start, position + 1))
            goes_on = position in wanted
        return ranges


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """What `prepared.json` says: totals, and which of our result fields the rows already use."""

    shards: int
    rows: int
    requests: int
    rejected: int
    rows_bytes: int
    requests_bytes: int
    names_in_use: list[str]
    finished: str


def now() -> str:
    """The time in UTC, ISO 8601, to the millisecond."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")


def as_ranges(positions: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending positions as half-open ranges: [3, 4, 7] → [(3, 5), (7, 8)]."""
    ranges: list[tuple[int, int]] = []
    for position in positions:
        if ranges and ranges[-1][1] == position:
            ranges[-1] = (ranges[-1][0], position + 1)
        else:
            ranges.append((position, position + 1))
    return ranges


def as_json(value: Any) -> bytes:
    """As a file for people and for `read`."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def read(path: Path, kind: type[T], *, hint: str = "restore the file from a copy of the run") -> T:
    """Raises `RunError` with that hint where the file is damaged or gone."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as exc:
        raise RunError(f"{storage.shown(path)}: damaged: {exc}", hint=hint) from exc
