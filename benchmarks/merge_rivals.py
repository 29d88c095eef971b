"""The loops that people write where they have no batchkit: rows and shuffled responses → rows with their answers.

Each takes a JSONL file of rows with an `id`, and one of responses in OpenAI batch format whose `custom_id` is that id,
in any order; it writes, in the order of the rows, the fields of each row and `answer`: the text of the first choice, or
null. None of them looks at errors, duplicates or strange lines, which is part of what they are quick by.

    python benchmarks/merge_rivals.py NAME ROWS.jsonl RESPONSES.jsonl OUT.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2


def plain_dict(rows: Path, responses: Path, out: Path) -> None:
    """What everybody writes first: a dictionary of all responses."""
    answers = {}
    with open(responses, encoding="utf-8") as stream:
        for line in stream:
            response = json.loads(line)
            answers[response["custom_id"]] = response
    with open(rows, encoding="utf-8") as stream, open(out, "w", encoding="utf-8") as target:
        for line in stream:
            row = json.loads(line)
            response = answers.get(row["id"])
            row["answer"] = (
                response["response"]["body"]["choices"][0]["message"]["content"] if response is not None else None
            )
            target.write(json.dumps(row) + "\n")


def orjson_dict(rows: Path, responses: Path, out: Path) -> None:
    """The same by someone who cares for speed: orjson, and only the texts are kept."""
    import orjson

    answers = {}
    with open(responses, "rb") as stream:
        for line in stream:
            response = orjson.loads(line)
            answers[response["custom_id"]] = response["response"]["body"]["choices"][0]["message"]["content"]
    with open(rows, "rb") as stream, open(out, "wb") as target:
        for line in stream:
            row = orjson.loads(line)
            row["answer"] = answers.get(row["id"])
            target.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))


def pandas_join(rows: Path, responses: Path, out: Path) -> None:
    import pandas as pd

    asked = pd.read_json(rows, lines=True)
    found = pd.read_json(responses, lines=True)[["custom_id", "response"]]
    found["answer"] = found["response"].map(lambda value: value["body"]["choices"][0]["message"]["content"])
    joined = asked.merge(found[["custom_id", "answer"]], how="left", left_on="id", right_on="custom_id")
    joined.drop(columns="custom_id").to_json(out, orient="records", lines=True)


def polars_join(rows: Path, responses: Path, out: Path) -> None:
    """Lazy, with a schema of what is needed, so that nothing else is decoded; streaming where Polars can."""
    import polars as pl

    message = pl.Struct({"content": pl.String})
    body = pl.Struct({"choices": pl.List(pl.Struct({"message": message}))})
    schema: Any = {"custom_id": pl.String, "response": pl.Struct({"body": body})}
    choices = pl.col("response").struct.field("body").struct.field("choices")
    text = choices.list.first().struct.field("message").struct.field("content")
    found = pl.scan_ndjson(responses, schema=schema).select("custom_id", text.alias("answer"))
    asked = pl.scan_ndjson(rows)
    joined = asked.join(found, how="left", left_on="id", right_on="custom_id", maintain_order="left")
    joined.sink_ndjson(out)


ANSWER = "response.body.choices[1].message.content AS answer"
MESSAGE = "message STRUCT(content VARCHAR)"
USAGE = "usage STRUCT(prompt_tokens BIGINT, completion_tokens BIGINT, total_tokens BIGINT)"


def duckdb_join(rows: Path, responses: Path, out: Path) -> None:
    """Two threads; the texts alone, and only the columns that they need are decoded."""
    shape = f"STRUCT(body STRUCT(choices STRUCT({MESSAGE})[]))"
    _duckdb(rows, responses, out, f"{{custom_id: 'VARCHAR', response: '{shape}'}}", ANSWER)


def duckdb_verdicts(rows: Path, responses: Path, out: Path) -> None:
    """The same with what is needed to tell what became of each row, and what it has cost."""
    shape = f"STRUCT(status_code INT, body STRUCT(choices STRUCT(finish_reason VARCHAR, {MESSAGE})[], {USAGE}))"
    known = """{
        'status_code': response.status_code, 'finish_reason': response.body.choices[1].finish_reason,
        'usage': response.body.usage, 'error': error
    } AS batchkit"""
    columns = f"{{custom_id: 'VARCHAR', response: '{shape}', error: 'JSON'}}"
    _duckdb(rows, responses, out, columns, f"{ANSWER}, {known}")


def _duckdb(rows: Path, responses: Path, out: Path, columns: str, wanted: str) -> None:
    import duckdb

    database = duckdb.connect(config={"threads": THREADS})
    lines = f"read_json({_quoted(rows)}, format = 'newline_delimited')"
    asked = f"SELECT *, row_number() OVER () AS place FROM {lines}"  # noqa: S608  # the files are named by whoever calls
    answers = f"read_json({_quoted(responses)}, format = 'newline_delimited', columns = {columns})"
    joined = f"""
        SELECT asked.* EXCLUDE (place), found.* EXCLUDE (custom_id) FROM ({asked}) asked
        LEFT JOIN (SELECT custom_id, {wanted} FROM {answers}) found ON asked.id = found.custom_id ORDER BY place
    """  # noqa: S608  # the same
    database.execute(f"COPY ({joined}) TO {_quoted(out)} (FORMAT json)")


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


RIVALS: dict[str, Callable[[Path, Path, Path], None]] = {
    rival.__name__: rival for rival in (plain_dict, orjson_dict, pandas_join, polars_join, duckdb_join, duckdb_verdicts)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RIVALS)
    parser.add_argument("files", nargs=3, type=Path, metavar="ROWS RESPONSES OUT")
    given = parser.parse_args()
    RIVALS[given.name](*given.files)


if __name__ == "__main__":
    main()
