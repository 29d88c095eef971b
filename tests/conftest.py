"""Fixtures for tests of several modules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from batchkit import batch_submission, live_submission
from batchkit.backends import gemini as gemini_backend
from batchkit.backends import openai as openai_backend
from batchkit.client import Pacing
from batchkit.handover import Pace
from tests import fake_provider, fake_server, s3_servers

ENVIRONMENT = (
    "OPENAI_API_KEY", "OPENAI_BASE_URL", "GEMINI_API_KEY", "GOOGLE_API_KEY", "GOOGLE_GEMINI_BASE_URL",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "BATCHKIT_WORK_DIR",
    "HF_TOKEN", "HUGGINGFACE_TOKEN", "HUGGING_FACE_HUB_TOKEN",
)  # fmt: skip

WriteTasks = Callable[..., Path]

# Neither new examples nor a busy machine make a test fail by chance. What `make test-all` is for is to look further.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")  # before any test file makes settings of its own; --hypothesis-profile comes after this


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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_server.Server]:
    """A live server, which is given up soon where it does not answer."""
    monkeypatch.setattr(live_submission, "PACING", Pacing(timeout=5.0, patience=0.5))
    with fake_server.running() as server:
        yield server


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_provider.Provider]:
    """A batch service, which is asked often and soon."""
    monkeypatch.setattr(batch_submission, "PACE", Pace(poll=0.01, adopt=1.0, settle=0.3, tokens=0.02))
    monkeypatch.setattr(openai_backend, "RETRIES", 0)
    monkeypatch.setattr(gemini_backend, "RETRIES", 1)
    with fake_provider.running() as provider:
        monkeypatch.setenv("OPENAI_API_KEY", provider.key)
        monkeypatch.setenv("GEMINI_API_KEY", provider.key)
        yield provider


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of the S3 protocol that takes everything."""
    with s3_servers.moto(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture
def bucket(
    moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> s3_servers.Bucket:
    name = f"b-{abs(hash(request.node.nodeid)) % 10**12}"
    return s3_servers.Bucket(name, moto, tmp_path / "machines", monkeypatch)


@pytest.fixture
def small_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a real vLLM needs to start in little memory and without a model hub."""
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}.items():
        monkeypatch.setenv(name, value)
