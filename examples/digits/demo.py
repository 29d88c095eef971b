"""The whole job on real parts: prepare, submit to vLLM, merge; then compare every answer with the truth.

`make demo` runs it. It prints each command as one would type it, and ends with exit code 1 where fewer than 95% of the
answers are right, or a row has none.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUN = "demo-run"
ENOUGH = 0.95
SHOWN = 8

TASKS = os.path.relpath(HERE / "tasks.jsonl")
MODEL = os.path.relpath(HERE / "model")
COMMANDS = (
    ["batchkit", "prepare", TASKS, RUN, "--model", MODEL, "--max-tokens", "8"],
    [
        *["batchkit", "submit", RUN, "--"],
        *["--max-model-len", "256", "--dtype", "float32", "--enforce-eager", "--limit-mm-per-prompt", '{"image": 2}'],
    ],
    ["batchkit", "merge", RUN],
)
# The example's model comes from a directory: nothing need be asked of a hub, or told to anyone.
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def main() -> None:
    shutil.rmtree(RUN, ignore_errors=True)
    environment = {**os.environ, **QUIET, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in COMMANDS:
        print(f"\n$ {shlex.join(command)}", flush=True)
        done = subprocess.run(command, env=environment, check=False)
        if done.returncode not in (0, 3):
            sys.exit(done.returncode)
    with open(Path(RUN) / "results.jsonl", encoding="utf-8") as stream:
        results = [json.loads(line) for line in stream]
    show(results)
    sys.exit(judge(results))


def show(results: list[dict[str, Any]]) -> None:
    print(f"\n{'picture':39} {'question':47} {'answer':7} truth")
    for result in results[:SHOWN]:
        pictures = result["image"] if isinstance(result["image"], list) else [result["image"]]
        print(f"{' '.join(pictures):39} {result['question']:47} {result['parsed_answer'] or '-':7} {result['truth']}")


def judge(results: list[dict[str, Any]]) -> int:
    """Print the accuracy, overall and for each question; return the exit code."""
    right: dict[str, list[bool]] = defaultdict(list)
    for result in results:
        right[result["question"]].append(result["parsed_answer"] == result["truth"])
    print()
    for question, marks in right.items():
        print(f"{sum(marks):4} of {len(marks):3} right: {question}")
    total = sum(map(sum, right.values()))
    unanswered = sum(result["batchkit"]["verdict"] != "answered" for result in results)
    print(
        f"\n{total} of {len(results)} answers are right ({total / len(results):.1%}) on pictures it never saw;", end=" "
    )
    print(f"{unanswered} rows without an answer")
    return 0 if total >= ENOUGH * len(results) and not unanswered else 1


if __name__ == "__main__":
    main()
