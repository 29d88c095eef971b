"""The results of a merge, put together of the shards', which are made here or by worker processes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from batchkit import pieces, teams
from batchkit.errors import BatchkitError, StorageError
from batchkit.joining import join
from batchkit.outputs import Outputs
from batchkit.pieces import Encoding, Order, Piece
from batchkit.progress import Progress
from batchkit.storage import aside_of
from batchkit.teams import Team

FORKED_ROWS = 20_000
SPAWNED_ROWS = 500_000
"""So many rows are worth other processes: forked ones, which begin at once, and new ones, after half a second."""


def workers_for(asked: int | None, shards: int, *, rows: int) -> int:
    """How many processes make the results: as many as `asked`, or one a core where there is enough to do."""
    if asked is None:
        enough = rows >= (FORKED_ROWS if teams.can_fork() else SPAWNED_ROWS)
        asked = min(teams.cores(), teams.MOST) if enough else 1
    return max(1, min(asked, shards))


@contextlib.contextmanager
def folder_aside(results: Path) -> Iterator[Path]:
    """A folder beside the results for as long as they are made; what a kill leaves of it, the next merge removes."""
    folder = aside_of(results)
    try:
        try:
            folder.mkdir()
        except OSError as exc:
            raise StorageError(f"{folder.parent}: cannot be written: {exc.strerror or exc}") from exc
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def team_of(workers: int) -> Iterator[Team]:
    """The processes of one merge."""
    try:
        with Team(workers) as team:
            yield team
    except BrokenProcessPool as exc:
        raise BatchkitError(
            "a worker of merge was killed, perhaps for want of memory",
            hint="run the same command again, with --workers 1",
        ) from exc


def assemble(orders: Iterable[Order], outputs: Outputs, encoding: Encoding, *, progress: Progress, team: Team) -> None:
    """Write the results of all orders, in their order."""
    with _made(orders, team) as made:
        for order, piece in made:
            outputs.turn_to(host=order.form.host, model=order.form.model)
            if piece is None:
                encoding.turn_to(order)
                join(order.files, outputs.sheet)
                outputs.settle()
            else:
                outputs.take(piece)
            progress.update(order.files.seal.end - order.files.seal.start)


@contextlib.contextmanager
def _made(orders: Iterable[Order], team: Team) -> Iterator[Iterable[tuple[Order, Piece | None]]]:
    """Each order with its piece; None for what is still to be made, and in this process."""
    if team.workers == 1:
        yield ((order, None) for order in orders)
        return
    with contextlib.closing(team.in_order(orders, pieces.make)) as made:
        yield made
