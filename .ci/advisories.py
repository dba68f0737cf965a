"""Compare the versions in constraints.txt with the published advisories, using pip-audit: `make audit`.

If the advisories cannot be reached, the script says that it did not run and exits with 0, because a machine without
internet must be able to run all checks. It exits with 1 if a pinned version has an advisory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PINS = Path(__file__).parent.parent / "constraints.txt"


def audit(pins: list[str]) -> list[dict[str, object]] | str:
    """The findings of pip-audit for each of these pins; or, in a line, why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, found = Path(folder) / "pins.txt", Path(folder) / "found.json"
        wanted.write_text("\n".join(pins) + "\n")
        command = [sys.executable, "-m", "pip_audit", "--requirement", wanted, "--no-deps", "--disable-pip"]
        done = subprocess.run(  # noqa: S603 - no user input
            [*command, "--format", "json", "--output", found], capture_output=True, text=True, check=False
        )
        try:
            return list(json.loads(found.read_text())["dependencies"])
        except (OSError, ValueError, KeyError):
            return (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]


def main() -> int:
    pins = re.findall(r"^[\w.-]+==[^\s;]+", PINS.read_text(), re.MULTILINE)  # for all platforms: without markers
    first = audit(pins[:1])  # before hundreds of requests that may all time out
    answered = not isinstance(first, str) and "skip_reason" not in first[0]
    found = audit(pins) if answered else first
    if isinstance(found, str) or not answered:
        why = found if isinstance(found, str) else found[0]["skip_reason"]
        sys.stdout.write(f"pip-audit did NOT run: the advisories cannot be reached from here ({why})\n")
        return 0
    bad = {f"{d['name']} {d['version']}": d["vulns"] for d in found if d.get("vulns")}
    for name, advisories in bad.items():
        sys.stdout.write(f"{name}: {', '.join(str(a['id']) for a in advisories)}\n")  # type: ignore[attr-defined]
    skipped = sum("skip_reason" in d for d in found)
    sys.stdout.write(f"pip-audit: {len(found) - skipped} versions checked, {len(bad)} with an advisory\n")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
