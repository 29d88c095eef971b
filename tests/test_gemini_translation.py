"""Requests to Gemini's dialect and its results back.

Two independent readers check it: google-genai's types say which names exist, and any-llm-sdk's converter says what a
chat request means to Gemini. The lines that `responses.parse` knows in Gemini's own shape are the oracle of results.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from any_llm.exceptions import UnsupportedParameterError
from any_llm.providers.gemini.base import GoogleProvider
from any_llm.providers.gemini.utils import _convert_response_to_response_dict
from any_llm.types.completion import CompletionParams
from google.genai import types
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion

from batchkit import gemini_requests, gemini_responses
from batchkit.errors import RowError
from batchkit.responses import Response, UnreadableLine, Verdict, parse
from tests.shapes import SHAPES, Shape

FLASH = "gemini-2.5-flash"
PNG = "iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"colour": {"type": ["string", "null"]}}, "additionalProperties": False}
GEMINI_SHAPES = [shape for shape in SHAPES if shape.name.startswith("gemini_") and '"key":' in shape.line]


def line(body: Any, **fields: Any) -> bytes:
    whole = {"custom_id": "row-7", "method": "POST", "url": "/v1/chat/completions", "body": body, **fields}
    return json.dumps(whole).encode()


def user(content: Any, **body: Any) -> dict[str, Any]:
    return {"model": FLASH, "messages": [{"role": "user", "content": content}], **body}


def picture(url: str = f"data:image/png;base64,{PNG}", **image: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **image}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def translated(body: Any) -> dict[str, Any]:
    done = gemini_requests.translate(line(body))
    assert b"\n" not in done
    whole = json.loads(done)
    assert whole.keys() == {"key", "request"}
    assert whole["key"] == "row-7"
    request: dict[str, Any] = whole["request"]
    return request


def configured(**body: Any) -> dict[str, Any]:
    """The generation_config of a request with these keys in its body."""
    config: dict[str, Any] = translated(user("?", **body)).get("generation_config", {})
    return config


# Requests: examples


def test_a_request_of_every_kind_of_content_becomes_gemini_s() -> None:
    body = {
        "model": FLASH,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [text("Say"), text("one word.")]},
            {"role": "user", "content": "Name a colour."},
            {"role": "assistant", "content": "blue"},
            {"role": "user", "content": [picture(), picture("https://a.example/b.JPG?c=1"), text("And here?")]},
        ],
        "max_tokens": 9,
        "temperature": 0,
    }
    assert translated(body) == {
        "contents": [
            {"role": "user", "parts": [{"text": "Name a colour."}]},
            {"role": "model", "parts": [{"text": "blue"}]},
            {
                "role": "user",
                "parts": [
                    {"inline_data": {"mime_type": "image/png", "data": PNG}},
                    {"file_data": {"file_uri": "https://a.example/b.JPG?c=1", "mime_type": "image/jpeg"}},
                    {"text": "And here?"},
                ],
            },
        ],
        "system_instruction": {"parts": [{"text": "Be brief."}, {"text": "Say"}, {"text": "one word."}]},
        "generation_config": {"max_output_tokens": 9, "temperature": 0},
    }


def test_the_line_of_the_official_docs_is_what_comes_out() -> None:
    # ai.google.dev/gemini-api/docs/batch-api, "Input file", with its generation_config
    body = {"messages": [{"role": "user", "content": "Describe the process of photosynthesis."}], "temperature": 0.7}
    assert gemini_requests.translate(line(body, custom_id="request-1")) == (
        b'{"key":"request-1","request":{"contents":[{"role":"user","parts":[{"text":"Describe the process of '
        b'photosynthesis."}]}],"generation_config":{"temperature":0.7}}}'
    )


@pytest.mark.parametrize(
    ("body", "config"),
    [
        ({}, {}),
        ({"n": 1, "stream": False, "temperature": None}, {}),
        ({"max_completion_tokens": 5}, {"max_output_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 5}, {"max_output_tokens": 5}),
        ({"top_p": 0.5, "top_k": 20, "seed": 0}, {"top_p": 0.5, "top_k": 20, "seed": 0}),
        ({"stop": "."}, {"stop_sequences": ["."]}),
        ({"stop": [".", "\n"]}, {"stop_sequences": [".", "\n"]}),
        ({"presence_penalty": -1, "frequency_penalty": 0.5}, {"presence_penalty": -1, "frequency_penalty": 0.5}),
        ({"logprobs": True}, {"response_logprobs": True}),
        ({"logprobs": True, "top_logprobs": 3}, {"response_logprobs": True, "logprobs": 3}),
        ({"logprobs": False}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"response_mime_type": "application/json"}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "c", "strict": True, "schema": SCHEMA},
                }
            },
            {"response_mime_type": "application/json", "response_json_schema": SCHEMA},
        ),
        ({"thinking_budget": -1}, {"thinking_config": {"thinking_budget": -1}}),
        ({"model": "gemini-3-flash-preview", "thinking_budget": 0}, {"thinking_config": {"thinking_budget": 0}}),
    ],
)
def test_parameters_have_gemini_s_names(body: dict[str, Any], config: dict[str, Any]) -> None:
    assert configured(**body) == config


@pytest.mark.parametrize(
    ("model", "effort", "thinking"),
    [
        (FLASH, "none", {"thinking_budget": 0}),
        (FLASH, "minimal", {"thinking_budget": 1024}),
        (FLASH, "low", {"thinking_budget": 1024}),
        ("models/gemini-2.5-pro", "medium", {"thinking_budget": 8192}),
        ("gemini-2.5-flash-lite-preview-09-2025", "high", {"thinking_budget": 24576}),
        ("gemini-3-flash-preview", "minimal", {"thinking_level": "MINIMAL"}),
        ("gemini-3.1-pro-preview", "minimal", {"thinking_level": "LOW"}),
        ("models/gemini-3.5-flash", "low", {"thinking_level": "LOW"}),
        ("gemini-3-pro-preview", "high", {"thinking_level": "HIGH"}),
    ],
)
def test_reasoning_effort_goes_by_the_model_s_family(model: str, effort: str, thinking: dict[str, Any]) -> None:
    assert configured(model=model, reasoning_effort=effort) == {"thinking_config": thinking}


@pytest.mark.parametrize(
    ("detail", "config"),
    [
        ([None, "auto", None], {}),
        (["low", "low"], {"media_resolution": "MEDIA_RESOLUTION_LOW"}),
        (["high"], {"media_resolution": "MEDIA_RESOLUTION_HIGH"}),
    ],
)
def test_one_detail_of_all_images_is_the_media_resolution(detail: list[str | None], config: dict[str, Any]) -> None:
    assert translated(user([picture(detail=each) for each in detail])).get("generation_config", {}) == config


def test_safety_settings_stand_beside_the_generation_config() -> None:
    settings = [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_NONE"}]
    request = translated(user("?", safety_settings=settings))
    assert request["safety_settings"] == settings
    assert [types.SafetySetting.model_validate(setting) for setting in request["safety_settings"]]


@pytest.mark.parametrize(
    ("url", "media_type"),
    [("gs://bucket/a.webp", "image/webp"), ("https://a.example/x.y/b.pdf#3", "application/pdf")],
)
def test_images_elsewhere_stay_there(url: str, media_type: str) -> None:
    parts = translated(user([picture(url)]))["contents"][0]["parts"]
    assert parts == [{"file_data": {"file_uri": url, "mime_type": media_type}}]


IMAGE = "body.messages[0].content[0].image_url"
LACKS = "Gemini's batch API has no"
THINKERS = "only for gemini-2.5 and gemini-3"
ONE_DETAIL = "only one for all images of a request"
NO_ENDING = f"{LACKS} URL whose ending does not tell the media type"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (user("?", logit_bias={"1": 2}), f"body.logit_bias: {LACKS} such field"),
        (user("?", tools=[]), f"body.tools: {LACKS} such field"),
        (user("?", user="u"), f"body.user: {LACKS} such field"),
        (user("?", metadata={}), f"body.metadata: {LACKS} such field"),
        (user("?", store=False), f"body.store: {LACKS} such field"),
        (user("?", google={"thinking_config": {}}), f"body.google: {LACKS} such field"),
        (user("?", n=2), f"body.n: {LACKS} more than one choice"),
        (user("?", stream=True), f"body.stream: {LACKS} streams"),
        (user("?", model=3), "body.model: must be a string"),
        (user("?", temperature="hot"), "body.temperature: must be a number"),
        (user("?", max_tokens=1.5), "body.max_tokens: must be a whole number"),
        (user("?", max_tokens=True), "body.max_tokens: must be a whole number"),
        (user("?", seed=2**31), f"body.seed: {LACKS} whole number of more than 32 bits"),
        (user("?", max_tokens=1, max_completion_tokens=2), "body.max_completion_tokens: differs from body.max_tokens"),
        (user("?", stop=["a", 1]), "body.stop[1]: must be a string"),
        (user("?", logprobs=5), "body.logprobs: must be true or false"),
        (user("?", top_logprobs=5), f"body.top_logprobs: {LACKS} top_logprobs without logprobs"),
        (
            user("?", response_format={"type": "grammar"}),
            f"body.response_format.type: {LACKS} response format 'grammar'",
        ),
        (
            user("?", response_format={"type": "text", "json_schema": {}}),
            f"body.response_format.json_schema: {LACKS} schema for the response format 'text'",
        ),
        (
            user("?", response_format={"type": "json_schema", "json_schema": {"schema": {}, "description": "d"}}),
            f"body.response_format.json_schema.description: {LACKS} such field",
        ),
        (
            user("?", response_format={"type": "json_schema", "json_schema": {"name": "c"}}),
            "body.response_format.json_schema.schema: must be an object",
        ),
        (
            user("?", reasoning_effort="low", thinking_budget=1),
            "body.thinking_budget: contradicts body.reasoning_effort: give one of them",
        ),
        (
            user("?", model="gemini-2.5-pro", reasoning_effort="none"),
            f"body.reasoning_effort: {LACKS} effort 'none' for the model 'gemini-2.5-pro'",
        ),
        (
            user("?", model="gemini-3-flash", reasoning_effort="none"),
            f"body.reasoning_effort: {LACKS} effort 'none' for the model 'gemini-3-flash'",
        ),
        (
            user("?", reasoning_effort="xhigh"),
            f"body.reasoning_effort: {LACKS} effort 'xhigh' for the model 'gemini-2.5-flash'",
        ),
        (
            user("?", model="gemini-2.0-flash", reasoning_effort="low"),
            f"body.reasoning_effort: {LACKS} reasoning_effort for the model 'gemini-2.0-flash', {THINKERS}",
        ),
        (
            user("?", model="gemini-30", thinking_budget=1),
            f"body.thinking_budget: {LACKS} thinking_budget for the model 'gemini-30', {THINKERS}",
        ),
        (user("?", safety_settings={}), "body.safety_settings: must be a list"),
        (
            user("?", safety_settings=[{"category": "C", "threshold": "T", "method": "M"}]),
            f"body.safety_settings[0].method: {LACKS} such field",
        ),
        (user("?", safety_settings=[{"category": "C"}]), "body.safety_settings[0].threshold: must be a string"),
        (None, "body: must be an object"),
        ({"model": FLASH}, "body.messages: must be a list"),
        ({"messages": []}, f"body.messages: {LACKS} request without a message of the user"),
        (
            {"messages": [{"role": "system", "content": "s"}]},
            f"body.messages: {LACKS} request without a message of the user",
        ),
        ({"messages": ["hi"]}, "body.messages[0]: must be an object"),
        (user(""), f"body.messages[0].content: {LACKS} message without content"),
        (user([]), f"body.messages[0].content: {LACKS} message without content"),
        (user([text("")]), f"body.messages[0].content: {LACKS} message without content"),
        (user(None), "body.messages[0].content: must be a list"),
        (user([{"type": "text"}]), "body.messages[0].content[0].text: must be a string"),
        (user(["hi"]), f"body.messages[0].content[0].type: {LACKS} content part None"),
        (user([{"type": "input_audio"}]), f"body.messages[0].content[0].type: {LACKS} content part 'input_audio'"),
        (
            user([{**text("a"), "cache_control": {}}]),
            f"body.messages[0].content[0].cache_control: {LACKS} such field",
        ),
        (
            {"messages": [{"role": "tool", "content": "1"}]},
            f"body.messages[0].role: {LACKS} role 'tool'",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "name": "Ada"}]},
            f"body.messages[0].name: {LACKS} such field",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            f"body.messages[0].tool_calls: {LACKS} such field",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "s"}]},
            f"body.messages[1]: {LACKS} system message after another message",
        ),
        (
            {"messages": [{"role": "assistant", "content": [picture()]}]},
            f"{IMAGE}: {LACKS} image outside of the user's messages",
        ),
        (user([picture(detail="original")]), f"{IMAGE}.detail: {LACKS} detail 'original'"),
        (
            user([picture(), picture(detail="low")]),
            f"{IMAGE.replace('t[0]', 't[1]')}.detail: {LACKS} detail of single images, {ONE_DETAIL}",
        ),
        (user([picture(alt="a")]), f"{IMAGE}.alt: {LACKS} such field"),
        (user([{"type": "image_url", "image_url": "https://a.example/b.png"}]), f"{IMAGE}: must be an object"),
        (user([picture("http://a.example/b.png")]), f"{IMAGE}.url: {LACKS} URL but data:, https:// and gs://"),
        (user([picture("https://a.example/png")]), f"{IMAGE}.url: {NO_ENDING}"),
        (user([picture("https://[a/b.png")]), f"{IMAGE}.url: is no URL: Invalid IPv6 URL"),
        (user([picture("data:image/png,abc")]), f"{IMAGE}.url: {LACKS} data URL but data:TYPE;base64,DATA"),
        (user([picture("data:;base64,YQ==")]), f"{IMAGE}.url: {LACKS} data URL but data:TYPE;base64,DATA"),
        (user([picture("data:image/png;base64,")]), f"{IMAGE}.url: {LACKS} data URL but data:TYPE;base64,DATA"),
    ],
)  # fmt: skip
def test_what_gemini_has_not_is_refused_by_name(body: Any, message: str) -> None:
    with pytest.raises(RowError) as caught:
        gemini_requests.translate(line(body))
    assert (caught.value.code, caught.value.message) == ("unmapped", message)
    with pytest.raises(RowError, match=re.escape(message)):
        gemini_requests.check(body)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (line(user("?"), url="/v1/embeddings"), f"url: {LACKS} counterpart of any url but /v1/chat/completions"),
        (line(user("?"), method="GET"), f"method: {LACKS} method but POST"),
        (line(user("?"), custom_id=7), "custom_id: must be a string"),
        (line(user("?"), priority=1), f"priority: {LACKS} such field"),
        (b"[1]", "the line: must be an object"),
    ],
)
def test_a_line_that_is_no_chat_request_is_refused(broken: bytes, message: str) -> None:
    with pytest.raises(RowError) as caught:
        gemini_requests.translate(broken)
    assert (caught.value.code, caught.value.message) == ("unmapped", message)


def test_a_torn_line_is_refused() -> None:
    with pytest.raises(RowError, match="the line is not JSON"):
        gemini_requests.translate(line(user("?"))[:-3])


# Requests: against any-llm's converter


def our_reading(body: dict[str, Any]) -> tuple[list[types.Content], types.GenerateContentConfig]:
    """Our translation, read by google-genai's types, which refuse every name that they do not know."""
    request = translated(body)
    config = request.get("generation_config", {})
    types.GenerationConfig.model_validate(config)  # the message of the API itself; the other one is the SDK's
    for name in ("system_instruction", "safety_settings"):
        if name in request:
            config[name] = request[name]
    contents = [types.Content.model_validate_json(json.dumps(content)) for content in request["contents"]]
    read = types.GenerateContentConfig.model_validate_json(json.dumps(config))
    types.InlinedRequest(model=body["model"], contents=contents, config=read)
    return contents, read


