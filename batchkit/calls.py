"""How calls over the network fail, whatever library makes them. Serves the batch services."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from batchkit.errors import StorageError

_LIBRARIES = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "h11", "anyio", "aiohttp", "requests", "urllib3"})
"""By name: SDKs change between them, and let their errors through."""

_UNSENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError"})
"""What httpx raises before a byte of the request has left (www.python-httpx.org/exceptions)."""


def is_of_network(exc: BaseException) -> bool:
    """Whether the call did not get through, or its answer did not."""
    return type(exc).__module__.split(".")[0] in _LIBRARIES or isinstance(exc, ConnectionError | TimeoutError)


def was_never_sent(exc: BaseException) -> bool:
    """Whether it is certain that the other side has seen nothing."""
    return type(exc).__name__ in _UNSENT


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Raise `StorageError` where `path` cannot be written."""
    try:
        yield
    except OSError as exc:
        raise StorageError(
            f"{path}: cannot be written: {exc.strerror or exc}", hint="free some disk space and run the same again"
        ) from exc
