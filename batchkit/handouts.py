"""The stage `presign`: commands of vLLM's batch runner for machines that have neither credentials nor batchkit.

`elsewhere` keeps the attempts, `presigning` signs; here they meet. `scripts` makes files of the commands.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec

from batchkit import elsewhere, outcomes, presigning, s3, sessions, ways
from batchkit.backends import vllm_install
from batchkit.due import to_send
from batchkit.errors import RunBusyError, RunError, UsageError
from batchkit.feeds import select
from batchkit.jobs import Attempt
from batchkit.limits import SERVED
from batchkit.manifests import PREPARE_AGAIN, Seal
from batchkit.parcels import pooling
from batchkit.presigning import Signer
from batchkit.progress import Progress, Silent
from batchkit.resolving import Resolver
from batchkit.runs import Run
from batchkit.scripts import Command
from batchkit.storage import write_whole
from batchkit.wording import counted

MODULE = "vllm.entrypoints.openai.run_batch"
"""In every vLLM from 0.10 to 0.33."""


class Handout(msgspec.Struct, kw_only=True):
    """What was given out: `commands`, whose URLs hold until `until`. `in_flight` requests were given out before and are
    left alone; `note` says why the URLs hold no longer, `busy` who holds shards that were left out."""

    run: str
    until: str
    commands: list[Command] = []
    in_flight: int = 0
    note: str | None = None
    busy: RunBusyError | None = None

    @property
    def requests(self) -> int:
        return sum(command.requests for command in self.commands)


def sign_object(uri: str, *, expires: str | None = None, put: bool = False) -> tuple[str, Signer]:
    """A URL for one object, and who signed it. Raises `MissingError` where there is nothing to read."""
    if not s3.is_s3(uri):
        raise UsageError(f"{uri}: is not in a bucket: only s3://… can be signed", hint="s3://BUCKET/KEY")
    signer = Signer(uri, presigning.seconds_of(expires) if expires is not None else None)
    if put:
        return signer.put(uri), signer
    s3.look(uri)
    return signer.get(uri), signer


def is_run(uri: str) -> bool:
    """Whether `uri` names a run in a bucket, not an object."""
    if not s3.is_s3(uri):
        return Run.exists(uri) if "://" not in uri else False
    return s3.version(f"{uri.rstrip('/')}/manifest.json") is not None


@contextlib.contextmanager
def opened(output: str | None) -> Iterator[IO[bytes]]:
    """Where the commands go; None for stdout. Nobody else may read the file: whoever has the URLs can use them."""
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    elif s3.is_s3(output):
        with io.BytesIO() as stream:
            yield stream
            s3.put(output, stream.getvalue())
    else:
        with write_whole(output) as stream:
            os.fchmod(stream.fileno(), 0o700)
            yield stream


def hand_out(
    run: Run | str | Path,
    *,
    shards: str | None = None,
    expires: str | None = None,
    again: bool = False,
    engine_args: Sequence[str] = (),
    progress: Progress | None = None,
) -> Handout:
    """Give out what is due: a command for each shard, which is in flight from then on, until its output comes or its
    URLs expire. With `again`, also new URLs for what was given out before and has not come: the same files.

    `expires` is a time as "12h" or "7d"; `shards` ("3/8") as for `submit`; `engine_args` go to vLLM. Raises
    `UsageError` for a local run, or where the credentials expire before that; `RunBusyError` where other processes hold
    all there is to do; `RunError`, `CredentialsError`, `StorageError`.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    progress = progress or Silent()
    _refuse_unfit(run, engine_args)
    signer = Signer(run.name, presigning.seconds_of(expires) if expires is not None else None)
    seals = {seal.shard: seal for seal in run.seals()}
    chosen = select(list(seals.values()), shards)
    if run.prepared() is None:
        progress.say(f"warning: prepare has not finished; giving out of what it sealed, {counted(len(seals), 'shard')}")
    sessions.recover(run, seals)
    tell(elsewhere.gather(run, seals, close=not again), progress)
    args = _arguments(run, chosen, engine_args)
    handout = Handout(run=run.name, until=signer.until.isoformat(), note=signer.note)
    with ways.for_elsewhere(run, chosen, signer) as resolver:
        for seal in chosen:
            try:
                for attempt in _attempts(run, seal, signer, handout, resolver, again=again):
                    handout.commands.append(_command(run, seal, attempt, signer, args))
            except RunBusyError as exc:
                handout.busy = exc
            run.leave_requests(seal.shard)
    if handout.busy is not None and not handout.commands:
        raise handout.busy
    return handout


