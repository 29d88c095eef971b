"""Batch services from the command line: cron, status, cancel, the live table, and that keys appear nowhere."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import fake_provider
from tests.conftest import ENVIRONMENT
from tests.fake_provider import Provider

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "batch-services.md"


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}


def batchkit(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "batchkit", *arguments],
        cwd=folder,
        env={**clean_environment(), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def write_tasks(folder: Path, count: int = 20) -> None:
    rows = (json.dumps({"id": n, "question": f"{n}?"}) + "\n" for n in range(count))
    (folder / "tasks.jsonl").write_text("".join(rows))


def test_the_crontab_line_of_the_docs_works_as_it_stands(tmp_path: Path, provider: Provider) -> None:
    line = next(line for line in DOCS.read_text().splitlines() if line.startswith("*/15 "))
    command = line.split(maxsplit=5)[5]
    jobs = tmp_path / "jobs"
    (jobs / ".venv" / "bin").mkdir(parents=True)
    script = jobs / ".venv" / "bin" / "batchkit"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m batchkit "$@"\n')
    script.chmod(0o755)
    write_tasks(jobs)
    (jobs / ".env").write_text(f"OPENAI_API_KEY={provider.key}\nOPENAI_BASE_URL={provider.url}/v1\n")
    provider.polls = 2
    codes = []
    for _ in range(6):  # cron's own environment: no PATH to speak of, no variables, /bin/sh
        environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        codes.append(subprocess.run(["/bin/sh", "-c", command], env=environment, check=False).returncode)
    assert codes == [8, 8, 0, 0, 0, 0]
    log = (jobs / "my-run.log").read_text().splitlines()
    assert log == [
        *["my-run: 20 rows: pending 20; 20 requests under way at the provider"] * 2,
        *["my-run: 20 rows: answered 20"] * 4,
    ]
    assert all(count == 1 for count in provider.paid.values())
    assert len((jobs / "my-run" / "results.jsonl").read_bytes().splitlines()) == 20


def test_cron_exits_with_3_when_all_is_done_and_some_rows_have_no_answer(tmp_path: Path, provider: Provider) -> None:
    write_tasks(tmp_path)
    provider.answer = lambda custom_id, question, tries: (400, "no") if custom_id[0] == "7" else (200, "yes")
    keys = {"OPENAI_API_KEY": provider.key, "OPENAI_BASE_URL": f"{provider.url}/v1"}
    call = ("run", "tasks.jsonl", "run", "--model", "m", "--backend", "openai", "--no-wait")
    codes = [batchkit(tmp_path, *call, **keys).returncode for _ in range(3)]
    assert codes == [8, 3, 3]


def test_status_asks_the_provider_and_cancel_keeps_what_is_finished(tmp_path: Path, provider: Provider) -> None:
    write_tasks(tmp_path)
    provider.polls = 1_000_000
    keys = {"OPENAI_API_KEY": provider.key}
    base = ("--base-url", f"{provider.url}/v1")
    batchkit(tmp_path, "prepare", "tasks.jsonl", "run", "--model", "m", "--backend", "openai", "--max-requests", "10")
    submitted = batchkit(tmp_path, "submit", "run", "--no-wait", *base, **keys)
    assert submitted.returncode == 8
    assert "20 requests under way at the provider" in submitted.stderr
    told = batchkit(tmp_path, "status", "run", **keys)
    assert told.returncode == 8
    assert len(re.findall(r"batch 0000[01]\.1  in_progress  0 of 10 done", told.stdout)) == 2
    asked = provider.calls["check"]
    assert batchkit(tmp_path, "status", "run", "--no-ask", **keys).returncode == 8
    assert "not asked: OPENAI_API_KEY is not set" in batchkit(tmp_path, "status", "run").stdout
    assert provider.calls["check"] == asked
    status = json.loads(batchkit(tmp_path, "status", "run", "--json", **keys).stdout)
    assert [batch["state"] for batch in status["batches"]] == ["in_progress", "in_progress"]
    cancelled = batchkit(tmp_path, "cancel", "run", "--poll-interval", "0.1", **keys)
    assert cancelled.returncode == 0, cancelled.stderr
    assert "cancelled 2 batches, 0 batches had ended; collected 20 responses" in cancelled.stderr
    assert batchkit(tmp_path, "cancel", "nothing", **keys).returncode == 1


def test_a_cancel_tells_a_submit_that_waits_elsewhere(tmp_path: Path, provider: Provider) -> None:
    write_tasks(tmp_path)
    provider.polls = 1_000_000
    provider.endings.extend(["expired:3"] * 4)
    keys = {"OPENAI_API_KEY": provider.key, "OPENAI_BASE_URL": f"{provider.url}/v1"}
    batchkit(tmp_path, "prepare", "tasks.jsonl", "run", "--model", "m", "--backend", "openai", "--max-requests", "10")
    waits = subprocess.Popen(
        [sys.executable, "-m", "batchkit", "submit", "run", "--poll-interval", "0.2", "--max-active", "1"],
        cwd=tmp_path, env={**clean_environment(), **keys}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 30
    while provider.calls["check"] < 2 and time.monotonic() < end:
        time.sleep(0.05)
    cancelled = batchkit(tmp_path, "cancel", "run", **keys)
    assert "which collects them" in cancelled.stderr
    for batch in provider.batches.values():
        batch["polls"] = 0
    _, told = waits.communicate(timeout=30)
    assert "cancelled: nothing new is sent, what is finished is collected" in told
    assert waits.returncode == 8
    assert len(provider.batches) == 1, "neither the other shard nor what expired was sent"


def test_keys_and_secrets_appear_in_no_file_and_no_message(tmp_path: Path, provider: Provider) -> None:
    """Every path on which a key could leak: good runs, refusals that quote it, crashes, debug logs, .env files."""
    write_tasks(tmp_path)
    secret = "sk-proj-SECRETSECRET0123456789abcdef"  # noqa: S105
    gemini = "AIzaSySECRETSECRET0123456789abcdef"
    said: list[str] = []

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        done = batchkit(tmp_path, *arguments, **environment)
        said.extend([done.stdout, done.stderr])
        return done

    for backend, key, name in (("openai", secret, "OPENAI_API_KEY"), ("gemini", gemini, "GEMINI_API_KEY")):
        provider.reset()
        run = f"run-{backend}"
        base = ("--base-url", provider.url + ("/v1" if backend == "openai" else ""), "--poll-interval", "0.05")
        model = "m" if backend == "openai" else "gemini-2.5-flash"
        call("prepare", "tasks.jsonl", run, "--model", model, "--backend", backend, **{name: key})
        assert call("submit", run, *base, **{name: key}).returncode == 4, (
            "the provider knows another key, and quotes it"
        )
        provider.key = key
        provider.faults["upload"].append(fake_provider.status(400, f"your key {key} is on fire"))
        assert call("submit", run, *base, **{name: key}).returncode == 1
        provider.endings.append("failed")
        provider.faults["check"].append(fake_provider.status(404, f"not for {key}"))
        call("submit", run, *base, **{name: key})
        provider.faults["create"].append(fake_provider.status(401, f"key {key} was revoked"))
        assert call("submit", run, *base, **{name: key}).returncode == 4
        (tmp_path / ".env").write_text(f"{name}={key}\n")
        assert call("submit", run, *base).returncode == 0
        call("status", run)
        assert call("submit", run, *base, OPENAI_LOG="info").returncode == 0
        call("merge", run)
        (tmp_path / ".env").unlink()

    secrets = (secret, gemini, secret[8:30], gemini[4:26])
    for text in said:
        assert not any(part in text for part in secrets), text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        data = path.read_bytes()
        assert not any(part.encode() in data for part in secrets), path


def test_a_terminal_shows_a_live_table(tmp_path: Path, provider: Provider) -> None:
    write_tasks(tmp_path)
    provider.polls = 3
    keys = {"OPENAI_API_KEY": provider.key, "OPENAI_BASE_URL": f"{provider.url}/v1", "TERM": "xterm", "COLUMNS": "100"}
    batchkit(tmp_path, "prepare", "tasks.jsonl", "run", "--model", "m", "--backend", "openai", "--max-requests", "10")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "batchkit", "submit", "run", "--poll-interval", "0.1"],
        cwd=tmp_path, env={**clean_environment(), **keys}, stderr=theirs, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while select.select([ours], [], [], 30)[0]:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        shown += piece
        if not piece:
            break
    os.close(ours)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"shard\s+state\s+requests\s+done\s+failed\s+tokens\s+age", text)
    assert re.search(r"00001\.1\s+in_progress\s+10\s+0\s+0\s+0:00:0", text)
    assert "sent 20 requests, got 20 responses" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "run", "--backend", "openai", "--", "--dtype", "half"], "arguments behind -- go to vLLM"),
        (["submit", "run", "--backend", "vllm", "--no-wait"], "--no-wait is for batch services"),
        (["submit", "run", "--backend", "vllm", "--max-cost", "3"], "--max-cost is for batch services"),
        (["submit", "run", "--host", "azure"], "azure has a base URL for each customer"),
        (["submit", "run", "--base-url", "example.com"], "--base-url example.com: not a URL"),
        (["prepare", "tasks.jsonl", "new", "--model", "m", "--thinking-budget", "5"], "--thinking-budget is Gemini's"),
        (["prepare", "tasks.jsonl", "new", "--model", "m", "--host", "groq"], "--host groq goes with --backend openai"),
        (
            ["prepare", "tasks.jsonl", "new", "--model", "m", "--backend", "gemini", "--extra-body", '{"n": 2}'],
            "body.n",
        ),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(tmp_path: Path, arguments: list[str], message: str) -> None:
    write_tasks(tmp_path)
    batchkit(tmp_path, "prepare", "tasks.jsonl", "run", "--model", "m", "--backend", "openai")
    done = batchkit(tmp_path, *arguments, OPENAI_API_KEY="sk-1234567890", AZURE_OPENAI_API_KEY="k")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_that_cannot_be_one_is_told_so(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    batchkit(tmp_path, "prepare", "tasks.jsonl", "run", "--model", "m", "--backend", "openai")
    done: Any = batchkit(tmp_path, "submit", "run", OPENAI_API_KEY="my key is: sk-12")
    assert done.returncode == 4
    assert "OPENAI_API_KEY does not hold a key" in done.stderr
    assert "sk-12" not in done.stderr
