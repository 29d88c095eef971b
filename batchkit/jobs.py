"""What a job remembers: the attempts at one shard, and where each stands.

`jobs/NNNNN.json` holds one `Job`; `runs` writes it, replaced whole and fsynced at each step.
"""

from __future__ import annotations

from typing import Literal

import msgspec

AttemptState = Literal[
    "intended", "uploaded", "creating", "running", "elsewhere", "doubtful", "collected", "died", "refused"
]  # fmt: skip
"""`intended`: on disk before anything is sent. `running`: handed to the backend. `collected`: over, what came back is
in `responses/`. `died`: over because the engine ended; what it had answered is in `responses/`.
`elsewhere`: a machine without credentials has a command for it, or may have.

Of batch services alone: `uploaded`: the provider has the file. `creating`: the batch is being created, and may have
been. `doubtful`: that was looked into in vain, the user decides. `refused`: over, and nothing of it was run."""

Ending = Literal["completed", "failed", "expired", "cancelled"]

OVER = frozenset({"collected", "died", "refused"})
"""States in which nothing more will come."""

TRIED = frozenset({"collected", "died"})
"""States after which the attempt's requests count as tried."""


class Remote(msgspec.Struct, kw_only=True):
    """What a batch service knows of an attempt, and what it takes to find that again.

    `base_url` and `key_env` (the name of the variable, never the key) say where it is, `url` is the endpoint of its
    requests. `tag` marks all that the attempt makes there. `creates` counts the create calls that were begun; `past`
    are batches of this attempt that ended before anything was run. `state` is the provider's own word, `since` the time
    of the last change of ours. `input_tokens` and `usd` are the estimates that `--max-enqueued-tokens` and `--max-cost`
    go by, None where unknown.
    `files` are the provider's result files, `deleted` says that all files are gone there. `host` is the name of a
    preset. `signed_until`: its file names URLs that hold until then. `trouble` says why a batch that has ended cannot
    be collected whole: it is looked at again in each submit, until it can be, or the user gives it up.
    """

    base_url: str
    key_env: str
    url: str
    tag: str = ""
    file_id: str | None = None
    batch_id: str | None = None
    creates: int = 0
    past: list[str] = []
    state: str | None = None
    since: str | None = None
    input_tokens: int | None = None
    usd: float | None = None
    files: list[str] = []
    deleted: bool = False
    host: str | None = None
    signed_until: str | None = None
    trouble: str | None = None


class Elsewhere(msgspec.Struct, kw_only=True):
    """An attempt that a machine makes which has nothing but two URLs. `input` and `output` are the files in the run
    that these are for; until `expires` they can be used. `version` is that of the output which was collected."""

    input: str
    output: str
    expires: str
    version: str | None = None


class Attempt(msgspec.Struct, kw_only=True):
    """One sending of some requests of a shard. `rows` are position ranges; rejected rows within them do not count.

    `session` names the folder `engine/<session>/` of the engine that took it, for runners that have one; `remote` is
    there for batch services, `elsewhere` for what `presign` gave out. `ending` is how the provider's batch ended.
    `reused_from` is the run whose answers these are: nothing was sent, and `backend` is who answered there.
    """

    number: int
    backend: str
    state: AttemptState
    rows: list[tuple[int, int]]
    started: str
    ended: str | None = None
    session: str | None = None
    message: str | None = None
    ending: Ending | None = None
    remote: Remote | None = None
    reused_from: str | None = None
    elsewhere: Elsewhere | None = None

    @property
    def in_flight(self) -> bool:
        """Whether others have its requests, or may have: sending them again would be paid for twice."""
        return (self.remote is not None or self.elsewhere is not None) and self.state not in OVER

    @property
    def at_provider(self) -> bool:
        """Whether these others are a batch service."""
        return self.remote is not None and self.in_flight


class Job(msgspec.Struct, kw_only=True):
    shard: int
    attempts: list[Attempt] = []
    requests_deleted: bool = False
