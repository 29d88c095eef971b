"""Which live server gets the next call: the least busy one that is up.

A server that cannot be reached, or fails again and again while another works, is set aside and asked now and then
whether it is well; then one call tries it out before it gets its share again. A server that asks for a pause gets it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from batchkit.credentials import Key

PROBE_SECONDS = 2.0
LONGEST_PROBE_SECONDS = 60.0
FAILURES_IN_ROW = 8
"""A server with so many failures in a row, and no fewer than twice its concurrency, is set aside where another is up:
without one it may as well be the requests that are bad."""

LONGEST_PAUSE = 600.0
"""A pause (in seconds) that a server may ask for; where all ask for longer ones, waiting is given up."""


class Endpoint:
    """One server. `url` ends with the version (`…/v1`)."""

    def __init__(self, url: str, key: Key | None = None) -> None:
        self.url = url
        self.key = key
        self.busy = 0
        self.up = True
        self.failures = 0
        self.relapses = 0
        self.on_trial = False
        self.turned = 0.0  # when it was set aside, or taken back, the last time
        self.not_before = 0.0
        self.done = 0
        self.lists_models = False
        self.proxy = _proxy_of(url)
        self.headers = {"authorization": f"Bearer {key.value}"} if key is not None else {}
        self.post_headers = {"content-type": "application/json", **self.headers}

    def address(self, path: str) -> str:
        """Where requests to `path` go: `/v1/…` below the base, others (`/score`) beside its version."""
        if path.startswith("/v1/"):
            return self.url + path[3:]
        return self.url.removesuffix("/v1") + path


class NoEndpointError(Exception):
    """No endpoint works, and waiting for one is senseless. The text says why."""


class RefusingError(Exception):
    """A server that takes no request at all. `status` and `body` are of one of its replies."""

    def __init__(self, endpoint: Endpoint, status: int, body: bytes) -> None:
        super().__init__(f"{endpoint.url}: status {status}")
        self.endpoint = endpoint
        self.status = status
        self.body = body


class Rotation:
    """The endpoints of one client. `concurrency` calls are under way at each; `patience` in seconds is how long all may
    be down. `probe` returns what is wrong with an endpoint, None if it is well. `say` is told when one goes down or
    comes back; `check` is called while all are down, and may raise what makes waiting senseless."""

    def __init__(
        self,
        endpoints: list[Endpoint],
        *,
        concurrency: int,
        patience: float,
        probe: Callable[[Endpoint], Awaitable[str | None]],
        say: Callable[[str], None],
        check: Callable[[], None],
    ) -> None:
        self._endpoints = endpoints
        self._concurrency = concurrency
        self._patience = patience
        self._probe = probe
        self._say = say
        self._check = check
        self._probes: set[asyncio.Task[None]] = set()
        self._waiting: dict[asyncio.Future[None], Endpoint | None] = {}
        self._down_since: float | None = None
        self._closed: NoEndpointError | RefusingError | None = None

    async def take(self, avoid: Endpoint | None = None) -> Endpoint:
        """A free slot; to be given back with `release`. Waits for one, not at `avoid` where another endpoint is up.

        Raises `NoEndpointError`, and what it was closed with.
        """
        while True:
            if self._closed is not None:
                raise self._closed
            now = time.monotonic()
            shunned = avoid if any(self.is_open(one, now) and one is not avoid for one in self._endpoints) else None
            usable = [one for one in self._endpoints if one is not shunned and self._has_room(one, now)]
            if usable:
                found = min(usable, key=lambda endpoint: endpoint.busy)
                found.busy += 1
                return found
            await self._wait(now, shunned)

    def _has_room(self, endpoint: Endpoint, now: float) -> bool:
        return self.is_open(endpoint, now) and endpoint.busy < (1 if endpoint.on_trial else self._concurrency)

    def is_open(self, endpoint: Endpoint, now: float) -> bool:
        return endpoint.up and endpoint.not_before <= now

    @property
    def _most_failures(self) -> int:
        return max(FAILURES_IN_ROW, 2 * self._concurrency)

    async def _wait(self, now: float, shunned: Endpoint | None) -> None:
        """Until something may have changed."""
        pauses = [one.not_before - now for one in self._endpoints if one.up and one.not_before > now]
        if not any(one.up and one.not_before - now <= LONGEST_PAUSE for one in self._endpoints):
            self._give_up_or_not(now, pauses)
        # Not all at the same moment, when a pause ends.
        pause = min(pauses, default=PROBE_SECONDS) + (random.random() * min(1.0, min(pauses) / 10) if pauses else 0)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = shunned
        try:
            async with asyncio.timeout(min(pause, PROBE_SECONDS)):
                await waiter
        except TimeoutError:
            pass
        finally:
            self._waiting.pop(waiter, None)

    def _give_up_or_not(self, now: float, pauses: list[float]) -> None:
        """No server is to be had soon."""
        if len(pauses) == len(self._endpoints):
            raise NoEndpointError(f"the server asks to be left alone for {min(pauses):,.0f} s")
        self._check()
        self._down_since = now if self._down_since is None else self._down_since
        if now - self._down_since > self._patience:
            raise NoEndpointError(f"no server has answered for {self._patience:g} s")

    def release(self, endpoint: Endpoint) -> None:
        endpoint.busy -= 1
        for waiter, shunned in self._waiting.items():
            if shunned is not endpoint:
                del self._waiting[waiter]
                if not waiter.done():
                    waiter.set_result(None)
                return

    def _wake_all(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    # -- how they are

    def answered(self, endpoint: Endpoint, began: float) -> None:
        """A call that `began` then has got a reply that is no passing failure."""
        endpoint.done += 1
        self._down_since = None
        if began < endpoint.turned:  # an old call says nothing of how it is now
            return
        endpoint.failures = 0
        if endpoint.on_trial:
            self._say(f"{endpoint.url} answers again")
            endpoint.relapses, endpoint.on_trial = 0, False
            self._wake_all()

    def failed(self, endpoint: Endpoint, why: str) -> None:
        """It has failed in passing, at its own fault: a cut connection, a time-out, a status 5xx."""
        endpoint.failures += 1
        enough = endpoint.on_trial or endpoint.failures >= self._most_failures
        if enough and any(one.up for one in self._endpoints if one is not endpoint):
            self.set_aside(endpoint, f"{endpoint.failures} failures in a row, the last: {why}")

    def pause(self, endpoint: Endpoint, seconds: float) -> None:
        endpoint.not_before = max(endpoint.not_before, time.monotonic() + seconds)

    def set_aside(self, endpoint: Endpoint, why: str) -> None:
        """Leave it alone until it is well again."""
        if endpoint.up:
            endpoint.up, endpoint.turned = False, time.monotonic()
            endpoint.relapses += 1
            if endpoint.relapses == 1:  # said once, and not each time that it fails its first call
                self._say(f"{endpoint.url} is down ({why}); its requests go to others until it answers again")
            task = asyncio.get_running_loop().create_task(self._probe_until_well(endpoint))
            self._probes.add(task)
            task.add_done_callback(self._probes.discard)

    async def _probe_until_well(self, endpoint: Endpoint) -> None:
        pause = min(PROBE_SECONDS * 2 ** min(endpoint.relapses - 1, 10), LONGEST_PROBE_SECONDS)
        while not endpoint.up:
            await asyncio.sleep(pause)
            endpoint.up = await self._probe(endpoint) is None
        endpoint.on_trial, endpoint.turned, endpoint.failures = True, time.monotonic(), 0
        self._wake_all()

    def close(self, why: NoEndpointError | RefusingError) -> None:
        """Give out no more slots: `take` raises `why`."""
        self._closed = why
        self._wake_all()

    def stop(self) -> None:
        """End the probes."""
        for probe in self._probes:
            probe.cancel()


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for a URL. Asked once: aiohttp's own way asks for each request.

    This machine is never asked through a proxy, which would look for the server at itself.
    """
    import urllib.request
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in ("localhost", "::1") or host.startswith("127.") or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(parts.scheme)
