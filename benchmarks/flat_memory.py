"""Memory of `prepare` (with `--reuse`, too) and `merge` at several sizes: it must not grow with the rows.

Rows with small pictures go through the command line; the responses are made here, in shuffled order within a shard,
and every result is compared with what it must be. The same rows are prepared as CSV, Parquet and a Hugging Face
dataset, the last two with the bytes of the pictures; the requests must be the same. Prints a table of seconds, rows per
second and peak memory (the largest process, and the sum of all of them).

    python benchmarks/flat_memory.py --rows 10000,100000
"""

from __future__ import annotations

import csv
import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from harness import Measured, measure, parser, say, workplace
from PIL import Image
from report import Report, Table

from batchkit.jobs import Attempt, Job
from batchkit.manifests import now
from batchkit.runs import Run

PICTURES = 500
COMMAND = [sys.executable, "-m", "batchkit"]


def main() -> None:
    arguments = parser(__doc__, rounds=None)
    arguments.add_argument("--rows", help="sizes, separated by commas [default: 10000,100000]")
    given = arguments.parse_args()
    sizes = given.rows or ("1000,5000" if given.quick else "10000,100000")
    rows, raw = [], {}
    for size in map(int, sizes.split(",")):
        with workplace(given.folder) as folder:
            say(f"flat memory: {size:,} rows")
            for stage, measured in one_size(folder, size):
                rows.append([f"{size:,}", stage, f"{measured.seconds:.1f}", f"{size / measured.seconds:,.0f}"])
                rows[-1] += [f"{measured.largest_mb or 0:.0f}", f"{measured.sum_mb or 0:.0f}"]
                raw[f"{size} {stage}"] = measured._asdict()
    columns = ["rows", "stage", "seconds", "rows/s", "largest MB", "sum MB"]
    report = Report(
        "flat_memory",
        "Memory at several sizes",
        "Rows with small pictures, prepared from several formats and merged in several ways, once each, all results "
        "checked. Memory was looked at 50 times a second, which costs some of the speed.",
        quick=given.quick,
        tables=[Table("", columns, rows)],
        raw=raw,
    )
    report.finish(given.json, given.folder)


