"""run: the first shard is sent while the others are prepared, and nothing else changes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from batchkit import batch_submission, client, engines, feeds, pipeline, s3, shardfiles
from batchkit.conversion import Converted, Converter
from batchkit.errors import EngineError, InputError, RunError, UsageError
from batchkit.handover import Pace
from batchkit.merging import merge
from batchkit.preparation import prepare
from batchkit.responses import Verdict
from batchkit.runs import Run
from batchkit.submission import submit
from batchkit.tasks import Row
from tests import fake_server, s3_servers
from tests.fake_provider import Provider
from tests.fake_server import Server
from tests.test_submission import Fake, install_fake, wait_for

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.02)
    monkeypatch.setattr(batch_submission, "PACE", Pace(poll=0.01, adopt=0.3, settle=0.3, tokens=0.01))
    monkeypatch.setattr(engines, "POLL_SECONDS", 0.02)


@pytest.fixture(autouse=True)
def nothing_lives_on() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if "prepare" in thread.name] == []


def write(folder: Path, count: int, *, bad: tuple[int, ...] = (), **others: dict[str, Any]) -> Path:
    path = folder / "tasks.jsonl"
    extra = {int(name[1:]): fields for name, fields in others.items()}
    rows = ("{" if n in bad else json.dumps({"id": n, "question": f"q{n}", **extra.get(n, {})}) for n in range(count))
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], list[int]]:
    """Has `prepare` stop at a row until something is seen elsewhere: an overlap that is certain, or never."""

    def close(at: int, seen: Callable[[], Any]) -> list[int]:
        opened: list[int] = []

        class Gated(Converter):
            def __call__(self, row: Row) -> Converted:
                if row.position == at:
                    wait_for(seen)
                    opened.append(at)
                return super().__call__(row)

        monkeypatch.setattr("batchkit.preparation.Converter", Gated)
        return opened

    return close


def run_all(tasks: Path, folder: Path, **options: Any) -> Any:
    return pipeline.run(tasks, folder, **{"model": "m", "workers": 1, "max_requests": 10, **options})


def requests_left(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "requests").glob("*.jsonl"))


def answers(folder: Path) -> list[tuple[Any, ...]]:
    lines = (folder / "results.jsonl").read_bytes().splitlines()
    return [(row.get("id"), row["raw_response"], row["batchkit"]["verdict"]) for row in map(json.loads, lines)]


# -- that they overlap -----------------------------------------------------------------------------------------------


def test_a_server_is_asked_before_prepare_has_finished(
    tmp_path: Path, server: Server, gate: Callable[..., list[int]]
) -> None:
    tasks = write(tmp_path, 100, bad=(3, 57))
    opened = gate(70, lambda: server.asked)
    summary = run_all(tasks, tmp_path / "run", backend="server", endpoints=[server.url])
    assert opened == [70]
    assert summary.verdicts["answered"] == 98
    three = {"model": "m", "max_requests": 10, "workers": 1, "backend": "server"}
    prepare(tasks, tmp_path / "three", **three)  # type: ignore[arg-type]
    submit(tmp_path / "three", endpoints=[server.url])
    merge(tmp_path / "three")
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == (tmp_path / "three" / "results.jsonl").read_bytes()
    for path in (tmp_path / "three" / "requests").iterdir():
        assert path.read_bytes() == (tmp_path / "run" / "requests" / path.name).read_bytes()


def test_an_engine_starts_before_prepare_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Callable[..., list[int]]
) -> None:
    install_fake(monkeypatch)
    fake = Fake(tmp_path, monkeypatch)
    opened = gate(70, fake.journal.exists)
    summary = run_all(write(tmp_path, 100), tmp_path / "run")
    assert opened == [70]
    assert summary.verdicts["answered"] == 100
    assert set(fake.asked.values()) == {1}
    assert len(fake.starts) >= 2


def test_a_batch_is_created_before_prepare_has_finished(
    tmp_path: Path, provider: Provider, gate: Callable[..., list[int]]
) -> None:
    opened = gate(70, lambda: provider.paid)
    summary = run_all(write(tmp_path, 100), tmp_path / "run", backend="openai", base_url=f"{provider.url}/v1")
    assert opened == [70]
    assert summary.verdicts["answered"] == 100
    assert set(provider.paid.values()) == {1}


def test_a_part_of_a_run_is_sent_of_the_shards_that_belong_to_it(tmp_path: Path, server: Server) -> None:
    tasks = write(tmp_path, 60)
    summary = run_all(tasks, tmp_path / "run", backend="server", endpoints=[server.url], shards="2/3")
    assert summary.verdicts["answered"] == 20
    assert sorted(server.asked) == sorted(f"q{n}" for n in (*range(10, 20), *range(40, 50)))


def test_a_pilot_prepares_all_and_sends_what_it_may(tmp_path: Path, server: Server) -> None:
    summary = run_all(write(tmp_path, 60), tmp_path / "run", backend="server", endpoints=[server.url], pilot=15)
    assert (summary.verdicts["answered"], summary.verdicts["pending"]) == (15, 45)


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_row_that_stops_prepare_stops_submit_and_what_came_is_kept(tmp_path: Path, server: Server) -> None:
    tasks = write(tmp_path, 100, bad=(88,))
    with pytest.raises(InputError, match=r"tasks\.jsonl:89"):
        run_all(tasks, tmp_path / "run", backend="server", endpoints=[server.url], strict=True)
    asked = sum(server.asked.values())
    summary = run_all(tasks, tmp_path / "run", backend="server", endpoints=[server.url])
    assert (summary.verdicts["answered"], summary.verdicts["rejected"]) == (99, 1)
    assert sum(server.asked.values()) <= 99 + 10
    assert asked <= 80


def test_names_that_results_use_are_refused_before_their_shard_is_sent(tmp_path: Path, server: Server) -> None:
    with pytest.raises(UsageError, match="'model'"):
        run_all(write(tmp_path, 30, r5={"model": "x"}), tmp_path / "run", backend="server", endpoints=[server.url])
    assert not server.asked


def test_a_server_that_refuses_stops_prepare(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Converter):
        def __call__(self, row: Row) -> Converted:
            time.sleep(0.01)
            return super().__call__(row)

    monkeypatch.setattr("batchkit.preparation.Converter", Slow)
    server.models = ["other"]
    began = time.monotonic()
    with pytest.raises(EngineError):
        run_all(write(tmp_path, 6000), tmp_path / "run", backend="server", endpoints=[server.url])
    assert time.monotonic() - began < 30, "all rows take a minute"
    assert Run.open(tmp_path / "run").prepared() is None
    assert list(Run.open(tmp_path / "run").seals())


COMMAND = ["run", "tasks.jsonl", "run", "--model", "m", "--backend", "server", "--max-requests", "10"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delete", [(), ("--delete-sent",)])
def test_killed_in_the_middle_the_same_command_goes_on(
    tmp_path: Path, server: Server, number: signal.Signals, delete: tuple[str, ...]
) -> None:
    server.delay = 0.02
    write(tmp_path, 400)
    command = [sys.executable, "-m", "batchkit", *COMMAND, "--endpoints", server.url, *delete]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    wait_for(lambda: sum(server.answered.values()) > 60)
    process.send_signal(number)
    said = process.communicate(timeout=20)[1].decode()
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number], said
    server.delay = 0.0
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert answers(tmp_path / "run") == [(n, f"answer to q{n}", "answered") for n in range(400)]
    assert sum(server.answered.values()) <= 400 + 6, "only what was under way is asked again"
    assert bool(requests_left(tmp_path / "run")) != bool(delete)


# -- delete-sent -----------------------------------------------------------------------------------------------------


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many files of requests there are, each time that there is one more."""
    counts: list[int] = []
    real = shardfiles.ShardWriter.seal

    def seal(self: shardfiles.ShardWriter) -> Any:
        sealed = real(self)
        counts.append(len(requests_left(self._run.path)))
        return sealed

    monkeypatch.setattr(shardfiles.ShardWriter, "seal", seal)
    return counts


