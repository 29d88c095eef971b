"""Gemini's native batch jobs, through google-genai.

Requests and answers are translated on the way (`gemini_requests`, `gemini_responses`). The SDK's types leave out what a
job counts and why it failed, so the JSON of each answer is read off the wire. Shapes: ai.google.dev/api/batch-api,
2026-11; google-genai 3.4.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from batchkit import calls, gemini_requests, gemini_responses
from batchkit.batches import Batch, DoubtfulError, Fault, Order, PassingError, Phase, RefusedError
from batchkit.credentials import Key
from batchkit.errors import CredentialsError, RowError, ServiceError

API_VERSION = "v1beta"
"""Batches are documented for it; the SDK's default is another one."""

RETRIES = 5
TIMEOUT = 120.0
PAGE = 100
MOST_LISTED = 3000
CLOCK_SKEW = 3600.0
_PASSING = frozenset({408, 409, 429})
_PHASES: dict[str, Phase] = {
    "SUCCEEDED": "completed",
    "PARTIALLY_SUCCEEDED": "completed",
    "FAILED": "failed",
    "EXPIRED": "expired",
    "CANCELLED": "cancelled",
}


class GeminiBatches:
    """The batch service of one key."""

    name = "gemini"

    def __init__(self, *, base_url: str, key: Key) -> None:
        try:
            from google import genai
        except ImportError as exc:
            raise ServiceError("Gemini needs google-genai", hint="pip install 'batchkit-vlm[gemini]'") from exc
        self.base_url = base_url
        self._key = key
        self._seen: dict[str, Any] = {}
        self._client = genai.Client(api_key=key.value, vertexai=False, http_options=self._options(RETRIES))
        # `create` is not repeated: without retry options the SDK tries once.
        self._once = genai.Client(api_key=key.value, vertexai=False, http_options=self._options(1))

    def _options(self, tries: int) -> Any:
        import httpx
        from google.genai import types

        http = httpx.Client(timeout=TIMEOUT, follow_redirects=False, event_hooks={"response": [self._remember]})
        return types.HttpOptions(
            base_url=self.base_url,
            api_version=API_VERSION,
            httpx_client=http,
            retry_options=types.HttpRetryOptions(attempts=tries) if tries > 1 else None,
        )

    def _remember(self, response: Any) -> None:
        """Keep the JSON of an answer that tells of a job. Others, a result file say, are not read here."""
        self._seen = {}
        path = response.request.url.path
        if "/batches/" in path or path.endswith(":batchGenerateContent"):
            response.read()
            with contextlib.suppress(ValueError):
                value = response.json()
                self._seen = value if isinstance(value, dict) else {}

    def check_key(self) -> None:
        with self._translated("asking for the list of batches", checking=True):
            self._client.batches.list(config={"page_size": 1})

    def request(self, line: bytes) -> bytes:
        try:
            return gemini_requests.translate(line)
        except RowError as exc:
            raise RefusedError(f"a request cannot be put to Gemini: {exc.message}") from exc

    def response(self, line: bytes) -> bytes:
        return self._key.hide_bytes(gemini_responses.translate(line))

    def _read(self) -> Batch:
        """The batch of the last answer. Raises `ValueError` where that is none."""
        batch = _batch(self._seen)
        faults = (msgspec.structs.replace(fault, message=self._key.hide(fault.message)) for fault in batch.faults)
        return msgspec.structs.replace(batch, faults=tuple(faults))

    def upload(self, path: Path, name: str) -> str:
        with self._translated("uploading"):
            made = self._client.files.upload(file=path, config={"mime_type": "jsonl", "display_name": name})
        if not made.name:
            raise PassingError("the upload was answered without a name")
        if made.size_bytes and made.size_bytes != path.stat().st_size:
            raise PassingError(f"of {path.stat().st_size:,} bytes {made.size_bytes:,} arrived")
        return made.name

    def create(self, order: Order) -> Batch:
        try:
            with self._translated("creating a batch", creating=True):
                self._once.batches.create(
                    model=order.model, src=order.file_id, config={"display_name": _display_name(order)}
                )
                return self._read()
        except (DoubtfulError, PassingError, RefusedError, CredentialsError):
            raise
        except Exception as exc:  # noqa: BLE001  # an answer that cannot be read: the batch may have been created
            raise DoubtfulError(self._key.hide(f"{type(exc).__name__}: {exc}")) from None

    def find(self, order: Order) -> Batch | None:
        wanted = _display_name(order)
        with self._translated("listing batches"):
            for count, job in enumerate(self._client.batches.list(config={"page_size": PAGE})):
                if job.display_name == wanted and job.name and job.name not in order.past:
                    return self.check(job.name)
                created = job.create_time.timestamp() if job.create_time is not None else None
                if count > MOST_LISTED or (created is not None and created < order.since - CLOCK_SKEW):
                    return None
        return None

    def check(self, batch_id: str) -> Batch:
        with self._translated(f"asking for batch {batch_id}"):
            self._client.batches.get(name=batch_id)
            return self._read()

    def download(self, file_id: str, path: Path) -> None:
        with self._translated(f"downloading {file_id}"), calls.storing(path), open(path, "wb") as stream:
            self._client.files.download(file=file_id, destination=stream)

    def cancel(self, batch_id: str) -> None:
        with self._translated(f"cancelling {batch_id}"):
            self._client.batches.cancel(name=batch_id)

    def delete(self, file_id: str) -> None:
        from google.genai import errors

        with self._translated(f"deleting {file_id}"):
            try:
                self._client.files.delete(name=file_id)
            except errors.APIError as exc:
                if exc.code != 404:
                    raise

    @contextlib.contextmanager
    def _translated(self, doing: str, *, creating: bool = False, checking: bool = False) -> Iterator[None]:
        """Turn the SDK's exceptions, and those that it lets through, into ours; `from None`: theirs quote keys."""
        from google.genai import errors

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of states that the SDK does not know, and we do
                yield
        except errors.APIError as exc:
            raise self._judged(exc, doing, creating=creating, checking=checking) from None
        except (
            ValueError,
            KeyError,
            AttributeError,
            TypeError,
        ) as exc:  # half an answer, or a page of some other server
            if creating:
                raise
            raise PassingError(self._key.hide(f"{doing}: the answer cannot be read: {exc}")) from None
        except Exception as exc:
            if not calls.is_of_network(exc):
                raise
            message = self._key.hide(f"{doing}: {type(exc).__name__}: {exc}")
            if creating and not calls.was_never_sent(exc):
                raise DoubtfulError(message) from None
            raise PassingError(message) from None

    def _judged(self, exc: Any, doing: str, *, creating: bool, checking: bool) -> Exception:
        code, said = int(exc.code or 0), str(exc.message or exc.status or exc)[:1000]
        message = self._key.hide(f"{doing}: status {code}: {said}")
        # 403 is also said of a file that is gone; of everything it is the key's fault.
        if code == 401 or (code == 403 and checking) or (code == 400 and "api key" in said.lower()):
            return CredentialsError(
                f"{self.base_url} does not take the key in {self._key.name}: {self._key.hide(said)}",
                hint=f"put a valid key into {self._key.name}, in the environment or in .env, and run the same again",
            )
        if creating and (code >= 500 or code in (0, 408, 409)):
            return DoubtfulError(message)
        if code >= 500 or code == 0 or code in _PASSING:
            return PassingError(message)
        return RefusedError(message, too_large=code == 413)


