"""What is planned, refused, waited for and reported of tokens and dollars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchkit import preparation
from batchkit.errors import UsageError
from batchkit.merging import merge
from batchkit.runs import Run
from batchkit.submission import submit
from tests.fake_provider import Provider
from tests.test_batch_services import Listener

GPT_4O_BATCH = (1.25e-6, 5e-6)
"""US dollars a token in and out: openai.com/api/pricing, batch, 2026-11."""


@pytest.fixture
def provider(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> Provider:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{provider.url}/v1")
    return provider


def make_run(folder: Path, count: int = 30, **options: Any) -> Run:
    tasks = folder / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"id": n, "question": "?" * 400}) + "\n" for n in range(count)))
    settings: Any = {"model": "gpt-4o", "backend": "openai", "max_requests": 10, "max_tokens": 1000, **options}
    preparation.prepare(tasks, folder / "run", workers=1, **settings)
    return Run.open(folder / "run")


def test_the_plan_is_what_prepare_makes_and_has_the_price(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    options: Any = {"model": "gpt-4o", "backend": "openai", "max_requests": 10, "max_tokens": 1000}
    plan = preparation.plan(tmp_path / "tasks.jsonl", workers=1, **options).estimate
    done = preparation.prepare(tmp_path / "tasks.jsonl", run.path, workers=1, **options)
    assert done.already
    assert plan is not None
    assert plan == done.estimate, "also read off the seals"
    assert (plan.requests, plan.shards, plan.input_tokens, plan.output_tokens) == (30, 3, 3000, 30_000)
    expected = 3000 * GPT_4O_BATCH[0] + 30_000 * GPT_4O_BATCH[1]
    assert plan.batch_usd == pytest.approx(expected)
    assert plan.live_usd == pytest.approx(2 * expected)


def test_max_cost_refuses_before_anything_is_sent_and_says_what_fits(provider: Provider, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(UsageError, match=r"may cost up to 0\.15 USD, more than --max-cost 0\.1;") as caught:
        submit(run, max_cost=0.1)
    assert caught.value.hint == "--limit 19 fits"
    assert provider.calls["upload"] == 0
    assert submit(run, max_cost=0.1, limit=19).sent == 19
    with pytest.raises(UsageError, match="nothing was sent"):
        submit(run, max_cost=0.1)
    assert provider.paid.total() == 19
    assert submit(run, max_cost=0.16).exit_code == 0


def test_max_cost_also_bounds_what_goes_again(provider: Provider, tmp_path: Path) -> None:
    run = make_run(tmp_path, 10)
    provider.answer = lambda custom_id, question, tries: (503, "busy")
    with pytest.raises(Exception, match=r"more than --max-cost 0\.06"):
        submit(run, max_cost=0.06)
    assert len(provider.batches) == 1, "0.051 USD were spent at most, and as much again is too much"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tokens": None}, "the requests have no --max-tokens"),
        ({"model": "no-such-model"}, "the price of no-such-model is not known"),
    ],
)
def test_max_cost_is_refused_where_it_cannot_be_kept(
    options: dict[str, Any], reason: str, provider: Provider, tmp_path: Path
) -> None:
    run = make_run(tmp_path, **options)
    with pytest.raises(UsageError, match=reason):
        submit(run, max_cost=100)
    assert provider.calls["upload"] == 0


def test_max_enqueued_tokens_bounds_what_is_under_way(provider: Provider, tmp_path: Path) -> None:
    run = make_run(tmp_path, 60)
    provider.polls = 2
    listener = Listener([])
    assert submit(run, max_enqueued_tokens=2500, progress=listener).exit_code == 0
    assert max(map(len, listener.boards)) == 2, "a shard has 1,000 input tokens by the estimate"
    assert provider.calls["create"] == 6


def test_the_summary_has_the_tokens_and_dollars_that_were_spent(provider: Provider, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    submit(run)
    summary = merge(run)
    assert (summary.tokens.prompt, summary.tokens.completion) == (300, 60)
    assert summary.spent is not None
    assert summary.spent.usd is not None
    assert summary.spent.usd == pytest.approx(300 * GPT_4O_BATCH[0] + 60 * GPT_4O_BATCH[1])
    assert summary.spent.live_usd == pytest.approx(2 * summary.spent.usd)
    submit(run, retry=frozenset({"answered"}), limit=10)  # type: ignore[arg-type]  # a Verdict is a text
    again = merge(run)
    assert again.spent is not None
    assert summary.spent.usd is not None
    assert again.spent.usd == pytest.approx(summary.spent.usd * 4 / 3), "what was superseded was paid for, too"
    assert again.tokens == summary.tokens
    written = json.loads((run.path / "summary.json").read_bytes())
    assert written["spent"]["usd"] == again.spent.usd


def test_a_model_without_a_price_is_said_to_have_none(provider: Provider, tmp_path: Path) -> None:
    run = make_run(tmp_path, 10, model="no-such-model")
    submit(run)
    spent = merge(run).spent
    assert spent is not None
    assert (spent.usd, spent.unpriced) == (None, 10)


def test_a_run_that_was_prepared_for_vllm_is_measured_when_it_is_sent(provider: Provider, tmp_path: Path) -> None:
    run = make_run(tmp_path, backend="vllm")
    assert next(iter(run.seals())).tokens is None
    with pytest.raises(UsageError, match=r"0\.15 USD"):
        submit(run, backend="openai", max_cost=0.1)


@pytest.mark.parametrize(
    ("options", "warnings"),
    [
        ({"model": "gpt-5-mini", "max_tokens": 300}, ["bounds both"]),
        ({"model": "o4-mini", "max_tokens": 30_000, "temperature": 0.0}, ["may refuse a request with a temperature"]),
        ({"model": "gpt-4o", "max_tokens": 10, "temperature": 0.0}, []),
    ],
)
def test_limits_that_a_reasoning_model_would_think_away_are_warned_of(
    options: dict[str, Any], warnings: list[str], tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"id": 1, "question": "?"}\n')
    report = preparation.prepare(tasks, tmp_path / "run", backend="openai", workers=1, **options)
    assert len(report.warnings) == len(warnings)
    assert all(words in found for words, found in zip(warnings, report.warnings, strict=True))


@pytest.mark.parametrize(
    ("options", "body"),
    [
        ({"backend": "vllm"}, {"max_tokens": 100, "temperature": 0.0}),
        ({"backend": "openai"}, {}),
        ({"backend": "openai", "max_tokens": 7, "temperature": 0.5}, {"max_completion_tokens": 7, "temperature": 0.5}),
        ({"backend": "openai", "host": "together", "max_tokens": 7}, {"max_tokens": 7}),
        ({"backend": "gemini", "thinking_budget": 0}, {"thinking_budget": 0}),
    ],
)
def test_limits_go_out_only_if_given_under_the_name_that_the_host_takes(
    options: dict[str, Any], body: dict[str, Any], tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"id": 1, "question": "?"}\n')
    preparation.prepare(tasks, tmp_path / "run", model="gemini-2.5-flash", workers=1, **options)
    sent = json.loads((tmp_path / "run" / "requests" / "00000.jsonl").read_bytes())["body"]
    assert {name: value for name, value in sent.items() if name not in ("model", "messages")} == body
