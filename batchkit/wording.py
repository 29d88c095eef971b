"""Words of messages that depend on numbers."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`, `3 batches`."""
    plural = "es" if noun.endswith(("ch", "s", "x")) else "s"
    return f"{number:,} {noun}" + ("" if number == 1 else plural)
