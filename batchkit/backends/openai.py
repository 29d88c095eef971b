"""OpenAI's Files and Batches API, and every host that speaks it, through the official SDK.

Answers are read as plain JSON, not as the SDK's types: hosts leave keys out, add states, and spell them in capitals.
Shapes: platform.openai.com/docs/api-reference/batch, 2026-11; openai 3.52; AIBrix 0.8.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from batchkit import calls
from batchkit.batches import Batch, DoubtfulError, Fault, Order, PassingError, Phase, RefusedError
from batchkit.credentials import Key
from batchkit.errors import CredentialsError
from batchkit.limits import Host

TAG = "batchkit_tag"
RETRIES = 4
TIMEOUT = 120.0
"""Seconds without a byte, not for a whole upload."""

PAGE = 100
MOST_LISTED = 3000
"""A batch that is looked for was created lately, and lists begin with the latest."""

CLOCK_SKEW = 3600.0
_PHASES: dict[str, Phase] = {
    "completed": "completed",
    "failed": "failed",
    "expired": "expired",
    "cancelled": "cancelled",
    "canceled": "cancelled",
}


_OUT_OF_MONEY = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
"""With status 429, and not to be waited for."""


class OpenAIBatches:
    """The batch service of one host under one key."""

    name = "openai"

    def __init__(self, host: Host, *, base_url: str, key: Key, window: str | None = None) -> None:
        import openai

        self.base_url = base_url
        self._host = host
        self._window = window or host.window
        self._key = key
        self._client = openai.OpenAI(api_key=key.value, base_url=base_url, max_retries=RETRIES, timeout=TIMEOUT)

    def check_key(self) -> None:
        with self._translated("asking for the list of batches", checking=True):
            page = _json(self._client.batches.with_raw_response.list(limit=1))
        if not isinstance(page.get("data"), list):
            raise RefusedError("its answer is no list of batches")

    def request(self, line: bytes) -> bytes:
        return line

    def response(self, line: bytes) -> bytes:
        return self._key.hide_bytes(line)

    def _read(self, fields: dict[str, Any]) -> Batch:
        """A batch, whose reasons for failing do not quote the key. Raises `ValueError` where it has no id."""
        batch = _batch(fields)
        faults = (msgspec.structs.replace(fault, message=self._key.hide(fault.message)) for fault in batch.faults)
        return msgspec.structs.replace(batch, faults=tuple(faults))

    def upload(self, path: Path, name: str) -> str:
        purpose: Any = self._host.purpose
        with self._translated("uploading"), open(path, "rb") as stream:
            raw = self._client.files.with_raw_response.create(
                file=(name, stream, "application/jsonl"), purpose=purpose, timeout=TIMEOUT
            )
            answer = _json(raw)
        file_id, size = answer.get("id"), answer.get("bytes")
        if not isinstance(file_id, str) or not file_id:
            raise PassingError("the upload was answered without an id")
        if isinstance(size, int) and size not in (0, path.stat().st_size):
            raise PassingError(f"of {path.stat().st_size:,} bytes {size:,} arrived")
        return file_id

    def create(self, order: Order) -> Batch:
        window: Any = self._window
        url: Any = order.url
        try:
            with self._translated("creating a batch", creating=True):
                raw = self._client.with_options(max_retries=0).batches.with_raw_response.create(
                    input_file_id=order.file_id,
                    endpoint=url,
                    completion_window=window,
                    metadata={**order.labels, TAG: order.tag},
                )
                return self._read(_json(raw))
        except (DoubtfulError, PassingError, RefusedError, CredentialsError):
            raise
        except Exception as exc:  # noqa: BLE001  # an answer that cannot be read: the batch may have been created
            raise DoubtfulError(self._key.hide(f"{type(exc).__name__}: {exc}")) from None

    def find(self, order: Order) -> Batch | None:
        for found in self._listed(order.since - CLOCK_SKEW):
            if str(found.get("id")) in order.past:
                continue
            metadata = found.get("metadata")
            tagged = isinstance(metadata, dict) and metadata.get(TAG)
            # By its file only where the host has not kept the tag: the file may have been used twice.
            if tagged == order.tag or (not tagged and found.get("input_file_id") == order.file_id):
                with contextlib.suppress(ValueError):  # without an id: not to be adopted
                    return self._read(found)
        return None

    def _listed(self, since: float) -> Iterator[dict[str, Any]]:
        after: dict[str, Any] = {}
        for _ in range(MOST_LISTED // PAGE):
            with self._translated("listing batches"):
                page = _json(self._client.batches.with_raw_response.list(limit=PAGE, **after))
            entries = [entry for entry in page.get("data") or [] if isinstance(entry, dict)]
            yield from entries
            if not page.get("has_more") or not entries:
                return
            created = entries[-1].get("created_at")
            if isinstance(created, int | float) and created < since:
                return
            after = {"after": entries[-1].get("id")}

    def check(self, batch_id: str) -> Batch:
        with self._translated(f"asking for batch {batch_id}"):
            return self._read(_json(self._client.batches.with_raw_response.retrieve(batch_id)))

    def download(self, file_id: str, path: Path) -> None:
        with (
            self._translated(f"downloading {file_id}"),
            self._client.files.with_streaming_response.content(file_id, timeout=TIMEOUT) as response,
        ):
            expected = response.headers.get("content-length")
            encoded = response.headers.get("content-encoding", "identity") != "identity"
            written = 0
            with calls.storing(path):
                stream = open(path, "wb")  # noqa: SIM115  # closed below
            with stream:
                for piece in response.iter_bytes(1 << 20):
                    with calls.storing(path):
                        stream.write(piece)
                    written += len(piece)
            if expected is not None and not encoded and expected.isdecimal() and written != int(expected):
                raise PassingError(f"of {int(expected):,} bytes of {file_id} {written:,} came")

    def cancel(self, batch_id: str) -> None:
        with self._translated(f"cancelling {batch_id}"):
            self._client.batches.with_raw_response.cancel(batch_id)

    def delete(self, file_id: str) -> None:
        import openai

        with self._translated(f"deleting {file_id}"), contextlib.suppress(openai.NotFoundError):
            self._client.files.with_raw_response.delete(file_id)

    @contextlib.contextmanager
    def _translated(self, doing: str, *, creating: bool = False, checking: bool = False) -> Iterator[None]:
        """Turn the SDK's exceptions, and those that it lets through, into ours; `from None`: theirs quote keys."""
        import openai

        try:
            yield
        except openai.APIStatusError as exc:
            raise self._judged(exc, doing, creating=creating, checking=checking) from None
        except ValueError as exc:  # half an answer, or a page of some other server
            if creating:
                raise
            raise PassingError(self._key.hide(f"{doing}: the answer cannot be read: {exc}")) from None
        except Exception as exc:
            cause = exc.__cause__ if isinstance(exc, openai.APIConnectionError) and exc.__cause__ else exc
            if not calls.is_of_network(cause) and not isinstance(exc, openai.APIConnectionError):
                raise
            message = self._key.hide(f"{doing}: {type(cause).__name__}: {cause or exc}")
            if creating and not calls.was_never_sent(cause):
                raise DoubtfulError(message) from None
            raise PassingError(message) from None

    def _judged(self, exc: Any, doing: str, *, creating: bool, checking: bool) -> Exception:
        status, message = exc.status_code, self._key.hide(f"{doing}: {_said(exc)}")
        # 403 is also said of a single file or batch; of everything it is the key's fault.
        if status == 401 or (status == 403 and checking):
            return CredentialsError(
                f"{self.base_url} does not take the key in {self._key.name}: {self._key.hide(_said(exc))}",
                hint=f"put a valid key into {self._key.name}, in the environment or in .env, and run the same again",
            )
        if creating and (status >= 500 or status in (408, 409)):
            return DoubtfulError(message)
        if status >= 500 or (status in (408, 409, 429) and exc.code not in _OUT_OF_MONEY):
            return PassingError(message)
        return RefusedError(message, too_large=status == 413)


