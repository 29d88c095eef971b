"""Remote files that are sought in: read piece by piece, each piece by a request of its own.

All pieces are of one version: a file that changes meanwhile ends the reading. Nothing is kept in memory or on the disk.
"""

from __future__ import annotations

import http.client
import io
import os
from typing import Any

from batchkit import remotes, s3
from batchkit.errors import InputError
from batchkit.storage import shown

BUFFER_BYTES = 4 << 20
"""What a reader should ask for at once: a request takes some tens of milliseconds, however little it brings."""


class RemoteFile(io.RawIOBase):
    """The bytes at `uri`, an object in S3 or behind an address whose server gives out parts of files.

    Raises `InputError`, `StorageError` or `CredentialsError` where it is not there, or may not be read.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._version = remotes.look(uri)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._version.bytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._version.bytes)
        if self._at >= end:
            return 0
        piece = self._s3_piece(end) if s3.is_s3(self._uri) else self._web_piece(end)
        if len(piece) != end - self._at:
            raise InputError(
                f"{shown(self._uri)}: of bytes {self._at:,} to {end:,} only {len(piece):,} arrived",
                hint="run the same command again: it goes on where it stopped",
            )
        buffer[: len(piece)] = piece
        self._at = end
        return len(piece)

    def _s3_piece(self, end: int) -> bytes:
        return s3.get_piece(self._uri, self._at, end, str(self._version.etag))

    def _web_piece(self, end: int) -> bytes:
        import urllib.error
        import urllib.request

        headers = {"User-Agent": "batchkit", "Accept-Encoding": "identity", "Range": f"bytes={self._at}-{end - 1}"}
        request = urllib.request.Request(self._uri, headers=headers)  # noqa: S310  # http or https, `look` has checked
        try:
            with urllib.request.urlopen(request, timeout=remotes.TIMEOUT_SECONDS) as answer:  # noqa: S310  # the same
                if answer.status != http.client.PARTIAL_CONTENT:
                    raise InputError(
                        f"{shown(self._uri)}: its server gives no parts of a file, which this format needs",
                        hint="download it first",
                    )
                if answer.headers.get("ETag") != self._version.etag:
                    raise InputError(f"{shown(self._uri)}: has changed while it was read", hint="run the command again")
                return bytes(answer.read(end - self._at))
        except urllib.error.HTTPError as exc:
            raise InputError(
                f"{shown(self._uri)}: the server says {exc.code} {exc.reason}",
                hint="its address may have expired: sign it anew",
            ) from exc
        except (OSError, http.client.HTTPException) as exc:
            raise InputError(
                f"{shown(self._uri)}: the connection broke off ({type(exc).__name__})",
                hint="check the network, and run the same command again: it goes on where it stopped",
            ) from exc