def their_reading(body: dict[str, Any]) -> tuple[list[types.Content], types.GenerateContentConfig]:
    params = CompletionParams(model_id=body["model"], **{key: body[key] for key in body if key != "model"})
    done = GoogleProvider._convert_completion_params(params, provider_name="gemini")
    return done["contents"], done["config"]


def assert_both_read_the_same(body: dict[str, Any]) -> None:
    contents, config = our_reading(body)
    their_contents, their_config = their_reading(body)
    assert contents == their_contents
    ours, theirs = (each.model_dump(exclude_none=True) for each in (config, their_config))
    # Intended: several system messages stay parts; they join them with line feeds into one text, and the parts of one
    # message with nothing. Nothing is lost either way.
    parts = [part["text"] for part in ours.pop("system_instruction", {"parts": []})["parts"]]
    assert "".join(parts) == theirs.pop("system_instruction", "").replace("\n", "")
    # Intended: they ask for summaries of the thoughts, which the caller has not asked for and pays for.
    if "thinking_config" in theirs and theirs["thinking_config"].get("thinking_budget") != 0:
        assert theirs["thinking_config"].pop("include_thoughts") is True
    assert ours == theirs


@pytest.mark.parametrize(
    "body",
    [
        user("hi"),
        user([text("hi"), text("there")]),
        user([picture(), text("what?"), picture(f"data:image/webp;base64,{PNG}")]),
        user([picture("https://a.example/b.png")]),
        user([picture("gs://bucket/b.jpeg"), text("?")]),
        {"model": FLASH, "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        {
            "model": FLASH,
            "messages": [
                {"role": "system", "content": "one"},
                {"role": "developer", "content": [text("two"), text("three")]},
                {"role": "user", "content": "a"},
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "c"},
                {"role": "user", "content": [picture(), text("d")]},
            ],
        },
        user("?", temperature=0, top_p=0.25, seed=7, max_tokens=3),
        user("?", presence_penalty=0.5, frequency_penalty=-0.5),
        user("?", stop="END"),
        user("?", stop=["a", "b"]),
        user("?", response_format={"type": "text"}),
        user("?", response_format={"type": "json_object"}),
        user("?", response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA}}),
    ],
)
def test_any_llm_reads_a_request_the_same(body: dict[str, Any]) -> None:
    assert_both_read_the_same(body)