def _said(exc: Any) -> str:
    """The provider's own words, without the SDK's."""
    body = exc.body
    inner = body.get("error", body) if isinstance(body, dict) else body
    message = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
    return f"status {exc.status_code}: {str(message or exc.message)[:1000]}"


def _json(raw: Any) -> dict[str, Any]:
    """The answer's object. Raises `ValueError` where it is none; a bare list counts as a page of one."""
    value = raw.http_response.json()
    if isinstance(value, list):
        return {"data": value}
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _batch(fields: dict[str, Any]) -> Batch:
    """A batch of any of the hosts. Raises `ValueError` where it has no id."""
    if isinstance(fields.get("job"), dict):  # Together wraps the answer to `create`
        fields = fields["job"]
    batch_id = fields.get("id")
    if not isinstance(batch_id, str) or not batch_id:
        raise ValueError("a batch without an id")
    state = str(fields.get("status") or "unknown")
    counts = fields.get("request_counts")
    counts = counts if isinstance(counts, dict) else {}
    usage = fields.get("usage")
    files = (fields.get("output_file_id"), fields.get("error_file_id"))
    return Batch(
        id=batch_id,
        phase=_PHASES.get(state.lower(), "running"),
        state=state.lower(),
        total=_count(counts.get("total")),
        completed=_count(counts.get("completed")),
        failed=_count(counts.get("failed")),
        tokens=_count(usage.get("total_tokens")) if isinstance(usage, dict) else None,
        files=tuple(file_id for file_id in files if isinstance(file_id, str) and file_id),
        tag=_text(metadata.get(TAG)) if isinstance(metadata := fields.get("metadata"), dict) else None,
        file_id=_text(fields.get("input_file_id")),
        faults=tuple(_faults(fields.get("errors"))),
    )


def _faults(errors: Any) -> Iterator[Fault]:
    entries = errors.get("data") if isinstance(errors, dict) else errors
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            code, line = entry.get("code"), entry.get("line")
            yield Fault(
                code=str(code) if code is not None else None,
                message=str(entry.get("message") or code or "no reason was given"),
                line=line if isinstance(line, int) and not isinstance(line, bool) else None,
            )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
