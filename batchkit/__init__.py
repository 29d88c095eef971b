"""Ask a vision-language model one question about every row of a dataset, as a batch job.

The verbs of the command line are the functions of this package:

    batchkit.prepare("tasks.jsonl", "my-run", model="Qwen/Qwen3-VL-8B-Instruct")
    batchkit.submit("my-run", engine_args=["--max-model-len", "8192"])
    batchkit.merge("my-run")

They are imported when they are first used, so that `import batchkit` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchkit.cancelling import cancel as cancel
    from batchkit.errors import BatchkitError as BatchkitError
    from batchkit.evaluation import evaluate as evaluate
    from batchkit.inference import infer as infer
    from batchkit.merging import merge as merge
    from batchkit.piles import merge_pile as merge_pile
    from batchkit.pipeline import run as run
    from batchkit.preparation import plan as plan
    from batchkit.preparation import prepare as prepare
    from batchkit.reporting import status as status
    from batchkit.submission import submit as submit

__version__ = "0.1.0"

_HOMES = {
    "BatchkitError": "errors",
    "cancel": "cancelling",
    "evaluate": "evaluation",
    "infer": "inference",
    "merge": "merging",
    "merge_pile": "piles",
    "plan": "preparation",
    "prepare": "preparation",
    "run": "pipeline",
    "status": "reporting",
    "submit": "submission",
}

__all__ = [
    "BatchkitError", "cancel", "evaluate", "infer", "merge", "merge_pile", "plan", "prepare", "run", "status", "submit",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'batchkit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"batchkit.{_HOMES[name]}"), name)
