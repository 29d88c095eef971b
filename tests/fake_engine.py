"""Stands in for vLLM's batch runner where a fault is wanted on request; speaks its command line, log and lines.

FAKE_ENGINE in the environment is a JSON object:

    journal     a file that gets one line for each start: the custom_ids that were asked, in order
    poison      custom_ids that kill the engine
    death       how: "lines" (error lines for what was open, exit 0: vLLM to 0.32), "crash" (no output, exit 1),
                "stream" (a flushed prefix, exit 1: vLLM 0.33), "half" (a flushed prefix, then half a line, SIGKILL)
    startup     text to end with, before any request is taken
    late        the numbers of the starts that end before any request is taken, out of memory
    hang        take the requests, and never answer
    seconds     how long the whole work takes
    flaky       how many starts die at once, before the rest go well
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO, Any


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-i", dest="source", required=True)
    parser.add_argument("-o", dest="target", required=True)
    options, _ = parser.parse_known_args()
    faults = json.loads(os.environ.get("FAKE_ENGINE", "{}"))
    if "startup" in faults:
        sys.exit(faults["startup"])
    requests = [json.loads(line) for line in Path(options.source).read_text().splitlines()]
    ids = [request["custom_id"] for request in requests]
    starts = journal(faults, ids)
    if starts in faults.get("late", ()):
        sys.exit("torch.OutOfMemoryError: the memory of an engine that has just ended is not free yet")
    report(0, len(ids))
    if starts <= faults.get("flaky", 0):
        sys.exit("RuntimeError: the engine is in a bad mood")
    if faults.get("hang"):
        time.sleep(600)
    death = faults.get("death", "lines")
    with open(options.target, "w") as out:
        answer(requests, out, faults, death)
    report(len(ids), len(ids))


def journal(faults: dict[str, Any], ids: list[str]) -> int:
    if "journal" not in faults:
        return 1
    with open(faults["journal"], "a+") as stream:
        stream.write(json.dumps(ids) + "\n")
        stream.seek(0)
        return len(stream.readlines())


def report(done: int, total: int) -> None:
    share = round(100 * done / max(total, 1))
    print(f"Running batch: {share:3d}% Completed | {done}/{total} [00:00<?, ?req/s]", file=sys.stderr, flush=True)


def answer(requests: list[dict[str, Any]], out: IO[str], faults: dict[str, Any], death: str) -> None:
    poison = set(faults.get("poison", ()))
    pause = faults.get("seconds", 0) / max(len(requests), 1)
    died = death == "lines" and faults.get("all_at_once", False) and any(r["custom_id"] in poison for r in requests)
    for count, request in enumerate(requests):
        died = died or request["custom_id"] in poison
        if died and death == "crash":
            out.truncate(0)
            sys.exit("RuntimeError: the engine crashed")
        if died and death == "stream":
            sys.exit("RuntimeError: the engine crashed")
        line = json.dumps(error(request) if died else good(request))
        if died and death == "half":
            out.write(line[: len(line) // 2])
            out.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        out.write(line + "\n")
        if death in ("stream", "half"):
            out.flush()
        time.sleep(pause)
        if pause:
            report(count + 1, len(requests))


def good(request: dict[str, Any]) -> dict[str, Any]:
    echoes = json.loads(os.environ["FAKE_ENGINE"]).get("echo") == "question"
    text = "answer to " + (request["body"]["messages"][-1]["content"] if echoes else request["custom_id"])
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    body = {"id": "x", "object": "chat.completion", "model": request["body"]["model"], "choices": [choice]}
    return {
        "id": "vllm-1",
        "custom_id": request["custom_id"],
        "response": {"status_code": 200, "request_id": "vllm-batch-1", "body": body},
        "error": None,
    }


def error(request: dict[str, Any]) -> dict[str, Any]:
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    return {
        "id": "vllm-1",
        "custom_id": request["custom_id"],
        "response": {"status_code": 500, "request_id": "vllm-batch-1", "body": None},
        "error": {"error": {"message": message, "type": "InternalServerError", "param": None, "code": 500}},
    }


if __name__ == "__main__":
    main()
