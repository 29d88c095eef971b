"""The second stage: requests → backend → responses.

For local engines `work` says what is due, `engines` runs it, `sessions` keeps what comes back, whatever is killed; for
batch services `services` does all that, through `watches` and `attempts`.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Unpack

from batchkit import counts, elsewhere, sessions, ways
from batchkit.backends import vllm, vllm_ray
from batchkit.batch_submission import ServiceKeywords, submit_run
from batchkit.engines import Engines
from batchkit.errors import RunError, UsageError
from batchkit.feeds import Feed, refuse_deleted, refuse_lost
from batchkit.handover import Settings
from batchkit.limits import SERVED
from batchkit.live_submission import ServerKeywords, submit_live, submit_served
from batchkit.manifests import Seal
from batchkit.parcels import pooling
from batchkit.progress import Progress, Silent
from batchkit.reports import SubmitReport
from batchkit.resolving import Resolver
from batchkit.responses import Verdict
from batchkit.rounds import Pool
from batchkit.runs import Run
from batchkit.storage import remove
from batchkit.takeovers import reused_in
from batchkit.targets import SERVICES
from batchkit.wording import counted
from batchkit.work import Leases, Scan, Work

BACKENDS = ("vllm", "server", *SERVICES)
ENGINES = ("run-batch", "serve")


class OtherKeywords(ServiceKeywords, ServerKeywords):
    """What `submit` takes for backends other than vllm."""


def submit(
    run: Run | str | Path,
    *,
    backend: str | None = None,
    limit: int | None = None,
    shards: str | None = None,
    attempts: int = 3,
    retry: frozenset[Verdict] = frozenset(),
    positions: frozenset[int] | None = None,
    replicas: int = 1,
    engine: str = "run-batch",
    engine_args: Sequence[str] = (),
    ray: str | None = None,
    presign: bool = False,
    progress: Progress | None = None,
    feed: Feed | None = None,
    **others: Unpack[OtherKeywords],
) -> SubmitReport:
    """Send what has no response yet, and wait for the responses. Again: goes on where it stopped.

    `backend` is the manifest's where it is None. `limit` sends only so many requests now; `shards` ("3/8") only every
    eighth shard, from the third on; `positions` only these rows. `attempts` bounds how often a request is tried that
    failed in passing or with which the engine died; requests whose verdict is in `retry` are sent again in any case.
    `engine_args` go to vLLM; `engine` is its batch runner (`run-batch`) or its server (`serve`, whose responses are
    on the disk as they come). `feed` has the shards while `prepare` still makes them, for `run`. `ray` is the address
    of a Ray cluster whose machines run the engines. `presign`: of a run that names its images, those in S3 go as signed
    URLs, not as base64. `others` are for the other backends; `ServiceKeywords` and
    `ServerKeywords` say what they mean.

    Raises `EngineError` where the engine does not work, `RunBusyError` where other processes hold all there is to do,
    `RunError` where the run is not prepared or damaged, `StorageError` on a full disk, `CredentialsError` and
    `ServiceError` where a provider refuses, `UsageError`.
    """
    began = time.monotonic()
    run = run if isinstance(run, Run) else Run.open(run)
    backend = backend or run.manifest.backend
    _refuse_unusable(
        backend,
        attempts=attempts,
        limit=limit,
        engine=engine,
        engine_args=engine_args,
        ray=ray,
        others=others,
    )
    _refuse_senseless(run, retry)
    refuse_endpoint(run.manifest.url, backend, engine)
    ways.refuse_presign(run, presign)
    progress = progress or Silent()
    if feed is None:
        feed = Feed(_sealed(run, progress), shards=shards)
    if gathered := str(elsewhere.gather(run, feed.seals)):
        progress.say(gathered)
    refuse_deleted(run, feed.chosen, attempts=attempts, retry=retry, only=positions)
    feed.clean(run, attempts=attempts)
    if backend == "vllm":
        engine_args = [*(added := ways.media_args(run, feed, engine_args)), *engine_args]
        if added:
            progress.say(f"vLLM gets {shlex.join(added)}: it reads the images there")
    with terminable():
        common = Settings(key_env="", limit=limit, attempts=attempts, retry=retry, only=positions, presign=presign)
        if backend == "server":
            report = submit_live(
                run,
                feed,
                key_env=others.get("api_key_env"),
                common=common,
                progress=progress,
                keywords=others,
            )
        elif backend in SERVICES:
            with run.lease("submit") if shards is None else contextlib.nullcontext():
                report = submit_run(run, feed, backend, common=common, progress=progress, keywords=others)
        elif engine == "serve":
            served = vllm.Vllm(
                model=run.manifest.model, replicas=replicas, args=engine_args, pooling=pooling(run, feed.chosen)
            )
            _tell_recovered(sessions.recover(run, feed.seals), progress)
            report = submit_served(run, feed, runner=served, common=common, progress=progress, keywords=others)
        else:
            resolving = ways.for_engine(run, engine_args, presign=presign)
            with resolving as resolver, _runner(run, feed, replicas, engine_args, ray) as runner:
                _tell_recovered(sessions.recover(run, feed.seals), progress)
                report = _run_engines(run, feed, runner, progress, settings=common, resolver=resolver)
    report.elsewhere = min(report.in_flight, elsewhere.requests_out(run, feed.chosen))
    report.seconds = time.monotonic() - began
    return report


@contextlib.contextmanager
def _runner(run: Run, feed: Feed, replicas: int, args: Sequence[str], ray: str | None) -> Iterator[vllm.Runner]:
    """Where the engines run: on this machine, or on a Ray cluster."""
    task = pooling(run, feed.chosen)
    if ray is None:
        yield vllm.Vllm(model=run.manifest.model, replicas=replicas, args=args, pooling=task)
        return
    with vllm_ray.running(ray, model=run.manifest.model, replicas=replicas, args=args, pooling=task) as runner:
        yield runner


def _run_engines(
    run: Run,
    feed: Feed,
    runner: vllm.Runner,
    progress: Progress,
    *,
    settings: Settings,
    resolver: Resolver | None,
) -> SubmitReport:
    scan = Scan(run, feed.chosen, attempts=settings.attempts, retry=settings.retry, only=settings.only)
    report = SubmitReport(remaining=scan.due + scan.in_flight, unanswered=scan.unanswered, in_flight=scan.in_flight)
    if scan.in_flight:
        progress.say(f"{counted(scan.in_flight, 'request')} at a batch service, or on a machine elsewhere: left to it")
    with Leases(run, feed.leave) as leases:
        work = Work(
            run,
            scan,
            leases,
            limit=settings.limit,
            attempts=settings.attempts,
            retry=settings.retry,
            only=settings.only,
        )
        progress.grow(work.due)
        engines = Engines(
            run,
            feed,
            runner=runner,
            work=work,
            leases=leases,
            report=report,
            progress=progress,
            resolver=resolver,
        )
        engines.go(Pool(engines.take_fresh, attempts=settings.attempts, proven=scan.answered))
        if work.busy is not None and not report.sent:
            raise work.busy
    counts.count(run, feed.chosen)  # so that the next command need not
    return report


def _refuse_unusable(
    backend: str,
    *,
    attempts: int,
    limit: int | None,
    engine: str,
    engine_args: Sequence[str],
    ray: str | None,
    others: OtherKeywords,
) -> None:
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}", hint=f"--backend {'|'.join(BACKENDS)}")
    if attempts < 1 or (limit is not None and limit < 0):
        raise UsageError("--attempts must be at least 1, and --limit no less than 0")
    if engine not in ENGINES or (engine != ENGINES[0] and backend != "vllm"):
        raise UsageError(f"--engine {engine}: not for {backend}", hint="--engine run-batch or serve, of --backend vllm")
    if engine_args and backend != "vllm":
        raise UsageError(f"arguments behind -- go to vLLM; {backend} takes none", hint="leave them out")
    if ray is not None and (backend != "vllm" or engine != ENGINES[0]):
        raise UsageError(
            "--ray is for --backend vllm with --engine run-batch", hint="leave it out, or the other option"
        )
    _refuse_foreign("serve" if engine == "serve" and backend == "vllm" else backend, others)


def responses_count(run: Run | str | Path) -> int:
    """How many responses `discard` would delete."""
    run = run if isinstance(run, Run) else Run.open(run)
    count = 0
    for seal in run.seals():
        for _, path in run.responses_paths(seal.shard):
            with open(path, "rb") as stream:
                count += sum(1 for _ in stream)
    return count


def reused_count(run: Run | str | Path) -> int:
    """How many of them were taken over from other runs."""
    run = run if isinstance(run, Run) else Run.open(run)
    return sum(sum(reused_in(run, seal.shard).values()) for seal in run.seals())


def discard(run: Run | str | Path) -> int:
    """Delete all attempts and responses, so that everything is pending again. Returns how many responses went.

    Raises `RunBusyError`, having deleted nothing, where a shard is being worked on.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    seals = {seal.shard: seal for seal in run.seals()}
    for shard in seals:
        with run.lease(f"{shard:05d}"):
            pass
    sessions.recover(run, seals)  # ends engines that were left over
    elsewhere.gather(run, seals)
    _refuse_in_flight(run, seals)
    refuse_lost(run, seals.values())
    count = responses_count(run)
    for shard in seals:
        with run.lease(f"{shard:05d}"):
            for _, path in run.responses_paths(shard):
                remove(path)
            elsewhere.forget(run, shard)
            remove(run.job_path(shard))
    return count


