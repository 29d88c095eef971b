"""`evaluate`: results → `evaluation_data.json`, `statistics.json` and `summary.json`, as the Bagel scripts have them.

One result at a time: the rows of the evaluation are written as they are read, and what is added up does not grow with
them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from batchkit.albums import Album, ending_of
from batchkit.errors import InputError, RowError, StorageError, UsageError
from batchkit.figures import OURS, Figures, Judged, Statistics
from batchkit.flat import last_text
from batchkit.images import MEDIA_TYPES, ImageOptions, load
from batchkit.merging import merge
from batchkit.progress import Progress, Silent
from batchkit.runs import Run
from batchkit.scores import Score
from batchkit.storage import COMPRESSED, is_remote, open_read, read_lines, shown, write_whole
from batchkit.summaries import MAX_GROUPS
from batchkit.truths import REASONING_FIELD, Names, Result, images_of_request, read_result

AS_THEY_ARE = ImageOptions(media_types=frozenset(MEDIA_TYPES.values()))
SHOWN = 5
MARK = ".evaluation-by-batchkit"
"""A file in each folder that an evaluation was written to, or was to be."""
_encode = msgspec.json.Encoder().encode
_decode_request = msgspec.json.Decoder(dict[str, Any]).decode


class Entry(msgspec.Struct, kw_only=True):
    """One row of `evaluation_data.json`: the fields of the Bagel scripts, then ours.

    `sample_id` is the place of the result in its file, from 0. `right` says for each way of comparing that applies
    whether the answer is right.
    """

    sample_id: int
    question: Any
    ground_truth_reasoning: Any
    ground_truth_answer: Any
    ground_truth_images: list[str]
    output_reasoning: Any
    output_images: list[str]
    num_reasoning_steps: int
    num_generated_images: int
    custom_id: str | None
    verdict: str
    right: dict[str, bool]


class Overview(msgspec.Struct, kw_only=True):
    """What `summary.json` says. `model` is None where there are several `models`."""

    results: str
    model: str | None
    models: list[str]
    total_samples: int
    successful: int
    failed: int
    answer_field: str | None
    accuracy: dict[str, Score]
    evaluation_data: str
    statistics: str


class Evaluation(msgspec.Struct, kw_only=True):
    """What an evaluation found, and where it is written. `merged`: there were no results yet, and they were made;
    `stale`: responses have come in since the results were merged. `lost` counts images that could not be copied."""

    folder: str
    results: str
    statistics: Statistics
    merged: bool = False
    stale: bool = False
    lost: int = 0
    first_lost: list[str] = []


def evaluate(
    run: str | Path | None = None,
    *,
    results: str | Path | None = None,
    output: str | Path | None = None,
    by: str | Sequence[str] = (),
    answer_field: str | None = None,
    reasoning_field: str = REASONING_FIELD,
    truth_image_field: Sequence[str] = (),
    copy_images: bool = False,
    image_root: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare the results of `run`, or the ones in the file `results`, with their truths, and write three files.

    They go to `RUN/evaluation`, or to the folder `output`. A run without results is merged first. `by` are fields for
    whose values the accuracy is told apart; `answer_field` holds the truth (the one that `prepare` was told, unless
    given). `copy_images` puts the images of each row beside the files. Nothing is replaced unless all of it was
    written. Raises `InputError` for results that are none, `UsageError` for a field that no row has.
    """
    if run is None and results is None:
        raise UsageError("name a RUN, or --results", hint="batchkit evaluate --help")
    by = [by] if isinstance(by, str) else by
    opened = Run.open(run) if run is not None else None
    source = str(results) if results is not None else str(opened.path / "results.jsonl")  # type: ignore[union-attr]  # one is given
    merged = opened is not None and results is None and not opened.fetch(Path(source)).exists()
    if merged and opened is not None:
        _merge(opened)
    options = opened.manifest.options if opened is not None else {}
    names = Names(
        answer=answer_field or options.get("answer_field"),
        question=options.get("question_field") or "question",
        reasoning=reasoning_field,
        truth_images=truth_image_field,
        images=options.get("image_field"),
    )
    base = Path(source).parent if not is_remote(source) else Path()
    folder = _folder(output, source, base)
    _refuse_foreign(folder)
    pass_over = _Pass(source, folder, names, Figures(by), by)
    if copy_images:
        pass_over.copy_from(Path(image_root or options.get("image_root") or base).expanduser(), opened)
    pass_over.run(progress or Silent())
    return Evaluation(
        folder=shown(folder),
        results=shown(source),
        statistics=pass_over.statistics,
        merged=merged,
        stale=opened is not None and not merged and results is None and _is_stale(opened, Path(source)),
        lost=pass_over.lost,
        first_lost=pass_over.first_lost,
    )


