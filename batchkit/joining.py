"""Join one shard: its rows and its responses → results, as fast as that goes in Python.

Nearly all responses are plain answers (`plain`), and nearly all rows have just one: such a result is spliced of pieces
that are ready, without an object for the response or the outcome. Whatever is not so goes the long way, which gives the
same bytes: `responses.parse`, `outcomes.Judge`, `Sheet.add`.
"""

from __future__ import annotations

from collections import Counter

import msgspec
import xxhash

from batchkit import plain
from batchkit.answers import ParseError, Parser
from batchkit.errors import InputError
from batchkit.outcomes import Candidates, Judge, Outcome, ShardFiles, damaged, read_ids
from batchkit.responses import Keep, Response, UnreadableLine, parse
from batchkit.results import ResultEncoder, Splice
from batchkit.sheets import Sheet
from batchkit.storage import open_read, read_blocks

_encode = msgspec.json.Encoder().encode
_encode_lines = msgspec.json.Encoder().encode_lines
_ODD_ENDS = b" \t\r{"
"""Behind these a row's closing brace is not the place to splice at: white space, or nothing, is before it."""


class _Style:
    """Plain answers of one attempt that are alike but for text and usage. `usages` are those of the results made so."""

    __slots__ = ("attempt", "finish", "model", "outcome", "splice", "usages")

    def __init__(self, attempt: int, model: str | None, finish: str, judge: Judge) -> None:
        made_by = judge.attempts.get(attempt)
        self.attempt = attempt
        self.model = model
        self.finish = finish
        self.outcome = Outcome(
            custom_id="",
            verdict=plain.VERDICTS[finish],
            response=Response("", plain.VERDICTS[finish], None, finish, None, model),
            attempt=attempt,
            backend=made_by.backend if made_by is not None else None,
            reused_from=made_by.reused_from if made_by is not None else None,
        )
        self.splice: Splice | None = None
        self.usages: list[bytes] = []


_Plain = tuple[_Style, str, bytes]
"""The only response to a row so far, a plain answer: its style, text and usage. No class of its own: making an instance
takes longer than reading the line."""


def join(files: ShardFiles, sheet: Sheet) -> None:
    """Write the results of a shard. Raises `RunError` where its files are damaged."""
    judge = Judge(files, read_ids(files))
    found = _Found(judge, sheet.album.keep)
    for number, path in files.responses:
        with open_read(str(path)) as stream:
            for block in read_blocks(stream):
                found.read(block, number)
    _Results(files, judge, found.entries, sheet).write()
    found.count(sheet)
    sheet.add_strays(found.unexpected, found.unreadable)


class _Found:
    """What was read of a shard's responses: for each row its plain answer, or all candidates, or None. `unexpected` and
    `unreadable` are as in `ShardOutcomes`."""

    def __init__(self, judge: Judge, keep: Keep) -> None:
        self.entries: list[_Plain | Candidates | None] = [None] * len(judge.ids)
        self.unexpected: list[bytes] = []
        self.unreadable: list[bytes] = []
        self._judge = judge
        self._keep = keep
        self._styles: dict[tuple[int, str | None, str], _Style] = {}
        self._usages: dict[bytes, bytes] = {}

    def read(self, block: bytes, number: int) -> None:
        """`block` has lines of attempt `number`."""
        lines = block.split(b"\n")
        torn = lines.pop()  # empty, unless the file ends without a line feed
        self._read_lines(lines, number)
        if torn:
            whole = len(self.unreadable)
            self._read_lines([torn], number)
            if self._judge.still_written(number):
                del self.unreadable[whole:]

    def _read_lines(self, lines: list[bytes], number: int) -> None:
        read, find, entries = plain.read_line, self._judge.index_of.get, self.entries
        known_styles, known_usages = self._styles.get, self._usages.get
        for line in lines:
            try:
                custom_id, body = (one := read(line)).custom_id, one.response.body
                (choice,) = body.choices
                content, key = choice.message.content, (number, body.model, choice.finish_reason)
                usage = known_usages(raw := bytes(body.usage)) or self._usage(raw)
            except plain.NOT_PLAIN:
                self._read_other(line, number)
                continue
            if plain.IMAGE_IN_TEXT in content:
                self._read_other(line, number)
            elif (index := find(custom_id)) is None:
                self.unexpected.append(line)
            elif entries[index] is None:
                entries[index] = (known_styles(key) or self._style(key), content, usage)
            else:
                response = plain.to_response(custom_id, content, usage, body.model, choice.finish_reason)
                self._add(index, number, response)

    def _read_other(self, line: bytes, number: int) -> None:
        if not line.strip():
            return
        try:
            response = parse(line, self._keep)
        except UnreadableLine:
            self.unreadable.append(line)
            return
        index = self._judge.index_of.get(response.custom_id)
        if index is None:
            self.unexpected.append(line)
        else:
            self._add(index, number, response)

    def _add(self, index: int, number: int, response: Response) -> None:
        self.entries[index] = [*as_candidates(self._judge.ids[index], self.entries[index]), (number, response)]

    def _style(self, key: tuple[int, str | None, str]) -> _Style:
        return self._styles.setdefault(key, _Style(*key, self._judge))

    def _usage(self, raw: bytes) -> bytes:
        compact = plain.compact_usage(raw)
        return self._usages.setdefault(raw, raw if compact == raw else compact)

    def count(self, sheet: Sheet) -> None:
        """Count the results that were spliced."""
        for style in self._styles.values():
            outcome = style.outcome
            usages = [(plain.read_usage(usage), count) for usage, count in Counter(style.usages).items()]
            sheet.tally.add_answers(outcome.verdict, usages, reused=outcome.reused_from is not None)
            if outcome.reused_from is None:
                for usage, count in usages:
                    sheet.charges.add(usage, style.model, outcome.backend, count)


