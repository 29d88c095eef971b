"""What sending requests costs: by the estimates of `prepare`, or measured now for a run that was prepared without."""

from __future__ import annotations

from collections.abc import Sequence

from batchkit import outcomes
from batchkit.counts import Counts
from batchkit.due import to_send
from batchkit.errors import UsageError
from batchkit.handover import Cost, Settings
from batchkit.manifests import Seal, as_ranges
from batchkit.measures import Totals, request_tokens
from batchkit.pricing import Prices
from batchkit.runs import Run
from batchkit.shardfiles import request_lines


class Costs:
    """Estimates for the shards of one run. `prices` is the provider's id in genai-prices."""

    def __init__(self, run: Run, prices: str | None) -> None:
        self._run = run
        self._prices = Prices(prices, run.manifest.model, batch=True)
        self._measured: dict[int, Totals] = {}

    def __call__(self, seal: Seal, positions: Sequence[int]) -> Cost:
        """Of the shard's requests at these positions. Of a part of the shard the requests themselves are measured: they
        need not be alike."""
        totals = self._totals(seal) if len(positions) == seal.requests else self._measure(seal, positions)
        return self.of(totals)

    def of(self, totals: Totals) -> Cost:
        """Of requests that take so much together."""
        if totals.input is None:
            return Cost()
        usd = None
        if totals.output is not None:
            usd = self._prices.total(totals.requests, totals.input, totals.output)
        return Cost(input_tokens=totals.input, usd=float(usd) if usd is not None else None)

    def _measure(self, seal: Seal, positions: Sequence[int]) -> Totals:
        totals = Totals()
        for line in request_lines(self._run, seal, as_ranges(positions)):
            totals.add(request_tokens(line, self._run.manifest.model))
        return totals

    def _totals(self, seal: Seal) -> Totals:
        if seal.tokens is not None:
            return seal.tokens
        if seal.shard not in self._measured:
            self._measured[seal.shard] = self._measure(seal, range(seal.start, seal.end))
        return self._measured[seal.shard]

    def why_unknown(self, seal: Seal) -> str:
        """Why there is no price of a shard's requests."""
        totals = self._totals(seal)
        if not self._prices.known:
            return f"the price of {self._run.manifest.model} is not known"
        if totals.input is None:
            if self._run.manifest.has_links:
                return "the requests name their images, whose tokens nobody knows before they are read"
            return f"the tokens of images are not known for {self._run.manifest.model}"
        return "the requests have no --max-tokens: nobody knows the most that they cost"


def spent_on(run: Run) -> float:
    """US dollars that the run's attempts at batch services so far cost at most, by their estimates."""
    return sum(
        attempt.remote.usd or 0.0
        for seal in run.seals()
        for attempt in run.job(seal.shard).attempts
        if attempt.remote is not None and attempt.state != "refused"
    )


def refuse_too_dear(run: Run, seals: Sequence[Seal], costs: Costs, settings: Settings) -> None:
    """Raise `UsageError` where what is to be sent may cost more than `max_cost`, with what the run has cost before."""
    if settings.max_cost is None:
        return
    total, left, fits = spent_on(run), settings.limit, 0
    counts = Counts(run)
    for seal in seals:
        if counts.is_done(seal, attempts=settings.attempts, retry=settings.retry, only=settings.only):
            continue
        due = _due(run, seal, settings)[:left]
        if not due:
            continue
        cost = costs(seal, due).usd
        if cost is None:
            raise UsageError(
                f"--max-cost {settings.max_cost:g} cannot be kept: {costs.why_unknown(seal)}",
                hint="leave --max-cost out, or prepare with what is missing",
            )
        room = max(0.0, settings.max_cost - total)
        fits += min(len(due), int(len(due) * room / cost)) if cost else len(due)
        total += cost
        left = None if left is None else left - len(due)
    if total > settings.max_cost:
        raise UsageError(
            f"this may cost up to {total:,.2f} USD, more than --max-cost {settings.max_cost:g}; nothing was sent",
            hint=f"--limit {fits} fits" if fits else "raise --max-cost, or lower --max-tokens in a new run",
        )


def _due(run: Run, seal: Seal, settings: Settings) -> list[int]:
    found = outcomes.load(run, seal)
    return to_send(found, attempts=settings.attempts, retry=settings.retry, only=settings.only)
