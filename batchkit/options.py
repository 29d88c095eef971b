"""The options of `prepare`, checked. The manifest keeps them: together with the input they decide every byte."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypedDict

import msgspec
import pydantic
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from batchkit import grids, schemas
from batchkit.endpoints import NOT_OF_ALL, URLS, Endpoint, endpoint_at
from batchkit.errors import UsageError
from batchkit.limits import CHAT, HOSTS, OWN, Limits, limits_of, runs, who_runs
from batchkit.prompts import read_text_option
from batchkit.tasks import InputFormat

Backend = Literal["vllm", "openai", "gemini", "server"]
HostName = Literal["openai", "azure", "groq", "together", "dashscope"]

LOCAL_DEFAULTS = {"max_tokens": 100, "temperature": 0.0}
"""What local models are asked for unless the user says otherwise. To a provider only what was given is sent: reasoning
models refuse a temperature, and spend a small limit on thinking alone."""

_THINKS = re.compile(
    r"(?:^|/)(?:o[1-9]\b|gpt-[5-9]|gemini-(?:2\.5|[3-9])|qwq|deepseek-r|qwen3|glm-4\.[5-9])", re.IGNORECASE
)
THINKING_TOKENS = 2000
"""Below this, an answer of a model that thinks may be cut off before its first word: OpenAI advises to leave 25,000
(platform.openai.com/docs/guides/reasoning), and short thoughts take some hundreds."""


class PrepareKeywords(TypedDict, total=False):
    """The keyword arguments of `batchkit.prepare`; `PrepareOptions` says what they mean and their defaults."""

    model: str
    backend: Backend
    host: HostName
    url: str
    input_format: InputFormat
    image_field: tuple[str, ...] | None
    question_field: str
    id_fields: tuple[str, ...] | None
    answer_field: str | None
    prompt_template: str | None
    system_prompt: str | None
    placeholders: bool
    image_root: str | None
    start: int
    end: int | None
    limit: int | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    reasoning_effort: str | None
    thinking_budget: int | None
    response_schema: dict[str, Any] | type[BaseModel] | str | Path | None
    documents_field: str | None
    extra_body: dict[str, Any]
    fit: str | None
    images: Literal["inline", "link"]
    max_side: int | None
    max_pixels: int | None
    image_format: Literal["keep", "jpeg", "png", "webp"]
    image_quality: int
    image_detail: Literal["auto", "low", "high"] | None
    on_bad_image: Literal["reject", "text-only"]
    max_requests: int | None
    max_bytes: int | None
    dedupe: bool
    reuse: tuple[str, ...]
    allow_private_hosts: bool


class PrepareOptions(BaseModel):
    """What `prepare` makes of the rows.

    `image_field` None means `image` where a row has it; with named ones `on_bad_image` decides on a row that has an
    image in none of them. `id_fields` None means `id` where a row has it. `answer_field` holds the right answer: it is
    never sent, `evaluate` compares with it (None: `answer` where rows have it). `start`, `end` (exclusive) and `limit`
    select rows by position. `images` "link": requests name images by their addresses, which `submit` resolves.
    `max_side` in pixels, `max_pixels` in pixels of area; `fit` is a model, to whose own size for them images are shrunk
    (within the other two). `max_requests` and `max_bytes` bound a shard, None for the backend's limits; with `dedupe`
    the same request is in a shard once. `max_tokens` and `temperature` None: they are not sent; left out, they are
    `LOCAL_DEFAULTS` for local backends. `host` is who speaks OpenAI's batch API, for the backend `openai`. `reuse` are
    other runs: what they have answered already is taken over, the first named first. `url` is the endpoint;
    `response_schema` a decoded JSON schema that answers must match; `documents_field` None: `documents`. `placeholders`
    False takes `<image>` and the like in a question as text. `image_root` may be remote; `allow_private_hosts` fetches
    http images from hosts of the own network, too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, Field(min_length=1)]
    backend: Backend = "vllm"
    host: HostName = "openai"
    url: str = CHAT
    input_format: InputFormat = "auto"
    image_field: tuple[str, ...] | None = None
    question_field: str = "question"
    id_fields: tuple[str, ...] | None = None
    answer_field: str | None = None
    prompt_template: str | None = None
    system_prompt: str | None = None
    placeholders: bool = True
    image_root: str | None = None
    start: NonNegativeInt = 0
    end: NonNegativeInt | None = None
    limit: NonNegativeInt | None = None
    max_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    reasoning_effort: str | None = None
    thinking_budget: Annotated[int, Field(ge=-1)] | None = None
    response_schema: dict[str, Any] | None = None
    documents_field: str | None = None
    extra_body: dict[str, Any] = {}
    fit: str | None = None
    images: Literal["inline", "link"] = "inline"
    max_side: PositiveInt | None = None
    max_pixels: PositiveInt | None = None
    image_format: Literal["keep", "jpeg", "png", "webp"] = "keep"
    image_quality: Annotated[int, Field(ge=1, le=100)] = 90
    image_detail: Literal["auto", "low", "high"] | None = None
    on_bad_image: Literal["reject", "text-only"] = "reject"
    max_requests: PositiveInt | None = None
    max_bytes: PositiveInt | None = None
    dedupe: bool = False
    reuse: tuple[str, ...] = ()
    allow_private_hosts: bool = False

    @pydantic.model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        local = isinstance(given, dict) and given.get("backend", "vllm") in OWN
        endpoint = endpoint_at(given.get("url", CHAT)) if local else None
        return {**LOCAL_DEFAULTS, **given} if endpoint is not None and endpoint.pooling is None else given

    @pydantic.field_validator("fit")
    @classmethod
    def _has_a_grid(cls, fit: str | None) -> str | None:
        if fit is not None and grids.family_of(fit) is None:
            raise ValueError(f"no rule is known for {fit!r}; known are models such as {', '.join(grids.EXAMPLES)}")
        return fit

    @pydantic.field_validator("url")
    @classmethod
    def _known(cls, url: str) -> str:
        if endpoint_at(url) is None:
            raise ValueError(f"{url!r} is none of {', '.join(URLS)}")
        return url

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.thinking_budget is not None and self.backend != "gemini":
            raise ValueError("--thinking-budget is Gemini's; --reasoning-effort is what others take")
        if self.host != "openai" and self.backend != "openai":
            raise ValueError(f"--host {self.host} goes with --backend openai")
        if self.end is not None and self.end < self.start:
            raise ValueError(f"end {self.end} lies before start {self.start}")
        return self

    @property
    def stop(self) -> int | None:
        """The position behind the last row, from `end` and `limit`; None for the end of the file."""
        stops = [] if self.end is None else [self.end]
        if self.limit is not None:
            stops.append(self.start + self.limit)
        return min(stops, default=None)

    @property
    def limits(self) -> Limits:
        return limits_of(self.backend, self.host)

    @property
    def endpoint(self) -> Endpoint:
        endpoint = endpoint_at(self.url)
        assert endpoint is not None  # noqa: S101  # it was checked
        return endpoint

    @property
    def shard_requests(self) -> int:
        return min(self.max_requests or self.limits.max_requests, self.limits.max_requests)

    @property
    def shard_bytes(self) -> int:
        return min(self.max_bytes or self.limits.max_bytes, self.limits.max_bytes)

    @property
    def parameters(self) -> dict[str, Any]:
        """The keys of a request's body that options set; None where there is nothing to send."""
        responses = self.endpoint.shape == "responses"
        token_key = self.endpoint.token_key
        if self.endpoint.shape == "chat" and self.backend == "openai":
            token_key = HOSTS[self.host].token_key
        effort = self.reasoning_effort
        return {
            token_key: self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            **({"reasoning": effort and {"effort": effort}} if responses else {"reasoning_effort": effort}),
            "thinking_budget": self.thinking_budget,
            **(self._schema_members(self.response_schema) if self.response_schema is not None else {}),
        }

    def _schema_members(self, schema: dict[str, Any]) -> dict[str, Any]:
        named = {
            "name": schemas.name_of(schema),
            "schema": schema,
            "strict": schemas.why_not_strict(schema) is None,
        }
        if self.endpoint.shape == "responses":
            return {"text": {"format": {"type": "json_schema", **named}}}
        return {"response_format": {"type": "json_schema", "json_schema": named}}


