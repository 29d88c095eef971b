"""What the responses of a run have cost, request by request, by the tokens that the provider counted."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec

from batchkit.limits import OWN
from batchkit.pricing import Prices, provider_of
from batchkit.responses import Response


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


class Billing:
    """Adds up. `host` and `model` are the manifest's; a response may name a model more exactly."""

    def __init__(self, *, host: str, model: str | None) -> None:
        self.turn_to(host=host, model=model)
        self._batch = self._live = Decimal(0)
        self._priced = 0
        self._spent = Spent()

    def turn_to(self, *, host: str, model: str | None) -> None:
        """The responses to come are of a run of this host and model."""
        self._host = host
        self._model = model
        self._prices: dict[tuple[str, str], tuple[Prices, Prices]] = {}

    def add(self, response: Response, backend: str | None) -> None:
        if backend is None or backend in OWN or not response.usage:
            return
        tokens = _tokens(response.usage)
        live, batch = self._of(backend, response.model or "")
        usd, live_usd = batch.price(*tokens), live.price(*tokens)
        if usd is None or live_usd is None:
            self._spent.unpriced += 1
            return
        self._priced += 1
        self._batch += usd
        self._live += live_usd
        self._spent.batch_price_known = self._spent.batch_price_known and live.batch_known

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
    return tuple(count if isinstance(count, int) and count > 0 else 0 for count in (taken, given, cached))  # type: ignore[return-value]
