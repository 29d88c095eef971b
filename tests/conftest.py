"""Fixtures for tests of several modules."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ENVIRONMENT = (
    "OPENAI_API_KEY", "OPENAI_BASE_URL", "GEMINI_API_KEY", "GOOGLE_API_KEY", "GOOGLE_GEMINI_BASE_URL",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "BATCHKIT_WORK_DIR",
    "HF_TOKEN", "HUGGINGFACE_TOKEN", "HUGGING_FACE_HUB_TOKEN",
)  # fmt: skip

WriteTasks = Callable[..., Path]


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    """Writes a picture of one colour, at `name` below the test's folder, and returns its path."""

    def write(name: str, size: tuple[int, int] = (8, 8), colour: str = "red", **save: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, colour).save(path, **save)
        return path

    return write


@pytest.fixture
def write_tasks(tmp_path: Path) -> WriteTasks:
    """Writes rows (objects, or lines as they are) as a task file."""

    def write(rows: Sequence[dict[str, Any] | bytes], name: str = "tasks.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(
            b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
        )
        return path

    return write


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of the developer's own must not leak into what is tested."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
