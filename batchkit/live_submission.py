"""The stage `submit` for live servers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypedDict

import msgspec

from batchkit import live, ways
from batchkit.backends import server
from batchkit.backends.vllm import Vllm
from batchkit.batch_submission import count
from batchkit.client import Endpoint, Pacing
from batchkit.errors import UsageError
from batchkit.feeds import Feed
from batchkit.handover import Settings
from batchkit.limits import LIMITS
from batchkit.live import Live
from batchkit.manifests import now
from batchkit.progress import Progress
from batchkit.queues import Queue
from batchkit.reports import SubmitReport
from batchkit.resolving import Resolver
from batchkit.runs import Run
from batchkit.serving import Serving
from batchkit.wording import counted
from batchkit.work import Leases, Scan

BACKENDS = frozenset({"server", "vllm"})
"""Whose attempts have no engine folder, and are closed when they are found without their process."""

PACING = Pacing()
SERVED_CONCURRENCY = 256
"""At each server of our own: enough to fill its batches while the next images are decoded."""


class ServerKeywords(TypedDict, total=False):
    """What `submit` takes for live servers.

    `endpoints` are base URLs (`http://localhost:8000/v1` unless given). `concurrency` requests are under way at each;
    `rate_limit_delay` seconds lie between two; `requests_per_minute` and `tokens_per_minute` bound all of them
    together. `timeout` in seconds is for one request.
    """

    endpoints: Sequence[str]
    concurrency: int | None
    rate_limit_delay: float | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    timeout: float | None


def submit_live(
    run: Run,
    feed: Feed,
    *,
    key_env: str | None,
    common: Settings,
    progress: Progress,
    keywords: ServerKeywords,
) -> SubmitReport:
    """`submit` for the backend `server`, of the shards of `feed`."""
    endpoints = server.parse_endpoints(keywords.get("endpoints", ()), key_env)
    pacing = pacing_of(keywords)
    if (report := _if_nothing_is_due(run, feed, common)) is not None:
        return report
    server.check(endpoints, run.manifest.model, progress.say)
    with ways.for_servers(run, presign=common.presign) as resolver:
        return ask_servers(
            run,
            feed,
            endpoints,
            backend="server",
            common=common,
            progress=progress,
            pacing=pacing,
            resolver=resolver,
        )


def submit_served(
    run: Run,
    feed: Feed,
    *,
    runner: Vllm,
    common: Settings,
    progress: Progress,
    keywords: ServerKeywords,
) -> SubmitReport:
    """`submit` for vLLM's own servers, which are started for it."""
    pacing = pacing_of(keywords)
    if (report := _if_nothing_is_due(run, feed, common)) is not None:
        return report
    session = f"{now().replace(':', '')}-{os.getpid()}"
    serving = Serving(runner, run.path / "servers" / session, progress)
    pacing = msgspec.structs.replace(
        pacing, concurrency=keywords.get("concurrency") or SERVED_CONCURRENCY, patience=float("inf")
    )
    resolving = ways.for_engine(run, runner.args, presign=common.presign)
    with resolving as resolver, serving.running():
        return ask_servers(
            run,
            feed,
            serving.endpoints,
            backend="vllm",
            common=common,
            progress=progress,
            pacing=pacing,
            check=serving.check,
            resolver=resolver,
        )


def _if_nothing_is_due(run: Run, feed: Feed, common: Settings) -> SubmitReport | None:
    """The report where there is nothing to send: then no server is needed."""
    scan = Scan(run, feed.chosen, attempts=common.attempts, retry=common.retry, only=common.only)
    if (scan.due or feed.is_open) and common.limit != 0:
        return None
    report = SubmitReport()
    count(run, feed.chosen, report, attempts=common.attempts)
    return report


def pacing_of(keywords: ServerKeywords) -> Pacing:
    """Raises `UsageError` for what is out of range."""
    for name in ("concurrency", "requests_per_minute", "tokens_per_minute"):
        value = keywords.get(name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UsageError(f"--{name.replace('_', '-')} is {value!r}; it must be a whole number from 1 on")
    if not 0 < (keywords.get("timeout") or PACING.timeout) < float("inf"):
        raise UsageError(f"--timeout is {keywords.get('timeout')!r}; it must be more than 0")
    if not 0 <= (keywords.get("rate_limit_delay") or 0.0) < float("inf"):
        raise UsageError("--rate-limit-delay must not be less than 0")
    return Pacing(
        concurrency=keywords.get("concurrency") or PACING.concurrency,
        timeout=keywords.get("timeout") or PACING.timeout,
        delay=keywords.get("rate_limit_delay") or 0.0,
        requests_per_minute=keywords.get("requests_per_minute") or 0,
        tokens_per_minute=keywords.get("tokens_per_minute") or 0,
        tries=PACING.tries,
        patience=PACING.patience,
    )


def ask_servers(
    run: Run,
    feed: Feed,
    endpoints: Sequence[Endpoint],
    *,
    backend: str,
    common: Settings,
    progress: Progress,
    pacing: Pacing,
    check: Callable[[], None] = lambda: None,
    resolver: Resolver | None = None,
) -> SubmitReport:
    """Ask `endpoints` all that is due. Raises `EngineError` where none answers any more, `RunBusyError` where other
    processes hold all there is to do."""
    report = SubmitReport()
    with Leases(run, feed.leave) as leases:
        if recovered := live.recover(run, feed.seals, BACKENDS, leases):
            progress.say(f"went on with {counted(recovered, 'shard')} that an earlier batchkit left in the middle")
        due = Scan(run, feed.chosen, attempts=common.attempts, retry=common.retry, only=common.only).due
        due = due if common.limit is None else min(due, common.limit)
        progress.grow(due)
        queue = Queue(
            run,
            feed,
            limits=LIMITS["server"],
            settings=common,
            leases=leases,
            release=lambda: work.release(),  # noqa: PLW0108  # it comes later
        )
        work = Live(
            run,
            queue,
            backend=backend,
            leases=leases,
            report=report,
            progress=progress,
            count_tokens=pacing.tokens_per_minute > 0,
            resolver=resolver,
        )
        work.total = due
        try:
            server.ask(endpoints, run.manifest.model, pacing, work.calls(), work.take, say=progress.say, check=check)
        finally:
            work.stop()
        if queue.busy is not None and not report.sent:
            raise queue.busy
    count(run, feed.chosen, report, attempts=common.attempts)
    return report
