"""The stage `submit` for batch services, and `cancel`: what is common to both is the loop of `services`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypedDict

import msgspec

from batchkit import attempts, targets, ways
from batchkit.attempts import Tracked
from batchkit.batches import Batch, PassingError, RefusedError, Service
from batchkit.costs import Costs, refuse_too_dear
from batchkit.counts import Counts
from batchkit.errors import UsageError
from batchkit.feeds import Feed
from batchkit.handover import Cost, Pace, Settings
from batchkit.limits import OWN, who_runs
from batchkit.manifests import Seal
from batchkit.packing import Packer
from batchkit.parcels import is_foreign
from batchkit.progress import Progress
from batchkit.reports import SubmitReport
from batchkit.runs import Run
from batchkit.services import Services
from batchkit.targets import Target
from batchkit.work import Leases

PACE = Pace()


class ServiceKeywords(TypedDict, total=False):
    """What `submit` takes for batch services.

    `wait` False: hand over what there is room for, collect what is done, and return. `host`, `base_url`, `api_key_env`
    and `completion_window` say where and how; None for those of the last time, or of the preparation. `max_active`
    bounds the batches under way, `max_enqueued_tokens` their input tokens, `max_cost` the dollars of the whole run.
    `poll_interval` in seconds. `delete_remote` removes the provider's files once they are collected and checked.
    `adopt` ("00003.1=BATCH_ID") and `resend` ("00003.1") settle doubtful attempts.
    """

    wait: bool
    host: str | None
    base_url: str | None
    api_key_env: str | None
    completion_window: str | None
    max_active: int | None
    max_enqueued_tokens: int | None
    max_cost: float | None
    poll_interval: float | None
    delete_remote: bool
    adopt: Sequence[str]
    resend: Sequence[str]


def submit_run(
    run: Run,
    feed: Feed,
    backend: str,
    *,
    common: Settings,
    progress: Progress,
    keywords: ServiceKeywords,
) -> SubmitReport:
    """`submit` for the batch service `backend`, of the shards of `feed`."""
    target = targets.choose(
        run,
        backend,
        host=keywords.get("host"),
        base_url=keywords.get("base_url"),
        key_env=keywords.get("api_key_env"),
        window=keywords.get("completion_window"),
    )
    if not is_foreign(run) and not target.limits.takes(run.manifest.url):
        raise UsageError(
            f"{target.host_name or backend} does not run {run.manifest.url}, for which the run was prepared",
            hint=f"--backend {' or '.join(who_runs(run.manifest.url))}",
        )
    service, key_env = targets.connect(target)
    if run.manifest.backend in OWN:
        progress.say(
            f"warning: the run was prepared for {run.manifest.backend}, and goes to {backend} with the names and "
            "limits of that (max_tokens, temperature), which reasoning models refuse"
        )
    settings = _settings(common, keywords, key_env)
    settle(
        run,
        feed.seals,
        service,
        adopt=keywords.get("adopt", ()),
        resend=keywords.get("resend", ()),
        say=progress.say,
    )
    costs = Costs(run, target.prices)
    if settings.max_enqueued_tokens is not None and (settings.presign or ways.links_of(feed.chosen).web):
        progress.say(
            "warning: --max-enqueued-tokens counts nothing of requests whose images go by their addresses: nobody "
            "knows their tokens; --max-active bounds what is under way"
        )
    refuse_too_dear(run, feed.chosen, costs, settings)
    resolving = ways.for_service(
        run,
        feed.chosen,
        target.limits,
        name=target.host_name or backend,
        base_url=target.base_url,
        window=target.window or (target.host.window if target.host is not None else None),
        presign=settings.presign,
    )
    with contextlib.ExitStack() as stack:
        resolver = stack.enter_context(resolving)
        packer = None
        if resolver is not None:
            packer = stack.enter_context(Packer(run, resolver, service, cost=costs.of, most=target.limits.max_bytes))
        return submit_batches(
            run,
            feed,
            target=target,
            service=service,
            settings=settings,
            estimate=costs,
            progress=progress,
            packer=packer,
        )


def _settings(common: Settings, keywords: ServiceKeywords, key_env: str) -> Settings:
    poll = keywords.get("poll_interval")
    return msgspec.structs.replace(
        common,
        key_env=key_env,
        wait=keywords.get("wait", True),
        max_active=keywords.get("max_active") or common.max_active,
        max_enqueued_tokens=keywords.get("max_enqueued_tokens"),
        max_cost=keywords.get("max_cost"),
        delete_remote=keywords.get("delete_remote", False),
        pace=PACE if poll is None else msgspec.structs.replace(PACE, poll=poll),
    )


def submit_batches(
    run: Run,
    feed: Feed,
    *,
    target: Target,
    service: Service,
    settings: Settings,
    estimate: Callable[[Seal, Sequence[int]], Cost],
    progress: Progress,
    packer: Packer | None = None,
) -> SubmitReport:
    """Hand the shards of `feed` over, and collect what is done. Raises what `Services.go` raises, and `RunBusyError`
    where other processes hold all there is to do."""
    report = SubmitReport()
    with Leases(run, feed.leave) as leases:
        services = Services(
            run,
            feed,
            service=service,
            limits=target.limits,
            settings=settings,
            host=target.host_name,
            estimate=estimate,
            leases=leases,
            report=report,
            progress=progress,
            packer=packer,
        )
        services.go()
        if services.busy is not None and not report.sent and not report.responses:
            raise services.busy
    count(run, feed.chosen, report, attempts=settings.attempts)
    return report


def count(run: Run, seals: Sequence[Seal], report: SubmitReport, *, attempts: int) -> None:
    """Fill in how the shards stand now."""
    run.refresh()
    report.remaining = report.unanswered = report.in_flight = 0
    with Counts(run) as counts:
        for seal in seals:
            if not run.job_path(seal.shard).exists():
                report.remaining += seal.requests
                report.unanswered += len(seal.rejected)
                continue
            found = counts.of(seal)
            due = found.due(attempts=attempts)
            report.in_flight += found.flying
            report.remaining += due + found.flying
            report.unanswered += found.own - found.answered - due - found.flying


# -- what the user decides -------------------------------------------------------------------------------------------


def settle(
    run: Run,
    seals: Mapping[int, Seal],
    service: Service,
    *,
    adopt: Sequence[str],
    resend: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Settle doubtful or troubled attempts as the user says: `adopt` has ATTEMPT=BATCH_ID, `resend` ATTEMPT, as
    00003.1. Raises `UsageError` where that would lose something or pay for it twice."""
    for text in adopt:
        with _unsettled(run, seals, service, text.partition("=")[0], "--adopt") as tracked:
            attempts.begin(run, tracked, _check_adoption(run, seals, service, tracked, text))
    for name in resend:
        with _unsettled(run, seals, service, name, "--resend") as tracked:
            _resend(run, service, tracked, say)


