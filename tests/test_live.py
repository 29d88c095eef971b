"""submit at live servers: every response on the disk soon after it came, none lost, none asked for twice."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchkit import batch_submission, client, live_submission, outcomes, rotation, serving
from batchkit.client import Pacing
from batchkit.errors import CredentialsError, EngineError, StorageError, UsageError
from batchkit.handover import Pace
from batchkit.merging import merge
from batchkit.preparation import prepare
from batchkit.progress import Silent
from batchkit.reports import SubmitReport
from batchkit.responses import Verdict
from batchkit.runs import Run
from batchkit.submission import submit
from tests import fake_provider, fake_server
from tests.conftest import ENVIRONMENT
from tests.fake_server import Server

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.02)
    monkeypatch.setattr(rotation, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(live_submission, "PACING", Pacing(timeout=5.0, patience=0.5))


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(count: int = 100, *, shard: int = 25, bad: tuple[int, ...] = (), name: str = "run") -> Run:
        tasks = tmp_path / "tasks.jsonl"
        rows = [json.dumps({"id": n, "question": f"q{n}"}) if n not in bad else "{" for n in range(count)]
        tasks.write_text("\n".join(rows) + "\n")
        prepare(tasks, tmp_path / name, model="m", backend="server", max_requests=shard, workers=1)
        return Run.open(tmp_path / name)

    return make


def send(run: Run, *servers: Server, **options: Any) -> SubmitReport:
    return submit(run, **{"endpoints": [server.url for server in servers], **options})


def verdicts(run: Run) -> Counter[str]:
    return Counter(str(outcome.verdict) for seal in run.seals() for outcome in outcomes.load(run, seal).outcomes)


def assert_each_answered_by_its_own(run: Run) -> None:
    position = 0
    for seal in run.seals():
        found = outcomes.load(run, seal)
        assert not found.unexpected
        assert not found.unreadable
        for outcome in found.outcomes:
            if outcome.verdict is Verdict.ANSWERED:
                assert outcome.response is not None
                assert outcome.response.answer == f"answer to q{position}"
            position += 1


def lines(run: Run) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in (run.path / "responses").iterdir())


# -- when all goes well ----------------------------------------------------------------------------------------------


def test_all_are_answered_once_and_bodies_go_out_as_they_are(server: Server, make_run: MakeRun) -> None:
    run = make_run(bad=(40,))
    report = send(run, server)
    assert (report.sent, report.responses, report.remaining, report.unanswered) == (99, 99, 0, 1)
    assert set(server.answered.values()) == {1}
    assert_each_answered_by_its_own(run)
    requests = b"".join(path.read_bytes() for path in sorted((run.path / "requests").glob("*.jsonl")))
    assert all(b'"body":' + body + b"}\n" in requests for body in server.bodies)
    assert send(run, server).sent == 0
    summary = merge(run)
    assert summary.backends == ["server"]
    row = json.loads((run.path / "results.jsonl").read_bytes().splitlines()[0])
    assert (row["batchkit"]["backend"], row["batchkit"]["attempt"]) == ("server", 1)


def test_rows_in_batch_format_are_sent_as_they_are_whatever_their_order(server: Server, tmp_path: Path) -> None:
    def line(number: int) -> str:
        body = {"messages": [{"role": "user", "content": f"q{number}"}], "model": "m"}
        fields = {
            "body": body,
            "url": "/v1/chat/completions",
            "method": "POST",
            "custom_id": f"r{number}",
            "more": {"a": {}},
        }
        names = list(fields)
        return json.dumps({name: fields[name] for name in names[number % 5 :] + names[: number % 5]})

    tasks = tmp_path / "batch.jsonl"
    tasks.write_text("".join(line(number) + "\n" for number in range(20)))
    prepare(tasks, tmp_path / "run", backend="server", workers=1)
    run = Run.open(tmp_path / "run")
    assert send(run, server).exit_code == 0
    assert all(json.loads(body).keys() == {"messages", "model"} for body in server.bodies)
    assert_each_answered_by_its_own(run)


def test_concurrency_bounds_the_requests_at_each_server(server: Server, make_run: MakeRun) -> None:
    server.delay = 0.02
    with fake_server.running() as other:
        other.delay = 0.02
        send(make_run(), server, other, concurrency=3)
        assert (server.busiest, other.busiest) == (3, 3)
        assert server.answered.total() + other.answered.total() == 100
        assert min(server.answered.total(), other.answered.total()) > 30


def test_a_pilot_and_parts_of_the_run(server: Server, make_run: MakeRun) -> None:
    run = make_run()
    assert send(run, server, limit=30).sent == 30
    assert send(run, server, shards="2/2").exit_code == 0
    assert send(run, server).exit_code == 0
    assert set(server.answered.values()) == {1}


def test_requests_and_delays_are_spaced(server: Server, make_run: MakeRun) -> None:
    run = make_run(10)
    send(run, server, rate_limit_delay=0.05, concurrency=8)
    gaps = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert min(gaps) > 0.03
    began = time.monotonic()
    send(run, server, retry=frozenset({Verdict.ANSWERED}), limit=6, requests_per_minute=300, concurrency=8)
    assert time.monotonic() - began < 30


def test_tokens_per_minute_hold_requests_back(server: Server, make_run: MakeRun) -> None:
    run = make_run(8)
    began = time.monotonic()
    # Each takes 1 + 100 tokens by the estimate; the bucket holds 404 and gains 6.7 a second.
    with pytest.raises(KeyboardInterrupt):
        stop_after(1.0, lambda: send(run, server, tokens_per_minute=404, concurrency=8))
    assert time.monotonic() - began < 10
    assert server.answered.total() == 4
    assert verdicts(run) == {"answered": 4, "pending": 4}


def stop_after(seconds: float, work: Callable[[], Any]) -> None:
    """Ctrl-C after a while, in the main thread as the terminal does it."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_in_a_notebook_where_a_loop_runs_already(server: Server, make_run: MakeRun) -> None:
    run = make_run(10)

    async def cell() -> SubmitReport:
        return send(run, server)

    assert asyncio.run(cell()).exit_code == 0


