from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from batchkit.cli import main
from batchkit.jobs import Attempt, Job
from batchkit.manifests import now
from batchkit.runs import Run
from tests.conftest import WriteTasks

README = Path(__file__).parent.parent / "README.md"


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answer_all(run: Path, answers: dict[int, str]) -> None:
    """Put responses into a run as if a backend had answered: `answers` by position, the rest errors."""
    opened = Run.open(run)
    for seal in opened.seals():
        ids = opened.read_ids(seal)
        lines = []
        for position in range(seal.start, seal.end):
            custom_id = ids[position - seal.start]
            text = answers.get(position)
            body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "model": "m"}
            response = {"status_code": 200, "body": body} if text is not None else {"status_code": 400, "body": None}
            error = None if text is not None else {"error": {"message": "too long"}}
            lines.append(json.dumps({"custom_id": custom_id, "response": response, "error": error}) + "\n")
        opened.responses_path(seal.shard, 1).write_text("".join(lines))
        attempt = Attempt(
            number=1, backend="vllm", state="collected", rows=[(seal.start, seal.end)], started=now(), ended=now()
        )
        opened.write_job(Job(shard=seal.shard, attempts=[attempt]))


@pytest.mark.parametrize("name", list(main.commands))
def test_every_command_has_help_with_an_example_and_stands_in_the_readme(name: str) -> None:
    command = main.commands[name]
    assert command.help
    assert f"batchkit {name}" in command.help
    assert f"batchkit {name}" in README.read_text("utf-8")
    for parameter in command.params:
        assert isinstance(parameter, click.Argument) or parameter.help, parameter.name


def test_a_mistake_is_one_error_a_blank_line_and_a_hint(tmp_path: Path) -> None:
    done = call("prepare", tmp_path / "none.jsonl", tmp_path / "run", "--model", "m")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr == f"Error: {tmp_path}/none.jsonl: no such file\n\nhint: check the path\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge"], "name a RUN, or --tasks and --responses"),
        (["merge", "RUN", "--tasks", "x"], "RUN goes without --tasks"),
        (["merge", "RUN", "--id-fields", "x"], "RUN goes without --tasks"),
        (["merge", "MADE", "--prefix", '"'], "--prefix '\"'"),
        (["run", "TASKS", "RUN", "--model", "m", "--parse", "nonsense"], "--parse 'nonsense' is not known"),
        (["run", "TASKS", "RUN", "--model", "m", "-o", "results.xlsx"], "the name says no format"),
        (["prepare", "TASKS", "RUN", "--model", "m", "--extra-body", '{"a": NaN}'], "--extra-body is not valid JSON"),
        (["prepare", "TASKS", "RUN", "--model", "m", "--extra-body", r'{"a": "\ud800"}'], "--extra-body is not valid"),
        (
            ["prepare", "TASKS", "RUN", "--model", "m", "--temperature", "inf"],
            "--temperature: Input should be a finite",
        ),
        (["submit", "RUN", "--retry", "nonsense"], "--retry: 'nonsense' is not a valid Verdict"),
        (["submit", "MADE", "--retry", "invalid"], "--retry invalid: which answers do not parse"),
        (["submit", "MADE", "--retry", "failed,rejected"], "--retry rejected: these rows never became requests"),
        (["prepare", "TASKS", "RUN", "--model", "m", "--extra-body", "{"], "--extra-body is not valid JSON"),
        (["prepare", "TASKS", "RUN", "--model", "m", "--start", "5", "--end", "1"], "end 1 lies before start 5"),
        (["prepare", "TASKS", "RUN"], "no model is named"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str, write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "a"}])
    named = {"TASKS": str(tasks), "RUN": str(tmp_path / "run"), "MADE": str(tmp_path / "made")}
    call("prepare", tasks, tmp_path / "made", "--model", "m")
    done = call(*[named.get(argument, argument) for argument in arguments])
    assert message in done.stderr
    assert done.exit_code == 2


@pytest.mark.parametrize("verb", ["submit", "merge", "status"])
def test_a_directory_that_is_no_run_names_the_command_that_makes_one(verb: str, tmp_path: Path) -> None:
    done = call(verb, tmp_path)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: {tmp_path}: not a run directory")
    assert f"hint: batchkit prepare TASKS {tmp_path} --model MODEL" in done.stderr