def test_delete_sent_keeps_few_files_and_loses_nothing(tmp_path: Path, server: Server, most: list[int]) -> None:
    server.delay = 0.005
    tasks = write(tmp_path, 300, bad=(7,))
    summary = run_all(tasks, tmp_path / "run", backend="server", endpoints=[server.url], delete_sent=True)
    assert summary.verdicts["answered"] == 299
    assert len(most) == 30
    assert max(most) <= feeds.AHEAD
    assert requests_left(tmp_path / "run") == []
    assert merge(tmp_path / "run").verdicts == summary.verdicts
    assert submit(tmp_path / "run", endpoints=[server.url]).sent == 0


def test_delete_sent_with_an_engine_and_with_batches(
    tmp_path: Path, provider: Provider, monkeypatch: pytest.MonkeyPatch, most: list[int]
) -> None:
    install_fake(monkeypatch)
    Fake(tmp_path, monkeypatch)
    tasks = write(tmp_path, 200)
    assert run_all(tasks, tmp_path / "engine", delete_sent=True).verdicts["answered"] == 200
    options = {"backend": "openai", "base_url": f"{provider.url}/v1", "delete_sent": True}
    assert run_all(tasks, tmp_path / "batches", **options).verdicts["answered"] == 200
    assert len(most) == 40
    assert max(most) <= feeds.AHEAD
    assert requests_left(tmp_path / "engine") == requests_left(tmp_path / "batches") == []


