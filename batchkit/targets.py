"""Which batch service a run is sent to, and the way to it."""

from __future__ import annotations

import msgspec

from batchkit.batches import PassingError, RefusedError, Service
from batchkit.credentials import find_key, find_variable
from batchkit.errors import BatchkitError, ServiceError, UsageError
from batchkit.jobs import Remote
from batchkit.limits import GEMINI_KEYS, GEMINI_URL, GEMINI_URL_ENV, HOSTS, LIMITS, Host, Limits
from batchkit.runs import Run

SERVICES = ("openai", "gemini")


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run goes. `key_names` are the variables that may hold the key, the first that is set counts; `prices` is
    the provider's id in genai-prices, None where it has none."""

    backend: str
    base_url: str
    key_names: tuple[str, ...]
    limits: Limits
    host: Host | None = None
    window: str | None = None
    prices: str | None = None
    host_name: str | None = None


def choose(
    run: Run,
    backend: str,
    *,
    host: str | None = None,
    base_url: str | None = None,
    key_env: str | None = None,
    window: str | None = None,
) -> Target:
    """The target that is named; where nothing is, the one that the run was last sent to, or was prepared for.

    Raises `UsageError` where the host has no common base URL.
    """
    last = last_remote(run, backend) if host is None else None
    if last is not None:
        base_url, key_env, host = base_url or last.base_url, key_env or last.key_env, last.host
    if base_url is not None and not base_url.startswith(("http://", "https://")):
        raise UsageError(f"--base-url {base_url}: not a URL", hint="--base-url https://HOST/v1")
    if base_url is not None and "@" in base_url.partition("://")[2].partition("/")[0]:
        raise UsageError("--base-url has a password in it", hint="keys go into a variable: --api-key-env names it")
    if backend == "gemini":
        return Target(
            backend=backend,
            base_url=(base_url or find_variable(GEMINI_URL_ENV) or GEMINI_URL).rstrip("/"),
            key_names=(key_env,) if key_env else GEMINI_KEYS,
            limits=LIMITS["gemini"],
            prices="google",
        )
    name = host or str(run.manifest.options.get("host", "openai"))
    if name not in HOSTS:
        raise UsageError(
            f"--host {name}: unknown", hint=f"the hosts are {', '.join(HOSTS)}; others need --base-url alone"
        )
    entry = HOSTS[name]
    url = base_url or (find_variable(entry.base_url_env) if entry.base_url_env else None) or entry.base_url
    if url is None:
        raise UsageError(f"{name} has a base URL for each customer", hint="--base-url https://…/v1 names yours")
    return Target(
        backend=backend,
        base_url=url.rstrip("/"),
        key_names=(key_env or entry.key_env,),
        limits=entry.limits,
        host=entry,
        host_name=name,
        window=window,
        prices=entry.prices,
    )


def last_remote(run: Run, backend: str) -> Remote | None:
    """What the latest attempt at `backend` says of where it is; one in flight before others."""
    found = [
        (attempt.in_flight, attempt.started, attempt.remote)
        for path in (run.path / "jobs").glob("[0-9]*.json")
        for attempt in run.job(int(path.stem)).attempts
        if attempt.backend == backend and attempt.remote is not None
    ]
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def connect(target: Target) -> tuple[Service, str]:
    """The service, its key checked, and the name of the variable that holds the key.

    Raises `CredentialsError` where there is no key or it is not taken, `ServiceError` where there is no such service.
    """
    key = find_key(target.key_names)
    service: Service
    if target.backend == "gemini":
        from batchkit.backends.gemini import GeminiBatches

        service = GeminiBatches(base_url=target.base_url, key=key)
    else:
        from batchkit.backends.openai import OpenAIBatches

        assert target.host is not None  # noqa: S101  # of the backend openai
        service = OpenAIBatches(target.host, base_url=target.base_url, key=key, window=target.window)
    try:
        service.check_key()
    except PassingError as exc:
        raise unreachable(target, exc) from None
    except RefusedError as exc:
        raise ServiceError(
            f"{target.base_url} is no batch service: {exc}", hint="check --base-url: it ends with the version, as /v1"
        ) from None
    return service, key.name


def unreachable(target: Target, exc: Exception) -> BatchkitError:
    return ServiceError(
        f"{target.base_url} cannot be reached: {exc}", hint="check --base-url and the network; nothing is lost"
    )
