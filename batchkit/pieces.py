"""The results of one shard as files of their own, made by a worker process and put together by another.

A piece is made of files that lie here, and of nothing that a process knows of its run: `merging` and `piles` order it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO, Any, NamedTuple

from batchkit.billing import Charges
from batchkit.errors import StorageError
from batchkit.flat import FlatEncoder, FlatFields, shown_in
from batchkit.joining import join
from batchkit.outcomes import ShardFiles
from batchkit.results import ResultEncoder
from batchkit.sheets import HasImagesError, NoAlbum, Sheet
from batchkit.storage import BUFFER_BYTES
from batchkit.summaries import Tally


class Form(NamedTuple):
    """What the results of a run look like. `flat` is None for rows with all their fields; `host` is who bills."""

    model: str | None
    parse: str
    schema: dict[str, Any] | None
    prefix: str
    flat: FlatFields | None
    host: str = "openai"


class Order(NamedTuple):
    """`requests` are those of the shard, where flat results look at them. `aside` is the beginning of all names."""

    files: ShardFiles
    requests: Path | None
    form: Form
    retry: bool
    aside: Path


class Piece(NamedTuple):
    """Files of lines; one that would be empty is not there."""

    results: Path
    retry: Path
    strays: Path
    tally: Tally
    charges: Charges


class Encoding:
    """The encoder of a merge, which is turned to one order after another."""

    def __init__(self, *, parse: str, prefix: str, flat: bool) -> None:
        self.encoder: ResultEncoder | FlatEncoder
        self.encoder = FlatEncoder(parse, FlatFields(ids=None)) if flat else ResultEncoder(parse=parse, prefix=prefix)
        self._form: Form | None = None

    def turn_to(self, order: Order) -> None:
        """The rows to come are those of `order`."""
        form, seal = order.form, order.files.seal
        if form != self._form:  # to check answers by a schema takes time to prepare
            self.encoder.turn_to(form.model, form.parse, form.schema)
            self._form = form
        if isinstance(self.encoder, FlatEncoder) and form.flat is not None:
            self.encoder.go_to(seal.start, form.flat)
            self.encoder.know(shown_in(order.requests, seal))


_encoding: Encoding | None = None


def make(order: Order) -> Piece | None:
    """Make the piece that is ordered; None where a model has made images, which are not for a worker."""
    names = [order.aside.with_name(f"{order.aside.name}-{kind}") for kind in ("results", "retry", "strays")]
    results, retry, strays = map(_Lazy, names)
    try:
        with results, retry, strays:
            sheet = Sheet(
                _encoder(order),
                Tally(groups=None),
                results,
                retry=retry if order.retry else None,
                strays=lambda: strays,
                album=NoAlbum(),
            )
            join(order.files, sheet)
            sheet.flush()
    except HasImagesError:
        for path in names:
            path.unlink(missing_ok=True)
        return None
    except OSError as exc:
        raise StorageError(
            f"{order.aside.parent}: cannot be written: {exc.strerror or exc}", hint="free some disk space, merge again"
        ) from exc
    return Piece(names[0], names[1], names[2], sheet.tally, sheet.charges)


def _encoder(order: Order) -> ResultEncoder | FlatEncoder:
    global _encoding  # noqa: PLW0603  # the state of a worker process, which serves one merge: there is no other place
    if _encoding is None:
        form = order.form
        _encoding = Encoding(parse=form.parse, prefix=form.prefix, flat=form.flat is not None)
    _encoding.turn_to(order)
    return _encoding.encoder


class _Lazy:
    """A file that is there once something is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = contextlib.ExitStack()
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, lines: bytes) -> None:
        if self._stream is None:
            stream = open(self._path, "wb", buffering=BUFFER_BYTES)  # noqa: SIM115  # the stack closes it
            self._stream = self._stack.enter_context(stream)
        self._stream.write(lines)
