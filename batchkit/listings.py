"""What a bucket holds of one run, as it was listed last; kept true by what this process puts and removes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from batchkit.s3 import Found

_RESPONSES = "responses/"


class Listing:
    """Objects by their names; those of `responses/` are found by their shard, however many there are.

    Several threads may change it, also while it is listed anew.
    """

    def __init__(self) -> None:
        self._objects: dict[str, Found] = {}
        self._responses: dict[str, dict[str, Found]] = {}
        self._lock = threading.RLock()
        self._meanwhile: dict[str, Found | None] | None = None

    def relist(self, objects: Callable[[], Iterable[Found]]) -> None:
        """Hold what `objects` lists; what was put or removed here since it began may be in the list or not."""
        with self._lock:
            self._meanwhile = {}
        listed = list(objects())
        with self._lock:
            changes, self._meanwhile = self._meanwhile, None
            self._objects, self._responses = {}, {}
            self.update(listed)
            for name, found in changes.items():
                if found is None:
                    self.remove(name)
                else:
                    self.add(found)

    def update(self, objects: Iterable[Found]) -> None:
        for found in objects:
            self.add(found)

    def add(self, found: Found) -> None:
        with self._lock:
            if self._meanwhile is not None:
                self._meanwhile[found.name] = found
            self._objects[found.name] = found
            if found.name.startswith(_RESPONSES):
                self._responses.setdefault(_shard(found.name), {})[found.name] = found

    def remove(self, name: str) -> None:
        with self._lock:
            if self._meanwhile is not None:
                self._meanwhile[name] = None
            self._objects.pop(name, None)
            self._responses.get(_shard(name), {}).pop(name, None)

    def get(self, name: str) -> Found | None:
        return self._objects.get(name)

    def names(self) -> set[str]:
        with self._lock:
            return set(self._objects)

    def all(self) -> list[Found]:
        with self._lock:
            return list(self._objects.values())

    def responses(self, shard: str) -> dict[str, Found]:
        """Those of one shard, in the order of their names."""
        with self._lock:
            return dict(sorted(self._responses.get(shard, {}).items()))


def _shard(name: str) -> str:
    return name.removeprefix(_RESPONSES).partition(".")[0]