def test_stopping_a_notebook_cell_stops_the_requests(server: Server, make_run: MakeRun) -> None:
    run = make_run(400)
    server.delay = 0.01

    async def cell() -> None:
        stop_after(0.4, lambda: send(run, server))

    loop = asyncio.new_event_loop()  # as a notebook's: asyncio.run would have a handler of its own for Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(cell())
    loop.close()
    asked = server.asked.total()
    time.sleep(0.3)
    assert 0 < server.asked.total() == asked < 400
    kept = lines(run)
    assert verdicts(run) == {"answered": kept, "pending": 400 - kept}
    assert send(run, server).exit_code == 0


def test_with_nothing_to_send_no_server_is_needed(server: Server, make_run: MakeRun) -> None:
    run = make_run(10)
    assert send(run, server).exit_code == 0
    assert submit(run, endpoints=["http://127.0.0.1:9"]).exit_code == 0
    assert submit(run, backend="vllm", engine="serve").exit_code == 0


def test_a_proxy_is_not_asked_for_this_machine(
    server: Server, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert send(make_run(5), server).exit_code == 0


# -- storms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        fake_server.status(429),
        fake_server.status(408),
        fake_server.status(500),
        fake_server.status(503),
        fake_server.drop,
        fake_server.cut,
    ],
    ids=["429", "408", "500", "503", "drop", "cut"],
)
def test_passing_faults_are_tried_again(fault: Any, server: Server, make_run: MakeRun) -> None:
    run = make_run()
    server.faults.extend([fault] * 10)
    assert send(run, server).exit_code == 0
    assert set(server.answered.values()) == {1}
    assert server.asked.total() == 110
    assert_each_answered_by_its_own(run)
    assert lines(run) == 100


def test_a_server_that_hangs_is_given_up_on_after_the_timeout(server: Server, make_run: MakeRun) -> None:
    run = make_run(10)
    server.faults.extend([fake_server.hang(3.0)] * 3)
    assert send(run, server, timeout=0.3).exit_code == 0
    assert set(server.answered.values()) == {1}


def test_retry_after_is_obeyed_by_all_requests_to_that_server(server: Server, make_run: MakeRun) -> None:
    run = make_run(10)
    server.faults.append(fake_server.status(429, retry_after="1"))
    began = time.monotonic()
    assert send(run, server, concurrency=1).exit_code == 0
    assert time.monotonic() - began > 0.9
    assert server.times[1] - server.times[0] > 0.9