def one_size(folder: Path, rows: int) -> list[tuple[str, Measured]]:
    tasks = make_tasks(folder, rows)
    run = folder / "run"
    prepared = measure([*COMMAND, "prepare", str(tasks), str(run), "--model", "m"])
    inputs = [(name, measure_input(folder, name, make, rows)) for name, make in INPUTS.items()]
    answer(run)
    merged = measure([*COMMAND, "merge", str(run)])
    check(run, rows)
    again = folder / "again"
    reused = measure([*COMMAND, "prepare", str(tasks), str(again), "--model", "m", "--reuse", str(run)])
    subprocess.run([*COMMAND, "merge", str(again)], check=True, stderr=subprocess.DEVNULL)
    check(again, rows)
    halves = [folder / "half1", folder / "half2"]
    for half, span in zip(halves, (("--end", str(rows // 2)), ("--start", str(rows // 2))), strict=True):
        command = [*COMMAND, "prepare", str(tasks), str(half), "--model", "m", "--reuse", str(run), *span]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    joined = measure([*COMMAND, "merge", *map(str, halves), "-o", str(folder / "joined.jsonl")])
    check_file(folder / "joined.jsonl", rows)
    pile = [
        "--tasks",
        str(tasks),
        "--responses",
        str(folder / "pile.*.jsonl"),
        "-o",
        str(folder / "pile-results.jsonl"),
    ]
    make_pile(folder, rows)
    piled = measure([*COMMAND, "merge", *pile])
    check_file(folder / "pile-results.jsonl", rows)
    return [("prepare", prepared), *inputs, ("merge", merged), ("reuse", reused), ("parts", joined), ("pile", piled)]


def measure_input(folder: Path, name: str, make: Callable[[Path, int], Path], rows: int) -> Measured:
    """`prepare` of the rows as they are in another format; its requests are compared with those of the JSONL."""
    tasks, run = make(folder, rows), folder / f"run-{name}"
    measured = measure([*COMMAND, "prepare", str(tasks), str(run), "--model", "m", "--image-root", str(folder)])
    assert all(
        (run / "requests" / path.name).read_bytes() == path.read_bytes()
        for path in (folder / "run" / "requests").glob("*.jsonl")
    )
    shutil.rmtree(run)
    return measured


def rows_of(rows: int) -> Iterator[dict[str, str]]:
    for number in range(rows):
        image = f"pictures/{number % PICTURES}.jpg"
        yield {"id": f"row-{number}", "image": image, "question": f"What is {number}?"}


def make_csv(folder: Path, rows: int) -> Path:
    with open(folder / "tasks.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["id", "image", "question"])
        writer.writeheader()
        writer.writerows(rows_of(rows))
    return folder / "tasks.csv"


def tables_with_bytes(folder: Path, rows: int) -> Iterator[pa.Table]:
    """Tables of 1,000 rows; images as Hugging Face stores them."""
    pictures = {
        f"pictures/{number}.jpg": (folder / f"pictures/{number}.jpg").read_bytes() for number in range(PICTURES)
    }
    made = ({**row, "image": {"bytes": pictures[row["image"]], "path": None}} for row in rows_of(rows))
    while some := list(itertools.islice(made, 1000)):
        yield pa.Table.from_pylist(some)


def make_parquet(folder: Path, rows: int) -> Path:
    """One row group of all rows: the hardest to read in a little memory."""
    tables = tables_with_bytes(folder, rows)
    pq.write_table(pa.concat_tables(tables), folder / "tasks.parquet", row_group_size=rows, use_dictionary=False)
    return folder / "tasks.parquet"


def make_dataset(folder: Path, rows: int) -> Path:
    """What `save_to_disk` writes, with the rows written as they come."""
    import datasets

    first = next(tables_with_bytes(folder, 1))
    target = folder / "dataset"
    datasets.Dataset(first).save_to_disk(target)
    (file,) = target.glob("*.arrow")
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
        for table in tables_with_bytes(folder, rows):
            writer.write_table(table)
    return target


INPUTS = {"csv": make_csv, "parquet": make_parquet, "hf": make_dataset}


def make_tasks(folder: Path, rows: int) -> Path:
    chance = random.Random(0)
    (folder / "pictures").mkdir()
    for number in range(PICTURES):
        Image.frombytes("RGB", (48, 48), chance.randbytes(48 * 48 * 3)).save(folder / f"pictures/{number}.jpg")
    tasks = folder / "tasks.jsonl"
    with open(tasks, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows_of(rows))
    return tasks


def response(custom_id: str, number: int) -> str:
    body = {
        "id": f"chatcmpl-{number:032x}",
        "object": "chat.completion",
        "created": 1_790_000_000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": f"answer {number}"},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 90, "total_tokens": 100, "completion_tokens": 10},
    }
    return json.dumps(
        {
            "id": f"vllm-{number:032x}",
            "custom_id": custom_id,
            "response": {"status_code": 200, "request_id": f"vllm-batch-{number:x}", "body": body},
            "error": None,
        }
    )


def answer(path: Path) -> None:
    """Answer every request of the run, in shuffled order within each shard."""
    run = Run.open(path)
    chance = random.Random(1)
    for seal in run.seals():
        pairs = list(zip(run.read_ids(seal), range(seal.start, seal.end), strict=True))
        chance.shuffle(pairs)
        lines = "".join(response(custom_id, number) + "\n" for custom_id, number in pairs)
        run.responses_path(seal.shard, 1).write_text(lines)
        whole = [(seal.start, seal.end)]
        attempt = Attempt(number=1, backend="vllm", state="collected", rows=whole, started=now(), ended=now())
        run.write_job(Job(shard=seal.shard, attempts=[attempt]))


def make_pile(folder: Path, rows: int) -> None:
    """The same answers as five foreign files, the lines scattered over them, under the rows' own ids."""
    chance = random.Random(2)
    streams = [open(folder / f"pile.{number}.jsonl", "w", encoding="utf-8") for number in range(5)]  # noqa: SIM115
    for number in range(rows - 1, -1, -1):
        chance.choice(streams).write(response(f"row-{number}", number) + "\n")
    for stream in streams:
        stream.close()


def check(run: Path, rows: int) -> None:
    verdicts = json.loads((run / "summary.json").read_bytes())["verdicts"]
    assert verdicts["answered"] == rows == sum(verdicts.values())
    check_file(run / "results.jsonl", rows)


def check_file(path: Path, rows: int) -> None:
    number = -1
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            result = json.loads(line)
            assert result["id"] == f"row-{number}"
            assert result["raw_response"] == f"answer {number}"
    assert number + 1 == rows


if __name__ == "__main__":
    main()
