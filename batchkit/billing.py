"""What the responses of a run have cost, by the tokens that the provider counted for each."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any

import msgspec

from batchkit.limits import OWN
from batchkit.pricing import Prices, provider_of


class Spent(msgspec.Struct, kw_only=True):
    """US dollars of all responses that providers counted tokens for, superseded ones too.

    `usd` is at the price of batches, `live_usd` what the same had cost live; None where nothing has a price.
    `unpriced` responses have tokens and no known price: they are in neither. `batch_price_known` False: there is no
    separate price for batches, and `usd` is the live one, an upper bound.
    """

    usd: float | None = None
    live_usd: float | None = None
    unpriced: int = 0
    batch_price_known: bool = True


class Charges:
    """What providers have counted, before it has a price: how many responses there were with the same tokens."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, tuple[int, int, int]]] = Counter()

    def add(self, usage: dict[str, Any] | None, model: str | None, backend: str | None, count: int = 1) -> None:
        """So many responses of this usage and model; those of our own machines, and without a usage, cost nothing."""
        if backend is not None and backend not in OWN and usage:
            self.counts[backend, model or "", _tokens(usage)] += count


class Billing:
    """Adds up. `host` and `model` are the manifest's; a response may name a model more exactly."""

    def __init__(self, *, host: str, model: str | None) -> None:
        self._host = host
        self._model = model
        self._prices: dict[tuple[str, str], tuple[Prices, Prices]] = {}
        self._batch = self._live = Decimal(0)
        self._priced = 0
        self._spent = Spent()

    def turn_to(self, *, host: str, model: str | None) -> None:
        """The responses to come are of a run of this host and model."""
        if (host, model) != (self._host, self._model):
            self._host, self._model = host, model
            self._prices = {}

    def take(self, charges: Charges) -> None:
        """Price what was counted, and forget it there. Within a tier prices are linear: tokens are added up first."""
        sums: dict[tuple[Prices, int], list[int]] = {}
        for (backend, model, tokens), count in charges.counts.items():
            live, batch = self._of(backend, model)
            if not live.known:
                self._spent.unpriced += count
                continue
            self._priced += count
            self._spent.batch_price_known = self._spent.batch_price_known and live.batch_known
            for prices in (live, batch):
                known = sums.setdefault((prices, prices.tier(tokens[0])), [0, 0, 0])
                for place, number in enumerate(tokens):
                    known[place] += number * count
        for (prices, tier), tokens_of_tier in sums.items():
            usd = prices.of_tier(tier, *tokens_of_tier)
            if prices.batch:
                self._batch += usd
            else:
                self._live += usd
        charges.counts.clear()

    def spent(self) -> Spent:
        if self._priced:
            self._spent.usd, self._spent.live_usd = round(float(self._batch), 6), round(float(self._live), 6)
        return self._spent

    def _of(self, backend: str, model: str) -> tuple[Prices, Prices]:
        if (backend, model) not in self._prices:
            provider = provider_of(backend, self._host)
            for name in (model, self._model or ""):  # a snapshot that is not known is priced as its model
                found = (Prices(provider, name, batch=False), Prices(provider, name, batch=True))
                if found[0].known:
                    break
            self._prices[backend, model] = found
        return self._prices[backend, model]


def _tokens(usage: dict[str, Any]) -> tuple[int, int, int]:
    """Input, output and cached tokens, under the names of chat completions or of responses."""
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    taken = usage.get("prompt_tokens") or usage.get("input_tokens")
    given = usage.get("completion_tokens") or usage.get("output_tokens")
    taken, given, cached = (count if isinstance(count, int) and count > 0 else 0 for count in (taken, given, cached))
    return taken, given, min(cached, taken)  # a host may count oddly; no request costs less than nothing
