"""Hugging Face datasets → rows: `hf://NAME:SPLIT` from the hub (or its cache), or a folder of `save_to_disk`.

A dataset lies on the disk in Arrow files. They are read batch by batch, each mapped into memory alone: what the library
maps as a whole would count as ours, and grow with the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchkit.columns import Columns, told
from batchkit.credentials import HUB_TOKENS, find_variable
from batchkit.errors import BatchkitError, CredentialsError, InputError, UsageError
from batchkit.tasks import FILE_START, Place, Row

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

SCHEME = "hf://"
MARKERS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""What `save_to_disk` writes beside the Arrow files (datasets 5.2)."""

BATCH_ROWS = 256
"""Rows at once of a dataset that is read through the library."""


@dataclass(frozen=True)
class Opened:
    """A dataset that is open. `fingerprint` changes with its rows; `bytes` is the size of its files."""

    uri: str
    dataset: datasets.Dataset

    @property
    def fingerprint(self) -> str:
        return str(self.dataset._fingerprint)  # noqa: SLF001  # the library has no public name for it

    @property
    def bytes(self) -> int:
        return sum(Path(file["filename"]).stat().st_size for file in self.dataset.cache_files)

    @property
    def rows(self) -> int:
        return len(self.dataset)

    def columns(self, images: tuple[str, ...]) -> Columns:
        return Columns(self.uri, self.dataset.data.schema, images)


def is_dataset(uri: str) -> bool:
    """Whether `uri` names a dataset: on the hub, or a folder with what `save_to_disk` writes."""
    return uri.startswith(SCHEME) or any((split_uri(uri)[0] / marker).is_file() for marker in MARKERS)


def split_uri(uri: str) -> tuple[Path, str | None]:
    """A folder and the split behind its colon: of a path that exists as it is, there is no split."""
    path = Path(uri)
    folder, colon, split = uri.rpartition(":")
    return (Path(folder), split) if colon and not path.exists() and Path(folder).is_dir() else (path, None)


def open_dataset(uri: str) -> Opened:
    """Raises `UsageError` where the library is missing, `InputError` where there is no such dataset or split, or no
    network, `CredentialsError` where the hub does not let us in."""
    try:
        import datasets
    except ImportError as exc:
        raise UsageError(
            "reading Hugging Face datasets needs the library datasets", hint="pip install 'batchkit-vlm[datasets]'"
        ) from exc
    if uri.startswith(SCHEME):
        return Opened(uri, _from_hub(uri))
    folder, split = split_uri(uri)
    try:
        found = datasets.load_from_disk(str(folder), keep_in_memory=False)
    except Exception as exc:  # the library raises anything on a broken folder
        raise InputError(f"{folder}: cannot be read as a dataset: {_line(exc)}", hint="save it again") from exc
    return Opened(uri, _one_split(uri, found, split))


def _from_hub(uri: str) -> datasets.Dataset:
    import datasets

    name, _, split = uri.removeprefix(SCHEME).partition(":")
    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        raise UsageError(f"{uri}: names no dataset", hint="hf://OWNER/NAME:SPLIT or hf://OWNER/NAME/CONFIG:SPLIT")
    config = parts.pop() if len(parts) == 3 else None
    token = next((value for variable in HUB_TOKENS if (value := find_variable(variable))), None)
    try:
        found = datasets.load_dataset("/".join(parts), config, token=token, split=split or None)
    except Exception as exc:  # of the library, the hub's client, and whatever builds the dataset
        if not isinstance(exc, datasets.exceptions.DatasetNotFoundError) or len(parts) != 2:
            raise _told(uri, exc, token) from exc
        try:  # a dataset without an owner, and its configuration
            found = datasets.load_dataset(parts[0], parts[1], token=token, split=split or None)
        except Exception:  # noqa: BLE001  # what was said first is of the usual reading of the name
            raise _told(uri, exc, token) from exc
    return _one_split(uri, found, split or None)


