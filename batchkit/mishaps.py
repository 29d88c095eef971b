"""What goes wrong while an image is fetched: a fault that passes, one of its row, or one that stops everything."""

from __future__ import annotations

import contextlib
import email.utils
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from batchkit import s3
from batchkit.errors import BatchkitError, RowError, StorageError, UsageError
from batchkit.references import shown
from batchkit.signing import PASSING_CODES, refusal

if TYPE_CHECKING:
    import aiohttp

    from batchkit.addresses import PrivateAddressError

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 20.0
FILE_LIMIT = 256 << 20
"""Larger images, in bytes, are refused: nothing that a model takes needs that."""
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


class PassingError(Exception):
    """A try failed, and another may succeed. `after` is what the server asked for, in seconds; `unreachable` says that
    there was no connection."""

    def __init__(self, why: str, *, after: float = 0.0, unreachable: bool = False) -> None:
        super().__init__(why)
        self.after = after
        self.unreachable = unreachable


def of_s3(uri: str, response: aiohttp.ClientResponse, body: bytes) -> Exception:
    found = refusal(uri, response.status, body)
    if found.code in PASSING_CODES or response.status in _PASSING:
        return PassingError(f"the server says {response.status} {found.code}".rstrip(), after=_after(response))
    if found.stops:
        return found.error
    if isinstance(found.error, s3.MissingError):
        return RowError("image", f"image not found: {uri}")
    hint = f" ({found.error.hint})" if found.error.hint and response.status == 403 else ""
    return RowError("image", f"image cannot be fetched: {found.error.message}{hint}")


def of_web(uri: str, response: aiohttp.ClientResponse, body: bytes) -> Exception:
    status = response.status
    if status in _PASSING:
        return PassingError(f"the server says {status} {response.reason}".rstrip(), after=_after(response))
    if status in (404, 410):
        return RowError("image", f"image not found: {shown(uri)} ({status})")
    if status in (401, 403):
        expired = b"expired" in body.lower()
        why = f"its signature has expired ({status}): sign it anew" if expired else f"access denied ({status})"
        return RowError("image", f"image cannot be fetched: {shown(uri)}: {why}")
    if b"RequestTimeTooSkewed" in body:
        return s3.error_of(shown(uri), "read", code="RequestTimeTooSkewed", status=status, message="")
    return RowError("image", f"image cannot be fetched: {shown(uri)}: the server says {status} {response.reason}")


def too_large(uri: str) -> RowError:
    return RowError("image", f"image has more than {FILE_LIMIT:,} bytes: {shown(uri)}")


@contextlib.contextmanager
def told(uri: str) -> Iterator[None]:
    """What aiohttp raises in the block, as a fault that passes or as one of the row."""
    import aiohttp

    from batchkit.addresses import PrivateAddressError

    try:
        yield
    except (PassingError, RowError):
        raise
    except BatchkitError as exc:
        if isinstance(exc, UsageError) or type(exc.__cause__).__name__ == "ParamValidationError":
            raise RowError("image", f"not the name of an image: {exc.message}") from exc
        raise
    except PrivateAddressError as exc:
        raise _private(uri, exc) from exc
    except aiohttp.ServerTimeoutError as exc:
        lost = isinstance(exc, aiohttp.ConnectionTimeoutError)
        why = f"no connection within {CONNECT_SECONDS:g} s" if lost else f"no answer within {SILENT_SECONDS:g} s"
        raise PassingError(why, unreachable=lost) from exc
    except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as exc:
        if s3.is_s3(uri):
            raise StorageError(
                f"{uri}: {exc}", hint="AWS_CA_BUNDLE names a file with the authorities to trust"
            ) from exc
        raise RowError("image", f"image cannot be fetched: {shown(uri)}: its server's certificate: {exc}") from exc
    except aiohttp.ClientConnectorError as exc:
        raise _unconnected(uri, exc) from exc
    except (aiohttp.InvalidURL, UnicodeError, ValueError) as exc:
        raise RowError("image", f"not an address that can be asked: {shown(uri)}") from exc
    except (aiohttp.ClientError, OSError) as exc:
        raise PassingError(f"the connection broke off ({type(exc).__name__})") from exc


def _unconnected(uri: str, exc: aiohttp.ClientConnectorError) -> Exception:
    from batchkit.addresses import PrivateAddressError

    cause = exc.os_error
    host = urlsplit(uri).hostname if not s3.is_s3(uri) else exc.host
    if isinstance(cause, PrivateAddressError):
        return _private(uri, cause)
    if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME and not s3.is_s3(uri):
        return RowError("image", f"image cannot be fetched: {shown(uri)}: there is no host {exc.host}")
    return PassingError(f"{host or exc.host} cannot be reached ({cause.strerror or cause})", unreachable=True)


def _private(uri: str, exc: PrivateAddressError) -> RowError:
    return RowError("image", f"image is not fetched: {shown(uri)}: {exc}; --allow-private-hosts allows it")


def _after(response: aiohttp.ClientResponse) -> float:
    """Seconds, from a number or an HTTP date (RFC 9110, 10.2.3)."""
    value = response.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0
