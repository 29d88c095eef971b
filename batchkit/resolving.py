"""Links in requests → what a backend can open: while an attempt's input is made, and nowhere else.

A file goes as it is to an engine that may read it. An object goes as a presigned URL, where that is wanted. All else
goes as base64, checked as `prepare` does it, and fetched ahead, each once. What cannot be had is a fault of its row.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self
from urllib.parse import urlsplit

import msgspec

from batchkit import images, links, s3
from batchkit.errors import RowError, StorageError
from batchkit.fetching import NOT_NOW
from batchkit.images import ImageOptions
from batchkit.jobs import Attempt
from batchkit.limits import Limits
from batchkit.manifests import Seal, as_ranges, now
from batchkit.presigning import Presigner, Signer
from batchkit.references import shown
from batchkit.requests import data_url
from batchkit.runs import Run
from batchkit.shardfiles import request_views
from batchkit.storage import write_whole

if TYPE_CHECKING:
    from batchkit.stocks import Ware

AHEAD_IMAGES = 512
AHEAD_ROWS = 4096
MOST_ABSENT = 100
"""So many files in a row that are not there, and none that is: it is their disk that is missing, not the files."""

_encode = msgspec.json.Encoder().encode


class Ways(msgspec.Struct, frozen=True, kw_only=True):
    """What the backend can open. `folder`: it reads the files below, by themselves. `presigner` signs URLs of objects,
    for a backend that is to fetch them. `near`: it fetches from this network, so that private hosts are none of the
    task file's business, unless `private_hosts`."""

    limits: Limits
    folder: str | None = None
    presigner: Presigner | Signer | None = None
    near: bool = False
    private_hosts: bool = False


class Resolved(NamedTuple):
    """A request line, without a line feed, or why it cannot be sent."""

    position: int
    line: bytes
    fault: RowError | None = None


class _Waiting(NamedTuple):
    position: int
    pieces: list[bytes | str]
    wares: dict[str, Ware]