def _one_split(uri: str, found: Any, split: str | None) -> datasets.Dataset:
    """One split of what was loaded: the one that is named, or the only one."""
    if not hasattr(found, "keys"):
        if split is not None and found.split is not None and uri[: len(SCHEME)] != SCHEME and str(found.split) != split:
            raise InputError(f"{uri}: the folder has no split {split!r}", hint=f"it is the split {found.split}")
        return found
    names = list(found.keys())
    if split is None and len(names) == 1:
        split = names[0]
    if split not in names:
        base = uri if split is None else uri.removesuffix(f":{split}")
        what = "names no split" if split is None else f"has no split {split!r}"
        raise InputError(f"{uri}: {what}; there are {', '.join(names)}", hint=f"{base.rstrip(':')}:{names[0]}")
    return found[split]


def _told(uri: str, exc: Exception, token: str | None) -> BatchkitError:
    """What went wrong at the hub, as ours."""
    chain: list[BaseException] = [exc]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    names = {type(one).__name__ for one in chain}
    status = {getattr(getattr(one, "response", None), "status_code", None) for one in chain}
    said = _line(exc)
    if token is not None:
        said = said.replace(token, "[token]")
    if "GatedRepoError" in names or "gated" in said or (status & {401, 403} and token is not None):
        hint = "ask for access at the dataset's page" if token else f"export {HUB_TOKENS[0]}=… (or write it into .env)"
        return CredentialsError(f"{uri}: the hub does not let us read it: {said}", hint=hint)
    if "DatasetNotFoundError" in names:
        hint = "check the name" if token else f"check the name; a private dataset needs {HUB_TOKENS[0]}"
        return InputError(f"{uri}: no such dataset: {said}", hint=hint)
    if "split" in said and isinstance(exc, ValueError):
        return InputError(f"{uri}: {said}", hint=f"{uri.partition(':')[0]}:{uri[5:].partition(':')[0]}:SPLIT")
    if names & {"ConnectionError", "OfflineModeIsEnabled", "ConnectError", "LocalEntryNotFoundError", "ConnectTimeout"}:
        return InputError(
            f"{uri}: the hub cannot be reached: {said}",
            hint="check the network; offline, a dataset is read from the cache or from a folder of save_to_disk",
        )
    return InputError(f"{uri}: cannot be read: {said}", hint="check the name, the configuration and the split")


def _line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:500] or type(exc).__name__


def read_rows(opened: Opened, images: tuple[str, ...], start: Place = FILE_START) -> Iterator[Row]:
    """The rows from `start` on; `line` counts rows from 1."""
    columns = opened.columns(images)
    position = 0
    with told(opened.uri, "a dataset"):
        for batch in _batches(opened):
            if position + batch.num_rows <= start.position:
                position += batch.num_rows
                continue
            for made in columns.rows(batch):
                if position >= start.position:
                    yield Row(position, position + 1, made.raw, 0, made.attached, made.fault)
                position += 1


def _batches(opened: Opened) -> Iterator[pa.RecordBatch]:
    files = [Path(file["filename"]) for file in opened.dataset.cache_files]
    if _are_whole(opened.dataset, files):
        for file in files:
            yield from _mapped_one_by_one(file)
        return
    import pyarrow as pa

    # A part of a split (`train[:10%]`), or one whose order was changed: only the library knows where its rows are.
    for table in opened.dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
        assert isinstance(table, pa.Table)  # noqa: S101  # the format that was asked for
        yield from table.to_batches()


def _are_whole(dataset: datasets.Dataset, files: list[Path]) -> bool:
    """Whether the rows of the dataset are those of its files, in their order."""
    if not files or dataset._indices is not None:  # noqa: SLF001  # the library has no public name for it
        return False
    schema = dataset.data.schema
    return all(_schema(file).equals(schema) for file in files) and len(dataset) == sum(
        batch.num_rows for file in files for batch in _mapped_one_by_one(file)
    )


def _schema(file: Path) -> pa.Schema:
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).schema


def _mapped_one_by_one(file: Path) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow stream file; the memory that one takes is given back before the next is mapped."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        schema = pa.ipc.open_stream(source).schema
        at = source.tell()
    while True:
        with pa.memory_map(str(file)) as source:
            source.seek(at)
            try:
                batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)
            except EOFError:
                return
            at = source.tell()
        yield batch
        del batch