def test_a_retry_after_of_an_hour_is_not_waited_for_and_nothing_more_is_sent(server: Server, make_run: MakeRun) -> None:
    run = make_run(50)
    server.faults.extend(
        [fake_server.fine] * 10 + [fake_server.status(429, "come back later", retry_after="3600")] * 40
    )
    with pytest.raises(EngineError, match=r"asks to be left alone for 3,\d\d\d s"):
        send(run, server, concurrency=2)
    assert verdicts(run) == {"answered": 10, "pending": 40}
    assert server.asked.total() <= 12
    server.faults.clear()
    assert send(run, server).exit_code == 0


def test_while_one_server_pauses_the_other_goes_on(server: Server, make_run: MakeRun) -> None:
    run = make_run(60)
    with fake_server.running() as other:
        other.always = fake_server.status(429, retry_after="3600")
        assert send(run, server, other).exit_code == 0
        assert other.asked.total() <= 6
    assert_each_answered_by_its_own(run)


def test_a_storm_of_everything_loses_nothing(server: Server, make_run: MakeRun) -> None:
    weather = random.Random(3)
    run = make_run(300)
    faults = [
        fake_server.status(429),
        fake_server.status(500),
        fake_server.drop,
        fake_server.cut,
        fake_server.hang(3.5),
    ]
    server.faults.extend(weather.choice([*faults, *[fake_server.fine] * 5]) for _ in range(400))
    # One that meets six faults in a row fails in passing, for the next submit.
    # The limit is far above what a busy machine needs for a fine answer: one that comes too late is paid for twice.
    codes = [send(run, server, timeout=3, concurrency=16).exit_code for _ in range(3)]
    assert codes[-1] == 0
    assert set(server.answered.values()) == {1}
    assert_each_answered_by_its_own(run)


def test_lasting_failures_and_nonsense_are_not_tried_again(server: Server, make_run: MakeRun) -> None:
    run = make_run(10)
    server.faults.extend([fake_server.status(400, "too long"), fake_server.nonsense])
    report = send(run, server, concurrency=1)
    assert verdicts(run) == {"answered": 8, "failed": 2}
    assert report.exit_code == 3
    found = outcomes.load(run, next(iter(run.seals()))).outcomes
    assert found[0].message == "too long"
    assert "hello" in (found[1].message or "")
    assert send(run, server).sent == 0


def test_a_request_that_always_fails_in_passing_is_failed_and_the_others_go_on(
    server: Server, make_run: MakeRun
) -> None:
    run = make_run(10)
    server.faults.extend([fake_server.status(503, "busy")] * 6)
    report = send(run, server, concurrency=1)
    assert verdicts(run) == {"answered": 9, "failed": 1}
    assert report.passing == 1
    assert send(run, server).exit_code == 0, "the next submit tries it again"


# -- servers that die ------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_server(port: int, delay: float = 0.0) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-m", "tests.fake_server", str(port), str(delay)], cwd=ROOT)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return process
    raise AssertionError("the server does not start")


class Killer(Silent):
    """Kills a server when so many responses have come."""

    def __init__(self, server: subprocess.Popen[bytes], count: int = 100) -> None:
        self._server = server
        self._count = count
        self._done = 0

    def update(self, done: int = 1, *, note: str | None = None) -> None:  # noqa: ARG002
        self._done += done
        if self._done == self._count:
            self._server.kill()


def test_an_endpoint_that_dies_is_set_aside_and_taken_back(server: Server, make_run: MakeRun) -> None:
    run = make_run(400, shard=100)
    server.delay = 0.01
    port = free_port()
    dying = start_server(port, 0.01)
    said: list[str] = []

    class Listener(Killer):
        revived: subprocess.Popen[bytes] | None = None

        def say(self, message: str) -> None:
            said.append(message)
            if "is down" in message:
                self.revived = start_server(port, 0.01)

    listener = Listener(dying)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        report = submit(run, endpoints=[server.url, url], concurrency=4, progress=listener)
    finally:
        dying.kill()
        if listener.revived is not None:
            listener.revived.kill()
    assert report.exit_code == 0
    assert_each_answered_by_its_own(run)
    assert lines(run) == 400
    assert any(f"{url} is down" in message for message in said)
    assert any(f"{url} answers again" in message for message in said)