def as_candidates(custom_id: str, entry: _Plain | Candidates | None) -> Candidates:
    """An entry in the form that outcomes are judged by."""
    if entry is None:
        return []
    if isinstance(entry, list):
        return entry
    style, content, usage = entry
    return [(style.attempt, plain.to_response(custom_id, content, usage, style.model, style.finish))]


class _Results:
    """Writes the results of one shard."""

    def __init__(
        self, files: ShardFiles, judge: Judge, entries: list[_Plain | Candidates | None], sheet: Sheet
    ) -> None:
        self._files = files
        self._judge = judge
        self._entries = entries
        self._sheet = sheet
        self._first = sheet.tally.rows
        self._quoted = _encode_lines(judge.ids).split(b"\n")
        self._encoder = sheet.encoder if isinstance(sheet.encoder, ResultEncoder) else None

    def write(self) -> None:
        seal, path, start = self._files.seal, self._files.rows, 0
        digest = xxhash.xxh3_128()
        try:
            with open_read(str(path)) as stream:
                for block in read_blocks(stream):
                    digest.update(block)
                    rows, bodies = _cut(block)
                    if start + len(bodies) > seal.end - seal.start:
                        raise damaged(path, "has more rows than prepare wrote")
                    self._write_block(start, rows, bodies)
                    start += len(bodies)
        except InputError as exc:
            raise damaged(path, "cannot be read") from exc
        if digest.hexdigest() != seal.rows_checksum:
            raise damaged(path, "is not what prepare wrote (its checksum differs)")

    def _write_block(self, start: int, rows: list[bytes] | bytes, bodies: list[bytes]) -> None:
        encoder, sheet = self._encoder, self._sheet
        if encoder is None:
            for place, body in enumerate(bodies):
                self._write_other(start + place, _row(rows, place, body))
            return
        convert, looks, held = encoder.parse, encoder.needs_look(self._files.seal), sheet.held
        end = start + len(bodies)
        for index, (body, entry, quoted) in enumerate(
            zip(bodies, self._entries[start:end], self._quoted[start:end], strict=True), start
        ):
            if isinstance(entry, tuple) and body[-1:] not in _ODD_ENDS:
                style, content, usage = entry
                raw = _encode(content)
                if convert is not None:
                    parsed = _parsed(convert, content)
                else:
                    parsed = raw if (text := content.strip()) is content else _encode(text)
                if parsed is not None:
                    if looks:
                        encoder.check_names(body + b"}", self._judge.ids[index])
                    head, named, note, stop, close = style.splice or self._splice(style)
                    held += (body, head, raw, named, parsed, note, quoted, stop, usage, close)
                    style.usages.append(usage)
                    continue
            self._write_other(index, _row(rows, index - start, body))
        sheet.flush()

    def _splice(self, style: _Style) -> Splice:
        assert self._encoder is not None  # noqa: S101  # who asks has one
        style.splice = self._encoder.splice(style.outcome)
        return style.splice

    def _write_other(self, index: int, row: bytes) -> None:
        candidates = as_candidates(self._judge.ids[index], self._entries[index])
        outcome = self._judge.outcome(index, candidates)
        self._sheet.add(row, outcome, self._first + index)
        for backend, response in self._judge.superseded(candidates, outcome):
            self._sheet.charges.add(response.usage, response.model, backend)


def _parsed(convert: Parser, content: str) -> bytes | None:
    try:
        return _encode(convert(content))
    except ParseError:
        return None


def _cut(block: bytes) -> tuple[list[bytes] | bytes, list[bytes]]:
    """The rows of a block without their closing braces, and what these are, where all rows end alike; else the rows
    beside them, of which those that are no objects at first sight are cut to nothing."""
    count = block.count(b"\n")
    for end in (b"}\n", b"}\r\n"):
        bodies = block.split(end)
        if len(bodies) == count + 1 and not bodies.pop() and block[:1] == b"{" and block.count(b"\n{") == count - 1:
            return end[:-1], bodies
    rows = block.split(b"\n")
    if not rows[-1]:
        rows.pop()
    return rows, [row[:-1] if row[:1] == b"{" and row[-1:] == b"}" else b"" for row in rows]


def _row(rows: list[bytes] | bytes, place: int, body: bytes) -> bytes:
    return body + rows if isinstance(rows, bytes) else rows[place]
