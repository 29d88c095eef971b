"""Objects in S3 and whatever speaks its protocol: all clients of boto3 are made here, and its errors end here.

Where the servers are, who we are and how we show it is found as boto3 finds it: `AWS_ENDPOINT_URL_S3`,
`AWS_ENDPOINT_URL`, `AWS_PROFILE`, `AWS_REGION`, `~/.aws`, the machine's role. An object is named `s3://BUCKET/KEY`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from batchkit.errors import CredentialsError, StorageError, UsageError

SCHEME = "s3://"
WHOLE_BYTES = 64 << 20
"""Up to this size an object is put in one request; larger ones in parts, of which all or none become the object."""

TRIES = 4
_NAMES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_REGION",
          "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AWS_CREDENTIAL_EXPIRATION",
          "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")  # fmt: skip
"""What a client is made from, beside files."""

_clients: dict[tuple[int, int, tuple[str | None, ...]], tuple[Any, Any]] = {}
"""Each with the session that it is of."""
_making = threading.Lock()


class MissingError(StorageError):
    """There is no such object."""


class ChangedError(StorageError):
    """The object is not, or no longer, what the condition of a PUT says."""


class DeniedError(StorageError):
    """These credentials may not do that."""


class Found(NamedTuple):
    """An object as it was listed or looked at. `age` in seconds, by the server's clock alone; None where unknown."""

    name: str
    etag: str
    bytes: int
    age: float | None = None


def is_s3(uri: object) -> bool:
    return str(uri).startswith(SCHEME)


def split(uri: str) -> tuple[str, str]:
    """Bucket and key. Raises `UsageError` where there is no bucket."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise UsageError(f"{uri}: names no bucket", hint="s3://BUCKET/NAME")
    return bucket, key


def client() -> Any:
    """A client as the environment is now; one for each environment and process."""
    return _connection()[0]


def credentials() -> Any:
    """What `client` signs with, None where there is nothing."""
    return _connection()[1].get_credentials()


def client_in(region: str) -> Any:
    """A client like that of `client`, with the same credentials, whose URLs are those of Amazon's servers in a region:
    left alone, boto3 signs URLs of a server that leads others on to those, which the signature does not survive."""
    made, session = _connection()
    place = session.client("s3", region_name=region, config=made.meta.config).meta.endpoint_url
    return session.client("s3", region_name=region, config=made.meta.config, endpoint_url=place)


def _connection() -> tuple[Any, Any]:
    secret = hash(os.environ.get("AWS_SECRET_ACCESS_KEY"))  # mended in a notebook, say
    key = (os.getpid(), secret, tuple(os.environ.get(name) for name in _NAMES))
    with _making:
        if key not in _clients:
            session = make_session()
            _clients[key] = make_client(session), session
        return _clients[key]


def make_session() -> Any:
    import boto3

    return boto3.session.Session()


def make_client(session: Any) -> Any:
    """A client of one's own, as `client` is."""
    from botocore.config import Config

    config = Config(
        signature_version="s3v4",
        retries={"mode": "standard", "max_attempts": TRIES},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
        # Servers that are not Amazon's know neither the newer checksums nor the headers they come in.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return session.client("s3", config=config)


# -- reading ---------------------------------------------------------------------------------------------------------


def look(uri: str) -> Found:
    """What the object is. A GET whose body is not read: the answer to a HEAD has no words for what is wrong."""
    bucket, key = split(uri)
    with translated(uri, "read"):
        answer = client().get_object(Bucket=bucket, Key=key)
        answer["Body"].close()
        return _found(key, answer)


def version(uri: str) -> str | None:
    """The ETag of an object, by a HEAD; None where the server refuses it, without the reason: `look` has that."""
    from botocore.exceptions import ClientError, ParamValidationError

    with contextlib.suppress(UsageError), translated(uri, "read"):
        bucket, key = split(uri)
        try:
            return str(client().head_object(Bucket=bucket, Key=key)["ETag"])
        except ParamValidationError:
            return None
        except ClientError as exc:
            if exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500) >= 500:
                raise
    return None


def get(uri: str) -> tuple[bytes, Found]:
    """A small object, whole."""
    bucket, key = split(uri)
    with translated(uri, "read"):
        answer = client().get_object(Bucket=bucket, Key=key)
        return answer["Body"].read(), _found(key, answer)


