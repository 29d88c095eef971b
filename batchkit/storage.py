"""Files, wherever they are: the only module that knows smart_open.

A URI is a local path (`~` allowed), `s3://…` or `https://…`; names that end in .gz, .bz2, .xz or .zst are read and
written compressed. Local uncompressed files, the usual case, are opened without importing smart_open.

A folder may be the local side of something in a bucket. Then a `Follower` is entered for it with `follow`, and what is
written, grows or is removed below that folder goes through it.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol

from batchkit import s3
from batchkit.direct import LargeFile
from batchkit.errors import InputError, StorageError
from batchkit.reserving import ReservingFile

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BUFFER_BYTES = 1 << 20
BLOCK_BYTES = 1 << 15
"""So small that memory is used again: what takes 128 KB and more, the C library gives back to the system each time."""
SPOTS = 64
LEFT_SECONDS = 600
"""So long untouched, a file of a process that is gone is a leftover."""
SPOT_BYTES = 4096


class Follower(Protocol):
    """Keeps the other side of a folder equal to it. Every call raises `BatchkitError` where that fails."""

    uri: str

    def place(self, aside: Path, target: Path) -> None:
        """Give the finished file `aside` its name `target` here, and put it there."""

    def remove(self, target: Path) -> None:
        """Remove it on both sides, if it is there."""

    def grew(self, target: Path) -> None:
        """Something was appended to it: there it may arrive a little later."""

    def settle(self, target: Path) -> None:
        """Nothing more will be appended: it is whole there when this returns."""

    def names_below(self, folder: Path) -> list[str]:
        """What there is below a folder on the other side, relative to it."""


_followers: dict[Path, Follower] = {}


def follow(root: Path, follower: Follower) -> None:
    """From now on `follower` is told of all files below `root`, an absolute path."""
    _followers[root] = follower


def follower_of(path: Path) -> Follower | None:
    for root, follower in _followers.items():
        if path.is_relative_to(root):
            return follower
    return None


def shown(path: str | Path) -> str:
    """The name that people know a file by: that in the bucket, where the local file is only its copy; without the
    query of a URL, which may be a signature."""
    text = str(path)
    if text.startswith(("http://", "https://")):
        return text.partition("?")[0]
    for root, follower in _followers.items():
        if Path(text).is_relative_to(root):
            return f"{follower.uri}/{Path(text).relative_to(root).as_posix()}".removesuffix("/.")
    return text


def show(text: str) -> str:
    """A message in which all local copies are named as people know them."""
    for root, follower in _followers.items():
        text = text.replace(str(root), follower.uri)
    return text


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    follower = follower_of(path)
    if follower is not None:
        follower.remove(path)
    else:
        path.unlink(missing_ok=True)


def grew(path: Path) -> None:
    """To be called when something was appended to a file that must not be lost."""
    follower = follower_of(path)
    if follower is not None:
        follower.grew(path)


def settle(path: Path) -> None:
    """To be called when nothing more will be appended to it."""
    follower = follower_of(path)
    if follower is not None:
        follower.settle(path)


def check_rereadable(uri: str) -> None:
    """Raise `InputError` for a pipe or a device: what is read more than once must not be gone after the first time."""
    path = Path(uri.removeprefix("file://")).expanduser()
    if not is_remote(uri) and path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{uri}: is a pipe or a device, which can be read only once", hint="write it to a file first")


def is_remote(uri: str) -> bool:
    """Whether `uri` has a scheme that is not the local file system's."""
    return "://" in uri and not uri.startswith("file://")


def is_plain_local(uri: str) -> bool:
    """Whether `uri` is a local file that is read byte for byte: it can be sought in."""
    return not is_remote(uri) and not uri.endswith(COMPRESSED)


@contextlib.contextmanager
def open_read(uri: str, buffer: int = BUFFER_BYTES) -> Iterator[BinaryIO]:
    """Open `uri` for reading, decompressed, as buffered binary.

    Raises `InputError` where it is missing, a directory, or may not be read.
    """
    try:
        stream = _open(uri, buffer)
    except FileNotFoundError as exc:
        raise InputError(f"{shown(uri)}: no such file", hint="check the path") from exc
    except IsADirectoryError as exc:
        raise InputError(f"{shown(uri)}: is a directory, not a file") from exc
    except (OSError, ValueError) as exc:
        raise InputError(f"{shown(uri)}: cannot be opened: {_why(exc, uri)}") from exc
    with stream:
        yield stream


def _open(uri: str, buffer: int) -> BinaryIO:
    if is_plain_local(uri):
        return open(Path(uri.removeprefix("file://")).expanduser(), "rb", buffering=buffer)
    import smart_open

    ending = Path(shown(uri)).suffix  # a signed URL ends in its signature
    codec = ending if ending in COMPRESSED else "disable"
    try:
        stream = smart_open.open(uri, "rb", compression=codec, transport_params=_transport(uri))
    except Exception as exc:
        if not is_remote(uri):
            raise
        raise InputError(f"{shown(uri)}: cannot be opened: {_why(exc, uri)}", hint="check the name") from exc
    return io.BufferedReader(_Reader(uri, stream), buffer)


def _transport(uri: str) -> dict[str, Any]:
    """A client as the environment is now: smart_open's own keeps the credentials that it has seen first."""
    return {"client": s3.client()} if s3.is_s3(uri) else {}


def _why(exc: Exception, uri: str) -> str:
    """What an exception says, without the query of the URL, which may be a signature."""
    query = uri.partition("?")[2] if is_remote(uri) else ""
    return str(exc).replace(f"?{query}", "") if query else str(exc)


