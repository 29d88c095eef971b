"""submit and prepare on a Ray cluster: two nodes on this machine, engines that are fake, and once real ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from batchkit import clusters, engines, pipeline, rounds
from batchkit.backends import vllm_ray, vllm_remote
from batchkit.clusters import Node
from batchkit.errors import BatchkitError, EngineError, UsageError
from batchkit.keeper import members
from batchkit.preparation import prepare
from batchkit.progress import Silent
from batchkit.responses import Verdict
from batchkit.submission import submit
from tests import test_engine
from tests.conftest import WriteTasks
from tests.fake_replica import FakeReplica, GpuReplica, OldReplica
from tests.test_submission import (
    Fake,
    MakeRun,
    assert_each_answered_by_its_own,
    assert_nothing_left,
    ids_of,
    make_run,
    verdicts,
    wait_for,
)

__all__ = ["make_run"]
ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def far_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the machines of the cluster put what they put on the disk."""
    return tmp_path_factory.mktemp("far")


@pytest.fixture(scope="module")
def cluster(far_folder: Path) -> Iterator[Any]:
    """A cluster of two nodes of one CPU each, which this process is not connected to."""
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(ROOT))  # what is installed on the machines of a cluster
    patch.setenv("TMPDIR", str(far_folder))
    patch.setenv("RAY_TMPDIR", "/tmp")  # noqa: S108  # its sockets need a short path
    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
    finally:
        patch.undo()
    yield cluster
    cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def address(cluster: Any) -> str:
    return str(cluster.address)


class FarFake(Fake):
    """As `Fake`, for engines on the cluster."""

    def set(self, *, minor: int = 32, **faults: Any) -> None:
        self._patch.setenv("VLLM_FAKE_ENGINE", json.dumps({"journal": str(self.journal), **faults}))
        self._patch.setenv("VLLM_FAKE_MINOR", str(minor))

    @property
    def starts(self) -> list[list[str]]:
        text = self.journal.read_text() if self.journal.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FarFake:
    monkeypatch.setattr(vllm_ray, "Replica", FakeReplica)
    monkeypatch.setattr(engines, "EXCUSE_SECONDS", 0.0)
    return FarFake(tmp_path, monkeypatch)