def find_doubts(options: PrepareOptions) -> list[str]:
    """What is allowed and likely not meant: sentences for the user."""
    doubts = []
    thinks = options.backend not in OWN and _THINKS.search(options.model) is not None
    if thinks and options.max_tokens is not None and options.max_tokens < THINKING_TOKENS:
        doubts.append(
            f"{options.model} thinks before it answers, and --max-tokens {options.max_tokens} bounds both: "
            "answers may end before their first word; leave it out, or allow some thousands"
        )
    if thinks and options.temperature is not None and not options.model.lower().startswith("gemini"):
        doubts.append(f"{options.model} may refuse a request with a temperature; leave --temperature out")
    asked, fitted = grids.family_of(options.model), grids.family_of(options.fit or options.model)
    if asked is not None and asked is not fitted:
        doubts.append(
            f"images are shrunk to what {options.fit} makes of them, but {options.model} is asked, which makes "
            "something else of them"
        )
    schema = options.response_schema
    if schema is not None and options.backend == "openai" and (why := schemas.why_not_strict(schema)):
        doubts.append(
            f"the schema goes without strict mode, which takes no such one ({why}): answers may not match it, and are "
            "`invalid` then"
        )
    return doubts


def check(keywords: PrepareKeywords) -> PrepareOptions:
    """The options, with the text of `@file` in place of its name.

    Raises `UsageError` that names the first wrong one as it is written on the command line.
    """
    keywords = keywords.copy()
    if (schema := keywords.get("response_schema")) is not None:
        keywords["response_schema"] = schemas.load(schema)
    if (template := keywords.get("prompt_template")) is not None:
        keywords["prompt_template"] = read_text_option(template)
    if (system := keywords.get("system_prompt")) is not None:
        keywords["system_prompt"] = read_text_option(system)
    for name, value in keywords.items():
        _refuse_no_text(name, value)
    try:
        options = PrepareOptions(**keywords)  # type: ignore[arg-type]  # the schema is a dict by now
    except pydantic.ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        if not first["loc"]:  # of options that do not go together
            raise UsageError(first["msg"].removeprefix("Value error, "), hint="batchkit prepare --help") from exc
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{flag}: {message}", hint="batchkit prepare --help") from exc
    _refuse_misplaced(options)
    return options