def test_when_no_server_answers_any_more_it_stops_and_goes_on_later(make_run: MakeRun) -> None:
    run = make_run(400)
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    dying = start_server(port, 0.01)

    with pytest.raises(EngineError, match="no server has answered for"):
        submit(run, endpoints=[url], progress=Killer(dying))
    kept = verdicts(run)
    assert kept["answered"] >= 100
    assert kept["answered"] + kept["pending"] + kept["failed"] == 400
    with pytest.raises(EngineError, match="no server answers"):
        submit(run, endpoints=[url])
    alive = start_server(port)
    try:
        assert submit(run, endpoints=[url]).exit_code == 0
    finally:
        alive.kill()
    assert_each_answered_by_its_own(run)


def test_a_server_that_fails_at_once_does_not_draw_the_requests_to_itself(server: Server, make_run: MakeRun) -> None:
    run = make_run(150)
    server.delay = 0.01
    with fake_server.running() as broken:
        broken.always = fake_server.status(502, "bad gateway")
        said: list[str] = []

        class Listener(Silent):
            def say(self, message: str) -> None:
                said.append(message)

        assert send(run, broken, server, progress=Listener()).exit_code == 0
        assert broken.asked.total() < 40
    assert verdicts(run) == {"answered": 150}
    down = [message for message in said if "is down" in message]
    assert len(down) == 1
    assert f"{broken.url} is down (12 failures in a row, the last: status 502)" in down[0]


def test_a_server_that_only_fails_ends_the_submit_with_its_rows_pending(
    server: Server, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(150)
    server.faults.extend([fake_server.fine] * 20)
    server.always = fake_server.status(500, "broken")
    monkeypatch.setattr(client, "MOST_LOST", 30)
    with pytest.raises(EngineError, match="30 requests in a row failed, the last with: status 500"):
        send(run, server)
    found = verdicts(run)
    assert found["answered"] == 20
    assert found["pending"] > 80
    server.always = None
    assert send(run, server).exit_code == 0


def test_rows_that_kill_their_request_do_not_stop_the_others(server: Server, make_run: MakeRun) -> None:
    run = make_run(200)

    def poison(handler: fake_server.Handler) -> bool:
        bad = handler.question in {f"q{n}" for n in range(15)}
        return bad and fake_server.status(500, "broken image")(handler)

    server.always = poison
    assert send(run, server).exit_code == 8
    assert verdicts(run) == {"failed": 15, "answered": 185}
    with fake_server.running() as other:
        other.always = poison
        run = make_run(200, name="two")
        assert send(run, server, other).exit_code == 8
        assert verdicts(run) == {"failed": 15, "answered": 185}


def test_a_call_goes_back_to_the_server_that_failed_it_while_the_other_pauses(
    server: Server, make_run: MakeRun
) -> None:
    run = make_run(60)
    server.faults.extend([fake_server.fine] * 20 + [fake_server.status(500)] * 2)
    with fake_server.running() as other:
        other.always = fake_server.status(429, retry_after="3600")
        began = time.monotonic()
        assert send(run, server, other).exit_code == 0
        assert time.monotonic() - began < 20


def test_one_server_dead_and_the_other_pausing_ends_the_submit(server: Server, make_run: MakeRun) -> None:
    run = make_run(60)
    port = free_port()
    dying = start_server(port)
    server.faults.extend([fake_server.fine] * 5)
    server.always = fake_server.status(429, retry_after="3600")
    try:
        with pytest.raises(EngineError, match="no server has answered"):
            submit(run, endpoints=[server.url, f"http://127.0.0.1:{port}/v1"], progress=Killer(dying, 10))
    finally:
        dying.kill()
    assert set(verdicts(run)) <= {"answered", "pending"}


def test_when_a_route_is_lost_in_the_middle_late_answers_do_not_blame_the_rows(
    server: Server, make_run: MakeRun
) -> None:
    run = make_run(300)
    lost = threading.Event()

    def route(handler: fake_server.Handler) -> bool:
        if lost.is_set():
            handler.server.models_status = 404
            return fake_server.status(404, "gone")(handler)
        time.sleep(random.Random(handler.question).uniform(0.1, 0.5))
        if handler.server.answered.total() >= 10:
            lost.set()
        return False

    server.always = route
    with pytest.raises(EngineError, match="refuses all requests: status 404"):
        send(run, server, concurrency=20)
    assert set(verdicts(run)) == {"answered", "pending"}


@pytest.mark.parametrize(
    "value",
    ["nan", "-5", "0", "Mon", "Mon, 01 Jan 2024 00:00:00 +99999999999999999", "Mon, 99999999999999999999 Jan 2024 x"],
)
def test_an_odd_retry_after_is_none(value: str, server: Server, make_run: MakeRun) -> None:
    run = make_run(10)
    server.faults.extend([fake_server.status(429, retry_after=value)] * 3)
    assert send(run, server).exit_code == 0


def test_a_request_id_that_is_no_text_loses_no_answer(server: Server, make_run: MakeRun) -> None:
    run = make_run(1)
    server.faults.append(fake_server.whole((ANSWER % (1, "fine")).encode(), x_request_id="\xff\xfe1"))
    assert send(run, server).exit_code == 0


@pytest.mark.parametrize("limits", [{"requests_per_minute": 3}, {"rate_limit_delay": 1.0}])
def test_a_refusal_ends_the_waiting_of_all(limits: dict[str, Any], server: Server, make_run: MakeRun) -> None:
    run = make_run(50)
    server.faults.append(fake_server.fine)
    server.always = fake_server.status(401, "over")
    began = time.monotonic()
    with pytest.raises(CredentialsError):
        send(run, server, **limits)
    assert time.monotonic() - began < 5
    assert server.asked.total() <= 3


def test_an_empty_account_stops_with_the_rest_pending(server: Server, make_run: MakeRun) -> None:
    run = make_run(50)
    server.faults.extend([fake_server.fine] * 10)

    def empty(handler: fake_server.Handler) -> bool:
        handler.send(429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}})
        return True

    server.always = empty
    with pytest.raises(EngineError, match="exceeded your current quota"):
        send(run, server)
    assert verdicts(run) == {"answered": 10, "pending": 40}
    assert server.asked.total() <= 16


