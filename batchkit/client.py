"""Bounded concurrent HTTP to live servers: bodies go out as the bytes they are, replies come back as bytes.

It knows of calls and endpoints, not of rows or runs. Passing faults are retried, and nothing that has answered with a
whole 200 is ever sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from batchkit import calls, responses
from batchkit.rotation import Endpoint, NoEndpointError, RefusingError, Rotation

if TYPE_CHECKING:
    import aiohttp
    from tenacity import RetryCallState

__all__ = ["Call", "Client", "Endpoint", "NoEndpointError", "Pacing", "RefusingError", "Reply"]

PASSING = frozenset({408, 409, 425, 429})
"""And 5xx: the same request may succeed later."""

REFUSING = frozenset({401, 402, 407})
"""No request will do better: the key, or what is left on the account."""

SUSPECT = frozenset({403, 404, 405, 410})
"""And 3xx: a wrong path, model or key if all requests get it; a request's own fault if it alone does."""

FORBIDDEN = 403
"""Also what some hosts say to requests that their moderation has flagged."""

NO_MONEY = b"insufficient_quota"
"""OpenAI's code in a 429 for an empty account (platform.openai.com/docs/guides/error-codes): no wait helps."""

MOST_LOST = 100
"""So many calls in a row whose every try failed, and no fewer than four a worker: then it is not the calls."""

MOST_SUSPECTS = 10

END = object()
SOURCE_SECONDS = 0.1
"""Between two looks whether there is a call, where there was none yet."""

LONGEST_WAIT = 60.0
CONNECT_SECONDS = 30.0
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


class _PassingError(Exception):
    """A try that failed in passing. `after` is what the server asks to wait, in seconds. `sent`: it may have reached
    the server, and counts as a try."""

    def __init__(self, endpoint: Endpoint, reply: Reply, *, after: float | None = None, sent: bool = True) -> None:
        super().__init__(reply.message)
        self.endpoint = endpoint
        self.reply = reply
        self.after = after
        self.sent = sent


