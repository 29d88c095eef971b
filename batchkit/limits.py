"""What each backend takes: pure data, one entry a backend, and one for each host of the batch API that has a name."""

from __future__ import annotations

from dataclasses import dataclass, field

CHAT = "/v1/chat/completions"
SERVED = ("/v1/responses", "/v1/completions")
"""What vLLM's server runs, and its batch runner does not."""
IMAGES = frozenset({"image/jpeg", "image/png", "image/webp", "image/gif"})


@dataclass(frozen=True)
class Limits:
    """`max_requests` and `max_bytes` bound a shard (bytes of its request lines, line feeds included).
    `fetches`: images may be `https://` links."""

    max_requests: int
    max_bytes: int
    media_types: frozenset[str]
    endpoints: tuple[str, ...]
    endpoint_endings: tuple[str, ...] = ()
    fetches: bool = True

    def takes(self, url: str) -> bool:
        """Whether the backend runs requests to `url`."""
        return url in self.endpoints or url.endswith(self.endpoint_endings)


LIMITS = {
    # vLLM sets no limits of its own; ours keep what merge holds at once, and what a kill costs, small.
    # Endpoints: vllm/entrypoints/launchers/run_batch.py, 0.32. Images: whatever Pillow reads; these four need no help.
    "vllm": Limits(
        max_requests=5_000,
        max_bytes=256_000_000,
        media_types=IMAGES,
        endpoints=(
            CHAT,
            "/v1/embeddings",
            "/v1/audio/transcriptions",
            "/v1/audio/translations",
        ),
        endpoint_endings=("/score", "/rerank"),
    ),
    # A server takes one request at a time; shards are as for vLLM.
    "server": Limits(
        max_requests=5_000,
        max_bytes=256_000_000,
        media_types=IMAGES,
        endpoints=(CHAT, "/v1/responses", "/v1/embeddings", "/v1/completions", "/v1/moderations"),
        endpoint_endings=("/score", "/rerank", "/classify", "/pooling"),
    ),
    # platform.openai.com/docs/guides/batch, 2026-11: 50,000 requests, 200 MB. Uploads of 158 MB were answered with 413
    # (users, community.openai.com), hence the margin.
    "openai": Limits(
        max_requests=50_000,
        max_bytes=100_000_000,
        media_types=IMAGES,
        endpoints=(
            CHAT,
            "/v1/responses",
            "/v1/embeddings",
            "/v1/completions",
            "/v1/moderations",
            "/v1/images/generations",
            "/v1/images/edits",
        ),
    ),
    # ai.google.dev/gemini-api/docs/batch-api, 2026-11: a file of 2 GB. A job that expires (48 h) gives nothing back, so
    # small shards lose less. Images: ai.google.dev/gemini-api/docs/image-understanding.
    "gemini": Limits(
        max_requests=10_000,
        max_bytes=500_000_000,
        media_types=frozenset({"image/jpeg", "image/png", "image/webp"}),
        endpoints=(CHAT,),
        fetches=False,
    ),
}


@dataclass(frozen=True)
class Host:
    """Who speaks OpenAI's Files and Batches API, and where its dialect differs.

    `base_url` is None where each customer has an own one; the variable `base_url_env` replaces it. `window` is the
    default of `--completion-window`, `token_key` the name under which a chat request takes the longest answer. `prices`
    is the provider's id in genai-prices.
    """

    key_env: str
    base_url: str | None = None
    base_url_env: str | None = None
    limits: Limits = field(default=LIMITS["openai"])
    purpose: str = "batch"
    window: str = "24h"
    token_key: str = "max_completion_tokens"  # noqa: S105  # it is a key of JSON
    prices: str | None = None


def _small(max_bytes: int, *endpoints: str, max_requests: int = 50_000) -> Limits:
    return Limits(max_requests=max_requests, max_bytes=max_bytes, media_types=IMAGES, endpoints=endpoints or (CHAT,))


HOSTS = {
    "openai": Host(
        key_env="OPENAI_API_KEY",
        base_url="https://api.openai.com/v1",
        base_url_env="OPENAI_BASE_URL",  # as for the SDK
        prices="openai",
    ),
    # learn.microsoft.com/azure/ai-services/openai/how-to/batch: 200 MB, 100,000 requests, never expires; the model is
    # the deployment's name. Base URL: https://RESOURCE.openai.azure.com/openai/v1
    "azure": Host(key_env="AZURE_OPENAI_API_KEY", limits=_small(100_000_000, CHAT, "/v1/responses"), prices="azure"),
    # console.groq.com/docs/batch: 50,000 requests, 200 MB, window from 24h to 7d.
    "groq": Host(
        key_env="GROQ_API_KEY",
        base_url="https://api.groq.com/openai/v1",
        limits=_small(100_000_000, CHAT, "/v1/audio/transcriptions", "/v1/audio/translations"),
        prices="groq",
    ),
    # docs.together.ai/docs/inference/batch/overview: 50,000 requests, 100 MB; we stay below.
    "together": Host(
        key_env="TOGETHER_API_KEY",
        base_url="https://api.together.xyz/v1",
        limits=_small(90_000_000),
        purpose="batch-api",
        token_key="max_tokens",  # noqa: S106
        prices="together",
    ),
    # alibabacloud.com/help/en/model-studio/batch-interfaces-compatible-with-openai: 50,000 requests, 500 MB, 6 MB a
    # line, window from 24h to 336h.
    "dashscope": Host(
        key_env="DASHSCOPE_API_KEY",
        base_url="https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
        limits=_small(200_000_000, CHAT, "/v1/embeddings"),
        token_key="max_tokens",  # noqa: S106
    ),
}

OWN = frozenset({"vllm", "server"})
"""Backends that no provider bills, as far as is known here."""

GEMINI_URL = "https://generativelanguage.googleapis.com"
GEMINI_URL_ENV = "GOOGLE_GEMINI_BASE_URL"
"""As for google-genai."""

GEMINI_KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY")


def limits_of(backend: str, host: str = "openai") -> Limits:
    """The limits of a backend, for `openai` those of the host."""
    return HOSTS[host].limits if backend == "openai" else LIMITS[backend]


def runs(backend: str, url: str, host: str = "openai") -> bool:
    """Whether a backend runs requests to `url` in any way: vLLM also by its server."""
    return limits_of(backend, host).takes(url) or (backend == "vllm" and url in SERVED)


def who_runs(url: str) -> list[str]:
    """The backends that run requests to `url`."""
    return [backend for backend in LIMITS if runs(backend, url)]
