"""What a remote task file is now: its size and its version, so that a changed one is noticed."""

from __future__ import annotations

from typing import NamedTuple

from batchkit import s3
from batchkit.errors import InputError
from batchkit.storage import shown

SCHEMES = ("s3://", "http://", "https://")
TIMEOUT_SECONDS = 30


class Version(NamedTuple):
    """`bytes` is 0 and the others are None where the server does not say."""

    bytes: int
    etag: str | None
    modified: int | None


def look(uri: str) -> Version:
    """Raises `InputError`, `StorageError` or `CredentialsError` where it is not there, or may not be read."""
    if not uri.startswith(SCHEMES):
        raise InputError(f"{uri}: no way to read this is known", hint="a local path, s3://… or https://…")
    if s3.is_s3(uri):
        found = s3.look(uri)
        return Version(found.bytes, found.etag, None)
    return _look_at_web(uri)


def _look_at_web(uri: str) -> Version:
    import http.client
    import urllib.error
    import urllib.request
    from email.utils import parsedate_to_datetime

    # A GET, of which nothing is read: a signed URL is signed for GET alone.
    request = urllib.request.Request(uri, headers={"User-Agent": "batchkit", "Accept-Encoding": "identity"})  # noqa: S310  # http or https, checked above
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310  # the same
            headers = answer.headers
    except urllib.error.HTTPError as exc:
        hint = "it may have expired, or ask for a login" if exc.code in (401, 403) else "check the address"
        raise InputError(f"{shown(uri)}: the server says {exc.code} {exc.reason}", hint=hint) from exc
    except (OSError, http.client.HTTPException) as exc:
        raise InputError(
            f"{shown(uri)}: cannot be reached: {getattr(exc, 'reason', exc)}", hint="check the address and the network"
        ) from exc
    modified = headers.get("Last-Modified")
    return Version(
        int(headers.get("Content-Length") or 0),
        headers.get("ETag"),
        int(parsedate_to_datetime(modified).timestamp() * 1e9) if modified else None,
    )
