"""The far end of a Ray cluster's engine with the fake engine in vLLM's place: imported by Ray's own processes."""

from __future__ import annotations

import os
from typing import Any

import pytest

from batchkit.backends.vllm_replica import Replica
from tests.test_submission import install_fake


class FakeReplica(Replica):
    def __init__(self, **given: Any) -> None:
        install_fake(pytest.MonkeyPatch(), (0, int(given["environment"].pop("VLLM_FAKE_MINOR", "32"))))
        os.environ["FAKE_ENGINE"] = given["environment"].pop("VLLM_FAKE_ENGINE")
        super().__init__(**given)


class GpuReplica(FakeReplica):
    def hello(self) -> dict[str, Any]:
        return {**super().hello(), "notes": [os.environ["CUDA_VISIBLE_DEVICES"]]}


class OldReplica(FakeReplica):
    def hello(self) -> dict[str, Any]:
        return {**super().hello(), "batchkit": "0.0.1"}