MODELS = ["gemini-2.5-pro", FLASH, "gemini-2.5-flash-lite", "gemini-3-flash-preview", "gemini-3.1-pro-preview",
          "models/gemini-3.5-flash"]  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high"])
def test_any_llm_reads_reasoning_effort_the_same(model: str, effort: str) -> None:
    body = user("?", model=model, reasoning_effort=effort)
    try:
        their_reading(body)
    except UnsupportedParameterError:
        with pytest.raises(RowError, match=rf"^body\.reasoning_effort: .* effort '{effort}'"):
            translated(body)
    else:
        assert_both_read_the_same(body)


@pytest.mark.parametrize("effort", ["xhigh", "max", "auto"])
def test_efforts_that_any_llm_has_of_its_own_are_refused(effort: str) -> None:
    # Intended: it cuts the first two down to `high` and takes `auto` for none given; we change no request in silence.
    assert their_reading(user("?", reasoning_effort=effort))
    with pytest.raises(RowError, match=r"^body\.reasoning_effort"):
        translated(user("?", reasoning_effort=effort))


@pytest.mark.parametrize(
    "body",
    [
        user("?", logit_bias={"1": 1.0}),
        user("?", user="u"),
        user("?", top_logprobs=2),
        user("?", n=2),
        user([picture(detail="original")]),
        user([text("a"), {"type": "video_url", "video_url": {}}]),
        {"model": FLASH, "messages": [{"role": "user", "content": "a", "name": "Ada"}]},
        {"model": FLASH, "messages": [{"role": "system", "content": [text("a"), picture()]}, *user("?")["messages"]]},
    ],
)
def test_what_any_llm_drops_in_silence_is_refused(body: dict[str, Any]) -> None:
    assert their_reading(body)
    with pytest.raises(RowError):
        translated(body)


