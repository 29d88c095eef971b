"""Presigned URLs (signature version 4): whoever has one may read or write one object until it expires.

A URL is signed here, without asking the server. It holds for `MOST_SECONDS` at most, and never longer than the
credentials that sign it: the server refuses it from then on, whatever the URL itself says.
"""

from __future__ import annotations

import datetime as dt
import os
import re
from typing import Any, Self

from batchkit import s3
from batchkit.errors import CredentialsError, UsageError

MOST_SECONDS = 7 * 86_400
"""docs.aws.amazon.com/AmazonS3/latest/userguide/using-presigned-url.html, 2026-11."""

USUAL_SECONDS = 12 * 3600
"""Where the user names no time."""

UNKNOWN_SECONDS = 3600
"""For temporary credentials that do not say when they expire: the shortest life that people usually give to a role."""

CLOCK_SECONDS = 5
"""Between looking at the credentials and signing with them."""

LEAST_SECONDS = 60
"""Credentials that end sooner are of no use."""

EXPIRATION = "AWS_CREDENTIAL_EXPIRATION"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_LONGER = "a long-lived key signs for up to 7 days; a role's sessions may last longer (aws sts assume-role "
_LONGER += "--duration-seconds, or the role's maximum session duration)"


def seconds_of(text: str) -> int:
    """A time as people write it: 90s, 30m, 12h, 7d, or seconds. Raises `UsageError`."""
    found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text.strip())
    seconds = int(found[1]) * UNITS.get(found[2], 1) if found else 0
    if not 0 < seconds <= MOST_SECONDS:
        raise UsageError(f"--expires {text}: from 1s to 7d, which is the most that S3 allows", hint="--expires 12h")
    return seconds


class Signer:
    """Signs URLs that hold `until` then. `note` says why that is sooner than usual, None where it is not.

    `seconds` is what the user wants, None for what is usual, or less where the credentials end before. Raises
    `UsageError` where they end before what the user wants, `CredentialsError` where there are none.
    """

    def __init__(self, uri: str, seconds: int | None = None) -> None:
        self._clients: dict[str, Any] = {}
        self.note: str | None = None
        now = dt.datetime.now(dt.UTC).replace(microsecond=0)
        end, known = _end_of_credentials(uri, now)
        wanted = now + dt.timedelta(seconds=seconds or USUAL_SECONDS)
        self.until = wanted + dt.timedelta(seconds=1)  # URLs hold whole seconds, rounded down
        self._is_wanted = seconds is not None and (end is None or self.until <= end)
        if end is None or wanted <= end:
            self.until = min(self.until, end or self.until)
            return
        if seconds is None:
            self.until = end
            self.note = (
                "that is when the credentials expire" if known else f"nobody knows when these expire: {EXPIRATION}"
            )
            return
        left = _shown(int((end - now).total_seconds()))
        raise UsageError(
            f"--expires {_shown(seconds)}: these credentials expire {'in ' + left if known else 'at an unknown time'}, "
            f"and the URLs with them; the most is --expires {left}",
            hint=_LONGER if known else f"{EXPIRATION}=2026-12-31T23:59:59Z says when they expire; {_LONGER}",
        )

    @classmethod
    def lasting(cls, uri: str, least: int, *, what: str) -> Self:
        """One whose URLs hold as long as they can, and `least` seconds, which `what` may take. Raises `UsageError`
        where they cannot hold that long."""
        now = dt.datetime.now(dt.UTC).replace(microsecond=0)
        end, known = _end_of_credentials(uri, now)
        left = MOST_SECONDS if end is None else min(MOST_SECONDS, int((end - now).total_seconds()) - CLOCK_SECONDS)
        if least <= left:
            return cls(uri, left)
        if least > MOST_SECONDS:
            why = f"a signed URL holds {_shown(MOST_SECONDS)} at most"
        else:
            when = f"in {_shown(left)}" if known else f"at an unknown time ({_shown(left)} is believed)"
            why = f"these credentials expire {when}, and the URLs with them"
        said = "" if known else f"{EXPIRATION}=2026-12-31T23:59:59Z says when they expire; "
        raise UsageError(
            f"--presign: {what} may take {_shown(least)}, and {why}",
            hint=f"without --presign the images go as base64; {said}{_LONGER}",
        )

    def get(self, uri: str) -> str:
        """A URL to read the object `uri`."""
        return self._sign(uri, "get_object")

    def put(self, uri: str) -> str:
        """A URL to write the object `uri`."""
        return self._sign(uri, "put_object")

    def _sign(self, uri: str, operation: str) -> str:
        bucket, key = s3.split(uri)
        if not key:
            raise UsageError(f"{uri}: names no object", hint="s3://BUCKET/KEY")
        seconds = int((self.until - dt.datetime.now(dt.UTC)).total_seconds())
        if seconds < 1 and self._is_wanted:
            raise UsageError(f"{uri}: the time is over before all is signed", hint="--expires 12h")
        if seconds < 1:
            raise CredentialsError(f"{uri}: the credentials have expired", hint=f"renew them: {s3.GET_CREDENTIALS}")
        with s3.translated(uri, "read"):
            client = self._client(bucket)
            return str(
                client.generate_presigned_url(operation, Params={"Bucket": bucket, "Key": key}, ExpiresIn=seconds)
            )

    def _client(self, bucket: str) -> Any:
        """For the region of the bucket: a request is led there by the answers of Amazon's servers, a URL is not."""
        if bucket not in self._clients:
            client = s3.client()
            if ".amazonaws.com" in client.meta.endpoint_url:
                client = s3.client_in(_region(client, bucket) or client.meta.region_name)
            self._clients[bucket] = client
        return self._clients[bucket]


