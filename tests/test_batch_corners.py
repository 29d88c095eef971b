"""Corners of batch services in which money could be lost or a run could hang: each was found by trying to break it."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest

from batchkit import cancelling, outcomes, watches
from batchkit.backends import gemini as gemini_backend
from batchkit.backends import openai as openai_backend
from batchkit.errors import CredentialsError, ServiceError, UsageError
from batchkit.responses import Verdict
from batchkit.runs import Run
from batchkit.submission import submit
from tests import fake_provider
from tests.fake_provider import Provider
from tests.test_batch_services import (
    BACKENDS,
    Listener,
    MakeRun,
    assert_paid_once,
    ids_of,
    make_run,
    send,
    states,
    verdicts,
)

__all__ = ["make_run"]  # a fixture


# -- what is paid for is collected -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ending", ["completed", "cancelled:4", "expired:4", "partial:6"])
def test_files_that_come_late_are_waited_for_in_every_end_state(
    backend: str, ending: str, provider: Provider, make_run: MakeRun
) -> None:
    if backend == "gemini" and ending.startswith("expired"):
        pytest.skip("such a job gives nothing back")
    if backend == "openai" and ending.startswith("partial"):
        pytest.skip("OpenAI has no such state")
    provider.late_files = 3
    run = make_run(10, backend=backend)
    provider.endings.append(ending)
    for _ in range(3):
        if send(run, provider).exit_code == 0:
            break
    assert_paid_once(run, provider)


@pytest.mark.parametrize("ending", ["completed", "cancelled:4"])
def test_a_host_that_does_not_count_is_not_believed_to_have_nothing(
    ending: str, provider: Provider, make_run: MakeRun
) -> None:
    provider.counts, provider.late_files = False, 3
    run = make_run(10)
    provider.endings.append(ending)
    send(run, provider)
    assert send(run, provider).exit_code == 0
    assert_paid_once(run, provider)


def test_a_proxy_that_gives_pages_for_files_costs_nothing(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10)
    provider.faults["download"].extend([fake_provider.nonsense_after] * 60)
    report = send(run, provider)
    assert "0 responses came of 10" in report.troubled["00000.1"]
    provider.faults.clear()
    assert send(run, provider).exit_code == 0
    assert_paid_once(run, provider)


def test_foreign_lines_do_not_count_as_ours(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10)
    foreign = (b'"custom_id": "', b'"custom_id": "x')
    provider.changes.append(lambda lines: [*lines[:7], *(line.replace(*foreign) for line in lines[7:])])
    report = send(run, provider, delete_remote=True)
    assert report.responses == 0
    assert list(report.troubled) == ["00000.1"]
    assert provider.deleted == [], "what is not collected whole is not removed"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_is_gone_troubles_one_shard_until_the_user_gives_it_up(
    backend: str, provider: Provider, make_run: MakeRun
) -> None:
    run = make_run(30, backend=backend)
    provider.faults["download"].extend([fake_provider.status(403 if backend == "gemini" else 404, "gone")] * 200)
    provider.faults["download"].rotate()
    report = send(run, provider, max_active=1)
    assert len(report.troubled) == 3
    provider.faults.clear()
    (batch, *_) = provider.batches.values()
    del provider.files[batch["output"]]
    report = send(run, provider)
    assert verdicts(run) == {"answered": 20, "pending": 10}
    (name,) = report.troubled
    assert send(run, provider, resend=[name]).exit_code == 0
    assert provider.paid.total() == 40


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_that_the_provider_has_forgotten_can_be_given_up(
    backend: str, provider: Provider, make_run: MakeRun
) -> None:
    run = make_run(10, backend=backend)
    provider.polls = 1000
    send(run, provider, wait=False)
    provider.batches.clear()
    provider.polls = 0
    report = send(run, provider)
    assert list(report.troubled) == ["00000.1"]
    assert send(run, provider, resend=["00000.1"]).exit_code == 0


# -- create is called once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "fault", [fake_provider.fail_after(500), fake_provider.fail_after(409), fake_provider.fail_after(408),
              fake_provider.drop_after],
    ids=["500", "409", "408", "drop"],
)  # fmt: skip
def test_the_sdk_does_not_repeat_a_create_of_its_own(
    backend: str, fault: Any, provider: Provider, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_backend, "RETRIES", 4)  # as for users
    monkeypatch.setattr(gemini_backend, "RETRIES", 5)
    run = make_run(10, backend=backend)
    provider.faults["create"].append(fault)
    assert send(run, provider).exit_code == 0
    assert provider.calls["create"] == 1
    assert_paid_once(run, provider)


def test_a_host_that_keeps_no_metadata_is_asked_for_the_file(provider: Provider, make_run: MakeRun) -> None:
    provider.keeps_metadata = False
    run = make_run()
    provider.faults["create"].append(fake_provider.drop_after)
    assert send(run, provider).exit_code == 0
    assert_paid_once(run, provider)


def test_a_batch_that_waited_for_tokens_is_not_taken_for_the_next_one(provider: Provider, make_run: MakeRun) -> None:
    """The same file, no metadata: the first batch of it failed, and must not be adopted for the second."""
    provider.keeps_metadata = False
    run = make_run(10)
    provider.endings.extend(["token-limit", "completed"])
    provider.faults["create"].extend([fake_provider.fine, fake_provider.drop_after])
    assert send(run, provider).exit_code == 0
    assert [batch["ending"] for batch in provider.batches.values()] == ["token-limit", "completed"]
    assert_paid_once(run, provider)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_found_on_a_later_page(backend: str, provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10, backend=backend)
    provider.page = 2
    provider.faults["create"].append(fake_provider.drop_after)

    def crowd() -> None:
        (ours,) = provider.batches.values()
        for number in range(5):  # created since, so they come first
            other = {**ours, "id": f"batch_0{number}", "metadata": {}, "display": f"other {number}", "file": "file-x"}
            provider.batches[other["id"]] = other

    provider.faults["list"].extend([fake_provider.fine, fake_provider.call(crowd)])
    assert send(run, provider).exit_code == 0
    assert provider.paid == Counter(ids_of(run))


def test_an_upload_of_which_half_arrived_is_repeated(provider: Provider, make_run: MakeRun) -> None:
    provider.short_uploads = 1
    run = make_run(10)
    assert send(run, provider).exit_code == 0
    assert (provider.calls["upload"], provider.calls["create"]) == (2, 1)


def test_a_list_that_cannot_be_read_does_not_hold_up_the_others_for_ever(
    provider: Provider, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watches, "ADOPT_LOOKS", 1)
    run = make_run()
    provider.faults["create"].append(fake_provider.status(500))
    provider.faults["list"].append(fake_provider.fine)
    provider.faults["list"].extend([fake_provider.nonsense_after] * 10_000)
    report = send(run, provider)
    assert report.doubtful == ["00000.1"]
    assert verdicts(run) == {"pending": 10, "answered": 20}
    provider.faults["list"].clear()
    provider.faults["list"].extend([fake_provider.fine, fake_provider.nonsense_after])
    with pytest.raises(UsageError, match="the provider's list cannot be read now"):
        send(run, provider, resend=["00000.1"])


# -- what the user decides is checked --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_resend_looks_once_more_before_it_pays_again(backend: str, provider: Provider, make_run: MakeRun) -> None:
    provider.list_lag = 1_000_000
    run = make_run(10, backend=backend)
    provider.faults["create"].append(fake_provider.drop_after)
    assert send(run, provider).doubtful == ["00000.1"]
    for batch in provider.batches.values():
        batch["hidden"] = 0
    said: list[str] = []
    assert send(run, provider, resend=["00000.1"], progress=Listener(said)).exit_code == 0
    assert any("after all, and adopted it" in line for line in said)
    assert_paid_once(run, provider)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adopt_takes_no_batch_of_another_attempt(backend: str, provider: Provider, make_run: MakeRun) -> None:
    run = make_run(20, backend=backend)
    other = make_run(10, backend=backend, name="other")
    provider.faults["create"].append(fake_provider.status(500))
    assert send(run, provider).doubtful == ["00000.1"]
    send(other, provider)
    prefix = "batches/" if backend == "gemini" else ""
    ours, theirs = (prefix + name for name in provider.batches)
    with pytest.raises(UsageError, match=r"that is the batch of attempt 00001\.1"):
        send(run, provider, adopt=[f"00000.1={ours}"])
    with pytest.raises(UsageError, match="was created for something else"):
        send(run, provider, adopt=[f"00000.1={theirs}"])


# -- cancel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", ["upload", "create"])
def test_a_cancel_that_comes_while_a_batch_is_being_made_ends_it(
    backend: str, operation: str, provider: Provider, make_run: MakeRun
) -> None:
    provider.polls = 1_000_000
    run = make_run(backend=backend)
    provider.faults[operation].append(fake_provider.call(Run.open(run.path).cancel))
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(send(run, provider)))
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert len(provider.batches) == (0 if operation == "upload" else 1)
    assert all(batch["cancelled"] for batch in provider.batches.values())
    assert done[0].exit_code == 8
    assert set(states(run)) <= {"collected", "refused"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_cancel_ends_a_batch_that_a_crash_left_in_doubt(backend: str, provider: Provider, make_run: MakeRun) -> None:
    provider.polls = 1_000_000
    run = make_run(10, backend=backend)
    provider.faults["create"].append(fake_provider.drop_after)
    provider.list_lag = 1
    send(run, provider, wait=False)
    assert states(run) == {"creating": 1}
    cancelling.cancel(run)
    assert all(batch["cancelled"] for batch in provider.batches.values())
    assert verdicts(run) == {"answered": 10}


def test_a_token_limit_after_a_cancel_does_not_hang(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10)
    provider.polls = 1
    provider.endings.append("token-limit")
    send(run, provider, wait=False)
    report = cancelling.cancel(run)
    assert report.in_flight == 0
    assert states(run) == {"refused": 1}


# -- one bad shard, or one bad row, is no reason to stop -------------------------------------------------------------


def test_a_shard_that_is_refused_does_not_hold_up_the_others(provider: Provider, make_run: MakeRun) -> None:
    run = make_run()
    provider.endings.append("invalid")
    with pytest.raises(ServiceError, match="shard 0, attempt 1: refused by the provider"):
        send(run, provider)
    assert verdicts(run) == {"pending": 10, "answered": 20}
    provider.endings.append("invalid")
    with pytest.raises(ServiceError, match="shard 0, attempt 2"):
        send(run, provider)
    assert send(run, provider).exit_code == 0


def test_a_wrong_model_is_told_and_can_be_mended(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10)
    provider.endings.append("invalid:" + ",".join(map(str, range(1, 11))))
    with pytest.raises(ServiceError, match="bad line 1"):
        send(run, provider)
    assert verdicts(run) == {"pending": 10}, "not failed for good: the same again sends them"
    assert send(run, provider).exit_code == 0


def test_lines_that_are_counted_from_zero(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10)
    provider.endings.extend(["invalid:0,3", "completed"])
    send(run, provider)
    found = [outcome.verdict for seal in run.seals() for outcome in outcomes.load(run, seal).outcomes]
    assert [index for index, verdict in enumerate(found) if verdict is Verdict.FAILED] == [0, 3]


def test_a_single_request_that_is_too_large_is_failed_and_the_others_go_on(
    provider: Provider, make_run: MakeRun
) -> None:
    run = make_run(4)
    provider.faults["upload"].extend([fake_provider.status(413, "too large")] * 3)
    report = send(run, provider)
    assert verdicts(run) == {"answered": 3, "failed": 1}
    assert (report.sent, report.exit_code) == (4, 3)


def test_a_pilot_is_not_used_up_by_what_was_not_sent(provider: Provider, make_run: MakeRun) -> None:
    run = make_run()
    provider.faults["upload"].append(fake_provider.status(413, "too large"))
    assert send(run, provider, limit=8).sent == 8
    assert provider.paid.total() == 8


def test_no_money_left_is_told_and_not_waited_for(provider: Provider, make_run: MakeRun) -> None:
    def broke(handler: Any, _: Any) -> None:
        handler.read_body()
        handler.send_json({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, 429)

    run = make_run(10)
    provider.faults["create"].append(broke)
    with pytest.raises(ServiceError, match="You exceeded your quota"):
        send(run, provider)
    assert send(run, provider).exit_code == 0


def test_a_page_that_is_no_batch_service_is_told_at_once(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10)
    provider.faults["list"].append(fake_provider.nonsense_after)
    with pytest.raises(ServiceError):
        send(run, provider)
    assert provider.calls["upload"] == 0


def test_waits_for_tokens_are_counted_across_processes(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10)
    provider.polls = 0
    provider.endings.extend(["token-limit"] * 4)
    for _ in range(12):  # as cron calls it
        if send(run, provider, wait=False).exit_code == 0:
            break
    assert [batch["total"] for batch in provider.accepted] == [5, 5]


def test_a_retry_that_is_refused_leaves_the_verdict_as_it_was(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10)
    provider.answer = lambda custom_id, question, tries: (400, "content policy")
    send(run, provider)
    provider.endings.append("failed")
    with pytest.raises(ServiceError):
        send(run, provider, retry=frozenset({Verdict.FAILED}))
    assert verdicts(run) == {"failed": 10}
    assert send(run, provider).sent == 0


# -- keys, files, places ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_exception_carries_the_key_along(
    backend: str, provider: Provider, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    import traceback

    run = make_run(10, backend=backend)
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, "sk-wrong-key-000000")
    with pytest.raises(CredentialsError) as caught:
        send(run, provider)
    shown = "".join(traceback.format_exception(caught.value))
    assert "sk-wrong" not in shown


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_provider_that_quotes_the_key_does_not_get_it_written(
    backend: str, provider: Provider, make_run: MakeRun
) -> None:
    run = make_run(10, backend=backend)
    provider.answer = lambda custom_id, question, tries: (400, f"bad key {provider.key}")
    send(run, provider)
    for path in run.path.rglob("*"):
        assert path.is_dir() or provider.key.encode() not in path.read_bytes(), path


def test_a_password_in_the_base_url_is_refused_and_not_repeated(make_run: MakeRun, provider: Provider) -> None:
    with pytest.raises(UsageError) as caught:
        submit(make_run(10), base_url="http://user:secret@localhost/v1")
    assert "secret" not in caught.value.message + (caught.value.hint or "")


def test_gemini_keys_do_not_follow_a_redirect(provider: Provider, make_run: MakeRun) -> None:
    with fake_provider.running() as other:
        seen: list[str | None] = []

        def redirect(handler: Any, _: Any) -> None:
            handler.read_body()
            handler.send_json({}, 307, {"location": other.url + handler.path})

        def spy(handler: Any, do: Any) -> None:
            seen.append(handler.headers.get("x-goog-api-key"))
            do()

        for operation in ("list", "upload", "create", "check"):
            other.faults[operation].extend([spy] * 10)
        run = make_run(10, backend="gemini")
        provider.faults["list"].append(redirect)
        with pytest.raises((ServiceError, UsageError)):
            send(run, provider)
        assert seen == []
        assert other.calls.total() == 0


def test_a_later_submit_knows_the_host_of_the_first(
    provider: Provider, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOGETHER_API_KEY", provider.key)
    run = make_run()
    send(run, provider, host="together", limit=10)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert submit(run).exit_code == 0


def test_files_are_removed_also_after_a_crash_in_between(provider: Provider, make_run: MakeRun) -> None:
    run = make_run(10)
    provider.faults["delete"].extend([fake_provider.status(500)] * 2)
    send(run, provider, delete_remote=True)
    assert provider.files
    send(run, provider, delete_remote=True)
    assert provider.files == {}