def _display_name(order: Order) -> str:
    labels = order.labels
    return f"batchkit-{labels['batchkit_shard']}-{labels['batchkit_attempt']}-{order.tag}"


def _batch(fields: dict[str, Any]) -> Batch:
    """A job off the wire: a long-running operation whose metadata are the batch. Raises `ValueError` without a name."""
    name = fields.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError("a batch without a name")
    inner = fields.get("metadata")
    meta: dict[str, Any] = inner if isinstance(inner, dict) else fields
    word = str(meta.get("state") or "UNSPECIFIED").upper()
    state = word.removeprefix("JOB_STATE_").removeprefix("BATCH_STATE_")
    phase = _PHASES.get(state, "running")
    stats = meta.get("batchStats")
    stats = stats if isinstance(stats, dict) else {}
    files = _files(fields, meta)
    lost = phase == "expired" and not files  # such a job has counts, and nothing to show for them
    return Batch(
        id=name,
        phase=phase,
        state=state.lower(),
        total=_count(stats.get("requestCount")),
        completed=0 if lost else _count(stats.get("successfulRequestCount")),
        failed=0 if lost else _count(stats.get("failedRequestCount")),
        files=files,
        faults=tuple(_faults(fields.get("error") or meta.get("error"))),
        partial=state == "PARTIALLY_SUCCEEDED",
        tag=_tag(meta.get("displayName")),
    )


def _tag(display_name: Any) -> str | None:
    """The tag in a display name of ours."""
    found = re.fullmatch(r"batchkit-\d+-\d+-(.+)", display_name) if isinstance(display_name, str) else None
    return found[1] if found else None


def _files(fields: dict[str, Any], meta: dict[str, Any]) -> tuple[str, ...]:
    for place in (meta.get("output"), fields.get("response"), meta.get("dest")):
        if isinstance(place, dict):
            for key in ("responsesFile", "responses_file", "fileName", "file_name"):
                if isinstance(place.get(key), str) and place[key]:
                    return (place[key],)
    return ()


def _faults(error: Any) -> Iterator[Fault]:
    if isinstance(error, dict) and error:
        yield Fault(
            code=str(error.get("code")) if error.get("code") is not None else None,
            message=str(error.get("message") or "no reason was given"),
        )


def _count(value: Any) -> int | None:
    """Counts are int64, which JSON carries as text."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, str) and value.isdecimal() else None
