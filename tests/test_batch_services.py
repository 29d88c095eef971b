"""submit at batch services: every request paid for once, every paid answer kept, whatever goes wrong on the way."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchkit import cancelling, outcomes
from batchkit.backends import openai as openai_backend
from batchkit.errors import CredentialsError, RunBusyError, RunError, ServiceError, UsageError
from batchkit.merging import merge
from batchkit.preparation import prepare
from batchkit.reports import SubmitReport
from batchkit.responses import Verdict
from batchkit.runs import Run
from batchkit.submission import discard, submit
from tests import fake_provider
from tests.fake_provider import Provider

BACKENDS = ("openai", "gemini")


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run of `count` rows, prepared for real, 10 requests a shard; rows in `bad` are rejected."""

    def make(count: int = 30, *, backend: str = "openai", bad: tuple[int, ...] = (), name: str = "run") -> Run:
        tasks = tmp_path / "tasks.jsonl"
        rows = [json.dumps({"id": n, "question": f"{n}?"}) if n not in bad else "{" for n in range(count)]
        tasks.write_text("\n".join(rows) + "\n")
        model = "gemini-2.5-flash" if backend == "gemini" else "m"
        options: Any = {"model": model, "backend": backend, "max_requests": 10}
        prepare(tasks, tmp_path / name, workers=1, **options)
        return Run.open(tmp_path / name)

    return make


def send(run: Run, provider: Provider, **options: Any) -> SubmitReport:
    url = provider.url if run.manifest.backend == "gemini" else f"{provider.url}/v1"
    return submit(run, **{"base_url": url, **options})


def verdicts(run: Run) -> Counter[str]:
    return Counter(str(outcome.verdict) for seal in run.seals() for outcome in outcomes.load(run, seal).outcomes)


def ids_of(run: Run) -> list[str]:
    return [custom_id for seal in run.seals() for custom_id in run.read_ids(seal)]


def states(run: Run) -> Counter[str]:
    return Counter(attempt.state for seal in run.seals() for attempt in run.job(seal.shard).attempts)


def assert_paid_once(run: Run, provider: Provider) -> None:
    """Each request was accepted for payment once, and its answer is its row's."""
    assert provider.paid == Counter(ids_of(run))
    for seal in run.seals():
        found = outcomes.load(run, seal)
        assert not found.unexpected
        for outcome in found.outcomes:
            assert outcome.response is not None
            assert outcome.response.answer == f"answer to {outcome.custom_id}"


# -- what every service does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_are_answered_and_paid_for_once(backend: str, provider: Provider, make_run: MakeRun) -> None:
    run = make_run(backend=backend)
    report = send(run, provider)
    assert (report.sent, report.responses, report.remaining, report.unanswered) == (30, 30, 0, 0)
    assert report.exit_code == 0
    assert_paid_once(run, provider)
    assert states(run) == {"collected": 3}
    assert not list((run.path / "uploads").iterdir())
    assert not list((run.path / "downloads").iterdir())
    again = send(run, provider)
    assert (again.sent, again.exit_code) == (0, 0)
    assert provider.calls["create"] == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_lasting_failures_stay_and_passing_ones_go_again(backend: str, provider: Provider, make_run: MakeRun) -> None:
    run = make_run(backend=backend, bad=(7,))
    ids = ids_of(run)

    def answer(custom_id: str, question: str, tries: int) -> tuple[int, str]:
        if custom_id == ids[3]:
            return 400, "content policy"
        if custom_id == ids[12] and tries < 3:
            return 429, "slow down"
        if custom_id == ids[25]:
            return 503, "never"
        return 200, f"answer to {custom_id}"

    provider.answer = answer
    report = send(run, provider)
    assert verdicts(run) == {"answered": 27, "failed": 2, "rejected": 1}
    assert (provider.seen[ids[3]], provider.seen[ids[12]], provider.seen[ids[25]]) == (1, 3, 3)
    assert report.exit_code == 3
    assert send(run, provider).sent == 0, "three attempts were all"


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_expired_goes_again_and_what_was_run_is_kept(backend: str, provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10, backend=backend)
    provider.endings.extend(["expired:4", "expired:2", "completed"])
    report = send(run, provider)
    assert report.exit_code == 0
    if backend == "openai":
        assert_paid_once(run, provider)
        sizes = [batch["total"] for batch in provider.batches.values()]
        assert sizes == [10, 6, 4]
    else:  # a Gemini job that expires gives nothing back
        assert verdicts(run) == {"answered": 10}
        assert [batch["total"] for batch in provider.batches.values()] == [10, 10, 10]


