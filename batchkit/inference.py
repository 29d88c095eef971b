"""`infer`: answers for rows that are in memory, for use inside an evaluation harness or a notebook."""

from __future__ import annotations

import base64
import contextlib
import io
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from batchkit import references, s3, schemas
from batchkit.errors import InputError, UsageError
from batchkit.merging import merge
from batchkit.options import Backend
from batchkit.preparation import prepare
from batchkit.progress import Progress
from batchkit.responses import Verdict
from batchkit.runs import Run
from batchkit.storage import is_remote, write_whole
from batchkit.submission import submit
from batchkit.tasks import BATCH_KEYS, DEFAULT_IMAGE_FIELD

Id = str | int
LOOKS = 16
"""Objects that are looked at side by side."""
RETRIED = frozenset({Verdict.FAILED, Verdict.EXPIRED, Verdict.MISSING})

OURS_OF_PREPARE = {
    **dict.fromkeys(("start", "end", "limit"), "give infer the rows that are meant, or name their ids with only="),
    **dict.fromkeys(("model", "backend", "progress"), "it is an argument of infer itself"),
}
OURS_OF_SUBMIT = {
    "retry": "retry_failed=True asks again what failed",
    "positions": "only= names the ids of the rows that are meant",
    "limit": "give infer the rows that are meant, or name their ids with only=",
}
"""Options that infer sets itself, and what to do instead."""

_encode = msgspec.json.Encoder().encode


def infer(
    rows: Iterable[Mapping[str, Any]],
    *,
    model: str,
    backend: Backend = "server",
    run: str | Path | None = None,
    only: Iterable[Id] | None = None,
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

    Everything is kept in the run directory `run`, which may be `s3://…`: called again, also after a kill, it asks only
    what has no answer. Unless given, it is one in the user's cache, named by the rows, the options, and what the images
    are now: the sizes and times of files, the ETags of objects in S3. Of `https://` images the address alone counts.
    Works on lists and iterators, in scripts and in notebooks. Raises what `prepare`, `submit` and `merge` raise, and
    `InputError` for rows that it cannot take.
    """
    _refuse_ours("prepare_options has", prepare_options or {}, OURS_OF_PREPARE)
    _refuse_ours("infer has no option", submit_options, OURS_OF_SUBMIT)
    lines, positions = _as_lines(rows, id_field)
    wanted = None if only is None else _chosen(positions, only)
    options = {name: _plain(value) for name, value in (prepare_options or {}).items()}
    if options.get("response_schema") is not None:
        options["response_schema"] = schemas.load(options["response_schema"])
    if lines and not msgspec.json.decode(lines[0]).keys() >= BATCH_KEYS:  # requests name no files
        options.setdefault("image_root", str(Path.cwd()))
    folder = _folder(run) if run is not None else _cached(lines, model, backend, options)
    tasks = f"{folder}.tasks.jsonl"
    _write_tasks(tasks, lines)
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


def _refuse_ours(what: str, given: Mapping[str, Any], ours: Mapping[str, str]) -> None:
    for name in given:
        if name in ours:
            raise UsageError(f"{what} {name!r}", hint=ours[name])


def _as_lines(rows: Iterable[Mapping[str, Any]], id_field: str) -> tuple[list[bytes], dict[Id, int]]:
    """The rows as lines of a task file, and where each id is."""
    lines: list[bytes] = []
    positions: dict[Id, int] = {}
    for position, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"row {position} is a {type(row).__name__}, not a mapping", hint="rows are dicts")
        row_id = row.get(id_field, position)
        if isinstance(row_id, numbers.Integral):
            row_id = int(row_id)
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
    if isinstance(value, numbers.Integral) and not isinstance(value, int):  # numpy's
        return int(value)
    if isinstance(value, bytes | bytearray):
        return "data:application/octet-stream;base64," + base64.b64encode(value).decode()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if type(value).__module__.startswith("PIL."):
        stream = io.BytesIO()
        value.save(stream, format="PNG")
        return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return value


def _chosen(positions: Mapping[Id, int], only: Iterable[Id]) -> frozenset[int]:
    chosen = set()
    for one in only:
        if one not in positions:
            raise UsageError(f"only= names {one!r}, which is the id of no row")
        chosen.add(positions[one])
    return frozenset(chosen)


def _folder(run: str | Path) -> str | Path:
    if s3.is_s3(run):
        return str(run).rstrip("/")
    if is_remote(str(run)):
        raise UsageError(f"run={run}: a run is a local folder, or in a bucket", hint="a folder, or s3://BUCKET/RUN")
    return Path(run).expanduser().absolute()


def _cached(lines: Sequence[bytes], model: str, backend: str, options: Mapping[str, Any]) -> Path:
    """A place in the user's cache that is the same for the same work."""
    import platformdirs

    digest = xxhash.xxh3_128(_encode([model, backend, sorted(options.items()), str(Path.cwd())]))
    names = options.get("image_field") or (DEFAULT_IMAGE_FIELD,)
    root = str(options.get("image_root", ".")).removesuffix("/")
    versions = _object_versions(lines, names, root)
    for line in lines:
        digest.update(line)
        digest.update(_image_states(line, names, root, versions))
    folder = Path(platformdirs.user_cache_dir("batchkit")) / "infer"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / digest.hexdigest()[:20]


def _image_states(line: bytes, names: Sequence[str], root: str, versions: Mapping[str, str | None]) -> bytes:
    """What the images that a row names are now: another picture behind the same name is another question."""
    states: list[Any] = []
    for reference in _references(line, names):
        if (uri := references.remote(reference, root)) is not None:
            if uri in versions:
                states.append(versions[uri])
            continue
        with contextlib.suppress(OSError, ValueError):
            stat = (Path(root) / reference.removeprefix("file://")).stat()
            states.append((stat.st_size, stat.st_mtime_ns))
    return _encode(states)


def _object_versions(lines: Sequence[bytes], names: Sequence[str], root: str) -> dict[str, str | None]:
    """The ETags of all images in S3, each object asked for once; None for one that cannot be read: prepare says why."""
    found = (references.remote(reference, root) for line in lines for reference in _references(line, names))
    uris = list(dict.fromkeys(uri for uri in found if uri is not None and s3.is_s3(uri)))
    with ThreadPoolExecutor(min(LOOKS, len(uris) or 1)) as pool:
        return dict(zip(uris, pool.map(s3.version, uris), strict=True))


def _references(line: bytes, names: Sequence[str]) -> Iterator[str]:
    fields = msgspec.json.decode(line)
    for name in names:
        value = fields.get(name)
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str) and not reference.startswith("data:"):
                yield reference


def _write_tasks(path: str, lines: Sequence[bytes]) -> None:
    data = b"".join(lines)
    if not data:
        raise InputError("there are no rows")
    if s3.is_s3(path):
        with contextlib.suppress(s3.MissingError):
            if s3.get(path)[0] == data:
                return
        s3.put(path, data)
    elif not Path(path).exists() or Path(path).read_bytes() != data:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path) as stream:
            stream.write(data)


def _answers(run: Run, ids: Sequence[Id], wanted: frozenset[int] | None) -> dict[Id, Any]:
    answers = {}
    with open(run.fetch(run.path / "results.jsonl"), "rb") as stream:
        for position, (row_id, line) in enumerate(zip(ids, stream, strict=True)):
            if wanted is None or position in wanted:
                answers[row_id] = msgspec.json.decode(line)["parsed_answer"]
    return answers
