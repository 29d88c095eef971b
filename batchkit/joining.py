"""Join one shard: its rows and its responses → results, as fast as that goes in Python.

Nearly all responses are plain answers (`plain`), and nearly all rows have just one: such a result is spliced of pieces
that are ready, without an object for the response or the outcome. Whatever is not so goes the long way, which gives the
same bytes: `responses.parse`, `outcomes.Judge`, `Sheet.add`.
"""

from __future__ import annotations

from collections import Counter
from io import BytesIO

import msgspec
import xxhash

from batchkit import plain, sections
from batchkit.answers import ParseError
from batchkit.errors import BatchkitError, InputError
from batchkit.outcomes import Candidates, Judge, Outcome, ShardFiles, damaged, read_ids
from batchkit.responses import ANSWERS, Keep, Response, UnreadableLine, gist, parse
from batchkit.results import ResultEncoder, Splice
from batchkit.sections import changed
from batchkit.sheets import Sheet

_encode = msgspec.json.Encoder().encode
_encode_lines = msgspec.json.Encoder().encode_lines
_OPENED, _CLOSED = b"{}"
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


def join(files: ShardFiles, sheet: Sheet) -> None:
    """Write the results of a shard. Raises `RunError` where its files are damaged."""
    judge = Judge(files, read_ids(files))
    found = _Found(judge, sheet.album.keep, distinct=files.unanswered is not None)
    for number, section in files.responses:
        for block in sections.read(section):
            found.read(BytesIO(block).readlines(), number)
    _Results(files, judge, found, sheet).write()
    found.count(sheet)
    sheet.add_strays(found.unexpected, found.unreadable)


class _Found:
    """What was read of a shard's responses.

    A row whose only response is a plain answer has its style, text and usage in three lists, at the row's index: no
    object of its own, which would take longer to make than the line to read. `others` has the candidates of other rows.
    `unexpected` and `unreadable` are as in `ShardOutcomes`. `distinct`: there is one attempt, the first, and of its
    candidates only those are kept that can still count: a line that is repeated endlessly takes no memory.
    """

    def __init__(self, judge: Judge, keep: Keep, *, distinct: bool) -> None:
        self.styles: list[_Style | None] = [None] * len(judge.ids)
        self.texts = [""] * len(judge.ids)
        self.usages = [b""] * len(judge.ids)
        self.others: dict[int, Candidates] = {}
        self.unexpected: list[bytes] = []
        self.unreadable: list[bytes] = []
        self._judge = judge
        self._keep = keep
        self._distinct: dict[int, dict[bytes, Response]] | None = {} if distinct else None
        self._all_styles: dict[tuple[int, str | None, str], _Style] = {}
        self._compact: dict[bytes, bytes] = {}

    def candidates(self, index: int) -> Candidates:
        """All responses to a row."""
        style = self.styles[index]
        if self._distinct is not None and index in self._distinct:
            return [(1, response) for response in self._distinct[index].values()]
        if style is None:
            return self.others.get(index, [])
        custom_id, usage = self._judge.ids[index], self.usages[index]
        response = plain.to_response(custom_id, self.texts[index], usage, style.model, style.finish)
        return [(style.attempt, response)]

    def read(self, lines: list[bytes], number: int) -> None:
        """`lines` are of attempt `number`, with their line feeds."""
        read, find, others = plain.read_line, self._judge.index_of.get, self.others
        styles, texts, usages, compact = self.styles, self.texts, self.usages, self._compact.get
        style: _Style | None = None
        for line in lines:
            try:
                custom_id, body = (one := read(line)).custom_id, one.response.body
                (choice,) = body.choices
                content, finish, model = choice.message.content, choice.finish_reason, body.model
                usage = compact(raw := bytes(body.usage)) or self._usage(raw)
            except plain.NOT_PLAIN:
                self._read_other(line, number)
                continue
            index = find(custom_id)
            if index is None or styles[index] is not None or index in others or plain.IMAGE_IN_TEXT in content:
                self._read_other(line, number)
                continue
            if style is None or model != style.model or finish != style.finish:
                style = self._style(number, model, finish)
            styles[index], texts[index], usages[index] = style, content, usage

    def _read_other(self, line: bytes, number: int) -> None:
        if not line.strip():
            return
        try:
            response = parse(line, self._keep)
        except UnreadableLine:
            if line.endswith(b"\n") or not self._judge.still_written(number):
                self.unreadable.append(line.removesuffix(b"\n"))
            return
        index = self._judge.index_of.get(response.custom_id)
        if index is None:
            self.unexpected.append(line.removesuffix(b"\n"))
        else:
            self._add(index, number, response)

    def _add(self, index: int, number: int, response: Response) -> None:
        if index not in self.others:
            self.others[index], self.styles[index] = self.candidates(index), None
            if self._distinct is not None:
                self._distinct[index] = {}
                for _, candidate in self.others[index]:
                    _keep_distinct(self._distinct[index], candidate)
        if self._distinct is not None:
            _keep_distinct(self._distinct[index], response)
        else:
            self.others[index].append((number, response))

    def _style(self, number: int, model: str | None, finish: str) -> _Style:
        key = number, model, finish
        return self._all_styles.get(key) or self._all_styles.setdefault(key, _Style(*key, self._judge))

    def _usage(self, raw: bytes) -> bytes:
        compact = plain.compact_usage(raw)
        return self._compact.setdefault(raw, raw if compact == raw else compact)

    def count(self, sheet: Sheet) -> None:
        """Count the results that were spliced."""
        for style in self._all_styles.values():
            outcome = style.outcome
            usages = [(plain.read_usage(usage), count) for usage, count in Counter(style.usages).items()]
            sheet.tally.add_answers(outcome.verdict, usages, reused=outcome.reused_from is not None)
            if outcome.reused_from is None:
                for usage, count in usages:
                    sheet.charges.add(usage, style.model, outcome.backend, count)