class Resolver:
    """Resolves the links of one run's requests. A context manager; used by one thread."""

    def __init__(self, run: Run, ways: Ways) -> None:
        self._run = run
        self._ways = ways
        self._options = ImageOptions(media_types=ways.limits.media_types)
        from batchkit.stocks import Stock  # with asyncio and all: most runs have no links

        self._stock = Stock(private_hosts=ways.private_hosts)
        self._absent = 0
        self._hosts: dict[str, str | None] = {}

    def __enter__(self) -> Self:
        self._stock.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stock.__exit__(kind, exc, trace)

    @property
    def until(self) -> str | None:
        """Until when the URLs hold that were signed last; None where there are none."""
        return self._ways.presigner.until if isinstance(self._ways.presigner, Presigner) else None

    def holds(self, until: str | None) -> bool:
        """Whether URLs that hold until then hold long enough for what begins now. If none are signed, nobody knows."""
        presigner = self._ways.presigner
        return until is None or (isinstance(presigner, Presigner) and presigner.holds(until))

    def lines(self, seal: Seal, rows: Sequence[tuple[int, int]]) -> Generator[Resolved]:
        """The requests of these rows of a shard, in order. Raises `RunError` where the file is not what was sealed, and
        `BatchkitError` where no image can be had."""
        with contextlib.closing(self.lines_as_they_come(seal, rows, patient=True)) as lines:
            for resolved in lines:
                assert resolved is not None  # noqa: S101  # it was waited for
                yield resolved

    def lines_as_they_come(
        self, seal: Seal, rows: Sequence[tuple[int, int]], *, patient: bool = False
    ) -> Generator[Resolved | None]:
        """The same; unless `patient`, a None where the next one is not there yet."""
        wanted = {one for start, end in rows for one in range(start, end)}
        positions = (one for one in seal.asking if one in wanted)
        ahead: deque[_Waiting] = deque()
        taken = 0
        try:
            for position, view in zip(positions, request_views(self._run, seal, rows), strict=True):
                waiting = self._take(position, bytes(view))
                if not waiting.wares and not ahead:
                    yield self._fill(waiting)
                    continue
                ahead.append(waiting)
                taken += len(waiting.wares)
                while ahead and (taken > AHEAD_IMAGES or len(ahead) > AHEAD_ROWS or self._stock.is_full()):
                    yield from _until_ready(ahead[0], patient=patient)
                    taken -= len(ahead[0].wares)
                    yield self._fill(ahead.popleft())
            while ahead:
                yield from _until_ready(ahead[0], patient=patient)
                yield self._fill(ahead.popleft())
        finally:
            for waiting in ahead:
                for ware in waiting.wares.values():
                    self._stock.leave(ware)

    def _take(self, position: int, line: bytes) -> _Waiting:
        pieces = links.split(line)
        return _Waiting(position, pieces, {uri: self._stock.take(uri) for uri in self._to_fetch(pieces)})

    def _to_fetch(self, pieces: Iterable[bytes | str]) -> Iterator[str]:
        if self._ways.presigner is None:
            yield from dict.fromkeys(one for one in pieces if isinstance(one, str) and s3.is_s3(one))

    def _fill(self, waiting: _Waiting) -> Resolved:
        fetched = {uri: self._found(ware) for uri, ware in waiting.wares.items()}
        filled: list[bytes] = []
        try:
            for piece in waiting.pieces:
                filled += (piece,) if isinstance(piece, bytes) else self._address(piece, fetched)
        except RowError as exc:
            return Resolved(waiting.position, b"", self._advised(exc))
        line = b"".join(filled)
        most = self._ways.limits.max_bytes
        if len(line) > most:
            why = f"with its images, the request has {len(line):,} bytes, and a file of requests {most:,} at most"
            return Resolved(waiting.position, b"", RowError("size", why))
        return Resolved(waiting.position, line)

    def _found(self, ware: Ware) -> bytes | RowError:
        found = self._stock.read(ware)
        return found if isinstance(found, bytes) else RowError(NOT_NOW if ware.passing else "image", found)

    def _advised(self, fault: RowError) -> RowError:
        again = f"batchkit submit {shlex.quote(self._run.name)}"
        if fault.code == NOT_NOW:
            return RowError(fault.code, f"{fault.message}; once more: {again}")
        return RowError(fault.code, f"{fault.message}; when that is mended: {again} --retry failed")

    # -- one image

    def _address(self, uri: str, fetched: Mapping[str, bytes | RowError]) -> Sequence[bytes]:
        """What stands in the place of a link: a text of JSON, in pieces."""
        if uri.startswith("file://"):
            return self._of_file(uri)
        if not s3.is_s3(uri):
            return (self._of_web(uri),)
        if self._ways.presigner is not None:
            return (_encode(self._ways.presigner.get(uri)),)
        found = fetched[uri]
        if isinstance(found, RowError):
            raise found
        return data_url(images.convert(found, self._options, name=uri))

    def _of_file(self, uri: str) -> Sequence[bytes]:
        path = links.path_of(uri)
        try:
            images.find(str(path), "")
        except RowError as exc:
            self._absent += self._absent >= 0
            if self._absent >= MOST_ABSENT:
                raise StorageError(
                    f"{path}: {exc.message}; nor are the {MOST_ABSENT - 1} images before it there",
                    hint="is the disk with the images there, under the same path as when the run was prepared? The "
                    "same command goes on; --retry failed sends again what has failed",
                ) from exc
            raise
        self._absent = -1
        if self._ways.folder is not None and _is_below(path, self._ways.folder):
            return (_encode(uri),)
        return data_url(images.load(str(path), Path(), self._options))

    def _of_web(self, uri: str) -> bytes:
        if not self._ways.limits.fetches:
            raise RowError("image", f"the backend fetches no images: {shown(uri)}")
        if self._ways.near and not self._ways.private_hosts and (why := self._why_private(uri)) is not None:
            raise RowError(
                "image", f"image is not fetched: {shown(uri)}: {why}; prepare --allow-private-hosts allows it"
            )
        return _encode(uri)

    def _why_private(self, uri: str) -> str | None:
        """What keeps a host from being asked. Its redirects are followed by the backend, and not known here."""
        from batchkit.addresses import PrivateAddressError, check_name

        host = urlsplit(uri).hostname or ""
        if host not in self._hosts:
            self._hosts[host] = None
            try:
                check_name(host)
            except PrivateAddressError as exc:
                self._hosts[host] = str(exc)
            except (socket.gaierror, UnicodeError):
                pass  # the backend may look it up by a proxy
        return self._hosts[host]


def _until_ready(waiting: _Waiting, *, patient: bool) -> Iterator[None]:
    while not patient and not all(ware.is_ready for ware in waiting.wares.values()):
        yield None


def _is_below(path: Path, folder: str) -> bool:
    """Whether an engine that may read `folder` may read this: vLLM follows symbolic links first, and takes what is in
    the folder, not the folder (vllm/multimodal/media/connector.py, 0.32)."""
    try:
        str(path).encode()  # other names than UTF-8 do not survive in a URL there
    except UnicodeEncodeError:
        return False
    return Path(folder) in Path(os.path.realpath(path)).parents


# -- what cannot be sent -----------------------------------------------------------------------------------------------


def fault_line(custom_id: str, fault: RowError) -> bytes:
    """A response line for a request that was not sent: it has failed, until the user sends it again; or in passing,
    where that is what its code says."""
    error = {"code": fault.code, "message": fault.message}
    return _encode({"id": None, "custom_id": custom_id, "response": None, "error": error}) + b"\n"


def record(run: Run, seal: Seal, faults: Mapping[int, RowError], *, backend: str) -> None:
    """Keep, as an attempt of its own, that the requests at these positions cannot be sent. The lease is held."""
    if not faults:
        return
    ids = run.read_ids(seal)
    number = run.next_attempt(seal.shard)
    with write_whole(run.responses_path(seal.shard, number), durable=True) as stream:
        for position, fault in sorted(faults.items()):
            stream.write(fault_line(ids[position - seal.start], fault))
    job = run.job(seal.shard)
    job.attempts.append(
        Attempt(
            number=number,
            backend=backend,
            state="collected",
            rows=as_ranges(sorted(faults)),
            started=now(),
            ended=now(),
            message="not sent: its images cannot be had",
        )
    )
    run.write_job(job)
