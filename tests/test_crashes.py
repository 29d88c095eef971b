"""submit at a batch service is killed, at every step and at any moment, and carries on: the provider's books are right.

The process that is killed is a fork of this one, so that a kill costs no start; the provider is a thread of this one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchkit import attempts, batch_submission, outcomes
from batchkit.backends import gemini as gemini_backend
from batchkit.backends import openai as openai_backend
from batchkit.backends.gemini import GeminiBatches
from batchkit.backends.openai import OpenAIBatches
from batchkit.handover import Pace
from batchkit.preparation import prepare
from batchkit.reports import SubmitReport
from batchkit.runs import Run
from batchkit.submission import submit
from tests import fake_provider
from tests.fake_provider import Provider

BACKENDS = ("openai", "gemini")
ROWS = 24
ENDINGS = ("completed", "expired:3", "completed", "cancelled:0", "completed")
OPERATIONS = ("upload", "create", "check", "download", "find")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_submission, "PACE", Pace(poll=0.005, adopt=0.3, settle=0.3, tokens=0.01))
    monkeypatch.setattr(openai_backend, "RETRIES", 0)
    monkeypatch.setattr(gemini_backend, "RETRIES", 1)


class Scene:
    """A fresh run and a fresh provider. Each question is asked by so many rows as `copies` says, and sent once."""

    def __init__(self, folder: Path, provider: Provider, backend: str, copies: int = 1) -> None:
        self.provider = provider
        tasks = folder / "tasks.jsonl"
        folder.mkdir()
        tasks.write_text("".join(json.dumps({"id": n, "question": f"{n // copies}?"}) + "\n" for n in range(ROWS)))
        options: Any = {"model": "gemini-2.5-flash" if backend == "gemini" else "m", "backend": backend}
        options["dedupe"] = copies > 1
        prepare(tasks, folder / "run", workers=1, max_requests=8, **options)
        self.run = Run.open(folder / "run")
        self.url = provider.url if backend == "gemini" else f"{provider.url}/v1"
        provider.endings.extend(ENDINGS)

    def submit(self) -> SubmitReport:
        return submit(self.run, base_url=self.url, delete_remote=True)

    def fork(self, before: Callable[[], None] = lambda: None) -> int:
        """Submit in a process of its own; returns its pid."""
        pid = os.fork()
        if pid == 0:
            try:
                before()
                self.submit()
                os._exit(0)
            except BaseException:  # noqa: BLE001  # a fork must not go on with the tests
                traceback.print_exc()
                os._exit(1)
        return pid

    def finish(self) -> None:
        """Carry on as a user would, who is asked about what is doubtful and looks at the provider's pages."""
        for _ in range(6):
            report = self.submit()
            if report.exit_code == 0:
                return
            for name in report.doubtful:
                self._decide(name)
        raise AssertionError(f"not finished: {report}")

    def _decide(self, name: str) -> None:
        shard, number = map(int, name.split("."))
        attempt = next(found for found in self.run.job(shard).attempts if found.number == number)
        assert attempt.remote is not None
        tag = f"{attempt.remote.tag}-{attempt.remote.creates}"
        known = [json.dumps([batch.get("metadata"), batch.get("display")]) for batch in self.provider.batches.values()]
        assert not any(tag in text for text in known), "it was there to be found"
        submit(self.run, base_url=self.url, resend=[name], limit=0)

    def check_books(self) -> None:
        ids = [self.run.read_ids(seal)[row - seal.start] for seal in self.run.seals() for row in seal.asking]
        lost = self.lost_to_expiry()
        assert self.provider.paid - lost == Counter(ids), "each request is paid for once"
        for seal in self.run.seals():
            for outcome in outcomes.load(self.run, seal).outcomes:
                assert outcome.response is not None
                assert outcome.response.answer == f"answer to {outcome.same_as or outcome.custom_id}"
        states = Counter(attempt.state for seal in self.run.seals() for attempt in self.run.job(seal.shard).attempts)
        assert states.keys() <= {"collected", "refused"}

    def lost_to_expiry(self) -> Counter[str]:
        """A Gemini job that expires gives nothing back of what was run: that is the provider's own doing."""
        return self.provider.lost


def killed_at(step: int, count: list[int]) -> Callable[[], None]:
    """In the fork: SIGKILL at the `step`-th boundary between two steps. `count` is told the boundaries."""

    def boundary() -> None:
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            boundary()
            try:
                return function(*args, **kwargs)
            finally:
                boundary()

        return wrapped

    def install() -> None:
        Run.write_job = around(Run.write_job)  # type: ignore[method-assign]
        os.replace = around(os.replace)
        attempts.write_whole = around(attempts.write_whole)  # type: ignore[attr-defined]
        for service in (OpenAIBatches, GeminiBatches):
            for operation in (*OPERATIONS, "delete"):
                setattr(service, operation, around(getattr(service, operation)))

    return install


