"""Live OpenAI-compatible servers: where they are, whether they work, and the loop that asks them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from batchkit.client import Call, Client, Endpoint, NoEndpointError, Pacing, RefusingError, Reply
from batchkit.credentials import Key, find_key
from batchkit.errors import BatchkitError, CredentialsError, EngineError, UsageError
from batchkit.limits import GEMINI_KEYS
from batchkit.signatures import hide

if TYPE_CHECKING:
    import aiohttp

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
        url, host = _checked_url(text)
        names = (key_env,) if key_env else _KNOWN_KEYS.get(host, ())
        endpoints.append(Endpoint(url, find_key(names) if names else None))
    if len({endpoint.url for endpoint in endpoints}) < len(endpoints):
        raise UsageError("--endpoints names a server twice", hint="--concurrency says how many requests each one gets")
    return endpoints


def _checked_url(text: str) -> tuple[str, str]:
    """The URL with its version, and the host."""
    url = text.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as exc:
        raise UsageError(f"--endpoints {text}: not a URL: {exc}", hint="--endpoints http://HOST:8000/v1") from exc
    if "@" in parts.netloc or parts.query or parts.fragment:  # not quoted: there may be a key in it
        raise UsageError(
            "--endpoints has a password or a query in it", hint="--api-key-env names the variable of a key"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(f"--endpoints {text}: not a URL", hint="--endpoints http://HOST:8000/v1")
    return (url if parts.path else url + "/v1"), host


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
            raise EngineError(
                f"{endpoint.url} {_not_served(model, models)}",
                hint="start the server with --served-model-name, or prepare with the name that it has",
            )
    if all(problem is not None for problem, _ in found):
        raise EngineError(
            "no server answers: " + "; ".join(f"{one.url}: {found[i][0]}" for i, one in enumerate(endpoints)),
            hint="check --endpoints, and that the server has loaded its model",
        )


def _not_served(model: str, models: Sequence[str]) -> str:
    known = ", ".join(sorted(models)[:5]) + (" …" if len(models) > 5 else "")
    return f"does not serve {model!r}, but {known}"


async def _ask_all(endpoints: Sequence[Endpoint]) -> list[tuple[str | None, list[str]]]:
    import aiohttp

    async with aiohttp.ClientSession() as session:
        return list(await asyncio.gather(*(_ask(session, endpoint) for endpoint in endpoints)))


async def _ask(session: aiohttp.ClientSession, endpoint: Endpoint) -> tuple[str | None, list[str]]:
    """What is wrong, or None and the models (none, where the server has no such list)."""
    import aiohttp

    try:
        async with session.get(
            endpoint.url + "/models",
            headers=endpoint.headers,
            proxy=endpoint.proxy,
            allow_redirects=False,  # requests do not follow one either: their bodies and keys are not for others
            timeout=aiohttp.ClientTimeout(total=CHECK_SECONDS),
        ) as response:
            if response.status in (401, 403):
                raise _refused(endpoint, await response.text())
            if 300 <= response.status < 400:
                return f"sends elsewhere ({response.headers.get('location', '?').partition('?')[0]!a})", []
            if response.status >= 500 or (response.status >= 400 and endpoint.lists_models):
                return f"status {response.status}", []
            if response.status >= 400:
                return None, []
            endpoint.lists_models = True
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
    model: str,
    pacing: Pacing,
    source: Iterator[Call | None],
    done: Callable[[Reply], None],
    *,
    say: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Make all calls of `source`.

    Raises `EngineError` where no server answers any more or one takes no request at all, `CredentialsError` where one
    does not take the key (any more), and what `check` raises.
    """

    async def probe(session: aiohttp.ClientSession, endpoint: Endpoint) -> str | None:
        try:
            problem, models = await _ask(session, endpoint)
        except CredentialsError as exc:
            return exc.message
        return problem or (_not_served(model, models) if models and model not in models else None)

    try:
        run_async(Client(list(endpoints), pacing, probe=probe, say=say, check=check).run(source, done))
    except NoEndpointError as exc:
        raise EngineError(str(exc), hint="run the same command again when it answers: it goes on from there") from exc
    except RefusingError as exc:
        raise _explain(exc) from exc


def _explain(refusal: RefusingError) -> BatchkitError:
    endpoint, status = refusal.endpoint, refusal.status
    text = hide(refusal.body[:2000].decode("utf-8", "replace"))
    if status == 401 or (status == 403 and endpoint.key is not None):
        return _refused(endpoint, text)
    said = f"{endpoint.url} refuses all requests: status {status}"
    if status in (402, 429):
        hint = "pay there, and run the same command again: it goes on where it stopped"
    elif status == 407:
        hint = (
            "http_proxy and https_proxy name a proxy that wants a password; no_proxy names hosts to be asked directly"
        )
    else:
        hint = "check the path in --endpoints (most end with /v1), and that the server knows the model and the endpoint"
    return EngineError(said + (f": {text[:300]}" if text.strip() else ""), hint=hint)


def run_async(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run it to its end: here, or in a thread of its own where an event loop runs here already (a notebook).

    An exception that interrupts the waiting (Ctrl-C, a notebook's stop button) cancels it.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(coroutine)
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
    loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)

    def work() -> None:
        try:
            outcome.set_result(loop.run_until_complete(task))
        except BaseException as exc:  # noqa: BLE001  # raised again where it is waited for
            outcome.set_exception(exc)
        finally:
            loop.close()

    thread = threading.Thread(target=work, name="batchkit")
    thread.start()
    try:
        return outcome.result()
    finally:
        with contextlib.suppress(RuntimeError):  # the loop has ended, as it should
            loop.call_soon_threadsafe(task.cancel)
        thread.join()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