@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        (user("?", max_completion_tokens=4), "max_output_tokens", 4),
        (user("?", logprobs=True), "response_logprobs", True),
        (user("?", logprobs=True, top_logprobs=2), "logprobs", 2),
        (user([picture(detail="low")]), "media_resolution", types.MediaResolution.MEDIA_RESOLUTION_LOW),
    ],
)
def test_what_any_llm_drops_in_silence_is_said(body: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(their_reading(body)[1], name) is None
    assert getattr(our_reading(body)[1], name) == value


# Requests: any body of the mapped subset

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SMALL = st.integers(-(2**31), 2**31 - 1)
NUMBER = st.floats(-2, 2)


def images(detail: str | None) -> st.SearchStrategy[dict[str, Any]]:
    inline = st.builds(
        lambda kind, data: f"data:{kind};base64,{base64.b64encode(data).decode()}",
        st.sampled_from(["image/png", "image/jpeg", "application/pdf"]),
        st.binary(min_size=1, max_size=20),
    )
    away = st.sampled_from(["https://a.example/b.png", "gs://bucket/c d/e.webp"])
    return (inline | away).map(lambda url: picture(url, detail=detail))


def messages(detail: str | None) -> st.SearchStrategy[list[dict[str, Any]]]:
    texts = st.lists(WORDS.map(text), min_size=1, max_size=3)
    mixed = st.lists(WORDS.map(text) | images(detail), min_size=1, max_size=3)

    def saying(roles: list[str], parts: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({"role": st.sampled_from(roles), "content": WORDS | parts})

    system = st.lists(saying(["system", "developer"], texts), max_size=2)
    spoken = st.lists(saying(["user"], mixed) | saying(["assistant"], texts), min_size=1, max_size=4)
    return st.tuples(system, spoken).map(lambda both: [*both[0], *both[1]])


FORMATS: list[dict[str, Any]] = [
    {"type": "text"},
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": SCHEMA}},
]
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": NUMBER,
        "top_p": NUMBER,
        "presence_penalty": NUMBER,
        "frequency_penalty": NUMBER,
        "top_k": SMALL,
        "seed": SMALL,
        "stop": WORDS | st.lists(WORDS, max_size=3),
        "max_tokens": SMALL,
        "response_format": st.sampled_from(FORMATS),
        "safety_settings": st.lists(st.fixed_dictionaries({"category": WORDS, "threshold": WORDS}), max_size=2),
    },
)
THINKING = st.sampled_from([
    {}, {"reasoning_effort": "none"}, {"reasoning_effort": "low"}, {"reasoning_effort": "high"},
    {"thinking_budget": 512},
])  # fmt: skip
LOGPROBS = st.sampled_from([{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 4}])
BODIES = st.builds(
    lambda spoken, *others: {"model": FLASH, "messages": spoken} | others[0] | others[1] | others[2],
    st.sampled_from([None, "auto", "low", "high"]).flatmap(messages),
    PARAMETERS,
    THINKING,
    LOGPROBS,
)