def _refuse_foreign(backend: str, others: OtherKeywords) -> None:
    """Refuse options of other backends: one that is ignored in silence would be believed to work."""
    of_servers = frozenset(ServerKeywords.__annotations__)
    known = of_servers | frozenset(ServiceKeywords.__annotations__)
    for name, value in others.items():
        if name not in known:
            raise UsageError(f"submit has no option {name!r}", hint="batchkit submit --help lists them")
        given = value not in (None, ()) and value is not (name == "wait")
        kind = "live servers" if name in of_servers else "batch services"
        fits = (
            (backend == "server" and name in of_servers | {"api_key_env"})
            or (backend == "serve" and name in of_servers - {"endpoints"})
            or (backend in SERVICES and name not in of_servers)
        )
        if given and not fits:
            flag = "--no-wait" if name == "wait" else "--" + name.replace("_", "-")
            raise UsageError(f"{flag} is for {kind}, not for {backend}", hint="--backend names one of them")


def _refuse_in_flight(run: Run, seals: Iterable[int]) -> None:
    flying = sum(attempt.at_provider for shard in seals for attempt in run.job(shard).attempts)
    away = sum(
        attempt.elsewhere is not None and attempt.in_flight for shard in seals for attempt in run.job(shard).attempts
    )
    if away and not flying:
        raise RunError(
            f"{run.name}: {counted(away, 'attempt')} given to machines elsewhere, whose work would be in vain",
            hint=f"batchkit cancel {shlex.quote(run.name)} first",
        )
    if flying:
        raise RunError(
            f"{run.name}: {counted(flying, 'batch')} under way at a provider would be paid for in vain",
            hint=f"batchkit cancel {shlex.quote(run.name)} first",
        )


