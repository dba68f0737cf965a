"""Conditional writes to S3: an object is written only if it is as it was last seen.

`PutObject` takes `If-None-Match: *` (the object must not exist) and `If-Match: ETAG` (it must be the one with this
ETag). Amazon S3 has obeyed the first since August 2024 and the second since November 2024
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html); other servers may refuse them, or
ignore them, which `obeys_conditions` finds out.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from ixi_etl.core.storage import filesystem_of, naming_file

NOT_SUPPORTED = (400, 405, 501)
"""Statuses of servers that know no conditional writes; Amazon's answered 501 before it had them."""

CHANGED = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")
"""Codes of 412, of 409 (another write was in progress) and of 404 (the object to replace does not exist)."""

NO_ETAG = f'"{"0" * 32}"'


class NoConditionsError(Exception):
    """The server refuses conditional writes."""


@dataclass(frozen=True)
class StoredObject:
    """The content of a small object.

    Attributes:
        etag: changes whenever the content does.
        age_s: seconds since it was written, by the server's clock alone.
        read_at: when it was read, by the server's clock.
    """

    data: bytes
    etag: str
    age_s: float
    read_at: datetime


def read_object(path: Path) -> StoredObject | None:
    """The object at a path on S3; None if it does not exist."""
    from fsspec.asyn import sync

    filesystem, bucket, key = _parts(path)
    try:
        with naming_file(path):
            response = filesystem.call_s3("get_object", Bucket=bucket, Key=key)
            data = sync(filesystem.loop, response["Body"].read)
    except FileNotFoundError:
        return None
    date = response["ResponseMetadata"]["HTTPHeaders"].get("date")  # every server with a clock sends it (RFC 9110)
    now = parsedate_to_datetime(date) if date else datetime.now(UTC)
    return StoredObject(data, response["ETag"], (now - response["LastModified"]).total_seconds(), now)


def put_if_unchanged(path: Path, data: bytes, etag: str | None) -> str | None:
    """Write an object on S3 if it has the ETag `etag`, or if it does not exist and `etag` is None.

    Returns:
        The new ETag; None if the object had changed, and was not written.

    Raises:
        NoConditionsError: the server refuses conditional writes.
        OSError: the server cannot be reached, or refuses the write for another reason.
    """
    filesystem, bucket, key = _parts(path)
    condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
    try:
        with naming_file(path):
            return str(filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)["ETag"])
    except OSError as error:
        response = getattr(error.__cause__, "response", None) or {}  # of botocore's exception
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if response.get("Error", {}).get("Code") in CHANGED or status in (409, 412):
            return None
        if status in NOT_SUPPORTED:
            raise NoConditionsError from error
        raise


def obeys_conditions(path: Path, data: bytes) -> bool:
    """Whether the server refuses both writes that it must refuse, of the object `data` that exists at `path`.

    Some servers ignore the conditions and write; the object is then written as it was.
    """
    try:
        return all(put_if_unchanged(path, data, etag) is None for etag in (None, NO_ETAG))
    except NoConditionsError:
        return False


def _parts(path: Path) -> tuple[Any, str, str]:
    filesystem, full = filesystem_of(path)
    bucket, _, key = full.partition("/")
    return filesystem, bucket, key
