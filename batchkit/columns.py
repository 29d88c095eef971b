"""Arrow record batches → rows: what Parquet files and Hugging Face datasets have in common.

Images are columns of bytes, of structs `{bytes, path}` (Hugging Face's Image feature as it is stored), or lists of
these; their bytes go into requests as they are. Bytes have no form in JSON: they travel beside it, where a placeholder
may name them, too, or are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from batchkit import storage
from batchkit.errors import InputError
from batchkit.inline_images import Images, detach

if TYPE_CHECKING:
    import pyarrow as pa

PIECE_BYTES = 4_000_000
"""About so much of a batch is turned into Python's objects at once."""

PIECE_ROWS = 256

_encode = msgspec.json.Encoder().encode


@contextlib.contextmanager
def told(uri: str, kind: str) -> Iterator[None]:
    """What pyarrow says of a file, as an `InputError`."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError as exc:
        raise InputError(f"{storage.shown(uri)}: no such file", hint="check the path") from exc
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:  # the last where a column's name is broken
        raise InputError(
            f"{storage.shown(uri)}: cannot be read as {kind}: {exc}", hint="check that the file is whole"
        ) from exc


class Made(NamedTuple):
    """A row as `tasks.Row` has it, without its place."""

    raw: bytes
    attached: Mapping[str, Images] | None
    fault: tuple[str, str] | None


class _Plan(NamedTuple):
    """What becomes of one column. `target` is the type that its values are turned into first, None for its own."""

    place: int
    name: str
    is_image: bool
    may_be_image: bool
    has_bytes: bool
    target: Any


class Columns:
    """How the columns of a schema become rows. `left_out` names those that hold bytes which no request gets.

    Raises `InputError` where two columns have one name.
    """

    def __init__(self, uri: str, schema: pa.Schema, images: tuple[str, ...]) -> None:
        if twice := [name for name in dict.fromkeys(schema.names) if schema.names.count(name) > 1]:
            raise InputError(f"{storage.shown(uri)}: two columns are named {twice[0]!r}", hint="rename one of them")
        self._images = images
        self._plans = [_plan(index, field, images) for index, field in enumerate(schema)]
        self.left_out = [plan.name for plan in self._plans if plan.has_bytes and not plan.is_image]

    def rows(self, batch: pa.RecordBatch) -> Iterator[Made]:
        """The rows of a batch, with few of them in memory as Python's objects at once."""
        each = batch.nbytes // max(batch.num_rows, 1)
        step = max(1, min(PIECE_ROWS, PIECE_BYTES // max(each, 1)))
        for start in range(0, batch.num_rows, step):
            yield from self._some(batch.slice(start, step))

    def _some(self, batch: pa.RecordBatch) -> Iterator[Made]:
        columns = [(plan, *_values(batch.column(plan.place), plan)) for plan in self._plans]
        for row in range(batch.num_rows):
            fields: dict[str, Any] = {}
            attached: dict[str, Images] = {}
            fault = None
            for plan, values, faults in columns:
                value = values[row]
                if row in faults:
                    fault = fault or ("value", f"column {plan.name!r} holds what cannot be read: {faults[row]}")
                if plan.is_image and plan.has_bytes:
                    sources, shown = _split(value)
                    if sources is not None:
                        attached[plan.name] = sources
                    if shown is not None or value is None:
                        fields[plan.name] = shown
                elif not plan.has_bytes:
                    fields[plan.name] = value
                else:
                    if plan.may_be_image and (sources := _split(value)[0]) is not None:
                        attached[plan.name] = sources
                    if (rest := _without_bytes(value)) is not None:
                        fields[plan.name] = rest
            attached |= detach(fields, self._images)
            try:
                raw = _encode(fields)
            except (ValueError, TypeError, OverflowError, RecursionError) as exc:
                raw = _encode({name: value if _has_form(value) else None for name, value in fields.items()})
                name = next((name for name, value in fields.items() if not _has_form(value)), "")
                fault = fault or ("value", f"column {name!r} holds what has no form in JSON: {exc}")
            yield Made(raw, attached or None, fault)


def _has_form(value: Any) -> bool:
    """Whether a value can be written as JSON."""
    try:
        _encode(value)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return False
    return True


def _plan(index: int, field: pa.Field, images: tuple[str, ...]) -> _Plan:
    target = _readable(field.type)
    return _Plan(
        place=index,
        name=field.name,
        is_image=field.name in images,
        may_be_image=_may_be_image(field.type),
        has_bytes=_has_bytes(field.type),
        target=None if target == field.type else target,
    )


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow.types as is_a

    return bool(
        is_a.is_binary(kind)
        or is_a.is_binary_view(kind)
        or is_a.is_large_binary(kind)
        or is_a.is_fixed_size_binary(kind)
    )


def _may_be_image(kind: pa.DataType) -> bool:
    """Whether a column of this type has the form of one that holds images, or lists of them."""
    import pyarrow.types as is_a

    if is_a.is_dictionary(kind) or is_a.is_list(kind) or is_a.is_large_list(kind) or is_a.is_fixed_size_list(kind):
        return _may_be_image(kind.value_type)
    if is_a.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _has_bytes(kind: pa.DataType) -> bool:
    import pyarrow.types as is_a

    if is_a.is_dictionary(kind):
        return _has_bytes(kind.value_type)
    if _is_binary(kind):
        return True
    return any(_has_bytes(kind.field(index).type) for index in range(kind.num_fields))


def _readable(kind: pa.DataType) -> pa.DataType:
    """`kind` without what Python has no objects for: nanoseconds, half floats. Inside lists and structs, too."""
    import pyarrow as pa
    import pyarrow.types as is_a

    if is_a.is_dictionary(kind):
        return _readable(kind.value_type)
    if is_a.is_struct(kind):
        return pa.struct([field.with_type(_readable(field.type)) for field in kind])
    if is_a.is_list(kind) or is_a.is_large_list(kind):
        made = pa.list_ if is_a.is_list(kind) else pa.large_list
        return made(kind.value_field.with_type(_readable(kind.value_type)))
    if is_a.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_readable(kind.value_type)), kind.list_size)
    if is_a.is_map(kind):
        return pa.map_(_readable(kind.key_type), kind.item_field.with_type(_readable(kind.item_type)))
    return _readable_leaf(kind)


