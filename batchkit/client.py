"""Bounded concurrent HTTP to live servers: bodies go out as the bytes they are, replies come back as bytes.

It knows of calls and endpoints, not of rows or runs. Passing faults are retried, an endpoint that is down is left alone
until it answers again, and nothing that has answered with a whole 200 is ever sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from batchkit import calls
from batchkit.credentials import Key

if TYPE_CHECKING:
    import aiohttp
    from tenacity import RetryCallState

PASSING = frozenset({408, 409, 425, 429})
"""And 5xx: the same request may succeed later."""

LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 600.0
"""A server that asks for more than this is not waited for: the request fails in passing, and goes in another submit."""

PROBE_SECONDS = 2.0
UNSENT_TRIES = 1000
"""A bound for tries that never reached a server: they cost nothing, and `patience` ends them first."""


class Call(msgspec.Struct, frozen=True):
    """One request. `key` is the caller's; `url` is a path as in the batch format; `tokens` an estimate of what it
    takes, for limits."""

    key: Any
    url: str
    body: bytes | memoryview
    tokens: int = 0


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a call. `status` 0: no answer came, `message` says why. `body` is as it arrived."""

    key: Any
    status: int
    body: bytes = b""
    request_id: str | None = None
    message: str | None = None
    endpoint: str = ""
    tries: int = 1


class Pacing(msgspec.Struct, frozen=True, kw_only=True):
    """`concurrency` calls are under way at each endpoint. `timeout` in seconds is for one call. `delay` in seconds lies
    between the starts of two calls. `tries` bounds how often a call is made, `patience` (seconds) how long no endpoint
    at all may answer. `per_minute` limits requests and tokens, 0 for no limit."""

    concurrency: int = 6
    timeout: float = 600.0
    delay: float = 0.0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    tries: int = 6
    patience: float = 300.0


class Endpoint:
    """One server. `url` ends with the version (`…/v1`)."""

    def __init__(self, url: str, key: Key | None = None) -> None:
        self.url = url
        self.key = key
        self.busy = 0
        self.up = True
        self.not_before = 0.0
        self.done = 0
        self.proxy = _proxy_of(url)
        self.headers = {"authorization": f"Bearer {key.value}"} if key is not None else {}
        self.post_headers = {"content-type": "application/json", **self.headers}

    def address(self, path: str) -> str:
        """Where requests to `path` go: `/v1/…` below the base, others (`/score`) beside its version."""
        if path.startswith("/v1/"):
            return self.url + path[3:]
        return self.url.removesuffix("/v1") + path


class NoEndpointError(Exception):
    """No endpoint has answered for as long as `patience` says."""


class _PassingError(Exception):
    """A try that failed in passing; `after` is what the server asks to wait, in seconds. `sent`: it may have reached
    the server, and counts as a try."""

    def __init__(self, reply: Reply, *, after: float | None = None, sent: bool = True) -> None:
        super().__init__(reply.message)
        self.reply = reply
        self.after = after
        self.sent = sent


