"""Asking providers how the batches of a run stand: what `status` adds to what the run knows by itself."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from batchkit import targets
from batchkit.attempts import seconds_since
from batchkit.batches import Batch, PassingError, RefusedError, Service
from batchkit.errors import ServiceError
from batchkit.jobs import Attempt, Elsewhere, Job, Remote
from batchkit.manifests import Seal
from batchkit.runs import Run


class BatchStatus(msgspec.Struct, kw_only=True):
    """An attempt that is under way at a provider. `attempt` is shard and number, as `--adopt` and `--resend` take it.

    `state` is the provider's word where it was asked, else ours; counts are of requests, None where nobody says.
    `message` says why it was not asked, or what is wrong.
    """

    attempt: str
    backend: str
    batch: str | None
    state: str
    requests: int
    completed: int | None = None
    failed: int | None = None
    tokens: int | None = None
    seconds: float
    message: str | None = None


def under_way(run: Run, seals: Sequence[Seal], jobs: Sequence[Job], *, ask: bool) -> list[BatchStatus]:
    """All attempts in flight. With `ask` their providers are asked; one that cannot be is said so, not raised."""
    services: dict[tuple[str, str, str], Service | str] = {}
    found = []
    for seal, job in zip(seals, jobs, strict=True):
        for attempt in job.attempts:
            if attempt.in_flight and attempt.remote is not None:
                status = _known(seal, attempt, attempt.remote)
                if ask and attempt.remote.batch_id is not None:
                    _ask(run, status, attempt.remote, services)
                found.append(status)
            elif attempt.state == "elsewhere" and attempt.elsewhere is not None:
                found.append(_away(seal, attempt, attempt.elsewhere))
    return found


def _away(seal: Seal, attempt: Attempt, place: Elsewhere) -> BatchStatus:
    return BatchStatus(
        attempt=f"{seal.shard:05d}.{attempt.number}",
        backend=attempt.backend,
        batch=None,
        state=attempt.state,
        requests=_count(seal, attempt),
        seconds=seconds_since(attempt.started),
        message=f"given to a machine elsewhere, until {place.expires}",
    )


def _count(seal: Seal, attempt: Attempt) -> int:
    asking = frozenset(seal.asking)
    return sum(position in asking for start, end in attempt.rows for position in range(start, end))


def _known(seal: Seal, attempt: Attempt, remote: Remote) -> BatchStatus:
    return BatchStatus(
        attempt=f"{seal.shard:05d}.{attempt.number}",
        backend=attempt.backend,
        batch=remote.batch_id,
        state=remote.state if attempt.state == "running" and remote.state else attempt.state,
        requests=_count(seal, attempt),
        seconds=seconds_since(attempt.started),
        message=attempt.message,
    )


def _ask(run: Run, status: BatchStatus, remote: Remote, services: dict[tuple[str, str, str], Service | str]) -> None:
    place = (status.backend, remote.base_url, remote.key_env)
    if place not in services:
        services[place] = _connect(run, *place)
    service = services[place]
    if isinstance(service, str):
        status.message = service
        return
    try:
        _fill(status, service.check(remote.batch_id or ""))
    except (PassingError, RefusedError, ServiceError) as exc:
        status.message = f"not told: {exc}"


def _connect(run: Run, backend: str, base_url: str, key_env: str) -> Service | str:
    try:
        return targets.connect(targets.choose(run, backend, base_url=base_url, key_env=key_env))[0]
    except ServiceError as exc:
        return f"not asked: {exc.message}"


def _fill(status: BatchStatus, batch: Batch) -> None:
    status.state = batch.state
    status.completed, status.failed, status.tokens = batch.completed, batch.failed, batch.tokens
    if batch.faults:
        status.message = batch.faults[0].message