def get_piece(uri: str, start: int, end: int, etag: str) -> bytes:
    """The bytes `[start, end)` of an object. Raises `ChangedError` where it is no longer the one with that ETag."""
    bucket, key = split(uri)
    with translated(uri, "read"):
        answer = client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", IfMatch=etag)
        return bytes(answer["Body"].read())


def download(uri: str, path: Path, *, append: bool = False) -> Found:
    """Stream an object into the file `path`. Raises `StorageError` where less came than it has."""
    bucket, key = split(uri)
    with translated(uri, "read"):
        answer = client().get_object(Bucket=bucket, Key=key)
        found, count = _found(key, answer), 0
        with open(path, "ab" if append else "wb") as stream:
            for piece in answer["Body"].iter_chunks(1 << 20):
                stream.write(piece)
                count += len(piece)
    if count != found.bytes:
        raise StorageError(f"{uri}: of {found.bytes:,} bytes {count:,} arrived", hint="run the same command again")
    return found


def listed(uri: str) -> Iterator[Found]:
    """All objects whose names begin with `uri`; their names are what follows it."""
    bucket, prefix = split(uri)
    with translated(uri, "list"):
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                yield Found(entry["Key"][len(prefix) :], entry["ETag"], entry["Size"])


def _found(key: str, answer: Any) -> Found:
    modified, headers = answer.get("LastModified"), answer["ResponseMetadata"]["HTTPHeaders"]
    age = None
    if isinstance(modified, dt.datetime):
        from email.utils import parsedate_to_datetime

        here = parsedate_to_datetime(headers["date"]) if "date" in headers else dt.datetime.now(dt.UTC)
        age = max(0.0, (here - modified).total_seconds())
    return Found(key, answer["ETag"], answer["ContentLength"], age)


# -- writing ---------------------------------------------------------------------------------------------------------


def put(uri: str, body: Any, *, only_new: bool = False, only_over: str | None = None) -> str:
    """Write an object, whole or not at all, and return its ETag. `body` is bytes or a binary file.

    `only_new`: raise `ChangedError` where there is one already; `only_over`: where it has another ETag.
    """
    bucket, key = split(uri)
    condition = {"IfNoneMatch": "*"} if only_new else {"IfMatch": only_over} if only_over is not None else {}
    with translated(uri, "write"):
        return str(client().put_object(Bucket=bucket, Key=key, Body=body, **condition)["ETag"])


def put_file(uri: str, path: Path, *, only_new: bool = False, only_over: str | None = None) -> str:
    """`put` of a file of any size; the conditions hold for those up to `WHOLE_BYTES`."""
    if path.stat().st_size <= WHOLE_BYTES:
        with open(path, "rb") as stream:
            return put(uri, stream, only_new=only_new, only_over=only_over)
    from boto3.s3.transfer import TransferConfig

    bucket, key = split(uri)
    with translated(uri, "write"):
        parts = TransferConfig(multipart_threshold=WHOLE_BYTES, multipart_chunksize=WHOLE_BYTES // 2, max_concurrency=4)
        client().upload_file(str(path), bucket, key, Config=parts)
        return str(client().head_object(Bucket=bucket, Key=key)["ETag"])


def delete(uri: str) -> None:
    """Remove an object; one that is not there is no error."""
    bucket, key = split(uri)
    with translated(uri, "delete"):
        client().delete_object(Bucket=bucket, Key=key)


# -- errors ----------------------------------------------------------------------------------------------------------

GET_CREDENTIALS = "aws configure, aws sso login, AWS_PROFILE=NAME, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_CREDENTIALS = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
     "TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError", "SSOError"}
)  # fmt: skip
_UNREACHABLE = frozenset(
    {"EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError", "SSLError",
     "ProxyConnectionError", "HTTPClientError", "ResponseStreamingError", "IncompleteReadError", "ProtocolError"}
)  # fmt: skip