def _check_adoption(run: Run, seals: Mapping[int, Seal], service: Service, tracked: Tracked, text: str) -> Batch:
    """The batch that `--adopt TEXT` names, which must not be known as another one's."""
    batch_id = text.partition("=")[2]
    for seal in seals.values():
        for attempt in run.job(seal.shard).attempts:
            if attempt.remote is not None and batch_id in (attempt.remote.batch_id, *attempt.remote.past):
                raise UsageError(
                    f"--adopt {text}: that is the batch of attempt {seal.shard:05d}.{attempt.number}",
                    hint="check the batch's id at the provider",
                )
    try:
        batch = service.check(batch_id)
    except (RefusedError, PassingError) as exc:
        raise UsageError(f"--adopt {text}: {exc}", hint="check the batch's id at the provider") from None
    remote = tracked.remote
    other_tag = batch.tag is not None and not batch.tag.startswith(remote.tag)
    other_file = batch.tag is None and None not in (batch.file_id, remote.file_id) and batch.file_id != remote.file_id
    if other_tag or other_file:
        raise UsageError(
            f"--adopt {text}: this batch was created for something else (its mark or its file says so)",
            hint="check the batch's id at the provider",
        )
    return batch


def _resend(run: Run, service: Service, tracked: Tracked, say: Callable[[str], None]) -> None:
    """Close the attempt, so that its requests are due again. One that turns up at the provider after all is adopted."""
    if tracked.attempt.state == "running":
        attempts.give_up(run, tracked)
        return
    try:
        batch = service.find(attempts.order_of(run, tracked))
    except (RefusedError, PassingError) as exc:
        raise UsageError(
            f"--resend {tracked.name}: the provider's list cannot be read now: {exc}", hint="try again later"
        ) from None
    if batch is not None:
        attempts.begin(run, tracked, batch)
        say(f"{tracked.label}: found batch {batch.id} at the provider after all, and adopted it")
    else:
        attempts.save(run, tracked, "refused", message="the user says that its batch was not created")


@contextlib.contextmanager
def _unsettled(run: Run, seals: Mapping[int, Seal], service: Service, name: str, flag: str) -> Iterator[Tracked]:
    shard, _, number = name.partition(".")
    seal = seals.get(int(shard)) if shard.isdecimal() else None
    if seal is None:
        raise UsageError(f"{flag} {name}: the run has no such attempt", hint=f"{flag} 00003.1 names shard and attempt")
    with run.lease(f"{seal.shard:05d}"):
        for tracked in attempts.take_up(run, seal):
            if str(tracked.attempt.number) == number and _is_unsettled(tracked):
                if (tracked.attempt.backend, tracked.remote.base_url) != (service.name, service.base_url):
                    raise UsageError(
                        f"{flag} {name}: it is at {tracked.attempt.backend} ({tracked.remote.base_url})",
                        hint="name that --backend and --base-url",
                    )
                yield tracked
                return
        raise UsageError(f"{flag} {name}: this attempt is not doubtful", hint="batchkit status lists those that are")


def _is_unsettled(tracked: Tracked) -> bool:
    return tracked.attempt.state == "doubtful" or tracked.remote.trouble is not None