def test_prepare_tells_what_it_made_and_what_it_rejected(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "a"}, {"image": "none.png", "question": "b"}])
    done = call("prepare", tasks, tmp_path / "run", "--model", "m")
    assert done.exit_code == 0
    assert done.stdout == ""
    assert re.fullmatch(
        r"prepared 1 request of 2 rows, in 1 shard, \d+ bytes \(largest shard \d+ bytes\)\n"
        r"rejected 1 row \(image 1\):\n  tasks\.jsonl:2: image not found: none\.png\n\nnext: batchkit submit \S+\n",
        done.stderr,
    )
    assert call("prepare", tasks, tmp_path / "run", "--model", "m").stderr.startswith(
        "already prepared: 1 request of 2 rows"
    )


def test_plan_prints_to_stdout_and_writes_nothing(write_tasks: WriteTasks, tmp_path: Path) -> None:
    done = call("prepare", write_tasks([{"question": "a"}]), tmp_path / "run", "--model", "m", "--plan")
    assert done.stdout.startswith("would make 1 request of 1 row, in 1 shard")
    assert not (tmp_path / "run").exists()


def test_names_in_use_are_warned_of_and_merge_asks_for_a_prefix(write_tasks: WriteTasks, tmp_path: Path) -> None:
    done = call("prepare", write_tasks([{"question": "a", "error": "e"}]), tmp_path / "run", "--model", "m")
    assert "warning: rows use names that results use: error; merge will need --prefix" in done.stderr
    answer_all(tmp_path / "run", {0: "yes"})
    refused = call("merge", tmp_path / "run")
    assert refused.exit_code == 2
    assert "--prefix" in refused.stderr
    assert not (tmp_path / "run" / "results.jsonl").exists()
    assert call("merge", tmp_path / "run", "--prefix", "b_").exit_code == 0
    result = json.loads((tmp_path / "run" / "results.jsonl").read_text())
    assert (result["error"], result["b_error"], result["b_raw_response"]) == ("e", None, "yes")


def test_run_asks_for_a_prefix_before_anything_is_sent(write_tasks: WriteTasks, tmp_path: Path) -> None:
    tasks = write_tasks([{"question": "a", "error": "e"}])
    refused = call("run", tasks, tmp_path / "run", "--model", "m")
    assert refused.exit_code == 2
    assert "hint: --prefix" in refused.stderr
    assert not Run.open(tmp_path / "run").was_sent()


@pytest.mark.parametrize(
    ("answers", "sent", "code"),
    [({0: "x", 1: "y"}, True, 0), ({0: "x"}, True, 3), ({}, False, 8)],
    ids=["all-answered", "one-failed", "not-sent"],
)
def test_exit_codes_of_merge_and_status(
    answers: dict[int, str], sent: bool, code: int, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    call("prepare", write_tasks([{"question": "a"}, {"question": "b"}]), tmp_path / "run", "--model", "m")
    if sent:
        answer_all(tmp_path / "run", answers)
    merged = call("merge", tmp_path / "run", "--json")
    assert merged.exit_code == code, merged.stderr
    summary: dict[str, Any] = json.loads(merged.stdout)
    assert sum(summary["verdicts"].values()) == summary["rows"] == 2
    status = call("status", tmp_path / "run", "--json")
    assert status.exit_code == code
    assert json.loads(status.stdout)["verdicts"] == summary["verdicts"]
    assert call("status", tmp_path / "run").stdout.startswith(f"{tmp_path / 'run'}: m on vllm\n2 rows, 2 requests")


def test_no_resume_asks_before_it_throws_answers_away(write_tasks: WriteTasks, tmp_path: Path) -> None:
    call("prepare", write_tasks([{"question": "a"}]), tmp_path / "run", "--model", "m")
    answer_all(tmp_path / "run", {0: "x"})
    done = CliRunner().invoke(main, ["submit", str(tmp_path / "run"), "--no-resume"], input="n\n")
    assert "throw away 1 response" in done.stderr
    assert done.exit_code == 1
    assert Run.open(tmp_path / "run").responses_path(0, 1).exists()


def test_a_closed_pipe_is_no_traceback(write_tasks: WriteTasks, tmp_path: Path) -> None:
    call("prepare", write_tasks([{"question": "a"}]), tmp_path / "run", "--model", "m")
    command = f"{sys.executable} -m batchkit status {tmp_path / 'run'} --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
