"""Files are read whole, also while another process replaces them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ixi_etl.core.storage import read_bytes, to_path


def test_an_object_that_is_replaced_while_it_is_read_is_one_of_both(
    s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    path, call = to_path(s3_root) / "latest.json", S3FileSystem._call_s3
    path.write_bytes(b"before")

    async def replace_after_head(self: S3FileSystem, method: str, *args: Any, **options: Any) -> Any:
        answer = await call(self, method, *args, **options)
        if method == "head_object":
            await call(self, "put_object", Bucket=options["Bucket"], Key=options["Key"], Body=b"and after")
        return answer

    monkeypatch.setattr(S3FileSystem, "_call_s3", replace_after_head)
    assert read_bytes(path) in (b"before", b"and after")


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_missing_file_is_an_error_that_names_it(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = to_path(request.getfixturevalue("s3_root")) if where == "s3" else tmp_path
    with pytest.raises(FileNotFoundError) as raised:
        read_bytes(root / "missing.json")
    assert str(raised.value.filename).endswith("missing.json")
