"""`merge` for response files that no run knows, whoever made them: a task file and any pile of output and error files.

Rows and responses are sorted into shards like those of a run, in a folder beside the results, and then merged as a run
is: memory is bounded however large the pile. The whole pile counts as one attempt.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from batchkit import remotes, s3, wildcards
from batchkit.assembly import assemble, folder_aside, team_of, workers_for
from batchkit.errors import InputError, UsageError
from batchkit.flat import FlatFields, check_flat, default_ids
from batchkit.identities import Identity
from batchkit.inputs import open_source
from batchkit.outputs import Outputs, place_of, places
from batchkit.pieces import Encoding, Form, Order
from batchkit.progress import Progress, Silent
from batchkit.routing import MOST_PARTITIONS
from batchkit.sorting import LEAST_BYTES, Sorting
from batchkit.storage import COMPRESSED, is_remote, shown
from batchkit.summaries import Summary

PARTITION_BYTES = 32 << 20
"""Of so many bytes of rows and responses a process has the ids in memory at once: with short ones some 40,000."""
ROW_BYTES = 512
"""About what a row has, with its response."""
_EXPANSION = 10  # how much larger than its file a compressed one is taken to be
_REMOTE_BYTES = 1 << 30  # what a remote file is taken to have


def merge_pile(
    tasks: str | Path,
    responses: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    id_fields: Sequence[str] | None = None,
    id_separator: str = "|",
    parse: str | None = None,
    prefix: str = "",
    flat: bool = False,
    retry_file: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write one result per row of the file `tasks`, answered from the files that the globs `responses` match.

    The custom_id of a row is the text of its id field (a number: as the row writes it), of several joined with
    `id_separator`; `id_fields` None: `id`, of VLMEvalKit's files `index`. A row without it, or with that of an earlier
    row, is `rejected`. The other options are those of `merging.merge`. Raises `InputError` where a file is missing,
    `UsageError` as `merge` does.
    """
    if output is None:
        raise UsageError("results of files that no run knows need a name", hint="-o results.jsonl")
    source = open_source(tasks)
    if flat:
        check_flat(prefix)
    form = Form(None, parse or "text", None, prefix, FlatFields(ids=None, custom_ids=True) if flat else None)
    encoding = Encoding(parse=form.parse, prefix=prefix, flat=flat)
    to = places(output, retry_file)
    files = _find(responses, [*to, Path(tasks)])
    places(output, retry_file, never=[place_of(name) for name in (str(tasks), *files)])
    identity = Identity(tuple(id_fields or default_ids(source.format)), id_separator)
    size = sum(map(_size, files))
    partitions = max(1, min(MOST_PARTITIONS, -(-(source.size + size) // PARTITION_BYTES)))
    # How many rows there are is not known yet; for little more than one section other processes are not worth it.
    count = workers_for(workers, -(-(source.size + size) // LEAST_BYTES), rows=(source.size + size) // ROW_BYTES)
    with (
        Outputs(to, encoding.encoder) as outputs,
        folder_aside(to.results) as folder,
        team_of(count) as team,
    ):
        sorting = Sorting(folder, source, identity, partitions=partitions, team=team)
        sorting.take_rows()
        sorting.take_responses(files, outputs.sheet, size=size)
        orders = (
            Order(shard, None, form, retry=True, aside=folder / f"piece-{shard.seal.shard}")
            for shard in sorting.shards()
        )
        assemble(orders, outputs, encoding, progress=progress or Silent(), team=team)
    return outputs.write_summary()


def _find(patterns: Sequence[str | Path], own: Sequence[Path]) -> list[str]:
    """The files that the patterns match, each once, sorted within its pattern. A wildcard does not mean our own."""
    own_paths = {path.expanduser().resolve() for path in own}
    found: dict[str, None] = {}
    for pattern in map(str, patterns):
        if is_remote(pattern):
            found |= dict.fromkeys(_find_remote(pattern, {str(shown(path)) for path in own}))
            continue
        path = Path(pattern.removeprefix("file://")).expanduser()
        matches = [path] if path.is_file() else _glob(str(path))
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise InputError(f"{pattern}: no such file", hint="quote patterns: --responses 'out/*.jsonl'")
        found |= {str(match.resolve()): None for match in matches if match == path or match.resolve() not in own_paths}
    return list(found)


def _find_remote(pattern: str, own: set[str]) -> list[str]:
    if not s3.is_s3(pattern) or not wildcards.is_pattern(pattern):
        remotes.look(pattern)  # for its errors, which say more than those of opening it
        return [pattern]
    found = [name for name in wildcards.matching(pattern) if name == pattern or name not in own]
    if not found:
        raise InputError(f"{pattern}: no such object", hint="** stands for any folders: s3://BUCKET/out/**/*.jsonl")
    return found


def _glob(pattern: str) -> list[Path]:
    return [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207  # takes absolute ones


def _size(name: str) -> int:
    if is_remote(name):
        return _REMOTE_BYTES
    try:
        size = Path(name.removeprefix("file://")).expanduser().stat().st_size
    except OSError as exc:
        raise InputError(f"{name}: no such file", hint="check the path") from exc
    return size * (_EXPANSION if name.endswith(COMPRESSED) else 1)