@pytest.fixture
def make_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Scene]]:
    with fake_provider.running() as first:
        monkeypatch.setenv("OPENAI_API_KEY", first.key)
        monkeypatch.setenv("GEMINI_API_KEY", first.key)
        count = 0

        def make(backend: str, copies: int = 1) -> Scene:
            nonlocal count
            count += 1
            first.reset()
            return Scene(tmp_path / str(count), first, backend, copies)

        yield make


def count_boundaries(scene: Scene) -> int:
    """How many boundaries an undisturbed submit passes, as the fork counts them."""
    count = [0]
    told, tell = os.pipe()

    def before() -> None:
        killed_at(-1, count)()

    pid = os.fork()
    if pid == 0:
        try:
            before()
            scene.submit()
            os.write(tell, str(count[0]).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
    os.close(tell)
    _, code = os.waitpid(pid, 0)
    assert code == 0
    with open(told, "rb") as stream:
        return int(stream.read())


def kill_at_boundaries(make_scene: Callable[..., Scene], backend: str, *, every: int, copies: int = 1) -> None:
    scene = make_scene(backend, copies)
    boundaries = count_boundaries(scene)
    assert boundaries > 50
    offset = random.Random(backend).randrange(every)
    for step in range(1 + offset, boundaries + 1, every):
        scene = make_scene(backend, copies)
        pid = scene.fork(killed_at(step, [0]))
        _, code = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(code), f"boundary {step} of {boundaries}"
        scene.finish()
        scene.check_books()


def kill_at_random(make_scene: Callable[[str], Scene], backend: str, *, times: int) -> None:
    scene = make_scene(backend)
    began = time.monotonic()
    os.waitpid(scene.fork(), 0)
    takes = time.monotonic() - began
    killed = 0
    generator = random.Random(7)
    for _ in range(times):
        scene = make_scene(backend)
        pid = scene.fork()
        time.sleep(generator.uniform(0, takes))
        os.kill(pid, signal.SIGKILL)
        _, code = os.waitpid(pid, 0)
        killed += os.WIFSIGNALED(code)
        scene.finish()
        scene.check_books()
    assert killed > times / 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kill_at_some_steps_costs_nothing(backend: str, make_scene: Callable[[str], Scene]) -> None:
    kill_at_boundaries(make_scene, backend, every=12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kill_costs_nothing_where_several_rows_share_a_request(
    backend: str, make_scene: Callable[..., Scene]
) -> None:
    kill_at_boundaries(make_scene, backend, every=40, copies=3)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kill_at_every_step_costs_nothing(backend: str, make_scene: Callable[[str], Scene]) -> None:
    kill_at_boundaries(make_scene, backend, every=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kill_at_a_few_moments_costs_nothing(backend: str, make_scene: Callable[[str], Scene]) -> None:
    kill_at_random(make_scene, backend, times=4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kill_at_fifty_moments_costs_nothing(backend: str, make_scene: Callable[[str], Scene]) -> None:
    kill_at_random(make_scene, backend, times=50)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lag", [0, 3])
@pytest.mark.parametrize("operation", ["upload", "create", "check", "download", "delete"])
def test_a_kill_while_the_provider_has_done_it_and_not_answered(
    operation: str, lag: int, backend: str, make_scene: Callable[[str], Scene]
) -> None:
    scene = make_scene(backend)
    scene.provider.list_lag = lag
    pids: list[int] = []

    def kill() -> None:
        while not pids:
            time.sleep(0.001)
        os.kill(pids[0], signal.SIGKILL)

    scene.provider.faults[operation].append(fake_provider.call(kill, after=True))
    pids.append(scene.fork())
    _, code = os.waitpid(pids[0], 0)
    assert os.WIFSIGNALED(code)
    scene.finish()
    scene.check_books()
    if operation == "create":
        doubtful = [batch for batch in scene.provider.batches.values() if batch["total"] == 0]
        assert not doubtful


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_keeps_everything(backend: str, make_scene: Callable[[str], Scene]) -> None:
    scene = make_scene(backend)
    pids: list[int] = []

    def interrupt() -> None:
        while not pids:
            time.sleep(0.001)
        os.kill(pids[0], signal.SIGINT)

    scene.provider.faults["create"].append(fake_provider.call(interrupt, after=True))
    pids.append(scene.fork())
    _, code = os.waitpid(pids[0], 0)
    assert os.WEXITSTATUS(code) == 1
    scene.finish()
    scene.check_books()
