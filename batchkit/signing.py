"""GETs of objects in S3 that another client than boto3 sends: their headers, and what a refusal of them means.

A boto3 GET costs some milliseconds of CPU, a signature less than a tenth of one.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple
from urllib.parse import quote

from batchkit import s3
from batchkit.errors import BatchkitError, CredentialsError, UsageError

PASSING_CODES = frozenset({"RequestTimeout", "RequestTimeoutException", "SlowDown", "InternalError", "Throttling"})
_STOPPING = frozenset(
    {"NoSuchBucket", "RequestTimeTooSkewed", "PermanentRedirect", "IllegalLocationConstraintException"}
)
"""What will be said of every object of the bucket."""

_SCOPE = re.compile(r"Credential=[^,]*/([^/,]+)/s3/aws4_request")
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
        self._client: Any = None
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
        """What the addresses of its objects begin with, and its region: by a request of boto3 that never leaves."""
        if self._credentials is None:
            session = s3.make_session()
            self._credentials = session.get_credentials()
            self._client = s3.make_client(session)  # its own: that of all others must send what it is asked for
            self._client.meta.events.register_first("before-send.s3.GetObject", _keep_back)
        try:
            self._client.get_object(Bucket=bucket, Key="k")
        except _KeptBackError as exc:
            scope = _SCOPE.search(exc.authorization)
            assert scope is not None  # noqa: S101  # boto3 has signed it
            return exc.url.removesuffix("k"), scope[1]
        raise AssertionError("the request has left")


class _KeptBackError(Exception):
    """A request that boto3 was about to send."""

    def __init__(self, url: str, authorization: str) -> None:
        super().__init__(url)
        self.url = url
        self.authorization = authorization


def _keep_back(request: Any, **_: Any) -> None:
    header = request.headers["Authorization"]
    raise _KeptBackError(request.url, header.decode() if isinstance(header, bytes) else header)


def refusal(uri: str, status: int, body: bytes) -> Refusal:
    """What an answer that is no success means, by its status and the XML that comes with it."""
    code, message = (found[1].decode() if (found := pattern.search(body)) else "" for pattern in (_CODE, _MESSAGE))
    error = s3.error_of(uri, "read", code=code, status=status, message=message)
    return Refusal(code, error, code in _STOPPING or isinstance(error, CredentialsError))