def refuse_endpoint(url: str, backend: str, engine: str) -> None:
    """Raise `UsageError` where vLLM's batch runner is to run what its server alone runs."""
    if backend == "vllm" and engine == ENGINES[0] and url in SERVED:
        raise UsageError(
            f"vLLM's batch runner does not run {url}, only its server does",
            hint="--engine serve starts it; --backend server asks one that runs already",
        )


def _refuse_senseless(run: Run, retry: frozenset[Verdict]) -> None:
    """Refuse verdicts that no sending can change, or that only `merge` knows."""
    if Verdict.REJECTED in retry:
        raise UsageError(
            "--retry rejected: these rows never became requests",
            hint="mend the rows (retry.jsonl of merge lists them) and prepare them into a new run",
        )
    if Verdict.INVALID in retry and run.manifest.response_schema is None:
        raise UsageError(
            "--retry invalid: which answers do not parse is known to merge alone, by its --parse, unless the run has a "
            "--response-schema",
            hint="batchkit prepare the rows again, or --retry answered to send all answered rows again",
        )


def _sealed(run: Run, progress: Progress) -> list[Seal]:
    seals = list(run.seals())
    if run.prepared() is None:
        if not seals:
            raise RunError(f"{run.name}: nothing is prepared yet", hint="run the same batchkit prepare again")
        progress.say(f"warning: prepare has not finished; submitting what it sealed, {counted(len(seals), 'shard')}")
    return seals


def _tell_recovered(recovered: sessions.Recovered, progress: Progress) -> None:
    if recovered.engines:
        progress.say(f"stopped {counted(recovered.engines, 'engine')} that an earlier batchkit left behind")
    if recovered.responses:
        progress.say(f"kept {counted(recovered.responses, 'response')} of an engine that was interrupted")


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM end us as Ctrl-C does, with everything cleaned up. Handlers belong to the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