def plain(body: dict[str, Any]) -> dict[str, Any]:
    """A chat body with one spelling for what has several."""
    done = {key: value for key, value in body.items() if key != "model"}
    system: list[Any] = []
    spoken: list[tuple[str, list[Any]]] = []
    for message in done.pop("messages"):
        content = message["content"]
        parts = [text(content)] if isinstance(content, str) else content
        flat = [part.get("text") or (part["image_url"]["url"], part["image_url"]["detail"]) for part in parts]
        if message["role"] in ("system", "developer"):
            system += flat
        else:
            spoken.append((message["role"], flat))
    done["messages"] = (system, spoken)
    if isinstance(done.get("stop"), str):
        done["stop"] = [done["stop"]]
    if done.get("response_format") == {"type": "text"}:
        del done["response_format"]
    if done.get("reasoning_effort") == "none":
        done |= {"reasoning_effort": None, "thinking_budget": 0}
    return {key: value for key, value in done.items() if value is not None}


def back(request: dict[str, Any], details: set[str | None]) -> dict[str, Any]:
    """The chat body of a Gemini request, in the spelling of `plain`. Of the details that say nothing, `details` tells
    which one it was."""
    config: dict[str, Any] = dict(request.get("generation_config", {}))
    resolution = config.pop("media_resolution", None)
    detail = {"MEDIA_RESOLUTION_LOW": "low", "MEDIA_RESOLUTION_HIGH": "high"}.get(resolution, next(iter(details), None))

    def flat(part: dict[str, Any]) -> Any:
        if "inline_data" in part:
            blob = part["inline_data"]
            return f"data:{blob['mime_type']};base64,{blob['data']}", detail
        return (part["file_data"]["file_uri"], detail) if "file_data" in part else part["text"]

    system = [part["text"] for part in request.get("system_instruction", {}).get("parts", [])]
    roles = {"user": "user", "model": "assistant"}
    spoken = [(roles[entry["role"]], [flat(part) for part in entry["parts"]]) for entry in request["contents"]]
    body: dict[str, Any] = {"messages": (system, spoken)}
    if (media := config.pop("response_mime_type", None)) is not None:
        assert media == "application/json"
        schema = config.pop("response_json_schema", None)
        body["response_format"] = FORMATS[1] if schema is None else FORMATS[2]
    if (budget := config.pop("thinking_config", {}).get("thinking_budget")) is not None:
        effort = {1024: "low", 24576: "high"}.get(budget)
        body |= {"reasoning_effort": effort} if effort else {"thinking_budget": budget}
    if "safety_settings" in request:
        body["safety_settings"] = request["safety_settings"]
    if "logprobs" in config:
        body["top_logprobs"] = config.pop("logprobs")
    names: dict[str, str] = {
        "max_output_tokens": "max_tokens",
        "stop_sequences": "stop",
        "response_logprobs": "logprobs",
    }
    for name, value in config.items():
        body[names.get(name, name)] = value
    return body