def _merge(run: Run) -> None:
    """Merge a run that was not. Raises `UsageError` where that needs a prefix."""
    prepared = run.prepared()
    if prepared is not None and prepared.names_in_use:
        raise UsageError(
            f"{run.path}: is not merged yet, and its rows have fields that results would overwrite",
            hint=f"batchkit merge {shlex.quote(str(run.path))} --prefix answer_, then evaluate",
        )
    merge(run)


def _folder(output: str | Path | None, source: str, base: Path) -> Path:
    """Where the files go. Raises `UsageError` where that would replace the summary of a merge."""
    if output is None:
        name = Path(source).name
        for ending in (*COMPRESSED, ".jsonl", ".ndjson", ".json"):
            name = name.removesuffix(ending)
        return base / ("evaluation" if name == "results" else f"{name}.evaluation")
    folder = Path(output).expanduser()
    if folder.resolve() == base.resolve() or (folder / "manifest.json").exists():
        raise _not_ours(folder, "holds the summary.json of a merge, which the evaluation's would replace")
    return folder


def _refuse_foreign(folder: Path) -> None:
    """Raise `UsageError` where files of a merge, or of the user's own, would be replaced."""
    if next(folder.glob("results.*"), None) is not None:
        raise _not_ours(folder, "holds the results of a merge, whose summary.json and images would be replaced")
    summary = folder / "summary.json"
    try:
        ours = "evaluation_data" in msgspec.json.decode(summary.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        ours = (folder / MARK).exists()  # of one that was killed
    except (OSError, msgspec.DecodeError):
        ours = False
    for name in ("summary.json", "statistics.json", "evaluation_data.json", "output_images"):
        if not ours and (folder / name).exists():
            raise _not_ours(folder, f"holds {name}, which no evaluation has written and which would be replaced")


def _not_ours(folder: Path, why: str) -> UsageError:
    return UsageError(f"{folder}: {why}", hint="name a new folder: batchkit evaluate … -o FOLDER")


def _is_stale(run: Run, results: Path) -> bool:
    written = results.stat().st_mtime_ns
    return any(path.stat().st_mtime_ns > written for path in (run.path / "responses").glob("*.jsonl"))


class _Requests:
    """The requests of a run, read beside its results, which are in the same order."""

    def __init__(self, run: Run) -> None:
        self._lines = _requests_of(run)
        self._next = next(self._lines, None)

    def of(self, custom_id: Any) -> dict[str, Any] | None:
        """The request of a row; None where it has none."""
        if self._next is None or self._next[0] != custom_id:
            return None
        _, line = self._next
        self._next = next(self._lines, None)
        return _decode_request(line)


def _requests_of(run: Run) -> Iterator[tuple[str, bytes]]:
    for seal in run.seals():
        path = run.requests_path(seal.shard)
        if run.bytes_of(path) is None:
            continue
        with open_read(str(run.fetch(path))) as lines:
            for line in lines:
                yield _decode_id(line).custom_id, line


class _Named(msgspec.Struct, gc=False):
    custom_id: str


_decode_id = msgspec.json.Decoder(_Named).decode


class _Pass:
    """One reading of the results."""

    def __init__(self, source: str, folder: Path, names: Names, figures: Figures, by: Sequence[str]) -> None:
        self._source = source
        self._folder = folder
        self._base = Path(source).parent
        self._names = names
        self._figures = figures
        self._unseen = set(by)
        self._answer_field: str | None = None
        self._models: dict[str, None] = {}
        self._album = Album(folder / "output_images")
        self._root: Path | None = None
        self._requests: _Requests | None = None
        self._rows_name_rows = False
        self.lost = 0
        self.first_lost: list[str] = []
        self.statistics: Statistics

    def copy_from(self, root: Path, run: Run | None) -> None:
        """Copy images, too; the paths of rows start at `root`. What is not in the rows is in the requests of `run`."""
        self._root = root
        self._requests = _Requests(run) if run is not None else None
        # An image of VLMEvalKit may be that of another row, named by its index.
        self._rows_name_rows = run is not None and run.manifest.options.get("input_format") == "vlmevalkit"

    def run(self, progress: Progress) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StorageError(f"{self._folder}: cannot be made: {exc.strerror or exc}") from exc
        with contextlib.ExitStack() as stack:
            summary, statistics, entries = (
                stack.enter_context(write_whole(self._folder / f"{name}.json"))
                for name in ("summary", "statistics", "evaluation_data")
            )
            stack.enter_context(self._album.opened())
            self._write_entries(entries, progress)
            self._refuse_unknown_fields()
            self.statistics = self._figures.statistics(self._answer_field)
            statistics.write(_pretty(self.statistics))
            summary.write(_pretty(self._overview()))
            (self._folder / MARK).touch()  # before the first file is at its place

    def _write_entries(self, stream: IO[bytes], progress: Progress) -> None:
        opening = b"[\n"
        with open_read(self._source) as lines:
            for place, line in enumerate(read_lines(lines)):
                result = read_result(line, f"{self._source}:{place + 1}")
                stream.write(opening + _encode(self._entry(place, result)))
                opening = b",\n"
                if place % 1000 == 999:
                    progress.update(1000)
        if opening == b"[\n":
            raise InputError(f"{self._source}: has no results", hint="batchkit merge RUN")
        stream.write(b"\n]\n")

    def _entry(self, place: int, result: Result) -> Entry:
        row, note = result.row, result.note
        field = self._names.answer_in(row)
        self._answer_field = self._answer_field or field
        self._unseen -= {*row, *OURS}
        if result.model is not None and len(self._models) < MAX_GROUPS:
            self._models[result.model] = None
        images = result.images
        right = self._figures.add(
            Judged(
                line=place + 1,
                row=row,
                model=result.model,
                custom_id=note.get("custom_id"),
                verdict=result.verdict,
                truth=row[field] if field is not None else None,
                raw=result.raw,
                parsed=result.parsed,
                error=result.error,
                usage=note.get("usage") if isinstance(note.get("usage"), dict) else None,
                steps=result.steps,
                images=len(images),
            )
        )
        return Entry(
            sample_id=place,
            question=last_text(row) if _is_request(row) else self._names.question_in(row),
            ground_truth_reasoning=row.get(self._names.reasoning),
            ground_truth_answer=row[field] if field is not None else None,
            ground_truth_images=self._names.truth_images_in(row),
            output_reasoning=result.raw,
            output_images=self._images(place, note.get("custom_id"), row, images),
            num_reasoning_steps=result.steps,
            num_generated_images=len(images),
            custom_id=note.get("custom_id"),
            verdict=str(result.verdict),
            right=right,
        )

    def _images(self, place: int, custom_id: Any, row: dict[str, Any], made: list[str]) -> list[str]:
        """The paths from the folder of the evaluation to the images that the model made; copied where that is asked."""
        if self._root is None:
            return [self._from_folder(name) for name in made]
        for count, reference in self._asked_about(custom_id, row):
            if is_remote(reference):
                self._lose(place, f"image is a link, and is not downloaded: {shown(reference)[:200]}")
                continue
            try:
                data = load(reference, self._root, AS_THEY_ARE).data
            except RowError as exc:
                self._lose(place, exc.message)
                continue
            self._album.add(place, f"problem_image_{count}.{ending_of(data)}", data)
        return [self._copied(place, count, name) for count, name in enumerate(made, 1)]

    def _asked_about(self, custom_id: Any, row: dict[str, Any]) -> list[tuple[int, str]]:
        """The images that a row was asked with, by number: from the row, else from its request."""
        request = self._requests.of(custom_id) if self._requests is not None else None
        if _is_request(row):
            request = row
        in_row = self._names.images_in(row)
        in_request = images_of_request(request) if request is not None else []
        if in_request and (len(in_row) < len(in_request) or self._rows_name_rows):
            return list(enumerate(in_request, 1))
        return in_row

    def _copied(self, place: int, count: int, name: str) -> str:
        if is_remote(name):
            return name
        try:
            data = (self._base / name).read_bytes()
        except OSError as exc:
            self._lose(place, f"image cannot be read: {name}: {exc.strerror}")
            return self._from_folder(name)
        return self._album.add(place, f"output_image_{count}{Path(name).suffix}", data)

    def _lose(self, place: int, message: str) -> None:
        self.lost += 1
        if len(self.first_lost) < SHOWN:
            self.first_lost.append(f"{self._source}:{place + 1}: {message}")

    def _from_folder(self, name: str) -> str:
        return name if is_remote(name) else os.path.relpath(self._base / name, self._folder)

    def _refuse_unknown_fields(self) -> None:
        if self._names.answer is not None and self._answer_field is None:
            raise UsageError(f"--answer-field {self._names.answer}: no row has this field", hint="check its name")
        if self._unseen:
            raise UsageError(f"--by {min(self._unseen)}: no row has this field", hint="check its name")

    def _overview(self) -> Overview:
        found = self.statistics
        return Overview(
            results=shown(self._source),
            model=next(iter(self._models)) if len(self._models) == 1 else None,
            models=list(self._models),
            total_samples=found.total_samples,
            successful=found.successful,
            failed=found.failed,
            answer_field=found.answer_field,
            accuracy=found.accuracy,
            evaluation_data="evaluation_data.json",
            statistics="statistics.json",
        )


def _is_request(row: dict[str, Any]) -> bool:
    return "body" in row and "custom_id" in row


def _pretty(value: Any) -> bytes:
    return msgspec.json.format(_encode(value), indent=2) + b"\n"