@pytest.mark.parametrize("backend", BACKENDS)
def test_attempts_bound_how_often_an_expired_request_is_sent(
    backend: str, provider: Provider, make_run: MakeRun
) -> None:
    run = make_run(10, backend=backend)
    provider.endings.extend(["expired:0"] * 9)
    report = send(run, provider, attempts=2)
    assert verdicts(run) == {"expired": 10}
    assert len(provider.batches) == 2
    assert report.exit_code == 3
    assert send(run, provider, attempts=3).sent == 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_wait_hands_over_and_comes_back_for_it(backend: str, provider: Provider, make_run: MakeRun) -> None:
    provider.polls = 2
    run = make_run(backend=backend)
    first = send(run, provider, wait=False)
    assert (first.sent, first.in_flight, first.exit_code) == (30, 30, 8)
    assert verdicts(run) == {"pending": 30}
    second = send(run, provider, wait=False)
    assert (second.sent, second.in_flight, second.exit_code) == (0, 30, 8)
    codes = [submit(run, wait=False).exit_code for _ in range(3)]
    assert codes[-1] == 0, "the base URL is remembered"
    assert_paid_once(run, provider)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shuffled_output_with_duplicate_lines(backend: str, provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10, backend=backend)

    def shuffle(lines: list[bytes]) -> list[bytes]:
        lines = [*lines, lines[0], lines[5]]
        random.Random(1).shuffle(lines)
        return lines

    provider.changes.append(shuffle)
    report = send(run, provider)
    assert (report.responses, report.exit_code) == (10, 0)
    assert_paid_once(run, provider)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_that_is_shorter_than_the_counts_is_looked_at_again(
    backend: str, provider: Provider, make_run: MakeRun
) -> None:
    run = make_run(10, backend=backend)

    def shorten(lines: list[bytes]) -> list[bytes]:
        return lines[:7]

    provider.changes.append(shorten)
    said: list[str] = []
    report = send(run, provider, progress=Listener(said))
    assert provider.calls["download"] > 1
    assert verdicts(run) == {"answered": 7, "pending": 3}
    assert (report.in_flight, report.exit_code, list(report.troubled)) == (3, 8, ["00000.1"])
    assert any("7 responses came of 10" in line for line in said)
    again = send(run, provider)
    assert list(again.troubled) == ["00000.1"]
    assert provider.calls["create"] == 1, "what was paid for is not paid for again by itself"
    assert send(run, provider, resend=["00000.1"]).exit_code == 0
    assert provider.calls["create"] == 2
    assert verdicts(run) == {"answered": 10}


@pytest.mark.parametrize("backend", BACKENDS)
def test_files_that_come_late_are_waited_for(backend: str, provider: Provider, make_run: MakeRun) -> None:
    provider.late_files = 3
    run = make_run(backend=backend)
    assert send(run, provider).exit_code == 0
    assert_paid_once(run, provider)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_that_was_cancelled_from_outside_is_collected_and_not_sent_again_at_once(
    backend: str, provider: Provider, make_run: MakeRun
) -> None:
    run = make_run(10, backend=backend)
    provider.endings.append("cancelled:6")
    report = send(run, provider)
    assert verdicts(run) == {"answered": 6, "expired": 4}
    assert (report.remaining, report.exit_code) == (4, 8)
    assert send(run, provider).exit_code == 0
    assert_paid_once(run, provider)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", ["upload", "check", "download"])
@pytest.mark.parametrize(
    "fault", [fake_provider.status(500), fake_provider.status(429), fake_provider.drop_before, fake_provider.cut]
)
def test_a_call_that_costs_nothing_is_repeated(
    backend: str, operation: str, fault: fake_provider.Fault, provider: Provider, make_run: MakeRun
) -> None:
    run = make_run(10, backend=backend)
    provider.faults[operation].extend([fault, fault])
    assert send(run, provider).exit_code == 0
    assert provider.calls["create"] == 1
    assert_paid_once(run, provider)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("fault", [fake_provider.drop_after, fake_provider.fail_after(500), fake_provider.cut])
