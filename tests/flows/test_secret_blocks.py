"""Names of variables in IXI_SECRETS; `tests/stack/test_secrets.py` uses the blocks on a server."""

from __future__ import annotations

import pytest

from flows.secret_blocks import block_of
from ixi_etl.errors import ConfigError


def test_a_block_is_named_as_its_variable() -> None:
    assert block_of("AWS_SECRET_ACCESS_KEY") == "aws-secret-access-key"
    assert block_of("TOKEN2") == "token2"


@pytest.mark.parametrize("given", ["", "aws_key", "A__B", "_A", "A-B", "2A", "AWS_SECRET_ACCESS_KEY=hunter2"])
def test_a_name_that_is_no_variable_is_refused_and_not_repeated(given: str) -> None:
    with pytest.raises(ConfigError, match="IXI_SECRETS has an invalid name; give names of variables") as caught:
        block_of(given)
    assert "hunter2" not in str(caught.value)
