"""The three stages in one call."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from batchkit import clusters
from batchkit.errors import ServiceError, UsageError
from batchkit.limits import CHAT
from batchkit.options import PrepareKeywords
from batchkit.preparation import prepare
from batchkit.progress import Silent
from batchkit.runs import Run
from batchkit.stages import Show, Stages
from batchkit.tallies import Report

if TYPE_CHECKING:
    from batchkit.merging import Summary
    from batchkit.reports import SubmitReport
    from batchkit.responses import Verdict


def run(
    tasks: str | Path,
    run: str | Path,
    *,
    workers: int | None = None,
    strict: bool = False,
    pilot: int | None = None,
    shards: str | None = None,
    attempts: int = 3,
    retry: frozenset[Verdict] = frozenset(),
    replicas: int = 1,
    engine: str = "run-batch",
    engine_args: Sequence[str] = (),
    ray: str | None = None,
    presign: bool = False,
    endpoints: Sequence[str] = (),
    concurrency: int | None = None,
    rate_limit_delay: float | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    timeout: float | None = None,
    wait: bool = True,
    base_url: str | None = None,
    api_key_env: str | None = None,
    completion_window: str | None = None,
    max_active: int | None = None,
    max_enqueued_tokens: int | None = None,
    max_cost: float | None = None,
    poll_interval: float | None = None,
    delete_remote: bool = False,
    delete_sent: bool = False,
    output: str | Path | None = None,
    parse: str | None = None,
    prefix: str = "",
    flat: bool = False,
    retry_file: str | Path | None = None,
    show: Show = lambda stage: Silent(),  # noqa: ARG005  # the same for each stage
    prepared: Callable[[Report], object] = lambda report: None,  # noqa: ARG005  # nobody wants to know
    submitted: Callable[[SubmitReport], object] = lambda report: None,  # noqa: ARG005  # the same
    **keywords: Unpack[PrepareKeywords],
) -> Summary:
    """Prepare, submit and merge; called again, go on where it stopped. The options are those of the three verbs.

    `pilot` is the `limit` of `submit`: so many requests now, the rest when it is called without. `prepared` and
    `submitted` are called with the report of their stage. The first shard is sent while the others are prepared, unless
    `wait` is False or `max_cost` is given. `delete_sent` deletes the requests of a shard of which nothing is to be sent
    any more, and keeps few shards ahead: so a dataset passes through a disk that is smaller than its requests.
    """
    from batchkit.merging import check_names, merge
    from batchkit.outputs import place_of, places
    from batchkit.results import ResultEncoder
    from batchkit.submission import refuse_endpoint, submit

    # What submit and merge would refuse is refused before anything is made or paid for.
    refuse_endpoint(keywords.get("url", CHAT), keywords.get("backend", "vllm"), engine)
    if presign and keywords.get("images") != "link":
        raise UsageError("--presign is for runs that name their images", hint="--images link")
    ResultEncoder(parse=parse or "text", prefix=prefix)
    places(output or f"{str(run).rstrip('/')}/results.jsonl", retry_file, never=[place_of(tasks)])
    if delete_sent and shards is not None:
        raise UsageError("--delete-sent goes without --shards", hint="the parts of a run need all of its requests")
    make = functools.partial(prepare, tasks, run, workers=workers, strict=strict, ray=ray, **keywords)
    send = functools.partial(
        submit,
        run,
        limit=pilot,
        shards=shards,
        attempts=attempts,
        retry=retry,
        replicas=replicas,
        engine=engine,
        engine_args=engine_args,
        ray=ray if keywords.get("backend", "vllm") == "vllm" else None,
        presign=presign,
        endpoints=endpoints,
        concurrency=concurrency,
        rate_limit_delay=rate_limit_delay,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        timeout=timeout,
        wait=wait,
        base_url=base_url,
        api_key_env=api_key_env,
        completion_window=completion_window,
        max_active=max_active,
        max_enqueued_tokens=max_enqueued_tokens,
        max_cost=max_cost,
        poll_interval=poll_interval,
        delete_remote=delete_remote,
    )

    def check(names_in_use: list[str]) -> None:
        if not flat:
            check_names(names_in_use, prefix)

    stages = Stages(make, send, check, show, prepared, submitted)
    with clusters.connected(ray) if ray is not None else contextlib.nullcontext() as cluster, _kept() as kept:
        # What is to be weighed as a whole, or is handed over in one go, is prepared as a whole first; and where engines
        # and prepare would wait for the same CPUs of a cluster.
        room_for_both = cluster is None or any(node.gpus for node in clusters.nodes(cluster))
        if wait and max_cost is None and room_for_both and not _is_prepared(run):
            stages.overlapped(shards=shards, delete_sent=delete_sent)
        else:
            stages.in_turn(run, delete_sent=delete_sent)
    if kept and not Run.open(run).was_sent():
        raise kept[0]
    with show("merge") as progress:
        summary = merge(
            run,
            output=output,
            parse=parse,
            prefix=prefix,
            flat=flat,
            retry_file=retry_file,
            workers=workers,
            progress=progress,
        )
    if kept:
        raise kept[0]
    return summary


def _is_prepared(run: str | Path) -> bool:
    return Run.exists(run) and Run.open(run).prepared() is not None


@contextlib.contextmanager
def _kept() -> Iterator[list[ServiceError]]:
    """Keeps what a provider refuses until what others have answered is merged."""
    kept: list[ServiceError] = []
    try:
        yield kept
    except ServiceError as exc:
        kept.append(exc)