def test_a_create_whose_answer_is_lost_is_looked_for_and_adopted(
    backend: str, lag: int, fault: fake_provider.Fault, provider: Provider, make_run: MakeRun
) -> None:
    provider.list_lag = lag
    run = make_run(backend=backend)
    provider.faults["create"].append(fault)
    said: list[str] = []
    report = send(run, provider, progress=Listener(said))
    assert report.exit_code == 0
    assert provider.calls["create"] == 3
    assert any("adopted" in line for line in said)
    assert_paid_once(run, provider)


def test_a_create_that_times_out_after_it_was_accepted_is_adopted(
    provider: Provider, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_backend, "TIMEOUT", 0.3)
    run = make_run(10)
    provider.faults["create"].append(fake_provider.stall_after(1.0))
    assert send(run, provider).exit_code == 0
    assert provider.calls["create"] == 1
    assert_paid_once(run, provider)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_create_that_went_astray_is_doubtful_and_blocks_only_its_shard(
    backend: str, provider: Provider, make_run: MakeRun
) -> None:
    run = make_run(backend=backend)
    provider.faults["create"].append(fake_provider.status(500))
    report = send(run, provider)
    assert report.doubtful == ["00000.1"]
    assert verdicts(run) == {"pending": 10, "answered": 20}
    assert report.exit_code == 8
    assert send(run, provider).doubtful == ["00000.1"], "and nothing is sent again"
    assert provider.calls["create"] == 3
    assert send(run, provider, resend=["00000.1"]).exit_code == 0
    assert_paid_once(run, provider)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_doubtful_batch_that_the_user_finds_is_adopted(backend: str, provider: Provider, make_run: MakeRun) -> None:
    provider.list_lag = 1_000_000
    run = make_run(10, backend=backend)
    provider.faults["create"].append(fake_provider.drop_after)
    assert send(run, provider).doubtful == ["00000.1"]
    (batch_id,) = provider.batches
    name = f"batches/{batch_id}" if backend == "gemini" else batch_id
    with pytest.raises(UsageError, match=r"--adopt 00000\.1=batches/nope"):
        send(run, provider, adopt=["00000.1=batches/nope"])
    with pytest.raises(UsageError, match="no such attempt"):
        send(run, provider, adopt=[f"00009.1={name}"])
    assert send(run, provider, adopt=[f"00000.1={name}"]).exit_code == 0
    assert_paid_once(run, provider)
    with pytest.raises(UsageError, match="is not doubtful"):
        send(run, provider, resend=["00000.1"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_storm_of_rate_limits_delays_the_create_and_costs_nothing(
    backend: str, provider: Provider, make_run: MakeRun
) -> None:
    run = make_run(backend=backend)
    provider.faults["create"].extend([fake_provider.status(429)] * 4)
    report = send(run, provider)
    assert report.exit_code == 0
    assert provider.calls["create"] == 7
    assert_paid_once(run, provider)


@pytest.mark.parametrize("backend", BACKENDS)
def test_delete_remote_removes_the_files_after_they_were_collected(
    backend: str, provider: Provider, make_run: MakeRun
) -> None:
    run = make_run(10, backend=backend)
    provider.answer = lambda custom_id, question, tries: (400, "no") if custom_id[0] == "3" else (200, "yes")
    assert send(run, provider, delete_remote=True).exit_code == 3
    assert provider.files == {}
    (attempt,) = run.job(0).attempts
    assert attempt.remote is not None
    assert attempt.remote.deleted
    assert verdicts(run) == {"answered": 9, "failed": 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_delete_remote_nothing_is_removed(backend: str, provider: Provider, make_run: MakeRun) -> None:
    send(make_run(10, backend=backend), provider)
    assert provider.deleted == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_cancel_keeps_what_is_finished(backend: str, provider: Provider, make_run: MakeRun) -> None:
    provider.polls = 1_000_000
    run = make_run(backend=backend)
    provider.endings.extend(["completed", "cancelled:4", "completed"])
    send(run, provider, wait=False)
    for batch in list(provider.batches.values())[1:2]:
        batch["polls"] = 0
    report = cancelling.cancel(run)
    assert (report.cancelled, report.ended, report.collected, report.in_flight) == (2, 1, 24, 0)
    assert verdicts(run) == {"answered": 24, "expired": 6}
    provider.polls = 0
    assert send(run, provider).exit_code == 0
    assert_paid_once(run, provider)


class Listener:
    """A progress that keeps what is said."""

    def __init__(self, said: list[str]) -> None:
        self.said = said
        self.boards: list[Any] = []

    def update(self, done: int = 1, *, note: str | None = None) -> None:
        pass

    def grow(self, total: int) -> None:
        pass

    def say(self, message: str) -> None:
        self.said.append(message)

    def board(self, rows: Any) -> None:
        self.boards.append(list(rows))


# -- what is OpenAI's ------------------------------------------------------------------------------------------------


def test_the_token_limit_makes_a_shard_wait_for_its_turn(provider: Provider, make_run: MakeRun) -> None:
    run = make_run()
    provider.polls = 3
    provider.endings.extend(["completed", "token-limit", "token-limit", "token-limit"])
    said: list[str] = []
    report = send(run, provider, progress=Listener(said))
    assert report.exit_code == 0
    assert len(provider.accepted) == 3
    assert sum("waits for its turn" in line for line in said) == 3
    assert provider.calls["upload"] == 3, "what is uploaded is not uploaded again"
    assert_paid_once(run, provider)


def test_a_shard_that_never_fits_the_queue_of_tokens_is_cut_in_two(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10)
    provider.endings.extend(["token-limit"] * 4)
    assert send(run, provider).exit_code == 0
    assert [batch["total"] for batch in provider.accepted] == [5, 5]
    assert_paid_once(run, provider)


def test_a_batch_that_fails_validation_sets_its_bad_rows_aside(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(12, bad=(1,))
    provider.endings.extend(["invalid:2,5", "completed"])
    report = send(run, provider)
    found = {outcome.custom_id: outcome for seal in run.seals() for outcome in outcomes.load(run, seal).outcomes}
    ids = ids_of(run)
    failed = [ids.index(custom_id) for custom_id, outcome in found.items() if outcome.verdict == Verdict.FAILED]
    assert failed == [2, 5], "row 1 was rejected: lines 2 and 5 are rows 2 and 5"
    assert found[ids[2]].message == "refused by the provider: bad line 2"
    assert verdicts(run) == {"answered": 9, "failed": 2, "rejected": 1}
    assert report.exit_code == 3
    assert all(count == 1 for count in provider.paid.values())
    assert send(run, provider).sent == 0, "what is wrong with them lasts"


def test_a_batch_that_is_refused_whole_stops_the_sending(provider: Provider, make_run: MakeRun) -> None:
    run = make_run()
    provider.endings.extend(["invalid"] * 9)
    provider.polls = 0
    with pytest.raises(ServiceError, match="shard 0, attempt 1: refused by the provider: bad line None") as caught:
        send(run, provider, max_active=1)
    assert "nothing of it was run" in (caught.value.hint or "")
    assert provider.calls["create"] == 3, "three shards may be at fault themselves, then it is something else"
    provider.endings.clear()
    assert send(run, provider).exit_code == 0, "mended, it goes on"
    assert_paid_once(run, provider)


def test_an_upload_that_is_too_large_is_cut_smaller(provider: Provider, make_run: MakeRun) -> None:
    run = make_run()
    provider.faults["upload"].append(fake_provider.status(413, "too large"))
    assert send(run, provider).exit_code == 0
    assert [batch["total"] for batch in provider.accepted[:2]] == [5, 5]
    assert_paid_once(run, provider)


def test_max_active_bounds_the_batches_under_way(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(60)
    provider.polls = 3
    listener = Listener([])
    assert send(run, provider, max_active=2, progress=listener).exit_code == 0
    assert max(map(len, listener.boards)) == 2
    assert_paid_once(run, provider)


def test_the_key_is_checked_before_anything_is_uploaded(
    provider: Provider, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-key-000000")
    with pytest.raises(CredentialsError, match="does not take the key in OPENAI_API_KEY") as caught:
        send(run, provider)
    assert "sk-wrong" not in caught.value.message
    assert caught.value.exit_code == 4
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(CredentialsError, match="OPENAI_API_KEY is not set"):
        send(run, provider)
    assert provider.calls["upload"] == 0
    assert not run.was_sent()


def test_a_key_that_is_revoked_in_the_middle_loses_nothing(provider: Provider, make_run: MakeRun) -> None:
    run = make_run()
    provider.faults["create"].append(fake_provider.status(401, "revoked"))
    with pytest.raises(CredentialsError):
        send(run, provider)
    assert send(run, provider).exit_code == 0
    assert_paid_once(run, provider)


def test_a_server_that_is_no_batch_service_is_named(make_run: MakeRun, provider: Provider) -> None:
    run = make_run()
    with pytest.raises(ServiceError, match="is no batch service"):
        submit(run, base_url=f"{provider.url}/nowhere")
    with pytest.raises(ServiceError, match="cannot be reached"):
        submit(run, base_url="http://127.0.0.1:9/v1")
    with pytest.raises(UsageError, match="not a URL"):
        submit(run, base_url="api.example.com")
    assert not run.was_sent()


def test_two_submits_at_once_the_second_is_refused(provider: Provider, make_run: MakeRun) -> None:
    run = make_run()
    seen: list[Exception] = []

    def submit_again() -> None:
        try:
            send(Run.open(run.path), provider)
        except RunBusyError as exc:
            seen.append(exc)

    provider.faults["create"].append(fake_provider.call(submit_again))
    assert send(run, provider).exit_code == 0
    assert "the lease of submit is held by process" in str(seen[0])
    assert_paid_once(run, provider)


def test_no_resume_is_refused_while_batches_are_under_way(provider: Provider, make_run: MakeRun) -> None:
    provider.polls = 1_000_000
    run = make_run(10)
    send(run, provider, wait=False)
    with pytest.raises(RunError, match="1 batch under way at a provider would be paid for in vain"):
        discard(run)


def test_a_run_that_was_prepared_for_vllm_is_cut_to_the_limits_of_the_service(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from batchkit import limits

    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"id": n, "question": f"{n}?"}) + "\n" for n in range(10)))
    prepare(tasks, tmp_path / "run", model="m", workers=1)
    small = replace(limits.HOSTS["openai"], limits=replace(limits.HOSTS["openai"].limits, max_requests=4))
    monkeypatch.setitem(limits.HOSTS, "openai", small)
    run = Run.open(tmp_path / "run")
    assert submit(run, backend="openai", base_url=f"{provider.url}/v1").exit_code == 0
    assert [batch["total"] for batch in provider.accepted] == [4, 4, 2]
    assert_paid_once(run, provider)


def test_rows_in_batch_format_go_to_one_endpoint_a_batch(provider: Provider, tmp_path: Path) -> None:
    def line(number: int) -> dict[str, Any]:
        chat = number % 2 == 0
        messages = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
        return {
            "custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions" if chat else "/v1/responses",
            "body": messages if chat else {"model": "m", "input": "?", "messages": messages["messages"]},
        }  # fmt: skip

    tasks = tmp_path / "batch.jsonl"
    tasks.write_text("".join(json.dumps(line(number)) + "\n" for number in range(8)))
    prepare(tasks, tmp_path / "run", backend="openai", workers=1)
    run = Run.open(tmp_path / "run")
    assert send(run, provider).exit_code == 0
    assert Counter((batch["endpoint"], batch["total"]) for batch in provider.accepted) == {
        ("/v1/chat/completions", 4): 1,
        ("/v1/responses", 4): 1,
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_whose_requests_all_failed_has_no_output_file(
    backend: str, provider: Provider, make_run: MakeRun
) -> None:
    run = make_run(10, backend=backend)
    provider.answer = lambda custom_id, question, tries: (400, "content policy")
    assert send(run, provider).exit_code == 3
    assert verdicts(run) == {"failed": 10}
    assert provider.calls["create"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stormy_night(backend: str, provider: Provider, make_run: MakeRun) -> None:
    """Half of all calls fail, in every way; creates are refused for now, or done and not answered."""
    weather = random.Random(backend)
    run = make_run(60, backend=backend)
    passing = [fake_provider.status(429), fake_provider.status(503), fake_provider.drop_before, fake_provider.cut]
    done_unseen = [fake_provider.drop_after, fake_provider.fail_after(502), fake_provider.status(429)]
    for operation in ("upload", "check", "download"):
        provider.faults[operation].extend(weather.choice([*passing, *[fake_provider.fine] * 4]) for _ in range(24))
    provider.faults["create"].extend(weather.choice([*done_unseen, *[fake_provider.fine] * 3]) for _ in range(10))
    provider.polls, provider.list_lag = 3, 1
    report = send(run, provider)
    assert (report.exit_code, report.doubtful) == (0, [])
    assert_paid_once(run, provider)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_create_that_is_answered_with_nonsense_is_in_doubt(
    backend: str, provider: Provider, make_run: MakeRun
) -> None:
    run = make_run(10, backend=backend)
    provider.faults["create"].append(fake_provider.nonsense_after)
    assert send(run, provider).exit_code == 0
    assert provider.calls["create"] == 1
    assert_paid_once(run, provider)


def test_a_provider_that_only_fails_to_create_is_left_alone_after_a_few(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(60)
    provider.faults["create"].extend([fake_provider.status(500)] * 60)
    with pytest.raises(ServiceError, match="3 batches in a row could not be created for certain"):
        send(run, provider)
    assert provider.calls["create"] == 3
    assert states(run) == {"doubtful": 3}


# -- what is Gemini's ------------------------------------------------------------------------------------------------


def test_gemini_safety_blocks_are_refusals_with_their_reason(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(3, backend="gemini")
    provider.answer = lambda custom_id, question, tries: (
        200,
        "BLOCK:PROHIBITED_CONTENT" if custom_id[0] == "1" else "y",
    )
    assert send(run, provider).exit_code == 0
    assert verdicts(run) == {"answered": 2, "refused": 1}
    merge(run)
    rows = [json.loads(line) for line in (run.path / "results.jsonl").read_text().splitlines()]
    assert "PROHIBITED_CONTENT" in rows[1]["error"]


def test_gemini_states_under_both_spellings_and_unknown_ones(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(30, backend="gemini")
    provider.polls = 2 * len(fake_provider.RUNNING) + 1
    listener = Listener([])
    assert send(run, provider, progress=listener).exit_code == 0
    seen = {row.state for board in listener.boards for row in board}
    assert seen >= {word.lower() for word in fake_provider.RUNNING}
    assert_paid_once(run, provider)


def test_gemini_partial_success_keeps_what_there_is(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10, backend="gemini")
    provider.endings.append("partial:6")
    report = send(run, provider)
    assert verdicts(run) == {"answered": 6, "missing": 4}
    assert report.remaining == 4
    assert send(run, provider).exit_code == 0
    assert_paid_once(run, provider)


def test_gemini_jobs_that_fail_are_told_with_their_reason(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10, backend="gemini")
    provider.endings.append("failed")
    with pytest.raises(ServiceError, match="the job failed"):
        send(run, provider)
    assert verdicts(run) == {"pending": 10}
    assert send(run, provider).exit_code == 0


def test_options_that_gemini_lacks_are_refused_at_prepare_by_name(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"id": 1, "question": "?"}\n')
    extra = {"logit_bias": {"1": 2}}
    with pytest.raises(UsageError, match=r"body\.logit_bias"):
        prepare(tasks, tmp_path / "run", model="gemini-2.5-flash", backend="gemini", extra_body=extra)
    assert not (tmp_path / "run").exists()


def test_rows_in_batch_format_that_gemini_cannot_take_are_rejected_one_by_one(tmp_path: Path) -> None:
    def row(number: int) -> str:
        body = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": "?"}]}
        body |= {"user": "x"} if number == 1 else {}
        return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body})

    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("\n".join(map(row, range(3))) + "\n")
    report = prepare(tasks, tmp_path / "run", backend="gemini", workers=1)
    assert (report.requests, report.rejected) == (2, 1)
    assert "body.user" in report.first_rejections[0]