def test_what_is_not_done_is_not_deleted_and_holds_nothing_up(tmp_path: Path, server: Server) -> None:
    def fail_some(handler: fake_server.Handler) -> bool:
        if sum(server.asked.values()) % 5:
            return False
        return fake_server.status(500)(handler)

    server.always = fail_some
    tasks = write(tmp_path, 200)
    options = {"backend": "server", "endpoints": [server.url], "delete_sent": True, "concurrency": 1}
    summary = run_all(tasks, tmp_path / "run", **options)
    server.always = None
    assert summary.rows == 200
    assert run_all(tasks, tmp_path / "run", **options).verdicts["answered"] == 200
    assert requests_left(tmp_path / "run") == []


def test_deleted_requests_that_are_wanted_again_are_made_again(tmp_path: Path, server: Server) -> None:
    tasks = write(tmp_path, 60)
    run_all(tasks, tmp_path / "run", backend="server", endpoints=[server.url], delete_sent=True)
    make = {"model": "m", "max_requests": 10, "workers": 1, "backend": "server"}
    assert prepare(tasks, tmp_path / "run", **make).already  # type: ignore[arg-type]
    assert requests_left(tmp_path / "run") == [], "prepare alone does not make them again"
    retry = {"retry": frozenset({Verdict.ANSWERED}), "positions": frozenset({25}), "endpoints": [server.url]}
    with pytest.raises(RunError, match=r"1 shard \(00002\) were deleted") as caught:
        submit(tmp_path / "run", **retry)  # type: ignore[arg-type]
    assert "prepare again" in str(caught.value.hint)
    prepare(tasks, tmp_path / "run", **make)  # type: ignore[arg-type]
    assert requests_left(tmp_path / "run") == ["00002.jsonl"], "only what is wanted"
    assert submit(tmp_path / "run", **retry).sent == 1  # type: ignore[arg-type]
    assert merge(tmp_path / "run").verdicts[Verdict.ANSWERED] == 60