class Client:
    """Makes calls at several endpoints at once. `say` is told when an endpoint goes down or comes back; `check` is
    called while none answers, and may raise what makes waiting senseless."""

    def __init__(
        self,
        endpoints: list[Endpoint],
        pacing: Pacing,
        say: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._check = check
        self._endpoints = endpoints
        self._pacing = pacing
        self._say = say
        self._probes: set[asyncio.Task[None]] = set()
        self._next_start = 0.0
        self._waiting = 0
        self._down_since: float | None = None

    async def run(self, source: Iterator[Call], done: Callable[[Reply], None]) -> None:
        """Make all calls of `source`, which is read as slots become free, and give each reply to `done`.

        Raises `NoEndpointError`, and whatever `source` or `done` raise, having cancelled what was under way.
        """
        import aiohttp
        from aiolimiter import AsyncLimiter

        self._free = asyncio.Condition()
        pacing = self._pacing
        self._requests = AsyncLimiter(pacing.requests_per_minute, 60) if pacing.requests_per_minute else None
        self._tokens = AsyncLimiter(pacing.tokens_per_minute, 60) if pacing.tokens_per_minute else None
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300)
        timeout = aiohttp.ClientTimeout(total=pacing.timeout, connect=30.0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=True) as session:
            self._session = session
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(pacing.concurrency * len(self._endpoints)):
                        group.create_task(self._work(source, done))
            except BaseExceptionGroup as found:
                raise found.exceptions[0] from None  # the first; the others were cancelled for it
            finally:
                for probe in self._probes:
                    probe.cancel()

    async def _work(self, source: Iterator[Call], done: Callable[[Reply], None]) -> None:
        for call in source:
            done(await self._answer(call))

    async def _answer(self, call: Call) -> Reply:
        """The reply after as many tries as it takes; the last one's, where none was a success."""
        try:
            return await self._try(call)
        except _PassingError as exc:
            return await self._answer_again(call, exc)

    async def _answer_again(self, call: Call, first: _PassingError) -> Reply:
        """Go on behind the try that has failed with `first`."""
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        tries, failed = 0, [first]

        def over(state: RetryCallState) -> bool:
            return tries >= self._pacing.tries or stop_after_attempt(UNSENT_TRIES)(state)

        try:
            async for attempt in AsyncRetrying(
                stop=over, wait=_wait, retry=retry_if_exception_type(_PassingError), reraise=True
            ):
                with attempt:
                    try:
                        if failed:
                            raise failed.pop()
                        return msgspec.structs.replace(await self._try(call), tries=tries + 1)
                    except _PassingError as exc:
                        tries += exc.sent
                        raise
        except _PassingError as exc:
            return msgspec.structs.replace(exc.reply, tries=max(tries, 1))
        raise AssertionError("a call ends with a reply or an exception")

    async def _try(self, call: Call) -> Reply:
        endpoint = await self._take()
        try:
            await self._hold_back(call)
            return await self._post(endpoint, call)
        finally:
            endpoint.busy -= 1
            if self._waiting:
                async with self._free:
                    self._free.notify()

    # -- endpoints

    async def _take(self) -> Endpoint:
        """A free slot at the least busy endpoint that is up. Waits for one."""
        while True:
            now = time.monotonic()
            usable = [e for e in self._endpoints if e.up and e.busy < self._pacing.concurrency and e.not_before <= now]
            if usable:
                self._down_since = None
                found = min(usable, key=lambda endpoint: endpoint.busy)
                found.busy += 1
                return found
            await self._wait_for_slot(now)

    async def _wait_for_slot(self, now: float) -> None:
        pauses = [
            endpoint.not_before - now for endpoint in self._endpoints if endpoint.up and endpoint.not_before > now
        ]
        if not any(endpoint.up for endpoint in self._endpoints):
            self._check()
            self._down_since = self._down_since if self._down_since is not None else now
            if now - self._down_since > self._pacing.patience:
                raise NoEndpointError("no endpoint answers")
            pauses.append(PROBE_SECONDS)
        self._waiting += 1
        try:
            async with asyncio.timeout(min(pauses, default=PROBE_SECONDS)), self._free:
                await self._free.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting -= 1

    def _set_aside(self, endpoint: Endpoint, why: str) -> None:
        if endpoint.up:
            endpoint.up = False
            self._say(f"{endpoint.url} is down ({why}); its requests go to others until it answers again")
            probe = asyncio.get_running_loop().create_task(self._probe(endpoint))
            self._probes.add(probe)
            probe.add_done_callback(self._probes.discard)

    async def _probe(self, endpoint: Endpoint) -> None:
        """Until the endpoint answers again: with any status but 5xx, since not all have a list of models."""
        while not endpoint.up:
            await asyncio.sleep(PROBE_SECONDS)
            with contextlib.suppress(Exception):  # whatever is wrong, it is down still
                async with self._session.get(
                    endpoint.url + "/models", headers=endpoint.headers, proxy=endpoint.proxy
                ) as response:
                    endpoint.up = response.status < 500
        self._say(f"{endpoint.url} answers again")
        async with self._free:
            self._free.notify_all()

    # -- one try

    async def _hold_back(self, call: Call) -> None:
        """Wait for what the limits allow."""
        if self._requests is not None:
            await self._requests.acquire()
        if self._tokens is not None and call.tokens:
            await self._tokens.acquire(min(call.tokens, self._tokens.max_rate))
        if self._pacing.delay:
            start = max(self._next_start, time.monotonic())
            self._next_start = start + self._pacing.delay
            await asyncio.sleep(start - time.monotonic())

    async def _post(self, endpoint: Endpoint, call: Call) -> Reply:
        try:
            async with self._session.post(
                endpoint.address(call.url),
                data=call.body,
                headers=endpoint.post_headers,
                allow_redirects=False,
                proxy=endpoint.proxy,
            ) as response:
                body = await response.read()
                return self._judge(endpoint, call, response, body)
        except TimeoutError as exc:
            message = f"no answer within {self._pacing.timeout:g} s"
            raise _PassingError(_nothing(endpoint, call, message)) from exc
        except Exception as exc:
            if not (calls.is_of_network(exc) or isinstance(exc, OSError)):
                raise
            raise self._cut_off(endpoint, call, exc) from exc

    def _cut_off(self, endpoint: Endpoint, call: Call, exc: Exception) -> _PassingError:
        import aiohttp

        message = f"{type(exc).__name__}: {exc}"
        if isinstance(exc, aiohttp.ClientConnectorError):
            self._set_aside(endpoint, message)
            return _PassingError(_nothing(endpoint, call, message), sent=False)
        return _PassingError(_nothing(endpoint, call, message))

    def _judge(self, endpoint: Endpoint, call: Call, response: aiohttp.ClientResponse, body: bytes) -> Reply:
        """The reply, or `_PassingError` where another try may do better."""
        status = response.status
        reply = Reply(
            key=call.key,
            status=status,
            body=body if endpoint.key is None else endpoint.key.hide_bytes(body),
            request_id=response.headers.get("x-request-id"),
            message=None if status < 400 else f"status {status}",
            endpoint=endpoint.url,
        )
        if status in PASSING or status >= 500:
            after = _retry_after(response.headers.get("retry-after"))
            if after is not None:
                if after > LONGEST_RETRY_AFTER:
                    return reply
                endpoint.not_before = max(endpoint.not_before, time.monotonic() + after)
            raise _PassingError(reply, after=after)
        endpoint.done += 1
        return reply


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for a URL. Asked once: aiohttp's own way asks for each request."""
    import urllib.request
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _nothing(endpoint: Endpoint, call: Call, message: str) -> Reply:
    return Reply(key=call.key, status=0, message=message, endpoint=endpoint.url)


def _wait(state: RetryCallState) -> float:
    """What the server asks for, else exponential with jitter; nothing for a try that never left."""
    from tenacity import wait_random_exponential

    failure = state.outcome.exception() if state.outcome is not None else None
    if isinstance(failure, _PassingError):
        if not failure.sent:
            return 0.0
        if failure.after is not None:
            return failure.after
    return float(wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT)(state))


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or an HTTP date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None
