"""One remote image → a file here: its redirects, its limits, its tries. `stocks` does many at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from batchkit import __version__, mishaps, s3
from batchkit.errors import RowError, StorageError
from batchkit.mishaps import PassingError, of_s3, of_web, told, too_large
from batchkit.references import shown
from batchkit.signing import Signer

if TYPE_CHECKING:
    import aiohttp
    from tenacity import RetryCallState

AT_ONCE = 96
AT_ONE_HOST = 32
"""Of servers that are not S3."""
TRIES = 6
TRYING_SECONDS = 90.0
"""No try begins later than that behind the first."""
LONGEST_WAIT = 8.0
MOST_REDIRECTS = 5

LARGE = 4 << 20
LARGE_AT_ONCE = 8
"""So many images of more than `LARGE` bytes are read at a time: that bounds what lies on the disk half-read."""

TOTAL_SECONDS = 120.0

MOST_LOST = 100
"""So many images in a row that could not be fetched, by faults that pass: the network is down, not the images."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
NOT_NOW = "image_connection"
"""The code of what may be had another time: where a response has it, `submit` sends the request again."""
_RETRY = "check the network, and run the same command again: it goes on where it stopped"


class Fetcher:
    """Fetches images, some at a time. An async context manager; all of it runs in one event loop."""

    def __init__(self, *, private_hosts: bool = False) -> None:
        self._private_hosts = private_hosts
        self._signer = Signer()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._lost = 0
        self._proxies: dict[tuple[str, str | None], str | None] = {}

    async def __aenter__(self) -> Self:
        import aiohttp

        from batchkit.addresses import PublicResolver

        async with contextlib.AsyncExitStack() as stack:
            settings: dict[str, Any] = {
                "timeout": aiohttp.ClientTimeout(
                    None, sock_connect=mishaps.CONNECT_SECONDS, sock_read=mishaps.SILENT_SECONDS
                ),
                "headers": {"User-Agent": f"batchkit/{__version__}", "Accept-Encoding": "identity"},
                "skip_auto_headers": ["Accept"],
            }
            trusted = ssl.create_default_context(cafile=_certificates())
            ours = aiohttp.TCPConnector(limit=AT_ONCE, ssl=trusted)
            public = aiohttp.TCPConnector(limit=AT_ONCE, limit_per_host=AT_ONE_HOST, resolver=PublicResolver())
            plain = aiohttp.TCPConnector(limit=AT_ONCE, limit_per_host=AT_ONE_HOST)
            self._s3, self._public, self._plain = [
                await stack.enter_async_context(
                    aiohttp.ClientSession(connector=one, cookie_jar=aiohttp.DummyCookieJar(), **settings)
                )
                for one in (ours, public, plain)
            ]
            self._open = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    async def fetch(self, uri: str, path: Path) -> int:
        """Write the image to `path`; return its size. Raises `RowError` where it cannot be had, and `BatchkitError`
        where no image can: the network, the credentials, the bucket."""
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, stop_after_delay

        retrying = AsyncRetrying(
            stop=stop_after_attempt(TRIES) | stop_after_delay(TRYING_SECONDS),
            wait=_wait,
            retry=retry_if_exception_type(PassingError),
            reraise=True,
        )
        try:
            size: int = await retrying(self._try, uri, path)
        except PassingError as exc:
            self._lost += 1
            if exc.unreachable and s3.is_s3(uri):
                raise StorageError(f"{uri}: {exc}", hint=f"check AWS_ENDPOINT_URL; {_RETRY}") from exc
            if self._lost >= MOST_LOST:
                why = f"{self._lost} images in a row could not be fetched, the last: {shown(uri)}: {exc}"
                raise StorageError(why, hint=_RETRY) from exc
            raise RowError(NOT_NOW, f"image cannot be fetched: {shown(uri)}: {exc}") from exc
        except RowError:
            self._lost = 0
            raise
        self._lost = 0
        return size

    async def _try(self, uri: str, path: Path) -> int:
        async with self._slots:
            try:
                async with asyncio.timeout(TOTAL_SECONDS) as limit:
                    with told(uri):
                        get = self._get_s3(uri) if s3.is_s3(uri) else self._get(uri)
                        async with get as response:
                            return await self._save(uri, response, path, limit)
            except BaseException as exc:
                path.unlink(missing_ok=True)  # noqa: ASYNC240  # a half of it would take up the disk until the end
                if isinstance(exc, TimeoutError):
                    raise PassingError(f"it was not there after {TOTAL_SECONDS:g} s") from exc
                raise

    # -- asking

    @contextlib.asynccontextmanager
    async def _get_s3(self, uri: str) -> AsyncIterator[aiohttp.ClientResponse]:
        while True:
            signed, headers = self._signer.sign(uri)
            url, proxy = _as_it_is(signed), self._proxy(_as_it_is(signed))
            async with self._s3.get(url, headers=headers, allow_redirects=False, proxy=proxy) as response:
                if response.status == 200:
                    yield response
                    return
                region = response.headers.get("x-amz-bucket-region")
                if region and self._signer.move(uri, region):
                    continue
                raise of_s3(uri, response, await response.content.read(1 << 16))

    @contextlib.asynccontextmanager
    async def _get(self, uri: str) -> AsyncIterator[aiohttp.ClientResponse]:
        url = _as_it_is(uri)
        for _ in range(MOST_REDIRECTS + 1):
            async with self._session_for(url).get(url, allow_redirects=False, proxy=self._proxy(url)) as response:
                if response.status == 200:
                    yield response
                    return
                if response.status not in _REDIRECTS or "location" not in response.headers:
                    raise of_web(uri, response, await response.content.read(1 << 16))
                url = _next(uri, url, response.headers["location"])
        raise RowError("image", f"image has more than {MOST_REDIRECTS} redirects: {shown(uri)}")

    def _session_for(self, url: Any) -> aiohttp.ClientSession:
        """What may connect to a host. Raises `PrivateAddressError` for one that nothing may."""
        if self._private_hosts:
            return self._plain
        from batchkit.addresses import check_literal

        check_literal(url.host or "")
        # A proxy looks the name up itself, and is often in the private network that we are in.
        return self._plain if self._proxy(url) else self._public

    def _proxy(self, url: Any) -> str | None:
        """Asked of the environment once for each host: that takes longer than all else."""
        key = (url.scheme, url.host)
        if key not in self._proxies:
            self._proxies[key] = _proxy_of(url)
        return self._proxies[key]

    # -- reading

    async def _save(self, uri: str, response: aiohttp.ClientResponse, path: Path, limit: asyncio.Timeout) -> int:
        if (response.content_length or 0) > mishaps.FILE_LIMIT:
            raise too_large(uri)
        size = 0
        async with contextlib.AsyncExitStack() as stack:
            with _storing(path), open(path, "wb") as stream:  # noqa: ASYNC230  # some kilobytes, into the page cache
                async for piece in response.content.iter_any():
                    if size <= LARGE < size + len(piece):
                        limit.reschedule(None)
                        await stack.enter_async_context(self._large)
                        limit.reschedule(asyncio.get_running_loop().time() + TOTAL_SECONDS)
                    size += len(piece)
                    if size > mishaps.FILE_LIMIT:
                        raise too_large(uri)
                    stream.write(piece)
        return size


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
    """Raise `StorageError` where the disk is what fails: aiohttp's errors may be `OSError`s, too."""
    try:
        yield
    except OSError as exc:
        if type(exc).__module__ != "builtins" or isinstance(exc, TimeoutError | ConnectionError):
            raise
        raise StorageError(
            f"{path.parent}: cannot be written: {exc.strerror or exc}", hint="TMPDIR names a folder with more room"
        ) from exc


