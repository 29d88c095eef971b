"""Everything in a bucket, the GPUs where nobody has credentials: prepare, presign, vLLM's own batch runner, merge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from batchkit import s3
from tests import s3_servers

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "digits"
ROWS = 1000
ENGINE_ARGS = ["--enforce-eager", "--max-model-len", "256", "--dtype", "float32", "--max-num-batched-tokens", "2048",
               "--limit-mm-per-prompt", '{"image":2}']  # fmt: skip

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def put_dataset() -> list[dict[str, Any]]:
    """A task file and its images: the example's tasks as often as needed, each row with images of its own."""
    known = [json.loads(line) for line in (EXAMPLE / "tasks.jsonl").read_text().splitlines()]
    rows: list[dict[str, Any]] = []
    images: dict[str, Path] = {}
    for number in range(ROWS):
        row = known[number % len(known)]
        names = row["image"] if isinstance(row["image"], list) else [row["image"]]
        mine = [f"photos/{number}-{place}.png" for place in range(len(names))]
        images |= {one: EXAMPLE / name for one, name in zip(mine, names, strict=True)}
        rows.append({**row, "id": f"r{number}", "image": mine if len(mine) > 1 else mine[0]})
    with ThreadPoolExecutor(8) as pool:
        put = pool.map(lambda name: s3.put_file(f"s3://bucket/set/{name}", images[name]), images)
        assert len(list(put)) >= ROWS
    s3.put("s3://bucket/set/tasks.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return rows


def batchkit(*arguments: str | Path) -> str:
    """A command, as a user types it where the credentials are; what it says."""
    command = [sys.executable, "-m", "batchkit", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def bare_environment(folder: Path) -> dict[str, str]:
    """What a machine with vLLM and nothing else has: no variable of AWS, an empty home, and no batchkit."""
    (folder / "home").mkdir(parents=True)
    shadow = folder / "python" / "batchkit"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise ImportError('there is no batchkit on this machine')\n")
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder / "home"),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(folder / "python"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def test_a_thousand_images_in_a_bucket_are_answered_where_there_are_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_servers.moto(tmp_path / "moto") as url:
        for name, value in s3_servers.environment(url, tmp_path / "work").items():
            monkeypatch.setenv(name, value)
        s3.client().create_bucket(Bucket="bucket")
        rows = put_dataset()
        run, script = "s3://bucket/run", tmp_path / "run.sh"
        said = batchkit(
            "prepare", "s3://bucket/set/tasks.jsonl", run, "--model", EXAMPLE / "model", "--max-tokens", "8"
        )
        assert "prepared 1,000 requests of 1,000 rows" in said
        assert "gave out 1,000 requests" in batchkit("presign", run, "-o", script, "--", *ENGINE_ARGS)

        folder = tmp_path / "elsewhere"
        done = subprocess.run(
            ["sh", str(script)],
            env=bare_environment(folder),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:]

        assert "answered 1,000" in batchkit("merge", run)
        results = [json.loads(line) for line in s3.get(f"{run}/results.jsonl")[0].splitlines()]
    assert [row["id"] for row in results] == [row["id"] for row in rows]
    assert {row["batchkit"]["verdict"] for row in results} == {"answered"}
    assert sum(row["raw_response"] == row["truth"] for row in results) >= 0.97 * ROWS
