"""How vLLM is found and called, and what is read out of its log."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from batchkit.backends import vllm_install
from batchkit.backends.vllm_install import (
    Gpu,
    Install,
    engine_command,
    engine_environment,
    given,
    kv_cache_gib,
    split_cores,
    split_gpus,
)
from batchkit.backends.vllm_log import LogTail, find_cause
from batchkit.errors import EngineError, UsageError

GPU = Install(version=(0, 20), text="0.20.1", cpu=False, module="vllm.entrypoints.openai.run_batch")
CPU = Install(version=(0, 32), text="0.32.0", cpu=True, module="vllm.entrypoints.openai.run_batch")
STREAMS = Install(version=(0, 33), text="0.33.0", cpu=False, module="vllm.entrypoints.launchers.run_batch")
EIGHT = [Gpu(str(n), 81_559) for n in range(8)]


def command(install: Install, *args: str, mib: int = 81_559) -> list[str]:
    return engine_command(
        install, source=Path("in"), target=Path("out"), model="org/m", names=["org/m"], args=args, mib=mib
    )


def value_of(name: str, words: list[str]) -> list[str]:
    return [after for word, after in itertools.pairwise(words) if word == name]


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_names_input_output_and_model() -> None:
    words = command(GPU)
    assert words[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.run_batch"]
    assert (value_of("-i", words), value_of("-o", words)) == (["in"], ["out"])
    assert value_of("--model", words) == value_of("--served-model-name", words) == ["org/m"]


@pytest.mark.parametrize("args", [("--model", "/weights/m"), ("--model=/weights/m",)])
def test_the_weights_may_go_by_another_name_than_the_requests_carry(args: tuple[str, ...]) -> None:
    words = command(GPU, *args)
    assert value_of("--served-model-name", words) == ["org/m"]
    assert value_of("--model", [part for word in words for part in word.split("=")]) == ["/weights/m"]


@pytest.mark.parametrize(
    ("install", "mib", "args", "seqs", "tokens"),
    [
        pytest.param(GPU, 81_559, (), ["1024"], ["8192"], id="large-gpu"),
        pytest.param(GPU, 24_564, (), ["256"], ["8192"], id="small-gpu"),
        pytest.param(CPU, 0, (), ["256"], [], id="cpu"),
        pytest.param(GPU, 81_559, ("--max-num-seqs", "7"), ["7"], ["8192"], id="users-own"),
        pytest.param(GPU, 81_559, ("--max_num_batched_tokens=99",), ["1024"], [], id="users-own-other-spelling"),
    ],
)
def test_the_limits_that_run_batch_has_no_good_defaults_for(
    install: Install, mib: int, args: tuple[str, ...], seqs: list[str], tokens: list[str]
) -> None:
    words = command(install, *args, mib=mib)
    assert value_of("--max-num-seqs", words) == seqs
    assert value_of("--max-num-batched-tokens", words) == tokens
    assert tuple(words[len(words) - len(args) :]) == args


def test_a_streaming_runner_is_kept_busy() -> None:
    assert value_of("--max-inflight", command(STREAMS)) == ["2048"]
    assert value_of("--max-inflight", command(STREAMS, "--max-num-seqs=64")) == ["128"]
    assert value_of("--max-inflight", command(STREAMS, "--max_inflight", "5")) == []
    assert value_of("--max-inflight", command(GPU)) == []


def test_given_takes_every_spelling() -> None:
    assert given(["--a_b", "1", "--c=2", "--flag", "-tp", "4", "--empty="]) == {
        "--a-b": "1",
        "--c": "2",
        "--flag": None,
        "-tp": "4",
        "--empty": "",
    }


def test_given_takes_negative_numbers_and_json_as_values() -> None:
    assert given(["--seed", "-1", "--limit-mm-per-prompt", '{"image":2}']) == {
        "--seed": "-1",
        "--limit-mm-per-prompt": '{"image":2}',
    }


# -- the environment -------------------------------------------------------------------------------------------------


def environment(base: dict[str, str], scratch: str = "/s", **wanted: Any) -> dict[str, str]:
    return engine_environment(base=base, scratch=Path(scratch), **wanted)


def test_the_cpu_build_does_not_reserve_all_memory() -> None:
    assert 1 <= kv_cache_gib(CPU, {}, (), 1) <= 4
    assert kv_cache_gib(CPU, {"VLLM_CPU_KVCACHE_SPACE": "40"}, (), 1) == 0
    assert kv_cache_gib(CPU, {}, ("--kv_cache_memory_bytes=1G",), 1) == 0
    assert kv_cache_gib(GPU, {}, (), 1) == 0
    assert environment({}, kv_cache_gib=3)["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment({})


def test_what_ray_set_for_its_own_worker_is_taken_away_and_the_users_own_kept() -> None:
    inside = {"RAY_JOB_ID": "1", "RAY_ADDRESS": "x", "OMP_NUM_THREADS": "1", "HOME": "/h"}
    assert environment(inside).keys().isdisjoint({"RAY_JOB_ID", "RAY_ADDRESS", "OMP_NUM_THREADS"})
    outside = {"RAY_ADDRESS": "x", "OMP_NUM_THREADS": "8"}
    assert outside.items() <= environment(outside).items()


def test_temporary_files_go_where_they_are_removed() -> None:
    assert environment({})["VLLM_RPC_BASE_PATH"] == "/s"
    assert "TMPDIR" not in environment({}), "another disk than the user's own"
    usual = f"{tempfile.gettempdir()}/s"
    assert environment({}, usual)["TMPDIR"] == usual
    assert environment({}, usual)["TORCHINDUCTOR_CACHE_DIR"].startswith(f"{tempfile.gettempdir()}/torchinductor_")


def test_an_engine_is_bound_to_its_own_gpus_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment({}, gpus=("2", "3"))["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "CUDA_VISIBLE_DEVICES" not in environment({})
    assert environment({}, cores="0,1")["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 6})
    assert split_cores(2, ()) == ["0,1", "2,3"]
    assert split_cores(1, ()) == [None]
    assert split_cores(2, ("-tp", "2")) == split_cores(9, ())[:2] == [None, None]


# -- the GPUs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicas", "args", "groups"),
    [
        pytest.param(1, (), [[]], id="one-takes-what-it-sees"),
        pytest.param(2, (), [["0"], ["1"]], id="one-each"),
        pytest.param(4, ("--tensor-parallel-size=2",), [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"]], id="pairs"),
        pytest.param(2, ("-tp", "2", "-pp", "2"), [["0", "1", "2", "3"], ["4", "5", "6", "7"]], id="fours"),
    ],
)
def test_gpus_are_split_among_replicas(replicas: int, args: tuple[str, ...], groups: list[list[str]]) -> None:
    assert split_gpus(EIGHT, replicas, args) == groups


def test_more_replicas_than_gpus_are_refused() -> None:
    with pytest.raises(UsageError, match="need 10") as caught:
        split_gpus(EIGHT, 5, ("-tp", "2"))
    assert caught.value.hint == "--replicas 4"
    assert split_gpus([], 3, ()) == [[], [], []], "without GPUs they run side by side"


def test_gpus_are_those_that_the_engine_would_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "0, GPU-aa, 81559\\n1, GPU-bb, 81559\\n2, GPU-cc, 24564\\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{shown}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert [gpu.name for gpu in vllm_install.list_gpus({})] == ["0", "1", "2"]
    assert vllm_install.list_gpus({"CUDA_VISIBLE_DEVICES": "2,GPU-aa"}) == [Gpu("2", 24_564), Gpu("GPU-aa", 81_559)]
    assert vllm_install.list_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


# -- the installation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "version"),
    [("0.10.0", (0, 10)), ("0.32.1rc1.dev12+g123", (0, 32)), ("0.33.0", (0, 33)), ("1.0", (1, 0))],
)
@pytest.mark.parametrize("module", vllm_install.MODULES)
def test_vllm_is_found_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, version: tuple[int, int], module: str
) -> None:
    package = tmp_path / "vllm"
    (package / module).parent.mkdir(parents=True)
    (package / module).touch()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    info = tmp_path / f"vllm-{text}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    install = vllm_install.find_install()
    assert (install.version, install.streams, install.cpu) == (version, version >= (0, 33), False)
    assert install.module == "vllm." + module.removesuffix(".py").replace("/", ".")


def test_a_missing_vllm_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(EngineError, match="not installed") as caught:
        vllm_install.find_install()
    assert caught.value.hint == "pip install 'batchkit-vlm[vllm]'"


# -- the log ---------------------------------------------------------------------------------------------------------

# As vLLM 0.32.0 wrote them, shortened.
START = """\
(MainProcess pid=9) INFO 11-21 07:43:25 [model.py:733] Resolved architecture: Idefics3ForConditionalGeneration
(Worker pid=11) INFO 11-21 07:43:46 [cpu_model_runner.py:68] Starting to load model m...
Loading safetensors checkpoint shards: 100% Completed | 1/1 [00:00<00:00, 98.97it/s]
"""
READY = "Running batch:   0% Completed | 0/400 [00:00<?, ?req/s]\n"
SOME = "\nRunning batch:  31% Completed | 124/400 [00:05<00:11, 24.8req/s]\n"
DIED = """\
(MainProcess pid=9) ERROR 11-21 07:43:56 [async_llm.py:906] AsyncLLM output_handler failed.
(MainProcess pid=9) ERROR 11-21 07:43:56 [async_llm.py:906] Traceback (most recent call last):
(MainProcess pid=9) ERROR 11-21 07:43:56 [async_llm.py:906]   File "x/async_llm.py", line 849, in output_handler
(MainProcess pid=9) ERROR 11-21 07:43:56 [async_llm.py:906]     raise self._format_exception(outputs) from None
(MainProcess pid=9) ERROR 11-21 07:43:56 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore \
encountered an issue. See stack trace (above) for the root cause.
"""


def test_progress_is_read_as_the_log_grows(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    tail = LogTail(log)
    tail.read()
    seen = []
    with open(log, "w") as stream:
        for piece in (START, READY[:20], READY[20:], SOME):
            stream.write(piece)
            stream.flush()
            tail.read()
            seen.append((tail.loading, tail.ready, tail.done, tail.total))
    assert seen == [(True, False, 0, 0), (True, False, 0, 0), (True, True, 0, 400), (True, True, 124, 400)]


@pytest.mark.parametrize(
    ("log", "code", "kind", "text"),
    [
        pytest.param("x.py: error: unrecognized arguments: --x 3\n", 2, "argument", "arguments: --x 3", id="argument"),
        pytest.param("x.ValidationError: 1 validation error for ModelConfig\n  Value error, too long [type=x]\n", 1,
                     "argument", "too long", id="configuration"),
        pytest.param("x\nModuleNotFoundError: No module named 'vllm'\n", 1, "missing", "No module", id="missing"),
        pytest.param("OSError: [Errno 28] No space left on device\n", 1, "disk", "No space left", id="disk"),
        pytest.param("pydantic_core._pydantic_core.ValidationError: 1 validation error for BatchRequestInput\n", 1,
                     "request", "1 validation error", id="request"),
        pytest.param("p.ValidationError: 1 validation error for BatchRequestInput\nbody.messages\n"
                     "  Value error, must be a list [type=value_error]\n", 1,
                     "request", "body.messages; Value error, must be a list", id="request-and-its-field"),
        pytest.param("(EngineCore pid=1) ERROR 11-21 07:43:56 [core.py:9] ValueError: No available memory\n"
                     "RuntimeError: Engine core initialization failed.\n", 1, "memory", "No available", id="memory"),
        pytest.param(START, -9, "memory", "killed", id="killed-by-the-system"),
        pytest.param(START + READY + DIED, 0, "other", "EngineDeadError: EngineCore", id="died-with-exit-code-0"),
        pytest.param("a.b.CustomError: first\n" + DIED, 1, "other", "CustomError: first", id="root-cause-first"),
        pytest.param(START, -11, "other", "signal 11", id="crash-without-a-word"),
        pytest.param("", 3, "other", "exit code 3", id="nothing"),
    ],
)  # fmt: skip
def test_the_cause_is_one_line_of_the_log(tmp_path: Path, log: str, code: int, kind: str, text: str) -> None:
    (tmp_path / "log.txt").write_text(log)
    cause = find_cause(tmp_path / "log.txt", code)
    assert (cause.kind, text in cause.text) == (kind, True), cause.text
    assert not cause.text.startswith(("a.b.", "vllm.v1"))


def test_the_end_of_the_log_is_shown_without_tracebacks_and_chatter(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(START + READY + DIED)
    assert find_cause(tmp_path / "log.txt", 1).tail.splitlines() == [
        "AsyncLLM output_handler failed.",
        DIED.splitlines()[-1].split("] ")[1],
    ]