_ERROR = b""
"""Stands for the gist of whatever is no answer: of these the last counts."""


def _keep_distinct(known: dict[bytes, Response], response: Response) -> None:
    if response.verdict in ANSWERS:
        known.pop(_ERROR, None)
        known.setdefault(gist(response), response)
    elif not known or _ERROR in known:
        known[_ERROR] = response


class _Results:
    """Writes the results of one shard."""

    def __init__(self, files: ShardFiles, judge: Judge, found: _Found, sheet: Sheet) -> None:
        self._files = files
        self._judge = judge
        self._found = found
        self._sheet = sheet
        self._first = sheet.tally.rows
        self._quoted = _encode_lines([custom_id or None for custom_id in judge.ids]).split(b"\n")
        self._encoder = sheet.encoder if isinstance(sheet.encoder, ResultEncoder) else None

    def write(self) -> None:
        seal, start = self._files.seal, 0
        digest = xxhash.xxh3_128()
        try:
            for block in sections.read(self._files.rows):
                digest.update(block)
                if block[-1:] != b"\n":
                    break  # cut off: the checksum tells
                rows = BytesIO(block).readlines()
                if start + len(rows) > seal.end - seal.start:
                    raise self._damaged("has more rows than prepare wrote")
                self._write_block(start, rows)
                start += len(rows)
        except InputError as exc:
            raise self._damaged("cannot be read") from exc
        if digest.hexdigest() != seal.rows_checksum:
            raise self._damaged("is not what prepare wrote (its checksum differs)")

    def _damaged(self, what: str) -> BatchkitError:
        path = self._files.rows.path
        return damaged(path, what) if self._files.unanswered is None else changed(path)

    def _write_block(self, start: int, rows: list[bytes]) -> None:
        encoder, found, held = self._encoder, self._found, self._sheet.held
        if encoder is None:
            for index, row in enumerate(rows, start):
                self._write_other(index, row)
            return
        convert, looks = encoder.parse, encoder.needs_look(self._files.seal)
        here = slice(start, start + len(rows))
        for index, (row, style, text, usage, quoted) in enumerate(
            zip(rows, found.styles[here], found.texts[here], found.usages[here], self._quoted[here], strict=True), start
        ):
            if style is None or row[0] != _OPENED or row[-2] != _CLOSED or row[-3] in _ODD_ENDS:
                self._write_other(index, row)
                continue
            raw = _encode(text)
            if convert is None:
                parsed = raw if (bare := text.strip()) is text else _encode(bare)
            else:
                try:
                    parsed = _encode(convert(text))
                except ParseError:
                    self._write_other(index, row)
                    continue
            if looks:
                encoder.check_names(row, self._judge.ids[index])
            head, named, note, stop, end = style.splice or self._splice(style, encoder)
            held += (row[:-2], head, raw, named, parsed, note, quoted, stop, usage, end)
            style.usages.append(usage)
        self._sheet.flush()

    def _splice(self, style: _Style, encoder: ResultEncoder) -> Splice:
        style.splice = encoder.splice(style.outcome)
        return style.splice

    def _write_other(self, index: int, row: bytes) -> None:
        if (first := self._judge.firsts.get(index)) is not None:
            sent = self._judge.outcome(first, self._found.candidates(first))
            self._sheet.add(row.removesuffix(b"\n"), self._judge.shared(index, sent), self._first + index)
            return
        candidates = self._found.candidates(index)
        outcome = self._judge.outcome(index, candidates)
        self._sheet.add(row.removesuffix(b"\n"), outcome, self._first + index)
        for backend, response in self._judge.superseded(candidates, outcome):
            self._sheet.charges.add(response.usage, response.model, backend)