def test_a_server_whose_port_swallows_everything_is_set_aside(
    server: Server, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CONNECT_SECONDS", 0.3)
    run = make_run(60)
    with socket.socket() as hole, socket.socket() as one, socket.socket() as two:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for filler in (one, two):  # nobody accepts: further connections hang
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
        url = f"http://127.0.0.1:{hole.getsockname()[1]}/v1"
        monkeypatch.setattr("batchkit.backends.server.CHECK_SECONDS", 0.3)
        assert submit(run, endpoints=[url, server.url]).exit_code == 0
    assert server.answered.total() == 60


# -- answers that are whole, and those that are not -------------------------------------------------------------------

ANSWER = (
    '{"id":"c","model":"m","usage":{"total_tokens":3,"loss":%s},'
    '"choices":[{"message":{"content":"%s"},"finish_reason":"stop"}]}'
)


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ((ANSWER % ("NaN", "fine")).encode(), "fine"),
        ((ANSWER % ("1E400", "fine")).encode(), "fine"),
        (b"\xef\xbb\xbf" + (ANSWER % (1, "fine")).encode(), "fine"),
        ((ANSWER % (1, "half \\ud83d of it")).encode(), "half \ufffd of it"),
        ((ANSWER % (1, "broken \xff")).encode("latin-1"), "broken \ufffd"),
        (json.dumps(json.loads(ANSWER % (1, "fine")), indent=2).encode(), "fine"),
    ],
    ids=["NaN", "1E400", "BOM", "half a surrogate pair", "broken UTF-8", "several lines"],
)
def test_an_answer_in_bad_json_is_an_answer(body: bytes, answer: str, server: Server, make_run: MakeRun) -> None:
    run = make_run(1)
    server.faults.append(fake_server.whole(body))
    assert send(run, server).exit_code == 0
    merge(run)
    row = json.loads((run.path / "results.jsonl").read_bytes())
    assert (row["raw_response"], row["batchkit"]["verdict"]) == (answer, "answered")
    assert send(run, server).sent == 0
    assert server.asked.total() == 1


def test_an_answer_that_is_cut_off_is_asked_for_again_whether_its_length_is_known_or_not(
    server: Server, make_run: MakeRun
) -> None:
    run = make_run(10)
    body = (ANSWER % (1, "fine")).encode()
    server.faults.append(fake_server.whole(body[:-20], length=False))
    server.faults.append(fake_server.whole(body, length=False))
    assert send(run, server, concurrency=1).exit_code == 0
    assert server.asked.total() == 11
    assert verdicts(run) == {"answered": 10}


