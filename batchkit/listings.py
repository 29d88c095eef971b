"""What a bucket holds of one run, as it was listed last; kept true by what this process puts and removes."""

from __future__ import annotations

from collections.abc import Iterable

from batchkit.s3 import Found

_RESPONSES = "responses/"


class Listing:
    """Objects by their names; those of `responses/` are found by their shard, however many there are."""

    def __init__(self, objects: Iterable[Found] = ()) -> None:
        self._objects: dict[str, Found] = {}
        self._responses: dict[str, dict[str, Found]] = {}
        self.update(objects)

    def update(self, objects: Iterable[Found]) -> None:
        for found in objects:
            self.add(found)

    def add(self, found: Found) -> None:
        self._objects[found.name] = found
        if found.name.startswith(_RESPONSES):
            self._responses.setdefault(_shard(found.name), {})[found.name] = found

    def remove(self, name: str) -> None:
        self._objects.pop(name, None)
        self._responses.get(_shard(name), {}).pop(name, None)

    def get(self, name: str) -> Found | None:
        return self._objects.get(name)

    def names(self) -> set[str]:
        return set(self._objects)

    def all(self) -> list[Found]:
        return list(self._objects.values())

    def responses(self, shard: str) -> dict[str, Found]:
        """Those of one shard, in the order of their names."""
        return dict(sorted(self._responses.get(shard, {}).items()))


def _shard(name: str) -> str:
    return name.removeprefix(_RESPONSES).partition(".")[0]
