"""Live servers for real: vLLM on the CPU with the example's model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from batchkit import rotation
from batchkit.backends.vllm import Vllm
from batchkit.backends.vllm_serve import Served
from batchkit.merging import merge
from batchkit.preparation import prepare
from batchkit.progress import Silent
from batchkit.runs import Run
from batchkit.submission import submit

pytestmark = pytest.mark.engine
EXAMPLE = Path(__file__).parent.parent / "examples" / "digits"
MODEL = str(EXAMPLE / "model")
ENGINE = ["--max-model-len", "256", "--dtype", "float32", "--enforce-eager", "--limit-mm-per-prompt", '{"image": 2}']


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def prepare_rows(folder: Path, count: int, name: str = "run") -> Run:
    """The example's rows, again and again, under ids of their own."""
    rows = [json.loads(line) for line in (EXAMPLE / "tasks.jsonl").read_bytes().splitlines()]
    tasks = folder / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({**rows[n % len(rows)], "id": f"r{n}"}) + "\n" for n in range(count)))
    prepare(tasks, folder / name, model=MODEL, max_tokens=8, image_root=str(EXAMPLE), max_requests=250, workers=1)
    return Run.open(folder / name)


def results_of(run: Run) -> list[dict[str, Any]]:
    merge(run)
    return [json.loads(line) for line in (run.path / "results.jsonl").read_bytes().splitlines()]


@contextmanager
def servers(folder: Path, count: int) -> Iterator[list[Served]]:
    """Real vLLM servers, as batchkit starts them, that are up."""
    runner = Vllm(model=MODEL, replicas=count, args=ENGINE)
    with ExitStack() as stack:
        started = [Served(runner, folder / f"server-{slot}", slot) for slot in range(count)]
        for server in started:
            server.start()
            stack.callback(server.stop)
        while not all(server.ready for server in started):
            for server in started:
                end = server.look(0.5)
                assert end is None, end
        yield started


def kill(server: Served) -> None:
    """All processes of a server, as a machine that is switched off would end them."""
    port = server.url.rsplit(":", 1)[1].removesuffix("/v1")
    main = next(one for one in psutil.process_iter(["cmdline"]) if port in (one.info["cmdline"] or []))
    for process in [*main.children(recursive=True), main]:
        process.kill()


def test_two_servers_answer_1000_requests_though_one_is_killed_and_as_the_other_engines_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "PROBE_SECONDS", 0.5)
    run = prepare_rows(tmp_path, 1000)
    with servers(tmp_path, 2) as (first, second):

        class Killer(Silent):
            done = 0

            def update(self, done: int = 1, *, note: str | None = None) -> None:  # noqa: ARG002
                self.done += done
                if done and self.done == 500:
                    kill(second)

        killer = Killer()
        report = submit(run, backend="server", endpoints=[first.url, second.url], concurrency=32, progress=killer)
    assert killer.done == 1000
    assert (report.responses, report.exit_code) == (1000, 0)
    results = results_of(run)
    assert len(results) == 1000
    assert {result["batchkit"]["verdict"] for result in results} == {"answered"}
    by_server = {result["id"]: result["raw_response"] for result in results[:400]}
    lines = [line for path in (run.path / "responses").iterdir() for line in path.read_bytes().splitlines()]
    assert len({json.loads(line)["custom_id"] for line in lines}) == len(lines) == 1000, "once each"
    right = sum(result["raw_response"] == result["truth"] for result in results[:400])
    assert right >= 380

    for engine in ("run-batch", "serve"):
        (tmp_path / engine).mkdir()
        other = prepare_rows(tmp_path / engine, 400)
        assert submit(other, engine=engine, engine_args=ENGINE).exit_code == 0
        answers = {result["id"]: result["raw_response"] for result in results_of(other)}
        assert {result["batchkit"]["verdict"] for result in results_of(other)} == {"answered"}
        same = sum(answers[name] == text for name, text in by_server.items())
        assert same >= 396, f"{engine}: batches differ, and so do numbers, but seldom an answer"
        assert not (other.path / "servers").exists() or not list((other.path / "servers").iterdir())


def test_a_server_of_ours_that_dies_is_started_again(tmp_path: Path) -> None:
    run = prepare_rows(tmp_path, 600)

    class Killer(Silent):
        killed = 0
        done = 0

        def update(self, done: int = 1, *, note: str | None = None) -> None:  # noqa: ARG002
            self.done += done
            if self.done >= 200 and not self.killed:
                engines = [one for one in psutil.Process().children(recursive=True) if "EngineCore" in one.name()]
                engines += [one for one in psutil.process_iter() if is_our_engine(one, run)]
                for engine in engines:
                    engine.kill()
                self.killed = len(engines)

    killer = Killer()
    report = submit(run, engine="serve", engine_args=ENGINE, concurrency=32, progress=killer)
    assert killer.killed >= 1
    assert report.exit_code == 0
    results = results_of(run)
    assert [result["id"] for result in results] == [f"r{n}" for n in range(600)]
    assert {result["batchkit"]["verdict"] for result in results} == {"answered"}
    assert {result["batchkit"]["backend"] for result in results} == {"vllm"}


def is_our_engine(process: psutil.Process, run: Run) -> bool:
    """Whether it is the engine process of a server that was started for `run`: its scratch folder is in its
    environment, and its parent has our model on its command line."""
    try:
        return "EngineCore" in process.name() and MODEL in " ".join(process.parent().cmdline())
    except (psutil.Error, AttributeError):
        return False