# -- addresses -----------------------------------------------------------------------------------------------------


def _as_it_is(url: str) -> Any:
    """A URL whose escapes are left alone (a signature covers them), unless it has letters that need escaping."""
    from yarl import URL

    plain = url.isascii() and url.isprintable() and not any(letter in url for letter in ' "<>\\^`{|}')
    return URL(url, encoded=plain)


def _next(uri: str, here: Any, location: str) -> Any:
    """Where a redirect leads. Raises `RowError` where it may not be followed."""
    there = here.join(_as_it_is(location))
    if there.scheme not in ("http", "https") or (here.scheme == "https" and there.scheme == "http"):
        raise RowError("image", f"image is redirected from {here.scheme} to {there.scheme}: {shown(uri)}")
    return there


def _proxy_of(url: Any) -> str | None:
    """The proxy that the environment names for a URL. This machine is never asked through one."""
    host = url.host or ""
    if host in ("localhost", "::1") or host.startswith("127.") or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(url.scheme)


def _certificates() -> str | None:
    """The authorities that boto3 trusts: those of `AWS_CA_BUNDLE`, or its own."""
    from botocore.httpsession import get_cert_path

    found = os.environ.get("AWS_CA_BUNDLE") or get_cert_path(True)
    return found if found and Path(found).is_file() else None


def _wait(state: RetryCallState) -> float:
    """Exponential with jitter, and as long as the server asked for, within reason."""
    from tenacity import wait_random_exponential

    failure = state.outcome.exception() if state.outcome is not None else None
    after = failure.after if isinstance(failure, PassingError) else 0.0
    return max(min(after, 4 * LONGEST_WAIT), float(wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT)(state)))
