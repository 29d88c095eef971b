"""What each endpoint takes: pure data. `requests` gives each its shape; `limits` says which backend runs which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from batchkit.limits import CHAT, OWN

Shape = Literal["chat", "responses", "completions", "embeddings", "score", "rerank"]

SAMPLING = frozenset({"max_tokens", "temperature", "top_p"})
IMAGES = frozenset({"image_field", "image_detail", "max_side", "max_pixels"})


@dataclass(frozen=True)
class Endpoint:
    """One endpoint, under each of its `paths`.

    `options` are those options of `prepare` that not every endpoint has and this one takes, `own_options` those that it
    takes of vLLM alone (its server too). `token_key` is the name of the longest answer in the body. `members` are the
    keys of the body that batchkit writes; `needs` those that a request which came as it is must have: one of each
    group. `pooling` is vLLM's word for the task of a model that generates nothing, None where it generates text.
    """

    shape: Shape
    paths: tuple[str, ...]
    options: frozenset[str]
    members: frozenset[str]
    needs: tuple[tuple[str, ...], ...]
    own_options: frozenset[str] = frozenset()
    token_key: str = "max_tokens"  # noqa: S105  # it is a key of JSON
    pooling: Literal["embed", "score"] | None = None

    def takes(self, option: str, backend: str) -> bool:
        return option in self.options or (option in self.own_options and backend in OWN)


ENDPOINTS = (
    # platform.openai.com/docs/api-reference/chat, 2026-11
    Endpoint(
        shape="chat",
        paths=(CHAT,),
        options=SAMPLING | IMAGES | {"seed", "reasoning_effort", "thinking_budget", "system_prompt", "response_schema"},
        members=frozenset({"messages"}),
        needs=(("messages",),),
    ),
    # platform.openai.com/docs/api-reference/responses, 2026-11: no seed; vLLM has one (ResponsesRequest, 0.32).
    Endpoint(
        shape="responses",
        paths=("/v1/responses",),
        options=SAMPLING | IMAGES | {"reasoning_effort", "system_prompt", "response_schema"},
        own_options=frozenset({"seed"}),
        members=frozenset({"input", "instructions", "background"}),
        needs=(("input",),),
        token_key="max_output_tokens",  # noqa: S106
    ),
    # platform.openai.com/docs/api-reference/completions; response_format: vLLM's CompletionRequest, 0.10 to 0.32.
    Endpoint(
        shape="completions",
        paths=("/v1/completions",),
        options=SAMPLING | {"seed"},
        own_options=frozenset({"response_schema"}),
        members=frozenset({"prompt"}),
        needs=(("prompt", "prompt_embeds"),),
    ),
    # `messages` in place of `input` is vLLM's own (EmbeddingChatRequest): the way to embed images.
    Endpoint(
        shape="embeddings",
        paths=("/v1/embeddings",),
        options=frozenset(),
        own_options=IMAGES | {"system_prompt"},
        members=frozenset({"input", "messages"}),
        needs=(("input", "messages"),),
        pooling="embed",
    ),
    # vLLM's (entrypoints/pooling/scoring/protocol.py): text_1 and text_2 in 0.10 and in 0.32; later names beside them.
    Endpoint(
        shape="score",
        paths=("/v1/score", "/score"),
        options=frozenset({"documents_field"}),
        members=frozenset({"text_1", "text_2", "queries", "documents", "items", "data_1", "data_2"}),
        needs=(("text_1", "queries", "data_1"), ("text_2", "documents", "items", "data_2")),
        pooling="score",
    ),
    # Jina's and Cohere's, as vLLM has it.
    Endpoint(
        shape="rerank",
        paths=("/v1/rerank", "/rerank", "/v2/rerank"),
        options=frozenset({"documents_field"}),
        members=frozenset({"query", "documents"}),
        needs=(("query",), ("documents",)),
        pooling="score",
    ),
)

_BY_PATH = {path: endpoint for endpoint in ENDPOINTS for path in endpoint.paths}
URLS = tuple(_BY_PATH)
NOT_OF_ALL = frozenset().union(*(endpoint.options | endpoint.own_options for endpoint in ENDPOINTS))
"""Options that only some endpoints take."""


def endpoint_at(url: str) -> Endpoint | None:
    """The endpoint at a path, None for a path that is not known here."""
    return _BY_PATH.get(url)
