"""Prices, the tokens of request lines, and the plan."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from genai_prices import Usage, calc_price
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from batchkit.images import Picture
from batchkit.measures import RequestTokens, Totals, request_tokens, text_tokens
from batchkit.pricing import Estimate, Prices, describe, estimate, provider_of
from batchkit.requests import RequestMaker

COUNTS = st.integers(0, 1_100_000)


def picture(size: tuple[int, int] = (1024, 1024), kind: str = "PNG", **save: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, kind, **save)
    return out.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def chat(*parts: dict[str, Any] | str, **keys: Any) -> bytes:
    content: Any = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": content}], **keys}
    return json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()


def image_part(url: str, **keys: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **keys}}


# Prices


def test_a_batch_costs_half_of_live_for_gpt_4o() -> None:
    live = Prices("openai", "gpt-4o", batch=False)
    batch = Prices("openai", "gpt-4o", batch=True)
    assert live.price(1_000_000, 1_000_000) == Decimal("12.50")  # $2.50 and $10: openai.com/api/pricing
    assert batch.price(1_000_000, 1_000_000) == Decimal("6.25")
    assert live.known
    assert live.batch_known
    assert batch.batch_known


def test_long_requests_have_another_rate_and_are_not_priced_as_a_sum() -> None:
    # ai.google.dev/gemini-api/docs/pricing: $1.25 and $10 a million up to 200,000 tokens of input, then $2.50 and $15.
    prices = Prices("google", "gemini-2.5-pro", batch=False)
    assert prices.price(200_000, 1_000) == Decimal("0.26")
    assert prices.price(200_001, 1_000) == Decimal("0.5150025")
    assert prices.total(10, 1_000_000, 10_000) == Decimal("1.35")  # ten of 100,000, not one of a million
    assert prices.total(1, 1_000_000, 10_000) == Decimal("2.65")
    assert Prices("google", "gemini-2.5-pro", batch=True).price(200_001, 1_000) == Decimal("0.25750125")


@pytest.mark.parametrize(
    ("provider", "model"),
    [(None, "gpt-4o"), ("openai", "no-such-model"), ("no-such-provider", "gpt-4o"), ("azure", "my-deployment")],
)
def test_an_unknown_price_is_none_and_not_zero(provider: str | None, model: str) -> None:
    prices = Prices(provider, model, batch=True)
    assert prices.price(1000, 1000) is None
    assert prices.total(1, 1000, 1000) is None
    assert not prices.known
    assert not prices.batch_known


def test_a_model_billed_by_the_second_has_no_price_by_the_token() -> None:
    assert (
        calc_price(Usage(input_tokens=9, output_tokens=9), model_ref="whisper-1", provider_id="openai").total_price == 0
    )
    assert Prices("openai", "whisper-1", batch=False).price(9, 9) is None


def test_more_cached_than_sent_is_all_cached() -> None:
    prices = Prices("openai", "gpt-4o", batch=False)
    assert prices.price(1000, 0, 5000) == prices.price(1000, 0, 1000) == Decimal("0.00125")


def test_without_a_batch_price_the_live_one_is_the_upper_bound() -> None:
    batch = Prices("azure", "gpt-4o", batch=True)
    assert batch.known
    assert not batch.batch_known
    assert batch.price(1000, 10) == Prices("azure", "gpt-4o", batch=False).price(1000, 10)


@pytest.mark.parametrize(
    ("provider", "model", "plain"),
    [
        ("google", "models/gemini-2.5-flash", "gemini-2.5-flash"),
        ("openai", "openai/gpt-4o", "gpt-4o"),
        ("groq", "openai/gpt-oss-120b", "openai/gpt-oss-120b"),
    ],
)
def test_a_prefix_does_not_hide_a_model(provider: str, model: str, plain: str) -> None:
    price = Prices(provider, model, batch=True).price(1000, 10)
    assert price is not None
    assert price == Prices(provider, plain, batch=True).price(1000, 10)


@given(
    st.sampled_from(
        [
            ("openai", "gpt-4o"),
            ("openai", "gpt-5.4"),
            ("openai", "gpt-5-mini"),
            ("google", "gemini-2.5-pro"),
            ("google", "gemini-2.5-flash"),
            ("google", "gemini-3-flash-preview"),
            ("azure", "gpt-4o"),
            ("groq", "openai/gpt-oss-120b"),
            ("together", "meta-llama/Llama-4-Scout-17B-16E-Instruct"),
        ]
    ),
    st.one_of(COUNTS, st.sampled_from([0, 1, 200_000, 200_001, 272_000, 272_001])),
    COUNTS,
    st.integers(0, 4),
    st.booleans(),
)
def test_prices_are_those_of_genai_prices(
    model: tuple[str, str], taken: int, given_back: int, quarter: int, batch: bool
) -> None:
    cached = taken * quarter // 4
    usage = Usage(input_tokens=taken, output_tokens=given_back, cache_read_tokens=cached)
    context = {"processing": "batch"} if batch else None
    asked = calc_price(usage, model_ref=model[1], provider_id=model[0], price_context=context).total_price
    assert Prices(*model, batch=batch).price(taken, given_back, cached) == asked


def test_prices_touch_no_network_and_load_late() -> None:
    code = (
        "import socket, sys, threading\n"
        "def no(*_, **__): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = no\n"
        "from batchkit.pricing import Prices\n"
        "assert not {'genai_prices', 'pydantic', 'PIL'} & set(sys.modules)\n"
        "print(Prices('openai', 'gpt-4o', batch=True).price(1, 0), threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr) == (["0.00000125", "1"], "")


@pytest.mark.parametrize(
    ("backend", "host", "provider"),
    [
        ("openai", "openai", "openai"),
        ("openai", "azure", "azure"),
        ("openai", "groq", "groq"),
        ("openai", "together", "together"),
        ("openai", "dashscope", None),
        ("gemini", "openai", "google"),
        ("vllm", "openai", None),
        ("server", "openai", None),
    ],
)
def test_who_bills(backend: str, host: str, provider: str | None) -> None:
    assert provider_of(backend, host) == provider


# Tokens of a line


@pytest.mark.parametrize(("count", "tokens"), [(0, 0), (1, 1), (4, 1), (5, 2), (4000, 1000)])
def test_text_is_a_quarter_of_its_bytes(count: int, tokens: int) -> None:
    assert text_tokens(count) == tokens


def test_a_line_of_ours_is_measured() -> None:
    maker = RequestMaker(
        model="gpt-4o", system="Be brief.", parameters={"max_completion_tokens": 50}, extra={}, detail="low"
    )
    data = picture()
    line = maker.line("a", [*[Picture("image/png", data, 1024 * 1024)] * 2, "What is it? 漢字"])
    text = text_tokens(len(b"Be brief.") + len("What is it? 漢字".encode()))
    assert request_tokens(line, "gpt-4o") == RequestTokens(text, 2 * 85, 2, 50)


@pytest.mark.parametrize(
    ("kind", "save"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "exif": b"Exif\x00\x00" + b"x" * 60_000}),
        ("JPEG", {"icc_profile": b"p" * 1_500_000}),
        ("WEBP", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
    ],
)
def test_sizes_are_read_off_the_header_of_any_length(kind: str, save: dict[str, Any]) -> None:
    url = data_url(picture((1024, 2048), kind, **save), "image/whatever")
    assert request_tokens(chat(image_part(url)), "gpt-4o").image == 85 + 170 * 6


def test_a_png_with_much_before_its_pixels() -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("comment", "c" * 200_000)
    assert request_tokens(chat(image_part(data_url(picture(pnginfo=notes)))), "gpt-4o").image == 765


def test_only_the_header_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def counted(text: str) -> bytes:
        decoded.append(len(text))
        return base64.b64decode(text)

    monkeypatch.setattr("pybase64.b64decode", counted)
    line = chat(image_part(data_url(picture((1024, 1024), "JPEG") + bytes(5_000_000))))
    assert request_tokens(line, "gpt-4o").image == 765
    assert decoded == [4096]


@pytest.mark.parametrize(
    "part",
    [
        image_part("https://example.org/a.png"),
        image_part("data:image/png;base64,AAAA"),
        image_part("data:image/png,plain"),
        image_part(""),
        {"type": "image_url", "image_url": None},
        {"type": "input_image", "file_id": "file-1"},
    ],
)
def test_images_that_cannot_be_seen_are_unknown_and_counted(part: dict[str, Any]) -> None:
    line = chat(image_part(data_url(picture())), part, "What?")
    assert request_tokens(line, "gpt-4o") == RequestTokens(2, None, 2, None)


def test_a_model_without_a_rule_makes_images_unknown_but_text_alone_is_known() -> None:
    assert request_tokens(chat(image_part(data_url(picture()))), "my-model").image is None
    assert request_tokens(chat("What?"), "my-model").image == 0


def test_audio_and_files_are_unknown_and_no_text() -> None:
    line = chat({"type": "input_audio", "input_audio": {"data": "A" * 10_000, "format": "wav"}}, "What?")
    assert request_tokens(line, "gpt-4o") == RequestTokens(2, None, 0, None)


def test_requests_to_the_responses_endpoint_are_measured() -> None:
    body = {
        "model": "gpt-4o",
        "instructions": "Be kind",
        "input": [
            {"role": "user", "content": [{"type": "input_image", "image_url": data_url(picture()), "detail": "low"}]},
            {"role": "user", "content": "Hello"},
        ],
        "max_output_tokens": 9,
    }
    line = json.dumps({"custom_id": "a", "url": "/v1/responses", "body": body}).encode()
    assert request_tokens(line, "gpt-4o") == RequestTokens(3, 85, 1, 9)


def test_embeddings_have_no_output() -> None:
    line = json.dumps({"url": "/v1/embeddings", "body": {"model": "e", "input": ["abcd", "efgh"]}}).encode()
    assert request_tokens(line, "e") == RequestTokens(2, 0, 0, 0)


@pytest.mark.parametrize(
    ("keys", "most"),
    [
        ({}, None),
        ({"max_tokens": 10}, 10),
        ({"max_completion_tokens": 10}, 10),
        ({"max_completion_tokens": 10, "n": 3}, 30),
        ({"max_tokens": None}, None),
        ({"max_tokens": "many"}, None),
    ],
)
def test_the_longest_output(keys: dict[str, Any], most: int | None) -> None:
    assert request_tokens(chat("What?", **keys), "gpt-4o").max_output == most


def test_schemas_and_tools_are_input() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    plain, with_schema = (
        request_tokens(chat("What?", **keys), "gpt-4o").text for keys in ({}, {"response_format": schema})
    )
    assert with_schema - plain == pytest.approx(len(json.dumps(schema)) / 4, abs=4)


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b'{"body":3}', b'{"body":{}', b"\xff"])
def test_a_line_that_is_no_request_is_refused(line: bytes) -> None:
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
        request_tokens(line, "gpt-4o")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.text(max_size=9)
    | st.just("data:image/png;base64,iVBORw0KGgo="),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "image_url", "url", "text", "content", "detail"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@example({"messages": {"type": []}})
@given(st.dictionaries(st.sampled_from(["messages", "input", "max_tokens", "n", "tools"]), JSON))
def test_any_body_is_measured(body: dict[str, Any]) -> None:
    tokens = request_tokens(json.dumps({"body": body}).encode(), "gpt-4o")
    assert tokens.text >= 0
    assert tokens.images >= 0
    assert tokens.image is None or tokens.image >= 0
    assert tokens.max_output is None or tokens.max_output > 0


# The plan


def totals(*tokens: RequestTokens) -> Totals:
    found = Totals()
    for each in tokens:
        found.add(each)
    return found


THREE = [RequestTokens(100, 765, 1, 50)] * 3


def test_the_plan_adds_up_and_is_priced() -> None:
    plan = estimate(totals(*THREE), backend="openai", model="gpt-4o", shards=2)
    assert plan == Estimate(
        requests=3,
        shards=2,
        text_tokens=300,
        images=3,
        input_tokens=2595,
        output_tokens=150,
        live_usd=0.007988,  # 2,595 × $2.50 / 1e6 + 150 × $10 / 1e6 = 0.0079875, rounded up
        batch_usd=0.003994,
        input_live_usd=0.006488,
        input_batch_usd=0.003244,
        batch_price_known=True,
    )
    assert describe(plan).splitlines() == [
        "requests       3 in 2 shards",
        "input tokens   about 2,595 (text 300; 3 images 2,295)",
        "output tokens  at most 150",
        "price, live    up to about $0.007988",
        "price, batch   up to about $0.003994",
    ]


def test_large_sums_are_shown_in_cents() -> None:
    text = describe(estimate(Totals(1000, 10**9, 0, 0, 10**8), backend="openai", model="gpt-4o", shards=1))
    assert "price, live    up to about $3,500.00" in text
    assert "price, batch   up to about $1,750.00" in text


def test_the_plan_prices_the_average_request_not_the_sum() -> None:
    many = Totals(100, 10_000_000, 0, 0, 0)
    assert estimate(many, backend="gemini", model="gemini-2.5-pro", shards=1).live_usd == 12.5
    one = Totals(1, 10_000_000, 0, 0, 0)
    assert estimate(one, backend="gemini", model="gemini-2.5-pro", shards=1).live_usd == 25


@pytest.mark.parametrize(
    ("backend", "host", "model", "why"),
    [
        ("vllm", "openai", "Qwen/Qwen2.5-VL-7B", "nobody that batchkit knows bills --backend vllm by the token"),
        ("server", "openai", "gpt-4o", "nobody that batchkit knows bills --backend server by the token"),
        ("openai", "dashscope", "qwen-vl-max", "genai-prices does not know dashscope"),
        ("openai", "openai", "no-such-model", "genai-prices does not know model no-such-model"),
    ],
)
def test_a_plan_without_a_price_says_why(backend: str, host: str, model: str, why: str) -> None:
    plan = estimate(totals(*THREE), backend=backend, host=host, model=model, shards=1)
    assert (plan.live_usd, plan.batch_usd, plan.input_live_usd, plan.batch_price_known) == (None, None, None, False)
    assert plan.notes == (f"price unknown: {why}",)
    assert "price, live    price unknown\nprice, batch   price unknown\n" in describe(plan)
    assert "$" not in describe(plan)


def test_a_plan_says_that_its_batch_price_is_an_upper_bound() -> None:
    plan = estimate(totals(*THREE), backend="openai", host="azure", model="gpt-4o", shards=1)
    assert plan.batch_usd == plan.live_usd
    assert not plan.batch_price_known
    assert plan.notes == (
        "batch price unknown: genai-prices has none for gpt-4o, so the live price is the upper bound",
    )


def test_without_max_tokens_only_the_input_is_priced() -> None:
    plan = estimate(totals(*THREE, RequestTokens(1, 0, 0, None)), backend="openai", model="gpt-4o", shards=1)
    assert (plan.output_tokens, plan.live_usd, plan.batch_usd) == (None, None, None)
    assert plan.notes == ("output tokens unknown: no --max-tokens",)
    assert "price, live    price unknown (the input alone: about $0.006490)" in describe(plan)


def test_one_unknown_image_makes_the_input_unknown() -> None:
    plan = estimate(totals(*THREE, RequestTokens(1, None, 1, 50)), backend="openai", model="gpt-4o", shards=1)
    assert (plan.input_tokens, plan.text_tokens, plan.images, plan.live_usd) == (None, 301, 4, None)
    assert "input tokens   unknown (text about 301; 4 images)" in describe(plan)
    assert plan.notes[0].startswith("input tokens unknown: ")


def test_a_plan_of_nothing_costs_nothing() -> None:
    plan = estimate(Totals(), backend="openai", model="gpt-4o", shards=0)
    assert (plan.input_tokens, plan.output_tokens, plan.live_usd) == (0, 0, 0)


def test_a_plan_is_json() -> None:
    plan = estimate(totals(*THREE), backend="openai", model="gpt-4o", shards=2)
    assert json.loads(msgspec.json.encode(plan))["live_usd"] == 0.007988