def test_an_answer_that_holds_the_key_stays_as_it_is(
    server: Server, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(1)
    server.key = "a-long-placeholder"
    monkeypatch.setenv("MY_KEY", server.key)
    server.faults.append(fake_server.whole((ANSWER % (1, "a-long-placeholder it is")).encode()))
    send(run, server, api_key_env="MY_KEY")
    merge(run)
    assert json.loads((run.path / "results.jsonl").read_bytes())["raw_response"] == "a-long-placeholder it is"


# -- servers that take no request at all -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [401, 402])
def test_a_key_that_expires_in_the_middle_stops_with_the_rest_pending(
    code: int, server: Server, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(200)
    monkeypatch.setenv("MY_KEY", "some-key-of-mine")
    server.faults.extend([fake_server.fine] * 20)
    server.always = fake_server.status(code, "some-key-of-mine is over")
    with pytest.raises(CredentialsError if code == 401 else EngineError) as caught:
        send(run, server, api_key_env="MY_KEY")
    assert "some-key" not in caught.value.message
    assert verdicts(run) == {"answered": 20, "pending": 180}
    assert server.asked.total() <= 26
    server.always = None
    assert send(run, server).exit_code == 0


@pytest.mark.parametrize(("code", "rows"), [(404, 200), (403, 200), (307, 200), (404, 3)])
def test_a_server_that_refuses_every_request_fails_none_of_them(
    code: int, rows: int, server: Server, make_run: MakeRun
) -> None:
    run = make_run(rows)
    server.always = fake_server.status(code, "not here", location="http://127.0.0.1:9/v1")
    with pytest.raises((EngineError, CredentialsError)) as caught:
        send(run, server)
    assert server.url in caught.value.message
    assert verdicts(run) == {"pending": rows}
    assert server.asked.total() <= 16


def test_single_requests_that_are_refused_are_failures_of_theirs(server: Server, make_run: MakeRun) -> None:
    run = make_run(40)
    weather = [fake_server.fine, fake_server.status(403, "flagged"), fake_server.status(404, "no such image")]
    server.faults.extend(weather * 5 + [fake_server.status(403, "flagged")] * 12)
    report = send(run, server)
    assert verdicts(run) == {"answered": 18, "failed": 22}
    assert (report.sent, report.responses, report.passing) == (40, 40, 0)
    assert server.asked.total() == 40


def test_a_server_that_comes_back_with_another_model_gets_nothing(server: Server, make_run: MakeRun) -> None:
    run = make_run(100)
    server.faults.extend([fake_server.fine] * 30)

    def gone(handler: fake_server.Handler) -> bool:
        handler.server.models = ["another"]
        return fake_server.status(404, "the model m does not exist")(handler)

    server.always = gone
    with pytest.raises(EngineError, match=r"refuses all requests: status 404.*does not exist"):
        send(run, server)
    assert verdicts(run) == {"answered": 30, "pending": 70}


def test_a_redirect_is_told_before_anything_is_sent(server: Server, make_run: MakeRun) -> None:
    run = make_run(10)

    server.elsewhere = "http://127.0.0.1:9/v1/models?key=abc"
    with pytest.raises(EngineError, match=r"sends elsewhere \('http://127.0.0.1:9/v1/models'\)"):
        send(run, server)


# -- before anything is sent -----------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_server_is_told_before_anything_is_sent(
    server: Server, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    server.models = ["another", "third"]
    with pytest.raises(EngineError, match=r"does not serve 'm', but another, third"):
        send(run, server)
    server.models = ["m"]
    server.key = "secret-key-123"
    with pytest.raises(CredentialsError, match="asks for a key"):
        send(run, server)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-user-0000")
    with pytest.raises(CredentialsError, match="asks for a key"):
        send(run, server)  # the key of another provider goes nowhere by itself
    monkeypatch.setenv("MY_KEY", "wrong-key-0000")
    with pytest.raises(CredentialsError, match="does not take the key in MY_KEY") as caught:
        send(run, server, api_key_env="MY_KEY")
    assert "wrong-key" not in caught.value.message
    with pytest.raises(UsageError, match="not a URL"):
        submit(run, endpoints=["localhost:8000"])
    with pytest.raises(UsageError, match="twice"):
        submit(run, endpoints=[server.url, server.url + "/"])
    with pytest.raises(EngineError, match=r"no server answers: http://127\.0\.0\.1:9/v1"):
        submit(run, endpoints=["http://127.0.0.1:9"])
    for text in ("http://localhost:8000/v1?key=hidden", "http://localhost:8000/#hidden"):
        with pytest.raises(UsageError, match="a password or a query") as refused:
            submit(run, endpoints=[text])
        assert "hidden" not in refused.value.message
    for text in ("http://[::1", "http://localhost:99999"):
        with pytest.raises(UsageError, match="not a URL"):
            submit(run, endpoints=[text])
    wrong: dict[str, Any]
    for wrong in (
        {"concurrency": -1},
        {"concurrency": 2.5},
        {"requests_per_minute": 0.5},
        {"timeout": -1.0},
        {"timeout": float("inf")},
        {"rate_limit_delay": -1.0},
    ):
        with pytest.raises(UsageError, match="must"):
            send(run, server, **wrong)
    with pytest.raises(UsageError, match="no option 'concurency'"):
        send(run, server, concurency=1)
    assert not run.was_sent()
    monkeypatch.setenv("MY_KEY", "secret-key-123")
    assert send(run, server, api_key_env="MY_KEY").exit_code == 0


# -- kills -----------------------------------------------------------------------------------------------------------


def test_ten_kills_in_one_run_of_5000_rows(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"id": n, "question": f"q{n}"}) + "\n" for n in range(5000)))
    for name in ("run", "undisturbed"):
        prepare(tasks, tmp_path / name, model="m", backend="server", max_requests=600, workers=1)
    run = Run.open(tmp_path / "run")
    port = free_port()
    process = start_server(port, 0.002)
    url = f"http://127.0.0.1:{port}/v1"
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    try:
        kills = 0
        for _ in range(10):
            victim = subprocess.Popen(
                [sys.executable, "-m", "batchkit", "submit", run.path, "--endpoints", url],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT,
            )  # fmt: skip
            before = lines(run)
            end = time.monotonic() + 20
            while lines(run) < before + 250 and victim.poll() is None and time.monotonic() < end:
                time.sleep(0.005)
            victim.send_signal(signal.SIGKILL)
            kills += victim.wait() == -signal.SIGKILL
        assert kills == 10
        assert submit(run, endpoints=[url]).exit_code == 0
        assert submit(tmp_path / "undisturbed", endpoints=[url]).exit_code == 0
    finally:
        process.kill()
    assert_each_answered_by_its_own(run)
    assert lines(run) == 5000, "what was on the disk was not asked for again"
    results = []
    for name in ("run", "undisturbed"):
        merge(tmp_path / name)
        rows = [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_bytes().splitlines()]
        for row in rows:
            del row["batchkit"]["attempt"]
        results.append(rows)
    assert results[0] == results[1]
    assert len(results[0]) == 5000


