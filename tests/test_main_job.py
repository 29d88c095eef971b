"""The main job on real parts: the example's pictures and model, through prepare, real vLLM and merge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits"
ENGINE = ["--max-model-len", "256", "--dtype", "float32", "--enforce-eager", "--limit-mm-per-prompt", '{"image": 2}']
REJECTED = (100, 301)
TOO_LONG = 200


def batchkit(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "batchkit", *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def task_rows() -> list[dict[str, Any]]:
    """The example's 400 rows, one of them made longer than the context, and two rows that must be rejected."""
    rows = [json.loads(line) for line in (EXAMPLE / "tasks.jsonl").read_bytes().splitlines()]
    assert len(rows) == 400
    rows.insert(REJECTED[0], {"id": "gone", "image": "images/gone.png", "question": "Which digit is this?"})
    rows.insert(TOO_LONG, {**rows.pop(TOO_LONG), "question": "Which digit is this? " * 100})
    rows.insert(REJECTED[1], {"id": "mute", "image": rows[0]["image"]})
    return rows


@pytest.mark.engine
def test_402_rows_give_402_results_in_order_with_the_right_answers(tmp_path: Path) -> None:
    rows = task_rows()
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    model = ["--model", str(EXAMPLE / "model"), "--image-root", str(EXAMPLE), "--max-tokens", "8"]

    prepared = batchkit("prepare", tasks, run, *model, "--max-requests", "101")
    assert prepared.returncode == 0, prepared.stderr
    assert "400 requests of 402 rows, in 4 shards" in prepared.stderr

    submitted = batchkit("submit", run, "--", *ENGINE)
    assert submitted.returncode == 3, submitted.stderr
    assert "sent 400 requests, got 400 responses" in submitted.stderr
    assert not list((run / "engine").glob("*/input.jsonl"))

    merged = batchkit("merge", run)
    assert merged.returncode == 3, merged.stderr
    lines = (run / "results.jsonl").read_bytes().splitlines()
    results = [json.loads(line) for line in lines]
    assert len(results) == 402
    for row, line, result in zip(rows, lines, results, strict=True):
        assert line.startswith(json.dumps(row).encode()[:-1] + b",")
        assert list(result)[len(row) :] == ["model", "raw_response", "parsed_answer", "error", "batchkit"]

    verdicts = Counter(result["batchkit"]["verdict"] for result in results)
    assert verdicts == {"answered": 399, "rejected": 2, "failed": 1}
    assert {position for position in REJECTED if results[position]["batchkit"]["verdict"] == "rejected"} == {*REJECTED}
    assert results[REJECTED[0]]["error"] == "tasks.jsonl:101: image not found: images/gone.png"
    assert results[TOO_LONG]["batchkit"]["verdict"] == "failed"
    assert "length" in results[TOO_LONG]["error"]
    assert results[TOO_LONG]["raw_response"] is None

    asked = [result for result in results if result["batchkit"]["verdict"] == "answered"]
    right = sum(result["parsed_answer"] == result["truth"] for result in asked)
    assert right >= 0.95 * len(asked), f"{right} of {len(asked)}"

    summary = json.loads((run / "summary.json").read_bytes())
    assert sum(summary["verdicts"].values()) == summary["rows"] == 402
    retry = [json.loads(line) for line in (run / "retry.jsonl").read_bytes().splitlines()]
    assert retry == [rows[position] for position in sorted({*REJECTED, TOO_LONG})]

    again = batchkit("submit", run, "--", *ENGINE)
    assert "sent 0 requests" in again.stderr, "a lasting error is not sent again"
