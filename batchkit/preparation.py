"""The stage `prepare`: task file → sealed shards of rows and requests."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Unpack

import batchkit
from batchkit import options as prepare_options
from batchkit import references, resizing
from batchkit.conversion import Converted, Converter
from batchkit.errors import InputError, RunError, UsageError
from batchkit.inputs import Source, open_source
from batchkit.manifests import FORMAT, Input, Manifest, Rejection, Seal, now
from batchkit.options import PrepareKeywords, PrepareOptions
from batchkit.pricing import estimate
from batchkit.progress import Progress, Silent
from batchkit.provision import with_images
from batchkit.resolutions import Survey
from batchkit.reuse import KnownAnswers, named, open_known
from batchkit.runs import Run
from batchkit.shardfiles import IdsSeen, ShardDraft, ShardWriter, intact_seals, remove_leftovers, rows_unchanged
from batchkit.shards import Cutter
from batchkit.storage import is_remote, shown
from batchkit.takeovers import as_it_stands, clear_behind
from batchkit.tallies import Report, Tally
from batchkit.tasks import FILE_START, Place, Row
from batchkit.workers import Hands, convert_all

Sealed = Callable[[list[Seal]], None]


def prepare(
    tasks: str | Path,
    run: str | Path,
    *,
    strict: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    progress: Progress | None = None,
    sealed: Sealed = lambda seals: None,  # noqa: ARG005  # nobody wants to know
    **keywords: Unpack[PrepareKeywords],
) -> Report:
    """Prepare the rows of the file or dataset `tasks` as requests in the run directory `run`.

    `keywords` are the options that `PrepareOptions` describes; `model` is needed unless the rows are requests in OpenAI
    batch format. Rows that cannot become requests are rejected and counted, never dropped; with `strict` the first one
    raises `InputError`. `workers` is the number of processes, None for one a core; `ray` the address of a Ray cluster
    whose machines do the work, and see the images under the same paths. Neither changes the result. `sealed` is called
    once with the shards that are there already, then with each new one; what it raises ends the preparation.

    Called again with the same input and options it goes on where it stopped, or does nothing. Raises `RunError` where
    the run was prepared with others, `InputError` for an unusable file, `UsageError` for unusable options.
    """
    source, options = _settle(tasks, keywords)
    manifest = _manifest(source, options)
    if not Run.exists(run):  # else a preparation that is finished needs them no more
        for name in named(options.reuse):
            open_known(name, run)
    target = Run.create(run, manifest)
    with target.lease("prepare"):
        _refuse_other(target, manifest)
        if target.manifest.input != manifest.input and not rows_unchanged(target, source.rows):
            raise RunError(
                f"{target.name}: prepared from {shown(source.uri)} as it was then; its rows have changed since",
                hint="prepare the changed file into a new run directory",
            )
        report = _prepare_rest(
            target,
            source,
            options,
            Hands(workers, ray),
            strict=strict,
            progress=progress or Silent(),
            sealed=sealed,
        )
        return _judged(report, source, options)


def plan(
    tasks: str | Path,
    *,
    workers: int | None = None,
    ray: str | None = None,
    progress: Progress | None = None,
    **keywords: Unpack[PrepareKeywords],
) -> Report:
    """What `prepare` would make, exactly: every row is converted, nothing is written.

    And what it would make of the images in other sizes, in part estimated: `Report.resolutions` says which.
    """
    source, options = _settle(tasks, keywords)
    tally = Tally()
    _announce(source, options, progress)
    draft: ShardDraft | None = None
    root, hands = _image_root(source, options), Hands(workers, ray)
    survey = Survey(options, image_root=root)
    with (
        KnownAnswers(named(options.reuse), progress or Silent(), schema=options.response_schema) as known,
        closing(
            _sharded(source, FILE_START, options, image_root=root, seen=IdsSeen(), hands=hands, surveyed=True)
        ) as sharded,
    ):
        for row, done, shard in sharded:
            if draft is None or draft.shard != shard:
                if draft is not None:
                    tally.add(draft.sealed())
                draft = ShardDraft(shard)
            rejection, answer = _rejection(source.uri, row, done), known.find(done)
            draft.add(row, done, rejection, answer)
            survey.add(row, done, reused=answer is not None)
            (progress or Silent()).update(1)
    if draft is not None:
        tally.add(draft.sealed())
    report = _judged(tally.report, source, options)
    report.resolutions = survey.resolutions(
        requests=report.requests, requests_bytes=report.requests_bytes, shards=report.shards, tokens=report.tokens
    )
    return report


def _judged(report: Report, source: Source, options: PrepareOptions) -> Report:
    """The report with what the input, the options and the tokens give rise to."""
    report.reused = dict.fromkeys(named(options.reuse), 0) | report.reused
    report.notes = source.notes()
    report.warnings = prepare_options.find_doubts(options)
    if report.tokens is not None:
        report.estimate = estimate(
            report.tokens, backend=options.backend, model=options.model, shards=report.shards, host=options.host
        )
    return report


def _settle(tasks: str | Path, keywords: PrepareKeywords) -> tuple[Source, PrepareOptions]:
    """The input and the checked options, with the input format decided."""
    source = open_source(tasks, keywords.get("input_format", "auto"), keywords.get("image_field"))
    if source.first is None:
        raise InputError(f"{shown(source.uri)}: has no rows", hint="check the path: the file is empty")
    batch_format = source.format == "batch"
    if "model" not in keywords or not keywords["model"]:
        body = source.first.get("body") if batch_format else None
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            raise UsageError("no model is named", hint="--model MODEL, as the backend calls it")
        keywords = {**keywords, "model": body["model"]}
    if batch_format:
        _refuse_conversion(keywords)
    options = prepare_options.check({**keywords, "input_format": source.format})
    # Made once here for its errors (a template that does not parse, say), before there is a run to resume.
    Converter(options, image_root=_image_root(source, options), batch_format=batch_format)
    return source, options


def _refuse_conversion(keywords: PrepareKeywords) -> None:
    """Rows in batch format are kept as they are: an option that would change them must not be ignored in silence."""
    kept = {"model", "backend", "host", "input_format", "start", "end", "limit", "max_requests", "max_bytes"}
    kept |= {"dedupe", "reuse"}
    defaults = PrepareOptions.model_fields
    for name, value in keywords.items():
        if name not in kept and value != defaults[name].get_default():
            raise UsageError(
                f"--{name.replace('_', '-')} has no meaning for rows that are requests in OpenAI batch format",
                hint="leave it out, or say --input-format jsonl if the rows are tasks",
            )


def _manifest(source: Source, options: PrepareOptions) -> Manifest:
    kept = options.model_dump(mode="json", exclude={"model", "backend"})
    kept["image_root"] = _image_root(source, options)
    kept["reuse"] = named(options.reuse)
    return Manifest(
        format=FORMAT,
        batchkit=batchkit.__version__,
        created=now(),
        input=Input(uri=shown(source.uri), bytes=source.size, modified=source.modified, fingerprint=source.fingerprint),
        model=options.model,
        backend=options.backend,
        options=kept,
        image_libraries=resizing.libraries() if _shrinks(options) else "",
    )


def _shrinks(options: PrepareOptions) -> bool:
    return not (options.max_side is None and options.max_pixels is None and options.fit is None)


def _image_root(source: Source, options: PrepareOptions) -> str:
    if options.image_root is not None and references.is_address(options.image_root):
        return shown(options.image_root).removesuffix("/")
    if options.image_root is None and is_remote(source.uri) and source.format != "hf":
        return shown(source.uri).rpartition("/")[0]
    root = Path(options.image_root).expanduser().absolute() if options.image_root is not None else source.folder
    if not root.is_dir():
        raise InputError(f"{root}: no such directory", hint="check --image-root")
    return str(root)


def _refuse_other(run: Run, new: Manifest) -> None:
    """Raise `RunError` where the run was prepared from another input or with other options."""
    old = run.manifest
    hint = "prepare into a new run directory, or repeat the options as they were"
    if not run.was_sent():
        hint = f"nothing of it was sent: {_removal(run)} and prepare again; or name a new directory"
    was = {**old.options, "model": old.model, "backend": old.backend, "TASKS": old.input.uri}
    now_is = {**new.options, "model": new.model, "backend": new.backend, "TASKS": new.input.uri}
    for name, value in now_is.items():
        # A run of a batchkit that had no such option yet was prepared with what is its default now.
        before = was[name] if name in was else _default(name)
        if before != value:
            flag = name if name == "TASKS" else "--" + name.replace("_", "-")
            raise RunError(
                f"the run was prepared with {flag} {_shown(before)}, now it is {_shown(value)}",
                hint=hint,
            )
    if old.input.bytes != new.input.bytes:
        raise RunError(
            f"{new.input.uri}: had {old.input.bytes:,} bytes when the run was prepared, now it has {new.input.bytes:,}",
            hint="prepare the changed file into a new run directory",
        )


def _default(name: str) -> object:
    kept = PrepareOptions(model="m").model_dump(mode="json")
    return kept.get(name)


def _removal(run: Run) -> str:
    """The command that removes a run."""
    command = "aws s3 rm --recursive" if is_remote(run.name) else "rm -r"
    return f"{command} {shlex.quote(run.name)}"


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _prepare_rest(
    run: Run,
    source: Source,
    options: PrepareOptions,
    hands: Hands,
    *,
    strict: bool,
    progress: Progress,
    sealed: Sealed,
) -> Report:
    """Go on behind the last sealed shard, up to the seal of the preparation."""
    tally = Tally()
    place, shards = FILE_START, 0
    seen = IdsSeen()
    intact = list(intact_seals(run))
    for seal in intact:
        tally.add(as_it_stands(run, seal))
        place, shards = Place(seal.end, seal.next_line, seal.next_offset), seal.shard + 1
    _announce(source, options, progress)
    progress.update(tally.report.rows)
    finished = run.prepared()
    if finished is not None and finished.shards == shards:
        tally.report.already = True
        sealed(intact)
        return tally.report
    _tell_libraries(run, shards, options, progress)
    if options.input_format == "batch":
        for seal in itertools.islice(run.seals(), shards):
            seen.update(run.read_ids(seal))
    root = run.manifest.options["image_root"]
    with (
        KnownAnswers(
            run.manifest.options.get("reuse", ()), progress, into=run.path, schema=run.manifest.response_schema
        ) as known,
        closing(_sharded(source, place, options, image_root=root, seen=seen, hands=hands)) as sharded,
    ):
        remove_leftovers(run, shards)
        sealed(intact)
        for seal in _written(run, shards, sharded, known, strict=strict, progress=progress):
            tally.add(seal)
            sealed([seal])
    clear_behind(run, tally.report.shards)
    run.write_prepared(tally.prepared())
    return tally.report


def _tell_libraries(run: Run, shards: int, options: PrepareOptions, progress: Progress) -> None:
    """Say it where the pictures of one run will have been made by two libraries: alike to the eye, not by the byte."""
    before, now_is = run.manifest.image_libraries, resizing.libraries() if _shrinks(options) else ""
    if shards and before and before != now_is:
        progress.say(f"warning: the run was begun with {before}; the images from shard {shards} on go through {now_is}")


def _written(
    run: Run,
    first: int,
    sharded: Iterator[tuple[Row, Converted, int]],
    known: KnownAnswers,
    *,
    strict: bool,
    progress: Progress,
) -> Iterator[Seal]:
    """Write the shards from number `first` on; yield the seal of each that is finished."""
    writer: ShardWriter | None = None
    try:
        for row, done, index in sharded:
            if writer is None or writer.shard != first + index:
                if writer is not None:
                    yield writer.seal()
                writer = ShardWriter(run, first + index)
            rejection = _rejection(run.manifest.input.uri, row, done)
            if rejection is not None and strict:
                raise InputError(rejection.message, hint="mend the row, or leave out --strict to set it aside")
            writer.add(row, done, rejection, known.find(done))
            progress.update(1)
        if writer is not None:
            yield writer.seal()
    finally:
        if writer is not None:
            writer.close()


def _announce(source: Source, options: PrepareOptions, progress: Progress | None) -> None:
    """Tell the progress how many rows there are to come, about."""
    rows = source.count()
    if progress is not None and rows is not None:
        stop = rows if options.stop is None else min(options.stop, rows)
        progress.grow(max(0, stop - options.start))


def _sharded(
    source: Source,
    place: Place,
    options: PrepareOptions,
    *,
    image_root: str,
    seen: IdsSeen,
    hands: Hands,
    surveyed: bool = False,
) -> Generator[tuple[Row, Converted, int]]:
    """The selected rows from `place` on, what became of them, and the number of their shard counted from `place`."""
    batch_format = options.input_format == "batch"
    make = partial(Converter, options, image_root=image_root, batch_format=batch_format, surveyed=surveyed)
    selected = source.rows(place, first=options.start)
    if (start := options.start) > 0:
        selected = itertools.dropwhile(lambda row: row.position < start, selected)
    if (stop := options.stop) is not None:
        selected = itertools.takewhile(lambda row: row.position < stop, selected)
    # In this process and not in the workers: an image that many rows name is fetched once.
    fetched = with_images(selected, make().remote_images, private_hosts=options.allow_private_hosts)
    with closing(fetched), closing(convert_all(fetched, make, hands)) as converted:
        kept = ((row, seen.check(row, done)) for row, done in converted) if batch_format else converted
        cutter = Cutter(max_requests=options.shard_requests, max_bytes=options.shard_bytes)
        for row, done in kept:
            size = len(done.request) if done.request is not None else 0
            shard, back = cutter.place(size, done.fingerprint if options.dedupe else None)
            yield row, done if back is None else _shared(done, row.position - back), shard


def _shared(done: Converted, first: int) -> Converted:
    """A row whose request is that of the row `first`."""
    return Converted(done.custom_id, None, names=done.names, same_as=first)


def _rejection(uri: str, row: Row, done: Converted) -> Rejection | None:
    """None for a row that was not rejected."""
    if done.request is not None or done.same_as is not None:
        return None
    name = Path(shown(uri)).name
    return Rejection(
        position=row.position,
        line=row.line,
        custom_id=done.custom_id,
        code=done.code,
        message=f"{name}:{row.line}: {done.message}",
    )