def test_requests_that_are_lost_are_told_and_made_again(tmp_path: Path, server: Server) -> None:
    tasks = write(tmp_path, 20)
    make = {"model": "m", "max_requests": 10, "workers": 1, "backend": "server"}
    prepare(tasks, tmp_path / "run", **make)  # type: ignore[arg-type]
    (tmp_path / "run" / "requests" / "00001.jsonl").unlink()
    with pytest.raises(RunError, match=r"00001\.jsonl: is missing"):
        submit(tmp_path / "run", endpoints=[server.url])
    prepare(tasks, tmp_path / "run", **make)  # type: ignore[arg-type]
    assert submit(tmp_path / "run", endpoints=[server.url]).exit_code == 0


def test_a_pilot_with_delete_sent_prepares_no_more_than_it_needs(tmp_path: Path, server: Server) -> None:
    tasks = write(tmp_path, 300)
    options = {"backend": "server", "endpoints": [server.url], "delete_sent": True}
    run_all(tasks, tmp_path / "run", pilot=15, **options)
    assert len(requests_left(tmp_path / "run")) <= feeds.AHEAD + 1, "one was sent in part"
    assert run_all(tasks, tmp_path / "run", **options).verdicts["answered"] == 300
    assert requests_left(tmp_path / "run") == []


def test_delete_sent_goes_without_parts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--shards"):
        run_all(write(tmp_path, 3), tmp_path / "run", delete_sent=True, shards="1/2")


# -- the documentation -----------------------------------------------------------------------------------------------

DOCS = (ROOT / "docs" / "clusters.md").read_text("utf-8")


def test_the_slurm_script_of_the_docs_sends_each_job_a_part(tmp_path: Path, server: Server) -> None:
    tasks = write(tmp_path, 80)
    prepare(tasks, tmp_path / "my-run", model="m", backend="server", max_requests=5, workers=1)
    script = re.search(r"```bash\n(.*?)```", DOCS, re.DOTALL)
    assert script is not None
    (tmp_path / "array.sbatch").write_text(script[1].replace(" -- --max-model-len 8192", f" --endpoints {server.url}"))
    shim = tmp_path / "batchkit"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m batchkit "$@"\n')
    shim.chmod(0o755)
    count = re.search(r"--array=1-(\d+)", script[1])
    assert count is not None
    for number in range(1, int(count[1]) + 1):
        slurm = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": count[1]}
        environment = {**os.environ, **slurm, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run(["bash", "array.sbatch"], cwd=tmp_path, env=environment, check=True, capture_output=True)
        assert sum(server.asked.values()) == 10 * number
    assert set(server.asked.values()) == {1}


def test_the_workflow_of_the_docs_keeps_the_run_from_step_to_step(
    tmp_path: Path, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 20)
    workflow = re.search(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    assert workflow is not None
    steps = yaml.safe_load(workflow[1])["jobs"]["step"]["steps"]
    script = next(step["run"] for step in steps if "batchkit run" in step.get("run", ""))
    shim = tmp_path / "batchkit"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m batchkit "$@"\n')
    shim.chmod(0o755)
    provider.polls = 1
    keys = {"OPENAI_API_KEY": provider.key, "OPENAI_BASE_URL": f"{provider.url}/v1"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    with s3_servers.moto(tmp_path / "moto") as url:
        for name, value in s3_servers.environment(url, tmp_path / "here").items():
            monkeypatch.setenv(name, value)
        s3.client().create_bucket(Bucket="my-bucket")
        for number in range(3):  # as GitHub runs it: bash -e, each time on another machine
            machine = {"BATCHKIT_WORK_DIR": str(tmp_path / f"machine-{number}")}
            environment = {**os.environ, **keys, **machine, "PYTHONPATH": str(ROOT), "PATH": path}
            subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True)
        assert set(provider.paid.values()) == {1}
        results = s3.client().get_object(Bucket="my-bucket", Key="runs/my-run/results.jsonl")["Body"].read()
    rows = [json.loads(line) for line in results.splitlines()]
    assert len(rows) == 20
    assert {row["batchkit"]["verdict"] for row in rows} == {"answered"}
