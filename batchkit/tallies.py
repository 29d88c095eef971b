"""Adding up seals: what `prepare` reports, and what `prepared.json` says."""

from __future__ import annotations

from collections import Counter

import msgspec

from batchkit.manifests import Prepared, Seal, now
from batchkit.measures import Totals
from batchkit.pricing import Estimate
from batchkit.resolutions import Resolution

SHOWN_REJECTIONS = 5
"""So many messages of rejected rows are shown; the seals hold all of them."""


class Report(msgspec.Struct, kw_only=True):
    """What `prepare` did, or with `plan` would do. `reasons` counts the rejected rows by code.

    `first_rejections` are the first few messages; `already` says that the run was complete before. `warnings` are of
    options that were likely not meant, `notes` tell how the input is read. `tokens` and `estimate` are there where a
    provider bills them. `reused` counts the answers that were taken over, by the run that they are from; tokens and
    estimate are of the other requests. `repeated` rows have none: another row of their shard asks the same.
    `resolutions` are of a plan whose requests have images.
    """

    shards: int = 0
    rows: int = 0
    requests: int = 0
    rejected: int = 0
    requests_bytes: int = 0
    largest_shard_bytes: int = 0
    reasons: dict[str, int] = {}
    first_rejections: list[str] = []
    names_in_use: list[str] = []
    already: bool = False
    warnings: list[str] = []
    notes: list[str] = []
    tokens: Totals | None = None
    estimate: Estimate | None = None
    reused: dict[str, int] = {}
    repeated: int = 0
    resolutions: list[Resolution] = []

    @property
    def to_send(self) -> int:
        """The requests that have no answer of another run."""
        return self.requests - sum(self.reused.values())


class Tally:
    """Adds up seals."""

    def __init__(self) -> None:
        self.report = Report()
        self._rows_bytes = 0
        self._reasons: Counter[str] = Counter()
        self._names: set[str] = set()

    def add(self, seal: Seal) -> None:
        report = self.report
        report.shards += 1
        report.rows += seal.end - seal.start
        report.requests += seal.requests
        report.rejected += len(seal.rejected)
        report.repeated += len(seal.firsts)
        report.requests_bytes += seal.requests_bytes
        report.largest_shard_bytes = max(report.largest_shard_bytes, seal.requests_bytes)
        self._rows_bytes += seal.rows_bytes
        for name, count in seal.reused.items():
            report.reused[name] = report.reused.get(name, 0) + count
        tokens = seal.tokens_to_send if seal.tokens_to_send is not None else seal.tokens
        if tokens is not None:
            report.tokens = report.tokens or Totals()
            report.tokens.merge(tokens)
        self._reasons.update(rejection.code for rejection in seal.rejected)
        report.reasons = dict(self._reasons.most_common())
        room = SHOWN_REJECTIONS - len(report.first_rejections)
        report.first_rejections += [rejection.message for rejection in seal.rejected[:room]]
        self._names.update(seal.names_in_use)
        report.names_in_use = sorted(self._names)

    def prepared(self) -> Prepared:
        report = self.report
        return Prepared(
            shards=report.shards,
            rows=report.rows,
            requests=report.requests,
            rejected=report.rejected,
            rows_bytes=self._rows_bytes,
            requests_bytes=report.requests_bytes,
            names_in_use=report.names_in_use,
            finished=now(),
        )
