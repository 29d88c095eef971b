"""What a `submit` reports, whoever answered."""

from __future__ import annotations

import msgspec


class SubmitReport(msgspec.Struct, kw_only=True):
    """What one `submit` did, and how the shards that it was for stand now, in requests.

    `sent` counts sendings (a request that is sent again after the engine died counts again), `responses` what came
    back, `passing` the failures among these that may pass when sent again. `remaining` have no response yet;
    `unanswered` have one that is no answer, or were rejected by `prepare`. `starts` and `deaths` are the engine's.
    Of `remaining`, `in_flight` are at a batch service, or on machines elsewhere (these are `elsewhere`, too).
    `doubtful` names attempts (shard.attempt) that the user has to decide on, because nobody knows whether they were
    created, and `troubled` those that cannot be collected whole, with the reason. `errors` counts the responses of live
    servers that are no answers.
    """

    sent: int = 0
    responses: int = 0
    passing: int = 0
    remaining: int = 0
    unanswered: int = 0
    starts: int = 0
    deaths: int = 0
    seconds: float = 0.0
    in_flight: int = 0
    elsewhere: int = 0
    doubtful: list[str] = []
    troubled: dict[str, str] = {}
    errors: int = 0

    @property
    def exit_code(self) -> int:
        """0 every row has an answer, 3 finished but some have none, 8 some are still to be sent."""
        if self.remaining:
            return 8
        return 3 if self.unanswered else 0