def test_a_torn_last_line_is_cut_off(server: Server, make_run: MakeRun) -> None:
    run = make_run(10)
    send(run, server, limit=4)
    job = run.job(0)
    job.attempts[0].state = "running"  # as a kill leaves it
    job.attempts[0].rows = [(0, 10)]
    run.write_job(job)
    path = run.responses_path(0, 1)
    path.write_bytes(path.read_bytes()[:-20])
    report = send(run, server)
    assert (report.sent, report.exit_code) == (7, 0)
    assert_each_answered_by_its_own(run)


def test_a_full_disk_leaves_no_half_line_and_loses_nothing(
    server: Server, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(100)
    real, written = os.write, [0]

    def full(descriptor: int, data: bytes) -> int:
        if b'"custom_id"' not in data[:40] and written[0] < 8000:
            return real(descriptor, data)
        room = 8000 - written[0]
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(descriptor, data[:room])
        written[0] += count
        return count

    with monkeypatch.context() as patch:
        patch.setattr("batchkit.live.os.write", full)
        with pytest.raises(StorageError, match="No space left on device"):
            send(run, server)
    kept = lines(run)
    assert 0 < kept < 100
    assert verdicts(run) == {"answered": kept, "pending": 100 - kept}
    assert send(run, server).exit_code == 0
    assert_each_answered_by_its_own(run)
    assert lines(run) == 100


def test_a_key_that_a_server_quotes_is_not_written(
    server: Server, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(10)
    server.key = "secret-key-123"
    monkeypatch.setenv("MY_KEY", server.key)
    server.faults.extend([fake_server.status(400, f"your key {server.key} is old")] * 5)
    send(run, server, api_key_env="MY_KEY")
    merge(run)
    assert verdicts(run) == {"answered": 5, "failed": 5}
    for path in run.path.rglob("*"):
        assert path.is_dir() or b"secret-key" not in path.read_bytes(), path
    with pytest.raises(UsageError) as caught:
        submit(run, endpoints=["http://user:hidden@localhost:8000"])
    assert "hidden" not in caught.value.message


def test_ctrl_c_keeps_what_came(server: Server, make_run: MakeRun) -> None:
    run = make_run(400)
    server.delay = 0.01
    with pytest.raises(KeyboardInterrupt):
        stop_after(0.3, lambda: send(run, server))
    kept = lines(run)
    assert 0 < kept < 400
    assert verdicts(run) == {"answered": kept, "pending": 400 - kept}
    assert send(run, server).exit_code == 0
    assert lines(run) == 400


# -- finishing what another backend left -----------------------------------------------------------------------------


def test_a_run_whose_batch_expired_is_finished_by_a_server(
    server: Server, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_submission, "PACE", Pace(poll=0.01, adopt=1.0, settle=0.3, tokens=0.02))
    run = make_run(20, shard=10)
    with fake_provider.running() as provider:
        monkeypatch.setenv("OPENAI_API_KEY", provider.key)
        provider.endings.extend(["expired:4", "completed"])
        provider.answer = lambda custom_id, question, tries: (200, f"answer to {question}")
        submit(run, backend="openai", base_url=f"{provider.url}/v1", attempts=1)
    assert verdicts(run) == {"answered": 14, "expired": 6}
    assert send(run, server).exit_code == 0
    assert server.answered.total() == 6
    merge(run)
    rows = [json.loads(line) for line in (run.path / "results.jsonl").read_bytes().splitlines()]
    assert Counter(row["batchkit"]["backend"] for row in rows) == {"openai": 14, "server": 6}
    assert_each_answered_by_its_own(run)


def test_the_same_rows_give_the_same_results_whoever_answers(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run each through vLLM's batch runner (a fake of it), a batch service and a live server, of one stub model."""
    from tests.test_submission import Fake, install_fake

    monkeypatch.setattr(batch_submission, "PACE", Pace(poll=0.01, adopt=1.0, settle=0.3, tokens=0.02))
    install_fake(monkeypatch)
    Fake(tmp_path, monkeypatch).set(echo="question")
    tasks = tmp_path / "tasks.jsonl"
    rows = [json.dumps({"id": n, "question": f"q{n}"}) if n != 77 else "{" for n in range(400)]
    tasks.write_text("\n".join(rows) + "\n")
    results: dict[str, list[dict[str, Any]]] = {}
    with fake_provider.running() as provider:
        monkeypatch.setenv("OPENAI_API_KEY", provider.key)
        provider.answer = lambda custom_id, question, tries: (200, f"answer to {question}")
        options: dict[str, dict[str, Any]] = {
            "vllm": {}, "server": {"endpoints": [server.url]}, "openai": {"base_url": f"{provider.url}/v1"},
        }  # fmt: skip
        for backend, keywords in options.items():
            run = tmp_path / backend
            prepare(tasks, run, model="m", max_requests=150, workers=1)
            assert submit(run, backend=backend, **keywords).exit_code == 3, "a row was rejected"
            merge(run)
            results[backend] = [json.loads(line) for line in (run / "results.jsonl").read_bytes().splitlines()]
    for rows_of in results.values():
        assert len(rows_of) == 400
        for row in rows_of:
            for name in ("backend", "usage"):  # the fake engine counts no tokens
                del row["batchkit"][name]
            row.pop("model")
    assert results["vllm"] == results["server"] == results["openai"]


# -- vLLM's own servers, where something breaks that is not theirs ----------------------------------------------------


def test_a_watcher_that_breaks_ends_the_submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        url, starts, ready, stage = "http://127.0.0.1:9/v1", 0, True, "serving"

        def __init__(self, *_: Any) -> None:
            self.looks = 0

        def start(self) -> None:
            self.starts += 1

        def look(self, *_: float) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def stop(self) -> None:
            self.starts = 0

    class Runner:
        replicas, notes = 1, ()

    monkeypatch.setattr(serving, "Served", Broken)
    monkeypatch.setattr(serving, "LOOK_SECONDS", 0.01)
    servers = serving.Serving(Runner(), tmp_path / "servers", Silent())  # type: ignore[arg-type]
    with servers.running():
        end = time.monotonic() + 5
        while servers.error is None and time.monotonic() < end:
            time.sleep(0.01)
        with pytest.raises(EngineError, match="No space left on device"):
            servers.check()
    assert not any(thread.name == "batchkit-servers" for thread in threading.enumerate())
