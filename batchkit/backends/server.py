"""Live OpenAI-compatible servers: where they are, whether they work, and the loop that asks them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from batchkit.client import Call, Client, Endpoint, NoEndpointError, Pacing, Reply
from batchkit.credentials import Key, find_key
from batchkit.errors import CredentialsError, EngineError, UsageError
from batchkit.limits import GEMINI_KEYS

DEFAULT_ENDPOINT = "http://localhost:8000/v1"
"""Where `vllm serve` listens unless told otherwise."""

CHECK_SECONDS = 20.0
_KNOWN_KEYS = {"api.openai.com": ("OPENAI_API_KEY",), "generativelanguage.googleapis.com": GEMINI_KEYS}


def parse_endpoints(texts: Sequence[str], key_env: str | None) -> list[Endpoint]:
    """Servers by their URLs. A key goes only where the user names its variable, or to the provider that it is of.

    Raises `UsageError` for what is no URL, `CredentialsError` where a key is needed and not there.
    """
    endpoints = []
    for text in texts or (DEFAULT_ENDPOINT,):
        url = text.strip().rstrip("/")
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise UsageError("--endpoints has a password in it", hint="--api-key-env names the variable of a key")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--endpoints {text}: not a URL", hint="--endpoints http://HOST:8000/v1")
        if not parts.path:
            url += "/v1"
        names = (key_env,) if key_env else _KNOWN_KEYS.get(parts.hostname, ())
        endpoints.append(Endpoint(url, find_key(names) if names else None))
    if len({endpoint.url for endpoint in endpoints}) < len(endpoints):
        raise UsageError("--endpoints names a server twice", hint="--concurrency says how many requests each one gets")
    return endpoints


def check(endpoints: Sequence[Endpoint], model: str, say: Callable[[str], None]) -> None:
    """Ask every server for its models. Those that do not answer are left for later, as long as one does.

    Raises `EngineError` where none answers, or one does not serve the model; `CredentialsError` where the key is not
    taken.
    """
    found = run_async(_ask_all(endpoints))
    for endpoint, (problem, models) in zip(endpoints, found, strict=True):
        if problem is not None:
            say(f"{endpoint.url}: {problem}")
        elif models and model not in models:
            known = ", ".join(sorted(models)[:5]) + (" …" if len(models) > 5 else "")
            raise EngineError(
                f"{endpoint.url} does not serve {model!r}, but {known}",
                hint="start the server with --served-model-name, or prepare with the name that it has",
            )
    if all(problem is not None for problem, _ in found):
        raise EngineError(
            "no server answers: " + "; ".join(f"{one.url}: {found[i][0]}" for i, one in enumerate(endpoints)),
            hint="check --endpoints, and that the server has loaded its model",
        )


async def _ask_all(endpoints: Sequence[Endpoint]) -> list[tuple[str | None, list[str]]]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=CHECK_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        return list(await asyncio.gather(*(_ask(session, endpoint) for endpoint in endpoints)))


async def _ask(session: Any, endpoint: Endpoint) -> tuple[str | None, list[str]]:
    """What is wrong, or None and the models (none, where the server has no such list)."""
    try:
        async with session.get(endpoint.url + "/models", headers=endpoint.headers, proxy=endpoint.proxy) as response:
            if response.status in (401, 403):
                raise _refused(endpoint, await response.text())
            if response.status >= 500:
                return f"status {response.status}", []
            if response.status >= 400:
                return None, []
            data = await response.json(content_type=None)
    except CredentialsError:
        raise
    except Exception as exc:  # noqa: BLE001  # whatever it is, this server does not answer as it should
        return f"{type(exc).__name__}: {exc}", []
    entries = data.get("data") if isinstance(data, dict) else None
    names = [entry.get("id") for entry in entries or [] if isinstance(entry, dict)]
    return None, [name.removeprefix("models/") for name in names if isinstance(name, str)]


def _refused(endpoint: Endpoint, text: str) -> CredentialsError:
    key: Key | None = endpoint.key
    if key is None:
        return CredentialsError(
            f"{endpoint.url} asks for a key", hint="--api-key-env NAME names the variable that holds it"
        )
    return CredentialsError(
        f"{endpoint.url} does not take the key in {key.name}: {key.hide(text[:300])}",
        hint=f"put a valid key into {key.name}, and run the same again",
    )


def ask(
    endpoints: Sequence[Endpoint],
    pacing: Pacing,
    source: Iterator[Call],
    done: Callable[[Reply], None],
    *,
    say: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Make all calls of `source`. Raises `EngineError` where no server answers any more, and what `check` raises."""
    try:
        run_async(Client(list(endpoints), pacing, say, check).run(source, done))
    except NoEndpointError as exc:
        raise EngineError(
            f"no server has answered for {pacing.patience:g} s",
            hint="start it again and run the same command: it goes on where it stopped",
        ) from exc


def run_async(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run it to its end: here, or in a thread of its own where an event loop runs here already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(coroutine)
    result: list[Any] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(asyncio.run(coroutine))
        except BaseException as exc:  # noqa: BLE001  # raised again where it is waited for
            failure.append(exc)

    thread = threading.Thread(target=work, name="batchkit")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