class Client:
    """Makes calls at several endpoints at once. `probe`, `say` and `check` are those of `Rotation`."""

    def __init__(
        self,
        endpoints: list[Endpoint],
        pacing: Pacing,
        *,
        probe: Callable[[aiohttp.ClientSession, Endpoint], Awaitable[str | None]],
        say: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._endpoints = endpoints
        self._pacing = pacing
        self._rotation = Rotation(
            endpoints,
            concurrency=pacing.concurrency,
            patience=pacing.patience,
            probe=lambda endpoint: probe(self._session, endpoint),
            say=say,
            check=check,
        )
        self._next_start = 0.0
        self._suspects: dict[Endpoint, list[Reply]] = {endpoint: [] for endpoint in endpoints}
        self._suspected = dict.fromkeys(endpoints, 0.0)  # when the first of these came
        self._failure: NoEndpointError | RefusingError | None = None
        self._lost = 0

    async def run(self, source: Iterator[Call | None], done: Callable[[Reply], None]) -> None:
        """Make all calls of `source`, which is read as slots become free, and give each reply to `done`. A None means
        that there is none yet.

        Raises `NoEndpointError` and `RefusingError`, when the calls under way have ended; whatever `source` or `done`
        raise, having cancelled these.
        """
        import aiohttp
        from aiolimiter import AsyncLimiter

        pacing = self._pacing
        self._done = done
        self._workers: set[asyncio.Task[None]] = set()
        self._asking: set[asyncio.Task[None] | None] = set()
        self._requests = AsyncLimiter(pacing.requests_per_minute, 60) if pacing.requests_per_minute else None
        self._tokens = AsyncLimiter(pacing.tokens_per_minute, 60) if pacing.tokens_per_minute else None
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300)
        timeout = aiohttp.ClientTimeout(total=pacing.timeout, connect=min(CONNECT_SECONDS, pacing.timeout))
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=True) as session:
            self._session = session
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(pacing.concurrency * len(self._endpoints)):
                        self._workers.add(group.create_task(self._work(source)))
            except BaseExceptionGroup as found:
                raise found.exceptions[0] from None  # the first; the others were cancelled for it
            finally:
                self._rotation.stop()
        for endpoint, held in self._suspects.items():
            if held and self._failure is None and not (endpoint.done and endpoint.up):
                self._failure = RefusingError(endpoint, held[0].status, held[0].body)
        if self._failure is not None:
            raise self._failure
        for endpoint in self._endpoints:
            self._clear(endpoint)

    async def _work(self, source: Iterator[Call | None]) -> None:
        while self._failure is None and (call := next(source, END)) is not END:
            if not isinstance(call, Call):
                await asyncio.sleep(SOURCE_SECONDS)
                continue
            try:
                reply = await self._answer(call)
            except (NoEndpointError, RefusingError) as exc:
                self._stop(exc)
                return
            if reply is not None:
                self._done(reply)

    def _stop(self, why: NoEndpointError | RefusingError) -> None:
        """Start no more calls. Those under way may end: their answers are paid for."""
        self._failure = self._failure or why
        self._rotation.close(why)
        for worker in self._workers - self._asking:
            worker.cancel()

    async def _answer(self, call: Call) -> Reply | None:
        """The reply after as many tries as it takes; the last one's, where none was a success. None: it is kept among
        the suspects."""
        try:
            return await self._try(call)
        except _PassingError as exc:
            return await self._answer_again(call, exc)

    async def _answer_again(self, call: Call, first: _PassingError) -> Reply | None:
        """Go on behind the try that has failed with `first`."""
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        tries, avoid, failed = 0, first.endpoint, [first]

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
                        reply = await self._try(call, avoid)
                        return reply if reply is None else msgspec.structs.replace(reply, tries=tries + 1)
                    except _PassingError as exc:
                        tries, avoid = tries + exc.sent, exc.endpoint
                        raise
        except _PassingError as exc:
            self._lost += 1
            if self._lost >= max(MOST_LOST, 4 * len(self._workers)):
                why = f"{self._lost} requests in a row failed, the last with: {exc.reply.message}"
                self._stop(NoEndpointError(why))
            return msgspec.structs.replace(exc.reply, tries=max(tries, 1))
        raise AssertionError("a call ends with a reply or an exception")

    async def _try(self, call: Call, avoid: Endpoint | None = None) -> Reply | None:
        if self._requests is not None or self._tokens is not None:
            await self._hold_back(call)
        endpoint = await (self._start_spaced(avoid) if self._pacing.delay else self._rotation.take(avoid))
        task = asyncio.current_task()
        self._asking.add(task)
        try:
            return await self._post(endpoint, call)
        finally:
            self._asking.discard(task)
            self._rotation.release(endpoint)  # nothing is awaited behind a whole 200: a cancellation would lose it

    async def _hold_back(self, call: Call) -> None:
        """Wait for what the limits allow."""
        if self._requests is not None:
            await self._requests.acquire()
        if self._tokens is not None and call.tokens:
            await self._tokens.acquire(min(call.tokens, self._tokens.max_rate))

    async def _start_spaced(self, avoid: Endpoint | None) -> Endpoint:
        """A slot at an endpoint, `delay` behind the last one."""
        while True:
            endpoint = await self._rotation.take(avoid)
            try:
                start = max(self._next_start, time.monotonic())
                self._next_start = start + self._pacing.delay
                await asyncio.sleep(start - time.monotonic())
            except BaseException:
                self._rotation.release(endpoint)
                raise
            if self._rotation.is_open(endpoint, time.monotonic()):
                return endpoint
            self._rotation.release(endpoint)  # it asked for a pause meanwhile

    # -- one try

    async def _post(self, endpoint: Endpoint, call: Call) -> Reply | None:
        began = time.monotonic()
        try:
            response = await self._session.post(
                endpoint.address(call.url),
                data=call.body,
                headers=endpoint.post_headers,
                allow_redirects=False,
                proxy=endpoint.proxy,
            )
            try:
                body = await response.read()
            finally:
                response.release()
        except Exception as exc:
            if not (calls.is_of_network(exc) or isinstance(exc, OSError)):
                raise
            raise self._cut_off(endpoint, call, exc) from exc
        return self._judge(endpoint, call, response, body, began)

    def _cut_off(self, endpoint: Endpoint, call: Call, exc: Exception) -> _PassingError:
        import aiohttp

        message = f"{type(exc).__name__}: {exc}"
        if isinstance(exc, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            self._rotation.set_aside(endpoint, message)
            return _PassingError(endpoint, _nothing(endpoint, call, message), sent=False)
        if isinstance(exc, TimeoutError):
            message = f"no answer within {self._pacing.timeout:g} s"
        self._rotation.failed(endpoint, message)
        return _PassingError(endpoint, _nothing(endpoint, call, message))

    def _judge(
        self, endpoint: Endpoint, call: Call, response: aiohttp.ClientResponse, body: bytes, began: float
    ) -> Reply | None:
        """The reply, or `_PassingError` where another try may do better; `RefusingError` where no request will."""
        status = response.status
        success = 200 <= status < 300
        reply = Reply(
            key=call.key,
            status=status,
            body=body if endpoint.key is None or success else endpoint.key.hide_bytes(body),
            request_id=_plain(response.headers.get("x-request-id")),
            message=None if success else f"status {status}",
            endpoint=endpoint.url,
        )
        if status in REFUSING or (status == 429 and NO_MONEY in body):
            raise RefusingError(endpoint, status, reply.body)
        if status in PASSING or status >= 500:
            raise self._passing(endpoint, reply, _retry_after(response.headers.get("retry-after")))
        if success and not _says_its_length(response) and not responses.is_json(body):
            message = "the answer ended too early"
            self._rotation.failed(endpoint, message)
            raise _PassingError(endpoint, _nothing(endpoint, call, message))
        if status in SUSPECT or 300 <= status < 400:
            return self._suspect(endpoint, reply, began)
        self._lost = 0
        self._rotation.answered(endpoint, began)
        if self._suspects[endpoint] and began > self._suspected[endpoint]:
            self._clear(endpoint)
        return reply

    def _passing(self, endpoint: Endpoint, reply: Reply, after: float | None) -> _PassingError:
        if after is not None:
            self._rotation.pause(endpoint, after)
        if reply.status >= 500:
            self._rotation.failed(endpoint, reply.message or "")
        return _PassingError(endpoint, reply, after=after)

    def _suspect(self, endpoint: Endpoint, reply: Reply, began: float) -> Reply | None:
        """Hold the reply back until it is clear whether all requests get the like. None, or the reply if it is the
        request's own fault."""
        held = self._suspects[endpoint]
        if len(held) >= MOST_SUSPECTS and endpoint.up and began > endpoint.turned > self._suspected[endpoint]:
            self._rotation.answered(endpoint, began)  # it was asked meanwhile, and is well
            self._clear(endpoint)
            return reply
        if not held:
            self._suspected[endpoint] = time.monotonic()
        held.append(reply)
        if len(held) >= MOST_SUSPECTS and not (endpoint.done and any(one.status == FORBIDDEN for one in held)):
            raise RefusingError(endpoint, reply.status, reply.body)
        if len(held) == MOST_SUSPECTS:
            self._rotation.set_aside(endpoint, f"{MOST_SUSPECTS} refusals in a row, the last: {reply.message}")
        return None

    def _clear(self, endpoint: Endpoint) -> None:
        held, self._suspects[endpoint] = self._suspects[endpoint], []
        for reply in held:
            self._done(reply)


def _nothing(endpoint: Endpoint, call: Call, message: str) -> Reply:
    return Reply(key=call.key, status=0, message=_plain(message), endpoint=endpoint.url)


def _plain(text: str | None) -> str | None:
    """Headers may hold any bytes, which aiohttp gives as halves of surrogate pairs: these cannot be written."""
    return text if text is None or text.isascii() else text.encode("utf-8", "replace").decode()


def _says_its_length(response: aiohttp.ClientResponse) -> bool:
    """Whether aiohttp itself notices a body that ends too early."""
    return "content-length" in response.headers or "chunked" in response.headers.get("transfer-encoding", "").lower()


def _wait(state: RetryCallState) -> float:
    """Exponential with jitter; nothing for a try that never left, or where the server asked for a pause: all calls keep
    that."""
    from tenacity import wait_random_exponential

    failure = state.outcome.exception() if state.outcome is not None else None
    if isinstance(failure, _PassingError) and (not failure.sent or failure.after):
        return 0.0
    return float(wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT)(state))


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or an HTTP date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None
