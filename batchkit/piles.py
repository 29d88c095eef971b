"""`merge` for response files that no run knows, whoever made them: a task file and any pile of output and error files.

Memory is bounded however large the pile is. Ids and responses go into partitions on disk by a hash of the custom_id;
each partition is joined by itself, which gives outcomes in row order; those are merged, and meet the rows as they are
read once more. A small pile is one partition, and touches no disk. The whole pile counts as one attempt.
"""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from batchkit import remotes
from batchkit.errors import InputError, RowError, UsageError
from batchkit.flat import FlatEncoder, FlatFields, check_flat, default_ids
from batchkit.inputs import Source, open_source
from batchkit.outcomes import Outcome, conflict_message
from batchkit.outputs import Outputs, Places, place_of, places
from batchkit.progress import Progress, Silent
from batchkit.responses import ANSWERS, Response, UnreadableLine, Verdict, choose, gist, parse
from batchkit.results import ResultEncoder
from batchkit.sheets import Encoder, Sheet
from batchkit.spills import Partitions, merge_numbered, numbered, write_lines
from batchkit.storage import COMPRESSED, is_remote, open_read, read_lines
from batchkit.summaries import Summary
from batchkit.tasks import parse_object

PARTITION_BYTES = 32 << 20
"""About so many bytes of responses are joined at once."""
_EXPANSION = 10  # how much larger than its file a compressed one is taken to be
_REMOTE_BYTES = 1 << 30  # what a remote file is taken to have


class _Id(NamedTuple):
    position: int
    line: int
    custom_id: str


class _Joined(NamedTuple):
    position: int
    outcome: Outcome


class _Keyed(msgspec.Struct, gc=False):
    custom_id: str


_decode_key = msgspec.json.Decoder(_Keyed).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_id = msgspec.json.Decoder(_Id).decode
_decode_outcome = msgspec.json.Decoder(Outcome).decode
_encode = msgspec.json.Encoder().encode


