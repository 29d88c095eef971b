"""Responses in any order → those of each shard together, in three steps that processes can take side by side.

1. `read_keys`: of each section of the response files the custom_ids, by partition; where that of each line went, its
   route; and the lines themselves, plain ones without what nobody reads.
2. `look_up`: of each partition the shard of every custom_id, and the rows that repeat an id.
3. `divide`: each section once more, its lines now in the order of the shards that their routes lead to.

Memory is that of one partition's ids, or of one section.
"""

from __future__ import annotations

import itertools
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from batchkit import plain
from batchkit.identities import Keys
from batchkit.manifests import Rejection
from batchkit.responses import UnreadableLine, parse
from batchkit.sections import Section, changed, load, read
from batchkit.spills import partitions_of, read_lines
from batchkit.storage import BUFFER_BYTES

NOWHERE = 0xFFFF
"""The route of a line that is no response, or has a custom_id that no row can have."""
MOST_PARTITIONS = NOWHERE
_NONE = -1
_IMAGE = plain.IMAGE_IN_TEXT.encode()
_SHARDS = 1 << 24


class _Keyed(msgspec.Struct, gc=False):
    custom_id: str


_decode_key = msgspec.json.Decoder(_Keyed).decode
_decode_keys = msgspec.json.Decoder(list[str]).decode
_decode_entry = msgspec.json.Decoder(tuple[int, int, int, Keys]).decode
_decode_repeated = msgspec.json.Decoder(tuple[int, Rejection]).decode
_encode = msgspec.json.Encoder().encode


class ReadKeys(NamedTuple):
    """`short` gets what is needed of the lines; None: they are not written."""

    section: Section
    partitions: int
    short: Path | None


class FoundKeys(NamedTuple):
    """`keys` are lists of custom_ids as lines of JSON, and `counts` their lengths. `route` has a number for each line
    that is not blank: its partition, or `NOWHERE`. `short` is what has these lines now."""

    keys: list[bytes]
    counts: list[int]
    route: array[int]
    checksum: str
    short: Section


def read_keys(order: ReadKeys) -> FoundKeys:
    section, partitions, path = order
    digest, route = xxhash.xxh3_128(), array("H")
    groups: list[list[str]] = [[] for _ in range(partitions)]
    with open(path, "wb", BUFFER_BYTES) if path is not None else nullcontext() as stream:
        for block in read(section):
            digest.update(block)
            found, content = _read_lines(BytesIO(block).readlines())
            if stream is not None:
                stream.write(content)
            keys = [key for key in found if key is not None]
            numbers = partitions_of(keys, partitions)
            for key, number in zip(keys, numbers, strict=True):
                groups[number].append(key)
            if len(keys) < len(found):
                in_turn = iter(numbers)
                numbers = [NOWHERE if key is None else next(in_turn) for key in found]
            route.extend(numbers)
        short = section if path is None or stream is None else Section(path, 0, stream.tell())
    written = [_encode(group) + b"\n" for group in groups]
    return FoundKeys(written, list(map(len, groups)), route, digest.hexdigest(), short)


def _read_lines(lines: list[bytes]) -> tuple[list[str | None], bytes]:
    """The custom_id of each line that is not blank, where it has one, and what is needed of all."""
    try:
        found = list(map(plain.read_line, lines))
        content = plain.encode_lines(found)
        if _IMAGE not in content:
            return [line.custom_id for line in found], content
    except plain.NOT_PLAIN:
        pass
    some = [_read_line(line) for line in lines if line.strip()]
    return [key for key, _ in some], b"".join([content for _, content in some])


def _read_line(line: bytes) -> tuple[str | None, bytes]:
    whole = line if line.endswith(b"\n") else line + b"\n"
    try:
        found = plain.read_line(line)
        content = plain.encode_lines([found])
    except plain.NOT_PLAIN:
        return _key(line), whole
    return found.custom_id, content if _IMAGE not in content else whole


def _key(line: bytes) -> str | None:
    try:
        return _decode_key(line).custom_id
    except plain.NOT_PLAIN:
        pass
    try:
        key = parse(line).custom_id
        key.encode()  # half of a surrogate pair is in no row's id
    except (UnreadableLine, UnicodeEncodeError):
        return None
    return key


def directions(before: list[int], found: FoundKeys) -> bytes:
    """How to follow the route of a section: how many keys other sections have put into each partition before, how many
    this one has, and the route."""
    return b"".join(map(bytes, (array("Q", before), array("Q", found.counts), found.route)))


class LookUp(NamedTuple):
    """`ids` are `entry`s, `keys` those of `FoundKeys`; `shards` gets a number for each of these. `repeated` is written
    where rows repeat ids; their messages begin with `tasks`."""

    ids: Path
    keys: Path
    shards: Path
    repeated: Path
    tasks: str


