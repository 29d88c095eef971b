"""What requests cost: the prices of a model, and the plan that `prepare --plan` shows.

Unknown is None and says why; it is never zero. Prices come from genai-prices, out of the data in its package: nothing
here touches the network.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from decimal import ROUND_UP, Decimal
from functools import lru_cache
from typing import NamedTuple

import msgspec

from batchkit.limits import HOSTS, OWN
from batchkit.measures import Totals

_PROVIDER_PREFIXES = ("models/", "openai/", "google/", "azure/")


def provider_of(backend: str, host: str = "openai") -> str | None:
    """The id in genai-prices of who bills, or None where nobody does or genai-prices does not know them."""
    if backend == "openai":
        return HOSTS[host].prices
    return "google" if backend == "gemini" else None


class _Rates(NamedTuple):
    """US dollars a token; `cached` is input that the provider found in its cache."""

    input: Decimal
    cached: Decimal
    output: Decimal


@dataclass(frozen=True)
class _Tariff:
    """`rates[i]` hold for requests with more input tokens than `starts[i - 1]`, and not more than `starts[i]`."""

    starts: tuple[int, ...]
    rates: tuple[_Rates, ...]

    def at(self, input_tokens: int) -> _Rates:
        return self.rates[bisect_left(self.starts, input_tokens)]


@lru_cache(maxsize=64)
def _tariff(provider: str, model: str, *, batch: bool) -> _Tariff | None:
    """Asks genai-prices once for each tier, since it takes 70 µs a request and prices are linear in between."""
    from genai_prices import Usage, calc_price
    from genai_prices.types import PriceCalculation, TieredPrices

    def asked(input_tokens: int, cached: int, output: int) -> PriceCalculation:
        usage = Usage(input_tokens=input_tokens, cache_read_tokens=cached, output_tokens=output)
        context = {"processing": "batch"} if batch else None
        return calc_price(usage, model_ref=model, provider_id=provider, price_context=context)

    def rates(count: int) -> _Rates:
        plain = asked(count, 0, 0).total_price
        return _Rates(
            plain / count,
            asked(count, count, 0).total_price / count,
            (asked(count, 0, 1_000_000).total_price - plain) / 1_000_000,
        )

    try:
        prices = vars(asked(1, 0, 0).model_price).values()
    except LookupError:
        return None
    starts = sorted({tier.start for price in prices if isinstance(price, TieredPrices) for tier in price.tiers})
    found = _Tariff(tuple(starts), tuple(rates(start + 1) for start in (0, *starts)))
    # A zero stands for models that are billed by other units (seconds, pictures), or not at all.
    return found if found.rates[0].input or found.rates[0].output else None


class Prices:
    """Prices of one model at one provider; `provider` is an id of genai-prices, None for nobody.

    `known` says whether there is a price at all, `batch_known` whether there is one of its own for batches. Where there
    is none, batches are priced as live requests are: an upper bound, for none of them asks more for a batch.
    """

    def __init__(self, provider: str | None, model: str, *, batch: bool) -> None:
        live = _first(provider, model, batch=False)
        reduced = _first(provider, model, batch=True)
        self.known = live is not None
        self.batch_known = reduced != live  # genai-prices takes the live price, silently, where it knows no other
        self.batch = batch
        self._tariff = reduced if batch else live

    def tier(self, input_tokens: int) -> int:
        """Which of the model's rates hold for a request: they may depend on its input. 0 where there is no price."""
        return bisect_left(self._tariff.starts, input_tokens) if self._tariff is not None else 0

    def of_tier(self, tier: int, input_tokens: int, output_tokens: int, cached_tokens: int) -> Decimal:
        """US dollars of requests of one tier that have so many tokens together. Raises `ValueError` without a price."""
        if self._tariff is None:
            raise ValueError("there is no price")
        rates = self._tariff.rates[tier]
        return (
            rates.input * (input_tokens - cached_tokens) + rates.cached * cached_tokens + rates.output * output_tokens
        )

    def price(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> Decimal | None:
        """US dollars of ONE request: the rates may depend on its input. `cached_tokens` are part of the input."""
        if self._tariff is None:
            return None
        cached = min(cached_tokens, input_tokens)  # a host may count oddly; no request costs less than nothing
        return self.of_tier(self.tier(input_tokens), input_tokens, output_tokens, cached)

    def total(self, requests: int, input_tokens: int, output_tokens: int) -> Decimal | None:
        """US dollars of so many requests that have so many tokens together, taken as if all were alike."""
        if self._tariff is None:
            return None
        rates = self._tariff.at(-(-input_tokens // max(1, requests)))
        return rates.input * input_tokens + rates.output * output_tokens


def _first(provider: str | None, model: str, *, batch: bool) -> _Tariff | None:
    """The tariff under the model's name, or under that without `models/`, `openai/` …"""
    if provider is None:
        return None
    found = _tariff(provider, model, batch=batch)
    for prefix in _PROVIDER_PREFIXES:
        if found is None and model.startswith(prefix):
            found = _tariff(provider, model.removeprefix(prefix), batch=batch)
    return found


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a run will take and cost. `notes` say in plain English why something is None, or an upper bound.

    `output_tokens` are the most that the requests allow. The dollars are of input and the most output, so None where
    either is not known; `input_…_usd` are of the input alone. They are rounded up to a millionth. Where
    `batch_price_known` is False, the price as a batch is the live one: an upper bound.
    """

    requests: int
    shards: int
    text_tokens: int
    images: int
    input_tokens: int | None
    output_tokens: int | None
    live_usd: float | None
    batch_usd: float | None
    input_live_usd: float | None
    input_batch_usd: float | None
    batch_price_known: bool
    notes: tuple[str, ...] = ()


def estimate(totals: Totals, *, backend: str, model: str, shards: int, host: str = "openai") -> Estimate:
    """`backend` and `host` as in `limits`; the price of the average request stands for all."""
    provider = provider_of(backend, host)
    live, batch = (Prices(provider, model, batch=as_batch) for as_batch in (False, True))
    taken = totals.input
    notes = [_why_no_price(backend, host, model)] if not live.known else []
    if live.known and not live.batch_known:
        notes.append(f"batch price unknown: genai-prices has none for {model}, so the live price is the upper bound")
    if totals.image is None:
        notes.append(f"input tokens unknown: some media are links or not images, or no rule is published for {model}")
    if totals.output is None:
        notes.append("output tokens unknown: no --max-tokens")
    return Estimate(
        requests=totals.requests,
        shards=shards,
        text_tokens=totals.text,
        images=totals.images,
        input_tokens=taken,
        output_tokens=totals.output,
        live_usd=_usd(live, totals.requests, taken, totals.output),
        batch_usd=_usd(batch, totals.requests, taken, totals.output),
        input_live_usd=_usd(live, totals.requests, taken, 0),
        input_batch_usd=_usd(batch, totals.requests, taken, 0),
        batch_price_known=live.batch_known,
        notes=tuple(notes),
    )


def _why_no_price(backend: str, host: str, model: str) -> str:
    if backend in OWN:
        return f"price unknown: nobody that batchkit knows bills --backend {backend} by the token"
    if provider_of(backend, host) is None:
        return f"price unknown: genai-prices does not know {host}"
    return f"price unknown: genai-prices does not know model {model}"


def _usd(prices: Prices, requests: int, input_tokens: int | None, output_tokens: int | None) -> float | None:
    if input_tokens is None or output_tokens is None:
        return None
    total = prices.total(requests, input_tokens, output_tokens)
    return float(total.quantize(Decimal("0.000001"), ROUND_UP)) if total is not None else None


def describe(plan: Estimate) -> str:
    """The plan for people: a line for each figure, then the notes; no line feed at the end."""
    images = _count(plan.images, "image")
    if plan.input_tokens is None:
        taken = f"unknown (text about {plan.text_tokens:,}; {images})"
    else:
        taken = f"about {plan.input_tokens:,} (text {plan.text_tokens:,}; {images} "
        taken += f"{plan.input_tokens - plan.text_tokens:,})"
    figures = {
        "requests": f"{plan.requests:,} in {_count(plan.shards, 'shard')}",
        "input tokens": taken,
        "output tokens": f"at most {plan.output_tokens:,}" if plan.output_tokens is not None else "unknown",
        "price, live": _shown(plan.live_usd, plan.input_live_usd),
        "price, batch": _shown(plan.batch_usd, plan.input_batch_usd),
    }
    lines = [f"{name:<14} {figure}" for name, figure in figures.items()]
    return "\n".join(lines + [f"note: {note}" for note in plan.notes])


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _shown(usd: float | None, input_usd: float | None) -> str:
    if usd is not None:
        return f"up to about {dollars(usd)}"
    if input_usd is not None:
        return f"price unknown (the input alone: about {dollars(input_usd)})"
    return "price unknown"


def dollars(usd: float) -> str:
    """Small sums keep more digits: they were rounded up to a millionth, so none is shown as nothing."""
    digits = 2 if usd >= 1 else 4 if usd >= 0.01 else 6
    return f"${usd:,.{digits}f}"