def tell(gathered: elsewhere.Gathered, progress: Progress) -> None:
    """Say what came, if anything did."""
    if text := str(gathered):
        progress.say(text)
    if gathered.busy is not None:
        progress.say(f"{gathered.busy.message}: what came for it from elsewhere is collected later")


def _refuse_unfit(run: Run, engine_args: Sequence[str]) -> None:
    if not s3.is_s3(run.name):
        raise UsageError(
            f"{run.name}: is a local run: machines elsewhere can read and write only what is in a bucket",
            hint=f"prepare into s3://BUCKET/NAME; or aws s3 cp --recursive --exclude 'leases/*' --exclude 'engine/*' "
            f"{run.name} s3://BUCKET/NAME",
        )
    vllm_install.refuse_ours(engine_args)
    if run.manifest.url in SERVED:
        raise UsageError(
            f"vLLM's batch runner does not run {run.manifest.url}, only its server does",
            hint=f"batchkit submit {run.name} --engine serve",
        )


def _attempts(
    run: Run, seal: Seal, signer: Signer, handout: Handout, resolver: Resolver | None, *, again: bool
) -> Iterator[Attempt]:
    """What is given out of a shard: its due requests as a new attempt, and with `again` those that are out already."""
    out, due, flying = _look(run, seal)
    handout.in_flight += 0 if again else flying
    if not due and not (again and out):
        return
    with run.lease(f"{seal.shard:05d}"):
        out, due, _ = _look(run, seal)  # again: another process may have worked on it before we held the lease
        for attempt in out if again else ():
            yield elsewhere.renew(run, seal, attempt.number, signer.until, resolver)
        if due:
            _check_requests(run, seal)
            given = elsewhere.give_out(run, seal, due, signer.until, resolver)
            if given is not None:
                yield given


def _look(run: Run, seal: Seal) -> tuple[list[Attempt], list[int], int]:
    """The attempts that are out, the positions that are due, and how many requests are in flight."""
    found = outcomes.load(run, seal)
    flying = sum(outcome.in_flight for outcome in found.own)
    return elsewhere.open_in(run, seal.shard), to_send(found, attempts=3), flying


def _check_requests(run: Run, seal: Seal) -> None:
    """Nobody reads them here: at least they must be as long as prepare wrote them."""
    path = run.requests_path(seal.shard)
    if run.bytes_of(path) != seal.requests_bytes:
        raise RunError(f"{path}: is not what prepare wrote, or is gone", hint=PREPARE_AGAIN)


def _arguments(run: Run, seals: Sequence[Seal], engine_args: Sequence[str]) -> list[str]:
    """What stands behind input and output. The machine is not known: it is believed to have a GPU."""
    install = vllm_install.Install(version=(0, 0), text="", cpu=False, module=MODULE)
    task = pooling(run, seals)
    added = vllm_install.pooling_args(install, task, engine_args) if task is not None else []
    model = run.manifest.model
    return vllm_install.common_args(install, model=model, names=[model], args=[*added, *engine_args])


def _command(run: Run, seal: Seal, attempt: Attempt, signer: Signer, args: Sequence[str]) -> Command:
    place = attempt.elsewhere
    if place is None:
        raise AssertionError("not an attempt elsewhere")
    source, target = signer.get(f"{run.name}/{place.input}"), signer.put(f"{run.name}/{place.output}")
    return Command(
        shard=seal.shard,
        attempt=attempt.number,
        requests=elsewhere.requests_in(seal, attempt),
        command=["python", "-m", MODULE, "-i", source, "-o", target, *args],
        input=source,
        output=target,
        expires=signer.until.isoformat(),
    )
