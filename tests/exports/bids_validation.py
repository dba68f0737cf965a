"""The BIDS validator, as its users run it, but without the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

VALIDATOR = "import sys; from bids_validator_deno import cli; sys.exit(cli())"


def validate(folder: Path, scratch: Path) -> Counter[tuple[str, str]]:
    """What the BIDS validator finds: (code, field) of each warning. Errors fail the test.

    It has the schema inside; `BIDS_SCHEMA` would make it fetch another. `scratch` becomes its home.
    """
    kept = {name: value for name, value in os.environ.items() if name != "BIDS_SCHEMA"}
    environment = kept | {"HOME": str(scratch), "DENO_DIR": str(scratch / "deno"), "DENO_NO_UPDATE_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", VALIDATOR, str(folder), "--format", "json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert not [issue for issue in issues if issue["severity"] == "error"]
    assert done.returncode == 0
    return Counter((issue["code"], issue.get("subCode", "")) for issue in issues)
