"""The images of an evaluation, copied beside it: those that the rows were asked with, and those that the model made.

An image that a row names by an address is taken from the row's request, where it is inline as it was sent, and fetched
where there is none.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from batchkit import references
from batchkit.albums import Album, ending_of
from batchkit.errors import RowError
from batchkit.images import MEDIA_TYPES, ImageOptions, convert, load
from batchkit.provision import fetched
from batchkit.runs import Run
from batchkit.storage import is_remote, open_read, shown
from batchkit.truths import Names, Result, images_of_request

AS_THEY_ARE = ImageOptions(media_types=frozenset(MEDIA_TYPES.values()))
SHOWN = 5
_ROW_BYTES = 1000
"""About what a result takes beside the references to its images."""
_decode_request = msgspec.json.Decoder(dict[str, Any]).decode


class Problem(NamedTuple):
    """A result, the images that its row was asked with, by number, and what was fetched of them, by their addresses:
    bytes, or why they cannot be had."""

    result: Result
    asked: Sequence[tuple[int, str]] = ()
    fetched: Mapping[str, bytes | str] = MappingProxyType({})


class Copies:
    """Copies images into `album`. `lost` counts those that could not be, and `first_lost` says why.

    The paths of rows start at `root`. What is not in the rows is in the requests of `run`.
    """

    def __init__(
        self, source: str, album: Album, names: Names, *, root: str, run: Run | None, private_hosts: bool
    ) -> None:
        self.lost = 0
        self.first_lost: list[str] = []
        self._source = source
        self._album = album
        self._names = names
        self._run = run
        self._requests = _Requests(run) if run is not None else None
        # An image of VLMEvalKit may be that of another row, named by its index.
        self._rows_name_rows = run is not None and run.manifest.options.get("input_format") == "vlmevalkit"
        self._root = root.removesuffix("/") if is_remote(root) else str(Path(root).expanduser())
        self._private_hosts = private_hosts

    def found(self, results: Iterable[Result]) -> Generator[Problem]:
        """The results in order, each with its images; remote ones are fetched ahead."""
        problems = (Problem(result, self._asked_about(result)) for result in results)
        for problem, images in fetched(problems, self._addresses, _size, private_hosts=self._private_hosts):
            yield problem._replace(fetched=images)

    def copy(self, place: int, problem: Problem) -> list[str | None]:
        """Copy the images of a row. Returns where those that the model made are now; None for links, and for those that
        could not be copied."""
        for count, reference in problem.asked:
            try:
                data = self._read(reference, problem.fetched)
            except RowError as exc:
                self._lose(place, exc.message)
                continue
            self._album.add(place, f"problem_image_{count}.{ending_of(data)}", data)
        made = enumerate(problem.result.images, 1)
        return [self._copied(place, count, name, problem.fetched) for count, name in made]

    def _read(self, reference: str, fetched: Mapping[str, bytes | str]) -> bytes:
        uri = references.remote(reference, self._root)
        if uri is None:
            return load(reference, Path(self._root), AS_THEY_ARE).data
        found = fetched[uri]
        if isinstance(found, str):
            raise RowError("image", found)
        return convert(found, AS_THEY_ARE, name=references.shown(uri)).data

    def _asked_about(self, result: Result) -> list[tuple[int, str]]:
        """The images that a row was asked with, by number: from the row, else from its request."""
        row = result.row
        note = result.note
        request = None
        if self._requests is not None:
            request = self._requests.of(note.get("custom_id"), same_as=note.get("same_as"))
        if is_request(row):
            request = row
        in_row = self._names.images_in(row)
        in_request = images_of_request(request) if request is not None else []
        if in_request and (len(in_row) < len(in_request) or self._rows_name_rows):
            return list(enumerate(in_request, 1))
        if len(in_row) != len(in_request):
            return in_row
        return [
            (count, sent if references.remote(named, self._root) is not None else named)
            for (count, named), sent in zip(in_row, in_request, strict=True)
        ]

    def _addresses(self, problem: Problem) -> list[str]:
        """The addresses of all images of a row that have to be fetched."""
        asked = [references.remote(reference, self._root) for _, reference in problem.asked]
        made = [self._made_at(name) for name in problem.result.images]
        return list(dict.fromkeys(uri for uri in (*asked, *made) if uri is not None))

    def _made_at(self, name: str) -> str | None:
        """Where an image that the model made lies, where that is beside results elsewhere. A link stays one."""
        if is_remote(name) or not is_remote(self._source):
            return None
        return references.remote(name, shown(self._source).rpartition("/")[0])

    def _copied(self, place: int, count: int, name: str, fetched: Mapping[str, bytes | str]) -> str | None:
        if is_remote(name):
            return None
        try:
            data = self._bytes_made(name, fetched)
        except RowError as exc:
            self._lose(place, exc.message)
            return None
        return self._album.add(place, f"output_image_{count}{Path(name).suffix}", data)

    def _bytes_made(self, name: str, fetched: Mapping[str, bytes | str]) -> bytes:
        uri = self._made_at(name)
        if uri is not None:
            found = fetched[uri]
            if isinstance(found, str):
                raise RowError("image", found)
            return found
        path = Path(self._source).parent / name
        try:
            if self._run is not None and path.is_relative_to(self._run.path):
                self._run.fetch(path)
            return path.read_bytes()
        except OSError as exc:
            raise RowError("image", f"image cannot be read: {name}: {exc.strerror}") from exc

    def _lose(self, place: int, message: str) -> None:
        self.lost += 1
        if len(self.first_lost) < SHOWN:
            self.first_lost.append(f"{shown(self._source)}:{place + 1}: {message}")


def is_request(row: dict[str, Any]) -> bool:
    """Whether the row of a result is a request in batch format."""
    return "body" in row and "custom_id" in row


def _size(problem: Problem) -> int:
    return _ROW_BYTES + sum(len(reference) for _, reference in problem.asked)


class _Requests:
    """The requests of a run, read beside its results, which are in the same order."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._shared: dict[str, tuple[Path, int]] = {}
        self._shared_before: dict[str, tuple[Path, int]] = {}
        self._lines = self._read()
        self._next = next(self._lines, None)

    def of(self, custom_id: Any, *, same_as: Any = None) -> dict[str, Any] | None:
        """The request of a row, which is that of the earlier row `same_as` where it asks the same; None where it has
        none."""
        if same_as is not None:
            return self._again(same_as)
        if self._next is None or self._next[0] != custom_id:
            return None
        _, line = self._next
        self._next = next(self._lines, None)
        return _decode_request(line)

    def _again(self, custom_id: Any) -> dict[str, Any] | None:
        place = self._shared.get(custom_id) or self._shared_before.get(custom_id)
        if place is None:
            return None
        path, offset = place
        with open(path, "rb") as stream:
            stream.seek(offset)
            return _decode_request(stream.readline())

    def _read(self) -> Iterator[tuple[str, bytes]]:
        """All lines. Notes where those are that later rows share, of this shard and of the one before, whose last rows
        may still be asked about."""
        for seal in self._run.seals():
            path = self._run.requests_path(seal.shard)
            if not seal.requests or self._run.bytes_of(path) is None:
                continue
            shared, offset = set(seal.firsts.values()), 0
            self._shared_before, self._shared = self._shared, {}
            with open_read(str(self._run.fetch(path))) as lines:
                for position, line in zip(seal.asking, lines, strict=False):
                    custom_id = _decode_id(line).custom_id
                    if position in shared:
                        self._shared[custom_id] = path, offset
                    offset += len(line)
                    yield custom_id, line


class _Named(msgspec.Struct, gc=False):
    custom_id: str


_decode_id = msgspec.json.Decoder(_Named).decode