def engine_processes(far_folder: Path) -> list[int]:
    """The engines of this cluster that run: their input is in its folder."""
    lines = {process.pid: " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])}
    return [pid for pid, line in lines.items() if f"-i {far_folder}/bkit-ray-" in line]


def folders(far_folder: Path) -> set[Path]:
    """What actors have put on the disk."""
    return set(far_folder.glob("bkit-ray-*"))


def kill(slot: Any, how: str) -> None:
    """End an actor, as Ray does, or as the system does when memory runs out."""
    import ray

    if how == "SIGKILL":
        os.kill(slot.hello["pid"], signal.SIGKILL)
    else:
        ray.kill(slot.actor)


class InThread(threading.Thread):
    """A submit, beside which the test does something."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._function()
        except BaseException as exc:  # noqa: BLE001  # told by `finish`
            self.error = exc

    def finish(self, seconds: float = 120) -> Any:
        self.join(seconds)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[vllm_ray.RayVllm]:
    """The runners that a submit makes."""
    made: list[vllm_ray.RayVllm] = []
    real = vllm_ray.RayVllm.__init__

    def init(self: vllm_ray.RayVllm, *args: Any, **keywords: Any) -> None:
        real(self, *args, **keywords)
        made.append(self)

    monkeypatch.setattr(vllm_ray.RayVllm, "__init__", init)
    return made


def test_two_replicas_share_the_work(address: str, fake: FarFake, make_run: MakeRun) -> None:
    fake.set(seconds=1.0)
    run = make_run(200, bad=(3,))
    report = submit(run, ray=address, replicas=2)
    assert (report.starts, report.responses, report.exit_code) == (2, 199, 3)
    assert sum(map(len, fake.starts)) == 199
    assert min(map(len, fake.starts)) > 50
    assert verdicts(run) == {"answered": 199, "rejected": 1}
    assert_each_answered_by_its_own(run)
    assert_nothing_left(run)
    assert submit(run, ray=address).sent == 0


def test_a_model_that_embeds_is_started_as_such_on_the_machines_of_the_cluster(
    address: str, fake: FarFake, tmp_path: Path, seen: list[vllm_ray.RayVllm]
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"id": n, "question": f"{n}?"}) + "\n" for n in range(20)))
    prepare(tasks, tmp_path / "run", model="m", url="/v1/embeddings", workers=1)
    report = submit(tmp_path / "run", ray=address)
    assert report.responses == 20
    (runner,) = seen
    assert any("vLLM gets --runner pooling: the requests ask for no text" in note for note in runner.notes)


def test_inputs_and_outputs_travel_in_pieces(
    address: str, fake: FarFake, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_remote, "PIECE_BYTES", 1000)
    run = make_run(120)
    assert submit(run, ray=address).exit_code == 0
    assert_each_answered_by_its_own(run)


@pytest.mark.parametrize(("how", "minor"), [("ray.kill", 32), ("ray.kill", 33), ("SIGKILL", 32), ("SIGKILL", 33)])
def test_what_a_dead_actor_had_goes_to_another(
    address: str,
    far_folder: Path,
    fake: FarFake,
    make_run: MakeRun,
    seen: list[vllm_ray.RayVllm],
    *,
    how: str,
    minor: int,
) -> None:
    fake.set(minor=minor, seconds=4, death="stream" if minor == 33 else "lines")
    run = make_run(200)
    thread = InThread(lambda: submit(run, ray=address, replicas=2))
    wait_for(lambda: len(fake.starts) == 2, 60)
    if minor == 33:
        wait_for(lambda: verdicts(run)["answered"] > 0)
    kill(seen[0]._slots[0], how)
    report = thread.finish()
    assert report.deaths == 1
    assert report.exit_code == 0
    assert verdicts(run) == {"answered": 200}
    assert_each_answered_by_its_own(run)
    assert_nothing_left(run)
    again = [custom_id for custom_id, count in fake.asked.items() if count > 1]
    assert 0 < len(again) <= 100, "only what the dead actor had is asked again"
    if minor == 33:
        assert len(again) < 100, "what it had answered is kept"
    wait_for(lambda: not engine_processes(far_folder))
    wait_for(lambda: not folders(far_folder), 10)  # its keeper removes what was its input


def test_a_poisonous_request_is_found_there_as_here(address: str, fake: FarFake, make_run: MakeRun) -> None:
    run = make_run(60)
    fake.set(poison=[ids_of(run)[17]], death="crash")
    assert submit(run, ray=address, replicas=2).exit_code == 3
    assert verdicts(run) == {"answered": 59, "failed": 1}


def test_an_engine_that_does_not_start_there_is_one_clear_error(address: str, fake: FarFake, make_run: MakeRun) -> None:
    fake.set(startup="run_batch.py: error: unrecognized arguments: --nonsense")
    with pytest.raises(EngineError, match="--nonsense"):
        submit(make_run(10), ray=address)


SUBMIT = """
import sys
from batchkit.backends import vllm_ray
from batchkit.submission import submit
from tests.fake_replica import FakeReplica
vllm_ray.Replica = FakeReplica
submit(sys.argv[1], ray=sys.argv[2], replicas=2)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_batchkit_killed_leaves_nothing_running_and_goes_on(
    address: str, far_folder: Path, fake: FarFake, make_run: MakeRun, number: signal.Signals
) -> None:
    fake.set(minor=33, seconds=15, death="stream")
    run = make_run(200)
    process = subprocess.Popen([sys.executable, "-c", SUBMIT, str(run.path), address], cwd=ROOT, stderr=subprocess.PIPE)
    wait_for(lambda: verdicts(run)["answered"] > 20 if len(fake.starts) == 2 else False, 60)
    process.send_signal(number)
    assert process.wait(30) in (-9, 1, 130, -2, 143)
    wait_for(lambda: not engine_processes(far_folder), 30)
    fake.set()
    report = submit(run, ray=address, replicas=2)
    assert report.sent < 200, "what had come is kept"
    assert verdicts(run) == {"answered": 200}
    assert_each_answered_by_its_own(run)
    assert_nothing_left(run)


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_more_replicas_than_there_is_room_for_are_fewer(address: str, fake: FarFake, make_run: MakeRun) -> None:
    said: list[str] = []

    class Told(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    assert submit(make_run(60), ray=address, replicas=9, progress=Told()).exit_code == 0
    assert any("room for 2 engines of 9" in message for message in said)


def test_no_free_place_is_told_with_what_there_is(
    address: str, fake: FarFake, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_ray, "PLACE_SECONDS", 2.0)
    run = make_run(10)
    with clusters.connected(address) as ray:
        holders = [
            ray.remote(FakeReplica).options(num_cpus=1).remote(model="m", args=(), environment=dict(os.environ))
            for _ in range(2)
        ]
        ray.get([holder.hello.remote() for holder in holders])
        with pytest.raises(EngineError, match=r"each needs 1 CPUs .* 0 GPUs and 2 CPUs, 0 GPUs and 0 CPUs are free"):
            submit(run, ray=address)
    assert verdicts(run) == {"pending": 10}


def test_other_versions_are_refused(
    address: str, fake: FarFake, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_ray, "Replica", OldReplica)
    with pytest.raises(EngineError, match=r"has batchkit 0\.0\.1") as caught:
        submit(make_run(10), ray=address)
    assert "pip install" in str(caught.value.hint)


def test_machines_without_batchkit_are_told(
    address: str, fake: FarFake, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere:
        """What an actor is whose module is not there."""

        def __init__(self, **_: Any) -> None:
            import batchkit_that_is_not_there  # type: ignore[import-not-found]  # noqa: F401

        def hello(self) -> None: ...

    monkeypatch.setattr(vllm_ray, "Replica", Elsewhere)
    with pytest.raises(EngineError, match="cannot run batchkit: No module named 'batchkit_that_is_not_there'"):
        submit(make_run(10), ray=address)


def test_an_address_where_nobody_is(make_run: MakeRun) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for place in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        began = time.monotonic()
        with pytest.raises(EngineError, match="no Ray cluster answers"):
            submit(make_run(10), ray=place)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("place", ["nonsense", "http://x:1", "host", ""])
def test_an_address_that_is_none(make_run: MakeRun, place: str) -> None:
    with pytest.raises(UsageError, match="not the address"):
        submit(make_run(10), ray=place)


def test_ray_goes_with_the_batch_runner_alone(make_run: MakeRun) -> None:
    for other in ({"engine": "serve"}, {"backend": "server"}):
        with pytest.raises(UsageError, match="--ray is for"):
            submit(make_run(10), ray="auto", **other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "replicas", "size", "fits"),
    [
        ([Node(8, 4), Node(8, 4)], 4, 2, ({"num_gpus": 2, "num_cpus": 0}, 4)),
        ([Node(8, 3), Node(8, 0)], 1, 2, ({"num_gpus": 2, "num_cpus": 0}, 1)),
        ([Node(4, 0), Node(6, 0)], 2, 1, ({"num_cpus": 4}, 2)),
        ([Node(4, 0), Node(4, 0)], 4, 1, ({"num_cpus": 2}, 4)),
        ([Node(1, 0), Node(1, 0)], 4, 1, ({"num_cpus": 1}, 2)),
    ],
)
def test_what_an_engine_takes_of_the_cluster(nodes: list[Node], replicas: int, size: int, fits: Any) -> None:
    assert vllm_ray._fit(nodes, replicas, size, "a") == fits


@pytest.mark.parametrize(("nodes", "size"), [([Node(8, 1), Node(8, 2)], 4), ([], 1)])
def test_a_cluster_that_is_too_small_is_told(nodes: list[Node], size: int) -> None:
    with pytest.raises(EngineError, match=r"needs 4 GPUs .* 2 at most|neither GPUs nor CPUs"):
        vllm_ray._fit(nodes, 1, size, "a")


def test_each_engine_gets_gpus_of_its_own(
    cluster: Any, fake: FarFake, make_run: MakeRun, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_ray, "Replica", GpuReplica)
    node = cluster.add_node(num_cpus=0, num_gpus=4)
    try:
        fake.set(seconds=1.0)
        args = ("--tensor-parallel-size", "2")
        assert submit(make_run(100), ray=cluster.address, replicas=2, engine_args=args).exit_code == 0
        given = [set(slot.hello["notes"][0].split(",")) for slot in seen[0]._slots if slot.hello]
        assert len(given) == 2
        assert given[0] | given[1] == {"0", "1", "2", "3"}
    finally:
        cluster.remove_node(node)


def test_run_prepares_and_sends_on_a_cluster(
    address: str, fake: FarFake, write_tasks: WriteTasks, tmp_path: Path
) -> None:
    tasks = write_tasks([{"id": n, "question": f"{n}?"} for n in range(120)])
    summary = pipeline.run(tasks, tmp_path / "run", model="m", max_requests=50, ray=address, replicas=2)
    assert summary.verdicts[Verdict.ANSWERED] == 120


# -- prepare ---------------------------------------------------------------------------------------------------------


def test_prepare_on_a_cluster_makes_the_same_bytes(
    address: str, write_tasks: WriteTasks, picture: Callable[..., Path], tmp_path: Path
) -> None:
    picture("a.png")
    rows: list[Any] = [{"id": n, "question": f"{n}?", "image": "a.png" if n % 7 else "lost.png"} for n in range(150)]
    tasks = write_tasks([*rows, b"{"])
    here = prepare(tasks, tmp_path / "here", model="m", max_requests=40, workers=1)
    there = prepare(tasks, tmp_path / "there", model="m", max_requests=40, ray=address)
    assert (here.rows, here.rejected) == (there.rows, there.rejected) == (151, 23)
    for folder in ("rows", "requests"):
        files = sorted((tmp_path / "here" / folder).iterdir())
        assert files
        for path in files:
            assert path.read_bytes() == (tmp_path / "there" / folder / path.name).read_bytes()


def test_images_that_the_machines_do_not_see_reject_no_row(
    address: str, write_tasks: WriteTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batchkit import conversion

    class Blind(conversion.Converter):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            if "ray" in sys.argv[0]:  # a worker of the cluster
                self.root = str(Path("/no/such/folder"))

    monkeypatch.setattr("batchkit.preparation.Converter", Blind)
    tasks = write_tasks([{"question": "?"}])
    with pytest.raises(BatchkitError, match="no folder on"):
        prepare(tasks, tmp_path / "run", model="m", ray=address)


# -- the real engine -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(900)
def test_real_engines_on_two_nodes_one_actor_killed_in_the_middle(
    address: str, far_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[vllm_ray.RayVllm]
) -> None:
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rounds, "FIRST_ROUND", 300)
    run = test_engine.make_run(
        tmp_path, list(test_engine.tasks(1200)), max_requests=150, max_tokens=40, extra_body={"ignore_eos": True}
    )
    thread = InThread(lambda: submit(run, ray=address, replicas=2, engine_args=test_engine.ENGINE_ARGS))
    known: set[int] = set()
    for how in ("ray.kill", "SIGKILL"):
        known |= kill_one(seen, how, far_folder)
    report = thread.finish(600)
    assert report.deaths == 2
    assert report.exit_code == 0
    found: Counter[str] = Counter(str(outcome.verdict) for outcome in test_engine.found(run))
    assert found["answered"] + found["truncated"] == 1200
    responses = Counter(
        json.loads(line)["custom_id"]
        for path in (run.path / "responses").iterdir()
        for line in path.read_bytes().splitlines()
    )
    assert set(responses.values()) == {1}
    assert len(responses) == 1200
    wait_for(lambda: not engine_processes(far_folder), 30)
    for engine in known:
        assert members(engine) == [], "not even a process of its session"
    assert len(known) >= 2
    print(f"{report.starts} starts, {report.seconds:.0f} s")


def kill_one(seen: list[vllm_ray.RayVllm], how: str, far_folder: Path) -> set[int]:
    """Kill an actor whose engine is at work on its requests. Returns the engines that there were."""
    wait_for(lambda: seen, 60)

    def at_work() -> Any:
        slots = [slot for slot in seen[0]._slots if slot.engine is not None and slot.engine.poll() is None]
        return next((slot for slot in slots if _says(slot.engine, "Running batch")), None)

    slot = wait_for(at_work, 240)
    known = set(engine_processes(far_folder))
    kill(slot, how)
    wait_for(lambda: slot.engine.poll() is not None, 60)
    return known


def _says(engine: vllm_remote.RemoteEngine | None, text: str) -> bool:
    assert engine is not None
    log = engine._folder / "log.txt"
    return log.exists() and text in log.read_text(errors="replace")
