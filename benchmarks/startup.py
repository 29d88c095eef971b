"""What a command costs before it does anything: `batchkit --help`, and `status` and `submit` on a run of many shards
of which nothing is left to do.

The run is prepared by the command line; its responses are written here, some of them failures, and what `status` says
is compared with what was written, also after somebody has changed a file. Prints a table of medians; `first status`
has to read every response, because nobody has counted them yet.

    python benchmarks/startup.py --shards 1000 --rows 500
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from batchkit.jobs import Attempt, Job
from batchkit.manifests import now
from batchkit.runs import Run

COMMAND = [sys.executable, "-m", "batchkit"]
BARE = [sys.executable, "-c", "pass"]
FAILED = 50
"""One response in so many is a failure that is not tried again."""


class Cost(NamedTuple):
    cpu: float
    wall: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=500, help="in each shard")
    parser.add_argument("--times", type=int, default=7, help="how often each is measured")
    parser.add_argument("--folder", help="where to work [default: a temporary folder]")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(Path(folder), shards=options.shards, rows=options.rows, times=options.times)
    print(f"{options.shards:,} shards of {options.rows:,} rows, median of {options.times}")
    print(f"{'command':24} {'CPU s':>8} {'wall s':>8}")
    for name, figure in figures.items():
        print(f"{name:24} {figure['cpu_s']:8.3f} {figure['wall_s']:8.3f}")
    if options.json:
        whole = {"shards": options.shards, "rows_per_shard": options.rows, "commands": figures}
        Path(options.json).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, *, shards: int, rows: int, times: int) -> dict[str, dict[str, Any]]:
    """Median seconds of each command, and all that were measured, on a run that is made in `folder`."""
    run = make_run(folder, shards=shards, rows=rows)
    failed = answer(run)
    rest = shards * rows - failed
    check_status = checked(answered=rest, failed=failed)
    show, send = ["status", str(run), "--json"], ["submit", str(run)]
    costs: dict[str, list[Cost]] = {"first status": [cost([*COMMAND, *show], 3, check_status)]}
    ways: dict[str, tuple[list[str], int, Callable[[bytes], None]]] = {
        "python": (BARE, 0, check_nothing),
        "--help": ([*COMMAND, "--help"], 0, check_help),
        "status": ([*COMMAND, *show], 3, check_status),
        "submit, nothing to do": ([*COMMAND, *send], 3, check_nothing),
    }
    for _ in range(times):
        for name, way in ways.items():
            costs.setdefault(name, []).append(cost(*way))
    (run / "responses" / "00000.1.jsonl").write_bytes(b"")  # what was counted of it holds no longer
    costs["status, one shard anew"] = [cost([*COMMAND, *show], 3, checked(**without_first(run, rest, failed)))]
    return {
        name: {
            "cpu_s": statistics.median(found.cpu for found in some),
            "wall_s": statistics.median(found.wall for found in some),
            "all_cpu_s": [found.cpu for found in some],
            "all_wall_s": [found.wall for found in some],
        }
        for name, some in costs.items()
    }


def make_run(folder: Path, *, shards: int, rows: int) -> Path:
    tasks, run = folder / "tasks.jsonl", folder / "run"
    with open(tasks, "w", encoding="utf-8") as stream:
        rows_of = ({"id": f"row-{number}", "question": f"What is {number}?"} for number in range(shards * rows))
        stream.writelines(json.dumps(row) + "\n" for row in rows_of)
    command = ["prepare", str(tasks), str(run), "--model", "m", "--backend", "server", "--max-requests", str(rows)]
    subprocess.run([*COMMAND, *command], check=True, stderr=subprocess.DEVNULL)
    return run


def answer(path: Path) -> int:
    """Answer the requests of the run, as one attempt at each shard. Returns how many answers are failures."""
    run, failed = Run.open(path), 0
    for seal in run.seals():
        with open(run.responses_path(seal.shard, 1), "w", encoding="utf-8") as stream:
            for custom_id, number in zip(run.read_ids(seal), range(seal.start, seal.end), strict=True):
                failed += number % FAILED == 0
                stream.write(response(custom_id, number) + "\n")
        whole = [(seal.start, seal.end)]
        attempt = Attempt(number=1, backend="server", state="collected", rows=whole, started=now(), ended=now())
        run.write_job(Job(shard=seal.shard, attempts=[attempt]))
    return failed


def response(custom_id: str, number: int) -> str:
    body: dict[str, Any]
    if number % FAILED == 0:
        status, body = 400, {"error": {"message": "the prompt is too long", "type": "BadRequestError", "code": 400}}
    else:
        message = {"role": "assistant", "content": f"answer {number}"}
        usage = {"prompt_tokens": 90, "total_tokens": 100, "completion_tokens": 10}
        choices = [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}]
        status, body = 200, {"id": f"chatcmpl-{number:032x}", "model": "m", "choices": choices, "usage": usage}
    line = {"status_code": status, "request_id": f"{number:x}", "body": body}
    return json.dumps({"id": f"{number:032x}", "custom_id": custom_id, "response": line, "error": None})


def without_first(run: Path, answered: int, failed: int) -> dict[str, int]:
    """The counts when the first shard has no responses any more."""
    first = next(iter(Run.open(run).seals()))
    lost = sum(number % FAILED == 0 for number in range(first.start, first.end))
    rows = first.end - first.start
    return {"answered": answered - (rows - lost), "failed": failed - lost, "missing": rows}


def cost(command: Sequence[str], code: int, check: Callable[[bytes], None]) -> Cost:
    """CPU and wall time of a command that must end with `code`, its output checked."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code, done.stderr.decode()
    check(done.stdout)
    return Cost(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall)


def checked(**verdicts: int) -> Callable[[bytes], None]:
    def check(output: bytes) -> None:
        found = json.loads(output)["verdicts"]
        assert {name: count for name, count in found.items() if count} == {k: v for k, v in verdicts.items() if v}

    return check


def check_help(output: bytes) -> None:
    assert b"prepare" in output
    assert b"status" in output


def check_nothing(output: bytes) -> None:
    assert not output


if __name__ == "__main__":
    main()