class Presigner:
    """Signs URLs for a backend that needs them for `least` seconds from then on; `what` it does meanwhile is for
    messages. `slack` more seconds are wanted at the beginning. The credentials may be renewed in between."""

    def __init__(self, uri: str, least: int, *, what: str, slack: int = 0) -> None:
        self._uri, self._least, self._what = uri, least, what
        self._signer = Signer.lasting(uri, least + slack, what=what)

    @property
    def until(self) -> str:
        return self._signer.until.isoformat()

    def holds(self, until: str) -> bool:
        """Whether that is late enough for what begins now."""
        return (dt.datetime.fromisoformat(until) - dt.datetime.now(dt.UTC)).total_seconds() >= self._least

    def get(self, uri: str) -> str:
        """Raises `UsageError` where it cannot hold long enough any more."""
        if not self.holds(self.until):
            self._signer = Signer.lasting(self._uri, self._least, what=self._what)
        return self._signer.get(uri)


def _region(client: Any, bucket: str) -> str | None:
    """Where the bucket is, as any answer about it says; None where there is none."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        answer = client.head_bucket(Bucket=bucket)
    except ClientError as exc:
        answer = exc.response
    except BotoCoreError:
        return None
    region = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
    return str(region) if region else None


def _end_of_credentials(uri: str, now: dt.datetime) -> tuple[dt.datetime | None, bool]:
    """When they end, None for those that do not; and whether that is known."""
    with s3.translated(uri, "read"):
        credentials = s3.credentials()
        frozen = credentials.get_frozen_credentials() if credentials is not None else None  # fetches or renews them
    if frozen is None:
        raise CredentialsError(f"{uri}: no credentials to sign with", hint=s3.GET_CREDENTIALS)
    if not frozen.token:
        return None, True
    # botocore has no public name for it (RefreshableCredentials, botocore 1.40).
    end = getattr(credentials, "_expiry_time", None) or _said(os.environ.get(EXPIRATION))
    if end is None:
        return now + dt.timedelta(seconds=UNKNOWN_SECONDS), False
    if (end - now).total_seconds() < LEAST_SECONDS:
        raise CredentialsError(f"{uri}: the credentials expire now", hint=f"renew them: {s3.GET_CREDENTIALS}")
    return end, True


def _said(text: str | None) -> dt.datetime | None:
    if not text:
        return None
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError as exc:
        raise UsageError(f"{EXPIRATION}={text}: is no time", hint=f"{EXPIRATION}=2026-12-31T23:59:59Z") from exc
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=dt.UTC)


def _shown(seconds: int) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds // 60}m" if seconds >= 600 else f"{seconds}s"  # rounded down, whole minutes
