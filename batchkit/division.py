"""What an engine wrote, divided among the shards that it was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from batchkit.manifests import Seal
from batchkit.responses import ANSWERS, UnreadableLine, parse
from batchkit.rounds import Key
from batchkit.runs import Run
from batchkit.signatures import hide_bytes
from batchkit.storage import grew, open_read, write_whole


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What a start takes of one shard; `rows` are ranges of positions."""

    shard: int
    attempt: int
    rows: list[tuple[int, int]]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    session: str
    parts: list[Part]


class Collected(msgspec.Struct, kw_only=True):
    """What came back: the lines that are responses, and what they say.

    `answered` are the requests with a response of any kind, `answers` how many of these are answers, `passing` how
    many failures may pass when sent again. `died`: lines said that the engine died.
    """

    answered: set[Key]
    answers: int = 0
    passing: int = 0
    died: bool = False


class Division:
    """The output of one engine start, line by line: `follow` while it grows, `finish` when it is whole."""

    def __init__(self, run: Run, plan: Plan, seals: Mapping[int, Seal], output: Path) -> None:
        self._run = run
        self._plan = plan
        self._output = output
        self._index = _index(run, plan, seals)
        self._offset = 0

    def follow(self) -> int:
        """Append what is new to the responses, so that `merge` sees it early. Returns how many lines there were.

        Nothing depends on it: `finish` writes the same lines, whole and durable.
        """
        if not self._output.exists():
            return 0
        places = self._places(Collected(answered=set()), follow=True)
        for part in self._plan.parts:
            if places[part.shard]:
                with open(self._path(part), "ab") as out:
                    out.writelines(self._read(places[part.shard]))
                grew(self._path(part))
        return sum(map(len, places.values()))

    def finish(self) -> Collected:
        """Write the responses of every shard, each file whole, and say what came back."""
        found = Collected(answered=set())
        self._offset = 0
        places = self._places(found, follow=False)
        for part in self._plan.parts:
            if places[part.shard]:
                _write(self._read(places[part.shard]), self._path(part))
        return found

    def _read(self, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        lines = _read(self._output, places)
        return map(hide_bytes, lines) if self._run.manifest.has_links else lines

    def _path(self, part: Part) -> Path:
        return self._run.responses_path(part.shard, part.attempt)

    def _places(self, found: Collected, *, follow: bool) -> dict[int, list[tuple[int, int]]]:
        """Where the lines of each shard are, from where the last call ended; offset and length."""
        places: dict[int, list[tuple[int, int]]] = {part.shard: [] for part in self._plan.parts}
        for offset, line, whole in _lines(self._output, self._offset):
            if follow and not whole:
                break
            self._offset = offset + len(line) + whole
            bare = line.rstrip(b"\r")
            if bare.strip() and (whole or _is_whole(bare)):
                shard = self._judge(bare, found)
                if shard is not None:
                    places[shard].append((offset, len(bare)))
        return places

    def _judge(self, line: bytes, found: Collected) -> int | None:
        """Count one line; the shard whose response it is, None where it is none."""
        try:
            response = parse(line)
        except UnreadableLine:
            return self._plan.parts[0].shard  # whatever it is: kept, and counted by merge
        if response.engine_died:
            found.died = True
            return None
        key = self._index.get(response.custom_id)
        if key is None:
            return self._plan.parts[0].shard
        if key not in found.answered:  # a line that is there twice counts once
            found.answered.add(key)
            found.answers += response.verdict in ANSWERS
            found.passing += response.passing
        return key[0]


def _index(run: Run, plan: Plan, seals: Mapping[int, Seal]) -> dict[str, Key]:
    """The custom_ids that were asked → shard and position."""
    index: dict[str, Key] = {}
    for part in plan.parts:
        seal = seals[part.shard]
        ids = run.read_ids(seal)
        asking = frozenset(seal.asking)
        for start, end in part.rows:
            for position in range(start, end):
                if position in asking:
                    index[ids[position - seal.start]] = (part.shard, position)
    return index


def _lines(path: Path, offset: int) -> Iterator[tuple[int, bytes, bool]]:
    """Offset, line without its line feed, and whether it has one: a kill may have cut the last one in half."""
    if not path.exists():
        return
    with open_read(str(path)) as stream:
        stream.seek(offset)
        for line in stream:
            whole = line.endswith(b"\n")
            yield offset, line[:-1] if whole else line, whole
            offset += len(line)


def _is_whole(line: bytes) -> bool:
    try:
        parse(line)
    except UnreadableLine:
        return False
    return True


def _read(source: Path, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    with open_read(str(source)) as stream:
        for offset, length in places:
            stream.seek(offset)
            yield stream.read(length) + b"\n"


def _write(lines: Iterable[bytes], target: Path) -> None:
    with write_whole(target, durable=True) as out:
        out.writelines(lines)