def entry(shard: int, start: int, line: int, keys: bytes) -> bytes:
    """The ids of rows of a shard whose first row is at the position `start` and in the given line, which their lines
    are counted from, too."""
    return b"[%d,%d,%d,%b]\n" % (shard, start, line, keys)


def look_up(order: LookUp) -> None:
    known = _shards_of(order.ids)
    if known is None:
        known = _shards_of_first(order)
    with open(order.shards, "wb") as stream:
        stream.writelines(
            array("i", map(known.get, _decode_keys(line), itertools.repeat(_NONE))) for line in read_lines(order.keys)
        )


def _shards_of(path: Path) -> dict[str, int] | None:
    """The shard of each id; None where one is repeated."""
    known: dict[str, int] = {}
    for line in read_lines(path):
        shard, _, _, keys = _decode_entry(line)
        new = len(known) + len(keys.ids)
        known.update(zip(keys.ids, itertools.repeat(shard)))
        if len(known) < new:
            return None
    return known


def _shards_of_first(order: LookUp) -> dict[str, int]:
    """The same, of the first row with each id; the others are rejected."""
    known: dict[str, int] = {}
    with open(order.repeated, "wb") as stream:
        for written in read_lines(order.ids):
            shard, start, first_line, (indices, lines, ids) = _decode_entry(written)
            for index, offset, custom_id in zip(indices, lines or indices, ids, strict=True):
                line = first_line + offset
                place = line * _SHARDS + shard
                if (first := known.setdefault(custom_id, place)) == place:
                    continue
                message = f"{order.tasks}:{line}: the same id as line {first // _SHARDS}: {custom_id}"
                position = start + index
                found = Rejection(position=position, line=line, custom_id=custom_id, code="duplicate", message=message)
                stream.write(_encode((shard, found)) + b"\n")
    return {custom_id: place % _SHARDS for custom_id, place in known.items()}


def read_repeated(path: Path) -> Iterator[tuple[int, Rejection]]:
    return map(_decode_repeated, read_lines(path))


class Divide(NamedTuple):
    """A section, and what `read_keys` found there. `route` is where its `directions` are, `looked_up` the files of
    `look_up`. `target` gets the lines of `shards` shards, and `strays` those of no row."""

    section: Section
    checksum: str
    short: Section
    route: Section
    looked_up: list[Path]
    shards: int
    target: Path
    strays: Path


class Divided(NamedTuple):
    """Where the lines of each shard begin in the file, and where the last ones end."""

    offsets: array[int]
    unexpected: int
    unreadable: int


def divide(order: Divide) -> Divided:
    shards = _follow(order)
    pieces: defaultdict[int, list[bytes]] = defaultdict(list)
    for line, shard in zip(_load_lines(order, order.short), shards, strict=True):
        pieces[shard].append(line)
    strays = pieces.pop(_NONE, [])
    if strays and order.short != order.section:
        whole = zip(_load_lines(order, order.section), shards, strict=True)
        strays = [line for line, shard in whole if shard == _NONE]
    sizes = array("Q", bytes(8 * (order.shards + 1)))
    if pieces:
        with open(order.target, "wb", BUFFER_BYTES) as stream:
            for shard in sorted(pieces):
                stream.writelines(pieces[shard])
                sizes[shard + 1] = sum(map(len, pieces[shard]))
    unexpected = sum(map(_is_response, strays))
    if strays:
        order.strays.write_bytes(b"".join(strays))
    return Divided(array("Q", itertools.accumulate(sizes)), unexpected, len(strays) - unexpected)


def _load_lines(order: Divide, section: Section) -> list[bytes]:
    """The lines that are not blank. Raises `InputError` where they are not those that were read before."""
    digest = xxhash.xxh3_128()
    lines: list[bytes] = []
    for block in read(section):
        digest.update(block)
        lines += BytesIO(block)
    if section == order.section and digest.hexdigest() != order.checksum:
        raise changed(section.path)
    if lines and not lines[-1].endswith(b"\n"):
        lines[-1] += b"\n"
    return lines if all(map(bytes.strip, lines)) else [line for line in lines if line.strip()]


def _follow(order: Divide) -> list[int]:
    """The shard of each line, or `_NONE`."""
    written, partitions = load(order.route), len(order.looked_up)
    before, counts = array("Q", written[: 8 * partitions]), array("Q", written[8 * partitions : 16 * partitions])
    steps: dict[int, Callable[[], int]] = {NOWHERE: itertools.repeat(_NONE).__next__}
    for number, (path, start, count) in enumerate(zip(order.looked_up, before, counts, strict=True)):
        steps[number] = iter(array("i", load(Section(path, 4 * start, 4 * count)))).__next__
    return [steps[number]() for number in array("H", written[16 * partitions :])]


def _is_response(line: bytes) -> bool:
    """Whether a line of no row is one: a request, say, has an id, too."""
    try:
        parse(line.removesuffix(b"\n"))
    except UnreadableLine:
        return False
    return True
