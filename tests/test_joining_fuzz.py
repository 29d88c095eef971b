"""Whatever stands in rows and response lines: merge's fast way writes and counts what the long way does, which goes
row by row through `outcomes.load` and `ResultEncoder.encode`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchkit import identities, outcomes, piles, plain, sorting
from batchkit.billing import Billing
from batchkit.jobs import Attempt, AttemptState, Job
from batchkit.joining import join
from batchkit.manifests import Seal
from batchkit.outcomes import files_of
from batchkit.piles import merge_pile
from batchkit.results import ResultEncoder
from batchkit.runs import Run
from batchkit.sheets import NoAlbum, Sheet
from batchkit.summaries import Tally
from tests.made_runs import MadeRun, response_line

ROWS = [
    b'{"id": 1}', b"{}", b"{ }", b'{"a": {}}', b'{"a":{} }', b' {"a": 1} ', b'{"a": 1}\r', b'{"a": "}" \t}',
    b'{"a":1e400}',
    b'{"a":"\\u007d"}', b'{"a":[{}]}', b'{"\\u0061": "\xc3\xa9"}', b'{"a":1,"a":2}', b"[1]", b"7", b"{bad}", b"{",
    b'{"a"}',
    b"\xef\xbb\xbf{}", b'{"a":"\xff"}',
]  # fmt: skip
NUMBERS = [
    "0",
    "7",
    "-3",
    "2.0",
    "1.5",
    "-0",
    "-0.0",
    "1e3",
    "1e400",
    "true",
    "null",
    '"9"',
    "9" * 19,
    "9" * 30,
    "NaN",
    "{}",
    "[]",
]
USAGES = st.one_of(
    st.sampled_from(
        ["null", "{}", " { } ", "[]", "3", '"x"', '{"prompt_tokens":1,"prompt_tokens":5}', '{"a":"\\ud800"}']
    ),
    st.builds(
        '{{"prompt_tokens": {}, "completion_tokens":{},"total_tokens":{},'
        '"prompt_tokens_details": {{"cached_tokens": {}}}}}'.format,
        *[st.sampled_from(NUMBERS)] * 4,
    ),
    st.builds('{{"input_tokens":{},"output_tokens":{}}}'.format, *[st.sampled_from(NUMBERS)] * 2),
)
CONTENTS = st.sampled_from([
    '"red"', '"red"', '" red\\n"', '""', "null", '"\\u00e9\\u2028"', '"\\ud83d\\ude00"', '"\\ud83d"', '"\\u0000"', "5",
    '"see https://x.org/data:image/png"', '[{"type":"text","text":"red"}]', '{"a":1}', '"7"', '"{\\"a\\": 1e400}"',
])  # fmt: skip
FINISHES = st.sampled_from(
    [
        '"stop"',
        '"stop"',
        '"stop"',
        '"length"',
        '"length"',
        '"LENGTH"',
        '"tool_calls"',
        '"content_filter"',
        '"error"',
        "null",
        '"abort"',
        "1",
    ]
)
OF_MESSAGE = st.sampled_from([
    "", "", "", ',"refusal":null', ',"refusal":""', ',"refusal":"no"', ',"images":[]', ',"images":null',
    ',"images":false', ',"tool_calls":[{"id":"1"}]', ',"reasoning_content":"hm"', ',"content":"twice"', ',"refusal":[]',
    ',"x":"\\ud800"', ',"x":NaN',
])  # fmt: skip
OF_BODY = st.sampled_from(
    [
        "",
        "",
        '"model":"m",',
        '"model":null,',
        '"model":7,',
        '"model":"gpt-4o","model":"m2",',
        '"output":[],',
        '"candidates":[],',
        '"promptFeedback":null,',
        '"model":"",',
    ]
)
STATUSES = st.sampled_from(["200", "200", "200", "200.0", "201", "0", "400", "429", '"200"', "null", "true", "2e2"])
OF_LINE = st.sampled_from(
    [
        "",
        "",
        "",
        ',"error":null',
        ',"error":"odd"',
        ',"error":{"code":"x"}',
        ',"custom_id":"stranger"',
        ',"method":"POST"',
    ]
)
HEADS = st.sampled_from(["", "", "", "\ufeff", " ", "\t"])
ENDS = st.sampled_from(["\n", "\n", "\n", "\r\n", " \n", "}\n", "\n\n", "\n \n", "", "\n\x0b\n"])
EXTRA = st.sampled_from(["", "", "", ",{}", ',{"message":{"content":"b"},"finish_reason":"stop"}', ",7"])


@st.composite
def _lines(draw: st.DrawFn, names: list[str]) -> bytes:
    custom_id = draw(st.sampled_from([*names, *names, "stranger", ""]))
    if draw(st.booleans()):
        return response_line(custom_id, draw(st.sampled_from(["red", "blue", " 7 "]))) + b"\n"
    name = json.dumps(custom_id)
    if draw(st.booleans()) and len(name) > 2:
        name = f'"\\u{ord(name[1]):04x}{name[2:]}'
    choice = (
        f'{{"message":{{"content":{draw(CONTENTS)}{draw(OF_MESSAGE)}}},"finish_reason":{draw(FINISHES)}}}{draw(EXTRA)}'
    )
    usage = draw(st.one_of(st.just(""), st.builds(',"usage": {}'.format, USAGES)))
    body = f'{{{draw(OF_BODY)}"choices":[{choice}]{usage}}}'
    returned = f'{{"status_code":{draw(STATUSES)},"body":{body}}}'
    line = f'{draw(HEADS)}{{"custom_id":{name},"response":{returned}{draw(OF_LINE)}}}'
    line = draw(st.sampled_from([line] * 9 + [line[: len(line) // 2], line.replace('"custom_id"', '"key"'), "[]"]))
    return (line + draw(ENDS)).encode("utf-8", "surrogatepass")


class _Files:
    """What a sheet writes, in memory."""

    def __init__(self) -> None:
        self.lines = b""

    def write(self, lines: bytes) -> None:
        self.lines += lines


def _sheet(encoder: ResultEncoder) -> tuple[Sheet, list[_Files]]:
    files = [_Files(), _Files(), _Files()]
    results, retry, strays = files
    return Sheet(encoder, Tally(), results, retry=retry, strays=lambda: strays, album=NoAlbum()), files


def _written(sheet: Sheet, files: list[_Files]) -> dict[str, Any]:
    sheet.flush()
    billing = Billing(host="openai", model="gpt-4o")
    charges = dict(sheet.charges.counts)
    billing.take(sheet.charges)
    summary = sheet.tally.summary(output="", retry_file=None, unexpected_file=None, spent=billing.spent())
    return {"summary": summary, "charges": charges} | {str(at): one.lines for at, one in enumerate(files)}


def _long_way(run: Run, seal: Seal, sheet: Sheet) -> None:
    shard = outcomes.load(run, seal)
    rows = run.rows_path(seal.shard).read_bytes().split(b"\n")[:-1]
    for place, (row, outcome) in enumerate(zip(rows, shard.outcomes, strict=True)):
        sheet.add(row, outcome, place)
    for backend, response in shard.superseded:
        sheet.charges.add(response.usage, response.model, backend)
    sheet.add_strays(shard.unexpected, shard.unreadable)


def _is_row(row: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(row), dict)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_shard_is_joined_as_the_long_way_joins_it(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.sampled_from(ROWS), min_size=4, max_size=16))
    with tempfile.TemporaryDirectory() as folder:
        made = MadeRun(Path(folder) / "run")
        rejected = {at: "no" for at, row in enumerate(rows) if not _is_row(row) or data.draw(st.integers(0, 9)) == 0}
        seal = made.add_shard(rows, rejected)
        asking = [at for at in range(len(rows)) if at not in rejected]
        if len(asking) > 1 and data.draw(st.booleans()):
            seal = msgspec.structs.replace(seal, twins=f"{asking[-1]}:{asking[0]}", requests=seal.requests - 1)
            made.run.write_seal(seal)
        attempts = []
        for number in range(1, data.draw(st.integers(1, 3)) + 1):
            state: AttemptState = data.draw(st.sampled_from(["collected", "collected", "died", "running"]))
            start = data.draw(st.integers(0, len(rows) - 1))
            made.run.responses_path(0, number).write_bytes(
                b"".join(data.draw(st.lists(_lines(made.ids), min_size=2, max_size=10)))
            )
            attempts.append(
                Attempt(
                    number=number,
                    backend=data.draw(st.sampled_from(["openai", "vllm", "server"])),
                    state=state,
                    rows=[(start, len(rows))],
                    started="2026-01-01T00:00:00.000+00:00",
                    reused_from=data.draw(st.sampled_from([None, None, "other"])),
                )
            )
        made.run.write_job(Job(shard=0, attempts=attempts[: data.draw(st.integers(0, 3))]))
        parse = data.draw(st.sampled_from(["text", "json", "number", "regex:(r.d)"]))
        found = []
        for way in (_long_way, lambda run, seal, sheet: join(files_of(run, seal), sheet)):
            sheet, files = _sheet(ResultEncoder(parse=parse, model="manifest-model"))
            way(made.run, seal, sheet)
            found.append(_written(sheet, files))
        long, fast = found
        assert fast == long


PILE_ROWS = st.one_of(
    st.builds(
        '{{"id":{}{}'.format,
        st.sampled_from(
            [
                '""',
                '""',
                '"a"',
                '"a"',
                "1",
                '"\\u0061"',
                '"b\\nc"',
                "1.50",
                "null",
                "[1]",
                '"\\ud800"',
                '"\\u20ac"',
                *map(json.dumps, "cdefgh"),
            ]
        ),
        st.sampled_from(["}", "}", "}", ', "a": {} }', ',"id":"a"}\r', "} "]),
    ).map(str.encode),
    st.sampled_from([b"{}", b"[]", b"x", b"", b"  ", b'{"id":"a"', b"\xef\xbb\xbf{}"]),
)


def _merged(folder: Path, name: str, **options: Any) -> dict[str, bytes]:
    to = folder / name
    merge_pile(
        folder / "tasks.jsonl", [folder / "out*.jsonl"], output=to / "results.jsonl", id_fields=["id"], **options
    )
    files = {path.name: path.read_bytes() for path in to.iterdir()}
    files["summary.json"] = files["summary.json"].replace(str(to).encode(), b"")
    return files


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_pile_is_merged_the_same_fast_or_not_and_in_partitions(data: st.DataObject) -> None:
    rows = data.draw(st.lists(PILE_ROWS, min_size=6, max_size=12))
    names = ["", "a", "1", "b\nc", "1.50", "€", *"cdefghijk"]
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        folder = Path(temporary)
        (folder / "tasks.jsonl").write_bytes(
            b'{"id":"first"}\n' + b"\n".join(rows) + data.draw(st.sampled_from([b"\n", b""]))
        )
        for number in range(data.draw(st.integers(1, 2))):
            lines = data.draw(st.lists(_lines(names), min_size=8, max_size=16))
            (folder / f"out{number}.jsonl").write_bytes(b"".join(lines))
        fast = _merged(folder, "fast")
        patch.setattr(plain, "read_line", _refuse)
        assert _merged(folder, "long") == fast
        patch.undo()
        patch.setattr(identities, "SHARD_ROWS", 2)
        assert _merged(folder, "shards") == fast
        patch.setattr(piles, "PARTITION_BYTES", 100)
        patch.setattr(sorting, "LEAST_BYTES", 500)
        divided = _merged(folder, "divided")
        strays = [files.pop("unexpected.jsonl", b"") for files in (fast, divided)]
        assert divided == fast
        assert sorted(strays[0].split(b"\n")) == sorted(strays[1].split(b"\n"))


def _refuse(line: bytes) -> None:
    raise msgspec.DecodeError