def details_of(body: dict[str, Any]) -> set[str | None]:
    return {
        part["image_url"]["detail"]
        for message in body["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    }


@given(BODIES)
def test_every_text_image_and_parameter_is_found_again_in_the_translation(body: dict[str, Any]) -> None:
    assert back(translated(body), details_of(body)) == plain(body)


@given(BODIES)
def test_google_genai_knows_every_name_that_we_write(body: dict[str, Any]) -> None:
    body.pop("safety_settings", None)  # their values are an enum's, ours here are any words
    our_reading(body)


def objects(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object in a request line but what is within a schema, which is the user's own."""
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield from objects(entry, f"{path}[{index}]")
    elif isinstance(value, dict):
        yield path, value
        for name, entry in value.items():
            if name != "schema":
                yield from objects(entry, f"{path}.{name}".lstrip("."))


UNKNOWN = st.sampled_from(["logit_bias", "tools", "tool_calls", "metadata", "cache_control", "user", "audio"])


@given(BODIES, UNKNOWN | WORDS.map("x-{}".format), st.data())
def test_an_unknown_key_at_any_level_is_named(body: dict[str, Any], key: str, data: st.DataObject) -> None:
    whole = json.loads(line(body))
    path, place = data.draw(st.sampled_from(list(objects(whole, ""))))
    place[key] = None  # counts as absent
    assert gemini_requests.translate(json.dumps(whole).encode()) == gemini_requests.translate(line(body))
    place[key] = data.draw(st.sampled_from([0, False, "", [], {}, "x"]))
    with pytest.raises(RowError) as caught:
        gemini_requests.translate(json.dumps(whole).encode())
    assert caught.value.message == f"{path}.{key}: {LACKS} such field".lstrip(".")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(BODIES, st.data())
def test_a_value_of_any_type_anywhere_is_translated_or_refused(body: dict[str, Any], data: st.DataObject) -> None:
    whole = json.loads(line(body))
    _, place = data.draw(st.sampled_from([pair for pair in objects(whole, "") if pair[1]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(ANYTHING)
    try:
        done = json.loads(gemini_requests.translate(json.dumps(whole).encode()))
    except RowError:
        return
    assert done["request"]["contents"]


# Results: examples

DECLINED = {
    "SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY",
    "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "ESCALATION", "MODEL_ARMOR",
}  # fmt: skip
CUT = {"MAX_TOKENS", "CONTINUATION"}
BROKEN_OFF = {each.value for each in types.FinishReason} | {"A_REASON_TO_COME"}
BROKEN_OFF -= {"FINISH_REASON_UNSPECIFIED", "STOP", *DECLINED, *CUT}

OK = {"promptTokenCount": 5, "candidatesTokenCount": 2, "thoughtsTokenCount": 3, "totalTokenCount": 10,
      "cachedContentTokenCount": 4}  # fmt: skip


def result(response: Any, **fields: Any) -> bytes:
    return json.dumps({"key": "row-7", "response": response, **fields}).encode()


def candidate(*parts: dict[str, Any], finish: str | None = "STOP", **fields: Any) -> dict[str, Any]:
    done = {"content": {"role": "model", "parts": list(parts)}, **fields}
    return done if finish is None else {**done, "finishReason": finish}


def returned(raw: bytes) -> dict[str, Any]:
    done = gemini_responses.translate(raw)
    assert b"\n" not in done
    value: dict[str, Any] = json.loads(done)
    return value


def test_a_result_becomes_a_line_of_openai_s() -> None:
    whole = {
        "candidates": [candidate({"text": "hm", "thought": True}, {"text": "re"}, {"text": "d"}, index=0)],
        "usageMetadata": OK,
        "modelVersion": FLASH,
        "responseId": "r-1",
        "createTime": "2026-01-02T03:04:05.123456789Z",
    }
    message = {"role": "assistant", "content": "red", "reasoning_content": "hm"}
    assert returned(result(whole)) == {
        "id": None,
        "custom_id": "row-7",
        "response": {
            "status_code": 200,
            "request_id": "r-1",
            "body": {
                "id": "r-1",
                "object": "chat.completion",
                "created": 1767323045,
                "model": FLASH,
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {
                    "prompt_tokens": 5,
                    "completion_tokens": 5,
                    "total_tokens": 10,
                    "prompt_tokens_details": {"cached_tokens": 4},
                    "completion_tokens_details": {"reasoning_tokens": 3},
                },
            },
        },
        "error": None,
    }


@pytest.mark.parametrize(
    ("stamp", "created"),
    [("2026-01-02T04:04:05+01:00", 1767323045), ("2026-01-02T03:04:05", 1767323045), ("soon", 0), (7, 0), (None, 0)],
)
def test_the_time_of_a_result_is_read_off_it_or_0(stamp: Any, created: int) -> None:
    assert returned(result({"createTime": stamp}))["response"]["body"]["created"] == created


def test_several_candidates_are_several_choices() -> None:
    body = returned(result({"candidates": [candidate({"text": "a"}), candidate({"text": "b"}, finish="MAX_TOKENS")]}))
    choices = body["response"]["body"]["choices"]
    assert [(each["index"], each["message"]["content"], each["finish_reason"]) for each in choices] == [
        (0, "a", "stop"),
        (1, "b", "length"),
    ]


def test_what_is_no_text_is_kept_as_a_content_part() -> None:
    code = {"executableCode": {"language": "PYTHON", "code": "1"}}
    parts: list[dict[str, Any]] = [
        {"text": "here"},
        {"inlineData": {"mimeType": "image/png", "data": PNG}},
        {"inline_data": {"mime_type": "audio/wav", "data": "UklG"}},
        code,
        {"thoughtSignature": "c2ln"},
    ]
    raw = result({"candidates": [candidate(*parts)]})
    assert returned(raw)["response"]["body"]["choices"][0]["message"]["content"] == [
        text("here"),
        picture(),
        {"type": "file", "file": {"file_data": "data:audio/wav;base64,UklG"}},
        {"type": "gemini_part", "gemini_part": code},
    ]
    assert parse(gemini_responses.translate(raw)).answer == parse(raw).answer == "here"


def test_an_image_alone_is_an_answer_with_an_empty_text() -> None:
    raw = result({"candidates": [candidate({"inlineData": {"mimeType": "image/png", "data": PNG}})]})
    for response in (parse(gemini_responses.translate(raw)), parse(raw)):
        assert (response.verdict, response.answer, len(response.images)) == (Verdict.ANSWERED, "", 1)


def test_log_probabilities_are_openai_s() -> None:
    sure, other = {"token": "red", "tokenId": 1}, {"token": "blue", "tokenId": 2, "logProbability": -9.5}
    logprobs = {"chosenCandidates": [sure, other], "topCandidates": [{"candidates": [sure, other]}]}
    raw = result({"candidates": [candidate({"text": "redblue"}, logprobsResult=logprobs)]})
    red, blue = (
        {"token": "red", "logprob": 0, "bytes": None},
        {"token": "blue", "logprob": -9.5, "bytes": None},
    )
    assert returned(raw)["response"]["body"]["choices"][0]["logprobs"] == {
        "content": [{**red, "top_logprobs": [red, blue]}, {**blue, "top_logprobs": []}]
    }


@pytest.mark.parametrize("reason", sorted(DECLINED))
def test_a_declined_answer_is_refused_with_its_reason(reason: str) -> None:
    raw = result({"candidates": [candidate({"text": "He"}, finish=reason)]})
    judged = parse(gemini_responses.translate(raw))
    assert (judged.verdict, judged.message, judged.answer) == (Verdict.REFUSED, f"declined: {reason}", "He")
    assert judged.finish_reason == "content_filter"


@pytest.mark.parametrize("reason", [each.value for each in types.BlockedReason])
def test_a_blocked_prompt_is_refused_with_its_reason(reason: str) -> None:
    raw = result({"promptFeedback": {"blockReason": reason}, "usageMetadata": OK})
    judged = parse(gemini_responses.translate(raw))
    assert (judged.verdict, judged.message) == (Verdict.REFUSED, f"the prompt was blocked: {reason}")
    assert judged.usage is not None
    assert judged.usage["total_tokens"] == 10


@pytest.mark.parametrize("reason", sorted(BROKEN_OFF))
@pytest.mark.parametrize("parts", [[], [{"text": "half an ans"}]])
def test_an_answer_that_broke_off_is_none(reason: str, parts: list[dict[str, Any]]) -> None:
    raw = result({"candidates": [candidate(*parts, finish=reason)], "usageMetadata": OK})
    judged = parse(gemini_responses.translate(raw))
    assert (judged.verdict, judged.answer, judged.passing) == (Verdict.FAILED, None, True)
    assert judged.message == f"finished with 'error: {reason}'"
    assert judged.usage is not None, "it was paid for all the same"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        ({"code": 8, "message": "m"}, 429, "RESOURCE_EXHAUSTED"),
        ({"code": 14, "message": "m"}, 503, "UNAVAILABLE"),
        ({"code": 3, "message": "m"}, 400, "INVALID_ARGUMENT"),
        ({"code": 4, "message": "m"}, 504, "DEADLINE_EXCEEDED"),
        ({"code": 13, "message": "m"}, 500, "INTERNAL"),
        ({"code": "8", "message": "m"}, 429, "RESOURCE_EXHAUSTED"),
        ({"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED"}, 429, "RESOURCE_EXHAUSTED"),
        ({"code": 503, "message": "m"}, 503, None),
        ({"status": "UNAVAILABLE", "message": "m"}, 503, "UNAVAILABLE"),
        ({"code": "PERMISSION_DENIED", "message": "m"}, 403, "PERMISSION_DENIED"),
    ],
)
@pytest.mark.parametrize("place", ["error", "status", "response"])
def test_an_error_has_the_status_that_http_has_for_it(
    error: dict[str, Any], status: int, kind: str | None, place: str
) -> None:
    raw = {"key": "row-7", place: {"error": error} if place == "response" else error}
    assert returned(json.dumps(raw).encode()) == {
        "id": None,
        "custom_id": "row-7",
        "response": {
            "status_code": status,
            "request_id": "",
            "body": {"error": {"message": "m", "type": kind, "code": error.get("code")}},
        },
        "error": None,
    }


@pytest.mark.parametrize("code", [*range(17), 17, 99, 200, 400, 404, 408, 429, 500, 503, 504, "429", "8"])
@pytest.mark.parametrize("message", [{}, {"message": "m"}])
def test_an_error_of_any_code_is_judged_as_in_gemini_s_own_shape(code: int | str, message: dict[str, str]) -> None:
    raw = json.dumps({"key": "row-7", "error": {"code": code, **message}}).encode()
    before, after = parse(raw), parse(gemini_responses.translate(raw))
    if code == 1:  # intended: a cancelled request is what a cancelled job leaves, and may be sent again
        assert (before.verdict, after.verdict, after.code) == (Verdict.FAILED, Verdict.EXPIRED, "batch_cancelled")
        return
    assert (after.verdict, after.passing, after.message) == (before.verdict, before.passing, before.message)
    assert after.code == before.code


@pytest.mark.parametrize("raw", [b'{"key":"row-7","error":"late"}', b'{"key":"row-7","error":[1]}'])
def test_an_error_without_a_code_stays_one(raw: bytes) -> None:
    assert parse(gemini_responses.translate(raw)) == parse(raw)


def test_details_of_an_error_are_kept() -> None:
    error = {"code": 3, "message": "m", "details": [{"field": "seed"}]}
    assert returned(json.dumps({"key": "a", "error": error}).encode())["response"]["body"]["error"]["details"] == [
        {"field": "seed"}
    ]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ({"code": 1, "message": "stopped"}, "batch_cancelled", "stopped"),
        ({"code": 499}, "batch_cancelled", "the job has ended: 499"),
        ({"status": "JOB_STATE_CANCELLED"}, "batch_cancelled", "the job has ended: CANCELLED"),
        ({"code": "BATCH_STATE_EXPIRED", "message": "late"}, "batch_expired", "late"),
        ({"code": "batch_expired", "message": "late"}, "batch_expired", "late"),
    ],
)
def test_a_request_that_its_job_did_not_come_to_is_expired(error: dict[str, Any], code: str, message: str) -> None:
    raw = json.dumps({"key": "row-7", "error": error}).encode()
    assert returned(raw)["response"] is None
    judged = parse(gemini_responses.translate(raw))
    assert (judged.verdict, judged.code, judged.message, judged.passing) == (Verdict.EXPIRED, code, message, True)


@pytest.mark.parametrize("status", [{"code": 0}, {"code": 0, "message": "OK"}, {}, "", None])
def test_a_status_that_says_ok_is_no_error(status: Any) -> None:
    raw = result({"candidates": [candidate({"text": "red"})]}, status=status)
    assert parse(gemini_responses.translate(raw)).verdict is Verdict.ANSWERED


@pytest.mark.parametrize(
    "raw",
    [
        b'{"key":"row-7","response":{"candi',
        b"",
        b"[1]",
        b'{"response":{}}',
        b'{"key":7,"response":{}}',
        b'{"key":"row-7"}',
        b'{"key":"row-7","request":{"contents":[]}}',
        b'{"key":"row-7","response":{"candidates":[]}}\xff',
        b"[" * 100_000,
        *(shape.of("row-7") for shape in SHAPES if shape not in GEMINI_SHAPES),
    ],
)
def test_what_is_no_result_of_gemini_s_comes_back_as_it_is(raw: bytes) -> None:
    assert gemini_responses.translate(raw) == raw


def test_an_answer_cut_in_a_surrogate_pair_is_translated() -> None:
    raw = b'{"key":"row-7","response":{"candidates":[{"content":{"parts":[{"text":"ok \\ud83d"}]},"avgLogprobs":NaN}]}}'
    assert parse(gemini_responses.translate(raw)).answer == parse(raw).answer == "ok \ufffd"
    assert b'"choices"' in gemini_responses.translate(raw)


# Results: against our own reading of Gemini's shape, against any-llm's and OpenAI's


def assert_judged_alike(before: Response, after: Response) -> None:
    names = ("custom_id", "verdict", "answer", "passing", "engine_died", "code")
    assert {name: getattr(after, name) for name in names} == {name: getattr(before, name) for name in names}
    assert after.model == before.model
    if before.usage is not None:
        assert after.usage is not None
        assert {name: after.usage[name] for name in before.usage} == before.usage
    if before.verdict is Verdict.REFUSED:
        assert (after.message, after.finish_reason) == (before.message, "content_filter")
    elif before.finish_reason is not None:
        assert after.finish_reason == {"STOP": "stop", "MAX_TOKENS": "length"}[before.finish_reason]


@pytest.mark.parametrize("shape", GEMINI_SHAPES, ids=lambda shape: shape.name)
def test_every_known_shape_of_gemini_s_is_judged_alike_when_translated(shape: Shape) -> None:
    raw = shape.of("row-7")
    after = parse(gemini_responses.translate(raw))
    assert gemini_responses.translate(raw) != raw
    assert_judged_alike(parse(raw), after)
    assert (after.verdict, after.answer, after.message, after.passing) == (
        shape.verdict, shape.answer, shape.message, shape.passing,
    )  # fmt: skip


COUNT = st.integers(0, 10**6)
PARTS = st.lists(
    st.fixed_dictionaries({"text": WORDS | st.just("")}, optional={"thought": st.booleans()})
    | st.just({"inlineData": {"mimeType": "image/png", "data": PNG}}),
    max_size=3,
)
# Reasons that `bodies` does not know in Gemini's own shape: it goes by the text then.
OURS_ALONE = BROKEN_OFF | {"ESCALATION", "MODEL_ARMOR", "CONTINUATION"}
CANDIDATES = st.fixed_dictionaries(
    {},
    optional={
        "content": st.fixed_dictionaries({"role": st.just("model")}, optional={"parts": PARTS}),
        "finishReason": st.sampled_from([each.value for each in types.FinishReason]),
        "index": st.integers(0, 3),
        "avgLogprobs": st.floats(-9, 0),
    },
)
RESPONSES = st.fixed_dictionaries(
    {},
    optional={
        "candidates": st.lists(CANDIDATES, max_size=2),
        "promptFeedback": st.fixed_dictionaries(
            {}, optional={"blockReason": st.sampled_from([each.value for each in types.BlockedReason])}
        ),
        "usageMetadata": st.fixed_dictionaries({}, optional=dict.fromkeys(OK, COUNT)),
        "modelVersion": st.just(FLASH),
        "responseId": WORDS,
    },
)


def snake(value: Any) -> Any:
    if isinstance(value, list):
        return [snake(entry) for entry in value]
    if isinstance(value, dict):
        return {re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", key): snake(value[key]) for key in value}
    return value


@given(RESPONSES)
def test_any_response_is_judged_alike_when_translated(response: dict[str, Any]) -> None:
    types.GenerateContentResponse.model_validate(response)  # so that no response is tested that cannot be
    raw = result(response)
    before, after = parse(raw), parse(gemini_responses.translate(raw))
    first: dict[str, Any] = next(iter(response.get("candidates", [])), {})
    if first.get("finishReason") in OURS_ALONE:
        kinds = dict.fromkeys(BROKEN_OFF, Verdict.FAILED) | dict.fromkeys(DECLINED, Verdict.REFUSED)
        assert after.verdict is kinds.get(first["finishReason"], Verdict.TRUNCATED)
    elif first.get("finishReason") == "FINISH_REASON_UNSPECIFIED":
        assert (after.verdict, after.answer, after.finish_reason) == (before.verdict, before.answer, None)
    else:
        known = "candidates" in response or "promptFeedback" in response
        assert_judged_alike(before if known else parse(result({"candidates": [], **response})), after)


@given(RESPONSES)
def test_both_spellings_mean_the_same(response: dict[str, Any]) -> None:
    assert returned(result(snake(response))) == returned(result(response))


@given(RESPONSES.filter(lambda response: response.get("candidates")))
def test_any_llm_reads_a_response_the_same(response: dict[str, Any]) -> None:
    theirs = _convert_response_to_response_dict(types.GenerateContentResponse.model_validate_json(json.dumps(response)))
    body = returned(result(response))["response"]["body"]
    usage = theirs["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert body.get("usage", dict.fromkeys(usage, 0))[name] == usage[name]
    # Intended: they leave a candidate out that has nothing to say, and have no more than the first one.
    for choice in theirs["choices"]:
        message, ours = choice["message"], body["choices"][0]
        content = ours["message"]["content"]
        texts = [part for part in content if part["type"] == "text"] if isinstance(content, list) else None
        if texts is not None:
            content = "".join(part["text"] for part in texts) if texts else None
        assert content == message["content"]
        assert (ours["message"].get("reasoning_content") or None) == message["reasoning"]
        # Intended: they call an answer `stop` that broke off, and one that Gemini declined for its language.
        reason = response["candidates"][0].get("finishReason")
        if reason not in OURS_ALONE | {"LANGUAGE", "FINISH_REASON_UNSPECIFIED", None}:
            assert ours["finish_reason"] == choice["finish_reason"]
            assert bool(ours["message"].get("refusal")) == bool(message["refusal"])


@given(st.lists(st.sampled_from(["STOP", "MAX_TOKENS", "SAFETY"]), min_size=1, max_size=3), WORDS)
def test_openai_s_own_types_take_the_completion(reasons: list[str], words: str) -> None:
    candidates = [candidate({"text": words}, finish=reason) for reason in reasons]
    body = returned(result({"candidates": candidates, "usageMetadata": OK, "modelVersion": FLASH}))["response"]["body"]
    completion = ChatCompletion.model_validate(body, strict=True)
    assert [choice.message.content for choice in completion.choices] == [words] * len(reasons)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([
                "candidates", "content", "parts", "text", "thought", "finishReason", "usageMetadata", "code", "message",
                "promptTokenCount", "promptFeedback", "blockReason", "logprobsResult", "chosenCandidates", "createTime",
                "inlineData", "data", "mimeType", "details", "status", "error", "index", "token", "topCandidates",
            ]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)  # fmt: skip


@given(JSON, JSON)
def test_no_json_whatever_stops_the_translation(response: Any, error: Any) -> None:
    raw = result(response, error=error)
    done = gemini_responses.translate(raw)
    if done == raw:  # a number that no reader takes
        return
    assert parse(done).custom_id == "row-7"


def test_a_torn_result_counts_as_unreadable_after_translation() -> None:
    with pytest.raises(UnreadableLine):
        parse(gemini_responses.translate(GEMINI_SHAPES[0].of("row-7")[:-9]))
