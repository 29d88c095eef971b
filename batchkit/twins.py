"""Rows of a shard that ask what an earlier row of it asks, written down in few characters: `1-3:0 5:4` says that the
rows 1 to 3 ask what row 0 asks, and row 5 what row 4 asks."""

from __future__ import annotations

from collections.abc import Iterable


def as_text(firsts: Iterable[tuple[int, int]]) -> str:
    """Of pairs (row, the first row that asks the same), ascending."""
    groups: list[list[int]] = []
    for row, first in firsts:
        if groups and groups[-1][1:] == [row - 1, first]:
            groups[-1][1] = row
        else:
            groups.append([row, row, first])
    return " ".join(f"{start}-{end}:{first}" if end > start else f"{start}:{first}" for start, end, first in groups)


def from_text(text: str) -> dict[int, int]:
    """The rows that ask what an earlier one asks → that one."""
    firsts = {}
    for group in text.split():
        rows, _, first = group.partition(":")
        start, _, end = rows.partition("-")
        firsts.update(dict.fromkeys(range(int(start), int(end or start) + 1), int(first)))
    return firsts
