"""`infer`: answers for rows that are in memory, for use inside an evaluation harness or a notebook."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from batchkit import schemas
from batchkit.errors import InputError, UsageError
from batchkit.merging import merge
from batchkit.options import Backend
from batchkit.preparation import prepare
from batchkit.progress import Progress
from batchkit.responses import Verdict
from batchkit.runs import Run
from batchkit.storage import write_whole
from batchkit.submission import submit

Id = str | int
RETRIED = frozenset({Verdict.FAILED, Verdict.EXPIRED, Verdict.MISSING})

_encode = msgspec.json.Encoder().encode


def infer(
    rows: Iterable[Mapping[str, Any]],
    *,
    model: str,
    backend: Backend = "server",
    run: str | Path | None = None,
    only: Collection[Id] | None = None,
    retry_failed: bool = False,
    parse: str | None = None,
    id_field: str = "id",
    progress: Progress | None = None,
    prepare_options: Mapping[str, Any] | None = None,
    **submit_options: Any,
) -> dict[Id, Any]:
    """Ask `model` the question of each row, and return a dict from id to answer, parsed as `parse` says.

    A row is an object as in a task file: `image` (a path, a data URL, encoded bytes or a PIL image; or a list of these)
    and `question`; its id is its field `id_field`, or its place (from 0) where it has none. Rows without an answer have
    None. `only` asks and returns the rows with these ids alone; what other calls have answered stays. `retry_failed`
    asks again what failed. `prepare_options` and `submit_options` are those of `prepare` and `submit`;
    with a `response_schema` (a pydantic model, say) answers are the decoded JSON that matches it.

    Everything is kept in the run directory `run` (one in the user's cache, named by the rows and the options, unless
    given): called again, also after a kill, it asks only what has no answer. Works on lists and iterators, in scripts
    and in notebooks. Raises what `prepare`, `submit` and `merge` raise, and `InputError` for rows that it cannot take.
    """
    lines, positions = _as_lines(rows, id_field)
    wanted = None if only is None else _chosen(positions, only)
    options = dict(prepare_options or {})
    if options.get("response_schema") is not None:
        options["response_schema"] = schemas.load(options["response_schema"])
    folder = Path(run).expanduser().absolute() if run is not None else _cached(lines, model, backend, options)
    tasks = folder.with_name(folder.name + ".tasks.jsonl")
    _write_tasks(tasks, lines)
    options.setdefault("image_root", str(Path.cwd()))
    prepare(tasks, folder, model=model, backend=backend, progress=progress, **options)
    submit(
        folder,
        retry=RETRIED if retry_failed else frozenset(),
        positions=wanted,
        progress=progress,
        **submit_options,
    )
    merge(folder, parse=parse)
    return _answers(Run.open(folder), list(positions), wanted)


def _as_lines(rows: Iterable[Mapping[str, Any]], id_field: str) -> tuple[list[bytes], dict[Id, int]]:
    """The rows as lines of a task file, and where each id is."""
    lines: list[bytes] = []
    positions: dict[Id, int] = {}
    for position, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"row {position} is a {type(row).__name__}, not a mapping", hint="rows are dicts")
        row_id = row.get(id_field, position)
        if not isinstance(row_id, str | int):
            raise InputError(f"row {position}: its id {row_id!r} is neither a text nor a whole number")
        if row_id in positions:
            raise InputError(f"row {position}: its id {row_id!r} is that of row {positions[row_id]} already")
        positions[row_id] = position
        try:
            lines.append(_encode({name: _plain(value) for name, value in row.items()}) + b"\n")
        except (TypeError, ValueError) as exc:
            raise InputError(f"row {position}: cannot be written as JSON: {exc}") from exc
    return lines, positions


def _plain(value: Any) -> Any:
    """A value as JSON has it: images and bytes as data URLs, paths as texts."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bytes | bytearray):
        return "data:application/octet-stream;base64," + base64.b64encode(value).decode()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if type(value).__module__.startswith("PIL."):
        stream = io.BytesIO()
        value.save(stream, format="PNG")
        return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return value


def _chosen(positions: Mapping[Id, int], only: Collection[Id]) -> frozenset[int]:
    unknown = [one for one in only if one not in positions]
    if unknown:
        raise UsageError(f"only= names {unknown[0]!r}, which is the id of no row")
    return frozenset(positions[one] for one in only)


def _cached(lines: Sequence[bytes], model: str, backend: str, options: Mapping[str, Any]) -> Path:
    """A place in the user's cache that is the same for the same work."""
    import platformdirs

    digest = xxhash.xxh3_128(_encode([model, backend, sorted(options.items()), str(Path.cwd())]))
    for line in lines:
        digest.update(line)
    folder = Path(platformdirs.user_cache_dir("batchkit")) / "infer"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / digest.hexdigest()[:20]


def _write_tasks(path: Path, lines: Sequence[bytes]) -> None:
    data = b"".join(lines)
    if not data:
        raise InputError("there are no rows")
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path) as stream:
            stream.write(data)


def _answers(run: Run, ids: Sequence[Id], wanted: frozenset[int] | None) -> dict[Id, Any]:
    answers = {}
    with open(run.path / "results.jsonl", "rb") as stream:
        for position, (row_id, line) in enumerate(zip(ids, stream, strict=True)):
            if wanted is None or position in wanted:
                answers[row_id] = msgspec.json.decode(line)["parsed_answer"]
    return answers
