"""The words that batch services and those who use them share: what is ordered, what a batch is, how a call fails.

A service takes a file of requests and answers later. It knows of files and batches, not of rows, shards or runs. Which
of its calls may be repeated is the caller's to know: all but `create` may.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import msgspec

Phase = Literal["running", "completed", "failed", "expired", "cancelled"]


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What `create` creates, and by what `find` knows it again.

    `tag` is unique for this create call; `labels` are for people who look at the provider's pages. `past` are batches
    of the same file that are known already. `since`: nothing older than this (Unix seconds) can be it.
    """

    file_id: str
    url: str
    model: str
    tag: str
    labels: dict[str, str]
    past: tuple[str, ...] = ()
    since: float = 0.0


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch failed. `line` counts the lines of the input file from 1, None where it is the file's or the whole
    account's fault."""

    code: str | None
    message: str
    line: int | None = None


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A provider's batch as it stands. `state` is the provider's word, `phase` what it means for us.

    `completed` and `failed` count requests, None where the provider does not say; a batch has ended when `phase` is not
    `running`. `files` are to be downloaded. `tokens` are those used so far. `partial`: the provider gave up on some
    requests, and has no lines for them. `tag` and `file_id` are those of its order, where the provider shows them.
    """

    id: str
    phase: Phase
    state: str
    total: int | None = None
    completed: int | None = None
    failed: int | None = None
    tokens: int | None = None
    partial: bool = False
    tag: str | None = None
    file_id: str | None = None
    files: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()

    @property
    def waits_for_tokens(self) -> bool:
        """Whether it failed because too many tokens are enqueued: nothing is wrong with it, it has to wait."""
        return any(fault.code == "token_limit_exceeded" for fault in self.faults)


class PassingError(Exception):
    """A call that did not get through, or that the provider had no time for: repeated later, it may succeed."""


class DoubtfulError(Exception):
    """A create call of which nobody knows whether it went through."""


class RefusedError(Exception):
    """The provider has read what was asked, and will not do it. `too_large`: the file has too many bytes."""

    def __init__(self, message: str, *, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


class Service(Protocol):
    """A batch service. Every call raises `CredentialsError`, `PassingError` or `RefusedError`; all calls are of one
    thread."""

    name: str
    base_url: str

    def check_key(self) -> None:
        """Ask for something that costs nothing."""

    def request(self, line: bytes) -> bytes:
        """A request line in the provider's dialect; both without a line feed."""

    def response(self, line: bytes) -> bytes:
        """A line of a result file in OpenAI's dialect; both without a line feed. Lines that are none stay as they
        are."""

    def upload(self, path: Path, name: str) -> str:
        """Upload a file of requests under `name`; returns the provider's id of it."""

    def create(self, order: Order) -> Batch:
        """Create the batch, which is paid for, in one call that is not repeated. Also raises `DoubtfulError`."""

    def find(self, order: Order) -> Batch | None:
        """The batch that an earlier `create` of the same order made, if the provider lists it."""

    def check(self, batch_id: str) -> Batch:
        """How the batch stands now."""

    def download(self, file_id: str, path: Path) -> None:
        """Write a result file to `path`."""

    def cancel(self, batch_id: str) -> None:
        """Ask for the end of the batch. What it has finished is kept."""

    def delete(self, file_id: str) -> None:
        """Delete an uploaded or a result file. One that is gone already is no error."""