@contextlib.contextmanager
def translated(uri: str, doing: str) -> Iterator[None]:
    """What boto3 raises in the block, as an error of ours that names the object and the next step."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as exc:
        raise _of_answer(uri, doing, exc) from exc
    except (BotoCoreError, Boto3Error) as exc:
        if isinstance(exc.__context__, ClientError):  # S3UploadFailedError and the like
            raise _of_answer(uri, doing, exc.__context__) from exc
        raise _of_client(uri, exc) from exc
    except RuntimeError as exc:  # of botocore, where AWS_CREDENTIAL_EXPIRATION is over
        if "expired" not in str(exc):
            raise
        raise CredentialsError(f"{uri}: the credentials have expired", hint=f"renew them: {GET_CREDENTIALS}") from exc


def _of_client(uri: str, exc: Exception) -> StorageError | CredentialsError:
    kinds = {kind.__name__ for kind in type(exc).__mro__}
    if kinds & _CREDENTIALS:
        return CredentialsError(f"{uri}: no credentials for S3: {exc}", hint=GET_CREDENTIALS)
    if kinds & _UNREACHABLE:
        return StorageError(
            f"{uri}: {_server()} cannot be reached ({type(exc).__name__})",
            hint="check the network and AWS_ENDPOINT_URL, and run the same command again: it goes on where it stopped",
        )
    return StorageError(f"{uri}: {exc}", hint="check the settings of AWS (aws configure list)")


def _server() -> str:
    with contextlib.suppress(Exception):  # only for the message
        return str(client().meta.endpoint_url)
    return "the server"


def _of_answer(uri: str, doing: str, exc: Any) -> StorageError | CredentialsError:
    error, about = exc.response.get("Error", {}), exc.response.get("ResponseMetadata", {})
    code, message = str(error.get("Code", "")), str(error.get("Message", ""))
    return error_of(uri, doing, code=code, status=about.get("HTTPStatusCode"), message=message)


def error_of(uri: str, doing: str, *, code: str, status: int | None, message: str) -> StorageError | CredentialsError:
    """What the server's answer to a request for `uri` means, as an error of ours."""
    bucket = split(uri)[0]
    if code in _ANSWERS:
        kind, text, hint = _ANSWERS[code]
        return kind(f"{uri}: {text.format(bucket=bucket, server=_server(), code=code)}", hint=hint)
    if status == 403:
        return DeniedError(
            f"{uri}: access denied: these credentials may not {doing} it",
            hint=f"let them (IAM: {_PERMISSIONS[doing]} on {bucket}), or use others: {GET_CREDENTIALS}",
        )
    return StorageError(
        f"{uri}: cannot {doing} it: {code or status}: {message}".rstrip(": "),
        hint="run the same command again later: it goes on where it stopped",
    )


_Answer = tuple[type[StorageError] | type[CredentialsError], str, str]
_MISSING: _Answer = (MissingError, "no such object", "check the name")
_CHANGED: _Answer = (ChangedError, "was changed by somebody else", "run the same command again")
_EXPIRED: _Answer = (CredentialsError, "the credentials have expired", f"renew them: {GET_CREDENTIALS}")
_NOT_TAKEN: _Answer = (CredentialsError, "the credentials are not taken ({code})", GET_CREDENTIALS)
_ELSEWHERE: _Answer = (StorageError, "the bucket is in another region", "AWS_REGION=REGION names it")
_SKEWED: _Answer = (
    StorageError,
    "this machine's clock is off, and the server refuses its requests",
    "set the clock (timedatectl set-ntp true), and run the same command again",
)
_ANSWERS = {
    "NoSuchKey": _MISSING,
    "404": _MISSING,
    "PreconditionFailed": _CHANGED,
    "ConditionalRequestConflict": _CHANGED,
    "412": _CHANGED,
    "NoSuchBucket": (StorageError, "there is no bucket {bucket} at {server}", "check its name, or make it"),
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestExpired": _EXPIRED,
    "InvalidAccessKeyId": _NOT_TAKEN,
    "InvalidToken": _NOT_TAKEN,
    "SignatureDoesNotMatch": _NOT_TAKEN,
    "AuthorizationHeaderMalformed": _NOT_TAKEN,
    "RequestTimeTooSkewed": _SKEWED,
    "PermanentRedirect": _ELSEWHERE,
    "IllegalLocationConstraintException": _ELSEWHERE,
}
_PERMISSIONS = {
    "read": "s3:GetObject",
    "write": "s3:PutObject",
    "list": "s3:ListBucket",
    "delete": "s3:DeleteObject",
}
