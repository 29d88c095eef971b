"""Leases on a run in a bucket: which process, on whatever machine, works on which part. They expire.

Two kinds of objects in `leases/`. `processes/TOKEN.json` says that a process lives: it is put anew every
`RENEW_SECONDS`, one for all leases of the process. `NAME.json` says which process holds a lease. A lease whose process
has been silent for longer than it said it would be is taken over: first that process's own object is replaced, so that
it finds all it held lost, then the lease. Every step is a PUT on the condition that the object is still what was read,
and ages are differences between two times of the server's clock: no two clocks are compared.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import secrets
import socket
import threading
import time

import msgspec

from batchkit import s3
from batchkit.errors import BatchkitError, RunBusyError, StorageError
from batchkit.s3 import ChangedError, MissingError

VALID_SECONDS = 60.0
RENEW_SECONDS = 15.0


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a lease. `copy` is the working copy: its locks are the operating system's, too. `valid` is for how long
    the process may be silent; `ended_by` says who took its leases over."""

    token: str
    host: str
    pid: int
    copy: str
    since: str
    valid: float
    ended_by: str | None = None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Tenure:
    """All leases of this process on the run at `uri`."""

    def __init__(self, uri: str, copy: str) -> None:
        self._uri = uri
        self._held: dict[str, str] = {}
        self._copy = copy
        self._lock = threading.RLock()
        self._me: Tenant | None = None
        self._etag = ""
        self._renewed = 0.0
        self._careful = False
        self._lost: RunBusyError | None = None
        self._ended = threading.Event()

    def take(self, name: str, what: str) -> None:
        """Take the lease `name`, for people `what`. Raises `RunBusyError`, which says who holds it."""
        with self._lock:
            self.check()
            self._held[name] = self._claim(name, self._begin(), what)

    def release(self, name: str) -> None:
        """Give it back, unless it was lost; with the last one the process's own object goes, too."""
        with self._lock:
            held = self._held.pop(name, None)
            try:
                self.check()
                if held is not None:
                    s3.delete(self._lease(name))
            except BatchkitError:
                pass  # others have it, which the block has raised; or it cannot be reached, and expires
            if not self._held:
                self._end()

    def check(self) -> None:
        """Raise `RunBusyError` where the leases are lost: nothing more may be written. To be called before it is."""
        with self._lock:
            if self._lost is not None:
                raise self._lost
            if self._me is not None and _clock() - self._renewed > self._me.valid / 2:
                self._renew()

    # -- this process ------------------------------------------------------------------------------------------------

    def _begin(self) -> Tenant:
        if self._me is None:
            me = Tenant(
                token=secrets.token_hex(8),
                host=socket.gethostname(),
                pid=os.getpid(),
                copy=self._copy,
                since=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
                valid=VALID_SECONDS,
            )
            self._renewed = _clock()
            self._etag = s3.put(self._process(me.token), msgspec.json.encode(me), only_new=True)
            self._refuse_careless_server(self._process(me.token))
            self._me, self._ended = me, threading.Event()
            threading.Thread(target=self._keep, args=(self._ended,), name="batchkit-leases", daemon=True).start()
        return self._me

    def _refuse_careless_server(self, place: str) -> None:
        """Raise `StorageError` where PUTs are done whatever their conditions say: no lease would hold there."""
        if self._careful:
            return
        try:
            s3.put(place, b"", only_new=True)
        except ChangedError:
            self._careful = True
            return
        s3.delete(place)
        raise StorageError(
            f"{self._uri}: this server does not heed the conditions of a PUT (If-None-Match), so no two machines could "
            "be kept apart",
            hint="a newer version of it may; or work on a local run, and merge with -o s3://…",
        )

    def _keep(self, ended: threading.Event) -> None:
        """Say again and again that the process lives. A network that is away is no reason to stop: nobody may have
        missed us."""
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(BatchkitError), self._lock:
                if not ended.is_set():
                    self._renew()

    def _renew(self) -> None:
        if self._me is None or self._lost is not None:
            return
        began = _clock()
        try:
            self._etag = s3.put(self._process(self._me.token), msgspec.json.encode(self._me), only_over=self._etag)
            self._renewed = began
        except (ChangedError, MissingError) as exc:
            found, etag = self._read(self._process(self._me.token))
            if found == self._me:  # the server has done it, and its answer was lost
                self._etag, self._renewed = etag, began
                return
            by = found.ended_by if found is not None else None
            self._lost = RunBusyError(
                f"{self._uri}: this process was silent for more than {self._me.valid:.0f} s, and its part of the run "
                f"was taken over{' by ' + by if by else ''}",
                hint="nothing that was collected is lost; run the same command again when the other has ended",
            )
            raise self._lost from exc

    def _end(self) -> None:
        self._ended.set()
        me, self._me, lost, self._lost = self._me, None, self._lost, None
        if me is not None and lost is None:
            with contextlib.suppress(StorageError):  # it expires
                s3.delete(self._process(me.token))

    # -- leases ------------------------------------------------------------------------------------------------------

    def _claim(self, name: str, me: Tenant, what: str) -> str:
        body = msgspec.json.encode(me)
        for _ in range(3):
            try:
                return s3.put(self._lease(name), body, only_new=True)
            except ChangedError:
                holder, etag = self._read(self._lease(name))
            if holder is None:  # given back in between
                continue
            if holder.token == me.token:
                return etag
            if holder.copy != me.copy:  # else: it is dead, for we hold the lock of the operating system
                self._put_an_end_to(holder, me, what)
            with contextlib.suppress(ChangedError, MissingError):
                return s3.put(self._lease(name), body, only_over=etag)
        raise RunBusyError(f"{self._uri}: {what} is taken by others again and again", hint="try again later")

    def _put_an_end_to(self, holder: Tenant, me: Tenant, what: str) -> None:
        """Take all its leases from a process that is silent. Raises `RunBusyError` where it is not."""
        place = self._process(holder.token)
        try:
            body, found = s3.get(place)
        except MissingError:
            return
        if _tenant(body) != holder:  # it was ended already
            return
        age = found.age or 0.0
        busy = RunBusyError(
            f"{self._uri}: {what} is held by {holder}, last heard of {age:.0f} s ago",
            hint=f"wait for it to end, or stop it; where it has died, it is taken over after {holder.valid:.0f} s",
        )
        if age <= holder.valid:
            raise busy
        ended = msgspec.structs.replace(holder, ended_by=f"process {me.pid} on {me.host}")
        try:
            s3.put(place, msgspec.json.encode(ended), only_over=found.etag)
        except (ChangedError, MissingError):
            raise busy from None

    def _read(self, place: str) -> tuple[Tenant | None, str]:
        try:
            body, found = s3.get(place)
        except MissingError:
            return None, ""
        return _tenant(body), found.etag

    def _lease(self, name: str) -> str:
        return f"{self._uri}/leases/{name}.json"

    def _process(self, token: str) -> str:
        return f"{self._uri}/leases/processes/{token}.json"


def _tenant(body: bytes) -> Tenant | None:
    try:
        return msgspec.json.decode(body, type=Tenant)
    except msgspec.DecodeError:
        return None


def _clock() -> float:
    """Seconds that go on while the machine sleeps, where the system counts these."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
