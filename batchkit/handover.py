"""How requests are handed over to a batch service: what the user wants, and how long things are waited for."""

from __future__ import annotations

import msgspec

from batchkit.responses import Verdict

MAX_ACTIVE = 100
"""Each shard under way holds a lease, which is an open file, and each batch is asked for once in a while."""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How long things are waited for, in seconds.

    `poll`: between two looks at a batch. `adopt`: a batch that may have been created is looked for so long, because
    lists lag. `settle`: result files come some time after a batch says that it is complete. `tokens`: the first wait
    for others to leave the queue of tokens; it doubles, up to fifteen times as long.
    """

    poll: float = 30.0
    adopt: float = 300.0
    settle: float = 600.0
    tokens: float = 60.0


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What some requests take: input tokens, and US dollars at most, at the price of batches. None: nobody knows."""

    input_tokens: int | None = None
    usd: float | None = None


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the user wants. `sends` False: nothing new is created, what is under way is cancelled and collected.

    `limit` bounds the requests that are sent now, `max_active` the batches under way, `max_enqueued_tokens` their
    estimated input tokens, `max_cost` the dollars that all attempts of the run may cost. `only` these positions are
    sent, where given. `key_env` names the variable of the key. `presign`: objects that are links go as signed URLs.
    """

    key_env: str
    wait: bool = True
    sends: bool = True
    limit: int | None = None
    attempts: int = 3
    retry: frozenset[Verdict] = frozenset()
    only: frozenset[int] | None = None
    max_active: int = MAX_ACTIVE
    max_enqueued_tokens: int | None = None
    max_cost: float | None = None
    delete_remote: bool = False
    presign: bool = False
    pace: Pace = Pace()
