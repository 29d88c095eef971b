"""An existing Ray cluster: reached, and what there is in it. The only module that connects to Ray."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import msgspec

from batchkit.errors import EngineError, UsageError

CONNECT_SECONDS = 5.0
NAMED = ("auto", "local")
"""`auto`: the cluster that runs on this machine, or that RAY_ADDRESS names. `local`: one is started, for this call."""

_PLACE = re.compile(r"(?:ray://)?(?P<host>\[[^\]]+\]|[^:/\[\]]+):(?P<port>\d{1,5})")


class Node(msgspec.Struct, frozen=True):
    """What one machine of the cluster has in all, whether free or not."""

    cpus: int
    gpus: int


def load() -> Any:
    """The package ray. Raises `EngineError` where it is not installed."""
    try:
        import ray
    except ImportError as exc:
        raise EngineError("--ray needs Ray, which is not installed", hint="pip install 'batchkit-vlm[ray]'") from exc
    return ray


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The package ray, connected to the cluster at `address` until the end of the block.

    Where the program is connected already, that connection is used, and stays. Raises `UsageError` for an address that
    is none, `EngineError` where there is no cluster, or one of other versions.
    """
    _check(address)
    ray = load()
    if ray.is_initialized():
        yield ray
        return
    _connect(ray, address)
    try:
        yield ray
    finally:
        ray.shutdown()


def _check(address: str) -> None:
    """Raise what can be known without Ray, which may try for minutes to reach an address where nobody is."""
    if address in NAMED:
        return
    place = _PLACE.fullmatch(address)
    if place is None:
        raise UsageError(
            f"--ray {address}: not the address of a Ray cluster",
            hint="--ray auto, on a machine of the cluster; --ray HOST:6379; or --ray ray://HOST:10001, from elsewhere",
        )
    try:
        socket.create_connection((place["host"].strip("[]"), int(place["port"])), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as exc:
        raise EngineError(
            f"no Ray cluster answers at {address}: {exc}",
            hint="ray status, on one of its machines, says where it is",
        ) from exc


def _connect(ray: Any, address: str) -> None:
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if in_main else None
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=True)
    except Exception as exc:  # Ray raises ConnectionError, RuntimeError, ValueError and its own
        text = " ".join(str(exc).split())
        if "mismatch" in text.lower():
            message = f"the Ray cluster at {address} has other versions: {text}"
            hint = "use the same versions of Python and Ray here and on the cluster"
        else:
            message = f"no Ray cluster can be reached at {address}: {text}"
            hint = "ray start --head starts one; ray status says whether one runs on this machine"
        raise EngineError(message, hint=hint) from exc
    finally:
        if in_main:  # Ray puts a handler of its own in its place
            signal.signal(signal.SIGTERM, before)


def nodes(ray: Any) -> list[Node]:
    """The machines that are up."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in alive]


def free(ray: Any) -> Node:
    """What is free on all machines together."""
    has = ray.available_resources()
    return Node(int(has.get("CPU", 0)), int(has.get("GPU", 0)))


def reason(exc: BaseException) -> str:
    """What an error of Ray says, in one line."""
    text = str(exc)
    if found := re.search(r"ModuleNotFoundError: (No module named '[^']+')", text):
        return f"{found[1]} on a machine of the cluster"
    if "import" in text and (found := re.search(r"^(\w*(?:Error|Exception): .+)$", text, re.MULTILINE)):
        return found[1]
    useful = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith((" ", "\t"))]
    return " ".join(useful)[:300] or type(exc).__name__
