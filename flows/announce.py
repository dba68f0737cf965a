"""Events of a dataset: that a version is published, and that its checks failed."""

from __future__ import annotations

from typing import Any

from prefect.events import emit_event

from ixi_etl.core.storage import DataRoot
from ixi_etl.dataset.checks import describe_failure, failed_checks, held_by

PUBLISHED = "ixi.dataset.published"
CHECKS_FAILED = "ixi.dataset.checks_failed"


def resource_of(data_root: DataRoot) -> dict[str, str]:
    """The resource of a dataset's events."""
    return {"prefect.resource.id": f"ixi.dataset.{data_root.name}", "prefect.resource.name": data_root.name}


def announce(data_root: DataRoot, version: str) -> None:
    """Emit the events of a new version: that it is published, unless a failed check holds it, and any failed checks.

    The first starts a training run on a version of `ixi-t1-t2` (`prefect.yaml`).
    """
    announce_failed_checks(data_root, version)
    if not held_by(data_root.version(version)):
        emit_event(PUBLISHED, resource_of(data_root), payload=_payload(data_root, version))


def announce_failed_checks(data_root: DataRoot, version: str) -> None:
    """Emit the event of a version's failed checks, which a notification reports; none if it has no failed check."""
    folder = data_root.version(version)
    failures = failed_checks(folder)
    if failures:
        line = "; ".join(map(describe_failure, failures))
        payload = _payload(data_root, version) | {"failed": line, "held": bool(held_by(folder))}
        emit_event(CHECKS_FAILED, resource_of(data_root), payload=payload)


def _payload(data_root: DataRoot, version: str) -> dict[str, Any]:
    return {"version": version, "root": str(data_root.root)}
