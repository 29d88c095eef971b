"""GETs of objects in S3 that another client than boto3 sends: their headers, and what a refusal of them means.

A boto3 GET costs some milliseconds of CPU, a signature less than a tenth of one.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

from batchkit import s3
from batchkit.errors import BatchkitError, CredentialsError, UsageError

PASSING_CODES = frozenset({"RequestTimeout", "RequestTimeoutException", "SlowDown", "InternalError", "Throttling"})
_STOPPING = frozenset(
    {"NoSuchBucket", "RequestTimeTooSkewed", "PermanentRedirect", "IllegalLocationConstraintException"}
)
"""What will be said of every object of the bucket."""

_CODE = re.compile(rb"<Code>([\w.-]{1,100})</Code>")
_MESSAGE = re.compile(rb"<Message>([^<]{1,300})</Message>")


class Refusal(NamedTuple):
    """What S3 says of a GET. `error` is ours, with its hint; `stops`: it holds for all objects, not for this one."""

    code: str
    error: BatchkitError
    stops: bool


class Signer:
    """Makes the address and the headers of GETs, signed with the credentials as they are then."""

    def __init__(self) -> None:
        self._credentials: Any = None
        self._prefixes: dict[str, tuple[str, str]] = {}

    def sign(self, uri: str) -> tuple[str, dict[str, str]]:
        """Raises `CredentialsError` where there are none, `UsageError` where `uri` names no object."""
        bucket, key = s3.split(uri)
        if not key:
            raise UsageError(f"{uri}: names no object", hint="s3://BUCKET/NAME")
        with s3.translated(uri, "read"):
            from botocore.auth import S3SigV4Auth
            from botocore.awsrequest import AWSRequest

            if bucket not in self._prefixes:
                self._prefixes[bucket] = self._look_up(bucket)
            prefix, region = self._prefixes[bucket]
            request = AWSRequest("GET", prefix + quote(key, safe="/~"))
            S3SigV4Auth(self._credentials.get_frozen_credentials(), "s3", region).add_auth(request)
            return request.url, dict(request.headers.items())

    def move(self, uri: str, region: str) -> bool:
        """Take note that the bucket of `uri` is in `region`; False where that was known."""
        bucket = s3.split(uri)[0]
        prefix, before = self._prefixes[bucket]
        self._prefixes[bucket] = (prefix.replace(f".{before}.", f".{region}.", 1), region)
        return before != region

    def _look_up(self, bucket: str) -> tuple[str, str]:
        """What the addresses of its objects begin with, and its region: as boto3 signs them."""
        if self._credentials is None:
            import boto3

            self._credentials = boto3.session.Session().get_credentials()
        if self._credentials is None:
            from botocore.exceptions import NoCredentialsError

            raise NoCredentialsError
        url = s3.client().generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
        scope = parse_qs(urlsplit(url).query)["X-Amz-Credential"][0]
        return url.partition("?")[0].removesuffix("k"), scope.split("/")[-3]


def refusal(uri: str, status: int, body: bytes) -> Refusal:
    """What an answer that is no success means, by its status and the XML that comes with it."""
    code, message = (found[1].decode() if (found := pattern.search(body)) else "" for pattern in (_CODE, _MESSAGE))
    error = s3.error_of(uri, "read", code=code, status=status, message=message)
    return Refusal(code, error, code in _STOPPING or isinstance(error, CredentialsError))
