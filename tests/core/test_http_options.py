"""`HttpOptions` carries the HTTP settings of every configuration."""

from __future__ import annotations

import re

import pytest

from ixi_etl.config import DigitsConfig, RefreshConfig
from ixi_etl.core.http_options import HttpOptions
from ixi_etl.errors import ConfigError


def test_configurations_pass_their_http_settings_on() -> None:
    config = RefreshConfig(connections=2, insecure_hosts=("localhost",), offline=True)
    assert config.http == HttpOptions(connections=2, insecure_hosts=("localhost",), offline=True)
    assert RefreshConfig().http == DigitsConfig().http == HttpOptions()
    assert DigitsConfig(offline=True).http == HttpOptions(offline=True)


@pytest.mark.parametrize("host", ["", "*", "*host", "localhost:1", "local host", "https://localhost"])
def test_insecure_host_must_be_one_host_name(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--insecure-host {re.escape(repr(host))} is not the name") as caught:
        HttpOptions(insecure_hosts=(host,))
    assert str(caught.value).isprintable()