def _refuse_no_text(name: str, value: Any) -> None:
    """Raise `UsageError` for bytes of the command line that are not UTF-8, which Python keeps as half surrogates."""
    try:
        repr(value) if isinstance(value, type) else json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as exc:
        flag = "--" + name.replace("_", "-")
        raise UsageError(f"{flag} is not valid UTF-8 text", hint="check the terminal's encoding (locale)") from exc
    except (TypeError, ValueError, RecursionError):
        return  # of the wrong type: it is refused as such


def _refuse_misplaced(options: PrepareOptions) -> None:
    """Raise `UsageError` where the backend does not run the endpoint, or the endpoint does not take an option."""
    url, backend = options.url, options.backend
    _refuse_beside_links(options)
    if not runs(backend, url, options.host):
        name = options.host if backend == "openai" else backend
        taken = [known for known in URLS if runs(backend, known, options.host)]
        raise UsageError(
            f"{name} does not run {url}; it runs {', '.join(taken)}", hint=f"--backend {' or '.join(who_runs(url))}"
        )
    for option in PrepareOptions.model_fields:  # in the order in which they are documented
        given = option in NOT_OF_ALL and getattr(options, option) is not None
        if given and not options.endpoint.takes(option, backend):
            flag = "--" + option.replace("_", "-")
            raise UsageError(f"{flag} has no meaning for {url} of {backend}", hint=_instead(option))
    schema_key = "text" if options.endpoint.shape == "responses" else "response_format"
    if options.response_schema is not None and schema_key in options.extra_body:
        raise UsageError(
            f"--extra-body may not set {schema_key!r} beside --response-schema", hint="leave one of the two out"
        )


def _refuse_beside_links(options: PrepareOptions) -> None:
    """Raise `UsageError` for what needs the images themselves, which `--images link` leaves where they are."""
    if options.images != "link":
        return
    for option in ("fit", "max_side", "max_pixels", "image_format", "image_quality"):
        if getattr(options, option) != PrepareOptions.model_fields[option].get_default():
            flag = "--" + option.replace("_", "-")
            raise UsageError(
                f"{flag} changes images, and --images link leaves them as they are", hint="leave one of the two out"
            )
    if options.reuse:
        raise UsageError(
            "--reuse goes without --images link: a link does not tell whether its image is still the one that was "
            "answered",
            hint="leave --images link out: images in requests are compared byte for byte",
        )


def _instead(option: str) -> str:
    if option == "system_prompt":
        return "--prompt-template '… {{ question }}' puts a text before the question"
    return "leave it out"


def parse_extra_body(text: str | None) -> dict[str, Any]:
    """The value of `--extra-body`. Raises `UsageError` where it is no JSON object."""
    try:
        value = msgspec.json.decode(text) if text else {}
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as exc:
        raise UsageError(f"--extra-body is not valid JSON: {exc}", hint="""--extra-body '{"top_k": 20}'""") from exc
    if not isinstance(value, dict):
        raise UsageError("--extra-body is not a JSON object", hint="""--extra-body '{"top_k": 20}'""")
    return value