class _Reader(io.RawIOBase):
    """What smart_open opened; its errors while it is read are the user's file's: cut off, or not compressed at all."""

    def __init__(self, uri: str, stream: BinaryIO) -> None:
        self._uri = uri
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self._stream.read(len(buffer))
        except Exception as exc:  # each codec and each protocol has errors of its own
            raise InputError(
                f"{shown(self._uri)}: cannot be read: {_why(exc, self._uri)}", hint="check that the file is whole"
            ) from exc
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def spots_checksum(path: str) -> str:
    """A checksum of places spread over a local file, which takes no longer however large it is. Files that differ in
    a few bytes alone may have the same one."""
    import xxhash

    digest = xxhash.xxh3_128()
    with open(Path(path), "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        step = max(SPOT_BYTES, (size - SPOT_BYTES) // (SPOTS - 1))
        for number in range(SPOTS):
            stream.seek(number * step)
            digest.update(stream.read(SPOT_BYTES))
    return digest.hexdigest()


def read_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines of `stream`, without their line feed. Only `\\n` ends a line: JSON text may hold U+2028 and others."""
    for line in stream:
        yield line[:-1] if line.endswith(b"\n") else line


class Stream(Protocol):
    """What is written to from its beginning to its end."""

    def write(self, data: bytes, /) -> int: ...

    def flush(self) -> None: ...


class Readable(Protocol):
    def read(self, size: int, /) -> bytes | None: ...


def read_blocks(stream: Readable) -> Iterator[bytes]:
    """`stream` in blocks of whole lines, of about `BLOCK_BYTES`; the last one may lack its line feed."""
    held: list[bytes] = []
    while piece := stream.read(BLOCK_BYTES):
        cut = piece.rfind(b"\n") + 1
        if cut:
            yield b"".join((*held, piece[:cut]))
            held.clear()
        if cut < len(piece):
            held.append(piece[cut:])
    if held:
        yield b"".join(held)


def aside_of(target: Path) -> Path:
    """A new name beside `target`, for what this process writes aside; `remove_leftovers` knows it."""
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def write_whole(path: str | Path, *, durable: bool = False) -> Iterator[IO[bytes]]:
    """Write a file aside and rename it into place at the end, so that readers see all of it or nothing.

    With `durable` the bytes and the rename are on the disk when this returns (fsync of file and folder). Where the
    folder is the local side of a bucket, it is in the bucket when this returns.
    """
    with _placing(Path(path), durable=durable) as aside:  # noqa: SIM117  # it names what the other opens
        with io.BufferedWriter(ReservingFile(aside), BUFFER_BYTES) as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())


@contextlib.contextmanager
def write_large(path: str | Path) -> Iterator[LargeFile]:
    """Like `write_whole`, for a file of many megabytes."""
    with _placing(Path(path)) as aside, LargeFile(aside) as stream:
        yield stream


@contextlib.contextmanager
def _placing(target: Path, *, durable: bool = False) -> Iterator[Path]:
    """A name to write under, which the block closes; `target` is its name from there on."""
    aside = aside_of(target)
    try:
        yield aside
        follower = follower_of(target)
        if follower is not None:
            follower.place(aside, target)
        else:
            os.replace(aside, target)
        if durable:
            sync_folder(target.parent)
    except OSError as exc:
        raise StorageError(f"{target}: cannot be written: {exc.strerror or exc}", hint=_disk_hint(exc)) from exc
    finally:
        with contextlib.suppress(OSError):  # a disk that is read-only now must not hide the reason
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def write_compressed(path: Path) -> Iterator[Stream]:
    """Like `write_large`, compressed as the name says. The same content gives the same bytes."""
    if path.suffix not in COMPRESSED:
        with write_large(path) as large:
            yield large
        return
    with write_whole(path) as stream, contextlib.closing(_compressed(path.suffix, stream)) as compressed:
        yield compressed


def _compressed(ending: str, stream: IO[bytes]) -> Any:
    if ending == ".gz":
        import gzip

        return gzip.GzipFile("", "wb", 6, stream, mtime=0)
    if ending == ".bz2":
        import bz2

        return bz2.BZ2File(stream, "wb")
    if ending == ".xz":
        import lzma

        return lzma.LZMAFile(stream, "wb")
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd  # what smart_open reads them with

    return zstd.ZstdFile(stream, "wb")


def _disk_hint(exc: OSError) -> str | None:
    import errno

    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some disk space and run the same command again: it goes on where it stopped"
    return None


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes wrote aside for `target`: the process in the name is gone from this host, and nobody
    has touched it for a while (another host may write to the same folder)."""
    beginning = f".{target.name}."
    for aside in target.parent.glob(f"{glob.escape(beginning)}*-*.tmp"):
        import psutil  # as late as this: usually there are none

        process = aside.name.removeprefix(beginning).partition("-")[0]
        if not process.isdecimal() or psutil.pid_exists(int(process)):
            continue
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (aside, *aside.glob("*")))
            if time.time() - newest < LEFT_SECONDS:
                continue
            if aside.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink()


def cut_torn_line(path: Path) -> int:
    """Cut a last line without a line feed off `path`, and return how many bytes went.

    What was appended before a kill may end in the middle of a line; nothing may be appended behind that.
    """
    if not path.exists():
        return 0
    with open(path, "r+b") as stream:
        size = end = stream.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - BUFFER_BYTES)
            stream.seek(start)
            newline = stream.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        stream.truncate(end)
        return size - end
