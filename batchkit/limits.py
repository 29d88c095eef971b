"""What each backend takes: pure data, one entry a backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """`max_requests` and `max_bytes` bound a shard (bytes of its request lines, line feeds included)."""

    max_requests: int
    max_bytes: int
    media_types: frozenset[str]
    endpoints: tuple[str, ...]
    endpoint_endings: tuple[str, ...] = ()

    def takes(self, url: str) -> bool:
        """Whether the backend runs requests to `url`."""
        return url in self.endpoints or url.endswith(self.endpoint_endings)


LIMITS = {
    # vLLM sets no limits of its own; ours keep what merge holds at once, and what a kill costs, small.
    # Endpoints: vllm/entrypoints/launchers/run_batch.py, 0.32. Images: whatever Pillow reads; these four need no help.
    "vllm": Limits(
        max_requests=5_000,
        max_bytes=256_000_000,
        media_types=frozenset({"image/jpeg", "image/png", "image/webp", "image/gif"}),
        endpoints=(
            "/v1/chat/completions",
            "/v1/embeddings",
            "/v1/audio/transcriptions",
            "/v1/audio/translations",
        ),
        endpoint_endings=("/score", "/rerank"),
    ),
}
