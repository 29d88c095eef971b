"""Throughput of vLLM on this machine: raw `run_batch` with its own defaults, `submit`, and `submit --engine serve`.

Made for a machine with a GPU. It needs nothing but batchkit with its vllm extra, and numpy; the images and the requests
are made here. `--load-format dummy` needs no weights, only the model's configuration:

    python benchmarks/gpu_throughput.py --model Qwen/Qwen2.5-VL-3B-Instruct -- --load-format dummy --max-model-len 8192

Every way answers a few requests and then many, each from a start of its own: requests/s are those of the difference, so
start-up is not in them. Every answer has the same number of tokens (ignore_eos), whatever the weights are.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pictures
from engines import Place, Seen, watch
from harness import FailedError, parser, say, workplace
from report import Report, Table

RAW, SUBMIT, SERVE = "run_batch, its defaults", "batchkit submit", "batchkit submit --engine serve"
OPTIONS: dict[str, tuple[str, ...]] = {SUBMIT: (), SERVE: ("--engine", "serve")}


class Usage(NamedTuple):
    prompt: int
    output: int


class Trial(NamedTuple):
    """One way with few and with many requests; `usage` is the tokens of the many."""

    few: Seen
    many: Seen
    usage: Usage


def make_place(folder: Path, tasks: Path, count: int, given: argparse.Namespace) -> Place:
    """A run of the first `count` rows."""
    folder.mkdir()
    place = Place(folder, model=given.model, args=given.engine_args)
    if not given.offline:
        place.environment.pop("HF_HUB_OFFLINE")
    extra = json.dumps({"ignore_eos": True})
    options = ["--limit", str(count), "--max-tokens", str(given.max_tokens), "--extra-body", extra]
    place.prepare(tasks, *options)
    return place


def ask(place: Place, folder: Path, name: str) -> tuple[Seen, list[Path]]:
    """All requests of the run once. Returns the files of responses, too."""
    say(f"throughput: {name}")
    if name != RAW:
        place.forget()
        command = place.submit(*OPTIONS[name])
        seen = watch(command, environment=place.environment, answers=place.answer_files, near=folder)
        return seen, sorted((place.run / "responses").glob("*.jsonl"))
    output = folder / "raw.jsonl"
    output.unlink(missing_ok=True)
    command = place.raw(place.source, output)
    seen = watch(command, environment=place.environment, answers=lambda: [output], near=folder)
    return seen, [output]


def usage(paths: Sequence[Path], requests: int) -> Usage:
    """The tokens of all answers. Raises `FailedError` where one of them is none."""
    prompt = output = count = 0
    for path in paths:
        for line in filter(None, path.read_bytes().split(b"\n")):
            response = json.loads(line)
            if response["response"]["status_code"] != 200:
                raise FailedError(f"a request failed: {line[:2000].decode('utf-8', 'replace')}")
            used = response["response"]["body"]["usage"]
            prompt, output, count = prompt + used["prompt_tokens"], output + used["completion_tokens"], count + 1
    if count != requests:
        raise FailedError(f"{count:,} answers to {requests:,} requests")
    return Usage(prompt, output)


def rate_of(trial: Trial, few: int, many: int) -> float | None:
    """Requests/s without start-up; None where the starts differed by so much that they hide the work."""
    seconds = trial.many.seconds - trial.few.seconds
    return (many - few) / seconds if seconds > 0 else None


def table(trials: dict[str, Trial], few: int, many: int) -> Table:
    """The first of the ways is what the others are compared with."""
    base = rate_of(next(iter(trials.values())), few, many)
    rows = []
    for name, one in trials.items():
        rate = rate_of(one, few, many)
        cells = ["too few requests"] * 4
        if rate is not None:
            cells = [f"{rate:.1f}", *(f"{rate * tokens / many:,.0f}" for tokens in one.usage)]
            cells.append(f"{rate / base:.2f}" if base is not None else "")
        first = one.many.first or one.many.seconds
        rows.append([name, f"{one.few.seconds:.1f}", f"{one.many.seconds:.1f}", *cells, f"{first:.1f}"])
    columns = [
        "", f"seconds for {few:,}", f"seconds for {many:,}", "requests/s", "prompt tokens/s", "output tokens/s",
        f"speed, {next(iter(trials))} = 1", "first answer on the disk after",
    ]  # fmt: skip
    return Table("", columns, rows)


def gpus() -> str:
    """What nvidia-smi lists, or that there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return "; ".join(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines())
    except (OSError, subprocess.CalledProcessError):
        return "no GPU"


def arguments() -> argparse.Namespace:
    made = parser(__doc__, rounds=None)
    made.add_argument("--model", required=True, help="a name on the model hub, or a folder")
    made.add_argument("--requests", type=int, help="the many [default: 2000]")
    made.add_argument("--few", type=int, help="the few [default: a tenth of the many]")
    made.add_argument("--image-size", default="1024x768", metavar="WxH", help="[default: 1024x768]")
    made.add_argument("--max-tokens", type=int, default=64, help="of every answer [default: 64]")
    made.add_argument("--ways", default="raw,submit,serve", help="[default: raw,submit,serve]")
    made.add_argument("--offline", action="store_true", help="ask no model hub: the model is a folder")
    made.add_argument("engine_args", nargs="*", metavar="-- ARGS", help="for vLLM, the same for all ways")
    return made.parse_args()


def main() -> None:
    given = arguments()
    many = given.requests or (40 if given.quick else 2000)
    few = given.few or max(1, many // 10)
    width, height = map(int, given.image_size.split("x"))
    ways = {"raw": RAW, "submit": SUBMIT, "serve": SERVE}
    with workplace(given.folder) as folder:
        say(f"throughput: making {many:,} images")
        names = pictures.make_small(folder / "images", many, drawn=many, size=(width, height))
        pictures.write_tasks(folder / "tasks.jsonl", "images", names)
        places = {count: make_place(folder / str(count), folder / "tasks.jsonl", count, given) for count in (few, many)}
        trials = {}
        for name in (ways[way] for way in given.ways.split(",")):
            first, _ = ask(places[few], folder, name)
            second, paths = ask(places[many], folder, name)
            trials[name] = Trial(first, second, usage(paths, many))
    report = Report(
        "gpu_throughput",
        "Throughput of vLLM",
        f"{given.model} on {gpus()}: {many:,} requests with an image of {width} × {height}, {given.max_tokens} tokens "
        f"of answer each; engine arguments: {' '.join(given.engine_args) or 'none'}.",
        quick=given.quick,
        tables=[table(trials, few, many)],
        raw={name: trial._asdict() for name, trial in trials.items()},
        command=shlex.join(["python", *sys.argv]),
    )
    report.finish(given.json, given.folder)


if __name__ == "__main__":
    main()
