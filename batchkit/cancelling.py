"""`cancel`: end what a run has under way at a batch service, and keep what was finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from batchkit import batch_submission, elsewhere, targets
from batchkit.batch_submission import count, submit_batches
from batchkit.batches import PassingError, RefusedError, Service
from batchkit.errors import RunBusyError, UsageError
from batchkit.feeds import Feed
from batchkit.handover import Cost, Settings
from batchkit.manifests import Seal
from batchkit.progress import Progress, Silent
from batchkit.reports import SubmitReport
from batchkit.runs import Run


class CancelReport(msgspec.Struct, kw_only=True):
    """`cancelled` batches were asked to end, `ended` had ended already; `collected` responses came of them so far.
    `in_flight` requests are not collected yet. `given_up` attempts were on machines elsewhere, which nobody can stop
    from here: their requests are due again, and what they still put into the bucket is collected. `remote`: a batch
    service was asked."""

    cancelled: int = 0
    ended: int = 0
    collected: int = 0
    in_flight: int = 0
    given_up: int = 0
    remote: bool = False


def cancel(
    run: Run | str | Path,
    *,
    backend: str | None = None,
    base_url: str | None = None,
    api_key_env: str | None = None,
    wait: bool = True,
    poll_interval: float | None = None,
    progress: Progress | None = None,
) -> CancelReport:
    """Cancel all batches of the run at the provider, and collect what they have finished. What `presign` has given to
    machines elsewhere is given up.

    Where a `submit` waits for them, it is told to send nothing more, and collects. Raises `CredentialsError`,
    `ServiceError`, and `UsageError` where the run was never sent to a batch service.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    seals = list(run.seals())
    progress = progress or Silent()
    given_up = _give_up(run, seals, progress)
    if given_up is not None and not any(targets.last_remote(run, name) for name in targets.SERVICES):
        return given_up
    target = targets.choose(run, backend or _last_backend(run), base_url=base_url, key_env=api_key_env)
    service, key_env = targets.connect(target)
    pace = batch_submission.PACE
    if poll_interval is not None:
        pace = msgspec.structs.replace(pace, poll=poll_interval)
    report = given_up or CancelReport()
    report.remote = True
    run.cancel()
    for batch_id in _under_way(run, seals, service):
        _cancel_one(service, batch_id, report, progress)
    submitted = SubmitReport()
    try:
        submitted = submit_batches(
            run,
            Feed(seals),
            target=target,
            service=service,
            settings=Settings(key_env=key_env, wait=wait, sends=False, pace=pace),
            estimate=lambda seal, requests: Cost(),  # noqa: ARG005  # nothing is sent
            progress=progress,
        )
    except RunBusyError as exc:
        progress.say(f"{exc.message}, which collects them")
        count(run, seals, submitted, attempts=1)
    report.collected += submitted.responses
    report.in_flight = submitted.in_flight
    return report


def _give_up(run: Run, seals: Sequence[Seal], progress: Progress) -> CancelReport | None:
    """Close what machines elsewhere have; None where nothing was ever given to any."""
    by_shard = {seal.shard: seal for seal in seals}
    if not any(attempt.elsewhere for shard in by_shard for attempt in run.job(shard).attempts):
        return None
    gathered = elsewhere.gather(run, by_shard)
    if text := str(gathered):
        progress.say(text)
    return CancelReport(given_up=elsewhere.give_up(run, by_shard), collected=gathered.responses)


def _last_backend(run: Run) -> str:
    found = [name for name in targets.SERVICES if targets.last_remote(run, name) is not None]
    if not found:
        raise UsageError(
            f"{run.name} was never sent to a batch service, and presign gave nothing of it out",
            hint="Ctrl-C ends a submit on local GPUs",
        )
    if len(found) > 1:
        raise UsageError(f"{run.name} was sent to {' and '.join(found)}", hint="--backend names one")
    return found[0]


def _under_way(run: Run, seals: Sequence[Seal], service: Service) -> list[str]:
    return [
        attempt.remote.batch_id
        for seal in seals
        for attempt in run.job(seal.shard).attempts
        if attempt.remote is not None
        and attempt.in_flight
        and attempt.remote.batch_id is not None
        and (attempt.backend, attempt.remote.base_url) == (service.name, service.base_url)
    ]


def _cancel_one(service: Service, batch_id: str, report: CancelReport, progress: Progress) -> None:
    try:
        if service.check(batch_id).phase != "running":
            report.ended += 1
            return
        service.cancel(batch_id)
        report.cancelled += 1
    except (PassingError, RefusedError) as exc:
        progress.say(f"batch {batch_id}: {exc}")
