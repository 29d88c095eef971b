"""Messages about one thing and about several."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from batchkit.cli import main
from batchkit.wording import counted
from tests.conftest import WriteTasks
from tests.fake_server import Server

MANY = re.compile(r"(?<![\d,.])1 (?:rows|requests|shards|responses|batches|attempts|images)\b")


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(0, "row", "0 rows"), (1, "row", "1 row"), (2000, "row", "2,000 rows"), (1, "batch", "1 batch"),
     (2, "batch", "2 batches")],
)  # fmt: skip
def test_a_number_stands_with_its_noun(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


def test_a_run_of_one_row_is_told_of_in_the_singular(write_tasks: WriteTasks, tmp_path: Path, server: Server) -> None:
    tasks, run = str(write_tasks([{"id": 1, "question": "?", "answer": "x"}])), str(tmp_path / "run")
    said = ""
    for arguments in (
        ["prepare", tasks, run, "--model", "m", "--backend", "server"],
        ["status", run],
        ["submit", run, "--endpoints", server.url],
        ["merge", run],
        ["status", run],
        ["evaluate", run],
    ):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code in (0, 8), done.output
        said += done.output
    assert "1 row, 1 request; 1 of 1 shard done" in said
    assert not MANY.findall(said), said
