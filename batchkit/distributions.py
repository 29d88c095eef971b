"""Counts and proportions: exact quantiles of whole numbers, and the confidence interval of a share."""

from __future__ import annotations

import math
from collections import Counter

import msgspec

Z = 1.959963984540054
"""The 97.5% quantile of the normal distribution: two-sided 95%."""


class Spread(msgspec.Struct, frozen=True):
    """Quantiles by nearest rank: the smallest value that at least so many per cent of the values do not exceed."""

    count: int
    min: int
    p50: int
    p90: int
    p99: int
    max: int
    mean: float


class Distribution:
    """Whole numbers, exactly: how often each was seen. Memory is that of the different ones, which are few: tokens and
    lengths of answers, not their sum, bound it."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, number: int) -> None:
        self.counts[number] += 1

    def mean(self) -> float | None:
        count = self.counts.total()
        return sum(number * times for number, times in self.counts.items()) / count if count else None

    def by_value(self) -> dict[str, int]:
        """As JSON has it, ascending."""
        return {str(number): self.counts[number] for number in sorted(self.counts)}

    def spread(self) -> Spread | None:
        """None where nothing was added."""
        mean = self.mean()
        if mean is None:
            return None
        low, p50, p90, p99, high = (self._quantile(per_cent) for per_cent in (0, 50, 90, 99, 100))
        return Spread(self.counts.total(), low, p50, p90, p99, high, mean)

    def _quantile(self, per_cent: int) -> int:
        rank = max(1, -(-self.counts.total() * per_cent // 100))
        seen = 0
        for number in sorted(self.counts):
            seen += self.counts[number]
            if seen >= rank:
                return number
        raise ValueError("no quantile of nothing")


def wilson(right: int, count: int) -> tuple[float, float] | None:
    """Wilson's score interval of the share `right / count`, 95%, without correction for continuity (E. B. Wilson, 1927,
    J. Am. Stat. Assoc. 22, 209). None of nothing."""
    if not count:
        return None
    share, weight = right / count, Z * Z / count
    middle = (share + weight / 2) / (1 + weight)
    half = Z * math.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    # At the edges the formula gives 0 and 1 but for rounding.
    return (0.0 if right == 0 else middle - half, 1.0 if right == count else middle + half)