def _readable_leaf(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa
    import pyarrow.types as is_a

    if is_a.is_timestamp(kind):
        return pa.timestamp("us", kind.tz) if kind.unit == "ns" else kind
    if is_a.is_duration(kind):
        return pa.duration("us") if kind.unit == "ns" else kind
    if is_a.is_time64(kind):
        return pa.time64("us")
    return pa.float32() if is_a.is_float16(kind) else kind


def _values(column: pa.Array, plan: _Plan) -> tuple[list[Any], dict[int, str]]:
    """The values of a column as Python has them; for those that it cannot have None, and why."""
    import pyarrow as pa

    try:
        if plan.target is not None:
            column = column.cast(plan.target, safe=False)
        return column.to_pylist(), {}
    except (pa.ArrowException, ValueError, OverflowError):  # text that is not UTF-8, a date after the year 9999
        values: list[Any] = []
        faults: dict[int, str] = {}
        for index, scalar in enumerate(column):
            try:
                values.append(scalar.as_py())
            except (pa.ArrowException, ValueError, OverflowError) as exc:
                values.append(None)
                faults[index] = str(exc)
        return values, faults


def _split(value: Any) -> tuple[Images | None, Any]:
    """What an image column holds: its images, and what of it is shown in the row (paths; None for nothing)."""
    if isinstance(value, list):
        pairs = [_one(entry) for entry in value]
        shown = [path for _, path in pairs]
        sources = tuple(source for source, _ in pairs if source is not None)
        if len(sources) < len(pairs):
            return None, shown  # one of them is missing: the row says so, as a list of paths would
        return sources, shown if not shown or any(path is not None for path in shown) else None
    source, path = _one(value)
    return (None, path) if source is None else ((source,), path)


def _one(value: Any) -> tuple[str | bytes | None, Any]:
    """The image of one value and the path that is shown for it."""
    if isinstance(value, bytes):
        return value, None
    if isinstance(value, dict) and (data := value.get("bytes")) is not None and isinstance(data, bytes):
        return data, value.get("path")
    if isinstance(value, dict):
        path = value.get("path")
        return (path if isinstance(path, str) and path else None), path
    return None, value


def _without_bytes(value: Any) -> Any:
    """A value without the bytes in it; None for nothing that is left."""
    if isinstance(value, dict):
        return {name: _without_bytes(part) for name, part in value.items() if not isinstance(part, bytes)} or None
    if isinstance(value, list | tuple):
        return [_without_bytes(part) for part in value if not isinstance(part, bytes)] or None
    return None if isinstance(value, bytes) else value