def merge_pile(
    tasks: str | Path,
    responses: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    id_fields: Sequence[str] | None = None,
    id_separator: str = "|",
    parse: str | None = None,
    prefix: str = "",
    flat: bool = False,
    retry_file: str | Path | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write one result per row of the file `tasks`, answered from the files that the globs `responses` match.

    The custom_id of a row is the text of its id field (a number: as the row writes it), of several joined with
    `id_separator`; `id_fields` None: `id`, of VLMEvalKit's files `index`. A row without it, or with that of an earlier
    row, is `rejected`. The other options are those of `merging.merge`. Raises `InputError` where a file is missing,
    `UsageError` as `merge` does.
    """
    if output is None:
        raise UsageError("results of files that no run knows need a name", hint="-o results.jsonl")
    for uri in filter(is_remote, map(str, responses)):
        remotes.look(uri)  # for its errors, which say more than those of opening it
    source = open_source(tasks)
    parse = parse or "text"
    encoder: Encoder = ResultEncoder(parse=parse, prefix=prefix)
    if flat:
        check_flat(prefix)
        encoder = FlatEncoder(parse, FlatFields(ids=None), custom_ids=True)
    to = places(output, retry_file)
    files = _find(responses, [*to, Path(tasks)])
    places(output, retry_file, never=[place_of(name) for name in (str(tasks), *files)])
    pile = _Pile(source, files, tuple(id_fields or default_ids(source.format)), id_separator)
    progress = progress or Silent()
    with Outputs(to, encoder) as outputs:
        rows = zip_longest(source.rows(), pile.outcomes(outputs.sheet, to))
        place = -1
        for place, (row, outcome) in enumerate(rows):
            if row is None or outcome is None:
                raise InputError(f"{tasks}: changed while it was merged", hint="run the same command again")
            outputs.sheet.add(row.raw, outcome, place)
            if place % 1000 == 999:
                progress.update(1000)
        progress.update((place + 1) % 1000)
    return outputs.write_summary()


def _find(patterns: Sequence[str | Path], own: Sequence[Path]) -> list[str]:
    """The files that the patterns match, each once, sorted within its pattern. A wildcard does not mean our own."""
    own_paths = {path.expanduser().resolve() for path in own}
    found: dict[str, None] = {}
    for pattern in map(str, patterns):
        if is_remote(pattern):
            found[pattern] = None
            continue
        path = Path(pattern.removeprefix("file://")).expanduser()
        matches = [path] if path.is_file() else _glob(str(path))
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise InputError(f"{pattern}: no such file", hint="quote patterns: --responses 'out/*.jsonl'")
        found |= {str(match.resolve()): None for match in matches if match == path or match.resolve() not in own_paths}
    return list(found)


def _glob(pattern: str) -> list[Path]:
    return [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207  # takes absolute ones


class _Pile:
    def __init__(self, source: Source, files: list[str], id_fields: tuple[str, ...], separator: str) -> None:
        self._source = source
        self._tasks = source.uri
        self._files = files
        self._id_fields = id_fields
        self._separator = separator

    def outcomes(self, sheet: Sheet, to: Places) -> Iterator[Outcome]:
        """One outcome per row, in row order. Lines that belong to no row go to `sheet`."""
        count = max(1, -(-(self._source.size + sum(map(_size, self._files))) // PARTITION_BYTES))
        if count == 1:
            rejected: list[_Joined] = []
            joined = _join(self._ids(rejected), self._lines(), self._tasks, sheet)
            for _, outcome in sorted([*joined, *rejected], key=lambda entry: entry.position):
                yield outcome
            return
        with tempfile.TemporaryDirectory(
            prefix=f".{to.results.name}.{os.getpid()}-", suffix=".tmp", dir=to.results.parent
        ) as folder:
            for line in merge_numbered(self._join_partitions(Path(folder), count, sheet)):
                yield _decode_outcome(line)

    def _join_partitions(self, folder: Path, count: int, sheet: Sheet) -> list[Path]:
        """Spill ids and responses, join partition after partition; files of numbered outcomes."""
        ids, lines = Partitions(folder, "ids", count), Partitions(folder, "lines", count)
        rejected: list[_Joined] = []
        done = [folder / "rejected"]
        with open(done[0], "wb") as stream:
            for entry in self._ids(rejected):
                ids.add(entry.custom_id, _encode(entry))
                stream.writelines(_numbered(row) + b"\n" for row in rejected)
                rejected.clear()
            stream.writelines(_numbered(row) + b"\n" for row in rejected)
        ids.flush()
        for line in self._lines():
            try:
                lines.add(_key(line), line)
            except UnreadableLine:
                sheet.add_strays((), [line])
        lines.flush()
        for number in range(count):
            joined = _join(map(_decode_id, ids.lines(number)), lines.lines(number), self._tasks, sheet)
            done.append(write_lines(folder / f"joined-{number}", map(_numbered, joined)))
            ids.drop(number)
            lines.drop(number)
        return done

    def _ids(self, rejected: list[_Joined]) -> Iterator[_Id]:
        """The rows that have an id, in order; outcomes of the others go to `rejected`."""
        for row in self._source.rows():
            try:
                if row.fault is not None:
                    raise RowError(*row.fault)
                yield _Id(row.position, row.line, self._custom_id(row.raw))
            except RowError as exc:
                message = f"{self._tasks}:{row.line}: {exc.message}"
                rejected.append(_Joined(row.position, _rejected("", exc.code, message)))

    def _custom_id(self, raw: bytes) -> str:
        fields = parse_object(raw)
        return self._separator.join(_id_text(name, fields.get(name), raw) for name in self._id_fields)

    def _lines(self) -> Iterator[bytes]:
        for name in self._files:
            with open_read(name) as stream:
                for line in read_lines(stream):
                    if line.strip():
                        yield line


def _id_text(name: str, value: Any, raw: bytes) -> str:
    if value is None:
        raise RowError("field", f"id field {name!r} is missing")
    if isinstance(value, str):
        return value
    if isinstance(value, (list, dict)):
        raise RowError("field", f"id field {name!r} is neither text nor a number")
    return bytes(_decode_fields(raw)[name]).decode()  # 1.50 and 1e3 stay what they are


def _key(line: bytes) -> str:
    try:
        return _decode_key(line).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return parse(line).custom_id


def _join(ids: Iterable[_Id], lines: Iterable[bytes], tasks: str, sheet: Sheet) -> Iterator[_Joined]:
    """The outcomes of one partition, in row order."""
    rows: dict[str, _Id] = {}
    repeated = [entry for entry in ids if rows.setdefault(entry.custom_id, entry) is not entry]
    found: dict[str, dict[bytes, Response]] = {}
    for line in lines:
        try:
            response = parse(line, sheet.album.keep)
        except UnreadableLine:
            sheet.add_strays((), [line])
            continue
        if response.custom_id in rows:
            _add(found.setdefault(response.custom_id, {}), response)
        else:
            sheet.add_strays([line], ())
    outcomes = [
        _Joined(row.position, _outcome(row.custom_id, list(found.get(row.custom_id, {}).values())))
        for row in rows.values()
    ]
    for entry in repeated:
        message = f"{tasks}:{entry.line}: the same id as line {rows[entry.custom_id].line}: {entry.custom_id}"
        outcomes.append(_Joined(entry.position, _rejected(entry.custom_id, "duplicate", message)))
    yield from sorted(outcomes, key=lambda entry: entry.position)


_ERROR = b""
"""Stands for the gist of whatever is no answer: of these the last counts."""


def _add(known: dict[bytes, Response], response: Response) -> None:
    """Keep what can still count: different answers, or the last error. A line repeated endlessly takes no memory."""
    if response.verdict in ANSWERS:
        known.pop(_ERROR, None)
        known.setdefault(gist(response), response)
    elif not known or _ERROR in known:
        known[_ERROR] = response


def _outcome(custom_id: str, responses: list[Response]) -> Outcome:
    response, attempt, conflicts = choose([(1, response) for response in responses])
    if response is None:
        return Outcome(custom_id=custom_id, verdict=Verdict.MISSING, message="no file has a response to it")
    return Outcome(
        custom_id=custom_id,
        verdict=Verdict.CONFLICTING if conflicts else response.verdict,
        response=response,
        attempt=attempt,
        conflicts=conflicts,
        message=conflict_message(conflicts) if conflicts else response.message,
        code=response.code,
    )


def _rejected(custom_id: str, code: str, message: str) -> Outcome:
    return Outcome(custom_id=custom_id, verdict=Verdict.REJECTED, code=code, message=message)


def _numbered(entry: _Joined) -> bytes:
    return numbered(entry.position, _encode(entry.outcome))


def _size(name: str) -> int:
    if is_remote(name):
        return _REMOTE_BYTES
    try:
        size = Path(name.removeprefix("file://")).expanduser().stat().st_size
    except OSError as exc:
        raise InputError(f"{name}: no such file", hint="check the path") from exc
    return size * (_EXPANSION if name.endswith(COMPRESSED) else 1)
