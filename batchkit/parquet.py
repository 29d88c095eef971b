"""Parquet → rows, row group by row group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchkit import ranges
from batchkit.columns import Columns, told
from batchkit.errors import InputError, UsageError
from batchkit.ranges import RemoteFile
from batchkit.storage import COMPRESSED, is_remote, shown
from batchkit.tasks import FILE_START, Place, Row

if TYPE_CHECKING:
    import pyarrow.parquet as pq

BATCH_BYTES = 8_000_000
BATCH_ROWS = 4096
BUFFER_BYTES = 1 << 20
"""Columns are read through buffers of this size, not whole: a row group may be larger than the memory."""


def read_rows(uri: str, images: tuple[str, ...], start: Place = FILE_START) -> Iterator[Row]:
    """The rows from `start` on; `line` counts rows from 1. Row groups before `start` are not read.

    Raises `InputError` where the file is not Parquet, or broken.
    """
    with open_file(uri) as file, told(uri, "Parquet"):
        columns = Columns(uri, file.schema_arrow, images)
        position = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group)
            if position + size.num_rows <= start.position:
                position += size.num_rows
                continue
            each = size.total_byte_size // max(size.num_rows, 1)
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(each, 1)))
            for batch in file.iter_batches(rows, row_groups=[group], use_threads=False):
                for made in columns.rows(batch):
                    if position >= start.position:
                        yield Row(position, position + 1, made.raw, 0, made.attached, made.fault)
                    position += 1


@contextlib.contextmanager
def open_file(uri: str) -> Iterator[pq.ParquetFile]:
    """Raises `UsageError` where pyarrow is missing, `InputError` where the file is none that it can read."""
    try:
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise UsageError("reading Parquet needs pyarrow", hint="pip install 'batchkit-vlm[parquet]'") from exc
    if shown(uri).endswith(COMPRESSED):
        raise InputError(f"{shown(uri)}: a Parquet file is not compressed as a whole", hint="decompress it first")
    source: Any = RemoteFile(uri) if is_remote(uri) else Path(uri)
    buffer = ranges.BUFFER_BYTES if is_remote(uri) else BUFFER_BYTES
    with told(uri, "Parquet"):
        file = pq.ParquetFile(source, buffer_size=buffer, pre_buffer=False)
    with file:
        yield file


def columns_left_out(uri: str, images: tuple[str, ...]) -> list[str]:
    """The columns of bytes that no request gets."""
    with open_file(uri) as file:
        return Columns(uri, file.schema_arrow, images).left_out


def count_rows(uri: str) -> int:
    with open_file(uri) as file:
        return int(file.metadata.num_rows)
